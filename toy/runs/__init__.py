"""Runs: their ids and directories, and finding them again.

What is in a directory: `bundle`; reading it: `events`, `listing`, `history`; comparing runs: `gates`, `compare`;
judging one: `metrics`; drawing them: `curve`; taking them away: `removing`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import string
import time
from pathlib import Path
from typing import Any

from toy.errors import ToyError, nearest, shown

FIELDS = ("arch", "date", "time", "seq", "recipe", "name")


def find_project(start: Path | None = None) -> Path | None:
    """The nearest folder at or above `start` (the working directory) that holds a toy.yml."""
    folder = Path(os.path.abspath(start or Path.cwd()))
    for candidate in (folder, *folder.parents):
        if (candidate / "toy.yml").is_file():
            return candidate
    return None


def runs_dir(project: Path | None = None) -> Path:
    """`runs/` of the project, or of the working directory where there is none."""
    return (project or find_project() or Path.cwd()) / "runs"


def check_template(template: str, origin: str = "toy.yml") -> None:
    """Raise ToyError (bad_config) for a run_id_template that cannot name a directory."""

    def fail(why: str, hint: str) -> ToyError:
        return ToyError("bad_config", f"run_id_template = {template!r} {why} ({origin})", hint)

    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise fail(f"cannot be read: {error}", "write fields as {arch}-{date}-{seq}") from None
    for name, spec, conversion in fields:
        if name is None:
            continue
        if name not in FIELDS:
            near = nearest(name, FIELDS)
            hint = (f"did you mean {{{near}}}? " if near else "") + "fields: " + ", ".join(f"{{{f}}}" for f in FIELDS)
            raise fail(f"has an unknown field {{{name}}}", hint)
        if spec or conversion:
            raise fail("has a format inside a field", "write the field's name only")
    if not fields or not template.strip():
        raise fail("is empty", "write {arch}-{date}-{seq}, say")
    if "/" in template or "\0" in template or template.startswith(".") or template == "latest":
        raise fail("cannot name a directory", "no slashes, no dot in front, not `latest`")


def safe_word(text: str) -> str:
    """`text` as it can stand in a directory's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"


class Claim:
    """A run directory that this process made, and holds: a lock on it says "running" to every reader for as long as
    this process or the runner lives. `abandon` takes everything back that claiming made."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path, self.made = path, made
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # a file system without locks: the run works, only `toy runs` knows less
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def abandon(self) -> None:
        """Nothing came of the run: remove its files, and the directories that were made for it."""
        self.close()
        for entry in list(self.path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        for folder in self.made:
            with contextlib.suppress(OSError):  # another run is in there
                folder.rmdir()


def _make_parents(path: Path) -> list[Path]:
    """`mkdir -p` that tells what it made, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def claim_id(runs: Path, template: str, values: dict[str, str]) -> Claim:
    """Make the directory of a new run, named by the template. No two runs ever get the same one."""
    now = time.localtime()
    words = {"name": "run", **{key: safe_word(value) for key, value in values.items() if value}}
    words |= {"date": time.strftime("%Y%m%d", now), "time": time.strftime("%H%M%S", now)}
    counted = any(name == "seq" for _, name, _, _ in string.Formatter().parse(template))
    made = _make_parents(runs)
    for seq in range(_next_seq(runs, template, words) if counted else 1, 1_000_000):
        run_id = template.format(**words, seq=f"{seq:03d}")
        if not counted and seq > 1:
            run_id += f"-{seq}"
        try:
            (runs / run_id).mkdir()
        except FileExistsError:
            continue
        return Claim(runs / run_id, [runs / run_id, *made])
    raise ToyError("bad_config", f"{runs} has no free run id for {template!r}", "choose another run_id_template")


def _next_seq(runs: Path, template: str, words: dict[str, str]) -> int:
    """One more than the highest number in use, so that a removed run's id does not come back at once."""
    mark = "\0"
    pattern = re.escape(template.format(**words, seq=mark)).replace(re.escape(mark), r"(\d+)")
    taken = [int(match[1]) for name in os.listdir(runs) if (match := re.fullmatch(pattern, name))]
    return max(taken, default=0) + 1


