"""The same bytes: in two runs, on any number of threads, and for the portable build as recorded under data/gates/."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Trained
from gates import GATES, NAMES, train
from harness import TINY, Result, Toy, read_events, sets
from killing import JOBS, new_folder, run_through

# no size is a multiple of a vector register, of a tile or of the number of threads
ODD = {
    "model.n_layer": 2, "model.n_embd": 44, "model.n_head": 11, "model.n_head_kv": 11, "model.n_ff": 71,
    "model.context": 37, "train.batch": 3, "eval.every": 0, "eval.batches": 1,
}  # fmt: skip
GROUPED = {
    "model.n_embd": 96, "model.n_head": 6, "model.n_head_kv": 2, "model.context": 65, "train.batch": 6,
    "train.micro_batch": 2, "model.tie_embeddings": "false", "eval.batches": 1,
}  # fmt: skip


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


# --- the portable build ---------------------------------------------------------------------------------------------

#: A libm that is wrong in the sixth digit, as an unkind machine's might be.
OTHER_LIBM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#define WRONG(type, name) \\
    type name(type x) { \\
        static type (*real)(type); \\
        if (!real) { real = (type (*)(type)) dlsym(RTLD_NEXT, #name); } \\
        return real(x) * (type) 1.000001; \\
    }
#define WRONG2(type, name) \\
    type name(type x, type y) { \\
        static type (*real)(type, type); \\
        if (!real) { real = (type (*)(type, type)) dlsym(RTLD_NEXT, #name); } \\
        return real(x, y) * (type) 1.000001; \\
    }
WRONG(float, expf) WRONG(float, logf) WRONG(float, log2f) WRONG(float, sinf) WRONG(float, cosf) WRONG(float, tanhf)
WRONG(float, erff) WRONG(float, expm1f) WRONG(float, log1pf) WRONG(double, exp) WRONG(double, log) WRONG(double, log2)
WRONG(double, sin) WRONG(double, cos) WRONG(double, tanh) WRONG(double, erf) WRONG2(float, powf) WRONG2(double, pow)
void sincosf(float x, float * s, float * c) { *s = sinf(x); *c = cosf(x); }
void sincos(double x, double * s, double * c) { *s = sin(x); *c = cos(x); }
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="LD_PRELOAD")
@pytest.mark.parametrize("name", JOBS)
def test_no_number_comes_from_libm(name: str, built_portable: None, tmp_path: Path) -> None:
    """Another libm under the portable runners, and every step, evaluation and weight is the same."""
    (tmp_path / "other.c").write_text(OTHER_LIBM)
    library = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", "-w", "-o", library, tmp_path / "other.c",
                    "-ldl", "-lm"], check=True)  # fmt: skip
    job = replace(JOBS[name], runner=f"portable/{JOBS[name].runner}")
    files = job.files(new_folder(tmp_path / "data"))
    ends = []
    for run, preload in (("one", {}), ("other", {"LD_PRELOAD": str(library)})):
        left = run_through(job, {**job.environment(tmp_path / run, files, 24), **preload})
        assert left.code == 0, left.stderr
        losses = [event["val_loss"] for event in read_events(left.run, "eval")]
        ends.append((left.lines, losses, weights(left.gguf)))
    assert len(ends[0][0]) == 24
    assert ends[1] == ends[0]


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64", "aarch64"), reason="where the gates were compared")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_portable_gate(toy: Toy, name: str, threads: int) -> None:
    train(toy, name, "--threads", threads, "--out", "run").ok()
    assert json.loads((toy.cwd / "run" / "config.json").read_text())["run"]["build"] == "portable"
    result = toy("gate", "check", "run", GATES / f"{name}.txt")
    assert result.code == 0, result.stdout + result.stderr
    checked = toy("gate", "check", "run", GATES / f"{name}.txt", "--json").ok().document
    assert checked["format"] == "toy/gate-v1"
    assert checked["equal"] is True


def test_there_is_a_gate_for_every_recipe_and_architecture() -> None:
    from toy.config import Config
    from toy.recipes import MATRIX

    gated = set()
    for name in NAMES:
        run = {"arch": Config().run.arch, "recipe": Config().run.recipe}
        run |= yaml.safe_load((GATES / f"{name}.yml").read_text())["run"]
        gated.add((run["recipe"], "vit" if run["recipe"] == "vit-tiny" else run["arch"]))
        assert (GATES / f"{name}.txt").is_file(), f"{name} has no recorded lines: python tests/gates.py {name}"
    assert {recipe for recipe, _ in gated} == {row.recipe for row in MATRIX}
    assert {arch for _, arch in gated} == {row.arch for row in MATRIX}


def test_a_recorded_gate_is_the_file_that_is_checked(toy: Toy, trained: Trained) -> None:
    recorded = toy.cwd / "mine.txt"
    toy("gate", "record", trained.run, recorded).ok()
    assert recorded.read_text().splitlines() == trained.result.steps
    toy("gate", "check", trained.run, recorded).ok()


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
