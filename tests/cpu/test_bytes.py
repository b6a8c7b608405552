"""The same bytes: in two runs, on any number of threads, and for the portable build as recorded under data/gates/."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from harness import ROOT, TINY, Result, Toy

GATES = ROOT / "data" / "gates"

# no size is a multiple of a vector register, of a tile or of the number of threads
ODD = {
    "model.n_layer": 2, "model.n_embd": 44, "model.n_head": 11, "model.n_head_kv": 11, "model.n_ff": 71,
    "model.context": 37, "train.batch": 3, "eval.every": 0, "eval.batches": 1,
}  # fmt: skip
GROUPED = {
    "model.n_embd": 96, "model.n_head": 6, "model.n_head_kv": 2, "model.context": 65, "train.batch": 6,
    "train.micro_batch": 2, "model.tie_embeddings": "false", "eval.batches": 1,
}  # fmt: skip


def sets(knobs: dict[str, Any]) -> list[str]:
    return [word for key, value in knobs.items() for word in ("--set", f"{key}={value}")]


def test_two_runs_are_the_same(toy: Toy, trained: Trained) -> None:
    again = toy("train", *TINY, "--set", "checkpoint.every=20", "--out", "again").ok()
    assert again.steps == trained.result.steps
    ours, theirs = (run / "weights" / "model.gguf" for run in (toy.cwd / "again", trained.run))
    assert weights(ours) == weights(theirs)


def weights(gguf: Path) -> bytes:
    """The tensors' bytes; metadata before them names the run."""
    from toy import _native

    return gguf.read_bytes()[_native.gguf_read(str(gguf))["data_offset"] :]


@pytest.mark.parametrize("knobs", [{}, ODD, GROUPED], ids=["tiny", "odd", "grouped-accumulated"])
def test_threads_do_not_matter(toy: Toy, knobs: dict[str, Any]) -> None:
    runs: list[Result] = []
    for threads in (1, 2, 3):
        flags = (*TINY, *sets(knobs), "--steps", 15, "--threads", threads, "--out", f"threads-{threads}")
        runs.append(toy("train", *flags).ok())
    assert len(runs[0].steps) == 15
    assert runs[1].steps == runs[0].steps
    assert runs[2].steps == runs[0].steps
    files = [weights(toy.cwd / f"threads-{n}" / "weights" / "model.gguf") for n in (1, 2, 3)]
    assert files[0] == files[1] == files[2]


def test_another_seed_is_another_run(toy: Toy, trained: Trained) -> None:
    other = toy("train", *TINY, "--steps", 3, "--seed", 7).ok()
    assert other.steps != trained.result.steps[:3]


def test_where_events_go_does_not_matter(toy: Toy, trained: Trained) -> None:
    """Validation, checkpoints and logging leave the training as it is."""
    common = {"train.warmup_steps": 0, "train.steps": 10}
    quiet = toy("train", *TINY, *sets({**common, "eval.every": 0, "eval.batches": 1, "log.every": 7})).ok()
    busy = toy("train", *TINY, *sets({**common, "eval.every": 1, "eval.batches": 2, "checkpoint.every": 1})).ok()
    assert quiet.steps == busy.steps


# --- gates ----------------------------------------------------------------------------------------------------------


def portable(toy: Toy, *more: object) -> Result:
    """The run of data/gates/llama.yml, as data/gates/README.md says to repeat it."""
    return toy("train", "--config", GATES / "llama.yml", "--no-sample", *more, timeout=900)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the gate was recorded on x86-64")
def test_the_portable_gate(toy: Toy) -> None:
    portable(toy, "--out", "run").ok()
    assert json.loads((toy.cwd / "run" / "config.json").read_text())["run"]["build"] == "portable"
    result = toy("gate", "check", "run", GATES / "llama.txt")
    assert result.code == 0, result.stdout + result.stderr
    checked = toy("gate", "check", "run", GATES / "llama.txt", "--json").ok().document
    assert checked["format"] == "toy/gate-v1"
    assert checked["equal"] is True

    recorded = toy.cwd / "mine.txt"
    toy("gate", "record", "run", recorded).ok()
    assert recorded.read_bytes() == (GATES / "llama.txt").read_bytes()


def test_a_gate_names_the_first_difference(toy: Toy, trained: Trained) -> None:
    shutil.copy(trained.run / "losses.txt", toy.cwd / "gate.txt")
    toy("gate", "check", trained.run, "gate.txt").ok()
    lines = trained.result.steps
    value = next_float(lines[6].split("=")[1], 3)
    (toy.cwd / "gate.txt").write_text(
        "".join(f"{line}\n" for line in [*lines[:6], f"step 7: loss={value}", *lines[7:]])
    )
    result = toy("gate", "check", trained.run, "gate.txt")
    assert result.code == 1
    [message, hint] = result.stderr.splitlines()
    assert message.startswith("error: step 7 ")
    assert value in message
    assert lines[6].split("=")[1] in message
    assert "3 ulps" in message
    assert hint.startswith("hint: ")
    document = toy("gate", "check", trained.run, "gate.txt", "--json").document
    assert document["error"]["kind"] == "gate_mismatch"
    assert (document["error"]["step"], document["error"]["ulps"]) == (7, 3)


def next_float(text: str, steps: int) -> str:
    import numpy as np

    from toy import _native

    value = np.float32(text)
    for _ in range(steps):
        value = np.nextafter(value, np.float32(np.inf))
    return str(_native.shortest(float(value)))
