"""llama.cpp's tokenizer cases, and small GGUFs, for the tests of this folder.

Some copies of `ggml-vocab-*.gguf` once went through a text editor: every byte that is not UTF-8 became U+FFFD.
The strings in them are whole (they are UTF-8), their lengths can be found again (no token holds a NUL), and the scores
follow from the tokens' order; so such a copy is still good for the cases, and `read_vocabulary` repairs it.
"""

from __future__ import annotations

import codecs
import random
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest
from harness import SHARED

from toy.errors import ToyError
from toy.models import gguf
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary, from_metadata

SEPARATOR = "\n__ggml_vocab_test__\n"
_LOST = "\ufffd".encode()


def cases(name: str) -> list[tuple[str, list[int]]]:
    """(text, ids without special tokens), as llama.cpp has them."""
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"no {path}")
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


def texts() -> list[str]:
    """The cases' texts, or a few of our own where they are not at hand."""
    try:
        return [text for text, _ in cases("gpt-2")]
    except pytest.skip.Exception:
        return ["Hello, world!", "  3 spaces", "\n\n\t tabs", "½ 漢字 🦙 é", "we'll DON'T it's", ""]


def read_vocabulary(name: str) -> Tokenizer:
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    try:
        return Tokenizer(from_metadata(gguf.read(path)["metadata"], str(path)))
    except ToyError:
        return Tokenizer(repair(path.read_bytes()))


def repair(data: bytes) -> Vocabulary:
    """The vocabulary of a copy whose bytes above 0x7F were replaced by U+FFFD."""
    tokens = _strings(data, b"tokenizer.ggml.tokens")
    if b"tokenizer.ggml.merges" in data:
        merges = _strings(data, b"tokenizer.ggml.merges")
        types = [CONTROL if token == "<|endoftext|>" else NORMAL for token in tokens]
        return Vocabulary("gpt2", tokens, types, merges=merges)
    # SentencePiece: <unk> <s> </s>, 256 bytes, then tokens from the likeliest on
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    scores = _scores(data, len(tokens))
    special = {"unk": 0, "bos": 1, "eos": 2}
    return Vocabulary("llama", tokens, types, scores=scores, special=special, add_bos=True, add_space_prefix=True)


def _strings(data: bytes, key: bytes) -> list[str]:
    """The strings of an array: each is an 8-byte length, of which two low bytes are ever used here, and text."""
    at = data.index(key) + len(key) + 8  # past the types of the value and of its elements
    at = data.index(b"\0" * 4, at + 2)  # in the count, of which the low bytes may be lost
    while data[at] == 0:
        at += 1
    found = []
    while True:
        low, at = _byte(data, at)
        high, at = _byte(data, at)
        if data[at : at + 6] != b"\0" * 6:
            return found
        start = at + 6
        if low is not None and high is not None:
            end = start + low + 256 * high
        else:  # up to the next length
            zeros = data.index(b"\0" * 6, start + 128)
            end = zeros if data[zeros + 6] == 0 else _before(data, zeros)
            end = _before(data, end)
        if data[start:end].startswith(b"tokenizer."):
            return found
        found.append(data[start:end].decode())
        at = end


def _scores(data: bytes, count: int) -> list[float]:
    """A token's score is minus its place, or minus a billion for those never to be made: whichever left this damage."""
    key = b"tokenizer.ggml.scores"
    at = data.index(key) + len(key) + 16
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = []
    for i in range(count):
        before = decoder.getstate()
        score = 0.0 if i < 259 else -float(i - 259)
        damaged = decoder.decode(struct.pack("<f", score)).encode()
        if not data.startswith(damaged, at):
            decoder.setstate(before)
            score = -1e9
            damaged = decoder.decode(struct.pack("<f", score)).encode()
            assert data.startswith(damaged, at)
        at += len(damaged)
        found.append(score)
    return found


def _byte(data: bytes, at: int) -> tuple[int | None, int]:
    """The byte at `at`, None when it was lost, and where the next one is."""
    return (None, at + 3) if data.startswith(_LOST, at) else (data[at], at + 1)


def _before(data: bytes, at: int) -> int:
    """Where the byte before `at` begins."""
    return at - 3 if data[at - 3 : at] == _LOST else at - 1


def write_model(path: Path, tokenizer: dict[str, Any], architecture: str = "llama", n_embd: int = 32) -> Path:
    """A GGUF of one llama block with random weights, around a tokenizer's metadata. llama.cpp loads it."""
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"])
    a = architecture
    metadata: dict[str, Any] = {
        "general.architecture": a,
        "general.name": "a tiny one",
        f"{a}.block_count": 1,
        f"{a}.context_length": 512,
        f"{a}.embedding_length": n_embd,
        f"{a}.feed_forward_length": n_embd,
        f"{a}.attention.head_count": 2,
        f"{a}.attention.head_count_kv": 2,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{a}.rope.dimension_count": n_embd // 2,
        f"{a}.vocab_size": n_vocab,
    } | tokenizer
    square = (n_embd, n_embd)
    tensors: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (n_embd, n_vocab)),
        ("output_norm.weight", (n_embd,)),
    ]
    tensors += [(f"blk.0.{name}.weight", (n_embd,)) for name in ("attn_norm", "ffn_norm")]
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors += [(f"blk.0.{name}.weight", square) for name in names]
    rng = random.Random(1)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_pair(key, value) for key, value in metadata.items())
    data = b""
    for name, shape in tensors:
        n = shape[0] * (shape[1] if len(shape) > 1 else 1)
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        head += _string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", 0, len(data))
        data += array("f", [1.0] * n if len(shape) == 1 else [rng.gauss(0, 0.05) for _ in range(n)]).tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: Any) -> bytes:
    out = _string(key)
    if isinstance(value, bool):
        return out + struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return out + struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return out + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return out + struct.pack("<If", 6, value)
    if not value or isinstance(value[0], str):
        return out + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(item) for item in value)
    kind, code = (5, "i") if isinstance(value[0], int) else (6, "f")
    return out + struct.pack(f"<IIQ{len(value)}{code}", 9, kind, len(value), *value)
