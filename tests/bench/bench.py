"""toy against what a user would pick instead, and against what this machine can do: python tests/bench/bench.py

All sides of a cell (a shape in a data type) are measured in turn (toy, eager, compiled, the roof, toy, …), each step
by itself; a round's figure is the median of its steps after warm-up, and the result the median of the rounds. A turn
during which other programs compute is repeated. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import others
from quiet import Busy, Quiet
from report import Cell, ProductRow, Report, Side, cpu_name, result_path, speed_text
from roof import Product, Roof, build_programs
from shapes import DTYPES, PRODUCTS, ROOF, SHAPES, Shape, target
from torch_side import TorchRun, is_installed
from toy_side import ToyRun, Unavailable

MODES = ("eager", "compile")
#: A mode of PyTorch that is slower than the other by more than this after its first round sits out the rest: only the
#: best of both is compared.
BEHIND = 1.15

GEMM_EXTRA = 0.2  # seconds a layout of --gemm's products


@contextmanager
def waiting(quiet: Quiet, pids: list[int]) -> Iterator[None]:
    """Children whose computing is our own while they live."""
    quiet.pids.update(pids)
    try:
        yield
    finally:
        quiet.pids.difference_update(pids)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start_torch(
    shape: Shape, dtypes: list[str], modes: tuple[str, ...], threads: int, stack: ExitStack, device: str = "cpu"
) -> dict[str, list[TorchRun]]:
    """PyTorch's side of a shape, all of it at once: compiling takes one core for long. Data type -> runs."""
    begun = time.monotonic()
    runs: dict[str, list[TorchRun]] = {dtype: [] for dtype in dtypes}
    for dtype in dtypes if is_installed() else ():
        for mode in modes:
            runs[dtype].append(TorchRun(shape, mode, dtype, threads, device))
            stack.callback(runs[dtype][-1].close)
    for dtype, started in runs.items():
        for run in started:
            if not run.is_ready():
                say(f"  PyTorch ({run.mode}, {dtype}) does not run here: {run.said()}")
    if is_installed():
        say(f"  PyTorch is ready after {time.monotonic() - begun:.0f} s")
    return runs


def measure(
    cell: Cell, runs: list[TorchRun], rounds: int, roof: Roof, products: list[Product], quiet: Quiet,
    begin: Callable[[], ToyRun], held: Callable[[Callable[[], None]], int] | None = None,
) -> Cell:  # fmt: skip
    """Fill one cell of the table. `begin` starts toy's run, and `held` tells what memory a side's end gives back: that
    of a device, where peak resident memory tells nothing."""
    shape, dtype = cell.shape, cell.dtype
    with ExitStack() as stack:
        turns: dict[str, Callable[[], None]] = {}
        try:
            toy = begin()
            stack.callback(toy.close)
            stack.enter_context(waiting(quiet, toy.pids))
            cell.sides["toy"] = Side("toy")
            turns["toy"] = lambda: cell.take_toy(roof, toy.turn)
        except Unavailable as reason:
            say(f"    toy: {reason}")
            cell.notes.append(f"toy: {reason}")
        for run in runs:
            if not run.version:
                cell.notes.append(f"PyTorch ({run.mode}) did not run: {run.said()}")
                continue
            cell.version, cell.sides[run.mode] = run.version, Side(run.mode)
            turns[run.mode] = partial(lambda run: cell.sides[run.mode].rounds.append(run.turn()), run)
        roof.ready(dtype)
        quiet.pids.update(roof.pids())
        for _ in range(rounds):
            for name, turn in turns.items():
                time.sleep(0.3)  # the other side's threads have stopped spinning
                quiet.turn(turn, cell.forget_toy if name == "toy" else cell.sides[name].rounds.pop)
            quiet.turn(lambda: cell.take_roof(roof, products), cell.forget_roof)
            speeds = ", ".join(f"{name} {speed_text(shape, cell.sides[name].rounds[-1])}" for name in turns)
            say(f"    {speeds} {shape.unit}; roof {cell.roof():.0f} GFLOP/s")
            sit_out(cell, turns)
        if "toy" in turns:
            cell.sides["toy"].peak_bytes, cell.command_line_bytes = toy.peaks()
            cell.parameters = int(toy.start.get("parameters") or 0)
        for run in runs:
            if run.version:
                cell.sides[run.mode].peak_bytes = run.peak_bytes
        if held is not None:
            ends = {run.mode: run.close for run in runs} | ({"toy": toy.close} if "toy" in turns else {})
            for name, side in cell.sides.items():
                side.peak_bytes = held(ends[name])
            cell.command_line_bytes = 0
    return cell


