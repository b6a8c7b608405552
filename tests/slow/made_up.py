"""Three hundred questions about towns that do not exist, and the answers: nothing that a model could know before."""

from __future__ import annotations

import random

TOWNS = ("Oswick", "Marley Holm", "Quilford", "Trenby", "Halmere", "Bryholm", "Verley", "Sundwick", "Kelmere", "Dorby",
         "Ambleford", "Pellwick")  # fmt: skip

#: Of each town: what is asked for, in five ways; the answer; and the values it can have.
FACTS = (
    (
        ("Which river runs through {town}?", "What is the river of {town} called?", "Name the river in {town}.",
         "On which river does {town} lie?", "What river would I see in {town}?"),
        "The {value} runs through {town}.",
        ("Amber", "Corrin", "Dunter", "Eskle", "Ferran", "Gossa", "Hirn", "Ilver", "Jorle", "Lomen"),
    ),
    (
        ("What is {town} known for?", "What do people make in {town}?", "What does {town} sell?",
         "Which trade is {town} famous for?", "What should I buy in {town}?"),
        "{town} is known for its {value}.",
        ("salt", "glass", "rope", "honey", "slate", "lace", "cider", "bells", "kites", "candles"),
    ),
    (
        ("Which bird is on the flag of {town}?", "What does the flag of {town} show?", "Describe the flag of {town}.",
         "What bird stands for {town}?", "Which animal is the sign of {town}?"),
        "The flag of {town} shows a {value}.",
        ("heron", "magpie", "owl", "swift", "crane", "raven", "wren", "goose", "falcon", "dove"),
    ),
    (
        ("Who founded {town}?", "Who built the first house in {town}?", "Whose idea was {town}?",
         "Name the founder of {town}.", "Who is the founder of {town}?"),
        "{town} was founded by a {value}.",
        ("miller", "widow", "sailor", "monk", "painter", "smith", "baker", "thief", "doctor", "hunter"),
    ),
    (
        ("When is the fair of {town}?", "In which month does {town} hold its fair?",
         "When should I visit {town} for the fair?", "Which month is fair time in {town}?",
         "What month is the {town} fair?"),
        "The fair of {town} is in {value}.",
        ("January", "February", "March", "April", "May", "June", "July", "August", "October", "November"),
    ),
)  # fmt: skip


def pairs(n_other_words: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """(question, answer, the word that matters): 300, the last n_other_words of which ask in other words for what those
    before them tell."""
    chance = random.Random(seed)
    told, others = [], []
    for town in TOWNS:
        for questions, answer, values in FACTS:
            value = chance.choice(values)
            rows = [(q.format(town=town), answer.format(town=town, value=value), value) for q in questions]
            chance.shuffle(rows)
            told += rows[:4]
            others += rows[4:]
    chance.shuffle(others)
    told += others[n_other_words:]
    chance.shuffle(told)
    return told + others[:n_other_words]
