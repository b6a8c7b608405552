"""warm-start against PyTorch: what it begins with, what is frozen, learning-rate groups. (Dumps:
test_torch_parity.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
from gguf_files import RandomModel, read
from parity import WARM_CASES, Case, needs_torch, warm_case


@needs_torch
@pytest.mark.parametrize("case", WARM_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, parity.run_torch(case, tmp_path), tmp_path)


def from_scratch(case: Case, folder: Path) -> Any:
    """The same model with no donor."""
    from toy import _native

    kv = case.kv.replace("run.recipe=warm-start", "run.recipe=from-scratch")
    kv = "".join(
        "model.init=scratch\n" if line.startswith("model.init=") else line for line in kv.splitlines(keepends=True)
    )
    return _native.Trainer(kv, {"CORPUS": case.env(folder)["CORPUS"]})


@pytest.mark.parametrize("case", WARM_CASES, ids=lambda case: case.name)
def test_it_begins_with_the_donor(case: Case, tmp_path: Path) -> None:
    donor = read(Path(case.env(tmp_path)["GGUF"]))
    if "position_embd.weight" in donor:  # a shorter context takes the first positions
        donor["position_embd.weight"] = donor["position_embd.weight"][: case.knobs.model.context]
    fresh = from_scratch(case, tmp_path).weights()
    weights = parity.trainer(case, tmp_path).weights()
    assert set(weights) == set(fresh)
    embeddings = {"token_embd.weight", "output.weight"}
    for name, value in weights.items():
        is_given = case.knobs.model.init == "donor" or name in embeddings
        np.testing.assert_array_equal(value, donor[name] if is_given else fresh[name], name)


@pytest.mark.parametrize("case", WARM_CASES, ids=lambda case: case.name)
def test_what_is_frozen_stays_and_all_else_changes(case: Case, tmp_path: Path) -> None:
    parity.check_frozen(case, tmp_path)


@pytest.mark.parametrize(("freeze", "named"), [("blk.0.*,blok.1.*", r"blok\.1\.\*"), ("*", "nothing to train")])
def test_the_engine_refuses_patterns_that_fit_nothing_or_all(tmp_path: Path, freeze: str, named: str) -> None:
    from toy import _native

    case = warm_case("freeze", RandomModel())
    kv = case.kv.replace("train.freeze=\n", f"train.freeze={freeze}\n")
    with pytest.raises(ValueError, match=named):
        _native.Trainer(kv, case.env(tmp_path))
