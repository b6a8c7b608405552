"""`toy gate metric`: expressions, verdicts, and what is noted in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Toy, read_events
from test_runs import event, make_run

from toy import runs
from toy.errors import ToyError
from toy.runs import listing, metrics

END = {"reason": "done", "step": 9, "final_loss": 2.0, "val_loss": 1.5, "best_val_loss": 1.25, "tokens_per_second": 800}


def ended(path: Path, **more: object) -> Path:
    lines = event("step", step=9, loss=2.0, tokens_per_second=800) + event("eval", step=9, val_loss=1.5, **more)
    return make_run(path, lines + event("run_end", **END))


@pytest.mark.parametrize(
    ("text", "metric", "operator", "threshold"),
    [
        ("val_loss<=1.9", "val_loss", "<=", 1.9),
        (" accuracy >= 0.97 ", "accuracy", ">=", 0.97),
        ("steps==9", "steps", "==", 9.0),
        ("perplexity<1e3", "perplexity", "<", 1000.0),
        ("tokens_per_second>100", "tokens_per_second", ">", 100.0),
    ],
)
def test_expressions(text: str, metric: str, operator: str, threshold: float) -> None:
    assert metrics.parse(text) == metrics.Check(metric, operator, threshold)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("val_los<=1", "did you mean val_loss?"),
        ("speed>1", "tokens_per_second"),
        ("val_loss=1", "in quotes"),
        ("val_loss", "in quotes"),
        ("val_loss<=x", "val_loss<=1.9"),
        ("val_loss<=nan", "val_loss<=1.9"),
        ("val_loss<=inf", "val_loss<=1.9"),
        ("", "in quotes"),
    ],
)
def test_what_is_no_expression(text: str, hint: str) -> None:
    with pytest.raises(ToyError) as caught:
        metrics.parse(text)
    assert (caught.value.kind, caught.value.exit_code) == ("bad_flag", 2)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("val_loss<=1.5", True),
        ("val_loss<1.5", False),
        ("best_val_loss==1.25", True),
        ("final_loss>2", False),
        ("perplexity<=4.4817", True),
        ("perplexity>=4.4817", False),
        ("tokens_per_second>=800", True),
        ("steps>=10", False),
        ("accuracy>=0.75", True),
    ],
)
def test_verdicts(tmp_path: Path, text: str, passed: bool) -> None:
    verdict = metrics.judge(ended(tmp_path / "run", accuracy=0.75), [metrics.parse(text)])
    assert verdict["passed"] is passed
    assert verdict["checks"][0]["expression"] == text


def test_a_metric_that_the_run_lacks_is_bad_input_and_names_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ToyError, match="has no accuracy") as caught:
        metrics.judge(ended(tmp_path / "run"), [metrics.parse("accuracy>=0.5")])
    assert caught.value.exit_code == 2
    assert "perplexity" in caught.value.hint
    assert "accuracy" not in caught.value.hint


def test_a_loss_that_is_not_finite_passes_nothing(tmp_path: Path) -> None:
    lines = event("step", step=1, loss=1.0) + '{"schema":"toy/v1","kind":"eval","step":1,"val_loss":Infinity}\n'
    run = make_run(tmp_path / "run", lines)
    for text in ("val_loss<=1", "val_loss>=1"):
        assert not metrics.judge(run, [metrics.parse(text)])["passed"]


def test_a_running_run_is_not_judged(tmp_path: Path) -> None:
    claim = runs.claim_id(tmp_path, "{seq}", {"arch": "llama", "recipe": "x", "name": ""})
    with pytest.raises(ToyError, match="is running"):
        metrics.judge(claim.path, [metrics.parse("steps>=1")])
    claim.close()


def test_the_verdict_is_noted_apart_from_the_end(cold_toy: Toy) -> None:
    run = ended(cold_toy.cwd / "runs" / "one")
    before = (run / "events.jsonl").read_text()
    good = cold_toy("gate", "metric", "one", "val_loss<=1.9", "steps>=9", "--json").ok().document
    assert (good["format"], good["verb"], good["passed"]) == ("toy/gate-v1", "metric", True)
    bad = cold_toy("gate", "metric", "runs/one", "val_loss<=1.9", "best_val_loss<1")
    assert bad.code == 1
    assert "best_val_loss = 1.25, not < 1" in bad.stderr
    assert bad.stderr.splitlines()[1].startswith("hint: ")
    as_json = cold_toy("gate", "metric", "one", "val_loss<1", "--json")
    assert as_json.code == 1
    error = as_json.document["error"]
    assert error["kind"] == "gate_mismatch"
    assert error["checks"][0]["value"] == 1.5

    assert (run / "events.jsonl").read_text().startswith(before)
    noted = read_events(run, "quality_gate")
    assert [gate["passed"] for gate in noted] == [True, False, False]
    assert [check["metric"] for check in noted[0]["checks"]] == ["val_loss", "steps"]
    row = listing.summary(run)
    assert (row["state"], row["reason"], row["quality_gate"]) == ("done", "done", "failed")


def test_bad_input_notes_nothing(cold_toy: Toy) -> None:
    run = ended(cold_toy.cwd / "runs" / "one")
    before = (run / "events.jsonl").read_text()
    for words in (["one", "loss<=1"], ["one", "accuracy>=1"], ["none", "steps>=1"], ["one"]):
        result = cold_toy("gate", "metric", *words)
        assert result.code == 2, words
        assert result.stderr.startswith("error: ")
    assert (run / "events.jsonl").read_text() == before


def test_the_verdict_stays_readable_after_a_torn_line(cold_toy: Toy) -> None:
    run = ended(cold_toy.cwd / "runs" / "one")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"schema": "toy')
    cold_toy("gate", "metric", "one", "steps>=1").ok()
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "quality_gate"
