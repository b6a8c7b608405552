"""Runners killed with SIGKILL at chosen moments and resumed each time, against the same run left alone.

The runner is started as `toy train` starts it, with an environment and a config.kv, but without the command line, so
that a run takes a second and many can be killed.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_files import RandomModel
from harness import config_kv, read_events
from packed_data import patterned_images, ragged_examples, write_examples, write_images, write_tokens

SAVE_EVERY, EVAL_EVERY = 3, 4


@dataclass(frozen=True)
class Job:
    """A tiny training of one recipe, over data that it passes several times."""

    name: str
    runner: str
    recipe: str
    arch: str
    sections: dict[str, dict[str, Any]]
    files: Callable[[Path], dict[str, str]]  # makes the data under a folder: the keys that name it

    def config(self, resume: str, steps: int) -> str:
        common: dict[str, dict[str, Any]] = {
            "run": {"recipe": self.recipe, "arch": self.arch},
            "train": {"steps": steps, "batch": 16, "micro_batch": 8, "learning_rate": 3e-3, "warmup_steps": 5},
            "eval": {"every": EVAL_EVERY, "patience": 50},
            "checkpoint": {"every": SAVE_EVERY, "keep": 2, "keep_every": 15, "resume": resume},
        }
        merged = {name: common.get(name, {}) | self.sections.get(name, {}) for name in {**common, **self.sections}}
        return config_kv(**merged)

    def environment(self, run: Path, data: dict[str, str], steps: int, resume: str = "") -> dict[str, str]:
        """What the runner gets; makes the run's directory."""
        run.mkdir(parents=True)
        (run / "config.kv").write_text(self.config(resume, steps), encoding="utf-8")
        files = {"corpus": data.get("CORPUS"), "base": data.get("GGUF")}
        if "IMG_DIR" in data:
            files["images"] = f"{data['IMG_DIR']}/images.bin"
        hashes = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in files.items() if path}
        return {
            "TOY_RUN_DIR": str(run), "TAO_RUN_DIR": str(run), "TOY_RUN_ID": run.name, "RECIPE": self.recipe,
            "STEPS": str(steps), "SEED": "1337", "TOY_CONFIG": str(run / "config.kv"),
            "DATASETS": ",".join(f"{name}={digest}" for name, digest in hashes.items()),
            **data,
        }  # fmt: skip


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def vocabulary(folder: Path) -> dict[str, str]:
    from toy import _native

    _native.gguf_write(str(folder / "tokenizer.gguf"), {"tokenizer.ggml.model": "none"})
    return {"TOKENIZER": str(folder / "tokenizer.gguf")}


def text(folder: Path) -> dict[str, str]:
    """93 windows of 16: an epoch is six steps."""
    return {
        "CORPUS": str(write_tokens(folder / "tokens.bin", n=1500)),
        "VAL_CORPUS": str(write_tokens(folder / "validation.bin", n=8000)),
        **vocabulary(folder),
    }


def donor(folder: Path) -> dict[str, str]:
    path = RandomModel(kind="Q8_0").write(folder / "donor.gguf")
    return {**text(folder), "GGUF": str(path), "INIT": "donor"}


def answers(folder: Path) -> dict[str, str]:
    path = RandomModel("qwen2", kind="Q4_0", special={"ffn_down": "Q8_0"}).write(folder / "base.gguf")
    data = write_examples(folder / "train", ragged_examples(100, 16, 64))
    validation = write_examples(folder / "validation", ragged_examples(500, 16, 64, seed=5), "VAL_")
    return {**data, **validation, **vocabulary(folder), "GGUF": str(path), "RANK": "4"}


def pictures(folder: Path) -> dict[str, str]:
    train, validation = (
        write_images(folder / name, *patterned_images(n, 4, 12, 3), 4) for name, n in (("train", 100), ("val", 600))
    )
    return {"IMG_DIR": str(train), "VAL_IMG_DIR": str(validation), "TOKENIZER": str(train / "classes.gguf")}


