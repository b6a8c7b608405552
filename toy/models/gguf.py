"""GGUF files, read and written through `toy._native`, with errors that a user can act on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toy.errors import ToyError


def read(path: str | Path) -> dict[str, Any]:
    """Version, metadata and tensor table of a GGUF, without its weights (see `toy._native.gguf_read`).

    Raises ToyError: missing_file, or bad_file when it is a directory, unreadable, truncated or not a GGUF.
    """
    import toy._native as native

    try:
        with Path(path).open("rb"):
            pass
    except FileNotFoundError:
        raise ToyError("missing_file", f"no model at {path}", "toy list shows the models on this machine") from None
    except OSError as error:
        hint = "give the path of a .gguf file or a run; toy list shows the models on this machine"
        raise ToyError("bad_file", f"cannot read {path}: {error.strerror}", hint) from error
    try:
        return native.gguf_read(os.fspath(path))
    except ValueError as error:
        message, _, hint = str(error).partition("\n")
        if str(path) not in message:
            message = f"{path}: {message}"
        hint = hint or "download or export the file again; toy list shows others"
        raise ToyError("bad_file", message, hint) from error


def write_vocabulary(path: str | Path, metadata: Mapping[str, Any]) -> None:
    """A GGUF without tensors. `path` appears whole or not at all only if the caller renames it."""
    import toy._native as native

    native.gguf_write(os.fspath(path), dict(metadata))
