"""The roof: matrix products alone, by ggml with our patches (native/tests/bench-gemm.cpp) and by PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from torch_side import Worker, is_installed

LAYOUTS = ("nt", "nn", "tn")
PROGRAMS = ("bench-gemm", "bench-cores")

Product = tuple[int, int, int]


def build_programs() -> Path:
    """toy's runners, and the native programs beside this one: bench-gemm, and bench-cores in the same folder."""
    from toy.builds import ensure_built, find_root, wheel_tool

    ensure_built(["toy-train", "toy-train-gpt2", "toy-train-lora", "toy-train-vit", "toy-infer"])
    build, cmake = find_root().build / "native", wheel_tool("cmake") or "cmake"
    for words in (["-B", str(build), "-DTOY_TESTS=ON"], ["--build", str(build), "--target", *PROGRAMS]):
        subprocess.run([cmake, *words], cwd=find_root().source, check=True, stdout=subprocess.DEVNULL)
    return next(path for path in build.rglob(PROGRAMS[0]) if os.access(path, os.X_OK) and path.is_file())


class Roof:
    """Measures products on both sides for a fraction of a second each; remembers the best of each data type."""

    def __init__(self, program: Path | None, threads: int, seconds: float, device: str = "cpu") -> None:
        """Without `program`, PyTorch's products alone; `device` is theirs."""
        self.program, self.threads, self.seconds, self.device = program, threads, seconds, device
        self.workers: dict[str, Worker] = {}
        self.no_torch = not is_installed()

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers.values()]

    def ready(self, dtype: str) -> None:
        """Start what a measurement will need, so that no turn pays for it."""
        if dtype not in self.workers and not self.no_torch:
            words = [dtype, str(self.threads), str(self.seconds), self.device]
            self.workers[dtype] = Worker("torch_worker.py", "gemm", *words)
            self.workers[dtype].ask("64 64 64")

    def toy(self, product: Product, dtype: str) -> dict[str, float]:
        """layout -> GFLOP/s"""
        if self.program is None:
            return {}
        argv = [str(self.program), "-t", str(self.threads), "-s", str(self.seconds), "-p", dtype, *map(str, product)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{self.program.name}: {done.stderr}")
        return {row["layout"]: row["gflops"] for row in map(json.loads, done.stdout.splitlines())}

    def line(self) -> float | None:
        """Nanoseconds that a cache line takes from one core to another; None of a single core, or without `program`."""
        if self.program is None or self.threads < 2:
            return None
        done = subprocess.run([self.program.with_name(PROGRAMS[1])], capture_output=True, text=True, check=False)
        return float(json.loads(done.stdout)["nanoseconds"]) if done.returncode == 0 else None

    def torch(self, product: Product, dtype: str) -> dict[str, float]:
        worker = self.workers.get(dtype)
        return (worker.ask(" ".join(map(str, product))) or {}) if worker else {}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
