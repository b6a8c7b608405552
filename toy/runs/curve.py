"""loss.svg: training and validation loss over the steps, legible on light and dark pages."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

from toy.runs.bundle import write_atomic

GREY, TRAIN, VALIDATION = "#808080", "#4393e6", "#e6762e"
POINTS = 1000  # drawn at most; more are averaged


def thin(xs: list[int], ys: list[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` averages of neighbours."""
    size = math.ceil(len(xs) / points)
    if size <= 1:
        return [float(x) for x in xs], ys
    starts = range(0, len(xs), size)
    mean = [(sum(part) / len(part)) for part in (ys[n : n + size] for n in starts)]
    return [sum(part) / len(part) for part in (xs[n : n + size] for n in starts)], mean


def draw(path: Path, train: list[tuple[int, float]], validation: list[tuple[int, float]], title: str) -> None:
    """Write the curve; the file is replaced in one rename. matplotlib is imported here, when it is first needed."""
    import logging

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the font cache is nobody's business here
    train = [(step, loss) for step, loss in train if math.isfinite(loss)]
    validation = [(step, loss) for step, loss in validation if math.isfinite(loss)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "toy", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes: Any = figure.add_subplot()
        axes.patch.set_alpha(0)
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
        axes.set_title(title, color=GREY, fontsize=11)
        axes.set_xlabel("step", color=GREY)
        axes.set_ylabel("loss (nats a token)", color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(colors=GREY)
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        for name, spine in axes.spines.items():
            spine.set_color(GREY)
            spine.set_visible(name in ("left", "bottom"))
        if train or validation:
            axes.legend(frameon=False, labelcolor=GREY)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "toy"}, transparent=True)
    write_atomic(path, text.getvalue())


class Curve:
    """Redraws at each evaluation, but never spends more than a twentieth of the time on it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.not_before = 0.0

    def take(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step" and isinstance(event.get("loss"), (int, float)):
            self.train.append((event["step"], float(event["loss"])))
        elif event["kind"] == "eval" and isinstance(event.get("val_loss"), (int, float)):
            self.validation.append((event["step"], float(event["val_loss"])))
            self.draw()

    def draw(self, *, now: bool = False) -> None:
        begun = time.monotonic()
        if now or begun >= self.not_before:
            draw(self.run / "loss.svg", self.train, self.validation, self.run.name)
            self.not_before = time.monotonic() + 20 * (time.monotonic() - begun)
