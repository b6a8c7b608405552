"""`toy list`: the GGUF models on this machine."""

from __future__ import annotations

from typing import Any

import click

from toy.cli.common import bytes_text, count_text, emit, json_option, say


@click.command()
@json_option
def command(as_json: bool) -> None:
    """The GGUF models on this machine, each file once.

    Looked at: the project's data/ and runs/, TOY_MODEL_DIR, the Hugging Face cache, Ollama and LM Studio. A name shown
    here is a MODEL for `toy infer` and `toy describe`.
    """
    from toy import runs
    from toy.models.discover import discover

    models = [_row(found) for found in discover(runs.find_project())]
    if as_json:
        emit("toy/list-v1", {"models": models})
        return
    good = [model for model in models if model["error"] is None]
    if good:
        _table(good)
    for model in models:
        if model["error"] is not None:
            say(f"broken: {model['name']} ({model['source']}): {model['error']}")
    if not models:
        say("no models found; toy train makes one, TOY_MODEL_DIR names a folder of them")


def _row(found: Any) -> dict[str, Any]:
    from toy import recipes

    card = found.card
    row: dict[str, Any] = {
        "name": found.name,
        "source": found.source,
        "path": str(found.path.absolute()),
        "real_path": str(found.path.resolve()),
        "also": found.also,
        "error": found.error,
    }
    if card is not None:
        kind = str(card.metadata.get("general.type", "model"))
        row |= card.summary() | {"kind": kind, "recipes": recipes.accepts(card.architecture, card.types, kind)}
    return row


def _table(models: list[dict[str, Any]]) -> None:
    lines = [("name", "from", "arch", "parameters", "type", "size", "recipes")]
    for model in models:
        lines.append(
            (
                model["name"],
                model["source"],
                model["architecture"] + (" adapter" if model["kind"] == "adapter" else ""),
                count_text(model["parameters"]),
                model["quantisation"],
                bytes_text(model["size"]),
                " ".join(model["recipes"]) or "-",
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    for line in lines:
        cells = [c.rjust(w) if n in (3, 5) else c.ljust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))]
        click.echo("  ".join(cells).rstrip())
