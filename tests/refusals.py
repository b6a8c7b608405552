"""What a refusal must look like, on the screen and under --json: every command that fails is held to it."""

from __future__ import annotations

import json
from typing import Any

from harness import Result

from toy.errors import KINDS


def check_lines(result: Result, kind: str) -> tuple[str, str]:
    """The error and the hint of a command without --json."""
    lines = result.stderr.splitlines()
    assert result.code == KINDS[kind], result
    assert [line for line in lines if line.startswith("error: ")] == [lines[-2]], result.stderr
    assert [line for line in lines if line.startswith("hint: ")] == [lines[-1]], result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines[-1]) > len("hint: ")
    return lines[-2], lines[-1]


def check_document(result: Result, kind: str) -> dict[str, Any]:
    """The error of a command with --json."""
    assert result.code == KINDS[kind], result
    [line] = result.stdout.splitlines()
    document = json.loads(line)
    assert document["format"].startswith("toy/")
    assert document["error"]["kind"] == kind, document
    assert document["error"]["hint"]
    assert "\n" not in document["error"]["message"]
    assert "Traceback" not in result.stderr
    assert "error: " not in result.stderr
    return document["error"]  # type: ignore[no-any-return]