JOBS = {
    job.name: job
    for job in (
        Job("llama", "toy-train", "from-scratch", "llama", {}, text),
        Job("gpt2", "toy-train-gpt2", "from-scratch", "gpt2", {"model": {"n_head_kv": 0}}, text),
        Job(
            "warm-start", "toy-train", "warm-start", "llama",
            {"model": {"init": "donor"}, "train": {"freeze": "blk.0.*", "embedding_lr_scale": 0.3}}, donor,
        ),
        Job("lora", "toy-train-lora", "lora", "llama", {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2}}, answers),
        Job(
            "vit-tiny", "toy-train-vit", "vit-tiny", "vit",
            {
                "model": {"image_size": 12, "patch_size": 4, "n_channel": 3, "n_class": 4, "n_head_kv": 0,
                          "vocab_size": 0, "context": 10},
                "data": {"augment_crop": 2, "augment_flip": True},
            },
            pictures,
        ),
    )
}  # fmt: skip


# --- running --------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """What one process left: the whole lines it printed, its exit code (negative: the signal), its directory."""

    run: Path
    code: int
    lines: list[str]
    stderr: str
    unfinished: bool = False  # a checkpoint was being written when it ended

    @property
    def gguf(self) -> Path:
        [path] = (self.run / "weights").glob("*.gguf")
        return path


def executable(job: Job) -> Path:
    from toy.builds import find_root

    return find_root().runner(job.runner)


@dataclass
class Running:
    """A runner at work; `read(step)` reads its lines up to that step's."""

    run: Path
    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self, step: int) -> bool:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)
            if line.startswith(f"step {step}:"):
                return True
        return False

    def end(self) -> Segment:
        assert self.popen.stdout is not None
        with self.popen:
            lines = self.lines + self.popen.stdout.readlines()
        stderr = (self.run / "stderr.txt").read_text()
        whole = [line.rstrip("\n") for line in lines if line.endswith("\n")]
        checkpoints = self.run / "checkpoints"
        unfinished = checkpoints.is_dir() and any(checkpoints.glob("*.tmp"))
        return Segment(self.run, self.popen.returncode, whole, stderr, unfinished)


def start(job: Job, environment: dict[str, str]) -> Running:
    run = Path(environment["TOY_RUN_DIR"])
    with (run / "stderr.txt").open("w") as stderr:
        popen = subprocess.Popen(
            [str(executable(job))], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            text=True,
        )  # fmt: skip
    return Running(run, popen)


def run_through(job: Job, environment: dict[str, str]) -> Segment:
    return start(job, environment).end()


# --- killing --------------------------------------------------------------------------------------------------------

#: When a process is killed, counted from the line of some step.
MOMENTS = ("step", "save", "anywhere", "evaluation", "start", "anywhere", "save")


