"""PyTorch's side as bench.py holds it: processes that wait while the other side is measured."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import Shape

HERE = Path(__file__).resolve().parent


def is_installed(name: str = "torch") -> bool:
    return importlib.util.find_spec(name) is not None


class Worker:
    """A script of this folder: a line in, a line of JSON out."""

    def __init__(self, script: str, *words: str) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """None: it has ended."""
        assert self.process.stdout is not None
        try:
            found: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            return None
        return found

    def ask(self, line: str) -> dict[str, Any] | None:
        self.send(line)
        return self.answer()

    def lines(self) -> list[str]:
        """What it wrote for people."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip().splitlines()

    def said(self) -> str:
        """The last line of that."""
        return (self.lines() or ["it ended"])[-1]

    def close(self) -> None:
        if self.log.closed:
            return
        self.process.kill()
        self.process.communicate()
        self.log.close()


class TorchRun(Worker):
    """A training, eager or compiled, that begins to compile when it is made."""

    def __init__(self, shape: Shape, mode: str, dtype: str, threads: int, device: str = "cpu") -> None:
        super().__init__("torch_worker.py", "train", json.dumps(shape.values()), mode, dtype, str(threads), device)
        self.shape, self.mode = shape, mode
        self.version = ""
        self.peak_bytes = 0
        self.send("2")

    def is_ready(self) -> bool:
        """Waits until it has compiled. False: it does not run here (no compiler, no peft, …)."""
        answer = self.answer()
        self.version = answer["version"] if answer else ""
        return answer is not None

    def turn(self) -> float:
        """Seconds a step: the median of a round."""
        answer = self.ask(str(self.shape.warm + self.shape.measured))
        if answer is None:
            raise SystemExit(f"PyTorch ({self.mode}, {self.shape.name}) ended in the middle of its run: {self.said()}")
        self.peak_bytes = answer["peak_bytes"]
        return statistics.median(answer["seconds"][self.shape.warm :])
