"""The arithmetic of `toy eval`, its questions, and which adapter fits which base."""

from __future__ import annotations

import codecs
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import write_jsonl

from toy.errors import ToyError
from toy.models import adapters, evaluate
from toy.models.cards import Card
from toy.models.tokenizer import Tokenizer


def card(path: str = "model.gguf", architecture: str = "llama", **more: Any) -> Card:
    shapes = {"blk.0.attn_q.weight": [8, 8], "blk.0.ffn_up.weight": [8, 16], "token_embd.weight": [8, 32]}
    tensors = more.pop("tensors", [{"name": name, "shape": shape, "type": "F32"} for name, shape in shapes.items()])
    metadata = more.pop("metadata", {})
    fields: dict[str, Any] = {
        "name": "", "parameters": 400, "quantisation": "F32", "types": {"F32": 400}, "size": 1600, "context": 64,
    }  # fmt: skip
    return Card(path=Path(path), architecture=architecture, metadata=metadata, tensors=tensors, **fields, **more)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_means_are_weighted_by_tokens_and_errors_count_groups() -> None:
    mean, error = evaluate.mean_of_sums([2.0, 9.0], [2, 3])
    assert mean == pytest.approx(11 / 5)
    # by hand: residuals 2 - 2.2*2 and 9 - 2.2*3
    assert error == pytest.approx(math.sqrt((2.4**2 + 2.4**2) * 2) / 5)
    assert evaluate.mean_of_sums([3.0], [2]) == (1.5, None)


def test_the_error_is_the_spread_of_repeated_draws() -> None:
    draw = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        counts = draw.integers(1, 20, 60)
        sums = counts * 2.0 + draw.normal(0, np.sqrt(counts))
        mean, error = evaluate.mean_of_sums(sums.tolist(), counts.tolist())
        assert error is not None
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_likelihood() -> None:
    found = evaluate.likelihood([4.0, 0.0, 8.0], [2, 0, 2], 8)
    assert found["loss"] == 3.0
    assert found["perplexity"] == pytest.approx(math.exp(3))
    assert found["bits_per_byte"] == pytest.approx(12 / math.log(2) / 8)
    assert found["bits_per_byte_stderr"] == pytest.approx(found["loss_stderr"] * 4 / 8 / math.log(2))
    assert evaluate.likelihood([1.0], [1], 0)["bits_per_byte"] is None
    with pytest.raises(ToyError, match="no token to score"):
        evaluate.likelihood([0.0], [0], 0)


def test_shares() -> None:
    assert evaluate.share(3, 4) == (0.75, pytest.approx(0.25))
    assert evaluate.share(1, 1) == (1.0, None)


@pytest.mark.parametrize(
    ("n", "context", "stride", "windows"),
    [
        (1, 8, 0, 0), (2, 8, 0, 1), (9, 8, 0, 1), (10, 8, 0, 2), (17, 8, 0, 2), (18, 8, 0, 3),
        (9, 8, 2, 1), (10, 8, 2, 2), (11, 8, 2, 2), (12, 8, 2, 3), (5, 8, 2, 1), (12, 8, 8, 2),
    ],
)  # fmt: skip
def test_windows(n: int, context: int, stride: int, windows: int) -> None:
    assert evaluate.n_windows(n, context, stride) == windows


def test_the_tail_is_what_training_holds_out() -> None:
    text = evaluate.tail(evaluate.Text(np.arange(101, dtype="<i4")), 0.1)
    assert text.tokens.tolist() == list(range(91, 101))
    offsets = np.array([0, 3, 5, 9, 10], "<i8")
    examples = evaluate.tail(evaluate.Text(np.arange(10, dtype="<i4"), offsets, np.ones(10, "u1")), 0.5)
    assert examples.offsets is not None
    assert examples.mask is not None
    assert (examples.tokens.tolist(), examples.offsets.tolist()) == ([5, 6, 7, 8, 9], [0, 4, 5])
    assert len(examples.mask) == 5


# --- choices --------------------------------------------------------------------------------------------------------


def test_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "A", "choices": ["x", "y"], "answer": 1}\n\n'
        '{"prompt": "B", "choices": ["x", "y", "z"], "answer": 0}\n'
    )
    assert evaluate.read_questions(file) == [
        evaluate.Question("A", ("x", "y"), 1), evaluate.Question("B", ("x", "y", "z"), 0),
    ]  # fmt: skip


