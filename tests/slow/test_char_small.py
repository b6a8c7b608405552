"""The published number: Shakespeare under 1.60 nats a character with a shipped preset (nanoGPT on a CPU: 1.87)."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import SHARED, Toy, read_events

CORPUS = SHARED / "tinyshakespeare.txt"


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CORPUS.is_file(), reason=f"no {CORPUS.name}: TOY_TEST_DATA names the folder that holds it")
def test_char_small_ends_under_1_60(toy: Toy) -> None:
    flags = ("--preset", "char-small", "--corpus", CORPUS, "--out", "run", "--no-sample", "--json")
    document = toy("train", *flags, timeout=3500).ok().document
    run = Path(document["run_dir"])
    last = read_events(run, "eval")[-1]
    loss, seconds = document["val_loss"], document["seconds"]
    print(f"validation loss {loss:.4f} in {seconds:.0f} s, {document['tokens_per_second']:.0f} tokens/s")
    assert last["tokens"] > 100_000, "the whole of the last tenth is what others publish"
    assert document["val_loss"] < 1.60
    said = toy("infer", "run", "--prompt", "ROMEO:", "--n", 80, "--seed", 1).ok().stdout
    assert len(said) > 60
