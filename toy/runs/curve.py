"""Training and validation loss over the steps, legible on light and dark pages: of one run, or of several at once."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy.runs import events
from toy.runs.bundle import write_atomic

GREY, TRAIN, VALIDATION = "#808080", "#4393e6", "#e6762e"
COLOURS = (TRAIN, VALIDATION, "#3fa34d", "#b05cc6", "#d64550", "#1fa3a3", "#a0781e", "#7a7af0")
POINTS = 1000  # drawn at most; more are averaged


def thin(xs: list[int], ys: list[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` averages of neighbours."""
    size = math.ceil(len(xs) / points)
    if size <= 1:
        return [float(x) for x in xs], ys
    starts = range(0, len(xs), size)
    mean = [(sum(part) / len(part)) for part in (ys[n : n + size] for n in starts)]
    return [sum(part) / len(part) for part in (xs[n : n + size] for n in starts)], mean


@contextmanager
def _axes(title: str, unit: str, *, height: float = 4.0, paper: bool = False) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, dressed. matplotlib is imported here, when it is first needed."""
    import logging

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the font cache is nobody's business here
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "toy", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes: Any = figure.add_subplot()
        if not paper:
            figure.patch.set_alpha(0)
            axes.patch.set_alpha(0)
        axes.set_title(title, color=GREY, fontsize=11)
        axes.set_xlabel("step", color=GREY)
        axes.set_ylabel(f"loss ({unit})", color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(colors=GREY)
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        for name, spine in axes.spines.items():
            spine.set_color(GREY)
            spine.set_visible(name in ("left", "bottom"))
        yield figure, axes


def _finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def draw(
    path: Path,
    train: list[tuple[int, float]],
    validation: list[tuple[int, float]],
    title: str,
    unit: str = "nats a token",
) -> None:
    """Write one run's curve as SVG; the file is replaced in one rename."""
    train, validation = _finite(train), _finite(validation)
    with _axes(title, unit) as (figure, axes):
        if train:
            xs, ys = thin([step for step, _ in train], [loss for _, loss in train])
            axes.plot(xs, ys, color=TRAIN, linewidth=1.2, label="training", marker="o" if len(xs) == 1 else None)
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color=VALIDATION,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label="validation",
            )
        if train or validation:
            axes.legend(frameon=False, labelcolor=GREY)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "toy"}, transparent=True)
    write_atomic(path, text.getvalue())


def unit_of(start: dict[str, Any]) -> str:
    """What a loss counts, by the run's first event."""
    return "nats an image" if start.get("items") == "images" else "nats a token"


@dataclass
class Series:
    """One run's losses."""

    name: str
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    unit: str = "nats a token"


def series(run: Path) -> Series:
    """The losses in a run's events."""
    found = Series(run.name)
    for event in events.read(run):
        if event["kind"] == "run_start":
            found.unit = unit_of(event)
        elif event["kind"] == "step" and isinstance(event.get("loss"), (int, float)):
            found.train.append((int(event["step"]), float(event["loss"])))
        elif event["kind"] == "eval" and isinstance(event.get("val_loss"), (int, float)):
            found.validation.append((int(event["step"]), float(event["val_loss"])))
    return found


def draw_runs(path: Path, runs: list[Series]) -> None:
    """Write the curves of several runs into one picture, SVG or PNG by the file's ending: a colour a run, training
    thin, validation thick with dots. The file is replaced in one rename."""
    from matplotlib.lines import Line2D

    png = path.suffix.lower() == ".png"
    units = {run.unit for run in runs}
    unit = units.pop() if len(units) == 1 else "nats"
    with _axes("", unit, height=4.4, paper=png) as (figure, axes):
        drawn = []
        for n, run in enumerate(runs):
            colour = COLOURS[n % len(COLOURS)]
            style: Any = "-" if n < len(COLOURS) else "--"
            train, validation = _finite(run.train), _finite(run.validation)
            if train:
                xs, ys = thin([step for step, _ in train], [loss for _, loss in train])
                marker = "." if len(xs) == 1 else None
                axes.plot(xs, ys, color=colour, linewidth=0.9, alpha=0.55, linestyle=style, marker=marker)
            if validation:
                axes.plot(
                    *zip(*validation, strict=True),
                    color=colour,
                    linewidth=1.8,
                    marker="o",
                    markersize=4,
                    linestyle=style,
                )
            drawn.append(Line2D([], [], color=colour, linewidth=1.8, linestyle=style, label=run.name))
        if any(run.train for run in runs):
            drawn.append(Line2D([], [], color=GREY, linewidth=0.9, alpha=0.7, label="training"))
        if any(run.validation for run in runs):
            drawn.append(Line2D([], [], color=GREY, linewidth=1.8, marker="o", markersize=4, label="validation"))
        axes.legend(handles=drawn, frameon=False, labelcolor=GREY, fontsize=9)
        if not png:
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "toy"}, transparent=True)
            write_atomic(path, text.getvalue())
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": "toy"})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class Curve:
    """Redraws at each evaluation, but never spends more than a twentieth of the time on it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.not_before = 0.0
        self.unit = "nats a token"

    def take(self, event: dict[str, Any]) -> None:
        if event["kind"] == "run_start":
            self.unit = unit_of(event)
        elif event["kind"] == "step" and isinstance(event.get("loss"), (int, float)):
            self.train.append((event["step"], float(event["loss"])))
        elif event["kind"] == "eval" and isinstance(event.get("val_loss"), (int, float)):
            self.validation.append((event["step"], float(event["val_loss"])))
            self.draw()

    def draw(self, *, now: bool = False) -> None:
        begun = time.monotonic()
        if now or begun >= self.not_before:
            draw(self.run / "loss.svg", self.train, self.validation, self.run.name, self.unit)
            self.not_before = time.monotonic() + 20 * (time.monotonic() - begun)
