"""ggml's tensor types in numpy: what their bytes mean (`decode`), and a plain rounding into them (`encode`).

An account of its own of the formats of ggml-common.h, so that toy's reading of them is not judged by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def f16_of(blocks: Array, at: int) -> Array:
    return np.asarray(blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32))


def bytes_of(values: Array, dtype: str) -> Array:
    """[n] -> [n, item size] bytes."""
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(len(values), -1)


def inverse(scale: Array) -> Array:
    return np.asarray(np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0))


def nibbles_of(q: Array) -> Array:
    """[n, 32] -> [n, 16] bytes: the first half in the low nibbles."""
    return np.asarray(q[:, :16] | q[:, 16:] << 4)


def halves_of(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def encode_bf16(x: Array) -> Array:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return np.asarray(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8))


def decode_bf16(blocks: Array) -> Array:
    return np.asarray((blocks.copy().view("<u2").astype(np.uint32) << 16).view(np.float32))


def encode_q8_0(x: Array) -> Array:
    """Blocks of a scale (f16) and 32 signed bytes."""
    scale = (np.abs(x).max(axis=1) / 127).astype(np.float16)
    q = np.rint(x * inverse(scale.astype(np.float32))[:, None]).clip(-127, 127).astype(np.int8)
    return np.concatenate([bytes_of(scale, "<f2"), q.view(np.uint8)], axis=1)


def decode_q8_0(blocks: Array) -> Array:
    return np.asarray(blocks[:, 2:].copy().view(np.int8) * f16_of(blocks, 0), dtype=np.float32)


def encode_q4_0(x: Array) -> Array:
    """Blocks of a scale (f16) and 32 nibbles, eight above the value: the low ones first, then the high ones."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale = (peak / -8).astype(np.float16)
    q = np.rint(x * inverse(scale.astype(np.float32))[:, None] + 8).clip(0, 15).astype(np.uint8)
    return np.concatenate([bytes_of(scale, "<f2"), nibbles_of(q)], axis=1)


def decode_q4_0(blocks: Array) -> Array:
    return np.asarray((halves_of(blocks[:, 2:]).astype(np.float32) - 8) * f16_of(blocks, 0), dtype=np.float32)


def encode_q4_1(x: Array) -> Array:
    """Blocks of a scale, a minimum (f16) and 32 nibbles."""
    low = x.min(axis=1).astype(np.float16)
    scale = ((x.max(axis=1) - x.min(axis=1)) / 15).astype(np.float16)
    q = np.rint((x - low.astype(np.float32)[:, None]) * inverse(scale.astype(np.float32))[:, None])
    return np.concatenate(
        [bytes_of(scale, "<f2"), bytes_of(low, "<f2"), nibbles_of(q.clip(0, 15).astype(np.uint8))], axis=1
    )


def decode_q4_1(blocks: Array) -> Array:
    return np.asarray(halves_of(blocks[:, 4:]) * f16_of(blocks, 0) + f16_of(blocks, 2), dtype=np.float32)


def encode_q4_k(x: Array) -> Array:
    """256 values: two f16 scales; eight scales and minima of six bits in 12 bytes; nibbles, of each 64 values the first
    half in the low ones."""
    groups = x.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    step = (groups.max(axis=2) - low) / 15
    d, dmin = (step.max(axis=1) / 63).astype(np.float16), (-low.min(axis=1) / 63).astype(np.float16)
    d32, dmin32 = (v.astype(np.float32)[:, None] for v in (d, dmin))
    sc = np.rint(step * inverse(d32)).clip(0, 63).astype(np.uint8)
    m = np.rint(-low * inverse(dmin32)).clip(0, 63).astype(np.uint8)
    q = np.rint((groups + (dmin32 * m)[..., None]) * inverse(d32 * sc)[..., None]).clip(0, 15).astype(np.uint8)
    first = np.concatenate([sc[:, :4] | sc[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6], axis=1)
    last = sc[:, 4:] & 15 | m[:, 4:] << 4
    pairs = q.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([bytes_of(d, "<f2"), bytes_of(dmin, "<f2"), first, last, packed], axis=1)


def decode_q4_k(blocks: Array) -> Array:
    d, dmin, s = f16_of(blocks, 0), f16_of(blocks, 2), blocks[:, 4:16]
    sc = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], axis=1)
    m = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    q = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    return np.asarray((d * sc)[..., None] * q - (dmin * m)[..., None], dtype=np.float32).reshape(-1, 256)


def encode_q6_k(x: Array) -> Array:
    """256 values: low nibbles (128 bytes), upper two bits (64), sixteen signed scales, one f16 scale."""
    groups = x.reshape(-1, 16, 16)
    step = np.abs(groups).max(axis=2) / 31
    d = (step.max(axis=1) / 127).astype(np.float16)
    d32 = d.astype(np.float32)[:, None]
    sc = np.rint(step * inverse(d32)).clip(-128, 127).astype(np.int8)
    q = (np.rint(groups * inverse(d32 * sc)[..., None]).clip(-32, 31) + 32).astype(np.uint8)
    parts = q.reshape(-1, 2, 4, 32)  # two halves of four runs of 32 values
    low = np.concatenate([parts[:, :, :2] & 15 | (parts[:, :, 2:] & 15) << 4], axis=2).reshape(-1, 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    high = np.bitwise_or.reduce(parts >> 4 << shifts, axis=2).reshape(-1, 64)
    return np.concatenate([low, high, sc.view(np.uint8), bytes_of(d, "<f2")], axis=1)


def decode_q6_k(blocks: Array) -> Array:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    sc, d = blocks[:, 192:208].copy().view(np.int8).astype(np.float32), f16_of(blocks, 208)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    q = np.concatenate([low & 15, low >> 4], axis=2) | (high >> shifts & 3) << 4
    values = (q.reshape(-1, 16, 16).astype(np.float32) - 32) * (d * sc)[..., None]
    return np.asarray(values, dtype=np.float32).reshape(-1, 256)


def plain(dtype: str) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    return (
        lambda x: bytes_of(x.ravel(), dtype),
        lambda blocks: np.asarray(blocks.copy().view(dtype).astype(np.float32)),
    )


@dataclass(frozen=True)
class Format:
    """`encode`: [n, length] values -> [n, size] bytes; `decode`: back. A row is a whole number of blocks."""

    number: int  # in a GGUF's tensor table
    length: int  # values of a block
    size: int  # bytes of a block
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


FORMATS = {
    "F32": Format(0, 1, 4, *plain("<f4")),
    "F16": Format(1, 1, 2, *plain("<f2")),
    "BF16": Format(30, 1, 2, encode_bf16, decode_bf16),
    "Q4_0": Format(2, 32, 18, encode_q4_0, decode_q4_0),
    "Q4_1": Format(3, 32, 20, encode_q4_1, decode_q4_1),
    "Q8_0": Format(8, 32, 34, encode_q8_0, decode_q8_0),
    "Q4_K": Format(12, 256, 144, encode_q4_k, decode_q4_k),
    "Q6_K": Format(14, 256, 210, encode_q6_k, decode_q6_k),
}


def encode(values: Array, kind: str) -> bytes:
    """The bytes of a tensor. Rows (the last dimension) are whole blocks."""
    form = FORMATS[kind]
    assert values.shape[-1] % form.length == 0, (values.shape, kind)
    return form.encode(values.astype(np.float32).reshape(-1, form.length)).tobytes()


def decode(data: bytes | Array, kind: str) -> Array:
    """f32 values of a tensor's bytes, in one dimension."""
    form = FORMATS[kind]
    blocks = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    return form.decode(blocks.reshape(-1, form.size)).ravel()
