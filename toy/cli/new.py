"""`toy new PATH`: a project, made whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import click

from toy import config, recipes
from toy.cli.common import emit, json_option, progress_bar, quote
from toy.cli.config import yaml_text
from toy.config import KNOBS, SECTIONS, Given
from toy.errors import ToyError, os_errors, shown

CORPUS = "python-reference.txt"

IGNORED = """\
/runs/
/data/packed/
"""

README = """\
# {name}

A project of `toy`: {about}

    {train:<26} trains what toy.yml says{doc}
    {run:<26} {runs}
    toy runs                   lists the runs
    toy train --dry-run        says what a run would need

`toy.yml` holds the configuration; every line in it says what it means, and `toy config show` says where each value
comes from.{data}
"""

REFERENCE = f""" `data/{CORPUS}` is the language reference that Python carries (`pydoc_data.topics`, PSF licence).
For a text of your own: `toy train --corpus book.txt`, or set `data.corpus` in `toy.yml`."""


class Seed(NamedTuple):
    """What a new project of a recipe begins with."""

    about: str
    train: str  # the command that trains first
    run: str  # and the one that runs what came out
    runs: str
    text: bool  # whether Python's manual is put into data/


SEEDS = {
    "from-scratch": Seed(
        "it trains a small model on `data/` and leaves a GGUF that llama.cpp runs.",
        "toy train",
        "toy infer runs/latest",
        "generates text with the last run",
        True,
    ),
    "warm-start": Seed(
        "it goes on training the weights of a GGUF, on texts of yours.",
        "toy train --model GGUF",
        "toy infer runs/latest",
        "generates text with the last run",
        True,
    ),
    "lora": Seed(
        "it trains an adapter for a GGUF, which itself stays as it is.",
        "toy train --model GGUF",
        "toy infer runs/latest",
        "generates text with the base and the adapter",
        True,
    ),
    "vit-tiny": Seed(
        "it trains a vision transformer to tell images apart.",
        "toy train --images FOLDER",
        "toy infer runs/latest --image FILE",
        "names the classes of an image",
        False,
    ),
}


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Into a directory that is not empty; files of the same names are replaced.")
@click.option("--recipe", help=KNOBS["run.recipe"].doc + " " + ", ".join(SEEDS) + ".")
@click.option("--arch", help=KNOBS["run.arch"].doc)
@click.option("--preset", help="One of " + ", ".join(config.preset_names()) + "; else default, from scratch.")
@json_option
def command(path: Path, force: bool, recipe: str | None, arch: str | None, preset: str | None, as_json: bool) -> None:
    """Make a project: toy.yml with its recipe's knobs, a corpus with its packed tokens, runs/."""
    from toy.runs import check_writable

    path = Path(os.path.abspath(path.expanduser()))
    preset = preset or ("default" if recipe in (None, "from-scratch") else "none")
    words = {"run.recipe": recipe, "run.arch": arch}
    flags = {key: Given(word, f"--{key[4:]}", quoted=True) for key, word in words.items() if word is not None}
    loaded = load(preset, flags)
    check_target(path, force)
    check_writable(path)
    with os_errors("make the project"):
        make(path, preset, loaded)
    files = sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and ".git" not in file.parts
    )
    run, seed = loaded.config.run, SEEDS[loaded.config.run.recipe]
    if as_json:
        emit(
            "toy/new-v1",
            {"path": str(path), "recipe": run.recipe, "arch": run.arch, "preset": preset, "files": files},
        )
        return
    what = f"preset {preset}" if preset != "none" else f"recipe {run.recipe}"
    corpus = f"data/{CORPUS} and its packed tokens, " if seed.text else ""
    click.echo(f"made {shown(path)}: toy.yml ({what}), {corpus}runs/, README.md")
    place = "" if path == Path.cwd() else f"cd {quote(shown(path))} && "
    click.echo(f"next: {place}{seed.train}")


def load(preset: str, flags: dict[str, Given]) -> config.Loaded:
    """The configuration of the new project. Raises ToyError for words that are unknown or make no sense together."""
    layers = config.gather(preset=preset, flags=flags)
    arch = layers.given.get("run.arch")
    recipes.check_words(
        layers.recipe,
        arch.value if arch else "llama",
        "cpu",
        {key: given.origin for key, given in flags.items()},
        flags,
    )
    recipes.select(layers.recipe, arch.value if arch else "llama", "cpu")
    return config.build(layers)


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
    from toy.corpora.sources import open_source

    for folder in ("data", "runs"):
        (work / folder).mkdir()
    seed = SEEDS[loaded.config.run.recipe]
    doc = "" if preset == "none" else f" ({config.preset_doc(preset).rstrip('.')})"
    words = seed._asdict() | {"name": name, "doc": doc, "data": REFERENCE if seed.text else ""}
    (work / "toy.yml").write_text(project_yaml(preset, loaded), encoding="utf-8")
    (work / "README.md").write_text(README.format(**words), encoding="utf-8")
    (work / ".gitignore").write_text(IGNORED, encoding="utf-8")
    if not seed.text:
        return
    corpus = work / "data" / CORPUS
    with corpus.open("w", encoding="utf-8") as file:
        for text, _, last in open_source(None).pieces(lambda n: None):
            file.write(text.rstrip("\n") + "\n\n" if last else text)
    if loaded.config.run.recipe != "from-scratch":
        return  # packed with the tokenizer of the GGUF to come
    cfg = loaded.config
    with progress_bar("packing the corpus") as progress:
        corpora.prepare(corpus, cfg.data.tokenizer, cfg.model.vocab_size, corpora.default_cache_dir(work), progress)


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
    """toy.yml, from the knobs' own documentation: those of its recipe and architecture. Lines that are commented out
    show the value in effect."""
    run = loaded.config.run
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
        knobs = [knob for knob in KNOBS.values() if knob.section == section and knob.belongs(run.recipe, run.arch)]
        if run.recipe == "lora" and section == "model":
            knobs = [KNOBS["model.context"]]  # the rest is the base's
        if not knobs:
            continue
        lines += ["", f"{section}:  # {model.__doc__}"]
        for knob in knobs:
            value = loaded.value(knob.key)
            text = "auto" if knob.auto is not None and value == knob.auto else yaml_text(value)
            active = loaded.is_flag(knob.key)
            if knob.key == "data.corpus":
                active, text = True, f"data/{CORPUS}"
            remark = knob.doc if knob.auto is None else f"{knob.doc} auto: {knob.auto_doc}."
            if knob.choices and len(knob.choices) > 1:
                remark += f" ({', '.join(knob.choices)})"
            unit = f" [{knob.unit}]" if knob.unit else ""
            lines.append(f"  {'' if active else '# '}{knob.name}: {text}".ljust(36) + f"  # {remark}{unit}")
    return "\n".join(lines) + "\n"
