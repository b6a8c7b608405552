"""CUDA: the GPU, its driver, and the toolkit that builds the runners: an installed one, or NVIDIA's wheels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: Libraries that a runner is linked with.
LIBRARIES = ("cudart", "cublas", "cublasLt")


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    folders: tuple[Path, ...]  # where its headers and libraries are

    def library(self, name: str) -> Path | None:
        """A shared library: lib<name>.so, or with its number where the wheels leave the plain name out."""
        for folder in self.folders:
            for below in ("lib64", "lib"):
                plain = folder / below / f"lib{name}.so"
                for found in (plain, *sorted(plain.parent.glob(f"{plain.name}.[0-9]*"))):
                    if found.is_file():
                        return found
        return None

    def header(self, name: str) -> Path | None:
        return next((found for folder in self.folders if (found := folder / "include" / name).is_file()), None)

    def missing(self) -> str:
        """What of it is not there, or ""."""
        for header in ("cuda_runtime.h", "cublas_v2.h"):
            if self.header(header) is None:
                return header
        return next((f"lib{name}" for name in LIBRARIES if self.library(name) is None), "")


def wheels() -> list[Path]:
    """Folders of NVIDIA's wheels in this Python: nvidia/cu13, whose parts lie as those of an installed toolkit do."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted((found for place in places for found in Path(place).glob("cu[0-9]*")), reverse=True)


def toolkit() -> Toolkit | None:
    """The compiler of CUDA_HOME, PATH, /usr/local/cuda or the wheels; what it lacks may come from the wheels."""
    named = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = [Path(found)] if (found := shutil.which("nvcc")) else []
    usual = [Path("/usr/local/cuda/bin/nvcc")]
    for nvcc in (*named, *on_path, *usual, *(folder / "bin" / "nvcc" for folder in wheels())):
        if nvcc.is_file():
            return Toolkit(nvcc, tuple(dict.fromkeys([_root(nvcc), *wheels()])))
    return None


@functools.cache
def _root(nvcc: Path) -> Path:
    """The folder above a compiler's bin, which a script of that name may only call."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True, timeout=30, check=False
        )
        if match := re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE):
            return Path(match[1].strip()).resolve()
    return nvcc.resolve().parent.parent


def cmake_options(links: Path) -> list[str]:
    """How CMake finds the toolkit. `links` becomes a folder of the libraries under all their names."""
    found = toolkit()
    if found is None:
        return []
    links.mkdir(parents=True, exist_ok=True)
    options = [f"-DCMAKE_CUDA_COMPILER={found.nvcc}", f"-DCUDAToolkit_ROOT={found.folders[0]}"]
    for name in LIBRARIES:
        if library := found.library(name):
            plain = f"lib{name}.so"
            # with its numbers too: linked with the plain name, a runner looks for a numbered one in the same folder
            for file in {plain, *(path.name for path in library.parent.glob(f"{plain}.*"))}:
                (links / file).unlink(missing_ok=True)
                (links / file).symlink_to(library if file == plain else library.parent / file)
            options.append(f"-DCUDA_{name}_LIBRARY={links / plain}")
    options.append(f"-DCUDA_CUDART={links / 'libcudart.so'}")
    flags = [
        f"-L{folder / below}" for folder in found.folders for below in ("lib64", "lib") if (folder / below).is_dir()
    ]
    if (header := found.header("cublas_v2.h")) and header.parent != found.folders[0] / "include":
        flags.append(f"-I{header.parent}")
    options.append(f"-DCMAKE_CUDA_FLAGS={' '.join(flags)}")
    if named := os.environ.get("CUDAARCHS"):
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={named}")
    elif not devices():
        options.append("-DCMAKE_CUDA_ARCHITECTURES=80;90")  # no device to ask: nobody's `native`
    return options


@functools.cache
def _driver() -> tuple[int, tuple[tuple[str, int], ...]] | None:
    """The driver's newest CUDA (13000: 13.0), its devices' names and compute capabilities; None: no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0:
        return 0, ()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append((name.value.decode("utf-8", "replace"), 10 * major.value + minor.value))
    return version.value, tuple(found)


def devices() -> tuple[tuple[str, int], ...]:
    """Names and compute capabilities (90: 9.0) of the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    driver = _driver()
    return driver[1] if driver else ()


def has_bf16() -> bool:
    """Whether the first GPU computes products in bf16 as fast as in f16: compute capability 8.0 and later."""
    return bool(devices()) and devices()[0][1] >= 80


@functools.cache
def compiler_version(nvcc: Path) -> int:
    """13000 for CUDA 13.0; 0 where the compiler does not say."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=False)
        if match := re.search(r"release (\d+)\.(\d+)", done.stdout):
            return 1000 * int(match[1]) + 10 * int(match[2])
    return 0


def reason() -> str:
    """Why this machine cannot train through CUDA, or ""."""
    driver = _driver()
    if driver is None:
        return "cuda needs NVIDIA's driver, and there is no libcuda"
    version, there = driver
    if not there:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "cuda finds no GPU" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden or '(empty)'} names no GPU"
    found = toolkit()
    if found is None:
        return (
            "cuda needs NVIDIA's toolkit, and there is no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or in a wheel"
        )
    if missing := found.missing():
        return f"cuda needs {missing}, which is neither with {found.nvcc} nor in a wheel"
    # within a major version an older driver runs what a newer toolkit has built
    if version // 1000 < compiler_version(found.nvcc) // 1000:
        return (
            f"the driver is too old: it has CUDA {version // 1000}.{version % 1000 // 10},"
            f" and {found.nvcc} builds for {compiler_version(found.nvcc) // 1000}"
        )
    return ""


def about() -> str:
    """The GPU, its driver and the toolkit, where there are all of them."""
    driver, found = _driver(), toolkit()
    if driver is None or not driver[1] or found is None:
        return ""
    version, [(name, capability), *_] = driver
    text = (
        f"{name}, compute capability {capability // 10}.{capability % 10}, trains in {'bf16' if has_bf16() else 'f32'}"
    )
    text += " unless train.dtype says otherwise"
    return f"{text}; driver: CUDA {version // 1000}.{version % 1000 // 10}; {found.nvcc}"
