"""GGUFs that a training starts from: what they must be, and the shape they give."""

from __future__ import annotations

import struct
from typing import Any

from toy import recipes
from toy.errors import ToyError, shown
from toy.models.cards import Card

#: What `toy merge` and friends call them, for messages.
WORDS = {"lora": "base", "warm-start": "donor"}


def check_base(card: Card, recipe: str, arch: str | None) -> str:
    """The architecture to train over this GGUF. `arch` is the one asked for, None where nobody asked.

    Raises ToyError (bad_file, not_available): an adapter, a vocabulary, an architecture, tensor type or variant that
    the recipe cannot start from.
    """
    name, what = shown(card.path), WORDS[recipe]
    if card.metadata.get("general.type") == "adapter":
        base = card.metadata.get("general.base_model.0.name")
        hint = f"give the model that it was made for{f', {base}' if base else ''}; `toy merge` joins the two"
        raise ToyError("bad_file", f"{name} is an adapter, not a model to start from", hint)
    if not card.tensors:
        raise ToyError("bad_file", f"{name} holds a vocabulary and no weights", "give the model's own .gguf")
    row = recipes.starting_from(recipe, card.architecture)
    if row is None:
        known = sorted({arch for row in recipes.MATRIX if row.recipe == recipe for arch in row.gguf_archs})
        also = [other for other in recipes.WITH_BASE if recipes.starting_from(other, card.architecture)]
        hint = f"{recipe} starts from: {', '.join(known)}" + (f"; --recipe {also[0]} takes this one" if also else "")
        raise ToyError(
            "not_available", f"{name} is of the architecture {card.architecture!r}, no {what} for {recipe}", hint
        )
    if arch is not None and arch != row.arch:
        raise ToyError(
            "bad_config", f"{name} is a {card.architecture}, and run.arch is {arch}", "leave --arch out, or change it"
        )
    if odd := recipes.refused_types(row, card.types):
        known_types = ", ".join(row.gguf_types)
        raise ToyError(
            "not_available",
            f"{name} has tensors of the type {', '.join(odd)}, which {recipe} does not compute with",
            f"convert it to one of: {known_types}",
        )
    if not isinstance(card.metadata.get("tokenizer.ggml.tokens"), list):
        raise ToyError("bad_file", f"{name} has no tokenizer in it", f"a {what} brings the tokenizer of its corpus")
    return row.arch


def base_shape(card: Card) -> dict[str, Any]:
    """The `model.*` knobs of a llama, qwen2 or gpt2 GGUF. Raises ToyError (bad_file) for what its metadata lacks."""
    prefix = f"{card.architecture}."
    embedding = next((tensor["shape"] for tensor in card.tensors if tensor["name"] == "token_embd.weight"), None)
    if embedding is None:
        raise _broken(card, "has no tensor token_embd.weight")

    def whole(key: str, default: int | None = None) -> int:
        value = card.metadata.get(prefix + key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _broken(card, f"has no {prefix}{key}" if value is None else f"has {prefix}{key} = {value!r}"[:200])
        return value

    def real(key: str, default: float) -> float:
        value = card.metadata.get(prefix + key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise _broken(card, f"has {prefix}{key} = {value!r}"[:200])
        return shortest(float(value))

    n_head = whole("attention.head_count")
    rms = "layer_norm_epsilon" if card.architecture == "gpt2" else "layer_norm_rms_epsilon"
    return {
        "n_layer": whole("block_count"),
        "n_embd": whole("embedding_length"),
        "n_head": n_head,
        "n_head_kv": whole("attention.head_count_kv", n_head),
        "n_ff": whole("feed_forward_length"),
        "vocab_size": int(embedding[-1]),
        "rope_freq_base": real("rope.freq_base", 10000.0),
        "norm_eps": real(f"attention.{rms}", 1e-5),
        "tie_embeddings": not any(tensor["name"] == "output.weight" for tensor in card.tensors),
    }


def check_trainable(card: Card, shape: dict[str, Any]) -> None:
    """Raises ToyError (not_available) for variants that can be run, and not written as a model of ours."""
    prefix, head = f"{card.architecture}.", shape["n_embd"] // shape["n_head"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        width = card.metadata.get(prefix + key, head)
        if width != head:
            raise ToyError(
                "not_available",
                f"{shown(card.path)} has {prefix}{key} = {width} where its heads are {head} wide",
                "warm-start trains models whose heads are n_embd / n_head wide; lora can adapt this one",
            )


def shortest(value: float) -> float:
    """A float32 as a person would write it: 1e-05, not 9.999999747378752e-06."""
    stored = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == stored:
            return short
    return value


def _broken(card: Card, what: str) -> ToyError:
    return ToyError("bad_file", f"{shown(card.path)} {what}", "the file is no complete model: get it again")
