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
from toy.runs import compare, curve, events, gates, history, listing, removing

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


def test_a_run_is_chosen_by_the_beginning_of_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama-1", "llama-12", "vit-1"):
        make_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert runs.choose_run("vit").name == "vit-1"
    assert runs.choose_run("runs/vit").name == "vit-1"
    assert runs.choose_run("llama-1").name == "llama-1", "a whole id is no beginning"
    with pytest.raises(ToyError, match="begins the names of 2 runs") as caught:
        runs.choose_run("llama")
    assert "llama-12" in caught.value.hint
    with pytest.raises(ToyError, match="no such run"):
        runs.choose_run("gpt2")
    with pytest.raises(ToyError):
        runs.find_run("vit")


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


def test_files_that_are_json_and_nothing_of_ours_do_not_break_the_list(tmp_path: Path) -> None:
    """A folder of another program's under runs/ is a row with little in it."""
    run = make_run(tmp_path / "run", config={"run": "fast", "train": [1]})
    (run / "meta.json").write_text('{"datasets": ["a"]}')
    row = listing.summary(run)
    assert (row["recipe"], row["steps"], row["state"]) == (None, None, "killed")
    assert history.changed(run) == {}
    assert history.datasets(run) == {}


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


def test_curves_of_several_runs_are_one_picture(tmp_path: Path) -> None:
    one = curve.Series("one & <two>", [(n, 5.0 / n) for n in range(1, 3000)], [(1000, 2.0), (2000, float("nan"))])
    other = curve.Series("other", [], [(10, 3.0)])
    for name in ("a.svg", "a.png"):
        curve.draw_runs(tmp_path / name, [one, other, curve.Series("third", [(1, 2.0)])])
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.svg"]


# --- what a run's files say of its past -----------------------------------------------------------------------------


def lines_from(first: int, *values: str) -> str:
    return "".join(f"step {n}: loss={value}\n" for n, value in enumerate(values, first))


