"""Adapters in llama.cpp: what `toy train lora` writes, applied by llama.cpp to the base as it is, says what `toy
infer` says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from gates import BASE, GATES
from gguf_files import RandomModel, dequantise, read, rewrite
from harness import EXCERPT, Toy
from test_llama_cpp import PROMPTS, candidates, infer, load, needs_llama_cpp, same_up_to_a_tie, worst

pytestmark = needs_llama_cpp

#: Bases by name: of every matrix type in one file, the same in f32 and in f16, and a qwen2 with its biases.
BASES = ("mixed", "f32", "f16", "qwen2", "qwen2-q4_1")


def tokenizer_of(gguf: Path) -> dict[str, Any]:
    from toy import _native

    metadata = _native.gguf_read(str(gguf))["metadata"]
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def make_base(kind: str, path: Path) -> Path:
    if kind == "mixed":
        path.write_bytes(BASE.read_bytes())
        return path
    if kind == "f32":
        return dequantise(BASE, path)
    if kind == "f16":
        return rewrite(BASE, path, lambda name, shape: "F16" if len(shape) > 1 else "F32")
    vocabulary = tokenizer_of(BASE)
    model = RandomModel(
        "qwen2", kind="Q4_1" if "q4_1" in kind else "F32", n_embd=64, n_ff=96, context=128,
        vocab_size=len(vocabulary["tokenizer.ggml.tokens"]),
    )  # fmt: skip
    return model.write(path, vocabulary)


@pytest.fixture(scope="module", params=BASES)
def adapted(
    request: pytest.FixtureRequest, home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Trained]]:
    """(kind, base, a lora run over it); the base's bytes are those it had."""
    folder = tmp_path_factory.mktemp(f"adapted-{request.param}")
    base = make_base(request.param, folder / "base.gguf")
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    corpus = EXCERPT if request.param != "f16" else GATES / "questions.jsonl"
    sets = ("--set", "train.batch=8", "--set", "train.learning_rate=0.01", "--set", "eval.batches=1")
    flags = ("--recipe", "lora", "--model", base, "--corpus", corpus, "--steps", 60, "--rank", 6, *sets, "--no-sample")
    run = Trained(Toy(folder, home), folder, *flags)
    yield request.param, base, run
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before


#: Sums in another order are 1e-5 apart. Where a matrix is quantised or f16, both sides also round the other side of
#: its product, to eight bits in blocks or to f16, and 1e-7 can decide to which side: such a token, and what attends to
#: it, is up to 0.04 apart in models as small as these.
NOISE, ROUNDED = 1e-3, 0.1


def differences(ours: Any, top: Any, same: int) -> list[float]:
    """Of each token, the largest difference of its log-probabilities."""
    return [worst([mine], [theirs]) for mine, theirs in zip(candidates(ours)[:same], top[:same], strict=True)]


def check(found: list[float], rounds: bool) -> None:
    assert max(found) < (ROUNDED if rounds else NOISE), found
    assert np.mean(np.array(found) < NOISE) > 0.75, found


def test_llama_cpp_says_the_same(adapted: tuple[str, Path, Trained], toy: Toy) -> None:
    kind, base, run = adapted
    adapter = run.run / "weights" / "adapter.gguf"
    server, plain = load(base, adapter=adapter, context=128), load(base, context=128)
    moved, found = 0.0, []
    for prompt in PROMPTS[:3]:
        ours = infer(toy, base, "--adapter", adapter, "--prompt", prompt, n=40)
        ids, top = server.greedy(ours["prompt_ids"], len(ours["ids"]), 5)  # ours may end an answer
        same = same_up_to_a_tie(ours, ids, top)
        found += differences(ours, top, same)
        _, without = plain.greedy(ours["prompt_ids"], 1, 5)
        moved = max(moved, abs(candidates(ours)[0][0][1] - dict(without[0]).get(candidates(ours)[0][0][0], -9)))
    assert moved > 0.05, "the adapter does nothing"
    check(found, rounds=kind not in ("f32", "qwen2"))


def test_the_file_is_in_llama_cpps_format(adapted: tuple[str, Path, Trained]) -> None:
    from toy import _native

    _, base, run = adapted
    found = _native.gguf_read(str(run.run / "weights" / "adapter.gguf"))
    metadata, theirs = found["metadata"], _native.gguf_read(str(base))
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == theirs["metadata"]["general.architecture"]
    assert metadata["adapter.lora.alpha"] == 12.0
    assert metadata["toy.lora.base_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    shapes = {tensor["name"]: tensor["shape"] for tensor in theirs["tensors"]}
    pairs = {tensor["name"]: tensor["shape"] for tensor in found["tensors"]}
    assert len(pairs) == 2 * 2 * 7
    for name, shape in pairs.items():
        n_in, n_out = shapes[name.removesuffix(".lora_a").removesuffix(".lora_b")]
        assert shape == ([n_in, 6] if name.endswith(".lora_a") else [6, n_out])


def test_what_is_frozen_is_written_as_it_began(built: None, toy: Toy) -> None:
    """Both factors of every pair are in the file, as llama.cpp wants them: of a frozen block the second is nothing, a
    frozen first factor stands as the seed made it; and both programs say the same with it."""
    flags = ("--recipe", "lora", "--model", BASE, "--corpus", EXCERPT, "--rank", 6, "--no-sample")
    sets = ("--set", "train.batch=8", "--set", "eval.batches=1", "--set", "eval.every=0")
    frozen = "blk.0.*, *.ffn_down.weight.lora_a"
    toy("train", *flags, *sets, "--steps", 1, "--set", "train.learning_rate=0", "--out", "start").ok()
    sets = (*sets, "--set", "train.learning_rate=0.01", "--set", f"train.freeze={frozen}")
    toy("train", *flags, *sets, "--steps", 60, "--out", "run").ok()
    start, end = (read(toy.cwd / name / "weights" / "adapter.gguf") for name in ("start", "run"))
    assert start.keys() == end.keys()
    assert len(end) == 2 * 2 * 7
    stays = {name for name in end if np.array_equal(start[name], end[name])}
    assert stays == {name for name in end if name.startswith("blk.0.") or name.endswith("ffn_down.weight.lora_a")}
    assert all(end[name].any() == name.endswith("_a") for name in stays)
    server = load(BASE, adapter=toy.cwd / "run" / "weights" / "adapter.gguf", context=128)
    ours = infer(toy, toy.cwd / "run", "--prompt", PROMPTS[0], n=20)
    ids, top = server.greedy(ours["prompt_ids"], len(ours["ids"]), 5)
    same = same_up_to_a_tie(ours, ids, top)
    check(differences(ours, top, same), rounds=True)


def test_a_decoder_with_the_adapter_says_what_the_run_says(adapted: tuple[str, Path, Trained], toy: Toy) -> None:
    """`toy infer RUN` is the adapter over its own base."""
    _, base, run = adapted
    adapter = run.run / "weights" / "adapter.gguf"
    one = infer(toy, base, "--adapter", adapter, "--prompt", "The ", n=8)
    other = infer(toy, run.run, "--prompt", "The ", n=8)
    assert one["ids"] == other["ids"]
    assert candidates(one) == candidates(other)
