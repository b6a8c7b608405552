"""Models into other types, with adapters added, in this process: `toy._native` does the arithmetic."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.errors import ToyError, is_alive, os_errors, shown
from toy.models import adapters, cards, resolve

#: What a whole file is called after: the type of its matrices. The head is finer where that pays, rows that are no
#: whole number of blocks get another type, and vectors stay in f32, all as llama.cpp does it.
TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)

#: What --type takes: also the short names of the mixes, as llama.cpp has them.
TYPE_NAMES = (*TYPES, "q4_k", "q5_k")

#: What tells a folder that an export made.
MARKS = ("config.json", "Modelfile")

#: progress(bytes done, bytes to do)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """What a user named: a model, or an adapter together with the model below it. `run` is where it was trained."""

    card: cards.Card
    adapter: Path | None
    run: Path | None

    @property
    def path(self) -> Path:
        return self.card.path


def call(function: Callable[..., None], *arguments: Any, progress: Progress | None) -> None:
    """Call one of `toy._native`'s conversions. Raises ToyError for what it raises."""
    try:
        function(*arguments, progress)
    except (ValueError, RuntimeError) as error:
        kind = getattr(error, "kind", None)
        if kind is None:
            raise
        message, _, hint = str(error).partition("\n")
        raise ToyError(kind, message, hint) from error


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    type: str = "",
    *,
    other_base: bool = False,
    progress: Progress | None = None,
) -> None:
    """`base` + alpha/rank * B A, computed in f32, as a GGUF. `type` "": each tensor keeps the base's.

    Raises ToyError (bad_file) naming what does not fit. An adapter that says which file it was trained over is held to
    that, unless `other_base`.
    """
    from toy import _native

    if not other_base:
        check_base(base, adapter)
    with parent_made(out):
        call(_native.convert, os.fspath(base), os.fspath(out), type, os.fspath(adapter), progress=progress)


def convert(source: Path, out: Path, type: str, progress: Progress | None = None) -> None:
    """A copy of a GGUF with its matrices in `type`."""
    from toy import _native

    with parent_made(out):
        call(_native.convert, os.fspath(source), os.fspath(out), type, "", progress=progress)


def check_base(base: Path, adapter: Path) -> None:
    """Raises ToyError (bad_file) when the adapter was trained over other bytes."""
    stated = cards.read(adapter).metadata.get("toy.lora.base_sha256")
    if isinstance(stated, str) and stated and stated != adapters.file_sha256(base):
        message = f"{shown(adapter)} was trained over another file than {shown(base)} (sha256 {stated[:12]}…)"
        raise ToyError("bad_file", message, "name the base of its run, or --other-base if it is the same model")


def find_adapter(word: str) -> Path:
    """The adapter that `word` names: a GGUF, or a lora run."""
    path = resolve(word)
    if not adapters.is_adapter(cards.read(path)):
        hint = "name a lora run, or the GGUF that it leaves: weights/adapter.gguf"
        raise ToyError("bad_file", f"{shown(path)} is no adapter", hint)
    return path


def find_source(word: str) -> Source:
    """The model that `word` names: a GGUF, a run, a name from `toy list`. A lora run is its base and its adapter.

    Raises ToyError (missing_file, bad_file, bad_flag) where there is none, or an adapter without its base.
    """
    from toy import runs

    try:
        card, adapter = adapters.choose(word)
    except ToyError as error:
        if "--adapter" in error.hint:  # a flag of other commands
            error.hint = "toy merge BASE ADAPTER OUT makes a model of both, which can be exported"
        raise
    folder = (adapter or card).path.absolute().parent
    run = folder.parent if folder.name == "weights" and runs.is_run(folder.parent) else None
    return Source(card, adapter.path if adapter is not None else None, run)


def check_target(out: Path, force: bool, *sources: Path) -> None:
    """Raises ToyError (bad_flag) when `out` is there already, or is what is read."""
    for source in sources:
        if out.exists() and out.resolve() == source.resolve():
            raise ToyError("bad_flag", f"{shown(out)} is what is read", "choose another name for what is written")
    if os.path.lexists(out) and not force:
        raise ToyError("bad_flag", f"{shown(out)} is there already", "choose another name, or --force to replace it")
    for folder in out.absolute().parents:
        if folder.exists():
            if not folder.is_dir():
                raise ToyError("bad_flag", f"{shown(folder)} is a file, not a folder", "choose another name")
            return


def check_file_target(out: Path, force: bool, *sources: Path) -> None:
    """The same for a file."""
    if out.is_dir():
        raise ToyError("bad_flag", f"{shown(out)} is a folder", f"name a file in it: {shown(out / 'model.gguf')}")
    check_target(out, force, *sources)


@contextlib.contextmanager
def parent_made(out: Path) -> Iterator[None]:
    """The folder of a file to come; what was made of it is taken away again when the block fails."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    with os_errors("make the folder"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raises ToyError (disk_full) when `needed` bytes will not fit on the disk of `folder`, which may be to be made."""
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    left = shutil.disk_usage(folder).free
    if left < needed:
        message = f"{needed / 2**20:,.1f} MiB are needed, and the disk of {shown(folder)} has {left / 2**20:,.1f} left"
        raise ToyError("disk_full", message, "free some space, or choose another place with --out")


def check_replaceable(out: Path, marks: tuple[str, ...]) -> None:
    """Raises ToyError (bad_flag) for a folder with anything in it that we did not write: one of ours holds one of the
    files `marks`, and no folders."""
    if not out.is_dir():
        return
    entries = list(os.scandir(out))
    if entries and (any(entry.is_dir() for entry in entries) or not any(entry.name in marks for entry in entries)):
        message = f"{shown(out)} holds other things than {' or '.join(marks)} and what goes with it"
        raise ToyError("bad_flag", message, "--force replaces whole folders, of this kind only: choose another name")


def put_in_place(made: Path, out: Path) -> None:
    """Rename the folder `made` to `out`, beside it. What was at `out` is removed after that, and is there again where
    the renaming fails or is interrupted. Raises OSError."""
    if not os.path.lexists(out):
        os.replace(made, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        os.replace(out, aside / out.name)
        os.replace(made, out)
    finally:
        if not os.path.lexists(out):
            os.replace(aside / out.name, out)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends, and is removed when the block fails: by the next one
    where it was killed."""
    check_target(out, force)
    name, parent = f".{out.name}-toy-", out.absolute().parent
    with os_errors("make the folder"):
        check_replaceable(out, MARKS)
        parent.mkdir(parents=True, exist_ok=True)
        for path in parent.glob(f"{glob.escape(name)}*-*"):
            pid = path.name.removeprefix(name).split("-")[0]
            if pid.isdigit() and not is_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)
        made = parent / f"{name}{os.getpid()}-{secrets.token_hex(4)}"
        made.mkdir()
    try:
        yield made
        with os_errors("write the folder"):
            put_in_place(made, out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
