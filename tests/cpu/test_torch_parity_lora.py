"""lora against PyTorch, over bases of every type that numpy dequantises on its own. (Dumps: test_torch_parity.py.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity
import pytest
from gguf_files import RandomModel
from packed_data import ragged_examples
from parity import LORA_CASES, Case, lora_case, needs_torch


@needs_torch
@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, parity.run_torch(case, tmp_path), tmp_path)


@pytest.mark.parametrize(
    "case", [case for case in LORA_CASES if case.name in ("lora-frozen", "lora-odd-sizes")], ids=lambda case: case.name
)
def test_what_is_frozen_stays_and_all_else_changes(case: Case, tmp_path: Path) -> None:
    parity.check_frozen(case, tmp_path)


def fresh(case: Case, folder: Path) -> tuple[object, dict[str, str]]:
    """A session as a run begins it, and its files."""
    from toy import _native

    env = case.env(folder)
    return _native.Trainer(case.kv, env), env


@needs_torch
def test_an_adapter_starts_as_its_base(tmp_path: Path) -> None:
    """The second factor is nothing, so that the loss is the base's and only that factor has a gradient; the first is
    uniform within 1/sqrt(n_in), as peft has it."""
    import torch
    from torch_llama import Llama

    case = lora_case("start", RandomModel(kind="Q8_0"), {"rank": 8}, train={"batch": 4})
    ours, _ = fresh(case, tmp_path)
    weights = ours.weights()  # type: ignore[attr-defined]
    for name, value in weights.items():
        if name.endswith(".lora_a"):
            bound = value.shape[1] ** -0.5
            assert np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.2)
        else:
            assert not value.any()
    model = parity.torch_model(case, weights, tmp_path)
    [batch] = next(iter(parity.step_batches(case, tmp_path)))
    with torch.no_grad():
        base = Llama(model.shape, {name: p.numpy() for name, p in model.w.items()}).loss_sum(*batch).item()
    result = ours.step()  # type: ignore[attr-defined]
    np.testing.assert_allclose(result["loss"], base / batch[1].size, rtol=1e-5)
    for name, gradient in ours.gradients().items():  # type: ignore[attr-defined]
        assert gradient.any() == name.endswith(".lora_b"), name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
        ("attn_q,attn_v", {"attn_q", "attn_v"}),
        ("ffn_down", {"ffn_down"}),
    ],
)
def test_targets_get_a_pair_of_factors_each(tmp_path: Path, targets: str, expected: set[str]) -> None:
    base = RandomModel()
    ours, _ = fresh(lora_case("targets", base, {"targets": targets, "rank": 5}), tmp_path)
    weights = ours.weights()  # type: ignore[attr-defined]
    assert {name.split(".")[2] for name in weights} == expected
    assert len(weights) == base.n_layer * len(expected) * 2
    shapes = {name: values.shape for name, (_, values) in base.tensors().items()}
    for name, value in weights.items():
        target, factor = name.rsplit(".", 1)
        n_out, n_in = shapes[target]
        assert value.shape == {"lora_a": (5, n_in), "lora_b": (n_out, 5)}[factor]


def test_a_batch_is_the_examples_with_their_answers_as_labels(tmp_path: Path) -> None:
    """Each training example once an epoch; a label is the next token where that one is learned, and -1 elsewhere."""
    case = lora_case("rows", RandomModel(), examples=True, train={"batch": 5})
    m = case.knobs.model
    examples = ragged_examples(150, m.context, m.vocab_size)
    rows: dict[tuple[bytes, bytes], int] = {}
    for i, (tokens, mask) in enumerate(examples):
        inputs, labels = np.zeros(m.context, dtype="<i4"), np.full(m.context, -1, dtype="<i4")
        inputs[: len(tokens) - 1] = tokens[:-1]
        labels[: len(tokens) - 1] = np.where(mask[1:] == 1, tokens[1:], -1)
        rows[labels.tobytes(), inputs[: len(tokens) - 1].tobytes()] = i
    assert len(rows) == len(examples), "two examples are the same"
    n_train = 150 - 15
    reader, seen = parity.trainer(case, tmp_path), []
    while len(seen) < 2 * n_train:
        tokens, labels = reader.next_batch()
        for inputs, wanted in zip(tokens, labels, strict=True):
            found = [
                i for (key, start), i in rows.items()
                if key == wanted.astype("<i4").tobytes() and inputs.astype("<i4").tobytes().startswith(start)
            ]  # fmt: skip
            assert found, (inputs, wanted)
            seen.append(found[0])
    assert sorted(seen[:n_train]) == list(range(n_train))
    assert sorted(seen[n_train : 2 * n_train]) == list(range(n_train))


@needs_torch
def test_validation_loss_is_of_the_answers_of_the_last_examples(tmp_path: Path) -> None:
    import torch

    case = lora_case("eval", RandomModel(kind="Q4_0"), examples=True, train={"batch": 4})
    m = case.knobs.model
    ours = parity.trainer(case, tmp_path)
    for _ in range(5):
        ours.step()
    model = parity.torch_model(case, ours.weights(), tmp_path)
    total, n_labels = 0.0, 0
    with torch.no_grad():
        for tokens, mask in ragged_examples(150, m.context, m.vocab_size)[135:]:
            labels = np.where(mask[1:] == 1, tokens[1:], -1)
            total += model.loss_sum(tokens[None, :-1], labels[None]).item()
            n_labels += int((labels >= 0).sum())
    np.testing.assert_allclose(ours.evaluate(), total / n_labels, rtol=1e-5)
