"""Runs beside each other: the knobs that differ, the first step line that does, and the weights, tensor by tensor."""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from toy.errors import ToyError
from toy.runs import events, gates, history

#: Knobs that say how a run is called or kept, not what it computes.
NOTES = ("run.name", "run.notes")


def differing(values: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same everywhere, with the value in each; None where a key is absent."""
    keys = dict.fromkeys(key for one in values for key in one)
    rows = {key: [one.get(key) for one in values] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def knobs(runs: list[Path]) -> dict[str, list[Any]]:
    return differing([history.knobs(run) for run in runs])


def datasets(runs: list[Path]) -> dict[str, list[Any]]:
    """The data sets whose content differs, by hash."""
    return differing([{name: about.get("sha256") for name, about in history.datasets(run).items()} for run in runs])


def circumstances(runs: list[Path]) -> dict[str, list[Any]]:
    return differing([history.circumstances(run) for run in runs])


def lines(a: Path, b: Path) -> dict[str, Any]:
    """The step lines of the steps that both runs have, a resumed run with those of the run that it continues:
    `steps` (first and last in common, or None) and `difference` (as `gates.compare` has it, or None)."""
    want = {gates.step_of(line): line for line in history.lines(a)}
    got = {gates.step_of(line): line for line in history.lines(b)}
    common = sorted(want.keys() & got.keys())
    difference = gates.compare([want[step] for step in common], [got[step] for step in common])
    return {"steps": [common[0], common[-1]] if common else None, "difference": difference}


def weights(a: Path, b: Path) -> dict[str, Any]:
    """The weights of the last step that both runs have some of, a GGUF or a checkpoint: `step` (None: there is no such
    step), the two files, and `difference`: None, or the first tensor that differs and how many do."""
    ours, theirs = _snapshots(a), _snapshots(b)
    common = ours.keys() & theirs.keys()
    if not common:
        return {"step": None, "files": [], "difference": None}
    step = max(common)
    pair = next(((x, y) for x in ours[step] for y in theirs[step] if _kind(x) == _kind(y)), None)
    first, second = pair or (ours[step][0], theirs[step][0])
    return {"step": step, "files": [str(first), str(second)], "difference": tensors(first, second)}


def _kind(path: Path) -> bool:
    return path.parent.name == "weights"


def _snapshots(run: Path) -> dict[int, list[Path]]:
    """Files that hold weights, by step: the exported GGUF before the checkpoint of the same step; the checkpoint that
    the run went on from is its beginning."""
    found: dict[int, list[Path]] = {}
    exported = history.weights(run)
    if exported is not None:
        step = _step_of_export(run, exported)
        if step is not None:
            found.setdefault(step, []).append(exported)
    saved = [(checkpoint["step"], Path(checkpoint["path"])) for checkpoint in history.checkpoints(run)]
    first = history.resumed_from(run)
    if first is not None and (first / "DONE").is_file():
        saved.append((history.step_of(first), first))
    for step, path in saved:
        if step is not None and (path / "state.gguf").is_file():
            found.setdefault(int(step), []).append(path / "state.gguf")
    return found


def _step_of_export(run: Path, path: Path) -> int | None:
    from toy.models import gguf

    step = gguf.read(path)["metadata"].get("toy.step")
    if isinstance(step, int):
        return step
    ends = [event.get("step") for event in events.read(run) if event["kind"] == "run_end"]
    return ends[-1] if ends and isinstance(ends[-1], int) else None


def tensors(a: Path, b: Path) -> dict[str, Any] | None:
    """None when every tensor of two GGUFs has the same name, type, shape and bytes; else the first that does not.

    Moments, which a checkpoint has and an export has not, are left out where only one of the files has them.
    """
    from toy.models import gguf

    documents = [gguf.read(path) for path in (a, b)]
    tables = [{str(tensor["name"]): tensor for tensor in document["tensors"]} for document in documents]
    for one, other in (tables, tables[::-1]):
        for name in [name for name in one if name not in other and name.endswith((".m", ".v")) and name[:-2] in one]:
            del one[name]
    differ: list[dict[str, Any]] = []
    with ExitStack() as stack:
        maps = []
        for path in (a, b):
            file = stack.enter_context(path.open("rb"))
            maps.append(stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        views = [stack.enter_context(memoryview(whole)) for whole in maps]
        for name in dict.fromkeys([*tables[0], *tables[1]]):
            entries = [table.get(name) for table in tables]
            why = _why(entries, views, [int(document["data_offset"]) for document in documents])
            if why:
                differ.append({"tensor": name, "why": why})
    return None if not differ else {**differ[0], "tensors": len(differ)}


def _why(entries: list[Any], views: list[memoryview], starts: list[int]) -> str:
    first, second = entries
    if first is None or second is None:
        return f"only the {'second' if first is None else 'first'} run has it"
    if (first["type"], list(first["shape"])) != (second["type"], list(second["shape"])):
        shapes = [f"{one['type']} {'x'.join(str(n) for n in one['shape'])}" for one in entries]
        return f"{shapes[0]} and {shapes[1]}"
    parts = [
        view[start + int(one["offset"]) : start + int(one["offset"]) + int(one["n_bytes"])]
        for one, view, start in zip(entries, views, starts, strict=True)
    ]
    try:
        if parts[0] == parts[1]:
            return ""
        step = 1 << 16
        block = next(n for n in range(0, len(parts[0]), step) if parts[0][n : n + step] != parts[1][n : n + step])
        at = next(n for n in range(block, len(parts[0])) if parts[0][n] != parts[1][n])
        return f"byte {at} of {len(parts[0])}"
    finally:
        for part in parts:
            part.release()


def require_equal(a: Path, b: Path) -> dict[str, Any]:
    """What was compared, or a ToyError (gate_mismatch) that names the first step line or tensor that differs."""
    found = lines(a, b)
    names = f"{a.name} and {b.name}"
    if found["steps"] is None:
        raise ToyError(
            "gate_mismatch", f"{names} have no step in common", "compare runs that trained the same steps", data=found
        )
    difference = found["difference"]
    if difference is not None:
        ulps = difference["ulps"]
        apart = f" ({ulps} ulp{'s' if ulps != 1 else ''} apart)" if ulps is not None else ""
        raise ToyError(
            "gate_mismatch",
            f"{names} differ at step {difference['step']}: {difference['expected']} and {difference['actual']}{apart}",
            "`toy runs compare` without --assert-equal shows the knobs, data and builds that differ",
            data=found,
        )
    kept = weights(a, b)
    if kept["step"] is None:
        raise ToyError(
            "gate_mismatch",
            f"{names} have the same step lines, but no weights of a common step to compare",
            "keep a checkpoint of the same step in both: checkpoint.every",
            data=found,
        )
    if kept["difference"] is not None:
        tensor, why, n = (kept["difference"][key] for key in ("tensor", "why", "tensors"))
        more = f", and {n - 1} more tensors" if n > 1 else ""
        raise ToyError(
            "gate_mismatch",
            f"{names} have the same step lines, but other weights at step {kept['step']}: {tensor} ({why}){more}",
            f"the files: {kept['files'][0]} and {kept['files'][1]}",
            data={**found, "weights": kept},
        )
    return {**found, "weights": kept}
