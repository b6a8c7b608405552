"""What an ARM CPU computes, compiled here and run by qemu: the native tests, with its bf16 instructions; and the gates,
which were recorded on x86-64, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gates import GATES, NAMES, train
from harness import ROOT, Toy

from toy import builds
from toy.recipes import MATRIX

PREFIX = "aarch64-linux-gnu"
QEMU = ("qemu-aarch64", "-cpu", "max", "-L", f"/usr/{PREFIX}")
MISSING = [name for name in (f"{PREFIX}-gcc", f"{PREFIX}-g++", QEMU[0]) if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt install g++-aarch64-linux-gnu qemu-user"),
]

#: BFMMLA, BFDOT and i8mm are of ARMv8.6; a portable build is for every ARMv8.
VARIANTS = {
    "native": ("-DTOY_MARCH=armv8.6-a+bf16", "-DTOY_TESTS=ON", "-DTOY_RUNNERS=OFF"),
    "portable": ("-DTOY_VARIANT=portable",),
}


def tool(name: str) -> str:
    found = builds.wheel_tool(name)
    assert found is not None
    return found


def run(*argv: object, **env: str) -> None:
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def build(variant: str, *targets: str) -> Path:
    """The folder of a build for ARM, which keeps what did not change; ggml's source is that of the other builds."""
    folder = ROOT / "build" / "aarch64" / variant
    options = {
        "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{PREFIX}-gcc", "CMAKE_CXX_COMPILER": f"{PREFIX}-g++",
        "CMAKE_CROSSCOMPILING_EMULATOR": ";".join(QEMU), "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable, "TOY_GGML_SRC": ROOT / "build" / "ggml-src",
        "TOY_LIBEXEC": folder / "libexec",
    }  # fmt: skip
    flags = [f"-D{name}={value}" for name, value in options.items()]
    run(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *flags, *VARIANTS[variant])
    run(tool("ninja"), "-C", folder, *targets)
    return folder


def test_the_native_tests() -> None:
    folder = build("native")
    jobs = ("--parallel", os.cpu_count() or 1)
    # CUDA's kernels are no more ARM's than x86-64's
    but = ("--exclude-regex", "cuda")
    run(tool("ctest"), "--test-dir", folder, "--output-on-failure", *jobs, *but, TOY_TEST_EMULATED="1")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of toy whose portable runners, as fresh as any, are scripts that start qemu with those for ARM."""
    names = sorted({row.target for row in MATRIX if row.device == "cpu"})
    folder = build("portable", *names)
    home = tmp_path_factory.mktemp("aarch64")
    for name in ("CMakeLists.txt", "native", "vendor-patches"):
        (home / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_HOME", str(home))
        root = builds.find_root()
        marks = {}
        for name in names:
            runner = root.runner(name, "portable")
            runner.parent.mkdir(parents=True, exist_ok=True)
            runner.write_text(f'#!/bin/sh\nexec {" ".join(QEMU)} {folder / "libexec" / name} "$@"\n')
            runner.chmod(0o755)
            marks[name] = builds._file_mark(runner)
        stamp = root.stamp("portable")
        stamp.parent.mkdir(parents=True)
        stamp.write_text(json.dumps({"fingerprint": builds._fingerprint(root, "portable", "cpu"), "targets": marks}))
    return home


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_has_the_bytes_of_x86_64(emulated: Path, cold_toy: Toy, name: str) -> None:
    toy = Toy(cold_toy.cwd, {**cold_toy.env, "TOY_HOME": str(emulated)})
    train(toy, name, "--threads", 1, "--out", "run").ok()
    # a stale stamp has toy build runners of this machine over the scripts, and those have its bytes of course
    scripts = list((emulated / "libexec" / "portable").iterdir())
    assert scripts and all(script.read_bytes().startswith(b"#!/bin/sh\n") for script in scripts)
    toy("gate", "check", "run", GATES / f"{name}.txt").ok()
