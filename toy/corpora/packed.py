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
OFFSETS, MASK = "offsets.bin", "mask.bin"

_BLOCK = 1 << 22
_EXAMPLES = 1 << 14


@dataclass(frozen=True)
class Prepared:
    """A corpus that a runner can read: ids in `tokens`, and the tokenizer they belong to as a GGUF without weights.

    `tokenizer_json` is None where no `tokenizer.json` cuts text alike (SentencePiece kinds). `sha256` is that of the
    token file. `vocab_size` counts the tokens in `tokenizer_gguf`, unused ones included.

    A set of examples has `offsets` (int64[n_examples + 1] into the tokens) and `mask` (uint8[n_tokens], 1: this token
    is learned) too, `longest` is the tokens of its longest example, and `sha256` is that of the three files in a row.
    """

    tokens: Path
    tokenizer_gguf: Path
    tokenizer_json: Path | None
    manifest: dict[str, Any]
    vocab_size: int
    n_tokens: int
    sha256: str
    offsets: Path | None = None
    mask: Path | None = None
    n_examples: int = 0
    longest: int = 0

    @property
    def n_documents(self) -> int:
        return int(self.manifest.get("n_documents", 0))

    def require(self, context: int, val_fraction: float = 0.0) -> None:
        """Raises ToyError (bad_file) when the part to train on, or to validate on, holds not even one sequence."""
        require(self.manifest.get("name") or str(self.tokens), self.n_tokens, context, val_fraction)

    def fit(self, context: int, first: int = 0, last: int | None = None) -> Fit:
        """What a context of so many tokens leaves of the examples `first` up to `last`."""
        import numpy as np

        if self.offsets is None or self.mask is None:
            raise ValueError("not a set of examples")
        offsets = np.fromfile(self.offsets, "<i8")[first : None if last is None else last + 1]
        mask = np.memmap(self.mask, "u1", "r")
        seen, dropped, learned, prompt = 0, 0, 0, 0
        for block in range(0, len(offsets) - 1, _EXAMPLES):
            starts = offsets[block : block + _EXAMPLES + 1]
            marks = np.asarray(mask[starts[0] : starts[-1]])
            at = np.arange(len(marks)) - np.repeat(starts[:-1] - starts[0], np.diff(starts))
            counts = np.add.reduceat(((marks != 0) & (at <= context)).astype("i8"), starts[:-1] - starts[0])
            first_learned = np.minimum.reduceat(np.where(marks, at, np.iinfo("i8").max), starts[:-1] - starts[0])
            seen += len(counts)
            dropped += int(np.count_nonzero(counts == 0))
            learned += int(counts.sum())
            prompt = min(prompt or int(first_learned.min()), int(first_learned.min()))
        cut = int(np.count_nonzero(np.diff(offsets) > context + 1))
        return Fit(n_examples=seen, cut=cut, dropped=dropped, n_learned=learned, shortest_prompt=prompt)

    def require_examples(self, context: int, val_fraction: float = 0.0) -> Fit:
        """Raises ToyError (bad_file) when no example is left to train on, or to validate on, once those longer than
        `context` are cut; else what is left to train on."""
        name = self.manifest.get("name") or str(self.tokens)
        n_val = int(self.n_examples * val_fraction)
        parts = [("train on", 0, self.n_examples - n_val)]
        if val_fraction > 0:
            parts.append(("validate on", self.n_examples - n_val, self.n_examples))
        fits = []
        for what, first, last in parts:
            if first == last:
                message = f"examples {name} are too few: of {self.n_examples}, none are left to {what}"
                raise ToyError("bad_file", message, "give more examples, a data.val_corpus, or data.val_fraction=0")
            fit = self.fit(context, first, last)
            if fit.n_learned == 0:
                message = f"examples {name} have nothing to {what}: every answer begins beyond the context of {context}"
                hint = f"the shortest prompt takes {fit.shortest_prompt} tokens"
                raise ToyError("bad_file", message, f"{hint}: --set model.context={_up(fit.shortest_prompt)}")
            fits.append(fit)
        return fits[0]


@dataclass(frozen=True)
class Fit:
    """Examples under a context: `cut` are longer, of which `dropped` keep nothing to learn; `n_learned` tokens stay."""

    n_examples: int
    cut: int
    dropped: int
    n_learned: int
    shortest_prompt: int


def _up(tokens: int) -> int:
    """A context that leaves room for an answer after so many tokens."""
    return (tokens + 64) // 32 * 32


def require(name: str, n_tokens: int, context: int, val_fraction: float) -> None:
    """Raises ToyError (bad_file) when `n_tokens` hold no sequence to train on, or none to validate on."""
    val_tokens = int(n_tokens * val_fraction)
    for what, tokens in (("train on", n_tokens - val_tokens), ("validate on", val_tokens)):
        if tokens <= context and (what == "train on" or val_fraction > 0):
            raise _too_short(name, tokens, context, what)


def _too_short(name: str, tokens: int, context: int, what: str) -> ToyError:
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
