"""Quality gates: `val_loss<=1.9`, read, measured against a run's own events, and noted in its bundle."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.errors import ToyError, nearest, os_errors
from toy.runs import events, is_running, listing

#: Every metric of a run: what it is, and how the run's row gives it.
METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "val_loss": ("the last validation loss", lambda row: row["val_loss"]),
    "best_val_loss": ("the lowest validation loss", lambda row: row["best_val_loss"]),
    "final_loss": ("the training loss of the last step", lambda row: row["loss"]),
    "accuracy": ("the last validation accuracy (vit)", lambda row: row["accuracy"]),
    "perplexity": ("e to the last validation loss", lambda row: _exp(row["val_loss"])),
    "tokens_per_second": ("the speed of the training", lambda row: row["tokens_per_second"]),
    "steps": ("the steps that were done", lambda row: row["step"]),
}
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_EXPRESSION = re.compile(r"\s*(\w+)\s*(<=|>=|==|<|>)\s*(\S+)\s*")


def _exp(value: Any) -> float | None:
    if not isinstance(value, (int, float)):
        return None
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True)
class Check:
    """One expression: `metric` `operator` `threshold`."""

    metric: str
    operator: str
    threshold: float

    @property
    def text(self) -> str:
        return f"{self.metric}{self.operator}{self.threshold:g}"


def parse(text: str) -> Check:
    """An expression like `val_loss<=1.9`. Raises ToyError (bad_flag), naming the metrics that there are."""
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise ToyError(
            "bad_flag",
            f"{text!r} is no comparison of a metric with a number",
            "write 'val_loss<=1.9', in quotes; operators: " + " ".join(OPERATORS),
        )
    metric, op, number = match.groups()
    if metric not in METRICS:
        near = nearest(metric, METRICS)
        hint = (f"did you mean {near}? " if near else "") + "metrics: " + ", ".join(METRICS)
        raise ToyError("bad_flag", f"unknown metric {metric!r}", hint)
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise ToyError("bad_flag", f"{number!r} in {text!r} is no number", "write 'val_loss<=1.9', say")
    return Check(metric, op, threshold)


def judge(run: Path, checks: list[Check]) -> dict[str, Any]:
    """Measure the run: `passed`, and each check with the value it met. Raises ToyError (bad_flag) when the run has not
    ended, or lacks a metric. A value that is not finite passes nothing."""
    if is_running(run):
        raise ToyError("bad_flag", f"run {run.name} is running", "its metrics are final when it has ended")
    row = listing.summary(run)
    values = {name: value for name, (_, of) in METRICS.items() if isinstance(value := of(row), (int, float))}
    results = []
    for check in checks:
        if check.metric not in values or (check.metric == "steps" and not values["steps"]):
            have = ", ".join(name for name in values if name != "steps" or values["steps"]) or "none"
            raise ToyError("bad_flag", f"run {run.name} has no {check.metric}", f"its metrics: {have}")
        value = float(values[check.metric])
        passed = math.isfinite(value) and OPERATORS[check.operator](value, check.threshold)
        results.append(
            {
                "expression": check.text,
                "metric": check.metric,
                "operator": check.operator,
                "threshold": check.threshold,
                "value": value if math.isfinite(value) else None,
                "passed": passed,
            }
        )
    return {"passed": all(result["passed"] for result in results), "checks": results}


def note(run: Path, verdict: dict[str, Any]) -> None:
    """Add the verdict to the run's events, as a `quality_gate` event; how the run ended stays as it was."""
    with os_errors("note the gate in the run's events"):
        events.append(run, {"kind": "quality_gate", **verdict})
