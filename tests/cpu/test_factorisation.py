"""Micro-batch x accumulation: however a step is cut into rounds, the update is the same. Nothing frozen moves, and
neither the number of threads nor computing activations a second time changes a bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
from gguf_files import RandomModel
from harness import config_kv
from parity import Case, lora_case, vit_case, warm_case

SHORT = {"batch": 8, "steps": 50}
CASES = [
    Case("llama", train=SHORT),
    Case("gpt2", train=SHORT, arch="gpt2"),
    warm_case("warm", RandomModel(kind="F16"), train=SHORT | {"freeze": "blk.1.*"}),
    # ragged examples: each round has other numbers of labels
    lora_case("answers", RandomModel("qwen2", kind="Q4_0"), examples=True, train=SHORT),
    lora_case("dropout", RandomModel(kind="Q8_0"), {"dropout": 0.3}, examples=True, train=SHORT),
    vit_case("images", {}, SHORT),
]


def cut(case: Case, micro_batch: int) -> Case:
    return replace(case, train=case.train | {"micro_batch": micro_batch})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_factorisation_is_the_same_update(case: Case, tmp_path: Path) -> None:
    """8 x 1, 4 x 2, 2 x 4, 1 x 8: the same terms in sums of another order, so 1e-7 at each of some hundred additions,
    relative to the largest of them. AdamW divides a gradient by its own size, so that after one step weights are
    compared by what they moved: where a gradient is nothing but rounding, by up to the learning rate."""
    case = replace(case, eval={"batches": 1})
    whole = parity.trainer(case, tmp_path)
    start, before, first = whole.evaluate(), whole.weights(), whole.step()
    gradients, moved = whole.gradients(), {name: value - before[name] for name, value in whole.weights().items()}
    later = [whole.step()["loss"] for _ in range(20)]
    for micro_batch in (4, 2, 1):
        parts = parity.trainer(cut(case, micro_batch), tmp_path)
        np.testing.assert_allclose(parts.evaluate(), start, rtol=1e-6, err_msg="the same sequences are read")
        one = parts.step()
        np.testing.assert_allclose(one["loss"], first["loss"], rtol=1e-6)
        np.testing.assert_allclose(one["grad_norm"], first["grad_norm"], rtol=1e-5)
        for name, gradient in parts.gradients().items():
            scale = np.abs(gradients[name]).max()
            assert np.abs(gradient - gradients[name]).max() <= 1e-5 * scale, (micro_batch, name)
        for name, value in parts.weights().items():
            difference = np.linalg.norm(value - before[name] - moved[name])
            assert difference <= 1e-3 * np.linalg.norm(moved[name]), (micro_batch, name)
        np.testing.assert_allclose([parts.step()["loss"] for _ in range(20)], later, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_change_no_bit(case: Case, tmp_path: Path) -> None:
    from toy import _native

    results: list[tuple[list[float], float, dict[str, bytes]]] = []
    for threads in (1, 2, 3):
        kv = cut(case, 4).kv.replace("run.threads=1\n", f"run.threads={threads}\n")
        ours = _native.Trainer(kv, case.env(tmp_path))
        losses = [ours.step()["loss"] for _ in range(10)]
        results.append((losses, ours.evaluate(), {name: w.tobytes() for name, w in ours.weights().items()}))
    assert results[1] == results[0]
    assert results[2] == results[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_activations_computed_again_change_no_bit(case: Case, tmp_path: Path) -> None:
    from toy import _native

    results: list[tuple[list[float], float, dict[str, bytes]]] = []
    for again in (False, True):
        again_case = replace(case, train=case.train | {"micro_batch": 4, "recompute": again})
        ours = _native.Trainer(again_case.kv, again_case.env(tmp_path))
        losses = [ours.step()["loss"] for _ in range(10)]
        results.append((losses, ours.evaluate(), {name: w.tobytes() for name, w in ours.weights().items()}))
    assert results[1] == results[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_activations_computed_again_need_not_be_kept(arch: str) -> None:
    """Of each block only what it hands on is kept: of 12 blocks, less than a third of the whole."""
    from toy import _native

    needed = {}
    for again in (False, True):
        case = Case("deep", arch=arch, model={"n_layer": 12, "n_embd": 64}, train={"batch": 4, "recompute": again})
        needed[again] = _native.plan(case.kv)["compute"]
    assert needed[True] < needed[False] / 3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_cheap_activations_are_kept_where_they_are_small(arch: str, tmp_path: Path) -> None:
    """Twice the micro-batch, and they are not small any more: less than twice the memory, the bytes of whole blocks."""
    from toy import _native

    model = {"context": 128, "n_ff": 1024}
    small, large = (Case("large", arch=arch, model=model, train={"batch": n, "micro_batch": n}) for n in (8, 16))
    assert _native.plan(large.kv)["compute"] < 1.8 * _native.plan(small.kv)["compute"]

    results = []
    for again in (False, True):
        ours = parity.trainer(replace(large, train=large.train | {"recompute": again}), tmp_path)
        results.append(([ours.step()["loss"] for _ in range(2)], {n: w.tobytes() for n, w in ours.weights().items()}))
    assert results[1] == results[0]


def test_dropout_changes_the_steps_and_not_the_evaluation(tmp_path: Path) -> None:
    with_dropout = parity.trainer(CASES[4], tmp_path)
    without = parity.trainer(replace(CASES[4], name="without", lora={"rank": 4, "alpha": 6.0}), tmp_path)
    assert with_dropout.evaluate() == without.evaluate()
    assert with_dropout.step()["loss"] != without.step()["loss"]


# --- frozen and trained ---------------------------------------------------------------------------------------------


def digests(weights: dict[str, Any]) -> dict[str, str]:
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in weights.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frozen_tensors_keep_their_hash_and_trained_ones_change(case: Case, tmp_path: Path) -> None:
    env = case.env(tmp_path)
    base = Path(env["GGUF"]).read_bytes() if "GGUF" in env else b""
    ours = parity.trainer(case, tmp_path)
    before = digests(ours.weights())
    for _ in range(5):
        ours.step()
    after = digests(ours.weights())
    assert {name for name in before if before[name] == after[name]} == {name for name in before if case.is_frozen(name)}
    if base:
        assert Path(env["GGUF"]).read_bytes() == base


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_graph_of_other_devices_is_the_same_step(case: Case, tmp_path: Path) -> None:
    """Without what a device may lack: attention in tiles, the head with its loss. Computed on the cpu."""
    from toy import _native

    plain_kv = cut(case, 4).kv.replace("run.device=cpu\n", "run.device=metal\n")
    fused, plain = parity.trainer(cut(case, 4), tmp_path), _native.Trainer(plain_kv, case.env(tmp_path))
    for name, value in fused.weights().items():
        plain.set_weight(name, value)
    one, other = fused.step(), plain.step()
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-6)
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-5)
    gradients = plain.gradients()
    for name, gradient in fused.gradients().items():
        assert np.abs(gradients[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name
    # an evaluation computes the first part of the graph, a step after it the whole again
    np.testing.assert_allclose(plain.evaluate(), fused.evaluate(), rtol=1e-5)
    np.testing.assert_allclose(plain.step()["loss"], fused.step()["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "offload", "whole"),
    [
        ("cpu", False, False),
        ("cuda", False, False),
        ("vulkan", False, False),
        # what writes a gradient that the cpu keeps is the cpu's: there the loss is one of several operations
        ("vulkan", True, True),
        ("metal", False, True),
    ],
)
def test_a_plan_knows_where_logits_never_exist_whole(device: str, offload: bool, whole: bool) -> None:
    from toy import _native

    words, context, batch = 50257, 512, 8
    kv = config_kv(
        run={"device": device},
        model={"vocab_size": words, "context": context},
        train={"batch": batch, "micro_batch": batch, "dtype": "f32", "offload": offload},
    )
    assert (_native.plan(kv)["compute"] > 4 * words * context * batch) == whole
