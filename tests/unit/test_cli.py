"""The command table, help, manifest, and the shape of errors, through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Toy, tree

from toy.cli import COMMANDS
from toy.errors import KINDS

pytest.importorskip("toy._native", reason="the module is built by pip install")


def two_lines(stderr: str) -> list[str]:
    lines = stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], stderr
    return lines


def test_help_lists_the_table_and_is_quick(cold_toy: Toy) -> None:
    text = cold_toy("--help").ok().stdout
    for name, entry in COMMANDS.items():
        assert name in text
        assert entry.help.rstrip(".") in " ".join(text.split())


def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys; from toy.cli import run; run(['--help']);"
        "heavy = {'pydantic', 'rich', 'numpy', 'matplotlib', 'yaml', 'tokenizers', 'toy.config', 'toy._native'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("toy.cli.train, toy.cli.inputs, toy.corpora, toy.runs.bundle", {"numpy", "matplotlib", "PIL", "rich"}),
        ("toy.cli.infer, toy.models.adapters, toy.models.generate", {"numpy", "pydantic", "yaml", "toy.config"}),
    ],
)
def test_first_words_wait_for_nothing_heavy(modules: str, heavy: set[str]) -> None:
    """What a run of text does not use would take most of the time before its first step or token."""
    code = f"import sys, {modules}; sys.exit(' '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(cold_toy: Toy, name: str) -> None:
    text = cold_toy(name, "--help").ok().stdout
    assert "--json" in text
    assert "Usage: toy" in text


def test_the_manifest(cold_toy: Toy) -> None:
    document = cold_toy("--manifest").ok().document
    assert document["format"] == "toy/manifest-v1"
    assert [command["name"] for command in document["commands"]] == list(COMMANDS)
    train = next(command for command in document["commands"] if command["name"] == "train")
    options = {flag: option for option in train["options"] for flag in option.get("flags", [])}
    named = {
        "recipe",
        "arch",
        "device",
        "config",
        "preset",
        "set",
        "steps",
        "seed",
        "threads",
        "corpus",
        "model",
        "rank",
    }
    for flag in named | {"init", "images", "out", "resume", "stop-after"}:
        assert f"--{flag}" in options
    assert options["--steps"]["type"] == "integer"
    assert options["--dry-run"]["type"] == "flag"
    assert document["error_kinds"] == KINDS
    gate = next(command for command in document["commands"] if command["name"] == "gate")
    assert {command["name"] for command in gate["commands"]} >= {"record", "check"}


def test_version(cold_toy: Toy) -> None:
    assert cold_toy("--version").ok().stdout.startswith("toy 0.")


BAD = [
    (["trian"], "bad_flag", "did you mean `toy train`?"),
    (["train", "--stepz", "3"], "bad_flag", "did you mean --steps?"),
    (["train", "--steps", "x"], "bad_flag", "--help"),
    (["train", "--steps", "0"], "bad_config", "Optimizer updates"),
    (["train", "from-scrach"], "bad_flag", "did you mean from-scratch?"),
    (["train", "lora"], "bad_flag", "--model"),
    (["train", "lora", "--arch", "vit"], "not_available", "--recipe vit-tiny"),
    (["train", "vit-tiny", "--arch", "llama"], "not_available", "leave --arch out"),
    (["train", "vit-tiny"], "bad_flag", "--images"),
    (["train", "warm-start"], "bad_flag", "--init scratch"),
    (["train", "lora", "--recipe", "warm-start"], "bad_flag", "name one"),
    (["train", "--arch", "lama"], "bad_flag", "did you mean llama?"),
    (["train", "--device", "cpuu"], "bad_flag", "did you mean cpu?"),
    (["train", "--rank", "4"], "bad_flag", "--recipe lora"),
    (["train", "--images", "x"], "bad_flag", "--recipe vit-tiny"),
    (["train", "--init", "x"], "bad_flag", "--recipe warm-start"),
    (["train", "warm-start", "--init", "donr"], "bad_config", "did you mean donor?"),
    (["train", "--stop-after", "soon"], "bad_config", "Save and stop"),
    (["train", "--set", "lora.rank=4"], "bad_config", "--recipe lora"),
    (["train", "lora", "--preset", "vit-mnist"], "bad_flag", "leave the preset out"),
    (["train", "--set", "train.batchh=3"], "bad_config", "did you mean train.batch?"),
    (["train", "--set", "trian.batch=3"], "bad_config", "did you mean train.batch?"),
    (["train", "--preset", "tyny"], "bad_flag", "did you mean tiny?"),
    (["train", "--config", "none.yml"], "missing_file", "check the path"),
    (["train", "--corpus", "none.txt"], "missing_file", "corpus"),
    (["train", "--resume", "none"], "missing_file", "toy runs"),
    (["train", "--set", "run_id_template={foo}"], "bad_config", "{arch}"),
    (["train", "--set", "model.n_embd=100", "--set", "model.n_head=3"], "bad_config", "model.n_head"),
    (["train", "--out", "file/below"], "bad_flag", "--out"),
    (["train", "--threads", "513"], "bad_config", "run.threads"),
    (["infer", "x", "--threads", "513"], "bad_flag", "toy infer --help"),
    (["infer", "x", "--n", "9" * 20], "bad_flag", "toy infer --help"),
    (["infer", "x", "--context", "9" * 20], "bad_flag", "toy infer --help"),
    (["infer", "x", "--temperature", "nan"], "bad_flag", "toy infer --help"),
    (["infer", "x", "--temperature", "inf"], "bad_flag", "toy infer --help"),
    (["infer", "x", "--top-p", "nan"], "bad_flag", "toy infer --help"),
    (["eval", "x", "--threads", "513"], "bad_flag", "toy eval --help"),
    (["eval", "x", "--context", "9" * 12], "bad_flag", "toy eval --help"),
    (["gate"], "bad_flag", "toy gate check"),
    (["gate", "chekc", "a", "b"], "bad_flag", "did you mean `toy gate check`?"),
    (["gate", "check", "nothing", "file"], "bad_file", "step N: loss=V"),
    (["config"], "bad_flag", "toy config show"),
    (["config", "validate"], "missing_file", "toy new"),
    (["config", "show", "--set", "train.steps=x"], "bad_config", "train.steps"),
    (["new", "file"], "bad_flag", "name a new directory"),
    (["new", "."], "bad_flag", "--force"),
    (["new", "play", "--recipe", "lorra"], "bad_flag", "did you mean lora?"),
    (["new", "play", "--recipe", "lora", "--arch", "gpt2"], "not_available", "warm-start"),
    (["new", "play", "--preset", "tinny"], "bad_flag", "did you mean tiny?"),
]


@pytest.mark.parametrize(("argv", "kind", "hint"), BAD, ids=[" ".join(argv) for argv, _, _ in BAD])
def test_bad_input(cold_toy: Toy, argv: list[str], kind: str, hint: str) -> None:
    (cold_toy.cwd / "file").write_text("hello\n")
    before = tree(cold_toy.cwd)
    result = cold_toy(*argv)
    assert result.code == 2
    assert result.stdout == ""
    assert hint in two_lines(result.stderr)[1]
    as_json = cold_toy(*argv, "--json")
    assert as_json.code == 2
    error = as_json.document["error"]
    assert error["kind"] == kind
    assert f"error: {error['message']}" == two_lines(result.stderr)[0]
    if argv[0] in COMMANDS:
        assert as_json.document["format"] == COMMANDS[argv[0]].format
    assert tree(cold_toy.cwd) == before


def test_a_fault_of_our_own_is_one_line_and_debug_shows_it(cold_toy: Toy) -> None:
    # a project folder that vanishes under the command is nothing that it prepares for
    code = (
        "import toy.cli.doctor as d, toy.cli\n"
        "def broken(): raise RuntimeError('a\\nb')\n"
        "d.examine = broken\n"
        "raise SystemExit(toy.cli.run(['doctor', *__import__('sys').argv[1:]]))"
    )

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1
    assert two_lines(done.stderr)[0] == "error: RuntimeError: a b"
    assert "TOY_DEBUG=1" in done.stderr
    assert "Traceback" in run(TOY_DEBUG="1").stderr
    assert json.loads(run("--json").stdout)["error"]["kind"] == "bug"


def test_no_source_of_the_runners(cold_toy: Toy) -> None:
    result = cold_toy("install", env={"TOY_HOME": str(cold_toy.cwd)})
    assert result.code == 2
    assert "TOY_HOME" in two_lines(result.stderr)[0]


def test_a_full_stdout_is_an_error_and_a_closed_one_is_quiet(cold_toy: Toy) -> None:
    argv = cold_toy.argv("config", "show")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, cwd=cold_toy.cwd, check=False)
    assert done.returncode == 1
    assert "no space left" in two_lines(done.stderr)[0]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cold_toy.cwd) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_new_makes_a_whole_project(cold_toy: Toy) -> None:
    document = cold_toy("new", "play", "--preset", "tiny", "--json").ok().document
    project = cold_toy.cwd / "play"
    assert {"toy.yml", "README.md", ".gitignore", "data/python-reference.txt"} <= set(document["files"])
    assert any(name.startswith("data/packed/") and name.endswith("tokens.bin") for name in document["files"])
    assert (project / "runs").is_dir()
    assert os.listdir(cold_toy.cwd) == ["play"], "no temporary folder stays"
    assert cold_toy("config", "validate", cwd=project).ok()
    shown = cold_toy("config", "show", "--json", cwd=project / "data").ok().document
    assert shown["knobs"]["train.steps"]["origin"] == "preset tiny"
    assert shown["config"]["data"]["corpus"] == str(project / "data" / "python-reference.txt")
    (project / "README.md").write_text("mine")
    (project / "notes.txt").write_text("mine")
    assert cold_toy("new", "play").code == 2
    assert (project / "README.md").read_text() == "mine"
    cold_toy("new", "play", "--force").ok()
    assert (project / "README.md").read_text().startswith("# play")
    assert (project / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "recipe", "next_word"),
    [
        (["--recipe", "lora"], "lora", "--model"),
        (["--recipe", "warm-start", "--arch", "gpt2"], "warm-start", "--model"),
        (["--recipe", "vit-tiny"], "vit-tiny", "--images"),
        (["--preset", "vit-mnist"], "vit-tiny", "--images"),
        (["--preset", "nanogpt-char"], "from-scratch", "toy train"),
    ],
)
def test_new_for_every_recipe(cold_toy: Toy, flags: list[str], recipe: str, next_word: str) -> None:
    said = cold_toy("new", "play", *flags).ok().stdout
    assert next_word in said.splitlines()[-1]
    project = cold_toy.cwd / "play"
    shown = cold_toy("config", "show", "--json", cwd=project).ok().document["config"]
    assert shown["run"]["recipe"] == recipe
    text = (project / "toy.yml").read_text()
    assert ("  # rank: 8" in text) == (recipe == "lora")
    assert ("patch_size" in text) == (recipe == "vit-tiny")
    assert ("  corpus: data/" in text) == (recipe != "vit-tiny") == (project / "data" / "python-reference.txt").exists()
    assert next_word in (project / "README.md").read_text()


def test_the_dry_run_writes_nothing(cold_toy: Toy) -> None:
    before = tree(cold_toy.cwd)
    plan = cold_toy("train", "--dry-run", "--preset", "tiny", "--json").ok().document
    assert plan["format"] == "toy/plan-v1"
    assert plan["parameters"] > 100_000
    parts = plan["memory"]
    assert parts["total"] == sum(bytes for part, bytes in parts.items() if part != "total")
    assert plan["tokens_per_step"] == 4 * 64
    assert plan["seconds"] > 0
    assert tree(cold_toy.cwd) == before
    assert "nothing was written" in cold_toy("train", "--dry-run", "--preset", "tiny").ok().stdout


def test_doctor_runs_and_names_the_devices(cold_toy: Toy) -> None:
    document = cold_toy("doctor", "--json").ok().document
    found = {row["what"]: row for row in document["findings"]}
    assert found["device cpu"]["ok"]
    assert {"C++ compiler", "threads", "memory", "cmake", "ninja", "device cuda", "device metal"} <= set(found)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        (99, "loss 2.5 val 2.6 lr 1.00e-03 900 tok/s 1 min 02 s left"),
        (42, "loss 2.5 val 2.6 900 tok/s 1 min 02 s left"),
        (41, "loss 2.5 val 2.6 1 min 02 s left"),
        (31, "loss 2.5 1 min 02 s left"),
        (23, "loss 2.5 val 2.6"),
        (3, "loss 2.5"),
    ],
)
def test_a_narrow_terminal_shows_fewer_numbers(room: int, line: str) -> None:
    from toy.cli.stream import fitting

    numbers = {
        "loss": "loss 2.5", "val": "val 2.6", "lr": "lr 1.00e-03", "speed": "900 tok/s", "left": "1 min 02 s left",
    }  # fmt: skip
    assert fitting(numbers, room) == line
    assert fitting(numbers | {"left": "", "val": ""}, 20) == "loss 2.5 900 tok/s"
