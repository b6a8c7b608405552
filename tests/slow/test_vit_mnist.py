"""Handwritten digits: a ViT that has seen 8,000 of them is right about 97 % of 2,000 others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from harness import SHARED, Toy

IMAGES, LABELS = SHARED / "mnist-t10k-images-idx3-ubyte.gz", SHARED / "mnist-t10k-labels-idx1-ubyte.gz"


def write_part(folder: Path, first: int, end: int) -> Path:
    """Digits first..end as a pair of IDX files; the path of their images."""
    folder.mkdir()
    n = (end - first).to_bytes(4, "big")
    pixels, labels = (gzip.decompress(path.read_bytes()) for path in (IMAGES, LABELS))
    path = folder / "digits-images-idx3-ubyte"
    path.write_bytes(pixels[:4] + n + pixels[8:16] + pixels[16 + 784 * first : 16 + 784 * end])
    (folder / "digits-labels-idx1-ubyte").write_bytes(labels[:4] + n + labels[8 + first : 8 + end])
    return path


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not IMAGES.is_file(), reason=f"no {IMAGES.name}: TOY_TEST_DATA names the folder that holds it")
def test_the_other_2000_digits_are_97_percent_right(toy: Toy) -> None:
    train, others = write_part(toy.cwd / "train", 0, 8000), write_part(toy.cwd / "others", 8000, 10000)
    flags = ("--preset", "vit-mnist", "--images", train, "--set", f"data.val_images={others}", "--out", "run")
    document = toy("train", "vit-tiny", *flags, "--json", timeout=3500).ok().document
    measured = toy("eval", "run", "--images", others, "--json").ok().document
    print(
        f"\n{measured['accuracy']:.2%} of the other digits right, validation loss {document['val_loss']:.4f}, "
        f"{document['parameters']} parameters, {document['seconds']:.0f} s"
    )
    assert document["steps"] <= 2000
    assert json.loads((toy.cwd / "run" / "config.json").read_text())["data"]["val_images"] == str(others)
    assert measured["accuracy"] >= 0.97
