"""`toy runs` from the outside, on real runs: listing, showing, comparing, drawing, removing."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from harness import TINY, Toy, read_events, tree

STEPS = 20


def train(toy: Toy, *flags: object) -> Path:
    document = toy("train", *TINY, "--set", "eval.every=10", "--set", "eval.batches=1", *flags, "--json").ok().document
    return Path(document["run_dir"])


@pytest.fixture(scope="module")
def project(home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A whole run, one with another learning rate, one with a checkpoint on the way, and one that goes on from it."""
    toy = Toy(tmp_path_factory.mktemp("runs-cli"), home)
    # what a resumed run repeats is the same run: schedule and steps do not change
    whole = train(toy, "--steps", STEPS, "--name", "whole", "--set", "checkpoint.every=8")
    train(toy, "--steps", STEPS, "--name", "other", "--set", "train.learning_rate=0.01")
    checkpoint = whole / "checkpoints" / "step_16"
    assert checkpoint.is_dir()
    toy("train", "--resume", checkpoint, "--no-sample", "--name", "resumed").ok()
    return toy


def ids(toy: Toy) -> dict[str, str]:
    rows = toy("runs", "--json").ok().document["runs"]
    return {row["name"]: row["run_id"] for row in rows}


@pytest.fixture
def copy(project: Toy, tmp_path: Path) -> Toy:
    """The same runs, to be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(project.cwd, folder, symlinks=True)
    return Toy(folder, project.env)


def test_the_list_is_the_default(project: Toy) -> None:
    bare, verb = project("runs").ok().stdout, project("runs", "list").ok().stdout
    assert bare == verb
    assert len(bare.splitlines()) == 4
    assert len(project("runs", "-n", 1).ok().stdout.splitlines()) == 2
    assert project("runs", project.cwd).ok().stdout == bare
    assert project("runs", "--json").ok().document["format"] == "toy/runs-v1"
    assert project("runs", "--json", "show", "latest").ok().document["format"] == "toy/runs-show-v1"


def test_show_tells_a_run_in_full(project: Toy) -> None:
    whole = ids(project)["whole"]
    document = project("runs", "show", whole, "--json").ok().document
    lines = (project.cwd / "runs" / whole / "losses.txt").read_text().splitlines()
    assert document["losses"] == {
        "first": lines[0].split("=")[1], "last": lines[-1].split("=")[1], "steps": STEPS,
    }  # fmt: skip
    assert document["knobs"]["train.steps"]["value"] == STEPS
    assert "run.threads" not in document["knobs"], "what auto came to is nobody's choice"
    assert "model.vocab_size" not in document["knobs"]
    assert len(document["datasets"]["train"]["sha256"]) == 64
    assert [one["step"] for one in document["evaluations"]] == [10, 20]
    assert "latest" in document["checkpoints"][-1]["marks"]
    assert document["checkpoints"][-1]["step"] == STEPS
    sizes = {file["path"]: file["size"] for file in document["files"]}
    assert sizes["weights/model.gguf"] == Path(document["gguf"]).stat().st_size
    assert document["size"] == sum(sizes.values())
    assert (document["state"], document["reason"], document["resumed_from"]) == ("done", "done", None)
    text = project("runs", "show", whole).ok().stdout
    for word in ("train.learning_rate", "weights/model.gguf", "step 16", "validation loss", "state"):
        assert word in text


def test_a_resumed_run_says_so_and_is_equal(project: Toy) -> None:
    names = ids(project)
    document = project("runs", "show", names["resumed"], "--json").ok().document
    assert document["resumed_from"].endswith(f"{names['whole']}/checkpoints/step_16")
    said = project("runs", "compare", names["whole"], names["resumed"], "--assert-equal").ok().stdout
    assert "equal: steps 1 to 20, and the weights of step 20" in said


def test_other_runs_are_not(project: Toy) -> None:
    names = ids(project)
    result = project("runs", "compare", names["whole"], names["other"], "--assert-equal")
    assert result.code == 1
    assert "differ at step 2" in result.stderr
    document = project("runs", "compare", names["whole"], names["other"], "--assert-equal", "--json").document
    assert document["format"] == "toy/runs-compare-v1"
    assert document["error"]["kind"] == "gate_mismatch"
    assert document["error"]["difference"]["step"] == 2

    plain = project("runs", "compare", names["whole"], names["other"], "--json").ok().document
    assert plain["knobs"]["train.learning_rate"][1] == 0.01
    assert "train.steps" not in plain["knobs"]
    assert plain["datasets"] == plain["circumstances"] == {}
    assert plain["lines"][0]["difference"]["step"] == 2
    table = project("runs", "compare", names["whole"], names["other"], names["resumed"]).ok().stdout
    assert "train.learning_rate" in table
    assert "the same step lines from 1 to 20" in table


def test_weights_that_differ_alone_are_found(copy: Toy) -> None:
    names = ids(copy)
    gguf = copy.cwd / "runs" / names["resumed"] / "weights" / "model.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    gguf.write_bytes(data)
    result = copy("runs", "compare", names["whole"], names["resumed"], "--assert-equal")
    assert result.code == 1
    assert "other weights at step 20: " in result.stderr
    assert ".weight (byte" in result.stderr


def test_one_picture_of_several(project: Toy, tmp_path: Path) -> None:
    names = ids(project)
    project("runs", "plot", names["whole"], names["other"], "--out", tmp_path / "a.svg").ok()
    text = (tmp_path / "a.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert names["other"] in text
    document = project("runs", "plot", "latest", "--out", tmp_path / "a.png", "--json").ok().document
    assert document["format"] == "toy/runs-plot-v1"
    assert Path(document["file"]).read_bytes().startswith(b"\x89PNG")


def test_removing(copy: Toy) -> None:
    names = ids(copy)
    runs = copy.cwd / "runs"
    before = tree(runs)
    said = copy("runs", "rm", names["other"], "--dry-run").ok().stdout
    assert names["other"] in said and "nothing was removed" in said
    assert copy("runs", "rm", names["other"]).code == 2
    assert copy("runs", "rm", names["other"], "--json").code == 2
    assert tree(runs) == before
    copy("runs", "rm", names["whole"], "--checkpoints-only", "--yes").ok()
    assert not (runs / names["whole"] / "checkpoints").exists()
    assert (runs / names["whole"] / "weights" / "model.gguf").is_file()
    document = copy("runs", "rm", names["other"], "latest", "--yes", "--json").ok().document
    assert document["format"] == "toy/runs-rm-v1"
    assert [row["run"] for row in document["removed"]] == [names["other"], names["resumed"]]
    assert set(ids(copy)) == {"whole"}
    assert (runs / "latest").resolve().name == names["whole"]


@pytest.mark.parametrize("answer", ["n", "y"])
def test_a_terminal_is_asked(copy: Toy, answer: str) -> None:
    name = ids(copy)["other"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        copy.argv("runs", "rm", name), cwd=copy.cwd, env=copy.environment(), stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        seen = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                break
            if not data:
                break
            seen += data
    os.close(ours)
    assert f"remove run {name}" in seen.decode()
    assert process.returncode == (0 if answer == "y" else 130)
    assert (copy.cwd / "runs" / name).exists() == (answer == "n")


def test_a_run_that_is_running_stays(copy: Toy) -> None:
    with copy.start("train", *TINY, "--steps", 100000, "--name", "running") as process:
        process.read_step(2)
        name = ids(copy)["running"]
        result = copy("runs", "rm", name, "--yes")
        assert result.code == 2
        assert "is running" in result.stderr
        assert copy("runs", "show", name, "--json").ok().document["state"] == "running"
        assert "is running" in copy("gate", "metric", name, "steps>=1").stderr
        process.interrupt(group=False)
        process.finish()
    copy("runs", "rm", name, "--yes").ok()


def test_a_gate_on_a_real_run(copy: Toy) -> None:
    name = ids(copy)["whole"]
    end = read_events(copy.cwd / "runs" / name, "run_end")[-1]
    copy("gate", "metric", name, f"val_loss<={end['val_loss'] + 0.01}", "steps==20", "perplexity<300").ok()
    assert copy("gate", "metric", name, f"val_loss<{end['val_loss'] - 0.01}").code == 1
    assert copy("runs", "show", name, "--json").ok().document["quality_gate"] == "failed"
    assert read_events(copy.cwd / "runs" / name, "run_end")[-1] == end


BAD = [
    (["show", "nothing"], "missing_file", "toy runs"),
    (["show"], "bad_flag", "--help"),
    (["shwo", "latest"], "bad_flag", "did you mean `toy runs show`?"),
    (["compare", "latest"], "bad_flag", "lists them"),
    (["compare", "latest", "latest"], "bad_flag", "lists them"),
    (["compare", "latest", "nothing"], "missing_file", "toy runs"),
    (["plot", "latest", "--out", "a.gif"], "bad_flag", "losses.svg"),
    (["plot", "latest", "--out", "none/a.svg"], "bad_flag", "--out"),
    (["rm"], "bad_flag", "--help"),
    (["rm", "nothing", "--yes"], "missing_file", "toy runs"),
    (["rm", "runs", "--yes"], "missing_file", "toy runs"),
    (["rm", "elsewhere", "--yes"], "bad_flag", "yourself"),
]


@pytest.mark.parametrize(("words", "kind", "hint"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_input(copy: Toy, words: list[str], kind: str, hint: str) -> None:
    shutil.copytree(copy.cwd / "runs" / ids(copy)["other"], copy.cwd / "elsewhere", symlinks=True)
    before = tree(copy.cwd)
    result = copy("runs", *words)
    assert result.code == 2
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]
    assert hint in result.stderr.splitlines()[1]
    assert copy("runs", *words, "--json").document["error"]["kind"] == kind
    assert tree(copy.cwd) == before
