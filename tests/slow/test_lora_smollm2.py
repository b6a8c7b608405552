"""A real model learns what nobody knew: SmolLM2-135M-Instruct, quantised to Q4_1, 300 questions about towns that
do not exist. What that costs on other text is measured too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from harness import EXCERPT, Toy, sets, write_jsonl
from made_up import pairs

STEPS, BATCH, RANK, LEARNING_RATE = 250, 8, 16, 1e-3
# Without decay the answers are learned as well, but AdamW goes on moving what they do not need: the perplexity of other
# text is up by half.
WEIGHT_DECAY = 15
N_VALIDATION = 30  # other words for facts that training tells
N_ASKED = 30


def write_chats(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer, _ in rows
    ]
    return write_jsonl(path, *lines)


@pytest.mark.timeout(7200)
def test_it_learns_made_up_answers(toy: Toy, smollm: Path) -> None:
    rows = pairs()
    seen, other_words = rows[:-N_VALIDATION], rows[-N_VALIDATION:]
    assert len(rows) == 300
    train, held_out = write_chats(toy.cwd / "train.jsonl", seen), write_chats(toy.cwd / "held-out.jsonl", other_words)
    before = hashlib.sha256(smollm.read_bytes()).hexdigest()

    def measure(model: object, corpus: Path) -> dict[str, Any]:
        return toy("eval", model, "--corpus", corpus, "--json", timeout=900).ok().document

    base = {corpus: measure(smollm, corpus) for corpus in (held_out, EXCERPT)}
    knobs = {
        "data.val_corpus": held_out, "train.batch": BATCH, "train.learning_rate": LEARNING_RATE,
        "train.weight_decay": WEIGHT_DECAY, "eval.every": 50,
    }  # fmt: skip
    flags = ("--model", smollm, "--corpus", train, "--rank", RANK, "--steps", STEPS, "--out", "run", "--no-sample")
    document = toy("train", "lora", *flags, *sets(knobs), "--json", timeout=7000).ok().document
    assert hashlib.sha256(smollm.read_bytes()).hexdigest() == before

    adapted = {corpus: measure("run", corpus) for corpus in (held_out, EXCERPT)}
    right = 0
    for question, _, word in seen[:: len(seen) // N_ASKED][:N_ASKED]:
        said = toy("infer", "run", "--chat", "--prompt", question, "--temperature", 0, "--n", 24).ok().stdout
        right += word.lower() in said.lower()
    drop = 1 - adapted[held_out]["loss"] / base[held_out]["loss"]
    growth = adapted[EXCERPT]["perplexity"] / base[EXCERPT]["perplexity"] - 1
    print(
        f"\nvalidation loss {base[held_out]['loss']:.3f} -> {adapted[held_out]['loss']:.3f} (down by {drop:.0%}), "
        f"{right} of {N_ASKED} seen questions right, perplexity of other text {base[EXCERPT]['perplexity']:.2f} -> "
        f"{adapted[EXCERPT]['perplexity']:.2f} ({growth:+.1%}); {document['seconds']:.0f} s"
    )
    assert drop >= 1 / 3
    assert right >= 0.9 * N_ASKED
    assert growth < 0.10
