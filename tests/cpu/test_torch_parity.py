"""toy against PyTorch: the same losses and gradients from the same weights and batches; live, or against files made by
make_reference.py where PyTorch is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
from parity import CASES, N_STEPS, Case, Reference

HAVE_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(
    not HAVE_TORCH, reason="torch is not installed; the committed dumps are checked instead"
)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return parity.write_tokens(tmp_path / "tokens.bin")


def check_against(case: Case, reference: Reference, tokens: Path) -> None:
    ours = parity.trainer(case, tokens)
    first = next(iter(parity.step_batches(case, tokens)))
    assert parity.inputs_hash(ours.weights(), first) == reference.inputs, (
        "toy's initial weights or batches are not those of the dump: if that is meant, run tests/cpu/make_reference.py"
    )
    losses, first_gradients = [], {}
    for i in range(N_STEPS):
        result = ours.step()
        losses.append(result["loss"])
        if i == 0:
            first_gradients = ours.gradients()
    # f32 sums in another order: 1e-7 at each operation, grown by 50 steps of feedback
    np.testing.assert_allclose(losses, reference.losses, rtol=2e-4)
    assert set(first_gradients) == set(reference.norms)
    errors = {name: reference.gradient_error(name, g) for name, g in first_gradients.items()}
    assert max(errors.values()) < 1e-3, {name: e for name, e in errors.items() if not e < 1e-3}


@needs_torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    tokens = parity.write_tokens(tmp_path / "tokens.bin", case.knobs.model.vocab_size)
    check_against(case, parity.run_torch(case, tokens), tokens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_the_dump(case: Case, tmp_path: Path) -> None:
    tokens = parity.write_tokens(tmp_path / "tokens.bin", case.knobs.model.vocab_size)
    check_against(case, Reference.read(parity.REFERENCE / f"{case.name}.json"), tokens)


@needs_torch
def test_validation_loss_masks_the_ragged_last_window(tokens: Path) -> None:
    import torch
    import torch_llama

    # 2,000 of 20,000 tokens are held out: 124 windows of 16 and one of 15 labels, in batches of 4, so that the last
    # batch has three windows of padding and the last window one masked label
    case = Case("eval", {}, {"batch": 4})
    m = case.knobs.model
    ours = parity.trainer(case, tokens)
    for _ in range(5):
        ours.step()
    held_out = np.fromfile(tokens, dtype="<i4")[-2000:]
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
def test_every_tensor_changes_in_one_step(tokens: Path, tied: bool) -> None:
    # without warm-up: the first of ten warm-up steps has a tenth of the learning rate, which changes them too, but less
    ours = parity.trainer(Case("step", {"tie_embeddings": tied}, {"warmup_steps": 0}), tokens)
    before = ours.weights()
    assert ("output.weight" in before) is not tied
    ours.step()
    after = ours.weights()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    # every row of the embeddings decays, whether its token was in the batch or not
    assert (before["token_embd.weight"] != after["token_embd.weight"]).any(axis=1).all()


def mean_losses(**train: Any) -> Case:
    return Case("accumulation", {}, {"batch": 8, "steps": N_STEPS} | train)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_is_the_same_update(tokens: Path, micro_batch: int) -> None:
    whole, parts = parity.trainer(mean_losses(), tokens), parity.trainer(mean_losses(micro_batch=micro_batch), tokens)
    for _ in range(20):
        a, b = whole.step(), parts.step()
        # the same terms, summed in another order
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=2e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=2e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_learning_rates_are_those_of_the_schedule(tokens: Path, schedule: str) -> None:
    pytest.importorskip("torch")
    import torch_llama

    case = Case("schedule", {"n_layer": 1}, {"schedule": schedule, "min_learning_rate": 1e-4, "batch": 1})
    ours = parity.trainer(case, tokens)
    for step in range(1, N_STEPS + 1):
        assert ours.step()["learning_rate"] == pytest.approx(
            torch_llama.learning_rate(case.knobs.train, step), rel=1e-12
        )


def test_gradients_are_clipped_to_the_global_norm(tokens: Path) -> None:
    """The reported norm is that before clipping, and of all tensors together."""
    ours = parity.trainer(Case("clip", {}, {"grad_clip": 1e-3}), tokens)
    norm = ours.step()["grad_norm"]
    total = sum(float((g.astype(np.float64) ** 2).sum()) for g in ours.gradients().values())
    assert norm == pytest.approx(total**0.5, rel=1e-6)
    assert norm > 1e-3
