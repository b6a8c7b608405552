"""What is measured besides training steps: `toy infer` against llama.cpp, how soon things begin, the memory of a long
context, and llama.cpp's own finetune. Each gives rows of Figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from quiet import Quiet
from shapes import SHAPES
from torch_side import Worker
from toy_side import ToyRun, command, environment, result, smollm2, train_words

HERE = Path(__file__).resolve().parent
PROMPT = 512  # tokens of the long prompt
ANSWER = 64  # tokens of the answer
FINETUNE_TEXT = 4_000  # characters: half a minute of llama.cpp's training
FINETUNE_STEP = re.compile(rb"train: .*?data=[0-9]+/[0-9]+")


@dataclass
class Figure:
    """One line of the report: rounds of toy and of the other side, and what the comparison is held to."""

    name: str
    unit: str
    target: str  # for people
    holds: Callable[[float], bool]
    ratio: bool = True  # toy's over the other's; else toy's own figure counts
    toy: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    other_name: str = ""
    why: str = ""  # there is no value

    @property
    def value(self) -> float | None:
        if not self.toy or (self.ratio and not self.other):
            return None
        mine = statistics.median(self.toy)
        return mine / statistics.median(self.other) if self.ratio else mine

    def verdict(self) -> str:
        return "-" if self.value is None else ("yes" if self.holds(self.value) else "no")


def at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def under(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


# --- infer ----------------------------------------------------------------------------------------------------------


class LlamaCpp(Worker):
    """llama.cpp, waiting."""

    def __init__(self, gguf: Path, threads: int) -> None:
        super().__init__("llama_cpp_worker.py", str(gguf), str(threads))
        self.version: str = (self.ask("decode 2") or {}).get("version", "")

    def speed(self, what: str, n: int) -> float:
        answer = self.ask(f"{what} {n}")
        if answer is None:
            raise SystemExit(f"llama.cpp ended: {self.said()}")
        return float(answer["tokens_per_second"])


def toy_infer(gguf: Path, threads: int, ids: list[int], n: int, device: str = "cpu") -> dict[str, float]:
    """Timings of a fresh `toy infer`, as it tells them."""
    words = ["infer", str(gguf), "--prompt-ids", ",".join(map(str, ids)), "--n", str(n), "--temperature", "0"]
    timings: dict[str, float] = result([*words, "--threads", str(threads), "--device", device])["timings"]
    return timings


def infer(threads: int, rounds: int, quiet: Quiet) -> list[Figure]:
    gguf = smollm2()
    if gguf is None:
        return []
    prefill = Figure(f"`toy infer`, SmolLM2 Q4_1, prompt of {PROMPT} tokens", "tokens/s", ">= 1.0", at_least(1.0))
    decode = Figure(f"`toy infer`, SmolLM2 Q4_1, answer of {ANSWER} tokens", "tokens/s", ">= 1.0", at_least(1.0))
    long_prompt = list(range(1000, 1000 + PROMPT))

    def toy_prefill() -> None:
        found = toy_infer(gguf, threads, long_prompt, 1)
        prefill.toy.append(found["prefill_tokens"] / found["prefill_s"])

    def toy_decode() -> None:
        found = toy_infer(gguf, threads, [1], ANSWER)
        # both count the first token, which the prompt has paid for
        decode.toy.append(found["decode_tokens"] / found["decode_s"])

    theirs = None
    if importlib.util.find_spec("xllamacpp") is not None:
        theirs = LlamaCpp(gguf, threads)
        if not theirs.version:
            print(f"llama.cpp does not run here: {theirs.said()}", file=sys.stderr)
            theirs.close()
            theirs = None
    try:
        if theirs is not None:
            quiet.pids.add(theirs.process.pid)
            prefill.other_name = decode.other_name = f"llama.cpp ({theirs.version})"
        for _ in range(rounds):
            quiet.turn(toy_prefill, prefill.toy.pop)
            quiet.turn(toy_decode, decode.toy.pop)
            if theirs is not None:
                quiet.turn(lambda: prefill.other.append(theirs.speed("prefill", PROMPT)), prefill.other.pop)
                quiet.turn(lambda: decode.other.append(theirs.speed("decode", ANSWER)), decode.other.pop)
    finally:
        if theirs is not None:
            quiet.pids.discard(theirs.process.pid)
            theirs.close()
    return [prefill, decode]


# --- how soon -------------------------------------------------------------------------------------------------------


def seconds_to_line(words: list[str], starts_with: str, folder: Path) -> float:
    """Wall-clock seconds from the start of `toy WORDS` to the first output that begins so; then it is ended."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command(*words), cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    seen = b""
    while not seen.startswith(starts_with.encode()) or not seen:
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            said = process.communicate()[1].decode(errors="replace")
            raise SystemExit(f"toy {' '.join(words)} printed no {starts_with!r}:\n{said}")
        seen += piece
    seconds = time.perf_counter() - begun
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return seconds


