"""`toy train` from the outside: the bundle, the documents, the streams, the memory."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Trained
from harness import TINY, Toy, environment_of, read_events, sets, tree

STEP = re.compile(r"step ([1-9][0-9]*): loss=([0-9.e+-]+)")


# --- the bundle -----------------------------------------------------------------------------------------------------


def test_the_bundle_is_complete(trained: Trained) -> None:
    names = {path.name for path in trained.run.iterdir()}
    assert names == {
        "config.json", "config.kv", "meta.json", "events.jsonl", "losses.txt", "checkpoints", "weights", "loss.svg",
    }  # fmt: skip
    saved = {path.name: path for path in (trained.run / "checkpoints").iterdir()}
    assert set(saved) == {"step_40", "step_50", "latest", "best"}
    assert saved["latest"].readlink() == Path("step_50")
    assert (saved["latest"] / "DONE").is_file()
    assert (saved["best"] / "DONE").is_file()
    assert [path.name for path in (trained.run / "weights").iterdir()] == ["model.gguf"]
    assert ElementTree.parse(trained.run / "loss.svg").getroot().tag.endswith("svg")


def test_stdout_in_a_pipe_is_the_step_lines(trained: Trained) -> None:
    from toy import _native

    lines = trained.result.stdout.splitlines()
    assert (trained.run / "losses.txt").read_text() == trained.result.stdout
    matches = [STEP.fullmatch(line) for line in lines]
    assert all(matches), lines
    assert [int(match[1]) for match in matches if match] == list(range(1, 51))
    for match in matches:
        assert match is not None
        assert _native.shortest(float(match[2])) == match[2]


def test_the_summary_is_on_stderr(trained: Trained) -> None:
    said = trained.result.stderr
    assert re.search(r"validation loss \d\.\d+", said)
    assert "weights/model.gguf" in said
    assert "toy infer" in said


def test_the_model_file_speaks_for_itself(trained: Trained) -> None:
    from toy import _native

    model = _native.gguf_read(str(trained.gguf))
    meta, shape = model["metadata"], trained.config["model"]
    assert meta["general.architecture"] == "llama"
    assert meta["llama.embedding_length"] == shape["n_embd"]
    assert meta["llama.attention.head_count_kv"] == shape["n_head_kv"]
    assert len(meta["tokenizer.ggml.tokens"]) == shape["vocab_size"] == 257
    assert {tensor["type"] for tensor in model["tensors"]} == {"F32"}


def test_events_begin_and_end(trained: Trained) -> None:
    events = read_events(trained.run)
    assert [events[0]["kind"], events[-1]["kind"]] == ["run_start", "run_end"]
    assert {event["schema"] for event in events} == {"toy/v1"}
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    start, end = events[0], events[-1]
    assert start["tokens_per_step"] == 4 * 64
    assert start["train_tokens"] + start["val_tokens"] == 20001
    assert (end["reason"], end["step"], end["error"]) == ("done", 50, None)
    assert Path(end["gguf"]) == trained.gguf
    assert end["final_loss"] == pytest.approx(float(trained.result.steps[-1].split("=")[1]), abs=1e-9)


def test_step_events_hold_what_the_contract_names(trained: Trained) -> None:
    steps = read_events(trained.run, "step")
    assert [event["step"] for event in steps] == list(range(1, 51))
    for event in steps:
        assert event["grad_norm"] > 0
        assert event["tokens_per_second"] > 0
        assert event["tokens"] == event["step"] * 256
        assert event["rss_bytes"] > 1 << 20
    rates = [event["learning_rate"] for event in steps]
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-4)
    evals = read_events(trained.run, "eval")
    assert [event["step"] for event in evals] == [25, 50]
    assert evals[0]["best"] is True
    # every 20 steps, at the end, and where validation was best
    assert [event["step"] for event in read_events(trained.run, "checkpoint")] == [20, 25, 40, 50]


def test_meta_says_how_it_was_made(trained: Trained) -> None:
    meta = json.loads((trained.run / "meta.json").read_text())
    assert meta["argv"][:2] == ["toy", "train"]
    assert "0001" in " ".join(meta["ggml"]["patches"])
    assert meta["build"]["compiler_version"]
    assert meta["cpu"]["name"]
    assert len(meta["datasets"]["train"]["sha256"]) == 64


def test_config_json_repeats_the_run(trained: Trained, toy: Toy) -> None:
    again = toy("train", "--config", trained.run / "config.json", "--no-sample", "--out", "again").ok()
    assert again.stdout == trained.result.stdout
    ours = json.loads((toy.cwd / "again" / "config.json").read_text())
    assert ours == trained.config


def test_nothing_is_left_at_auto(trained: Trained) -> None:
    config = trained.config
    assert config["model"]["n_ff"] == 192
    assert config["model"]["vocab_size"] == 257
    assert config["train"]["warmup_steps"] == 5
    assert config["train"]["micro_batch"] == 4
    assert config["run"]["threads"] > 0
    lines = (trained.run / "config.kv").read_text().splitlines()
    knobs = sum(len(section) for name, section in config.items() if name != "format")
    assert len(lines) == knobs
    assert "model.n_ff=192" in lines


# --- documents and streams ------------------------------------------------------------------------------------------


def test_json_is_one_document(toy: Toy, trained: Trained) -> None:
    result = toy("train", *TINY, "--steps", 5, "--json").ok()
    document = result.document
    assert document["format"] == "toy/train-v1"
    run = Path(document["run_dir"])
    assert run.parent == toy.cwd / "runs"
    assert run.name == document["run_id"]
    assert (document["recipe"], document["arch"], document["device"]) == ("from-scratch", "llama", "cpu")
    assert (document["steps"], document["seed"]) == (5, 1337)
    lines = (run / "losses.txt").read_text().splitlines()
    assert [f"step {n}: loss={loss}" for n, loss in enumerate(document["losses"], 1)] == lines
    assert all(isinstance(loss, str) for loss in document["losses"])
    assert document["final_loss"] == pytest.approx(float(document["losses"][-1]), abs=1e-9)
    assert 0 < document["val_loss"] < 6
    assert document["tokens_per_second"] > 0
    assert document["seconds"] > 0
    assert document["parameters"] == 123264
    assert Path(document["gguf"]).is_file()
    assert (Path(document["checkpoint"]) / "DONE").is_file()
    assert document["error"] is None
    assert (toy.cwd / "runs" / "latest").resolve() == run


def test_the_recipe_can_be_a_word(toy: Toy) -> None:
    word = toy("train", "from-scratch", *TINY, "--steps", 2).ok()
    flag = toy("train", "--recipe", "from-scratch", *TINY, "--steps", 2).ok()
    assert word.stdout == flag.stdout


def test_two_runs_at_once_share_no_directory(toy: Toy) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(toy("train", *TINY, "--steps", 3, "--json"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    documents = [result.ok().document for result in results]
    assert len({document["run_dir"] for document in documents}) == 3
    assert len({tuple(document["losses"]) for document in documents}) == 1


def test_a_project_from_new_to_infer(toy: Toy) -> None:
    toy("new", "play").ok()
    project = toy.cwd / "play"
    assert {path.name for path in project.iterdir()} == {"toy.yml", "data", "runs", "README.md", ".gitignore"}
    packed = tree(project / "data")
    small = sets(
        model__n_layer=1, model__n_embd=32, model__n_head=2, model__n_head_kv=1, model__context=32, train__batch=2
    )
    toy("train", "--steps", 5, *small, "--set", "eval.batches=1", "--no-sample", cwd=project).ok()
    assert tree(project / "data") == packed, "training packed the project's corpus again"
    said = toy("infer", "runs/latest", "--prompt", "The ", "--n", 5, "--temperature", 0, cwd=project).ok()
    assert said.stdout
    [row] = toy("runs", "--json", cwd=project).ok().document["runs"]
    assert (row["state"], row["step"]) == ("done", 5)
    again = toy("new", "play")
    assert again.code == 2
    toy("new", "play", "--force").ok()


def test_a_terminal_sees_a_live_line(toy: Toy) -> None:
    ours, theirs = pty.openpty()
    env = toy.environment({"TERM": "xterm-256color", "NO_COLOR": None})
    argv = toy.argv("train", *TINY, "--steps", 20)
    with subprocess.Popen(argv, cwd=toy.cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux ends a terminal whose other side is closed with EIO
                break
            if not data:
                break
            seen += data
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0, text
    assert "step 20/20" in text
    assert "tok/s" in text
    assert re.search(r"validation loss \d", text)
    assert "step 1: loss=" not in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's environment")
def test_a_runner_sees_nothing_of_the_callers_environment(toy: Toy) -> None:
    with toy.start("train", *TINY, "--steps", 100000, env={"SECRET_TOKEN": "s", "TOY_DEBUG": "1"}) as process:
        seen = environment_of(process.runner())
        process.read_step(1)  # before it there is nothing to keep, and the run's directory goes
        process.interrupt(group=False)
        process.finish()
    run = toy.cwd / "runs" / "latest"
    assert "SECRET_TOKEN" not in seen
    assert "TOY_DEBUG" not in seen
    assert seen["TOY_RUN_DIR"] == seen["TAO_RUN_DIR"] == str(run.resolve())
    assert seen["TOY_CONFIG"] == str(run.resolve() / "config.kv")
    assert (seen["RECIPE"], seen["STEPS"], seen["SEED"]) == ("from-scratch", "100000", "1337")
    assert Path(seen["CORPUS"]).is_file()


# --- dry run and memory ---------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(cold_toy: Toy, home: dict[str, str]) -> None:
    places = (cold_toy.cwd, Path(home["HOME"]))
    before = tree(*places)
    result = cold_toy("train", *TINY, "--dry-run").ok()
    plan = cold_toy("train", *TINY, "--dry-run", "--json").ok().document
    assert tree(*places) == before
    assert "nothing was written" in result.stdout
    assert plan["format"] == "toy/plan-v1"
    assert plan["parameters"] == 123264
    assert plan["memory"]["weights"] == 4 * 123264
    assert plan["memory"]["moments"] == 2 * plan["memory"]["weights"]
    assert plan["memory"]["total"] == sum(value for part, value in plan["memory"].items() if part != "total")
    assert plan["tokens_per_step"] == 256
    assert plan["seconds"] > 0
    assert any(file.endswith("weights/model.gguf") for file in plan["files"])


MEMORY_SHAPES = {
    "tiny": [],
    "wide": sets(model__n_embd=256, model__n_layer=4, model__n_head=8, model__context=128, train__batch=4),
    "deep-accumulated": sets(
        model__n_layer=12, model__n_embd=128, model__context=128, train__batch=4, train__micro_batch=1
    ),
    "long": sets(model__n_embd=128, model__context=512, train__batch=2),
    "large-vocabulary": sets(model__n_embd=256, model__vocab_size=16384, train__batch=8),
}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise elsewhere")
@pytest.mark.parametrize("shape", MEMORY_SHAPES)
def test_the_dry_run_knows_the_peak(toy: Toy, shape: str) -> None:
    flags = (*TINY, "--steps", 3, *MEMORY_SHAPES[shape], *sets(eval__batches=1))
    planned = toy("train", *flags, "--dry-run", "--json").ok().document["memory"]["total"]
    measured = toy("train", *flags, "--json").ok().document["peak_rss_bytes"]
    assert planned == pytest.approx(measured, rel=0.1), (planned, measured)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise elsewhere")
def test_memory_does_not_grow(toy: Toy) -> None:
    knobs = sets(
        model__n_layer=1, model__n_embd=32, model__n_head=2, model__context=16, train__batch=2, eval__every=0,
        data__val_fraction=0.0,
    )  # fmt: skip
    # one thread: a thousand steps of nothing much would be spent in barriers
    toy("train", *TINY, *knobs, "--steps", 1000, "--threads", 1, "--out", "run").ok()
    resident = {event["step"]: event["rss_bytes"] for event in read_events(toy.cwd / "run", "step")}
    # What is there may still be touched for the first time: the 132 KiB that malloc starts with, page by page. A leak
    # of 150 bytes a step would be found, and once all is touched, any.
    assert resident[1000] - resident[10] <= 144 * 1024, resident
    assert resident[1000] <= resident[500], resident


# --- the loss is not finite -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(toy: Toy) -> None:
    import numpy as np

    # the weights grow ninefold at each step: lr * weight_decay = 10
    wild = sets(
        train__learning_rate=10, train__min_learning_rate=10, train__weight_decay=1, train__grad_clip=0,
        train__warmup_steps=0, train__steps=1000,
    )  # fmt: skip
    result = toy("train", *TINY, *wild, "--out", "run", "--json")
    assert result.code == 1
    document = result.document
    assert document["error"]["kind"] == "non_finite"
    assert "step" in document["error"]["message"]
    assert document["error"]["hint"]
    last = len(document["losses"])
    assert 0 < last < 100
    assert all(math.isfinite(float(loss)) for loss in document["losses"])
    run = toy.cwd / "run"
    end = read_events(run)[-1]
    assert (end["kind"], end["reason"], end["step"]) == ("run_end", "non_finite", last)
    assert end["error"]["tensor"] in document["error"]["message"]

    # the last good weights are kept: in the GGUF and in a checkpoint of that step
    from toy import _native

    assert (run / "checkpoints" / f"step_{last}" / "DONE").is_file()
    model = _native.gguf_read(str(run / "weights" / "model.gguf"))
    data = np.fromfile(run / "weights" / "model.gguf", dtype=np.uint8)
    for tensor in model["tensors"]:
        start = model["data_offset"] + tensor["offset"]
        assert np.isfinite(data[start : start + tensor["n_bytes"]].view(np.float32)).all(), tensor["name"]

    plain = toy("train", *TINY, *wild, "--out", "other")
    assert plain.code == 1
    assert plain.stderr.splitlines()[-2].startswith("error: ")
    assert plain.stderr.splitlines()[-1].startswith("hint: ")
    assert plain.steps == [f"step {n}: loss={loss}" for n, loss in enumerate(document["losses"], 1)]


# --- early stop -----------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_no_longer_improves(toy: Toy) -> None:
    # with a learning rate of nothing the first validation stays the best
    frozen = sets(train__learning_rate=0, eval__every=2, eval__patience=3, eval__batches=1)
    document = toy("train", *TINY, *frozen, "--steps", 30, "--json").ok().document
    assert document["reason"] == "early_stop"
    assert document["step"] == 2 + 3 * 2
    assert Path(document["gguf"]).is_file()


def test_nothing_stale_costs_nothing(toy: Toy, trained: Trained) -> None:
    """A second `toy install` builds nothing: the runners keep their times."""
    first = toy("install", "--json").ok().document["runners"]
    assert all(row["was_fresh"] for row in first)
