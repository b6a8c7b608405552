"""Gates: a stored list of step lines that a run must reproduce byte for byte."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from toy.errors import ToyError, shown

_LINE = re.compile(r"step ([1-9][0-9]*): loss=(\S+)")


def read_lines(path: Path, what: str) -> list[str]:
    """The step lines in a file, as they stand there."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ToyError("missing_file", f"no such {what}: {shown(path)}", "check the path") from None
    except IsADirectoryError:
        raise ToyError("bad_file", f"{shown(path)} is a folder, not a {what}", "name a file") from None
    except UnicodeDecodeError:
        raise ToyError(
            "bad_file", f"{shown(path)} is not a {what}: it is not text", "a gate holds `step N: loss=V` lines"
        ) from None
    except OSError as error:
        raise ToyError(
            "bad_file", f"cannot read {shown(path)}: {(error.strerror or '').lower()}", "check its permissions"
        ) from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for n, line in enumerate(lines, 1):
        if not _LINE.fullmatch(line):
            raise ToyError(
                "bad_file",
                f"{shown(path)}:{n} is no step line: {line[:60]!r}",
                "a gate holds `step N: loss=V` lines only",
            )
    if not lines:
        raise ToyError("bad_file", f"{shown(path)} holds no step lines", f"an empty {what} proves nothing")
    return lines


def is_line(line: str) -> bool:
    return _LINE.fullmatch(line) is not None


def step_of(line: str) -> int:
    match = _LINE.fullmatch(line)
    assert match is not None
    return int(match[1])


def value_of(line: str) -> str:
    match = _LINE.fullmatch(line)
    assert match is not None
    return match[2]


def ulps(a: str, b: str) -> int | None:
    """How many float32 values lie from `a` to `b`; None when one of them is not finite or no number."""

    def rank(text: str) -> int | None:
        try:
            value = float(text)
            bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
        except (ValueError, OverflowError):
            return None
        if not math.isfinite(value):
            return None
        return bits if bits >= 0 else -(bits & 0x7FFFFFFF)

    first, second = rank(a), rank(b)
    return None if first is None or second is None else abs(first - second)


def compare(want: list[str], got: list[str]) -> dict[str, Any] | None:
    """None when the lines are the same bytes, else the first difference: step, both values, their distance in ulps."""
    if want == got:
        return None
    for expected, actual in zip(want, got, strict=False):
        if expected == actual:
            continue
        if step_of(expected) != step_of(actual):
            return {
                "step": min(step_of(expected), step_of(actual)),
                "expected": expected,
                "actual": actual,
                "ulps": None,
            }
        a, b = value_of(expected), value_of(actual)
        return {"step": step_of(expected), "expected": a, "actual": b, "ulps": ulps(a, b)}
    if len(want) > len(got):
        return {"step": step_of(want[len(got)]), "expected": value_of(want[len(got)]), "actual": None, "ulps": None}
    return {"step": step_of(got[len(want)]), "expected": None, "actual": value_of(got[len(want)]), "ulps": None}


def explain(difference: dict[str, Any], want: list[str], got: list[str]) -> str:
    """One line about a difference."""
    step, expected, actual = difference["step"], difference["expected"], difference["actual"]
    if actual is None:
        return (
            f"the run ends after {len(got)} of {len(want)} step lines: step {step} is missing (the gate has {expected})"
        )
    if expected is None:
        return f"the run goes on past the gate's {len(want)} step lines: step {step} is extra (the run has {actual})"
    if expected.startswith("step "):
        return f"the lines are of different steps: the gate has {expected!r}, the run {actual!r}"
    if difference["ulps"] is None:
        apart = "not both are finite numbers"
    elif difference["ulps"] == 0:
        apart = "the same float32, written differently"
    else:
        apart = f"{difference['ulps']} ulp{'s' if difference['ulps'] != 1 else ''} apart"
    return f"step {step} differs: the gate has {expected}, the run {actual} ({apart})"
