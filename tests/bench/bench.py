"""toy against PyTorch at shapes S and M, and what matrix products can do here, in one run: python tests/bench/bench.py

Both sides are measured in turn (toy, eager, compiled, toy, …), each step by itself; a round's figure is the median of
its steps after warm-up, and the result the median of the rounds. A turn during which other programs compute is
repeated. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quiet import Busy, Quiet

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

SHAPES: dict[str, dict[str, int]] = {
    "S": {
        "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_head_kv": 4, "n_ff": 172, "batch": 4,
        "context": 64,
    },
    "M": {
        "vocab_size": 4096, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_head_kv": 4, "n_ff": 688, "batch": 8,
        "context": 256,
    },
}  # fmt: skip
STEPS = {"S": (20, 200), "M": (2, 8)}  # warm-up and measured steps of a round
#: tokens x in x out of the linear layers of M, its head, and a larger square one.
PRODUCTS = [(2048, 256, 256), (2048, 256, 688), (2048, 688, 256), (2048, 256, 4096), (1024, 1024, 1024)]


@dataclass
class Side:
    """One side's rounds at one shape."""

    name: str
    rounds: list[float] = field(default_factory=list)  # median seconds a step
    peak_rss_bytes: int = 0
    parameters: int = 0

    def tokens_per_second(self, shape: dict[str, int]) -> float:
        return shape["batch"] * shape["context"] / statistics.median(self.rounds)


