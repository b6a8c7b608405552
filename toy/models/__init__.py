"""Models on this machine: finding them by what the user typed, their metadata, their tokenizers, text out of them."""

from __future__ import annotations

import difflib
from pathlib import Path

from toy.errors import ToyError

__all__ = ["resolve"]

_HINT = "toy list shows the models on this machine, toy runs the runs"


def resolve(model: str) -> Path:
    """The GGUF that `model` names: a file, a run's directory or id (`runs/latest` too), or a name from `toy list`.

    Raises ToyError (missing_file, bad_file) that names the nearest.
    """
    from toy import runs

    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and not runs.is_run(path):
        return _in_folder(path)
    run = _run(model)
    if run is not None:
        return _weights(run)
    if path.suffix.lower() == ".gguf" and (path.parent != Path() or model.startswith(".")) and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.gguf")], n=1)
        if near:
            raise ToyError("missing_file", f"no model at {model}", f"did you mean {path.parent / near[0]}?")
    return _by_name(model)


def _run(model: str) -> Path | None:
    from toy import runs

    try:
        return runs.find_run(model)
    except ToyError:
        return None


def _weights(run: Path) -> Path:
    from toy import runs

    weights = run / "weights" / "model.gguf"
    if weights.is_file():
        return weights
    if runs.is_running(run):
        raise ToyError(
            "missing_file", f"run {run.name} has no model yet: it is still training", "wait until it is done"
        )
    others = sorted((run / "weights").glob("*.gguf"))
    if others:
        return others[0]
    raise ToyError(
        "missing_file", f"run {run.name} left no model", f"toy train --resume {run.name} goes on from its checkpoint"
    )


def _in_folder(folder: Path) -> Path:
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(path.name for path in ggufs[:4])
        raise ToyError("bad_file", f"{folder} holds {len(ggufs)} models", f"name one of them: {names}")
    raise ToyError("missing_file", f"{folder} is neither a run nor holds a .gguf", _HINT)


def _by_name(model: str) -> Path:
    from toy import runs
    from toy.models.discover import discover

    known: dict[str, list[Path]] = {}
    for found in discover(runs.find_project(), read=False):
        for name in (found.name, *found.also):
            known.setdefault(name, []).append(found.path)
            short = name.rsplit("/", 1)[-1]
            for other in (short, short.removesuffix(".gguf"), name.removesuffix(".gguf"), name.removesuffix(":latest")):
                if other != name:
                    known.setdefault(other, []).append(found.path)
    paths = list(dict.fromkeys(known.get(model, ())))
    if len(paths) == 1:
        return paths[0]
    if paths:
        hint = "give one of the paths: " + ", ".join(str(path) for path in paths[:3])
        raise ToyError("bad_file", f"{len(paths)} models are named {model}", hint)
    ids = [path.name for path in runs.all_runs(runs.runs_dir())]
    near = difflib.get_close_matches(model, [*known, *ids, *(f"runs/{i}" for i in ids)], n=1)
    raise ToyError("missing_file", f"no model or run {model!r}", f"did you mean {near[0]}?" if near else _HINT)