def claim_out(out: Path) -> Claim:
    """Make the directory that `--out` named, or take an empty one."""
    made = _make_parents(out.parent)
    try:
        out.mkdir()
        made.insert(0, out)
    except FileExistsError:
        check_out(out)
    return Claim(out, made)


def check_out(path: Path) -> None:
    """Refuse an output directory that is a file, holds something, or cannot be written. Makes nothing."""
    if path.is_dir():
        if (path / "config.json").exists() or (path / "events.jsonl").exists():
            raise ToyError("bad_flag", f"{shown(path)} holds another run", "name a new directory with --out")
        try:
            if any(path.iterdir()):
                raise ToyError("bad_flag", f"{shown(path)} is not empty", "name a new or empty directory with --out")
        except PermissionError:
            raise ToyError("bad_flag", f"{shown(path)} cannot be read", "name another directory with --out") from None
    elif path.exists() or path.is_symlink():
        raise ToyError("bad_flag", f"{shown(path)} is not a directory", "name a new directory with --out")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a path whose nearest existing parent is no directory, or not writable by this user."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ToyError(
            "bad_flag", f"{shown(there)} is not a directory, so {shown(path)} cannot be made", "name another with --out"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ToyError(
            "bad_flag", f"{shown(path)} cannot be made: {shown(there)} is not writable", "name another with --out"
        )


def point_latest(run: Path) -> None:
    """`runs/latest` -> this run, relative, replaced in one rename. A real file of that name is left alone."""
    link = run.parent / "latest"
    if link.exists() and not link.is_symlink():
        return
    temporary = run.parent / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name)
        os.replace(temporary, link)


def is_running(run: Path) -> bool:
    """Whether a process holds this run's directory."""
    try:
        fd = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "events.jsonl").is_file()


def find_run(word: str, project: Path | None = None) -> Path:
    """A run's directory from its path or its id (`latest` too). Raises ToyError (missing_file) with the nearest id."""
    for candidate in (
        Path(word).expanduser(),
        runs_dir(project) / word,
        (project or find_project() or Path.cwd()) / word,
    ):
        if word and candidate.is_dir() and is_run(candidate):
            return candidate.resolve()
    ids = [path.name for path in all_runs(runs_dir(project))]
    near = nearest(Path(word).name, ids)
    hint = f"did you mean {near}?" if near else "`toy runs` lists the runs of this project"
    raise ToyError("missing_file", f"no such run: {word}", hint)


def choose_run(word: str, project: Path | None = None) -> Path:
    """As `find_run`, and by the beginning of an id that only one run has. Raises ToyError (missing_file, bad_flag)."""
    try:
        return find_run(word, project)
    except ToyError:
        ids = [path.name for path in all_runs(runs_dir(project)) if is_run(path)]
        start = word.rstrip("/").removeprefix("runs/")
        found = [name for name in ids if start and name.startswith(start)]
        if len(found) == 1:
            return (runs_dir(project) / found[0]).resolve()
        if found:
            names = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
            raise ToyError("bad_flag", f"{word} begins the names of {len(found)} runs", f"one of {names}") from None
        raise


def all_runs(runs: Path) -> list[Path]:
    """The run directories under `runs`, oldest first; links left out."""
    try:
        found = [Path(entry.path) for entry in os.scandir(runs) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted((path for path in found if not path.name.startswith(".")), key=lambda path: (_made(path), path.name))


def _made(path: Path) -> float:
    for name in ("meta.json", "config.json", "."):
        with contextlib.suppress(OSError):
            return (path / name).stat().st_mtime
    return 0.0


def find_checkpoint(word: str, project: Path | None = None) -> Path:
    """A checkpoint's directory from its path, or from a run (its `latest`)."""
    path = Path(word).expanduser()
    if (path / "DONE").exists():
        return path.resolve()
    run = find_run(word, project)
    latest = run / "checkpoints" / "latest"
    if not (latest / "DONE").exists():
        raise ToyError(
            "missing_file",
            f"{run.name} has no checkpoint to resume from",
            "set checkpoint.every, so that runs save some",
        )
    return latest.resolve()


def read_json(path: Path) -> dict[str, Any]:
    """A bundle's JSON file, or {} where it is missing or torn."""
    import json

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
