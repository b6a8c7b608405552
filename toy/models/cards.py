"""What a GGUF says of itself, without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy.errors import ToyError
from toy.models import gguf
from toy.models.vocabulary import SPECIAL_KEYS

_ENCODINGS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "bert": "WordPiece", "t5": "Unigram"}


@dataclass(frozen=True)
class Card:
    """One model file. `quantisation` is the type that most of its parameters have; `size` is in bytes."""

    path: Path
    architecture: str
    name: str
    parameters: int
    quantisation: str
    types: dict[str, int]  # tensor type -> parameters
    size: int
    context: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: list[dict[str, Any]] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "title": self.name,
            "parameters": self.parameters,
            "quantisation": self.quantisation,
            "size": self.size,
            "context": self.context,
        }

    def shape(self) -> dict[str, Any]:
        """The architecture's own numbers, `block_count` and the like, without their prefix."""
        prefix = "toy.vit." if self.architecture == "vit" else f"{self.architecture}."
        found = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        return {key: value for key, value in found.items() if not isinstance(value, list)}


def read(path: str | Path) -> Card:
    """The card of the GGUF at `path`. Raises ToyError (missing_file, bad_file)."""
    document = gguf.read(path)
    metadata, tensors = document["metadata"], document["tensors"]
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[str(tensor["type"])] += math.prod(tensor["shape"])
    architecture = str(metadata.get("general.architecture", "?"))
    context = metadata.get(f"{architecture}.context_length", 0)
    return Card(
        path=Path(path),
        architecture=architecture,
        name=str(metadata.get("general.name", "")),
        parameters=sum(types.values()),
        quantisation=types.most_common(1)[0][0] if types else "-",
        types=dict(types.most_common()),
        size=int(document["file_size"]),
        context=context if isinstance(context, int) else 0,
        metadata=metadata,
        tensors=tensors,
    )


def vision(card: Card) -> dict[str, Any]:
    """What images a vit takes, and what it calls them: image_size, n_channel, classes, mean, std.

    Raises ToyError (bad_file) where its metadata does not say.
    """
    found = {
        "image_size": card.metadata.get("toy.vit.image_size"),
        "n_channel": card.metadata.get("toy.vit.channel_count"),
        "classes": card.metadata.get("toy.vit.classes"),
        "mean": card.metadata.get("toy.vit.image_mean"),
        "std": card.metadata.get("toy.vit.image_std"),
    }
    for key, value in found.items():
        if not isinstance(value, int if key in ("image_size", "n_channel") else list) or not value:
            raise ToyError("bad_file", f"{card.path} does not say its {key}", "export the model again with toy")
    return found


def tokenizer_summary(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Kind, size and special tokens of the tokenizer inside, or None."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return None
    special = {}
    for name, key in SPECIAL_KEYS.items():
        i = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(i, int) and 0 <= i < len(tokens):
            special[name] = {"id": i, "text": tokens[i]}
    model = str(metadata.get("tokenizer.ggml.model", "?"))
    return {
        "model": model,
        "encoding": _ENCODINGS.get(model, model),
        "pre": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(tokens),
        "merges": len(metadata.get("tokenizer.ggml.merges") or []),
        "special": special,
        "add_bos": metadata.get("tokenizer.ggml.add_bos_token"),
        "chat_template": isinstance(metadata.get("tokenizer.chat_template"), str),
    }