def toy_round(shape: dict[str, int], name: str, threads: int, side: Side) -> None:
    """One run of the real command line, in an empty directory."""
    warm, measured = STEPS[name]
    with tempfile.TemporaryDirectory(prefix="toy-bench-") as folder:
        corpus = Path(folder) / "ids.bin"
        draw = random.Random(0)
        ids = array("i", (draw.randrange(shape["vocab_size"]) for _ in range(60 * shape["batch"] * shape["context"])))
        corpus.write_bytes(ids.tobytes())
        knobs: dict[str, float] = {f"model.{key}": value for key, value in shape.items() if key != "batch"}
        knobs |= {"train.batch": shape["batch"], "eval.every": 0, "eval.batches": 1, "data.val_fraction": 0.02}
        argv = [sys.executable, "-m", "toy", "train", "--corpus", str(corpus), "--threads", str(threads), "--no-sample"]
        argv += [word for key, value in knobs.items() for word in ("--set", f"{key}={value}")]
        argv += ["--steps", str(warm + measured), "--out", "run", "--json"]
        env = os.environ | {"XDG_CACHE_HOME": folder}
        if importlib.util.find_spec("toy") is None:
            env["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stdout + done.stderr)
        document = json.loads(done.stdout)
        lines = (Path(folder) / "run" / "events.jsonl").read_text().splitlines()
    speeds = [event["tokens_per_second"] for event in map(json.loads, lines) if event["kind"] == "step"][warm:]
    side.rounds.append(shape["batch"] * shape["context"] / statistics.median(speeds))
    side.peak_rss_bytes = max(side.peak_rss_bytes, document["peak_rss_bytes"])
    side.parameters = document["parameters"]


class Torch:
    """A PyTorch process that waits while the other side is measured."""

    def __init__(self, shape: dict[str, int], name: str, mode: str, threads: int) -> None:
        argv = [sys.executable, str(HERE / "torch_worker.py"), json.dumps(shape), mode, str(threads)]
        self.name = name
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.version = ""

    def ask(self, steps: int) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            return None
        self.version = answer["version"]
        return answer

    def round(self, side: Side) -> None:
        warm, measured = STEPS[self.name]
        answer = self.ask(warm + measured)
        if answer is None:
            raise SystemExit(f"PyTorch ({side.name}) ended in the middle of its run")
        side.rounds.append(statistics.median(answer["seconds"][warm:]))
        side.peak_rss_bytes, side.parameters = answer["peak_rss_bytes"], answer["parameters"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(name: str, rounds: int, threads: int, quiet: Quiet) -> tuple[dict[str, Side], str]:
    """The sides at one shape, and PyTorch's version ("" without it)."""
    shape = SHAPES[name]
    sides = {"toy": Side("toy")}
    torches: dict[str, Torch] = {}
    if importlib.util.find_spec("torch") is not None:
        for mode in ("eager", "compile"):
            print(f"{name}: starting PyTorch ({mode})", file=sys.stderr)
            torches[mode] = Torch(shape, name, mode, threads)
            quiet.pids.add(torches[mode].process.pid)
            if torches[mode].ask(2) is None:  # it compiles here, or cannot (no compiler, say)
                print(f"{name}: PyTorch ({mode}) does not run here", file=sys.stderr)
                torches.pop(mode).close()
            else:
                sides[mode] = Side(mode)
    try:
        for n in range(rounds):
            turns: dict[str, Callable[[], None]] = {"toy": partial(toy_round, shape, name, threads, sides["toy"])}
            turns |= {mode: partial(torch.round, sides[mode]) for mode, torch in torches.items()}
            for mode, turn in turns.items():
                time.sleep(0.5)  # the other side's threads have stopped spinning
                quiet.turn(turn, sides[mode].rounds.pop)
            speeds = "  ".join(
                f"{side.name} {shape['batch'] * shape['context'] / side.rounds[-1]:,.0f}" for side in sides.values()
            )
            print(f"{name}: round {n + 1} of {rounds}, tokens/s: {speeds}", file=sys.stderr)
    finally:
        for torch in torches.values():
            quiet.pids.discard(torch.process.pid)
            torch.close()
    return sides, next((torch.version for torch in torches.values()), "")


def gemm_roof(threads: int, quiet: Quiet) -> list[dict[str, Any]]:
    """GFLOP/s of toy's f32 products (ggml with the patches) and of PyTorch's, in turn."""
    from toy.runners import ensure_built, find_root, wheel_tool

    ensure_built(["toy-train"])
    build, cmake = find_root().build / "native", wheel_tool("cmake") or "cmake"
    for words in (["-B", str(build), "-DTOY_TESTS=ON"], ["--build", str(build), "--target", "bench-gemm"]):
        subprocess.run([cmake, *words], cwd=find_root().source, check=True, stdout=subprocess.DEVNULL)
    program = next(path for path in build.rglob("bench-gemm") if os.access(path, os.X_OK) and path.is_file())
    rows: list[dict[str, Any]] = []

    def both(m: int, k: int, n: int) -> None:
        argv = [str(program), "-t", str(threads), str(m), str(k), str(n)]
        ours = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
        found = [json.loads(line) for line in ours]
        if importlib.util.find_spec("torch") is not None:
            argv = [sys.executable, str(HERE / "torch_worker.py"), "gemm", str(threads), f"{m}x{k}x{n}"]
            theirs = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
            for row, line in zip(found, theirs, strict=True):
                row["torch"] = json.loads(line)["gflops"]
        rows.extend(found)

    def forget() -> None:
        del rows[-3:]

    for product in PRODUCTS:
        quiet.turn(partial(both, *product), forget)
    return rows


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def report(
    measured: dict[str, tuple[dict[str, Side], str]],
    roof: list[dict[str, Any]],
    threads: int,
    rounds: int,
    quiet: Quiet,
) -> str:
    version = next((v for _, v in measured.values() if v), "")
    lines = [
        f"# toy against PyTorch, {datetime.date.today().isoformat()}",
        "",
        f"{cpu_name()}, {threads} threads; {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}; PyTorch {version or 'not installed'}; toy at commit {commit()}; "
        f"{rounds} rounds, sides in turn; f32. "
        f"Other programs used at most {100 * quiet.worst:.1f} % of the machine in a turn; {quiet.repeated} repeated.",
        "",
    ]
    if version:
        lines += [
            "| shape | toy / best PyTorch, speed | toy / that PyTorch, peak memory "
            "| toy tokens/s | eager tokens/s | compiled tokens/s | peak RSS: toy | eager | compiled |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    else:
        lines += ["| shape | toy tokens/s | peak RSS |", "|---|---|---|"]
    for name, (sides, _) in measured.items():
        shape, toy = SHAPES[name], sides["toy"]
        speed = {mode: side.tokens_per_second(shape) for mode, side in sides.items()}
        memory = {mode: f"{side.peak_rss_bytes / 1e6:,.0f} MB" for mode, side in sides.items()}
        others = [mode for mode in sides if mode != "toy"]
        if not others:
            lines.append(f"| {name} | {speed['toy']:,.0f} | {memory['toy']} |")
            continue
        best = max(others, key=lambda mode: speed[mode])
        cells = [
            name,
            f"**{speed['toy'] / speed[best]:.2f}**",
            f"**{toy.peak_rss_bytes / sides[best].peak_rss_bytes:.2f}**",
            *(f"{speed[mode]:,.0f}" if mode in speed else "-" for mode in ("toy", "eager", "compile")),
            *(memory.get(mode, "-") for mode in ("toy", "eager", "compile")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Rounds, tokens/s:", ""]
    for name, (sides, _) in measured.items():
        shape = SHAPES[name]
        per_step = shape["batch"] * shape["context"]
        lines += [
            f"- {name} {side.name}: " + ", ".join(f"{per_step / s:,.0f}" for s in side.rounds)
            for side in sides.values()
        ]
    lines += ["", "Shapes: " + "; ".join(f"{name} = {json.dumps(SHAPES[name])}" for name in measured) + "."]
    if roof:
        lines += [
            "",
            f"## f32 matrix products, GFLOP/s, {threads} threads",
            "",
            "C[m,n] = A[m,k] B[k,n]; nt: y = x Wᵀ, nn: dx = dy W, tn: dW = dyᵀ x.",
            "",
            "| m k n | layout | toy / PyTorch | toy | PyTorch |",
            "|---|---|---|---|---|",
        ]
        for row in roof:
            torch = row.get("torch")
            ratio = f"**{row['gflops'] / torch:.2f}**" if torch else "-"
            lines.append(
                f"| {row['m']} {row['k']} {row['n']} | {row['layout']} | {ratio} | {row['gflops']:.0f} | "
                f"{f'{torch:.0f}' if torch else '-'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="S,M", help="of S, M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: the usable cores")
    parser.add_argument("--no-gemm", action="store_true", help="leave the matrix products out")
    parser.add_argument("--out", type=Path, help="file for the table; default results/<date>-<cpu>.md here")
    args = parser.parse_args()
    from toy.config import usable_cores

    threads = args.threads or usable_cores()
    quiet = Quiet()
    try:
        measured = {name: measure(name, args.rounds, threads, quiet) for name in args.shapes.split(",")}
        roof = [] if args.no_gemm else gemm_roof(threads, quiet)
    except Busy as busy:
        raise SystemExit(f"no result: {busy}") from None
    text = report(measured, roof, threads, args.rounds, quiet)
    words = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower().replace("(r)", "").replace("processor", "")).strip("-")
    out = args.out or HERE / "results" / f"{datetime.date.today().isoformat()}-{words}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