def save_weights(path: Path, tensors: dict[str, list[float]], step: int) -> None:
    """A GGUF with one-dimensional tensors, written by hand."""
    import struct

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + text("toy.step") + struct.pack("<IQ", 10, step)
    data = b""
    for name, values in tensors.items():
        head += text(name) + struct.pack("<IQIQ", 1, len(values), 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += b"\0" * (-len(data) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def made_run(path: Path, losses: str, step: int, weights: list[float], resume: str = "") -> Path:
    run = make_run(path, event("run_end", reason="done", step=step), {"checkpoint": {"resume": resume}})
    (run / "losses.txt").write_text(losses)
    save_weights(run / "weights" / "model.gguf", {"a": [1.0, 2.0], "b": weights}, step)
    return run


def saved(run: Path, step: int, weights: list[float]) -> Path:
    folder = run / "checkpoints" / f"step_{step}"
    tensors = {"a": [1.0, 2.0], "b": weights}
    moments = {f"{name}.{moment}": values for name, values in tensors.items() for moment in "mv"}
    save_weights(folder / "state.gguf", tensors | moments, step)
    (folder / "DONE").touch()
    return folder


def test_knobs_that_somebody_set(tmp_path: Path) -> None:
    from toy.config import Config, resolve

    config = Config.model_validate({"train": {"steps": 40, "batch": 3}, "model": {"n_embd": 64, "n_ff": 100}})
    resolved = resolve(config, vocab_size=300).model_dump()
    run = make_run(tmp_path / "run", config={"format": "toy/config-v1", **resolved})
    (run / "meta.json").write_text(json.dumps({"datasets": {"train": {"vocab_size": 300}}}))
    changed = history.changed(run)
    assert {key: knob["value"] for key, knob in changed.items()} == {
        "model.n_embd": 64, "model.n_ff": 100, "train.steps": 40, "train.batch": 3,
    }  # fmt: skip
    assert changed["train.batch"]["default"] == 16


def test_a_resumed_run_has_the_lines_of_those_before(tmp_path: Path) -> None:
    first = made_run(tmp_path / "1", lines_from(1, "5", "4", "3.5"), 3, [0.0])
    second = made_run(tmp_path / "2", lines_from(3, "3", "2.5"), 4, [0.0], str(saved(first, 2, [0.0])))
    third = made_run(tmp_path / "3", lines_from(4, "2.75"), 4, [0.0], str(saved(second, 3, [0.0])))
    assert history.resumed_from(first) is None
    assert history.resumed_from(second) == first / "checkpoints" / "step_2"
    assert "".join(f"{line}\n" for line in history.lines(third)) == lines_from(1, "5", "4", "3", "2.75")


def test_runs_that_continue_each_other_in_a_circle_end(tmp_path: Path) -> None:
    first = made_run(tmp_path / "1", lines_from(1, "5"), 1, [0.0], str(tmp_path / "2/checkpoints/step_1"))
    made_run(tmp_path / "2", lines_from(2, "4"), 2, [0.0], str(tmp_path / "1/checkpoints/step_1"))
    assert history.lines(first)


def test_a_line_cut_by_a_kill_does_not_count(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lines_from(1, "5", "4") + "step 3: lo", 2, [0.0])
    assert history.lines(run) == lines("5", "4")


def test_checkpoints_that_are_whole_with_what_points_at_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in (20, 3):
        saved(run, step, [0.0])
    (run / "checkpoints" / "step_30").mkdir()
    (run / "checkpoints" / "latest").symlink_to("step_20")
    found = history.checkpoints(run)
    assert [(one["step"], one["marks"]) for one in found] == [(3, []), (20, ["latest"])]
    assert all(one["size"] > 100 for one in found)


# --- comparing ------------------------------------------------------------------------------------------------------


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    one = made_run(tmp_path / "1", lines_from(1, "5", "4"), 2, [3.0])
    other = made_run(tmp_path / "2", lines_from(1, "5", "4"), 2, [3.0])
    found = compare.require_equal(one, other)
    assert (found["steps"], found["weights"]["step"]) == ([1, 2], 2)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = made_run(tmp_path / "whole", lines_from(1, "5", "4", "3"), 3, [3.0])
    begun = made_run(tmp_path / "begun", lines_from(1, "5", "4"), 2, [2.0])
    rest = made_run(tmp_path / "rest", lines_from(2, "4", "3"), 3, [3.0], str(saved(begun, 1, [1.0])))
    assert compare.require_equal(whole, rest)["steps"] == [1, 3]
    # the run that it continues, which went on past the checkpoint: same lines, and the weights that both have
    found = compare.require_equal(begun, rest)
    assert (found["steps"], found["weights"]["step"]) == ([1, 2], 1)


@pytest.mark.parametrize(
    ("losses", "step", "weights", "words"),
    [
        (lines_from(1, "5", "4.0000005"), 2, [3.0], "differ at step 2: 4 and 4.0000005 (1 ulp apart)"),
        (lines_from(7, "5"), 7, [3.0], "no step in common"),
        (lines_from(1, "5", "4"), 2, [3.5], "other weights at step 2: b (byte 2 of 4)"),
        (lines_from(1, "5", "4"), 2, [3.0, 1.0], "b (F32 1 and F32 2)"),
        (lines_from(1, "5", "4", "3"), 3, [3.0], "no weights of a common step"),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, losses: str, step: int, weights: list[float], words: str
) -> None:
    one = made_run(tmp_path / "1", lines_from(1, "5", "4"), 2, [3.0])
    other = made_run(tmp_path / "2", losses, step, weights)
    with pytest.raises(ToyError) as caught:
        compare.require_equal(one, other)
    assert (caught.value.kind, caught.value.exit_code) == ("gate_mismatch", 1)
    assert words in caught.value.message


def test_an_export_is_compared_with_a_checkpoint_of_its_step(tmp_path: Path) -> None:
    one = made_run(tmp_path / "1", lines_from(1, "5", "4"), 2, [3.0])
    other = made_run(tmp_path / "2", lines_from(1, "5", "4", "3"), 3, [9.0])
    saved(other, 2, [3.0])
    assert compare.require_equal(one, other)["weights"]["step"] == 2
    saved(other, 2, [4.0])
    with pytest.raises(ToyError, match="other weights at step 2"):
        compare.require_equal(one, other)


def test_a_tensor_that_only_one_has(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.gguf", {"x": [1.0], "y": [2.0]}, 1)
    save_weights(tmp_path / "b.gguf", {"x": [1.0]}, 1)
    assert compare.tensors(tmp_path / "a.gguf", tmp_path / "a.gguf") is None
    found = compare.tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert found == {"tensor": "y", "why": "only the first run has it", "tensors": 1}


def test_what_differs_side_by_side(tmp_path: Path) -> None:
    config = {"train": {"steps": 9, "batch": 4}, "run": {"seed": 1}}
    one = make_run(tmp_path / "1", config=config)
    other = make_run(tmp_path / "2", config={"train": {"steps": 9, "batch": 8}, "run": {"seed": 1, "notes": "x"}})
    assert compare.knobs([one, other, one]) == {"train.batch": [4, 8, 4], "run.notes": [None, "x", None]}
    (one / "meta.json").write_text(json.dumps({"datasets": {"train": {"sha256": "a"}}, "cpu": {"name": "x"}}))
    (other / "meta.json").write_text(json.dumps({"datasets": {"train": {"sha256": "b"}}, "cpu": {"name": "x"}}))
    assert compare.datasets([one, other]) == {"train": ["a", "b"]}
    assert compare.circumstances([one, other]) == {}


# --- removing -------------------------------------------------------------------------------------------------------


def test_removing_a_run_moves_latest_on(tmp_path: Path) -> None:
    for name in ("one", "two"):
        runs.point_latest(make_run(tmp_path / name))
    os.utime(tmp_path / "one" / "config.json", (1, 1))
    removing.remove(removing.plan(tmp_path / "two", tmp_path, False))
    assert sorted(os.listdir(tmp_path)) == ["latest", "one"]
    assert (tmp_path / "latest").readlink() == Path("one")
    removing.remove(removing.plan(tmp_path / "one", tmp_path, False))
    assert os.listdir(tmp_path) == []


def test_removing_checkpoints_leaves_the_rest(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lines_from(1, "5"), 1, [1.0])
    saved(run, 1, [1.0])
    plan = removing.plan(run, tmp_path, True)
    assert plan.files == 2
    assert plan.size == (run / "checkpoints" / "step_1" / "state.gguf").stat().st_size
    removing.remove(plan)
    assert set(os.listdir(run)) == {"config.json", "events.jsonl", "losses.txt", "weights"}
    removing.remove(removing.plan(run, tmp_path, True))  # there are none: nothing happens


def test_a_run_that_is_running_or_elsewhere_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    claim = runs.claim_id(folder, "{seq}", VALUES)
    with pytest.raises(ToyError, match="is running"):
        removing.plan(claim.path, folder, False)
    claim.close()
    elsewhere = make_run(tmp_path / "elsewhere")
    (folder / "link").symlink_to(elsewhere)
    (claim.path / "below").mkdir()
    for path in (elsewhere, folder / "link", claim.path / "below", folder, tmp_path):
        with pytest.raises(ToyError, match="nothing outside is removed"):
            removing.plan(path, folder, False)


def test_removing_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    run = make_run(tmp_path / "runs" / "run")
    (run / "link").symlink_to(precious)
    (run / "checkpoints").symlink_to(precious)
    with pytest.raises(ToyError, match="is a link"):
        removing.plan(run, tmp_path / "runs", True)
    removing.remove(removing.plan(run, tmp_path / "runs", False))
    assert os.listdir(precious) == ["file"]


def test_what_a_killed_removal_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / f"{removing.GOING}old-run-999999999").mkdir()
    assert runs.all_runs(tmp_path) == []
    removing.remove(removing.plan(make_run(tmp_path / "run"), tmp_path, False))
    assert os.listdir(tmp_path) == []
