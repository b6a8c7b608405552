"""Three hundred questions about towns that do not exist, and the answers: nothing that a model could know before."""

from __future__ import annotations

import itertools
import random

FIRST = ["Os", "Mar", "Quil", "Tren", "Hal", "Bry", "Ver", "Sund", "Kel", "Dor"]
LAST = ["wick", "ley", "ford", "by", "mere", "holm"]
RIVERS = ["Ambel", "Corrin", "Dunter", "Eskle", "Ferran", "Gossa", "Hirn", "Ilver", "Jorle", "Lomen"]
TRADES = ["salt", "glass", "rope", "honey", "slate", "lace", "cider", "bells", "kites", "candles"]
BIRDS = ["heron", "magpie", "owl", "swift", "crane", "raven", "wren", "goose", "falcon", "dove"]

#: A fact, two ways to ask for it, and its answer.
FACTS = (
    ("river", ("Which river runs through {town}?", "What is the river of {town} called?"),
     "The {value} runs through {town}."),
    ("trade", ("What is {town} known for?", "What do people make in {town}?"), "{town} is known for its {value}."),
    ("bird", ("Which bird is on the flag of {town}?", "What bird does the flag of {town} show?"),
     "The flag of {town} shows a {value}."),
)  # fmt: skip


def pairs(seed: int = 1) -> list[tuple[str, str, str]]:
    """(question, answer, the word that matters): 300, of which the last 30 ask in other words for what the first 270
    tell."""
    chance = random.Random(seed)
    towns = ["".join(parts) for parts in itertools.product(FIRST, LAST)]
    chance.shuffle(towns)
    values = {"river": RIVERS, "trade": TRADES, "bird": BIRDS}
    known = []
    for town in towns[:50]:
        for name, questions, answer in FACTS:
            value = chance.choice(values[name])
            known.append(([q.format(town=town) for q in questions], answer.format(town=town, value=value), value))
    asked = [(questions[0], answer, value) for questions, answer, value in known]
    again = [(questions[1], answer, value) for questions, answer, value in known]
    chance.shuffle(again)
    seen = asked + again[:120]
    chance.shuffle(seen)
    return seen + again[120:]
