"""The files of a run that the command line writes: config.json, config.kv, meta.json, losses.txt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from toy import __version__, builds, config, cuda, devices


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none: a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_config(run: Path, resolved: config.Config, project: Path | None) -> None:
    inside = project if project is not None and run.is_relative_to(project) else None
    write_atomic(run / "config.json", config.json_text(config.to_json(resolved, inside)))
    write_atomic(run / "config.kv", config.to_kv(resolved))


def write_meta(run: Path, meta: dict[str, Any]) -> None:
    write_atomic(run / "meta.json", json.dumps(meta, indent=2, ensure_ascii=False, default=str) + "\n")


def ggml_info(source: Path) -> dict[str, Any]:
    """ggml's package and version out of vendor-patches/UPSTREAM, and the hash of each patch."""
    folder = source / "vendor-patches"
    pairs = {}
    for line in (folder / "UPSTREAM").read_text(encoding="utf-8").splitlines():
        key, equals, value = line.split("#")[0].partition("=")
        if equals:
            pairs[key.strip()] = value.strip()
    patches = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.patch"))}
    return {**pairs, "patches": patches}


def cpu_info() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value.strip()
                break
    simd = [
        flag
        for flag in flags.split()
        if flag.startswith(("sse4", "avx", "fma", "f16c", "bmi2", "amx", "neon", "asimd", "sve"))
    ]
    return {
        "name": name,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": config.usable_cores(),
        "memory_bytes": memory_bytes(),
        "simd": simd,
    }


def memory_bytes() -> int:
    """This machine's memory, or the control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def git_info(folder: Path) -> dict[str, Any] | None:
    """Commit of the project, and whether the tree differs from it; None outside a repository or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_name(device: str) -> str | None:
    """The GPU that a runner of this device computes on, where we can tell."""
    if device == "vulkan":
        found = devices.vulkan_usable()
        return found[0].name if found else None
    if device == "cuda":
        return next((name for name, _ in cuda.devices()), None)
    return None


def meta(
    run: Path, project: Path | None, variant: str, datasets: dict[str, Any], device: str = "cpu"
) -> dict[str, Any]:
    """Everything about the circumstances of a run that its configuration does not say."""
    return {
        "format": "toy/meta-v1",
        "run_id": run.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "toy": __version__,
        "python": platform.python_version(),
        "ggml": ggml_info(builds.find_root().source),
        "build": builds.build_info(variant, device),
        "cpu": cpu_info(),
        "gpu": gpu_name(device),
        "system": f"{platform.system()} {platform.release()}",
        "git": git_info(project or run.parent),
        "argv": ["toy", *sys.argv[1:]],
        "datasets": datasets,
    }