def test_questions_end_at_ends_of_lines_only(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are, Python's splitlines does not; and editors put a mark in front."""
    file = write_jsonl(tmp_path / "q.jsonl", {"question": "A\u2028B\x85", "choices": ["x", "y"], "answer": 1})
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes().replace(b"\n", b"\r\n"))
    assert evaluate.read_questions(file) == [evaluate.Question("A\u2028B\x85", ("x", "y"), 1)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "not JSON (Expecting value)"),
        ("[" * 100_000, "not JSON (nested too deeply)"),
        ("[1]", "not an object"),
        ('{"choices": ["a", "b"], "answer": 0}', "no question"),
        ('{"question": "A", "choices": ["a"], "answer": 0}', "at least two choices"),
        ('{"question": "A", "choices": ["a", ""], "answer": 0}', "at least two choices"),
        ('{"question": "A", "choices": ["a", 3], "answer": 0}', "at least two choices"),
        ('{"question": "A", "choices": ["a", "b"], "answer": 2}', "from 0 to 1"),
        ('{"question": "A", "choices": ["a", "b"], "answer": true}', "from 0 to 1"),
        ('{"question": "A", "choices": ["a", "b"]}', "from 0 to 1"),
    ],
)
def test_bad_questions_are_named_by_line(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "A", "choices": ["x", "y"], "answer": 1}\n' + line + "\n")
    with pytest.raises(ToyError, match=r"q\.jsonl:2: ") as caught:
        evaluate.read_questions(file)
    assert words in caught.value.message
    assert caught.value.exit_code == 2


def test_no_questions(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    for name, kind in (("q.jsonl", "bad_file"), ("none.jsonl", "missing_file"), ("b.jsonl", "bad_file")):
        with pytest.raises(ToyError) as caught:
            evaluate.read_questions(tmp_path / name)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("prompt", "choice", "text", "size"),
    [
        ("Paris is", "big", "Paris is big", 4),
        ("Paris is ", "big", "Paris is big", 3),
        ("Paris is", " big", "Paris is big", 4),
        ("Paris is\n", "big", "Paris is\nbig", 3),
        ("", "é", "é", 2),
    ],
)
def test_a_choice_continues_its_question(prompt: str, choice: str, text: str, size: int) -> None:
    tokenizer = Tokenizer.from_name("bytes")
    ids, n, n_bytes = evaluate.continuation(tokenizer, prompt, choice)
    assert n_bytes == size
    assert len(ids) - n == size, "a byte a token: what is scored is the choice"
    assert b"".join(tokenizer.piece(i) for i in ids).decode() == text
    assert n >= 1


# --- adapters -------------------------------------------------------------------------------------------------------


def lora(architecture: str = "llama", a: int = 8, b: int = 8, name: str = "blk.0.attn_q.weight", **keys: Any) -> Card:
    tensors = [
        {"name": f"{name}.lora_a", "shape": [a, 2], "type": "F32"},
        {"name": f"{name}.lora_b", "shape": [2, b], "type": "F32"},
    ]
    return card("adapter.gguf", architecture, tensors=tensors, metadata={"general.type": "adapter", **keys})


def test_an_adapter_that_fits() -> None:
    adapters.check(card(), lora())
    adapters.check(card(), lora(name="blk.0.ffn_up.weight", b=16))


@pytest.mark.parametrize(
    ("base", "adapter", "words"),
    [
        (card(architecture="qwen2"), lora(), "adapts a llama model, and model.gguf is a qwen2"),
        (card(), lora(a=16), "does not fit model.gguf: blk.0.attn_q.weight is 8 x 8"),
        (card(), lora(b=16), "does not fit model.gguf"),
        (card(), lora(name="blk.7.attn_q.weight"), "adapts blk.7.attn_q.weight, which model.gguf does not have"),
        (card(), card("other.gguf"), "is a model, not an adapter"),
        (lora(), lora(), "is an adapter, not a model"),
        (card(), lora(name="blk.0.attn_q.weight.x"), "does not have"),
    ],
)
def test_an_adapter_for_another_base(base: Card, adapter: Card, words: str) -> None:
    with pytest.raises(ToyError) as caught:
        adapters.check(base, adapter)
    assert words in caught.value.message
    assert (caught.value.kind, caught.value.exit_code) == ("bad_file", 2)
    assert caught.value.hint


def test_the_hash_of_the_base_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "base.gguf"
    base.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    adapters.check(card(str(base)), lora(**{"toy.lora.base_sha256": digest}))
    with pytest.raises(ToyError, match="another base"):
        adapters.check(card(str(base)), lora(**{"toy.lora.base_sha256": "0" * 64}))
