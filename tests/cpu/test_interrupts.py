"""Ctrl-C while data is packed and while a model is trained, runners that die, readers that go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import EXCERPT, TINY, Toy, is_alive, read_events, tree, wait_for
from refusals import check_document, check_lines

#: Ctrl-C while a module is imported for the first time, as a slower machine has it in the first tenth of a second.
EARLY = """
import os, signal, sys
class Finger:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finger())
from toy.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["toy.cli", "click", "toy.errors", "toy.cli.list"])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
def test_ctrl_c_during_imports(cold_toy: Toy, module: str, flags: list[str]) -> None:
    argv = [sys.executable, "-c", EARLY.replace("MODULE", module), "list", *flags]
    done = subprocess.run(
        argv, cwd=cold_toy.cwd, env=cold_toy.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130
    if flags:
        document = json.loads(done.stdout)
        assert (document["format"], document["error"]["kind"]) == ("toy/list-v1", "interrupted")
        assert done.stderr.strip() == ""  # click ends the line of ^C
    else:
        assert [line.split(":")[0] for line in done.stderr.strip().splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("tokenizer", ["bpe", "chars"])
@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
def test_ctrl_c_during_packing(toy: Toy, home: dict[str, str], tokenizer: str, group: bool) -> None:
    corpus = toy.cwd / "large.txt"
    line = EXCERPT.read_text()
    with corpus.open("w") as file:
        for n in range(1500):
            file.write(f"{n}\n{line}")
    before = tree(toy.cwd, Path(home["HOME"]) / ".cache" / "toy")
    flags = ("--corpus", corpus, "--set", f"data.tokenizer={tokenizer}", "--no-sample")
    with toy.start("train", "--preset", "tiny", *flags) as process:
        wait_for(lambda: "packing" in said(process.popen), 60, "packing", process)
        process.interrupt(group)
        result = process.finish(60)
    check_lines(result, "interrupted")
    after = tree(toy.cwd, Path(home["HOME"]) / ".cache" / "toy")
    assert {path: size for path, size in after.items() if before.get(path) != size} == {}


def said(popen: subprocess.Popen[str]) -> str:
    """The next line of stderr."""
    assert popen.stderr is not None
    return popen.stderr.readline()


@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
def test_ctrl_c_during_training(toy: Toy, group: bool, as_json: bool) -> None:
    flags = ["--json"] if as_json else []
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run", *flags) as process:
        losses = toy.cwd / "run" / "losses.txt"
        wait_for(lambda: losses.is_file() and "step 5:" in losses.read_text(), 120, "step 5", process)
        process.interrupt(group)
        result = process.finish()
    lines = losses.read_text().splitlines()
    if as_json:
        assert check_document(result, "interrupted")["message"]
        assert result.document["losses"] == [line.split("=")[1] for line in lines]
    else:
        message, hint = check_lines(result, "interrupted")
        assert f"step {len(lines)}" in message
        assert "--resume" in hint
        assert result.stdout.splitlines() == lines
    run = toy.cwd / "run"
    assert (run / "checkpoints" / "latest" / "DONE").is_file()
    assert (run / "checkpoints" / "latest").resolve().name == f"step_{len(lines)}"
    assert read_events(run)[-1]["reason"] == "interrupted"
    assert not list(run.rglob("*.tmp"))


def test_a_runner_that_dies_by_a_signal(toy: Toy) -> None:
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run") as process:
        process.read_step(5)
        os.kill(process.runner(), signal.SIGSEGV)
        result = process.finish()
    message, _ = check_lines(result, "runner_failed")
    assert "killed by SIGSEGV" in message
    end = read_events(toy.cwd / "run")[-1]
    assert (end["kind"], end["reason"], end["error"]["kind"]) == ("run_end", "killed", "runner_failed")
    assert end["step"] >= 5

    with toy.start("train", *TINY, "--steps", 1_000_000, "--json") as process:
        os.kill(process.runner(), signal.SIGKILL)
        result = process.finish()
    assert "killed by SIGKILL" in check_document(result, "runner_failed")["message"]
    states = [run["state"] for run in toy("runs", "--json").ok().document["runs"]]
    assert states == ["killed"]


def test_a_reader_that_goes_away(toy: Toy) -> None:
    """`toy train | head -2`: the run stops, and says why on stderr."""
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run") as process:
        process.read_step(2)
        runner = process.runner()
        assert process.popen.stdout is not None
        process.popen.stdout.close()
        code = process.popen.wait(60)
        assert process.popen.stderr is not None
        stderr = process.popen.stderr.read()
    assert code != 0
    assert "Traceback" not in stderr
    assert not is_alive(runner)
