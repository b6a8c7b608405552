"""GGUF files that the tests make: small models of random weights in any tensor type, and copies in other types."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quants import FORMATS, Array, decode, encode

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # kinds of metadata values
ALIGNMENT = 32


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def value_kind(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (I32, struct.pack("<i", value)) if value < 0 else (U32, struct.pack("<I", value))
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, text(value)
    if value and isinstance(value[0], int):
        return ARRAY, struct.pack(f"<IQ{len(value)}i", I32, len(value), *value)
    items = [value_kind(item) for item in value]
    return ARRAY, struct.pack("<IQ", items[0][0] if items else STRING, len(items)) + b"".join(data for _, data in items)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


def tensor_table(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """(name, type, shape with the fastest dimension first, bytes) of each."""
    table, offset = b"", 0
    for name, kind, shape, size in tensors:
        table += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        table += struct.pack("<IQ", FORMATS[kind].number, offset)
        offset += size + -size % ALIGNMENT
    return table


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, Array]]) -> Path:
    """tensors: name -> (type, values with the slowest dimension first)."""
    keys = b"".join(
        text(key) + struct.pack("<I", kind) + data for key, (kind, data) in
        ((key, value_kind(value)) for key, value in metadata.items())
    )  # fmt: skip
    data = {name: encode(values, kind) for name, (kind, values) in tensors.items()}
    table = tensor_table([(n, kind, values.shape[::-1], len(data[n])) for n, (kind, values) in tensors.items()])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + keys + table
    path.write_bytes(padded(head) + b"".join(padded(part) for part in data.values()))
    return path


def read(path: Path) -> dict[str, Array]:
    """name -> f32 values, the slowest dimension first."""
    from toy import _native

    model = _native.gguf_read(str(path))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=model["data_offset"])
    return {
        t["name"]: decode(data[t["offset"] : t["offset"] + t["n_bytes"]], t["type"]).reshape(t["shape"][::-1])
        for t in model["tensors"]
    }


def rewrite(source: Path, target: Path, kind_of: Callable[[str, tuple[int, ...]], str]) -> Path:
    """A copy with each tensor in the type that `kind_of` (name, shape with the fastest dimension first) says; metadata
    is copied as it is."""
    from toy import _native

    model = _native.gguf_read(str(source))
    head = source.read_bytes()[: model["data_offset"]]
    metadata = head[: head.index(text(model["tensors"][0]["name"]))]
    data = np.memmap(source, dtype=np.uint8, mode="r", offset=model["data_offset"])

    plan = []
    for t in model["tensors"]:
        kind = kind_of(t["name"], tuple(t["shape"]))
        n_bytes = int(np.prod(t["shape"])) // FORMATS[kind].length * FORMATS[kind].size
        plan.append((t["name"], kind, tuple(t["shape"]), n_bytes))
    with target.open("wb") as out:
        out.write(padded(metadata + tensor_table(plan)))
        for t, (_, kind, shape, n_bytes) in zip(model["tensors"], plan, strict=True):
            part = data[t["offset"] : t["offset"] + t["n_bytes"]]
            if kind != t["type"]:
                part = np.frombuffer(encode(decode(part, t["type"]).reshape(shape[::-1]), kind), dtype=np.uint8)
            assert part.nbytes == n_bytes
            out.write(padded(part.tobytes()))
    return target


def dequantise(source: Path, target: Path) -> Path:
    """The same model without the rounding of its products: every tensor in f32."""
    return rewrite(source, target, lambda name, shape: "F32")


def quantise(source: Path, target: Path, kind: str, special: Mapping[str, str] | None = None) -> Path:
    """Every matrix in `kind`, where its rows are whole blocks, but those that `special` (a part of the name -> type)
    names; vectors stay in f32."""

    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        wanted = next((k for part, k in (special or {}).items() if part in name), kind)
        return wanted if len(shape) > 1 and shape[0] % FORMATS[wanted].length == 0 else "F32"

    return rewrite(source, target, kind_of)


@dataclass(frozen=True)
class RandomModel:
    """A small llama, qwen2 or gpt2 of random weights: norms near one, biases where the architecture has them."""

    arch: str = "llama"
    kind: str = "F32"  # of the matrices
    special: dict[str, str] = field(default_factory=dict)  # a part of a tensor's name -> its type
    n_layer: int = 2
    n_embd: int = 32
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 64
    vocab_size: int = 64
    context: int = 64
    rope_freq_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    seed: int = 7

    @property
    def metadata(self) -> dict[str, Any]:
        shape: dict[str, Any] = {
            "block_count": self.n_layer,
            "context_length": self.context,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "vocab_size": self.vocab_size,
        }
        if self.arch == "gpt2":
            shape["attention.layer_norm_epsilon"] = self.norm_eps
        else:
            shape |= {
                "attention.head_count_kv": self.n_head_kv,
                "attention.layer_norm_rms_epsilon": self.norm_eps,
                "rope.dimension_count": self.n_embd // self.n_head,
                "rope.freq_base": self.rope_freq_base,
            }
        return {"general.architecture": self.arch} | {f"{self.arch}.{key}": value for key, value in shape.items()}

    def tensors(self) -> dict[str, tuple[str, Array]]:
        random = np.random.RandomState(self.seed)  # numpy promises this one's numbers for ever
        found: dict[str, tuple[str, Array]] = {}

        def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
            kind = next((k for part, k in self.special.items() if part in name), self.kind)
            values = random.standard_normal((rows, columns)) / columns**0.5
            found[f"{name}.weight"] = (kind, values.astype(np.float32))
            if bias:
                vector(f"{name}.bias", rows, 0)

        def vector(name: str, n: int, middle: float) -> None:
            found[name] = ("F32", (middle + 0.1 * random.standard_normal(n)).astype(np.float32))

        def norm(name: str) -> None:
            vector(f"{name}.weight", self.n_embd, 1)
            if self.arch == "gpt2":
                vector(f"{name}.bias", self.n_embd, 0)

        matrix("token_embd", self.vocab_size, self.n_embd)
        if self.arch == "gpt2":
            matrix("position_embd", self.context, self.n_embd)
        for i in range(self.n_layer):
            block = f"blk.{i}"
            norm(f"{block}.attn_norm")
            if self.arch == "gpt2":
                matrix(f"{block}.attn_qkv", 3 * self.n_embd, self.n_embd, bias=True)
            else:
                n_kv = self.n_embd // self.n_head * self.n_head_kv
                for name, rows in (("q", self.n_embd), ("k", n_kv), ("v", n_kv)):
                    matrix(f"{block}.attn_{name}", rows, self.n_embd, bias=self.arch == "qwen2")
                matrix(f"{block}.ffn_gate", self.n_ff, self.n_embd)
            matrix(f"{block}.attn_output", self.n_embd, self.n_embd, bias=self.arch == "gpt2")
            norm(f"{block}.ffn_norm")
            matrix(f"{block}.ffn_up", self.n_ff, self.n_embd, bias=self.arch == "gpt2")
            matrix(f"{block}.ffn_down", self.n_embd, self.n_ff, bias=self.arch == "gpt2")
        norm("output_norm")
        if not self.tied:
            matrix("output", self.vocab_size, self.n_embd)
        return found

    def write(self, path: Path, more: Mapping[str, Any] | None = None) -> Path:
        return write(path, {**self.metadata, **(more or {})}, self.tensors())


def types_of(path: Path) -> dict[str, str]:
    from toy import _native

    return {tensor["name"]: tensor["type"] for tensor in _native.gguf_read(str(path))["tensors"]}


def data_of(path: Path) -> bytes:
    """The tensors' bytes; metadata before them may differ."""
    from toy import _native

    offset: int = _native.gguf_read(str(path))["data_offset"]
    return path.read_bytes()[offset:]


