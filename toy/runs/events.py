"""Reading events.jsonl: a torn last line, unknown kinds and unknown keys are skipped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = "toy/v1"
KINDS = ("run_start", "step", "eval", "checkpoint", "profile", "run_end", "quality_gate")


def parse(line: str | bytes) -> dict[str, Any] | None:
    """One event, or None for what is no event of this schema."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("schema") != SCHEMA or event.get("kind") not in KINDS:
        return None
    return event


def read(run: Path) -> Iterator[dict[str, Any]]:
    """The events of a run so far, in order."""
    try:
        file = (run / "events.jsonl").open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if line.endswith(b"\n") and (event := parse(line)) is not None:
                yield event


class Follower:
    """Reads a growing events.jsonl: each `new()` gives the events that were completed since the last."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        self.offset = 0
        self.rest = b""

    def new(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [event for line in lines if (event := parse(line)) is not None]


def append(run: Path, event: dict[str, Any]) -> None:
    """Add an event that the runner did not write: its end when it was killed, or a quality gate later on. A torn last
    line is ended first, so that it stays alone."""
    path = run / "events.jsonl"
    line = json.dumps({"schema": SCHEMA, "kind": event["kind"], "time": round(time.time(), 3), **event}) + "\n"
    with path.open("ab") as file:
        if file.tell() > 0:
            with path.open("rb") as reader:
                reader.seek(-1, os.SEEK_END)
                if reader.read(1) != b"\n":
                    line = "\n" + line
        file.write(line.encode())
