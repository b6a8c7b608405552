"""A GGUF with its Q4_1 and Q8_0 tensors written out in f32: the same model without the rounding of its products."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

F32 = 0  # its number in a tensor table


def q4_1(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Blocks of a scale, a minimum (f16) and 32 nibbles: the low ones first, then the high ones."""
    blocks = data.reshape(-1, 20)
    scale, low = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return np.asarray(nibbles * scale + low, dtype=np.float32)


def q8_0(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Blocks of a scale (f16) and 32 signed bytes."""
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return np.asarray(blocks[:, 2:].view(np.int8) * scale, dtype=np.float32)


DECODERS = {"Q4_1": q4_1, "Q8_0": q8_0}


def dequantise(source: Path, target: Path) -> Path:
    """Metadata is copied as it is; the tensor table is written anew, with every tensor in f32."""
    from toy import _native

    model = _native.gguf_read(str(source))
    head = source.read_bytes()[: model["data_offset"]]
    first = model["tensors"][0]["name"].encode()
    metadata = head[: head.index(struct.pack("<Q", len(first)) + first)]
    data = np.memmap(source, dtype=np.uint8, mode="r", offset=model["data_offset"])

    table, offset = b"", 0
    for tensor in model["tensors"]:
        name, shape = tensor["name"].encode(), tensor["shape"]
        table += (
            struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        )
        table += struct.pack("<IQ", F32, offset)
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    with target.open("wb") as out:
        out.write(metadata + table)
        out.write(b"\0" * (-out.tell() % 32))
        for tensor in model["tensors"]:
            part = np.asarray(data[tensor["offset"] : tensor["offset"] + tensor["n_bytes"]])
            out.write((part if tensor["type"] == "F32" else DECODERS[tensor["type"]](part)).tobytes())
            out.write(b"\0" * (-out.tell() % 32))
    return target