def sit_out(cell: Cell, turns: dict[str, Callable[[], None]]) -> None:
    """Take the modes that are behind out of the turns."""
    seconds = {mode: cell.sides[mode].seconds for mode in MODES if mode in turns}
    for mode, each in seconds.items():
        if each > BEHIND * min(seconds.values()):
            turns.pop(mode)


def products(roof: Roof, dtypes: list[str], quiet: Quiet) -> list[ProductRow]:
    rows: list[ProductRow] = []
    for dtype in dtypes:
        roof.ready(dtype)
        quiet.pids.update(roof.pids())
        for product in PRODUCTS:
            quiet.turn(
                lambda dtype=dtype, product=product: rows.append(  # type: ignore[misc]
                    (dtype, product, roof.toy(product, dtype), roof.torch(product, dtype))
                ),
                rows.pop,
            )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="measured steps a round; 0: those of each shape")
    parser.add_argument("--threads", type=int, default=0, help="0: the usable cores")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes for X")
    parser.add_argument("--no-others", action="store_true", help="training steps only, no infer and start-up")
    parser.add_argument("--gemm", action="store_true", help="also a table of matrix products, one by one")
    parser.add_argument("--llama-finetune", type=Path, metavar="PATH", help="llama.cpp's program: README.md")
    parser.add_argument("--not-quiet", action="store_true", help="measure on a busy machine too; nothing to publish")
    parser.add_argument("--out", type=Path, help="file for the table; default results/<date>-<cpu>.md here")
    args = parser.parse_args()
    args.shapes = listed(parser, args.shapes, tuple(SHAPES))
    args.dtypes = listed(parser, args.dtypes, DTYPES)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    return args


def listed(parser: argparse.ArgumentParser, words: str, known: tuple[str, ...]) -> list[str]:
    found = [word for word in words.split(",") if word]
    for word in found:
        if word not in known:
            parser.error(f"{word} is none of {', '.join(known)}")
    return found


def main() -> None:
    args = arguments()
    from toy.config import usable_cores

    threads = args.threads or usable_cores()
    quiet = Quiet(guards=not args.not_quiet)
    report = Report(threads, args.rounds, shlex.join(["python", *sys.argv]))
    modes = MODES[:1] if args.no_compile else MODES
    roof = Roof(build_programs(), threads, seconds=0.06)
    begun = time.monotonic()
    try:
        for name in args.shapes:
            shape = SHAPES[name]
            if args.steps:
                shape = dataclasses.replace(shape, warm=1, measured=args.steps)
            say(name)
            with ExitStack() as stack:
                runs = start_torch(shape, args.dtypes, modes, threads, stack)
                stack.enter_context(waiting(quiet, [run.process.pid for each in runs.values() for run in each]))
                for dtype in args.dtypes:
                    say(f"  {dtype}")
                    begin = partial(ToyRun, shape, dtype, threads)
                    cell = Cell(shape, dtype, target(shape.name, dtype))
                    report.cells.append(measure(cell, runs[dtype], args.rounds, roof, ROOF, quiet, begin))
        if not args.no_others:
            say("infer, beginnings, memory")
            report.figures += others.infer(threads, args.rounds, quiet)
            report.figures += others.beginnings(threads, args.rounds, quiet)
            report.figures += others.long_context(threads)
        if args.llama_finetune:
            say("llama.cpp's finetune")
            report.figures += others.finetune(args.llama_finetune.resolve(), args.rounds, threads, quiet)
        if args.gemm:
            roof.seconds = GEMM_EXTRA
            report.products = products(roof, args.dtypes, quiet)
    except Busy as busy:
        raise SystemExit(f"no result: {busy}") from None
    finally:
        roof.close()
    report.minutes = (time.monotonic() - begun) / 60
    text = report.text(quiet)
    out = args.out or result_path(cpu_name())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)
    say(f"written to {out}")


if __name__ == "__main__":
    main()
