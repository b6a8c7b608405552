"""Run ids and directories, events, listing, gates, the curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

from toy import runs
from toy.errors import ToyError
from toy.runs import curve, events, gates, listing

VALUES = {"arch": "llama", "recipe": "from-scratch", "name": ""}


def event(kind: str, **values: object) -> str:
    return json.dumps({"schema": "toy/v1", "kind": kind, "time": 1.5, **values}) + "\n"


def make_run(path: Path, lines: str = "", config: dict[str, object] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"train": {"steps": 9}}))
    (path / "events.jsonl").write_text(lines)
    return path


# --- ids and directories --------------------------------------------------------------------------------------------


def test_claims_made_at_once_are_all_different(tmp_path: Path) -> None:
    def claim(_: int) -> str:
        return runs.claim_id(tmp_path / "runs", "{arch}-{seq}", VALUES).path.name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(claim, range(40)))
    assert sorted(names) == [f"llama-{n:03d}" for n in range(1, 41)]


def test_a_removed_run_does_not_give_its_number_back_to_the_next(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        runs.claim_id(tmp_path, "{seq}", VALUES)
        if n == 2:
            (tmp_path / "001").rmdir()
    assert sorted(os.listdir(tmp_path)) == ["002", "003"]


def test_a_template_without_seq_still_gives_two_directories(tmp_path: Path) -> None:
    names = [runs.claim_id(tmp_path, "{recipe}-{name}", VALUES).path.name for _ in range(2)]
    assert names == ["from-scratch-run", "from-scratch-run-2"]


def test_names_become_safe_words(tmp_path: Path) -> None:
    assert runs.claim_id(tmp_path, "{name}", {**VALUES, "name": "../a b/ü"}).path.parent == tmp_path


@pytest.mark.parametrize("template", ["{foo}", "{", "a/b", "", "{arch!r}", "{seq:3}", "{0}", "{}", ".hidden", "latest"])
def test_bad_templates(template: str) -> None:
    with pytest.raises(ToyError) as caught:
        runs.check_template(template)
    assert caught.value.kind == "bad_config"


def test_abandoning_leaves_nothing(tmp_path: Path) -> None:
    claim = runs.claim_id(tmp_path / "a" / "runs", "{seq}", VALUES)
    (claim.path / "weights").mkdir()
    (claim.path / "config.json").touch()
    claim.abandon()
    assert os.listdir(tmp_path) == []


def test_abandoning_leaves_other_runs_and_an_out_directory_that_was_there(tmp_path: Path) -> None:
    first = runs.claim_id(tmp_path / "runs", "{seq}", VALUES)
    runs.claim_id(tmp_path / "runs", "{seq}", VALUES).abandon()
    assert first.path.is_dir()
    out = tmp_path / "out"
    out.mkdir()
    claim = runs.claim_out(out)
    (out / "x").touch()
    claim.abandon()
    assert os.listdir(out) == []


def test_an_output_directory_with_another_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run, tmp_path, run / "config.json", run / "config.json" / "below"):
        with pytest.raises(ToyError) as caught:
            runs.check_out(path)
        assert caught.value.exit_code == 2


def test_running_is_a_lock_that_dies_with_its_holder(tmp_path: Path) -> None:
    claim = runs.claim_id(tmp_path, "{seq}", VALUES)
    code = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=(claim.fd,))
    assert runs.is_running(claim.path)
    claim.close()
    assert runs.is_running(claim.path), "the runner holds it on"
    child.kill()
    child.communicate()
    assert not runs.is_running(claim.path)


def test_latest_is_relative_and_replaced(tmp_path: Path) -> None:
    for name in ("one", "two"):
        runs.point_latest(make_run(tmp_path / name))
        assert (tmp_path / "latest").readlink() == Path(name)
    assert [path.name for path in runs.all_runs(tmp_path)] == ["one", "two"]


def test_a_run_is_found_by_id_path_and_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.yml").touch()
    run = make_run(tmp_path / "runs" / "llama-1")
    runs.point_latest(run)
    below = tmp_path / "data"
    below.mkdir()
    monkeypatch.chdir(below)
    for word in ("llama-1", "latest", "runs/latest", str(run)):
        assert runs.find_run(word) == run
    with pytest.raises(ToyError, match="no such run") as caught:
        runs.find_run("lama-1")
    assert "llama-1" in caught.value.hint


# --- events and listing ---------------------------------------------------------------------------------------------


def test_readers_skip_what_they_do_not_know_and_a_torn_last_line(tmp_path: Path) -> None:
    good = event("step", step=1, loss=2.0, surprise={})
    text = (
        good
        + event("party")
        + '{"schema": "toy/v2", "kind": "step"}\n'
        + "[]\nnonsense\n\n"
        + event("step", step=2)[:-9]
    )
    run = make_run(tmp_path / "run", text)
    assert [item["step"] for item in events.read(run)] == [1]


def test_a_follower_gets_each_event_once_however_it_is_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = "".join(event("step", step=n) for n in range(5))
    follower, got = events.Follower(run), []
    for at in range(0, len(text), 7):
        with (run / "events.jsonl").open("a") as file:
            file.write(text[at : at + 7])
        got += [item["step"] for item in follower.new()]
    assert got == [0, 1, 2, 3, 4]


def test_appending_ends_a_torn_line_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", event("step", step=1) + '{"schema": "toy')
    events.append(run, {"kind": "run_end", "reason": "killed"})
    assert [item["kind"] for item in events.read(run)] == ["step", "run_end"]


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (event("run_end", reason="done"), "done"),
        (event("run_end", reason="early_stop"), "done"),
        (event("run_end", reason="interrupted"), "interrupted"),
        (event("run_end", reason="non_finite"), "failed"),
        (event("run_end", reason="killed"), "killed"),
        ("", "killed"),
    ],
)
def test_states(tmp_path: Path, end: str, state: str) -> None:
    lines = event("run_start", parameters=7) + event("step", step=3, loss=1.25) + event("eval", step=3, val_loss=1.5)
    row = listing.summary(make_run(tmp_path / "run", lines + end))
    assert (row["state"], row["step"], row["steps"]) == (state, 3, 9)
    assert (row["loss"], row["val_loss"], row["parameters"]) == (1.25, 1.5, 7)


def test_a_held_run_is_running(tmp_path: Path) -> None:
    claim = runs.claim_id(tmp_path, "{seq}", VALUES)
    assert [row["state"] for row in listing.rows(tmp_path)] == ["running"]
    claim.close()


def test_broken_files_do_not_break_the_list(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "\0\xff\n")
    (run / "config.json").write_text("{")
    (tmp_path / "stray.txt").touch()
    (tmp_path / "latest").symlink_to("nowhere")
    assert [row["run_id"] for row in listing.rows(tmp_path)] == ["run"]


# --- gates ----------------------------------------------------------------------------------------------------------


def lines(*values: str) -> list[str]:
    return [f"step {n}: loss={value}" for n, value in enumerate(values, 1)]


def test_equal_lines() -> None:
    assert gates.compare(lines("1.5", "2"), lines("1.5", "2")) is None


@pytest.mark.parametrize(
    ("want", "got", "step", "ulps", "words"),
    [
        (lines("1", "2.5"), lines("1", "2.5000002"), 2, 1, "1 ulp apart"),
        (lines("1"), lines("1.0000005"), 1, 4, "4 ulps apart"),
        (lines("1"), lines("1.0"), 1, 0, "written differently"),
        (lines("0"), lines("-1e-45"), 1, 1, "1 ulp apart"),
        (lines("1", "2"), lines("1", "nan"), 2, None, "not both are finite"),
        (lines("1", "2"), lines("1"), 2, None, "step 2 is missing"),
        (lines("1"), lines("1", "2"), 2, None, "step 2 is extra"),
        (lines("1")[:1], ["step 2: loss=1"], 1, None, "different steps"),
    ],
)
def test_differences(want: list[str], got: list[str], step: int, ulps: int | None, words: str) -> None:
    difference = gates.compare(want, got)
    assert difference is not None
    assert (difference["step"], difference["ulps"]) == (step, ulps)
    assert words in gates.explain(difference, want, got)


@pytest.mark.parametrize("text", ["", "step 1: loss=1\r\n", "step 1: loss=1\n\n", "hello\n", "step 01: loss=1\n"])
def test_what_is_no_gate(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gate.txt"
    file.write_bytes(text.encode())
    with pytest.raises(ToyError) as caught:
        gates.read_lines(file, "gate")
    assert caught.value.kind == "bad_file"


# --- the curve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2500])
def test_the_curve_is_svg_whatever_there_is_to_draw(tmp_path: Path, n: int) -> None:
    train = [(step, 5.0 / (step + 1)) for step in range(n)]
    curve.draw(
        tmp_path / "loss.svg", [*train, (n, float("nan"))], [(step, loss) for step, loss in train[::100]], "a run"
    )
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    assert root.tag.endswith("svg")
    assert (tmp_path / "loss.svg").stat().st_size < 200_000
    assert os.listdir(tmp_path) == ["loss.svg"]


def test_thinning_keeps_means() -> None:
    xs, ys = curve.thin(list(range(4000)), [float(x) for x in range(4000)])
    assert len(xs) == len(ys) == 1000
    assert ys[0] == 1.5
