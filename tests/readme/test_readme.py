"""README's commands are run, and what they print looks as README shows it; its make targets and the presets are there.

A block of `sh` or `console` is run line by line, in order, in one directory. `make setup`, `make test` and what fetches
toy itself stand for this test session, and a training is cut to a few steps; everything else is run as it stands.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import ROOT, Toy

README = ROOT / "README.md"
BLOCK = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: A training of a few seconds. The model stays the one that is shown.
SHORT = ["--steps", "6", "--set", "train.batch=2", "--set", "eval.batches=1"]
#: What made this session possible, or runs it.
DONE_ALREADY = (
    "git clone", "pip install", "python -m pip", "python3 -m pip", "python3 -m venv", "source ", ". .venv",
    "make setup", "make test", "make bench", "make lint", "make gate", "make clean",
)  # fmt: skip


@dataclass
class Shown:
    """A command in README, and the lines under it up to the next one."""

    command: str
    output: list[str] = field(default_factory=list)


def shown_commands() -> list[Shown]:
    found: list[Shown] = []
    for block in BLOCK.findall(README.read_text(encoding="utf-8").replace("\\\n", " ")):
        lines = block.splitlines()
        prompts = any(line.startswith("$ ") for line in lines)
        for line in lines:
            if prompts and not line.startswith("$ "):
                if found:
                    found[-1].output.append(line)
            elif (command := line.removeprefix("$ ").split(" #")[0].strip()) and not command.startswith("#"):
                found.append(Shown(command))
    return found


def parts(command: str) -> list[str]:
    """The commands in `a && b`; `make train` is two."""
    found: list[str] = []
    for part in re.split(r"\s*(?:&&|;)\s*", command):
        found += ["toy new playground", "cd playground", "toy train"] if part == "make train" else [part]
    return [part for part in found if not part.startswith(DONE_ALREADY)]


def shortened(part: str) -> str:
    """`toy train …` of a few steps; a pipe after it stays."""
    first, pipe, rest = part.partition("|")
    if first.startswith("toy train") and "--dry-run" not in first and "--resume" not in first:
        words = [word for word in shlex.split(first) if word not in ("--json",)]
        first = shlex.join([*words, *SHORT]) + " "
    return first + pipe + rest


def stem(line: str) -> str:
    """What stays the same of a line from run to run: the words before its first number, path or quote."""
    return re.split(r"[0-9'\"`/~…]", line, maxsplit=1)[0].rstrip(" (")


def test_every_command_runs_and_prints_what_is_shown(toy: Toy) -> None:
    commands = shown_commands()
    assert any("toy " in shown.command for shown in commands), "README shows no command"
    bin_dir = Path(sys.executable).parent
    env = toy.environment()
    env["PATH"] = f"{bin_dir}:{env['PATH']}"
    at = toy.cwd
    for name in ("data", "tests", "toy"):
        (at / name).symlink_to(ROOT / name)
    start = at
    for shown in commands:
        said = ""
        for part in parts(shown.command):
            if part.startswith("cd "):
                wanted = Path(part[3:].strip())
                # into the clone: that is where we are
                at = start if wanted.name == "toy" else (at / wanted).resolve()
                assert at.is_dir(), f"README goes to {wanted}, which is not there"
                continue
            if not re.match(r"(\S+=\S+ )*(toy|python|echo|cat|head|ls|make) ?", part):
                raise AssertionError(f"README shows a command that this test does not know: {part}")
            if part.startswith("make "):
                continue
            done = subprocess.run(
                ["bash", "-c", shortened(part)],
                cwd=at,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            wants_error = any(line.startswith("error: ") for line in shown.output)
            assert (done.returncode != 0) == wants_error, f"{part}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            said += done.stdout + done.stderr
        lines = [" ".join(line.split()) for line in said.splitlines()]
        for line in shown.output:
            want = " ".join(stem(line).split())
            # sampled text is indented, or too short to compare
            if line.startswith("    ") or len(want) < 4 or "sample" in shown.command or "infer" in shown.command:
                continue
            assert any(have.startswith(want) for have in lines), f"{shown.command}: nothing like {line!r} in\n{said}"


def test_the_make_targets_are_there() -> None:
    lines = re.findall(r"^((?:[a-z-]+ ?)+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    rules = {rule for line in lines for rule in line.split()}
    named = set(re.findall(r"(?:`|^ +|^\$ )make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"train", "test"} <= named
    assert named <= rules


def test_the_files_that_readme_names_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def presets() -> list[str]:
    return sorted(path.stem for path in (ROOT / "toy" / "config" / "presets").glob("*.yml"))


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_be_trained(cold_toy: Toy, name: str) -> None:
    """Its values are in range, go together, and fit into a small machine."""
    images = ["--images", ROOT / "data" / "digits"] if name.startswith("vit") else []
    plan = cold_toy("train", "--preset", name, *images, "--dry-run", "--json").ok().document
    assert plan["memory"]["total"] < 4 << 30
    assert plan["steps"] > 0


def test_the_help_names_every_command(cold_toy: Toy) -> None:
    """README's tour and `toy --help` tell of the same commands."""
    manifest = cold_toy("--manifest").ok().document
    names = {command["name"] for command in manifest["commands"]}
    text = README.read_text(encoding="utf-8")
    told = set(re.findall(r"\btoy ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|```.*?```", text, re.DOTALL))))
    assert {"new", "train", "infer", "runs", "list"} <= told
    assert told <= names, f"README tells of commands that are not there: {told - names}"