def write_adapter(
    path: Path,
    targets: dict[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 3,
    more: dict[str, Any] | None = None,
) -> dict[str, Array]:
    """A LoRA in llama.cpp's format. targets: tensor -> (rows, columns). Returns what it adds to each tensor."""
    random, tensors, deltas = np.random.RandomState(seed), {}, {}
    for name, (rows, columns) in targets.items():
        a = random.standard_normal((rank, columns)).astype(np.float32) / columns**0.5
        b = random.standard_normal((rows, rank)).astype(np.float32)
        tensors |= {f"{name}.lora_a": ("F32", a), f"{name}.lora_b": ("F32", b)}
        deltas[name] = (8.0 / rank) * (b.astype(np.float64) @ a)
    keys = {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
        "toy.run_id": "a-run",
    }  # fmt: skip
    write(path, {k: v for k, v in (keys | (more or {})).items() if v is not None}, tensors)
    return deltas


def write_vit(path: Path, pool: str = "cls") -> Path:
    """width 32, two layers, images of 8 x 8 in one channel, patches of 4, three classes."""
    random = np.random.RandomState(5)
    tensors: dict[str, tuple[str, Array]] = {}

    def add(name: str, *shape: int, middle: float = 0) -> None:
        tensors[name] = ("F32", (middle + 0.3 * random.standard_normal(shape)).astype(np.float32))

    add("patch_embd.weight", 32, 16)
    add("patch_embd.bias", 32)
    if pool == "cls":
        add("cls_embd.weight", 32)
    add("position_embd.weight", 5 if pool == "cls" else 4, 32)
    for i in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}.weight", 32, middle=1)
            add(f"blk.{i}.{norm}.bias", 32)
        for name, rows, columns in (
            ("attn_qkv", 96, 32),
            ("attn_output", 32, 32),
            ("ffn_up", 64, 32),
            ("ffn_down", 32, 64),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns)
            add(f"blk.{i}.{name}.bias", rows)
    add("output_norm.weight", 32, middle=1)
    add("output_norm.bias", 32)
    add("output.weight", 3, 32)
    add("output.bias", 3)
    numbers = {
        "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-6, "image_size": 8, "patch_size": 4, "channel_count": 1, "class_count": 3,
        "pooling": pool, "classes": ["a", "b", "c"], "image_mean": [0.25], "image_std": [0.5],
    }  # fmt: skip
    keys = {"general.architecture": "vit"} | {f"toy.vit.{key}": value for key, value in numbers.items()}
    return write(path, keys, tensors)
