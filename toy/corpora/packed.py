"""Packed tokens: the plain little-endian int32 file, and the manifest beside it that says what it holds."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from toy.errors import ToyError

FORMAT = "toy/packed-v1"
TOKENS, MANIFEST, TOKENIZER_GGUF, TOKENIZER_JSON = "tokens.bin", "tokens.json", "tokenizer.gguf", "tokenizer.json"

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Prepared:
    """A corpus that a runner can read: ids in `tokens`, and the tokenizer they belong to as a GGUF without weights.

    `tokenizer_json` is None where no `tokenizer.json` cuts text alike (SentencePiece kinds). `sha256` is that of the
    token file. `vocab_size` counts the tokens in `tokenizer_gguf`, unused ones included.
    """

    tokens: Path
    tokenizer_gguf: Path
    tokenizer_json: Path | None
    manifest: dict[str, Any]
    vocab_size: int
    n_tokens: int
    sha256: str

    @property
    def n_documents(self) -> int:
        return int(self.manifest.get("n_documents", 0))

    def require(self, context: int, val_fraction: float = 0.0) -> None:
        """Raises ToyError (bad_file) when the part to train on, or to validate on, holds not even one sequence."""
        val_tokens = int(self.n_tokens * val_fraction)
        for what, tokens in (("train on", self.n_tokens - val_tokens), ("validate on", val_tokens)):
            if tokens <= context and (what == "train on" or val_fraction > 0):
                raise too_short(self.manifest.get("name") or str(self.tokens), tokens, context, what)


def too_short(name: str, tokens: int, context: int, what: str = "train on") -> ToyError:
    return ToyError(
        "bad_file",
        f"corpus {name} is too short: {tokens} tokens to {what}, and one sequence takes {context + 1}",
        f"give a longer corpus, or a shorter context: --set model.context={max(1, min(64, tokens // 4))}",
    )


class TokenWriter:
    """Appends ids to a packed file, counting and hashing what it writes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self.n_tokens = 0

    def write(self, ids: array[int]) -> None:
        if sys.byteorder == "big":
            ids = ids[:]
            ids.byteswap()
        data = ids.tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.n_tokens += len(ids)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def read_ids(path: Path) -> Iterator[array[int]]:
    """The ids of a packed file, block by block."""
    with path.open("rb") as file:
        while data := file.read(_BLOCK):
            ids = array("i")
            ids.frombytes(data[: len(data) // 4 * 4])
            if sys.byteorder == "big":
                ids.byteswap()
            yield ids


def scan(path: Path, read: Callable[[int], None] = lambda n: None) -> tuple[int, int, str]:
    """Count, largest id and sha256 of a packed file. Raises ToyError (bad_file) on anything but ids."""
    size = path.stat().st_size
    if size == 0:
        raise ToyError("bad_file", f"corpus {path} is empty", "packed tokens are little-endian 32-bit ids")
    if size % 4:
        raise ToyError(
            "bad_file",
            f"corpus {path} is not packed tokens: {size} bytes is no multiple of 4",
            "a .bin corpus is little-endian 32-bit ids; text goes in a .txt",
        )
    digest = hashlib.sha256()
    largest = 0
    count = 0
    try:
        for ids in read_ids(path):
            digest.update(ids.tobytes())
            block_largest = max(ids)
            largest = max(largest, block_largest)
            if min(ids) < 0:
                where = count + next(n for n, i in enumerate(ids) if i < 0)
                raise ToyError(
                    "bad_file",
                    f"corpus {path} is not packed tokens: id {ids[where - count]} at token {where}",
                    "a .bin corpus is little-endian 32-bit ids, none negative",
                )
            count += len(ids)
            read(4 * len(ids))
    except OSError as error:
        raise ToyError("bad_file", f"cannot read corpus {path}: {error.strerror}", "check its permissions") from error
    return count, largest, digest.hexdigest()


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".bin" or (path.is_dir() and (path / TOKENS).is_file())


def token_file(path: Path) -> Path:
    """The .bin for what the user named: itself, or the one in a packed folder."""
    return path / TOKENS if path.is_dir() else path


def read_manifest(tokens: Path) -> dict[str, Any] | None:
    """The manifest beside `tokens`, checked against it; None when there is none."""
    path = tokens.with_suffix(".json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _bad_manifest(path, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _bad_manifest(path, f"its format is not {FORMAT}")
    for key in ("n_tokens", "vocab_size"):
        if not isinstance(manifest.get(key), int):
            raise _bad_manifest(path, f"{key} is missing")
    if not isinstance(manifest.get("tokenizer"), dict):
        raise _bad_manifest(path, "tokenizer is missing")
    try:
        size = tokens.stat().st_size
    except FileNotFoundError:
        raise ToyError("missing_file", f"no corpus at {tokens}", "pack it again: python prep/pack_text.py") from None
    if size != 4 * manifest["n_tokens"]:
        raise ToyError(
            "bad_file",
            f"corpus {tokens} has {size} bytes where its manifest says {4 * manifest['n_tokens']}",
            "the file is cut short or from another packing; pack it again",
        )
    return manifest


def _bad_manifest(path: Path, reason: str) -> ToyError:
    return ToyError("bad_file", f"{path} is not a manifest of packed tokens: {reason}", "remove it or pack again")
