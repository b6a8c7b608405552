"""One run as a row: its state, losses and speed, from its own files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from toy.runs import all_runs, events, history, is_run, is_running

STATES = {
    "done": "done", "early_stop": "done", "stop_after": "interrupted", "interrupted": "interrupted", "killed": "killed",
}  # fmt: skip


def summary(run: Path) -> dict[str, Any]:
    """What is known of a run. `state`: running (a lock is held), done, interrupted, failed or killed."""
    knobs = history.knobs(run)
    row: dict[str, Any] = {
        "run_id": run.name,
        "run_dir": str(run),
        "state": "",
        "recipe": knobs.get("run.recipe"),
        "arch": knobs.get("run.arch"),
        "device": knobs.get("run.device"),
        "name": knobs.get("run.name", ""),
        "steps": knobs.get("train.steps"),
        "step": 0,
        "loss": None,
        "val_loss": None,
        "best_val_loss": None,
        "accuracy": None,
        "tokens_per_second": None,
        "sequences_per_second": None,
        "seconds": None,
        "parameters": None,
        "started": None,
        "gguf": None,
        "checkpoint": None,
        "reason": None,
        "error": None,
        "quality_gate": None,
    }
    end = None
    for event in events.read(run):
        kind = event["kind"]
        if kind == "run_start":
            row |= {"parameters": event.get("parameters"), "started": event.get("time")}
        elif kind == "step":
            row |= {
                "step": event.get("step"),
                "loss": event.get("loss"),
                "tokens_per_second": event.get("tokens_per_second"),
                "sequences_per_second": event.get("sequences_per_second"),
            }
        elif kind == "eval":
            row["val_loss"] = event.get("val_loss")
            losses = [loss for loss in (row["best_val_loss"], row["val_loss"]) if loss is not None]
            row["best_val_loss"] = min(losses, default=None)
            row["accuracy"] = event.get("accuracy")
        elif kind == "checkpoint":
            row["checkpoint"] = event.get("path")
        elif kind == "run_end":
            end = event
        elif kind == "quality_gate":
            row["quality_gate"] = "passed" if event.get("passed") else "failed"
    if end is not None:
        for key, source in (
            ("loss", "final_loss"),
            ("val_loss", "val_loss"),
            ("best_val_loss", "best_val_loss"),
            ("tokens_per_second", "tokens_per_second"),
            ("sequences_per_second", "sequences_per_second"),
            ("seconds", "seconds"),
            ("step", "step"),
            ("reason", "reason"),
            ("error", "error"),
        ):
            if end.get(source) is not None:
                row[key] = end[source]
    if is_running(run):
        row["state"] = "running"
    elif end is not None:
        row["state"] = STATES.get(str(end.get("reason")), "failed")
    else:
        row["state"] = "killed"
    gguf = history.weights(run)
    row["gguf"] = str(gguf) if gguf is not None else None
    return row


def rows(runs: Path) -> list[dict[str, Any]]:
    """Every run under `runs`, oldest first."""
    found = []
    for path in all_runs(runs):
        with contextlib.suppress(OSError):
            if is_run(path) or is_running(path):
                found.append(summary(path))
    return found