def beginnings(threads: int, rounds: int, quiet: Quiet) -> list[Figure]:
    first_step = Figure("`toy train` at S, to its first step line", "s", "< 0.6", under(0.6), ratio=False)
    first_token = Figure("`toy infer`, a short prompt, to its first token", "s", "< 0.5", under(0.5), ratio=False)
    gguf = smollm2()

    def train() -> None:
        with tempfile.TemporaryDirectory(prefix="toy-bench-") as name:
            folder = Path(name)
            words = ["train", *train_words(SHAPES["S"], folder), "--steps", "1000", "--threads", str(threads)]
            words += ["--set", "eval.every=0", "--set", "eval.batches=1", "--no-sample", "--out", "run"]
            first_step.toy.append(seconds_to_line(words, "step 1:", folder))

    def token() -> None:
        with tempfile.TemporaryDirectory(prefix="toy-bench-") as name:
            words = ["infer", str(gguf), "--prompt", "The weather is", "--n", "64", "--threads", str(threads)]
            first_token.toy.append(seconds_to_line(words, "", Path(name)))

    for _ in range(max(rounds, 3)):
        quiet.turn(train, first_step.toy.pop)
        if gguf is not None:
            quiet.turn(token, first_token.toy.pop)
    return [first_step, *([first_token] if gguf is not None else [])]


# --- a long context -------------------------------------------------------------------------------------------------


def long_context(threads: int) -> list[Figure]:
    """As many tokens at once on both sides. Memory is the same on a busy machine: no quiet turn is needed."""
    short = SHAPES["L"]
    long = dataclasses.replace(short, batch=1, context=short.batch * short.context)
    limit = 1.2
    figure = Figure(
        f"peak memory of L as 1 x {long.context} against {short.batch} x {short.context}", "MB", f"<= {limit}",
        lambda value: value <= limit, other_name=f"toy at {short.batch} x {short.context}",
    )  # fmt: skip
    for shape, into in ((long, figure.toy), (short, figure.other)):
        run = ToyRun(dataclasses.replace(shape, warm=1, measured=1), "f32", threads, whole=True)
        try:
            run.turn()
            into.append(run.peaks()[0] / 1e6)
        finally:
            run.close()
    return [figure]


# --- llama.cpp's finetune -------------------------------------------------------------------------------------------


def finetune(program: Path, rounds: int, threads: int, quiet: Quiet) -> list[Figure]:
    """llama.cpp's llama-finetune on SmolLM2 in f32, 1 x 256 tokens a step, against toy's steps at X: the same shape."""
    gguf, shape = smollm2(), SHAPES["X"]
    if gguf is None:
        return []
    figure = Figure(
        "full training of SmolLM2-135M, f32, 1 x 256", "tokens/s", ">= 2", at_least(2.0), other_name="llama-finetune"
    )
    with tempfile.TemporaryDirectory(prefix="toy-bench-") as name:
        folder = Path(name)
        corpus = HERE.parents[1] / "data" / "gates" / "shakespeare-20k.txt"
        (folder / "text.txt").write_text(corpus.read_text(encoding="utf-8")[:FINETUNE_TEXT], encoding="utf-8")
        # the same weights in f32, with their tokenizer: what one step of warm-start leaves
        words = ["train", "warm-start", "--model", str(gguf), "--corpus", str(corpus), "--steps", "1", "--out", "run"]
        words += ["--set", f"model.context={shape.context}", "--set", "train.batch=1", "--threads", str(threads)]
        words += ["--set", "eval.every=0", "--set", "eval.batches=1", "--no-sample"]
        made = subprocess.run(
            command(*words), cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            raise SystemExit(made.stdout + made.stderr)
        argv = [str(program), "-m", "run/weights/model.gguf", "-f", "text.txt", "-t", str(threads), "-epochs", "1"]
        argv += [word for flag in ("-c", "-b", "-ub") for word in (flag, str(shape.context))] + ["-o", "out.gguf"]
        toy = ToyRun(shape, "f32", threads)
        try:
            quiet.pids.update(toy.pids)
            for _ in range(rounds):
                quiet.turn(lambda: figure.toy.append(shape.items / toy.turn()), figure.toy.pop)
                quiet.turn(lambda: figure.other.append(shape.items / finetune_seconds(argv, folder)), figure.other.pop)
        finally:
            quiet.pids.difference_update(toy.pids)
            toy.close()
    return [figure]


def finetune_seconds(argv: list[str], folder: Path) -> float:
    """Seconds a step: the median of a run, its first step left out. The program tells whole seconds since its start,
    so that they are taken as its progress comes: `train: [██▎     ] data=0000002/0000007 loss=…`, ended by a CR."""
    process = subprocess.Popen(
        argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said, ends = b"", []
    while piece := os.read(process.stdout.fileno(), 4096):
        said += piece
        if len(FINETUNE_STEP.findall(said)) > len(ends):
            ends.append(time.perf_counter())
    if process.wait() != 0 or len(ends) < 3:
        raise SystemExit(f"{argv[0]} did not train:\n{said.decode(errors='replace')[-2000:]}")
    return statistics.median(end - begun for begun, end in itertools.pairwise(ends))
