"""What a run's own files say of its past: the knobs that somebody set, losses, checkpoints, weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toy.runs import events, find_project, gates, read_json

#: Where a run's weights can be, best first; `run_end` names the one it wrote.
WEIGHTS = ("model.gguf", "adapter.gguf")


def knobs(run: Path) -> dict[str, Any]:
    """`section.name` -> value, as config.json has them."""
    found: dict[str, Any] = {}
    for section, values in read_json(run / "config.json").items():
        if isinstance(values, dict):
            found |= {f"{section}.{name}": value for name, value in values.items()}
    return found


def changed(run: Path) -> dict[str, dict[str, Any]]:
    """The knobs that somebody set: those whose value is neither the default nor what auto comes to."""
    from toy.config import KNOBS

    found = {}
    values = knobs(run)
    for key, value in values.items():
        known = KNOBS.get(key)
        if known is None:
            found[key] = {"value": value, "default": None}
        elif value != known.default and not (known.auto is not None and _is_auto(run, values, key)):
            found[key] = {"value": value, "default": known.default}
    return found


def _is_auto(run: Path, values: dict[str, Any], key: str) -> bool:
    """Whether resolving the other knobs gives this one the value that it has."""
    from toy.config import KNOBS, Config, resolve

    train = datasets(run).get("train", {})
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name in KNOBS:
            section, word = name.split(".")
            sections.setdefault(section, {})[word] = KNOBS[key].default if name == key else value
    try:
        start = next((event for event in events.read(run) if event["kind"] == "run_start"), {})
        size = train.get("vocab_size") if key == "model.vocab_size" else None
        out = resolve(Config.model_validate(sections), vocab_size=size, val_tokens=start.get("val_tokens"))
    except Exception:  # a bundle of another toy's: what cannot be resolved is shown as it stands
        return False
    section, word = key.split(".")
    return bool(getattr(getattr(out, section), word) == values[key])


def datasets(run: Path) -> dict[str, dict[str, Any]]:
    """Name, hash and size of each data set that the run read."""
    found = read_json(run / "meta.json").get("datasets")
    if not isinstance(found, dict):
        return {}
    keys = ("name", "gguf", "sha256", "n_tokens", "n_images", "examples", "vocab_size", "architecture", "quantisation")
    return {
        name: {key: about[key] for key in keys if about.get(key) is not None}
        for name, about in found.items()
        if isinstance(about, dict)
    }


def circumstances(run: Path) -> dict[str, Any]:
    """What else can make two runs of one configuration differ: toy, ggml, compiler, machine."""
    meta = read_json(run / "meta.json")

    def of(key: str) -> dict[str, Any]:
        value = meta.get(key)
        return value if isinstance(value, dict) else {}

    return {
        "toy": meta.get("toy"),
        "ggml": of("ggml").get("version") or of("ggml").get("ggml"),
        "patches": of("ggml").get("patches"),
        "compiler": of("build").get("compiler_version"),
        "flags": of("build").get("flags"),
        "cpu": of("cpu").get("name"),
        "commit": of("git").get("commit"),
    }


def evaluations(run: Path) -> list[dict[str, Any]]:
    keys = ("step", "val_loss", "accuracy", "best")
    return [
        {key: event[key] for key in keys if event.get(key) is not None}
        for event in events.read(run)
        if event["kind"] == "eval"
    ]


def profile(run: Path) -> dict[str, Any] | None:
    """What `toy train --profile` found; None where it was not asked for."""
    found = [event for event in events.read(run) if event["kind"] == "profile"]
    return {key: value for key, value in found[-1].items() if key not in ("schema", "kind", "time")} if found else None


def resumed_from(run: Path) -> Path | None:
    """The checkpoint that the run went on from; None for a run that began at the beginning."""
    stated = knobs(run).get("checkpoint.resume")
    if not isinstance(stated, str) or not stated:
        return None
    path = Path(stated).expanduser()
    return path if path.is_absolute() else (find_project(run) or Path.cwd()) / path


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, `latest` and `best` followed."""
    name = os.path.realpath(checkpoint).rsplit("/", 1)[-1].removeprefix("step_")
    return int(name) if name.isdigit() else None


def own_lines(run: Path) -> list[str]:
    """The step lines that this run printed; none where it printed none."""
    path = run / "losses.txt"
    if not path.is_file() or path.stat().st_size == 0:
        return []
    text = path.read_bytes()
    if not text.endswith(b"\n"):  # cut by a kill: only whole lines count
        whole = text[: text.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines()
        return [line for line in whole if gates.is_line(line)]
    return gates.read_lines(path, "run's losses.txt")


def lines(run: Path) -> list[str]:
    """The step lines from step 1 on: those of the run that this one continues, up to its checkpoint, then its own."""
    chain = own_lines(run)
    seen = {run.resolve()}
    checkpoint = resumed_from(run)
    while checkpoint is not None:
        parent, step = checkpoint.parent.parent.resolve(), step_of(checkpoint)
        if parent in seen or step is None:
            break
        seen.add(parent)
        first = gates.step_of(chain[0]) if chain else step + 1
        chain = [line for line in own_lines(parent) if gates.step_of(line) < first] + chain
        checkpoint = resumed_from(parent)
    return chain


def checkpoints(run: Path) -> list[dict[str, Any]]:
    """The whole checkpoints, oldest first, with their bytes and what points at them."""
    folder = run / "checkpoints"
    links = {name: step_of(folder / name) for name in ("latest", "best") if (folder / name).is_symlink()}
    found = []
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    for entry in entries:
        step = step_of(Path(entry.path))
        if step is not None and (Path(entry.path) / "DONE").is_file():
            marks = [name for name, target in links.items() if target == step]
            found.append({"step": step, "path": entry.path, "size": size_of(Path(entry.path)), "marks": marks})
    return sorted(found, key=lambda checkpoint: int(checkpoint["step"]))


def weights(run: Path) -> Path | None:
    """The GGUF that the run left: what run_end names, else the usual names."""
    for event in events.read(run):
        if event["kind"] == "run_end" and isinstance(event.get("gguf"), str):
            moved = run / "weights" / Path(event["gguf"]).name  # the bundle may have been moved since
            if moved.is_file():
                return moved
    return next((run / "weights" / name for name in WEIGHTS if (run / "weights" / name).is_file()), None)


def files(path: Path) -> Iterator[tuple[Path, int]]:
    """Every file below, with its bytes; links are not followed and weigh nothing."""
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            yield file, 0 if file.is_symlink() else file.lstat().st_size
        for name in folders:
            if (Path(folder) / name).is_symlink():
                yield Path(folder) / name, 0


def size_of(path: Path) -> int:
    if path.is_file() or path.is_symlink():
        return path.lstat().st_size
    return sum(size for _, size in files(path))
