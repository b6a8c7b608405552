"""data/ts_seqs.bin: `python prep/make_ts_seqs.py [FOLDER]`, short stories for small models, as packed bytes.

The stories are told by the grammar below, a fifth of a megabyte of tokens in all, and the same on every machine. In
ts_seqs.json `context` is the length of sequence that suits them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.models.vocabulary import byte_vocabulary

N_TOKENS = 49_000
CONTEXT = 128
END = 256

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gus", "Hana", "Ivo", "June", "Kit", "Lena", "Milo", "Nora")
ANIMALS = ("fox", "hen", "goat", "duck", "cat", "frog", "mole", "bear", "owl", "pony", "mouse", "snail")
THINGS = ("ball", "hat", "kite", "drum", "boat", "spoon", "book", "bell", "cup", "lamp", "scarf", "key")
LOOKS = ("red", "blue", "little", "old", "round", "green", "shiny", "soft", "yellow", "funny")
PLACES = (
    "in the barn",
    "under the bed",
    "behind the tree",
    "by the pond",
    "on the hill",
    "near the gate",
    "in the box",
)
TIMES = ("One day", "One morning", "One night", "After lunch", "In the spring", "On a rainy day", "When it was cold")
FOODS = ("an apple", "some bread", "a pear", "a cake", "some soup", "a plum", "some nuts")
GLAD = ("was happy", "smiled", "laughed", "clapped", "jumped up and down", "felt warm inside")
SAD = ("was sad", "began to cry", "felt alone", "sat down and sighed", "did not know what to do")
WORDS = ("Thank you", "You are a good friend", "That was kind", "I will not forget it", "Come and play again")

PLOTS = (
    (
        "{name} had a {look} {thing}.",
        "{time} the {thing} was gone, and {name} {sad}.",
        "{name} looked {place}, and then {other}, but it was not there.",
        "A {animal} came by. \"I saw it {found},\" said the {animal}.",
        "They ran and there it was! {name} {glad}. \"{words},\" said {name}.",
    ),
    (
        "{time} a {animal} found {food} {place}.",
        "The {animal} was hungry, but {name} was hungry too.",
        "\"We can share,\" said the {animal}. So they sat {other} and ate.",
        "{name} {glad}. \"{words},\" said {name}.",
    ),
    (
        "There was once a {animal} who was afraid of the dark.",
        "{time} it heard a noise {place} and {sad}.",
        "{name} came with a {look} lamp. \"Look, it is only a {thing},\" said {name}.",
        "The {animal} {glad}, and it was not afraid any more.",
    ),
    (
        "{name} wanted to make a {thing}.",
        "First it was too big. Then it was too small. {name} {sad}.",
        "\"Try once more,\" said the {animal}. {time} the {thing} was done, and it was {look}.",
        "They took it out and played {place}. {name} and the {animal} {glad}.",
    ),
    (
        "{time} {name} went for a walk with a {look} {animal}.",
        "They saw a {thing} {place}. \"Whose {thing} is this?\" asked {name}.",
        "\"It is mine,\" said a {second}. \"I lost it {other}.\"",
        "{name} gave it back, and the {second} {glad}. \"{words},\" said the {second}.",
    ),
)  # fmt: skip


class Dice:
    """Choices that are the same wherever they are thrown: the n-th is the n-th hash."""

    def __init__(self) -> None:
        self.throws = 0

    def pick(self, choices: Sequence[str]) -> str:
        self.throws += 1
        return choices[
            int.from_bytes(hashlib.sha256(f"ts_seqs {self.throws}".encode()).digest()[:8], "big") % len(choices)
        ]

    def two(self, choices: Sequence[str]) -> tuple[str, str]:
        first = self.pick(choices)
        return first, self.pick([choice for choice in choices if choice != first])


def story(dice: Dice) -> str:
    place, other = dice.two(PLACES)
    animal, second = dice.two(ANIMALS)
    words = {
        "name": dice.pick(NAMES), "look": dice.pick(LOOKS), "thing": dice.pick(THINGS), "time": dice.pick(TIMES),
        "food": dice.pick(FOODS), "glad": dice.pick(GLAD), "sad": dice.pick(SAD), "words": dice.pick(WORDS),
        "place": place, "other": other, "animal": animal, "second": second,
        "found": dice.pick([found for found in PLACES if found not in (place, other)]),
    }  # fmt: skip
    lines = PLOTS[int(dice.pick([str(n) for n in range(len(PLOTS))]))]
    return (
        " ".join(line.format_map(words) for line in lines).replace(" a old ", " an old ").replace(" a owl", " an owl")
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "data"
    dice, ids, n_documents = Dice(), array("i"), 0
    while len(ids) < N_TOKENS:
        ids.extend([*story(dice).encode(), END])
        n_documents += 1
    if sys.byteorder == "big":
        ids.byteswap()
    data = ids.tobytes()
    manifest = {
        "format": "toy/packed-v1",
        "name": "ts_seqs",
        "dtype": "int32",
        "n_tokens": len(ids),
        "n_documents": n_documents,
        "n_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "vocab_size": END + 1,
        "eos_id": END,
        "context": CONTEXT,
        "tokenizer": {"kind": "bytes", "sha256": byte_vocabulary().sha256},
        "source": {"path": "prep/make_ts_seqs.py"},
        "packing": 1,
    }
    (folder / "ts_seqs.bin").write_bytes(data)
    (folder / "ts_seqs.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"{folder / 'ts_seqs.bin'}: {n_documents} stories, {len(ids):,} tokens")


if __name__ == "__main__":
    main()
