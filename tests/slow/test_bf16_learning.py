"""bf16 learns what f32 learns: the validation loss after 500 steps of nanoGPT's recipe over a real text."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import EXCERPT, Toy, read_events


@pytest.mark.timeout(1800)
def test_500_steps_end_within_one_percent_of_f32(toy: Toy) -> None:
    losses: dict[str, float] = {}
    for dtype in ("f32", "bf16"):
        sets = ("--set", f"train.dtype={dtype}", "--set", "train.steps=500")
        document = toy(
            "train",
            "--preset",
            "nanogpt-char",
            "--corpus",
            EXCERPT,
            *sets,
            "--no-sample",
            "--out",
            dtype,
            "--json",
            timeout=900,
        ).ok()
        losses[dtype] = document.document["val_loss"]
        tokens_per_second = document.document["tokens_per_second"]
        print(f"{dtype}: validation loss {losses[dtype]:.4f}, {tokens_per_second:.0f} tokens/s")
        assert read_events(Path(document.document["run_dir"]), "eval")[-1]["tokens"] > 1000
    assert losses["bf16"] != losses["f32"]
    assert losses["bf16"] == pytest.approx(losses["f32"], rel=1e-2)
