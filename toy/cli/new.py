"""`toy new PATH`: a project, made whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from toy import config
from toy.cli.common import emit, json_option, quote
from toy.cli.config import yaml_text
from toy.config import KNOBS, SECTIONS
from toy.errors import ToyError, os_errors, shown

CORPUS = "python-reference.txt"

IGNORED = """\
/runs/
/data/packed/
"""

README = """\
# {name}

A project of `toy`: it trains a small llama on `data/{corpus}` and leaves a GGUF that llama.cpp runs.

    toy train                  trains what toy.yml says ({doc})
    toy infer runs/latest      generates text with the last run
    toy runs                   lists the runs
    toy train --dry-run        says what a run would need

`toy.yml` holds the configuration; every line in it says what it means, and `toy config show` says where each value
comes from. `data/{corpus}` is the language reference that Python carries (`pydoc_data.topics`, PSF licence).
For a text of your own: `toy train --corpus book.txt`, or set `data.corpus` in `toy.yml`.
"""


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Into a directory that is not empty; files of the same names are replaced.")
@click.option("--preset", default="default", show_default=True, help="One of " + ", ".join(config.preset_names()) + ".")
@json_option
def command(path: Path, force: bool, preset: str, as_json: bool) -> None:
    """Make a project: toy.yml, a corpus with its packed tokens, runs/."""
    from toy.runs import check_writable

    path = Path(os.path.abspath(path.expanduser()))
    loaded = config.load(preset=preset)
    check_target(path, force)
    check_writable(path)
    with os_errors("make the project"):
        make(path, preset, loaded)
    files = sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and ".git" not in file.parts
    )
    if as_json:
        emit("toy/new-v1", {"path": str(path), "preset": preset, "files": files})
        return
    click.echo(f"made {shown(path)}: toy.yml (preset {preset}), data/{CORPUS} and its packed tokens, runs/, README.md")
    place = "" if path == Path.cwd() else f"cd {quote(shown(path))} && "
    click.echo(f"next: {place}toy train")


def check_target(path: Path, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ToyError("bad_flag", f"{shown(path)} is a file", "name a new directory")
    try:
        full = path.is_dir() and any(path.iterdir())
    except PermissionError:
        raise ToyError("bad_flag", f"{shown(path)} cannot be read", "name another directory") from None
    if full and not force:
        raise ToyError(
            "bad_flag", f"{shown(path)} is not empty", "name a new directory, or --force to put the project into it"
        )


def make(path: Path, preset: str, loaded: config.Loaded) -> None:
    """Everything is made in a temporary folder on the same disk, then moved: an interrupt leaves nothing behind."""
    there = path
    while not there.exists():
        there = there.parent
    made_here = path if path.exists() else None
    with tempfile.TemporaryDirectory(prefix=".toy-new-", dir=there) as name:
        work = Path(name) / "project"
        work.mkdir()
        work.chmod(0o777 & ~umask())
        fill(work, path.name, preset, loaded)
        if made_here is not None:
            merge(work, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(work, path)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fill(work: Path, name: str, preset: str, loaded: config.Loaded) -> None:
    from toy import corpora
    from toy.cli.train import Packing
    from toy.corpora.sources import open_source

    for folder in ("data", "runs"):
        (work / folder).mkdir()
    corpus = work / "data" / CORPUS
    with corpus.open("w", encoding="utf-8") as file:
        for text, _, last in open_source(None).pieces(lambda n: None):
            file.write(text.rstrip("\n") + "\n\n" if last else text)
    (work / "toy.yml").write_text(project_yaml(preset, loaded), encoding="utf-8")
    doc = config.preset_doc(preset).rstrip(".")
    (work / "README.md").write_text(README.format(name=name, corpus=CORPUS, doc=doc), encoding="utf-8")
    (work / ".gitignore").write_text(IGNORED, encoding="utf-8")
    cfg = loaded.config
    with Packing() as packing:
        corpora.prepare(
            corpus, cfg.data.tokenizer, cfg.model.vocab_size, corpora.default_cache_dir(work), packing.progress
        )


def merge(source: Path, target: Path) -> None:
    """Move a tree into an existing one, file by file, replacing files of the same names."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            merge(entry, place)
            continue
        if entry.is_dir() and (place.exists() or place.is_symlink()):
            raise ToyError("bad_flag", f"{shown(place)} is in the way: a directory goes there", "move it away")
        if place.is_dir():
            shutil.rmtree(place) if not any(place.iterdir()) else None
        os.replace(entry, place)


def project_yaml(preset: str, loaded: config.Loaded) -> str:
    """toy.yml, from the knobs' own documentation. Lines that are commented out show the value in effect."""
    lines = [
        "# The configuration of this project. Commented lines show the value in effect: the preset's, or the default.",
        "# `toy config show` says where every value comes from; `toy train --set train.steps=100` overrides one.",
        "",
        f"# {config.SETTINGS['preset']} They are: {', '.join(config.preset_names())}.",
        f"preset: {preset}",
        "",
        f"# {config.SETTINGS['run_id_template']}",
        f'run_id_template: "{config.DEFAULT_TEMPLATE}"',
    ]
    for section, model in SECTIONS.items():
        lines += ["", f"{section}:  # {model.__doc__}"]
        for key, knob in KNOBS.items():
            if knob.section != section:
                continue
            value = loaded.value(key)
            text = "auto" if knob.auto is not None and value == knob.auto else yaml_text(value)
            active = key == "data.corpus"
            if active:
                text = f"data/{CORPUS}"
            remark = knob.doc if knob.auto is None else f"{knob.doc} auto: {knob.auto_doc}."
            if knob.choices and len(knob.choices) > 1:
                remark += f" ({', '.join(knob.choices)})"
            unit = f" [{knob.unit}]" if knob.unit else ""
            lines.append(f"  {'' if active else '# '}{knob.name}: {text}".ljust(36) + f"  # {remark}{unit}")
    return "\n".join(lines) + "\n"
