"""`toy export`: a model for other programs."""

from __future__ import annotations

import time
from pathlib import Path

import click

from toy.cli.common import bytes_text, duration_text, emit, json_option, progress_bar, quote, say
from toy.errors import ToyError, shown
from toy.models.convert import TYPE_NAMES, Source


@click.command()
@click.argument("model", metavar="MODEL|RUN")
@click.option("--to", required=True, type=click.Choice(["hf", "gguf", "ollama"]), help="What for.")
@click.option(
    "--type", "kind", type=click.Choice(TYPE_NAMES, case_sensitive=False), help="Of the matrices; else the model's own."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to; else beside the run's weights, or here.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@json_option
def command(model: str, to: str, kind: str | None, out: Path | None, force: bool, as_json: bool) -> None:
    """Write MODEL (a GGUF, a run, a name that `toy list` shows) as other programs want it.

    \b
    --to hf      a folder for transformers: config.json, model.safetensors, tokenizer.json
    --to gguf    a GGUF of another --type: f16, q8_0, q4_k_m, …
    --to ollama  a folder with the GGUF and a Modelfile

    The adapter of a lora run is merged into its base; for Ollama, without --type, both are kept apart.
    """
    from toy.models import convert, hf_export, ollama

    start = time.monotonic()
    source = convert.find_source(model)
    target = out if out is not None else _place(source, to, kind)
    if to == "gguf" and kind is None and source.adapter is None:
        raise ToyError("bad_flag", "--to gguf needs --type: the model is a GGUF already", "say --type q8_0, or another")
    with progress_bar("writing") as progress:
        if to == "hf":
            hf_export.export(source, target, kind or "", force, progress)
        elif to == "ollama":
            ollama.export(source, target, kind or "", force, progress)
        else:
            sources = [path for path in (source.path, source.adapter) if path is not None]
            convert.check_file_target(target, force, *sources)
            if source.adapter is not None:
                convert.merge(source.path, source.adapter, target, kind or "", other_base=True, progress=progress)
            else:
                convert.convert(source.path, target, kind or "", progress)
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    size, seconds = sum(path.stat().st_size for path in files), time.monotonic() - start
    if as_json:
        emit(
            "toy/export-v1",
            {
                "model": source.path.absolute(),
                "adapter": source.adapter.absolute() if source.adapter else None,
                "to": to,
                "type": kind,
                "out": target.absolute(),
                "files": [path.absolute() for path in files],
                "size": size,
                "seconds": seconds,
            },
        )
        return
    click.echo(target)
    say(f"{bytes_text(size)} in {duration_text(seconds)}{_next(to, target)}")


def _place(source: Source, to: str, kind: str | None) -> Path:
    """Beside the weights of a run; in the working directory, named after the file, for others."""
    ending = f"-{kind}" if kind else ""
    if source.run is not None:
        stem = "merged" if source.adapter is not None else "model"
        name = f"{stem}{ending}.gguf" if to == "gguf" else to
        return Path(shown(source.run / "weights" / name))
    stem = source.path.name.removesuffix(".gguf")
    return Path(f"{stem}{ending}.gguf" if to == "gguf" else f"{stem}-{to}")


def _next(to: str, target: Path) -> str:
    if to == "ollama":
        return f"; ollama create NAME -f {quote(target / 'Modelfile')}"
    return f"; toy infer {quote(target)}" if to == "gguf" else ""
