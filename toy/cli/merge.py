"""`toy merge`: a model and its adapter as one model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from toy.cli.common import bytes_text, duration_text, emit, json_option, progress_bar, say
from toy.models.convert import TYPE_NAMES


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER|RUN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--type", "kind", type=click.Choice(TYPE_NAMES, case_sensitive=False), help="Of the matrices; else the base's."
)
@click.option("--other-base", is_flag=True, help="BASE is the same model in another file (quantised, say).")
@click.option("--force", is_flag=True, help="Replace OUT when it is there.")
@json_option
def command(base: str, adapter: str, out: Path, kind: str | None, other_base: bool, force: bool, as_json: bool) -> None:
    """Write OUT, a GGUF: BASE with the low-rank updates of ADAPTER added (alpha / rank * B A, in f32).

    ADAPTER is a GGUF in llama.cpp's adapter format, or a lora run. Without --type each tensor keeps the type it has in
    BASE; what a quantised tensor cannot hold of a small update is rounded away, so prefer a finer --type there.
    """
    from toy.models import cards, convert, resolve

    start = time.monotonic()
    base_path, adapter_path = resolve(base), convert.find_adapter(adapter)
    convert.check_file_target(out, force, base_path, adapter_path)
    with progress_bar("merging") as progress:
        convert.merge(base_path, adapter_path, out, kind or "", other_base=other_base, progress=progress)
    card, seconds = cards.read(out), time.monotonic() - start
    tensors = sum(tensor["name"].endswith(".lora_a") for tensor in cards.read(adapter_path).tensors)
    if as_json:
        emit(
            "toy/merge-v1",
            {
                "base": base_path.absolute(),
                "adapter": adapter_path.absolute(),
                "out": out.absolute(),
                "type": kind,
                "types": card.types,
                "tensors_changed": tensors,
                "size": card.size,
                "seconds": seconds,
            },
        )
        return
    click.echo(out)
    say(f"{tensors} tensors changed, {card.quantisation}, {bytes_text(card.size)}, {duration_text(seconds)}")