def next_due(step: int, every: int) -> int:
    return -(-step // every) * every


def poll(look: Callable[[], bool], popen: subprocess.Popen[str], seconds: float = 5) -> None:
    """Without sleeping: what is waited for takes less than a millisecond."""
    end = time.monotonic() + seconds
    while not look() and popen.poll() is None and time.monotonic() < end:
        pass


def kill_at(running: Running, moment: str, step: int, steps: int, pace: float, chance: random.Random) -> Segment:
    """SIGKILL at a random time of the given kind, at or after `step`. `pace`: seconds that a step takes, saves
    included."""
    checkpoints, events = running.run / "checkpoints", running.run / "events.jsonl"
    if moment == "start":
        time.sleep(chance.uniform(0, 0.03))
    elif moment == "export":
        running.read(steps)
        time.sleep(chance.uniform(0, 0.02))
    elif moment == "save":
        due = min(next_due(step, SAVE_EVERY), steps)
        if running.read(due):
            writing, written = (checkpoints / f"step_{due}{end}" for end in (".tmp", ""))
            poll(lambda: writing.exists() or written.exists(), running.popen)
            time.sleep(chance.uniform(0, 0.003))
    elif moment == "evaluation":  # of a step that was just saved
        due = min(next_due(step, SAVE_EVERY * EVAL_EVERY), steps)
        if running.read(due):
            done = f'step_{due}"'.encode()
            poll(lambda: done in events.read_bytes(), running.popen)
            time.sleep(chance.uniform(0, 0.003))
    elif running.read(step):
        time.sleep(chance.uniform(0, pace / 4 if moment == "step" else 3 * pace))
    running.popen.kill()
    return running.end()


def killed_and_resumed(
    job: Job, folder: Path, data: dict[str, str], steps: int, n_kills: int, pace: float, seed: int
) -> Iterator[tuple[str, Segment]]:
    """(moment, what was left) of each process: n_kills of them killed, the last one not. Each goes on from the newest
    whole checkpoint there is."""
    from toy.errors import ToyError
    from toy.runs import find_checkpoint

    chance = random.Random(f"{job.name} {seed}")
    resume, begun = "", 0
    for n in range(n_kills):
        running = start(job, job.environment(folder / f"part-{n}", data, steps, resume))
        moment = MOMENTS[(n + seed) % len(MOMENTS)] if n < n_kills - 1 else "export"
        # no further than the kills to come can share
        step = min(begun + chance.randint(1, max(1, (steps - begun) // (n_kills - n))), steps)
        segment = kill_at(running, moment, step, steps, pace, chance)
        yield moment, segment
        if (segment.run / "checkpoints").is_dir():
            try:
                resume = str(find_checkpoint(str(segment.run)))
                begun = int(resume.rsplit("_", 1)[1])
            except ToyError as error:
                assert error.kind == "missing_file", error  # killed before its first checkpoint
    yield "end", run_through(job, job.environment(folder / "end", data, steps, resume))


def state_of(checkpoint: Path) -> tuple[dict[str, Any], bytes]:
    """A checkpoint's metadata, without what names the run, and its tensors' bytes."""
    from toy import _native

    path = checkpoint / "state.gguf"
    found = _native.gguf_read(str(path))
    metadata = {key: value for key, value in found["metadata"].items() if not isinstance(value, str)}
    return metadata, path.read_bytes()[found["data_offset"] :]


def weights_of(gguf: Path) -> bytes:
    from toy import _native

    return gguf.read_bytes()[_native.gguf_read(str(gguf))["data_offset"] :]


def check_same(job: Job, folder: Path, steps: int, n_kills: int, seed: int = 1) -> dict[str, int]:
    """Everything that the killed run left is what the whole one left; how many processes died at what."""
    data = job.files(new_folder(folder / "data"))
    began = time.monotonic()
    whole = run_through(job, job.environment(folder / "whole", data, steps))
    pace = (time.monotonic() - began) / steps
    assert whole.code == 0, whole.stderr
    assert len(whole.lines) == steps, whole.stderr
    expected = {event["step"]: event["val_loss"] for event in read_events(whole.run, "eval")}
    assert set(expected) == set(range(EVAL_EVERY, steps + 1, EVAL_EVERY))

    counts: dict[str, int] = {}
    printed: set[str] = set()
    evaluated: dict[int, float] = {}
    finals: list[Path] = []
    for moment, segment in killed_and_resumed(job, folder, data, steps, n_kills, pace, seed):
        assert segment.code in (0, -9), (moment, segment.stderr)
        what = moment + (", done" if segment.code == 0 else "") + (", torn" if segment.unfinished else "")
        counts[what] = counts.get(what, 0) + 1
        if segment.lines:
            first = int(segment.lines[0].split()[1].rstrip(":"))
            assert segment.lines == whole.lines[first - 1 : first - 1 + len(segment.lines)], (moment, first)
            printed.update(segment.lines)
        for event in read_events(segment.run, "eval") if (segment.run / "events.jsonl").is_file() else ():
            assert evaluated.setdefault(event["step"], event["val_loss"]) == event["val_loss"]
        for path in (segment.run / "checkpoints").glob("step_*"):
            if path.suffix != ".tmp" and (path / "DONE").exists():
                assert (path / "DONE").read_text() == path.name.removeprefix("step_") + "\n"
        last = segment
        if (segment.run / "checkpoints" / f"step_{steps}" / "DONE").exists():
            finals.append(segment.run / "checkpoints" / f"step_{steps}")
    assert last.code == 0, last.stderr
    assert sum(n for what, n in counts.items() if "done" not in what) >= 0.8 * n_kills, f"too few were killed: {counts}"
    assert printed == set(whole.lines), "a step was never printed"
    assert evaluated == expected, "an evaluation that was due never happened, or had another result"
    assert weights_of(last.gguf) == weights_of(whole.gguf)
    # a run that began at this very step may have saved it again, with its evaluation
    assert state_of(finals[0]) == state_of(whole.run / "checkpoints" / f"step_{steps}")
    summaries = [read_events(segment.run, "run_end")[-1] for segment in (whole, last)]
    for key in ("reason", "step", "val_loss", "best_val_loss", "best_step"):
        assert summaries[0][key] == summaries[1][key], key
    return counts
