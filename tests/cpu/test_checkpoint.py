"""Checkpoints: going on to the byte, and refusing what is torn."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import GATES, NAMES
from gguf_files import RandomModel
from harness import TINY, Toy, config_kv, read_events, sets
from killing import JOBS, new_folder, run_through, weights_of
from packed_data import write_tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.bin")


def trainer(tokens: Path, env: dict[str, str] | None = None, **sections: Any) -> Any:
    from toy import _native

    return _native.Trainer(config_kv(**sections), {"CORPUS": str(tokens), **(env or {})})


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


def refused(tokens: Path, path: Path, **other: Any) -> str:
    """The one line of a refusal; nothing of the checkpoint was taken over."""
    session = trainer(tokens, **other)
    before = bits(session)
    with pytest.raises(ValueError, match=r".") as caught:
        session.load(str(path))
    assert bits(session) == before, "a refused checkpoint left some of its weights"
    message = str(caught.value).splitlines()[0]
    assert str(path) in message
    return message


def test_without_its_mark_it_is_refused(tokens: Path, tmp_path: Path) -> None:
    _, path = saved(tokens, tmp_path)
    (path / "DONE").unlink()
    assert "no DONE" in refused(tokens, path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.99, 0.99999])
def test_a_truncated_file_is_refused(tokens: Path, tmp_path: Path, share: float) -> None:
    _, path = saved(tokens, tmp_path)
    file = path / "state.gguf"
    with file.open("r+b") as state:
        state.truncate(int(share * file.stat().st_size))
    assert "state.gguf" in refused(tokens, path)


def test_a_file_with_another_beginning_is_refused(tokens: Path, tmp_path: Path) -> None:
    _, path = saved(tokens, tmp_path)
    file = path / "state.gguf"
    whole = file.read_bytes()
    for at in (0, 4, 9, 17):  # magic, version, number of tensors, number of keys
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert "state.gguf" in refused(tokens, path)


def test_another_file_is_refused(tokens: Path, tmp_path: Path) -> None:
    _, path = saved(tokens, tmp_path)
    (path / "state.gguf").write_bytes(b"GGUF" + b"\xff" * 5000)
    assert "state.gguf" in refused(tokens, path)
    RandomModel().write(path / "state.gguf")
    assert "not a checkpoint" in refused(tokens, path)
    (path / "state.gguf").unlink()
    assert "state.gguf" in refused(tokens, path)
    assert "step_99" in refused(tokens, tmp_path / "step_99")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"batch": 8}}, "train.batch"),
        ({"run": {"seed": 5}}, "run.seed"),
        ({"model": {"n_embd": 64}}, "model.n_embd"),
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate"),
        ({"data": {"val_fraction": 0.2}}, "data.val_fraction"),
        ({"train": {"freeze": "blk.0.*"}}, "train.freeze"),
        ({"run": {"arch": "gpt2"}, "model": {"n_head_kv": 0}}, "run.arch"),
        ({"run": {"recipe": "warm-start"}}, "run.recipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_configuration_is_refused_by_name(
    tokens: Path, tmp_path: Path, sections: dict[str, Any], named: str
) -> None:
    _, path = saved(tokens, tmp_path)
    assert named in refused(tokens, path, **sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 70}}, {"eval": {"every": 3, "batches": 2, "patience": 9}}, {"run": {"threads": 2}},
        {"checkpoint": {"every": 1, "keep": 9, "keep_every": 4, "keep_best": False}},
        {"run": {"name": "b", "notes": "c"}},
    ],
    ids=",".join,
)  # fmt: skip
def test_what_may_change_may(tokens: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    _, path = saved(tokens, tmp_path)
    trainer(tokens, **sections).load(str(path))


def forget_done(path: Path, other: Path) -> None:
    (path / "DONE").unlink()


def forget_state(path: Path, other: Path) -> None:
    (path / "state.gguf").unlink()


def cut(path: Path, other: Path) -> None:
    data = (path / "state.gguf").read_bytes()
    (path / "state.gguf").write_bytes(data[: len(data) // 2])


def spoil(path: Path, other: Path) -> None:
    data = (path / "state.gguf").read_bytes()
    (path / "state.gguf").write_bytes(b"JUNK" + data[4:])


def exchange(path: Path, other: Path) -> None:
    shutil.copy(other / "state.gguf", path / "state.gguf")


def lose(path: Path, other: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize("name", JOBS)
def test_torn_missing_and_foreign_ones_are_told_apart(name: str, built: None, tmp_path: Path) -> None:
    """By the runner of each recipe: exit 2, one line that names the checkpoint and what is wrong, one hint, no step."""
    job, foreign = JOBS[name], JOBS["gpt2" if name == "llama" else "llama"]
    kept, files = {}, {}
    for one in (job, foreign):
        files[one.name] = one.files(new_folder(tmp_path / f"{one.name}-data"))
        run = tmp_path / one.name
        assert run_through(one, one.environment(run, files[one.name], 6)).code == 0
        kept[one.name] = run / "checkpoints" / "step_6"
    harms: list[tuple[Callable[[Path, Path], None], str, set[str]]] = [
        (forget_done, "no DONE", {"bad_file"}),
        (forget_state, "state.gguf", {"bad_file", "missing_file"}),
        (cut, "state.gguf", {"bad_file"}),
        (spoil, "state.gguf", {"bad_file"}),
        (exchange, "run.", {"resume_mismatch"}),
        (lose, "no DONE", {"missing_file"}),
    ]
    said = set()
    for harm, named, kinds in harms:
        path = tmp_path / harm.__name__ / "checkpoints" / "step_6"
        shutil.copytree(kept[name], path)
        harm(path, kept[foreign.name])
        run = tmp_path / f"resumed-{harm.__name__}"
        left = run_through(job, job.environment(run, files[name], 9, str(path)))
        assert left.code == 2, (harm.__name__, left.stderr)
        error, hint, kind = left.stderr.splitlines()
        assert error.startswith("error: ")
        assert str(path) in error
        assert named in error
        assert hint.startswith("hint: ")
        assert kind.removeprefix("kind: ") in kinds
        assert left.lines == []
        end = read_events(run)[-1]
        assert end["kind"] == "run_end"
        assert end["error"]["kind"] in kinds
        said.add((end["error"]["kind"], error.replace(str(path), "")))
    assert len(said) == len(harms), f"two of them say the same: {said}"


@pytest.mark.parametrize(
    ("name", "changed"), [("llama", "corpus"), ("lora", "base"), ("lora", "corpus"), ("vit-tiny", "images")]
)
def test_other_data_is_refused_by_name(name: str, changed: str, built: None, tmp_path: Path) -> None:
    """Whatever it is called: DATASETS holds the hashes of what a run reads."""
    job = JOBS[name]
    files = job.files(new_folder(tmp_path / "data"))
    assert run_through(job, job.environment(tmp_path / "first", files, 6)).code == 0
    path = tmp_path / "first" / "checkpoints" / "latest"
    environment = job.environment(tmp_path / "second", files, 9, str(path))
    before = environment["DATASETS"]
    environment["DATASETS"] = re.sub(rf"\b{changed}=[0-9a-f]{{8}}", f"{changed}=00000000", before)
    assert environment["DATASETS"] != before
    left = run_through(job, environment)
    assert left.code == 2, left.stderr
    assert f"the {changed} is another one" in left.stderr
    assert read_events(tmp_path / "second")[-1]["error"]["kind"] == "resume_mismatch"
    again = run_through(job, job.environment(tmp_path / "third", files, 9, str(path)))
    assert [line.split(":")[0] for line in again.lines] == ["step 7", "step 8", "step 9"], again.stderr


# --- through the command line ---------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_byte(toy: Toy) -> None:
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
    ours, theirs = (toy.cwd / name / "weights" / "model.gguf" for name in ("resumed", "whole"))
    assert weights_of(ours) == weights_of(theirs)


RUNNERS = {
    "llama": "toy-train", "warm-start": "toy-train", "gpt2": "toy-train-gpt2", "lora": "toy-train-lora",
    "vit-tiny": "toy-train-vit",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_it_goes_on_to_the_byte(name: str, toy: Toy) -> None:
    """Every recipe by the command line alone: train, kill, `--resume`. (By the runners, at more moments:
    test_resume_kill.py.)"""
    flags = (
        "--config",
        GATES / f"{name}.yml",
        "--set",
        "run.build=native",
        "--set",
        "checkpoint.every=3",
        "--no-sample",
    )
    whole = toy("train", *flags, "--out", "whole").ok()
    with toy.start("train", *flags, "--out", "killed") as process:
        process.read_step(14)
        os.kill(process.runner(RUNNERS[name]), signal.SIGKILL)
        result = process.finish()
    assert result.code == 1
    latest = (toy.cwd / "killed" / "checkpoints" / "latest").resolve()
    assert (latest / "DONE").is_file()
    step = int(latest.name.removeprefix("step_"))
    assert 12 <= step < len(whole.steps)
    resumed = toy("train", "--resume", "killed", "--no-sample", "--out", "resumed").ok()
    assert resumed.steps == whole.steps[step:]
    [ours], [theirs] = ((toy.cwd / run / "weights").glob("*.gguf") for run in ("resumed", "whole"))
    assert weights_of(ours) == weights_of(theirs)


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
    toy("train", *TINY, *sets(knobs), "--steps", 20, "--out", "run").ok()
    folder = toy.cwd / "run" / "checkpoints"
    for link in ("latest", "best"):
        if (folder / link).is_symlink():
            assert (folder / link / "DONE").is_file(), link
    assert not list(folder.glob("*.tmp"))
    assert np.isfinite([event["val_loss"] for event in read_events(toy.cwd / "run", "eval")]).all()


def test_the_last_the_best_and_every_nth_are_kept(built: None, tmp_path: Path) -> None:
    job = JOBS["llama"]
    environment = job.environment(tmp_path / "run", job.files(new_folder(tmp_path / "data")), 24)
    config = tmp_path / "run" / "config.kv"
    often = config.read_text().replace("checkpoint.every=3\n", "checkpoint.every=1\n")
    config.write_text(often.replace("checkpoint.keep_every=15\n", "checkpoint.keep_every=6\n"))
    assert run_through(job, environment).code == 0
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*")}
    evals = read_events(tmp_path / "run", "eval")
    best = min(evals, key=lambda event: event["val_loss"])["step"]
    assert kept == {6, 12, 18, 23, 24, best}
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == f"step_{best}"
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step_24"
