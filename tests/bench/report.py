"""The table: cells, what they are held to, and how they were measured."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from others import Figure
from quiet import Quiet
from roof import LAYOUTS, Product, Roof
from shapes import Shape, Target

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: (data type, m k n, toy's GFLOP/s by layout, PyTorch's)
ProductRow = tuple[str, Product, dict[str, float], dict[str, float]]


@dataclass
class Side:
    """One side's rounds at one cell."""

    name: str
    rounds: list[float] = field(default_factory=list)  # median seconds a step
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


@dataclass
class Cell:
    """A shape in a data type."""

    shape: Shape
    dtype: str
    limits: Target
    sides: dict[str, Side] = field(default_factory=dict)  # toy, eager, compile
    roofs: list[tuple[float, float]] = field(default_factory=list)  # a round's best of toy's products and PyTorch's
    lines: list[float | None] = field(default_factory=list)  # ns from core to core, before each of toy's rounds
    parameters: int = 0
    command_line_bytes: int = 0  # of the Python process that started toy's runner
    version: str = ""
    notes: list[str] = field(default_factory=list)

    def take_toy(self, roof: Roof, turn: Callable[[], float]) -> None:
        self.lines.append(roof.line())
        self.sides["toy"].rounds.append(turn())

    def forget_toy(self) -> None:
        self.lines.pop()
        self.sides["toy"].rounds.pop()

    def take_roof(self, roof: Roof, products: Iterable[Product]) -> None:
        mine, theirs = [0.0], [0.0]
        for product in products:
            mine += roof.toy(product, self.dtype).values()
            theirs += roof.torch(product, self.dtype).values()
        self.roofs.append((max(mine), max(theirs)))

    def forget_roof(self) -> None:
        self.roofs.pop()

    def roof(self) -> float:
        """GFLOP/s: the best that any product of either side did between this cell's turns."""
        return max(max(pair) for pair in self.roofs)

    @property
    def toy(self) -> Side | None:
        return self.sides.get("toy")

    @property
    def best(self) -> Side | None:
        """The faster of PyTorch's modes."""
        return min((side for name, side in self.sides.items() if name != "toy"), key=lambda s: s.seconds, default=None)

    def speed_of(self, name: str) -> str:
        side = self.sides.get(name)
        return speed_text(self.shape, side.seconds) if side and side.rounds else "-"

    def memory_of(self, name: str) -> str:
        side = self.sides.get(name)
        return f"{side.peak_bytes / 1e6:,.0f}" if side and side.peak_bytes else "-"

    @property
    def gflops(self) -> float | None:
        return 1e-9 * self.shape.flops() / self.toy.seconds if self.toy else None

    def values(self) -> Target:
        """What was measured, in the places of what it is held to."""
        toy, best = self.toy, self.best
        share = self.gflops / self.roof() if self.gflops and self.roofs and self.roof() else None
        if toy is None or best is None:
            return Target(None, None, share)
        memory = toy.peak_bytes / best.peak_bytes if toy.peak_bytes and best.peak_bytes else None
        return Target(best.seconds / toy.seconds, memory, share)

    def judgements(self) -> list[tuple[str, bool | None]]:
        """Speed, memory and share of the roof."""
        found, limits = self.values(), self.limits
        return [
            judged(found.speed, limits.speed, True),
            judged(found.memory, limits.memory, False),
            judged(found.share, limits.share, True),
        ]


def speed_text(shape: Shape, seconds: float) -> str:
    """Tokens a second; of images, which are few, with a decimal."""
    return f"{shape.items / seconds:,.{1 if shape.kind == 'vit' else 0}f}"


