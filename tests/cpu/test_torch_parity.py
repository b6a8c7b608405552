"""toy against PyTorch: the same losses and gradients from the same weights and batches; live, or against files made by
make_reference.py where PyTorch is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity
import pytest
from parity import CASES, DUMPED, N_STEPS, Case, Reference, needs_torch


@needs_torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, parity.run_torch(case, tmp_path), tmp_path)


@pytest.mark.parametrize("case", DUMPED, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_the_dump(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, Reference.read(case), tmp_path)


@needs_torch
def test_validation_loss_masks_the_ragged_last_window(tmp_path: Path) -> None:
    import torch
    import torch_llama

    # 2,000 of 20,000 tokens are held out: 124 windows of 16 and one of 15 labels, in batches of 4, so that the last
    # batch has three windows of padding and the last window one masked label
    case = Case("eval", {}, {"batch": 4})
    m = case.knobs.model
    ours = parity.trainer(case, tmp_path)
    for _ in range(5):
        ours.step()
    held_out = np.fromfile(case.env(tmp_path)["CORPUS"], dtype="<i4")[-2000:]
    n_windows = -(-(len(held_out) - 1) // m.context)
    padded = np.full(n_windows * m.context + 1, -1, dtype=np.int32)
    padded[: len(held_out)] = held_out
    inputs, labels = padded[:-1].reshape(n_windows, -1), padded[1:].reshape(n_windows, -1)
    assert (labels == -1).sum() == 1
    shape = torch_llama.Shape(m.n_layer, m.n_embd, m.n_head, m.n_head_kv, m.rope_freq_base, m.norm_eps)
    with torch.no_grad():
        model = torch_llama.Llama(shape, ours.weights())
        theirs = model.loss_sum(np.maximum(inputs, 0), labels).item() / int((labels >= 0).sum())
    np.testing.assert_allclose(ours.evaluate(), theirs, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_changes_in_one_step(tmp_path: Path, tied: bool) -> None:
    # without warm-up: the first of ten warm-up steps has a tenth of the learning rate, which changes them too, but less
    ours = parity.trainer(Case("step", {"tie_embeddings": tied}, {"warmup_steps": 0}), tmp_path)
    before = ours.weights()
    assert ("output.weight" in before) is not tied
    ours.step()
    after = ours.weights()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    # every row of the embeddings decays, whether its token was in the batch or not
    assert (before["token_embd.weight"] != after["token_embd.weight"]).any(axis=1).all()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_learning_rates_are_those_of_the_schedule(tmp_path: Path, schedule: str) -> None:
    pytest.importorskip("torch")
    import torch_train

    case = Case("schedule", {"n_layer": 1}, {"schedule": schedule, "min_learning_rate": 1e-4, "batch": 1})
    ours = parity.trainer(case, tmp_path)
    for step in range(1, N_STEPS + 1):
        assert ours.step()["learning_rate"] == pytest.approx(
            torch_train.learning_rate(case.knobs.train, step), rel=1e-12
        )


def test_gradients_are_clipped_to_the_global_norm(tmp_path: Path) -> None:
    """The reported norm is that before clipping, and of all tensors together."""
    ours = parity.trainer(Case("clip", {}, {"grad_clip": 1e-3}), tmp_path)
    norm = ours.step()["grad_norm"]
    total = sum(float((g.astype(np.float64) ** 2).sum()) for g in ours.gradients().values())
    assert norm == pytest.approx(total**0.5, rel=1e-6)
    assert norm > 1e-3
