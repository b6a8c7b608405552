"""gpt2 against PyTorch: the same losses and gradients. (The dumps are checked in test_torch_parity.py.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity
import pytest
from parity import GPT2_CASES, Case, needs_torch


@needs_torch
@pytest.mark.parametrize("case", GPT2_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, parity.run_torch(case, tmp_path), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_changes_in_one_step(tmp_path: Path, tied: bool) -> None:
    ours = parity.trainer(Case("step", {"tie_embeddings": tied}, {"warmup_steps": 0}, arch="gpt2"), tmp_path)
    before = ours.weights()
    assert ("output.weight" in before) is not tied
    assert {name.rsplit(".", 2)[-2] for name in before if name.endswith(".bias")} == {
        "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm",
    }  # fmt: skip
    ours.step()
    after = ours.weights()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
