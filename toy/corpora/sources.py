"""What a corpus can be, read as a stream of documents: a text file, a folder of them, JSONL, or Python's own manual.

A document comes as pieces of at most about 64 KiB that end where words do, so that a tokenizer finds the same tokens as
in the whole, and memory stays the same whatever the size of the corpus.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toy.errors import ToyError, json_reason

#: (text, begins its document, ends its document)
Piece = tuple[str, bool, bool]
#: Told how many bytes were read since the last call.
Reading = Callable[[int], None]

TEXT_SUFFIXES = frozenset(
    [
        *(
            ".txt",
            ".text",
            ".md",
            ".markdown",
            ".rst",
            ".adoc",
            ".tex",
            ".org",
            ".log",
            ".csv",
            ".tsv",
            ".html",
            ".xml",
        ),
        *(".py", ".pyi", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".rs", ".java", ".rb", ".lua"),
        *(".sh", ".sql", ".yml", ".yaml", ".toml", ".jsonl", ".ndjson"),
    ]
)
JSONL = frozenset([".jsonl", ".ndjson"])
_BLOCK = 1 << 18
_PIECE = 1 << 16
# A cut here changes no token: between a letter and a space before a letter, or after a single newline before a letter.
_CUT = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=[^\W\d_])")
_HINT = "a corpus is a UTF-8 text file, a folder of them, a .jsonl of texts or examples, or packed tokens (.bin)"


@dataclass(frozen=True)
class Part:
    """One file of a corpus. `path` is None for Python's own manual."""

    path: Path | None
    name: str
    size: int
    mtime_ns: int


class Source:
    """A corpus that is text: its files, their bytes, its documents."""

    def __init__(self, name: str, parts: list[Part], path: Path | None):
        self.name = name
        self.parts = parts
        self.path = path

    @property
    def n_bytes(self) -> int:
        return sum(part.size for part in self.parts)

    def sha256(self, known: Callable[[Part], str | None], learn: Callable[[Part, str], None], read: Reading) -> str:
        """Identity of the documents: of every file's bytes, and of how they are read.

        `known` answers from memory for a file that has not changed, `learn` is told what had to be computed.
        """
        whole = hashlib.sha256()
        for part in self.parts:
            digest = known(part)
            if digest is None:
                digest = _file_sha256(part, read)
                learn(part, digest)
            else:
                read(part.size)
            kind = "jsonl" if part.name.endswith(tuple(JSONL)) else "text"
            whole.update(f"{kind} {digest}\n".encode())
        return whole.hexdigest()

    def pieces(self, read: Reading) -> Iterator[Piece]:
        """All documents, piece by piece. Raises ToyError (bad_file) naming file and offset or line."""
        for part in self.parts:
            if part.path is None:
                for topic in _manual():
                    read(len(topic.encode()))
                    yield from _cut(iter([topic]))
            elif part.path.suffix.lower() in JSONL:
                yield from _jsonl_pieces(part.path, read)
            else:
                yield from _cut(_decoded(part.path, read))


def open_source(corpus: str | Path | None) -> Source:
    """The text corpus at `corpus`; empty is Python's own manual.

    Raises ToyError (missing_file, bad_file) when it is missing, empty or unreadable.
    """
    if corpus is None or str(corpus) == "":
        topics = _manual()
        return Source("python-manual", [Part(None, "pydoc_data.topics", sum(len(t.encode()) for t in topics), 0)], None)
    path = Path(corpus).expanduser()
    try:
        if path.is_dir():
            parts = [_part(file) for file in _files(path)]
            if not parts:
                raise ToyError("bad_file", f"corpus {path} has no text files in it", _HINT)
        elif path.exists():
            if not path.is_file():
                raise ToyError("bad_file", f"corpus {path} is not a file", _HINT)
            parts = [_part(path)]
        else:
            raise ToyError("missing_file", f"no corpus at {path}", _HINT)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not any(part.size for part in parts):
        raise ToyError("bad_file", f"corpus {path} is empty", _HINT)
    return Source(path.stem or path.name, [part for part in parts if part.size], path)


def probe(source: Source) -> None:
    """Reads a little of every file: unreadable or binary ones are found before anything is made."""
    for part in source.parts[:1000]:
        if part.path is None:
            continue
        if part.path.suffix.lower() in JSONL:  # whose errors name a line, when it is packed
            with reading(part.path), part.path.open("rb"):
                continue
        for _ in _decoded(part.path, lambda n: None, limit=_PIECE):
            pass


def _manual() -> list[str]:
    """The topics in the order of a hash of their names: the end, which is held out for validation, is like the rest."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return [topics[key] for key in sorted(topics, key=lambda key: hashlib.sha256(key.encode()).digest())]


def _files(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    files = [path for path in found if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _part(path: Path) -> Part:
    status = path.stat()
    return Part(path, path.name.lower(), status.st_size, status.st_mtime_ns)


def _unreadable(path: Path, error: OSError) -> ToyError:
    return ToyError("bad_file", f"cannot read corpus {path}: {error.strerror}", "check that you may read the file")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _file_sha256(part: Part, read: Reading) -> str:
    digest = hashlib.sha256()
    if part.path is None:
        for topic in _manual():
            data = topic.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
            read(len(data))
        return digest.hexdigest()
    with reading(part.path), part.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def _decoded(path: Path, read: Reading, limit: int | None = None) -> Iterator[str]:
    """The file's text, block by block. `limit`: stop after so many bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    with reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK if limit is None else min(_BLOCK, limit - offset)):
            nul = block.find(b"\0")
            if nul >= 0:
                raise _binary(path, offset + nul, "a NUL byte")
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _binary(path, offset - pending + error.start, "not UTF-8") from None
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(block)
            read(len(block))
    if decoder.getstate()[0] and (limit is None or offset < limit):
        raise _binary(path, offset - len(decoder.getstate()[0]), "not UTF-8, cut short")


def _binary(path: Path, offset: int, what: str) -> ToyError:
    return ToyError("bad_file", f"corpus {path} is not text: {what} at byte {offset}", "save it as UTF-8 text")


def _cut(texts: Iterator[str]) -> Iterator[Piece]:
    """One document, from its text in arbitrary blocks, as pieces that end where words do."""
    waiting = ""
    first = True
    for text in texts:
        waiting += text
        while len(waiting) > 2 * _PIECE:
            at = _PIECE
            for match in _CUT.finditer(waiting, _PIECE // 2, _PIECE + 2):
                at = match.end()
            yield waiting[:at], first, False
            waiting = waiting[at:]
            first = False
    if waiting or not first:
        yield waiting, first, True


def _jsonl_pieces(path: Path, read: Reading) -> Iterator[Piece]:
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read(len(line))
            record = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if record.strip():
                yield from _cut(iter([_jsonl_text(path, number, record)]))


def _jsonl_text(path: Path, number: int, line: bytes) -> str:
    hint = 'every line is an object with a text: {"text": "…"}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ToyError("bad_file", f"{path}:{number}: not JSON ({json_reason(error)})", hint) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        if isinstance(record, dict) and not record.keys().isdisjoint(("messages", "prompt", "completion")):
            hint = "to mix examples and texts, begin the file with a prompt or messages: then every line is an example"
        raise ToyError("bad_file", f"{path}:{number}: no text in this line", hint)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ToyError("bad_file", f"{path}:{number}: the text holds half a surrogate pair", hint) from None
    return text
