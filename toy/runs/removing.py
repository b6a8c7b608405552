"""Taking runs away: what would go, and its going. Nothing outside a runs directory is ever touched."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from toy.errors import ToyError, is_alive, os_errors, shown
from toy.runs import all_runs, history, is_run, is_running, point_latest

#: A run on its way out: renamed first, so that a removal that is killed leaves no half of a run.
GOING = ".removing-"


@dataclass(frozen=True)
class Removal:
    """What goes: a run's directory, or the checkpoints in it."""

    run: Path
    path: Path
    size: int
    files: int


def plan(run: Path, runs: Path, checkpoints_only: bool) -> Removal:
    """What removing `run` would take away. Raises ToyError (bad_flag) for a run that is running or elsewhere."""
    if run.is_symlink() or run.resolve().parent != runs.resolve():
        raise ToyError(
            "bad_flag",
            f"{shown(run)} is not in {shown(runs)}, and nothing outside is removed",
            "go to that run's project, or remove its directory yourself",
        )
    if is_running(run):
        raise ToyError("bad_flag", f"run {run.name} is running", "stop it first, or wait until it is done")
    path = run / "checkpoints" if checkpoints_only else run
    if path.is_symlink():
        raise ToyError("bad_flag", f"{shown(path)} is a link, and only what is in the run is removed", "remove it")
    sizes = [size for _, size in history.files(path)] if path.is_dir() else []
    return Removal(run, path, sum(sizes), len(sizes))


def remove(removal: Removal) -> None:
    """Do it. A run that somebody started to use meanwhile stays."""
    runs = removal.run.parent
    with os_errors(f"remove {shown(removal.path)}"):
        fd = os.open(removal.run, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ToyError("bad_flag", f"run {removal.run.name} is running", "stop it first") from None
            except OSError:
                pass  # a file system without locks
            if removal.path.is_dir():
                going = runs / f"{GOING}{removal.run.name}-{removal.path.name}-{os.getpid()}"
                removal.path.rename(going)
                shutil.rmtree(going)
        finally:
            os.close(fd)
        _sweep(runs)
        _repoint(runs)


def _sweep(runs: Path) -> None:
    """What a killed removal left."""
    for path in runs.glob(f"{GOING}*"):
        pid = path.name.rsplit("-", 1)[-1]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _repoint(runs: Path) -> None:
    """`latest` goes to the newest run that is left, or away with the last."""
    link = runs / "latest"
    if not link.is_symlink() or link.exists():
        return
    left = [path for path in all_runs(runs) if is_run(path)]
    if left:
        point_latest(left[-1])
    else:
        with contextlib.suppress(OSError):
            link.unlink()
