"""A disk that is too small, that fills up, and a limit on the size of files: whole checkpoints or none, and a word."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TINY, Toy, read_events
from refusals import check_document, check_lines


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk needs root and mount")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=False)


def test_a_disk_too_small_is_refused_first(toy: Toy, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        message, hint = check_lines(toy("train", *TINY, "--out", disk / "run"), "disk_full")
        check_document(toy("train", *TINY, "--out", disk / "run", "--json"), "disk_full")
        assert not list(disk.iterdir())
    assert str(tmp_path / "disk") in message or "disk" in message
    assert hint


def test_a_disk_that_fills_up(toy: Toy, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24m") as disk:
        flags = ("--steps", 100000, "--set", "checkpoint.every=10", "--set", "log.every=10", "--out", disk / "run")
        with toy.start("train", *TINY, *flags) as process:
            process.read_step(12)
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"\0" * 65536)
            result = process.finish()
        message, _ = check_lines(result, "disk_full")
        assert "disk" in message or "room" in message or "space" in message
        run = disk / "run"
        for saved in (run / "checkpoints").glob("step_*"):
            assert (saved / "DONE").is_file(), saved
        assert not list(run.rglob("*.tmp"))
        assert [line for line in result.steps if not line.startswith("step ")] == []


def file_limit(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_file_that_may_not_grow(toy: Toy) -> None:
    """A limit on file sizes is a full disk too, and the signal that comes with it (SIGXFSZ) kills no runner."""
    toy("train", *TINY, "--steps", 1, "--out", "before").ok()  # the packed tokens are there
    result = toy("train", *TINY, "--steps", 20, "--out", "run", preexec_fn=file_limit(400_000))
    message, _ = check_lines(result, "disk_full")
    assert "checkpoints" in message or "state.gguf" in message
    run = toy.cwd / "run"
    assert not list((run / "checkpoints").glob("step_*"))
    assert read_events(run)[-1]["error"]["kind"] == "disk_full"
