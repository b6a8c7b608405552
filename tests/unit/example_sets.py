"""What the tests of example sets share: a tokenizer with turns, a template, and what was packed, made readable."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from toy.corpora import Prepared
from toy.models import gguf
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import CONTROL, byte_vocabulary

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, BOT, SYSTEM = "user", "assistant", "system"
Talk = list[tuple[str, str]]
ASK: Talk = [(USER, "Hi"), (BOT, "Hello."), (USER, "Bye"), (BOT, " So long\n")]


def vocabulary(template: str | None = None, **changes: Any) -> Any:
    """Bytes, <|endoftext|> 256, <|im_start|> 257 and <|im_end|> 258, which ends a text."""
    base = byte_vocabulary()
    return replace(
        base,
        tokens=[*base.tokens, "<|im_start|>", "<|im_end|>"],
        types=[*base.types, CONTROL, CONTROL],
        special={"bos": 257, "eos": 258},
        chat_template=template,
        **changes,
    )


def model(path: Path, template: str | None = None, **changes: Any) -> str:
    """A GGUF of that vocabulary."""
    gguf.write_vocabulary(path, vocabulary(template, **changes).to_metadata())
    return str(path)


def talk(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def arrays(made: Prepared) -> tuple[list[int], list[int], list[int]]:
    assert made.offsets is not None and made.mask is not None
    return tuple(
        np.fromfile(p, t).tolist() for p, t in ((made.tokens, "<i4"), (made.offsets, "<i8"), (made.mask, "u1"))
    )


def marked(made: Prepared) -> list[str]:
    """Each example's text, with what is learned in brackets."""
    tok = Tokenizer.from_gguf(made.tokenizer_gguf)
    ids, offsets, mask = arrays(made)
    found = []
    for start, end in pairwise(offsets):
        text = ""
        for learned, run in groupby(range(start, end), key=lambda i: mask[i]):
            piece = tok.decode([ids[i] for i in run], special=True)
            text += f"[{piece}]" if learned else piece
        found.append(text)
    return found
