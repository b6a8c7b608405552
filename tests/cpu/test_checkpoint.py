"""Checkpoints: going on to the byte, and refusing what is torn."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import TINY, Toy, config_kv, read_events
from parity import write_tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.bin")


def trainer(tokens: Path, **sections: Any) -> Any:
    from toy import _native

    return _native.Trainer(config_kv(**sections), str(tokens))


def bits(trainer: Any) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in trainer.weights().items()}


def losses(trainer: Any, steps: Iterable[int]) -> list[float]:
    return [trainer.step()["loss"] for _ in steps]


# short epochs: 18,001 training tokens are 1,125 windows of 16, so that 300 sequences a step begin a new order every
# 4 steps
EPOCHS = {"train": {"batch": 300, "micro_batch": 100, "steps": 20, "learning_rate": 3e-3}}


def test_a_loaded_trainer_goes_on_to_the_byte(tokens: Path, tmp_path: Path) -> None:
    one = trainer(tokens, **EPOCHS)
    losses(one, range(7))
    path = one.save(str(tmp_path))
    assert Path(path).name == "step_7"
    assert (Path(path) / "DONE").is_file()
    rest = losses(one, range(8))

    other = trainer(tokens, **EPOCHS)
    losses(other, range(2))  # whatever it did before is forgotten
    other.load(path)
    assert losses(other, range(8)) == rest
    assert bits(other) == bits(one)
    assert other.evaluate() == one.evaluate()


def test_saving_changes_nothing(tokens: Path, tmp_path: Path) -> None:
    quiet, saving = trainer(tokens), trainer(tokens)
    for n in range(5):
        assert saving.step() == quiet.step()
        assert Path(saving.save(str(tmp_path))).name == f"step_{n + 1}"
    assert bits(saving) == bits(quiet)


def saved(tokens: Path, tmp_path: Path) -> tuple[Any, Path]:
    one = trainer(tokens)
    losses(one, range(3))
    return one, Path(one.save(str(tmp_path)))


def refused(tokens: Path, path: Path) -> str:
    other = trainer(tokens)
    before = bits(other)
    with pytest.raises(ValueError, match=r".") as caught:
        other.load(str(path))
    assert bits(other) == before, "a refused checkpoint left some of its weights"
    return str(caught.value)


def test_without_its_mark_it_is_refused(tokens: Path, tmp_path: Path) -> None:
    _, path = saved(tokens, tmp_path)
    (path / "DONE").unlink()
    assert "DONE" in refused(tokens, path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_a_truncated_file_is_refused(tokens: Path, tmp_path: Path, share: float) -> None:
    _, path = saved(tokens, tmp_path)
    file = path / "state.gguf"
    with file.open("r+b") as state:
        state.truncate(int(share * file.stat().st_size))
    assert "state.gguf" in refused(tokens, path)


def test_another_file_is_refused(tokens: Path, tmp_path: Path) -> None:
    _, path = saved(tokens, tmp_path)
    (path / "state.gguf").write_bytes(b"GGUF" + b"\xff" * 5000)
    assert "state.gguf" in refused(tokens, path)
    assert refused(tokens, tmp_path / "step_99")


@pytest.mark.parametrize(
    "sections",
    [{"train": {"batch": 8}}, {"run": {"seed": 5}}, {"model": {"n_embd": 64}}],
    ids=["batch", "seed", "shape"],
)
def test_another_configuration_is_refused(tokens: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    _, path = saved(tokens, tmp_path)
    other = trainer(tokens, **sections)
    with pytest.raises(ValueError, match=r"knobs|tensors"):
        other.load(str(path))


# --- through the command line ---------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_byte(toy: Toy) -> None:
    from toy import _native

    flags = (*TINY, "--steps", 60, "--set", "eval.every=0", "--set", "eval.batches=1")
    whole = toy("train", *flags, "--out", "whole").ok()
    with toy.start("train", *flags, "--out", "stopped", "--set", "run.threads=1") as process:
        process.read_step(10)
        process.interrupt(group=True)
        result = process.finish()
    assert result.code == 130
    end = read_events(toy.cwd / "stopped")[-1]
    assert (end["kind"], end["reason"]) == ("run_end", "interrupted")
    stopped_at = end["step"]
    assert 10 <= stopped_at < 60
    assert (toy.cwd / "stopped" / "checkpoints" / f"step_{stopped_at}" / "DONE").is_file()
    lines = (toy.cwd / "stopped" / "losses.txt").read_text().splitlines()
    assert lines == whole.steps[:stopped_at]

    resumed = toy("train", "--resume", "stopped", "--no-sample", "--out", "resumed").ok()
    assert resumed.steps == whole.steps[stopped_at:]
    files = [toy.cwd / name / "weights" / "model.gguf" for name in ("whole", "resumed")]
    a, b = (file.read_bytes()[_native.gguf_read(str(file))["data_offset"] :] for file in files)
    assert a == b


def test_killed_at_any_moment_it_goes_on_to_the_byte(toy: Toy) -> None:
    import os
    import signal

    flags = (*TINY, "--steps", 60, "--set", "eval.every=0", "--set", "eval.batches=1", "--set", "checkpoint.every=5")
    whole = toy("train", *flags, "--out", "whole").ok()
    with toy.start("train", *flags, "--out", "killed") as process:
        process.read_step(23)
        os.kill(process.runner(), signal.SIGKILL)
        result = process.finish()
    assert result.code == 1
    latest = (toy.cwd / "killed" / "checkpoints" / "latest").resolve()
    assert (latest / "DONE").is_file()
    step = int(latest.name.removeprefix("step_"))
    assert step >= 20
    resumed = toy("train", "--resume", "killed", "--no-sample", "--out", "resumed").ok()
    assert resumed.steps == whole.steps[step:]


def test_a_torn_checkpoint_is_refused_by_name(toy: Toy) -> None:
    toy("train", *TINY, "--steps", 4, "--set", "checkpoint.every=2", "--out", "run").ok()
    shutil.copytree(toy.cwd / "run", toy.cwd / "torn", symlinks=True)
    (toy.cwd / "torn" / "checkpoints" / "step_4" / "DONE").unlink()
    result = toy("train", "--resume", "torn", "--steps", 8, "--no-sample", "--out", "next")
    assert result.code == 2
    assert result.stderr.splitlines()[-2].startswith("error: ")
    assert not (toy.cwd / "next").exists()


def test_the_links_name_whole_checkpoints(toy: Toy) -> None:
    knobs = {
        "checkpoint.every": 3,
        "checkpoint.keep": 1,
        "eval.every": 2,
        "eval.batches": 1,
        "train.learning_rate": 0.01,
    }
    sets = [word for key, value in knobs.items() for word in ("--set", f"{key}={value}")]
    toy("train", *TINY, *sets, "--steps", 20, "--out", "run").ok()
    folder = toy.cwd / "run" / "checkpoints"
    for link in ("latest", "best"):
        if (folder / link).is_symlink():
            assert (folder / link / "DONE").is_file(), link
    assert not list(folder.glob("*.tmp"))
    assert np.isfinite([event["val_loss"] for event in read_events(toy.cwd / "run", "eval")]).all()
