"""Small packed data as the runners read it, written here and not by toy: tokens, examples with a mask, image sets."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from harness import EXCERPT

Array = np.ndarray[Any, Any]


def write_tokens(path: Path, vocab_size: int = 64, n: int = 20_000) -> Path:
    """Tokens with structure to learn: bytes of Shakespeare, folded into the vocabulary."""
    data = np.frombuffer(EXCERPT.read_bytes(), dtype=np.uint8)[:n]
    (data.astype("<i4") % vocab_size).tofile(path)
    return path


def ragged_examples(n: int, longest: int, vocab_size: int, seed: int = 3) -> list[tuple[Array, Array]]:
    """(tokens, mask) of n examples of 3..longest tokens: questions, an answer, some with a second of both."""
    random = np.random.RandomState(seed)
    text = np.frombuffer(EXCERPT.read_bytes(), dtype=np.uint8).astype("<i4") % vocab_size
    found = []
    for _ in range(n):
        length = random.randint(3, longest + 1)
        at = random.randint(0, len(text) - length)
        mask = np.zeros(length, dtype=np.uint8)
        answer = random.randint(1, length)
        mask[answer:] = 1
        if length - answer > 5:
            mask[answer + 2 : answer + 4] = 0
        found.append((text[at : at + length], mask))
    return found


def write_examples(folder: Path, examples: list[tuple[Array, Array]], prefix: str = "") -> dict[str, str]:
    """The keys of a runner's environment that name them."""
    lengths = [len(tokens) for tokens, _ in examples]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {key: folder / name for key, name in
             (("CORPUS", "tokens.bin"), ("OFFSETS", "offsets.bin"), ("MASK", "mask.bin"))}  # fmt: skip
    np.concatenate([tokens for tokens, _ in examples]).astype("<i4").tofile(paths["CORPUS"])
    np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(paths["OFFSETS"])
    np.concatenate([mask for _, mask in examples]).astype(np.uint8).tofile(paths["MASK"])
    return {prefix + key: str(path) for key, path in paths.items()}


def patterned_images(n: int, n_class: int, size: int, channels: int, seed: int = 4) -> tuple[Array, Array]:
    """Images [n, channel, row, column] and labels: each class a pattern of its own, under noise."""
    random = np.random.RandomState(seed)
    patterns = random.randint(0, 256, (n_class, channels, size, size))
    labels = random.randint(0, n_class, n).astype("<i4")
    noise = random.randint(-60, 61, (n, channels, size, size))
    return (patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels


def write_images(folder: Path, images: Array, labels: Array, n_class: int) -> Path:
    from toy import _native

    n, channels, height, width = images.shape
    folder.mkdir(parents=True, exist_ok=True)
    head = b"TOYIMG1\0" + struct.pack("<5I", n, channels, height, width, n_class)
    data = head.ljust(64, b"\0") + labels.astype("<i4").tobytes() + images.tobytes()
    (folder / "images.bin").write_bytes(data)
    scaled = images.astype(np.float64).transpose(1, 0, 2, 3).reshape(channels, -1) / 255
    mean, std = scaled.mean(1).tolist(), scaled.std(1).tolist()
    classes = [f"class {i}" for i in range(n_class)]
    manifest = {
        "format": "toy/images-v1", "n_images": n, "width": width, "height": height, "n_channel": channels,
        "classes": classes, "mean": mean, "std": std, "sha256": hashlib.sha256(data).hexdigest(), "source": "tests",
        "counts": {name: int((labels == i).sum()) for i, name in enumerate(classes)},
    }  # fmt: skip
    (folder / "images.json").write_text(json.dumps(manifest), encoding="utf-8")
    vit = {"classes": classes, "image_mean": mean, "image_std": std}
    metadata = {"general.architecture": "vit"} | {f"toy.vit.{key}": value for key, value in vit.items()}
    _native.gguf_write(str(folder / "classes.gguf"), metadata)
    return folder
