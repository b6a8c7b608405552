"""A published number: nanoGPT's recipe for Shakespeare's characters on a CPU (its README: 1.88 nats) as a shipped
preset."""

from __future__ import annotations

import pytest
from harness import SHARED, Toy, read_events

CORPUS = SHARED / "tinyshakespeare.txt"


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CORPUS.is_file(), reason=f"no {CORPUS.name}: TOY_TEST_DATA names the folder that holds it")
def test_nanogpt_char_ends_at_1_88_or_less(toy: Toy) -> None:
    whole = ("--set", "eval.batches=1000")
    flags = ("--preset", "nanogpt-char", "--corpus", CORPUS, *whole, "--out", "run", "--no-sample", "--json")
    document = toy("train", *flags, timeout=3500).ok().document
    print(
        f"\nvalidation loss {document['val_loss']:.4f} after {document['steps']} steps in {document['seconds']:.0f} s, "
        f"{document['tokens_per_second']:.0f} tokens/s"
    )
    assert document["arch"] == "gpt2"
    assert document["steps"] == 2000
    last = read_events(toy.cwd / "run", "eval")[-1]
    assert last["tokens"] > 100_000, "the whole of the last tenth is what others publish"
    assert document["val_loss"] <= 1.88
