"""`toy describe`: one model's metadata, shapes, parameter count and tokenizer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from toy.cli.common import bytes_text, count_text, emit, json_option

if TYPE_CHECKING:
    from toy.models.cards import Card


@click.command()
@click.argument("model", metavar="MODEL|RUN")
@click.option("--tensors", is_flag=True, help="List every tensor, not one line for a kind.")
@json_option
def command(model: str, tensors: bool, as_json: bool) -> None:
    """What MODEL is: architecture, sizes, tensors, tokenizer, and which recipes can start from it."""
    from toy import recipes
    from toy.models import cards, resolve

    card = cards.read(resolve(model))
    kind = str(card.metadata.get("general.type", "model"))
    accepted = recipes.accepts(card.architecture, card.types, kind)
    runs_here = card.architecture in recipes.INFER and kind != "adapter"
    adapter = adapter_facts(card) if kind == "adapter" else None
    tokenizer = cards.tokenizer_summary(card.metadata)
    plain = {key: value for key, value in card.metadata.items() if not isinstance(value, list)}
    plain.pop("tokenizer.chat_template", None)
    if as_json:
        document = card.summary() | {
            "path": str(card.path.absolute()),
            "kind": kind,
            "adapter": adapter,
            "types": card.types,
            "shape": card.shape(),
            "tokenizer": tokenizer,
            "recipes": accepted,
            "infer": runs_here,
            "metadata": plain,
            "tensors": card.tensors,
        }
        emit("toy/describe-v1", document)
        return
    title = f"{card.path}" + (f" ({card.name})" if card.name else "")
    click.echo(title)
    kinds = ", ".join(f"{kind} {100 * n / max(1, card.parameters):.0f} %" for kind, n in card.types.items())
    shape = "  ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in card.shape().items()
    )
    rows = [
        ("architecture", card.architecture),
        *([("adapter", adapter_text(adapter))] if adapter else []),
        ("parameters", f"{count_text(card.parameters)} ({card.parameters:,}) in {len(card.tensors)} tensors"),
        ("types", kinds or "-"),
        ("size", bytes_text(card.size)),
        ("shape", shape or "-"),
        ("tokenizer", _tokenizer_text(tokenizer)),
        ("chat template", "yes" if tokenizer and tokenizer["chat_template"] else "no"),
        ("toy infer", "yes" if runs_here else f"no: {_why_not(card.architecture, kind)}"),
        ("recipes", " ".join(accepted) or "none"),
    ]
    for name, value in rows:
        click.echo(f"  {name:<14} {value}")
    click.echo("  metadata")
    for key, value in plain.items():
        if not key.startswith(("tokenizer.", f"{card.architecture}.")):
            text = str(value).replace("\n", " ")
            click.echo(f"    {key} = {text if len(text) < 90 else text[:87] + '...'}")
    click.echo("  tensors")
    for line in _tensor_lines(card.tensors, tensors):
        click.echo(f"    {line}")


def _why_not(architecture: str, kind: str) -> str:
    return "an adapter runs with its base: --adapter" if kind == "adapter" else f"architecture {architecture}"


def adapter_facts(card: Card) -> dict[str, Any]:
    """What an adapter in llama.cpp's format says of itself."""
    pairs = [tensor for tensor in card.tensors if tensor["name"].endswith(".lora_a")]
    stems = [re.sub(r"^blk\.\d+\.|\.weight\.lora_a$", "", tensor["name"]) for tensor in pairs]
    return {
        "rank": int(pairs[0]["shape"][-1]) if pairs else 0,
        "alpha": card.metadata.get("adapter.lora.alpha"),
        "targets": sorted(set(stems)),
        "base_sha256": card.metadata.get("toy.lora.base_sha256"),
    }


def adapter_text(adapter: dict[str, Any]) -> str:
    of = f", of the base {adapter['base_sha256'][:12]}…" if adapter["base_sha256"] else ""
    return f"lora, rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {', '.join(adapter['targets'])}{of}"


def _tokenizer_text(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    special = ", ".join(f"{name} {entry['id']} {entry['text']!r}" for name, entry in tokenizer["special"].items())
    pre = f" ({tokenizer['pre']})" if tokenizer["pre"] else ""
    return f"{tokenizer['encoding']}{pre}, {tokenizer['tokens']:,} tokens; {special or 'no special tokens'}"


def _tensor_lines(tensors: list[dict[str, Any]], every: bool) -> list[str]:
    """One line a tensor, or one for all blocks' tensors of a name, shape and type."""
    groups: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        shape = " x ".join(str(n) for n in tensor["shape"])
        name = tensor["name"] if every else re.sub(r"^blk\.\d+\.", "blk.*.", tensor["name"])
        key = (name, shape, str(tensor["type"]))
        groups[key] = groups.get(key, 0) + 1
    wide = max((len(name) for name, _, _ in groups), default=0)
    return [
        f"{name:<{wide}}  {shape:<14} {kind}" + (f"  x {count}" if count > 1 else "")
        for (name, shape, kind), count in groups.items()
    ]
