"""The closed list of error kinds, the one exception that carries them to the user, and the words of its messages."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

#: Every `error.kind` that a JSON document or an event can hold, with its exit code.
KINDS: dict[str, int] = {
    "bad_flag": EXIT_BAD_INPUT,
    "bad_config": EXIT_BAD_INPUT,
    "missing_file": EXIT_BAD_INPUT,
    "bad_file": EXIT_BAD_INPUT,
    "not_available": EXIT_BAD_INPUT,
    "resume_mismatch": EXIT_BAD_INPUT,
    "build_failed": EXIT_FAILED,
    "runner_failed": EXIT_FAILED,
    "oom": EXIT_FAILED,
    "non_finite": EXIT_FAILED,
    "disk_full": EXIT_FAILED,
    "gate_mismatch": EXIT_FAILED,
    "bug": EXIT_FAILED,
    "interrupted": EXIT_INTERRUPTED,
}


class ToyError(Exception):
    """An error that a user can act on: what is wrong (`message`, one line) and what to do (`hint`, one line).

    `exit_code` overrides the kind's own code (a runner that found bad input exits with 2, say).
    """

    def __init__(
        self,
        kind: str,
        message: str,
        hint: str = "",
        *,
        exit_code: int | None = None,
        data: dict[str, object] | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"unknown error kind {kind!r}")
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
        self.exit_code = KINDS[kind] if exit_code is None else exit_code
        self.data = data or {}

    def as_json(self) -> dict[str, object]:
        return {"kind": self.kind, "message": self.message, "hint": self.hint, **self.data}


# Words that messages are made of


def one_line(text: object) -> str:
    """`text` on one line: what stands after `error:` and `hint:` never wraps."""
    return " ".join(str(text).split())


def json_reason(error: Exception) -> str:
    """Why `json.loads` took a text for no JSON, in words: it raises ValueError (of several kinds) or RecursionError."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    # a plain ValueError is Python's limit on the digits of an integer
    return str(getattr(error, "msg", "a number of too many digits"))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The entry of `words` that `word` was probably meant to be, or None."""
    import difflib  # not at start-up

    known = list(words)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not found:
        lowered = {name.lower().replace("-", "_"): name for name in known}
        close = difflib.get_close_matches(word.lower().replace("-", "_"), lowered, n=1, cutoff=0.5)
        found = [lowered[name] for name in close]
    return found[0] if found else None


def shown(path: Path | str) -> str:
    """`path` as a person would type it: relative to the working directory where that is shorter."""
    text = str(path)
    with contextlib.suppress(ValueError, OSError):
        relative = os.path.relpath(text)
        if not relative.startswith(".."):
            return relative
    return text


def os_error(error: OSError, doing: str = "") -> ToyError:
    """An `OSError` in the error contract's words. `doing` is what was attempted ("write the run's files")."""
    name = shown(error.filename) if error.filename else ""
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    where = f"{name}: {reason}" if name else reason
    message = f"cannot {doing}: {where}" if doing else where
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ToyError("disk_full", message, "free some space on that disk, or choose another place with --out")
    if error.errno == errno.ENOENT:
        return ToyError("missing_file", message, "check the path")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ToyError("bad_file", message, "check the permissions of that path, or choose another")
    return ToyError("bad_file", message, "check the path; TOY_DEBUG=1 shows where it happened")


@contextlib.contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `ToyError` that says what was being done."""
    try:
        yield
    except OSError as error:
        raise os_error(error, doing) from error


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has not ended; one of another user's has not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