def judged(value: float | None, limit: float | None, at_least: bool) -> tuple[str, bool | None]:
    """`1.62 (>= 1.5)`, and whether it holds; None where there is nothing to hold."""
    if value is None:
        return "-", None
    if limit is None:
        return f"{value:.2f}", None
    holds = value >= limit if at_least else value <= limit
    return f"{value:.2f} ({'>=' if at_least else '<='} {limit:g})", holds


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown that also reads as it stands: columns padded."""
    wide = [max(len(line[n]) for line in [head, *rows]) for n in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(line, wide, strict=True)] for line in [head, *rows]]
    lines.insert(1, ["-" * width for width in wide])
    return ["| " + " | ".join(line) + " |" for line in lines]


@dataclass
class Report:
    threads: int
    rounds: int
    command: str
    device: str = ""  # a GPU's name; else the cpu's stands for it
    cells: list[Cell] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    products: list[ProductRow] = field(default_factory=list)
    minutes: float = 0.0

    def text(self, quiet: Quiet) -> str:
        lines = [f"# toy against PyTorch, {datetime.date.today().isoformat()}", "", self.circumstances(quiet), ""]
        if self.cells or self.figures:
            lines += [*self.verdict(), ""]
        if self.cells:
            lines += [*self.absolute(), ""]
        if self.figures:
            lines += [*self.other_figures(), ""]
        if self.products:
            lines += [*self.product_table(), ""]
        lines += ["Rounds:", ""]
        for cell in self.cells:
            for side in cell.sides.values():
                speeds = ", ".join(speed_text(cell.shape, seconds) for seconds in side.rounds)
                told = [f"{line:.0f}" for line in cell.lines if line is not None] if side.name == "toy" else []
                cores = f"; a cache line from core to core: {', '.join(told)} ns" if told else ""
                lines.append(f"- {cell.shape.name} {cell.dtype}, {side.name}: {speeds} {cell.shape.unit}{cores}")
            lines += [f"- {cell.shape.name} {cell.dtype}: {note}" for note in cell.notes]
        for figure in self.figures:
            lines += [
                f"- {figure.name}, {who}: {', '.join(f'{value:.4g}' for value in values)} {figure.unit}".rstrip()
                for who, values in (("toy", figure.toy), (figure.other_name, figure.other))
                if values
            ]
        return "\n".join(lines) + "\n"

    def circumstances(self, quiet: Quiet) -> str:
        version = next((cell.version for cell in self.cells if "peft" in cell.version), "")
        version = version or next((cell.version for cell in self.cells if cell.version), "PyTorch not measured")
        if quiet.guards:
            noise = f"Other programs used at most {100 * quiet.worst:.1f} % of the machine in a turn; "
            noise += f"{quiet.repeated} turns were repeated."
        else:
            noise = "**Measured on a machine that others used at the same time: not to be published.**"
        machine = f"{self.device}; {cpu_name()}" if self.device else cpu_name()
        return (
            f"{machine}, {self.threads} threads; {platform.system()} {platform.release()}; "
            f"Python {platform.python_version()}; {version}; toy at commit {commit()}; "
            f"{self.rounds} rounds, sides in turn; {self.minutes:.0f} minutes. {noise}\n\nCommand: `{self.command}`"
        )

    def verdict(self) -> list[str]:
        rows = []
        for cell in self.cells:
            judgements = cell.judgements()
            held = [holds for _, holds in judgements if holds is not None]
            missed = [
                name for name, (_, holds) in zip(("speed", "memory", "roof"), judgements, strict=True) if holds is False
            ]
            word = "-" if not held else ("yes" if not missed else "no: " + ", ".join(missed))
            rows.append([cell.shape.name, cell.dtype, *(text for text, _ in judgements), word])
        head = ["shape", "type", "speed: toy / best PyTorch", "peak memory: toy / that PyTorch", "share of the roof"]
        return table([*head, "holds"], rows)

    def absolute(self) -> list[str]:
        rows = []
        for cell in self.cells:
            roofs = [max(pair[n] for pair in cell.roofs) if cell.roofs else 0.0 for n in (0, 1)]
            rows.append([
                cell.shape.name, cell.dtype, f"{cell.parameters / 1e6:.2f} M" if cell.parameters else "-",
                cell.speed_of("toy"), cell.speed_of("eager"), cell.speed_of("compile"), cell.shape.unit,
                cell.memory_of("toy"), cell.memory_of("eager"), cell.memory_of("compile"),
                f"{cell.gflops:.0f}" if cell.gflops else "-", *(f"{value:.0f}" if value else "-" for value in roofs),
            ])  # fmt: skip
        head = ["shape", "type", "trained", "toy", "eager", "compiled", "", "MB: toy", "eager", "compiled"]
        lines = table([*head, "GFLOP/s: toy", "roof: ggml", "PyTorch"], rows)
        beside = max((cell.command_line_bytes for cell in self.cells), default=0)
        if beside:
            lines += [
                "",
                f"The command line that starts toy's runner and shows its progress takes {beside / 1e6:.0f} MB more.",
            ]
        return lines

    def other_figures(self) -> list[str]:
        rows = []
        for figure in self.figures:
            mine = f"{statistics.median(figure.toy):,.4g} {figure.unit}" if figure.toy else "-"
            theirs = f"{statistics.median(figure.other):,.4g} {figure.unit}" if figure.other else "-"
            value = figure.value
            ratio = f"{value:.2f}" if value is not None and figure.ratio else "-"
            holds = figure.verdict()
            rows.append([figure.name, mine, theirs, figure.other_name or "-", ratio, figure.target, holds])
        return table(["what", "toy", "other", "which", "ratio", "target", "holds"], rows)

    def product_table(self) -> list[str]:
        rows = [
            [
                dtype, " ".join(map(str, product)), layout,
                f"{mine[layout] / theirs[layout]:.2f}" if layout in theirs and layout in mine else "-",
                f"{mine[layout]:.0f}" if layout in mine else "-", f"{theirs[layout]:.0f}" if layout in theirs else "-",
            ]
            for dtype, product, mine, theirs in self.products
            for layout in LAYOUTS
        ]  # fmt: skip
        lead = "Matrix products C[m,n] = A[m,k] B[k,n], GFLOP/s; nt: y = x Wᵀ, nn: dx = dy W, tn: dW = dyᵀ x."
        return [lead, "", *table(["type", "m k n", "layout", "toy / PyTorch", "toy", "PyTorch"], rows)]


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # a machine that is lent may have no git
        return "unknown"


def result_path(name: str) -> Path:
    """Where the results of today on this cpu or GPU go."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("processor", "")).strip("-")
    return HERE / "results" / f"{datetime.date.today().isoformat()}-{words}.md"
