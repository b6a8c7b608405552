"""train.dtype=bf16: what it computes, that it learns what f32 learns, and that its bytes are as firm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import parity
import pytest
from gguf_files import RandomModel
from harness import TINY, Toy, config_kv
from killing import JOBS, check_same
from parity import Case, lora_case, needs_torch, vit_case, warm_case

CASES = [
    Case("llama", train={"batch": 4}),
    # several rounds a step, a context of more terms than a block of sums has
    Case("accumulated-untied", {"tie_embeddings": False, "context": 40}, {"batch": 60, "micro_batch": 30}),
    Case("odd-sizes", {"n_layer": 3, "n_embd": 42, "n_head": 7, "n_head_kv": 7, "n_ff": 51, "vocab_size": 77,
                       "context": 19}, {"batch": 5}),
    Case("gpt2", train={"batch": 4, "micro_batch": 2}, arch="gpt2"),
    warm_case("warm", RandomModel(kind="F16"), train={"freeze": "blk.1.*"}),
    lora_case("lora-Q4_1", RandomModel(kind="Q4_1", **parity.WIDE)),
    vit_case("vit", {}, {"batch": 8}),
]  # fmt: skip


def in_bf16(case: Case) -> Case:
    return replace(case, train=case.train | {"dtype": "bf16"})


@needs_torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_gradients_are_those_of_rounded_products(case: Case, tmp_path: Path) -> None:
    """Both sides round the same numbers but for errors of f32, which now and then push one over to the next bf16, 2^-8
    of its value away: tensors differ by 3e-7 where that never happens, by 3e-3 where it does in the first of the
    products. Products left in f32 differ more in every tensor that one of them reaches."""
    import torch
    import torch_train
    from torch_bf16 import Bf16

    case = in_bf16(case)
    torch.set_num_threads(1)
    ours = parity.trainer(case, tmp_path)
    model = parity.torch_model(case, ours.weights(), tmp_path)
    first = next(iter(parity.step_batches(case, tmp_path)))
    with Bf16():
        loss = torch_train.Trainer(model, case.knobs.train).gradients(first)
    np.testing.assert_allclose(ours.step()["loss"], loss, rtol=1e-4)

    plain = parity.trainer(replace(case, train=case.train | {"dtype": "f32"}), tmp_path)
    plain.step()
    in_f32 = plain.gradients()
    errors, apart = {}, {}
    for name, gradient in ours.gradients().items():
        theirs = model.trainable[name].grad.numpy().reshape(gradient.shape)
        errors[name] = float(np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs))
        apart[name] = float(np.linalg.norm(in_f32[name] - theirs) / np.linalg.norm(theirs))
    assert max(errors.values()) < 5e-3, errors
    assert sum(errors.values()) < 0.3 * sum(apart.values()), (errors, apart)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_stay_within_one_percent_of_f32(case: Case, tmp_path: Path) -> None:
    """A bf16 has 8 bits: a rounded product is off by 2^-9 of its terms, and the errors of many average out. One step's
    loss is of a few dozen tokens, so that ten of them are averaged, and the validation loss is of many."""
    ours, exact = (parity.trainer(c, tmp_path) for c in (in_bf16(case), case))
    losses = np.array([(ours.step()["loss"], exact.step()["loss"]) for _ in range(parity.N_STEPS)])
    assert losses[0, 0] != losses[0, 1]
    for tens in losses.reshape(-1, 10, 2).mean(1):
        np.testing.assert_allclose(tens[0], tens[1], rtol=1e-2)
    np.testing.assert_allclose(ours.evaluate(), exact.evaluate(), rtol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_change_no_bit(case: Case, tmp_path: Path) -> None:
    from toy import _native

    results = []
    for threads in (1, 2, 3):
        kv = in_bf16(case).kv.replace("run.threads=1\n", f"run.threads={threads}\n")
        ours = _native.Trainer(kv, case.env(tmp_path))
        losses = [ours.step()["loss"] for _ in range(10)]
        results.append((losses, ours.evaluate(), {name: w.tobytes() for name, w in ours.weights().items()}))
    assert results[1] == results[0]
    assert results[2] == results[0]


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_a_resumed_run_leaves_the_same_bytes(name: str, built: None, tmp_path: Path) -> None:
    job = JOBS[name]
    sections = job.sections | {"train": job.sections.get("train", {}) | {"dtype": "bf16"}}
    assert "train.dtype=bf16" in config_kv(**sections)
    check_same(replace(job, sections=sections), tmp_path, steps=60, n_kills=5)


def test_a_run_is_not_resumed_in_another_type(toy: Toy) -> None:
    toy("train", *TINY, "--steps", 4, "--set", "checkpoint.every=2", "--out", "first").ok()
    result = toy(
        "train", "--resume", "first", "--steps", 8, "--set", "train.dtype=bf16", "--no-sample", "--out", "next"
    )
    assert result.code != 0
    assert "train.dtype is bf16 here and f32 there" in result.stderr


def test_the_plan_and_the_run_name_the_type(toy: Toy) -> None:
    flags = (*TINY, "--steps", 2, "--set", "train.dtype=bf16", "--out", "run")
    assert "on cpu in bf16" in toy("train", *flags, "--dry-run").ok().stdout
    toy("train", *flags).ok()
    assert '"dtype": "bf16"' in (toy.cwd / "run" / "meta.json").read_text()
