"""The cache of packed corpora: folders that appear whole or not at all, and a memory of file hashes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toy.corpora import packed
from toy.corpora.sources import Part
from toy.errors import ToyError, is_alive

#: `progress(done, total)`, in bytes of the corpus.
Progress = Callable[[int, int], None]


class Meter:
    """Turns bytes read in several passes over the corpus into one count of its bytes."""

    def __init__(self, progress: Progress | None, total: int, passes: int):
        self._progress = progress
        self._total = total
        self._passes = passes
        self._read = 0

    def read(self, n: int) -> None:
        self._read += n
        if self._progress is not None:
            self._progress(min(self._total, self._read // self._passes), self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


class Index:
    """Remembers hashes of files by path, size and modification time, so that an unchanged corpus costs nothing."""

    def __init__(self, cache: Path):
        self._path = cache / "index.json"
        self._changed = False
        self._entries: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            entries = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(entries, dict):
                self._entries = {k: v for k, v in entries.items() if isinstance(v, list) and len(v) >= 3}

    def known(self, part: Part) -> str | None:
        if part.path is None:
            return None
        entry = self._entries.get(str(part.path.resolve()))
        return str(entry[2]) if entry and entry[:2] == [part.size, part.mtime_ns] else None

    def learn(self, part: Part, digest: str) -> None:
        # A file written this moment could change again without its time or size telling.
        if part.path is not None and time.time_ns() - part.mtime_ns > 2_000_000_000:
            self._entries[str(part.path.resolve())] = [part.size, part.mtime_ns, digest]
            self._changed = True

    def scan(self, tokens: Path, meter: Meter) -> tuple[int, int, str]:
        """Count, largest id and hash of packed tokens."""
        status = tokens.stat()
        part = Part(tokens, tokens.name, status.st_size, status.st_mtime_ns)
        entry = self._entries.get(str(tokens.resolve()))
        if entry and len(entry) == 5 and entry[:2] == [part.size, part.mtime_ns]:
            return int(entry[3]), int(entry[4]), str(entry[2])
        count, largest, sha256 = packed.scan(tokens, meter.read)
        self.learn(part, sha256)
        if self._changed:
            self._entries[str(tokens.resolve())] = [part.size, part.mtime_ns, sha256, count, largest]
        return count, largest, sha256

    def save(self) -> None:
        if self._changed:
            with contextlib.suppress(OSError):  # a cache of a cache: not having it costs time only
                self._path.parent.mkdir(parents=True, exist_ok=True)
                part = self._path.with_name(f".index-{os.getpid()}-{secrets.token_hex(4)}")
                part.write_text(json.dumps(self._entries), encoding="utf-8")
                part.replace(self._path)


@contextlib.contextmanager
def writing(folder: Path, is_good: Callable[[], bool]) -> Iterator[Path]:
    """A folder under a temporary name, synced and renamed to `folder` when the block ends well, removed when not.

    `is_good` says whether what is at `folder` by then can stay: somebody else may have made it meanwhile.
    """
    part = folder.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        part.mkdir()
        yield part
        for path in part.iterdir():
            _sync(path)
        _sync(part)
        _publish(part, folder, is_good)
        _sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or pack elsewhere (XDG_CACHE_HOME names the cache)"
            raise ToyError("disk_full", f"no space left in {folder.parent} while packing", hint) from error
        message = f"cannot write to {folder.parent}: {error.strerror or error}"
        raise ToyError("bad_file", message, "XDG_CACHE_HOME names another place for the cache") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, folder: Path, is_good: Callable[[], bool]) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        if is_good():
            return
        shutil.rmtree(folder)
        part.rename(folder)


def _remove_abandoned(cache: Path) -> None:
    """Removes what a killed packing left: temporary folders whose process is gone."""
    for path in cache.glob(".tmp-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
