"""Images to a packed set: folders, IDX files and packed sets, the bytes of the format, the cache, what is refused."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, SHARED, peak_memory, refused
from PIL import Image

from toy import corpora
from toy.corpora import PreparedImages, images
from toy.errors import ToyError
from toy.models import gguf

DIGITS = ROOT / "data" / "digits"
Array = np.ndarray[Any, Any]


def noise(seed: int, *shape: int) -> Array:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(path: Path, pixels: Array, mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, **options)
    return path


def folder(path: Path, sizes: tuple[int, int] = (6, 6), each: int = 3, classes: str = "ab") -> Path:
    """PNG files of grey noise in class folders."""
    for label, name in enumerate(classes):
        for n in range(each):
            save(path / name / f"{n}.png", noise(100 * label + n, *sizes))
    return path


def idx(path: Path, pixels: Array, labels: list[int], prefix: str = "train", packed: bool = False) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    pair = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + bytes(labels),
    }
    for name, data in pair.items():
        (path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return path / (f"{prefix}-images-idx3-ubyte" + ".gz" * packed)


def unpack(made: PreparedImages) -> tuple[list[int], Array]:
    """Labels and pixels, read as the format says."""
    data = (made.folder / "images.bin").read_bytes()
    assert data[:8] == b"TOYIMG1\0"
    n, channels, height, width, n_class = struct.unpack("<5I", data[8:28])
    assert data[28:64] == bytes(36)
    assert (n, channels, height, width, n_class) == (
        made.n_images, made.n_channel, made.height, made.width, len(made.classes),
    )  # fmt: skip
    labels = np.frombuffer(data, "<i4", n, 64).tolist()
    pixels = np.frombuffer(data, np.uint8, offset=64 + 4 * n).reshape(n, channels, height, width)
    return labels, pixels


def both_refuse(path: Path, cache: Path, says: str, image_size: int = 0) -> ToyError:
    """`check_images` and `prepare_images` refuse alike, and nothing is left behind."""
    error = refused(lambda: corpora.check_images(path, image_size))
    assert says in error.message
    assert refused(lambda: corpora.prepare_images(path, cache, image_size)).message == error.message
    assert not list(cache.glob("*-images-*"))
    return error


# What images can be


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=5)
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    save(root / "b" / ".hidden.png", noise(9, 3, 3))
    made = corpora.prepare_images(root, tmp_path / "c")
    labels, pixels = unpack(made)
    expected = {noise(100 * label + n, 6, 6).tobytes(): label for label in (0, 1) for n in range(5)}
    assert {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)} == expected
    assert labels != sorted(labels)  # the end is like the rest
    scaled = pixels / 255
    data = (made.folder / "images.bin").read_bytes()
    assert made.manifest == {
        "format": "toy/images-v1", "name": "set", "n_images": 10, "classes": ["a", "b"], "counts": {"a": 5, "b": 5},
        "source": {"path": "set", "sha256": made.manifest["source"]["sha256"]}, "packing": 1,
        "width": 6, "height": 6, "n_channel": 1, "mean": [pytest.approx(scaled.mean(), abs=1e-12)],
        "std": [pytest.approx(scaled.std(), abs=1e-12)], "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert (made.n_images, made.width, made.height, made.n_channel) == (10, 6, 6, 1)
    assert made.sha256 == made.manifest["sha256"]
    metadata = gguf.read(made.classes_gguf)["metadata"]
    assert metadata["general.architecture"] == "vit" and metadata["toy.vit.classes"] == ["a", "b"]
    assert metadata["toy.vit.image_mean"] == pytest.approx(made.manifest["mean"], abs=1e-7)
    assert metadata["toy.vit.image_std"] == pytest.approx(made.manifest["std"], abs=1e-7)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(packed: bool, tmp_path: Path) -> None:
    pixels, labels = noise(1, 20, 7, 7), [n % 3 for n in range(20)]
    path = idx(tmp_path / "mnist", pixels, labels, packed=packed)
    made = corpora.prepare_images(path, tmp_path / "c")
    found_labels, found = unpack(made)
    order = [pixels.reshape(20, -1).tolist().index(image.ravel().tolist()) for image in found]
    assert sorted(order) == list(range(20)) != order and found_labels == [labels[n] for n in order]
    assert made.classes == ["0", "1", "2"]
    assert corpora.prepare_images(path.parent, tmp_path / "c") == made
    rgb = corpora.prepare_images(path, tmp_path / "c", 0, 3)
    assert rgb.n_channel == 3 and (unpack(rgb)[1] == found).all()


@pytest.mark.parametrize(
    ("images_name", "labels_name"),
    [
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels-idx1-ubyte"),
        ("a-images-idx3-ubyte", "a-labels-idx1-ubyte.gz"),
        ("images-idx3-ubyte", "labels-idx1-ubyte"),
    ],
)
def test_usual_names_of_labels(images_name: str, labels_name: str, tmp_path: Path) -> None:
    path = idx(tmp_path, noise(1, 4, 3, 3), [0, 1, 0, 1])
    path.rename(tmp_path / images_name)
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / labels_name)
    assert corpora.prepare_images(tmp_path / images_name, tmp_path / "c").n_images == 4


def test_packed_sets(tmp_path: Path) -> None:
    made = corpora.prepare_images(folder(tmp_path / "set"), tmp_path / "c")
    for name in (made.folder, made.folder / "images.bin"):
        assert corpora.prepare_images(name, tmp_path / "d") == made
        corpora.check_images(name, 6, 1)
    error = refused(lambda: corpora.prepare_images(made.folder, tmp_path / "d", 8))
    assert error.kind == "bad_config" and "6 x 6" in error.message
    assert not (tmp_path / "d").exists()


def test_the_committed_digits(tmp_path: Path) -> None:
    corpora.check_images(DIGITS)
    made = corpora.prepare_images(DIGITS, tmp_path)
    assert (made.n_images, made.width, made.n_channel) == (1600, 28, 1)
    assert made.manifest["counts"] == {str(n): 160 for n in range(10)}
    labels, _ = unpack(made)
    assert all(8 <= labels[-160:].count(n) <= 24 for n in range(10))  # the validation part has all classes
    assert sum(path.stat().st_size for path in DIGITS.iterdir()) < 300_000
    if SHARED.is_dir():
        whole = gzip.decompress((SHARED / "mnist-t10k-images-idx3-ubyte.gz").read_bytes())[16:]
        every = {whole[at : at + 784] for at in range(0, len(whole), 784)}
        assert all(image.tobytes() in every for image in unpack(made)[1])


# What happens to a picture


def one(path: Path, size: int = 0, channels: int = 0, cache: Path | None = None) -> Array:
    """Pixels of the picture at `path`, packed with another of its size in another class."""
    root = path.parent.parent
    with Image.open(path) as image:
        pixels = np.zeros((image.height, image.width), np.uint8)
    save(root / "zz" / "other.png", pixels)
    made = corpora.prepare_images(root, cache or root.parent / "cache", size, channels)
    labels, found = unpack(made)
    return found[labels.index(made.classes.index(path.parent.name))]


def test_resizing(tmp_path: Path) -> None:
    """The central square, then a mean over the pixels that fall into one; halving by a triangle of four."""
    wide = np.zeros((8, 20), np.uint8)
    wide[:, 6:14] = 200
    wide[:, 9] = 201
    found = one(save(tmp_path / "s" / "a" / "w.png", wide), 4)
    assert found.shape == (1, 4, 4) and found.min() == 200  # nothing of the dark sides
    grown = one(save(tmp_path / "t" / "a" / "w.png", noise(1, 4, 4)), 9)
    assert grown.shape == (1, 9, 9)


def test_colours(tmp_path: Path) -> None:
    rgb = noise(2, 5, 5, 3)
    found = one(save(tmp_path / "rgb" / "a" / "x.png", rgb))
    assert found.shape == (3, 5, 5) and (found == rgb.transpose(2, 0, 1)).all()
    grey = one(tmp_path / "rgb" / "a" / "x.png", channels=1)
    assert grey.shape == (1, 5, 5) and np.abs(grey[0] - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    clear = np.concatenate([rgb, np.zeros((5, 5, 1), np.uint8)], 2)
    assert (one(save(tmp_path / "alpha" / "a" / "x.png", clear)) == 255).all()
    deep = noise(3, 5, 5).astype(np.uint16) * 256
    assert (one(save(tmp_path / "deep" / "a" / "x.png", deep))[0] == deep // 256).all()
    two = np.where(noise(4, 5, 5) > 99, 255, 0).astype(np.uint8)
    path = tmp_path / "bits" / "a" / "x.bmp"
    path.parent.mkdir(parents=True)
    Image.fromarray(two).convert("1").save(path)
    assert (one(path)[0] == two).all()
    palette = tmp_path / "palette" / "a" / "x.gif"
    palette.parent.mkdir(parents=True)
    Image.fromarray(np.full((5, 5, 3), (255, 0, 0), np.uint8)).convert("P").save(palette)
    assert (one(palette) == np.array([255, 0, 0])[:, None, None]).all()


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    tall = np.zeros((8, 8), np.uint8)
    tall[:4] = 255
    found = one(save(tmp_path / "s" / "a" / "x.jpg", tall, exif=exif, quality=100))
    assert found[0, :, :4].max() < 9 and found[0, :, 4:].min() > 246


def test_sizes_are_those_of_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "s" / "a" / "x.jpg", noise(1, 4, 8), exif=exif)
    save(tmp_path / "s" / "b" / "y.png", noise(1, 8, 4))
    error = both_refuse(tmp_path / "s", tmp_path / "c", "are 4 x 8")  # of one size, though not square
    assert "image_size=4" in error.hint


def test_a_constant_channel_keeps_a_deviation(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "s" / name / "x.png", np.full((4, 4), 51, np.uint8))
    made = corpora.prepare_images(tmp_path / "s", tmp_path / "c")
    assert made.manifest["mean"] == [pytest.approx(0.2)] and made.manifest["std"] == [1.0]


def test_pack_one(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(1, 6, 6))
    save(tmp_path / "b.jpg", noise(2, 9, 12, 3))
    out = corpora.pack_one([tmp_path / "a.png", str(tmp_path / "b.jpg")], 6, 3, tmp_path / "out")
    data = (out / "images.bin").read_bytes()
    assert struct.unpack("<5I", data[8:28]) == (2, 3, 6, 6, 0)
    assert np.frombuffer(data, "<i4", 2, 64).tolist() == [-1, -1]
    assert len(data) == 64 + 2 * (4 + 3 * 36)
    assert data[72 : 72 + 36] == noise(1, 6, 6).tobytes()
    metadata = gguf.read(out / "classes.gguf")["metadata"]
    assert len(metadata["toy.vit.image_mean"]) == len(metadata["toy.vit.image_std"]) == 3
    assert json.loads((out / "images.json").read_text())["n_images"] == 2
    # the pixels are those of training
    root = tmp_path / "set"
    made = corpora.prepare_images(folder(root, (9, 9)), tmp_path / "c", 6)
    labels, pixels = unpack(made)
    single = corpora.pack_one([root / "a" / f"{n}.png" for n in range(3)], 6, 1, tmp_path / "again")
    mine = np.frombuffer((single / "images.bin").read_bytes(), np.uint8, offset=64 + 12).reshape(3, 1, 6, 6)
    assert {image.tobytes() for image in mine} == {p.tobytes() for p, at in zip(pixels, labels, strict=True) if at == 0}
    missing = refused(lambda: corpora.pack_one([tmp_path / "none.png"], 6, 1, tmp_path / "no"))
    assert missing.kind == "missing_file" and "none.png" in missing.message
    (tmp_path / "text.png").write_text("text")
    bad = refused(lambda: corpora.pack_one([tmp_path / "text.png"], 6, 1, tmp_path / "no"))
    assert bad.kind == "bad_file" and "text.png" in bad.message and "no image" in bad.message


# Validation sets


def test_like(tmp_path: Path) -> None:
    train = corpora.prepare_images(folder(tmp_path / "train", each=4), tmp_path / "c")
    val = corpora.prepare_images(folder(tmp_path / "val", each=2), tmp_path / "c", like=train)
    for key in ("mean", "std", "classes", "width", "n_channel"):
        assert val.manifest[key] == train.manifest[key]
    assert gguf.read(val.classes_gguf)["metadata"] == gguf.read(train.classes_gguf)["metadata"]
    prepare = functools.partial(corpora.prepare_images, cache_dir=tmp_path / "c", like=train)
    other = refused(lambda: prepare(folder(tmp_path / "x", classes="abc")))
    assert "'c'" in other.message and "same classes" in other.hint
    fewer = refused(lambda: prepare(folder(tmp_path / "y", classes="ac")))
    assert "other classes" in fewer.message
    sizes = refused(lambda: prepare(folder(tmp_path / "z", (8, 8))))
    assert "8 x 8" in sizes.message and "6 x 6" in sizes.message
    assert prepare(tmp_path / "z", image_size=6).width == 6
    packed = corpora.prepare_images(tmp_path / "z", tmp_path / "d")
    assert "8 x 8" in refused(lambda: prepare(packed.folder)).message
    coloured = folder(tmp_path / "rgb")
    save(coloured / "a" / "rgb.png", noise(1, 6, 6, 3))
    assert prepare(coloured).n_channel == 1


def test_like_idx(tmp_path: Path) -> None:
    train = corpora.prepare_images(idx(tmp_path / "t", noise(1, 6, 4, 4), [0, 1, 2, 3, 0, 1]), tmp_path / "c")
    few = idx(tmp_path / "v", noise(2, 4, 4, 4), [0, 1, 2, 1], prefix="t10k")
    assert corpora.prepare_images(few, tmp_path / "c", like=train).classes == ["0", "1", "2", "3"]
    more = idx(tmp_path / "w", noise(2, 4, 4, 4), [0, 1, 2, 4])
    assert "'4'" in refused(lambda: corpora.prepare_images(more, tmp_path / "c", like=train)).message


def test_require(tmp_path: Path) -> None:
    made = corpora.prepare_images(folder(tmp_path / "s"), tmp_path / "c")
    made.require()
    made.require(0.2)
    assert "validate" in refused(lambda: made.require(0.1)).message
    assert "train" in refused(lambda: made.require(1.0)).message


# What is refused


def test_missing(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    assert both_refuse(tmp_path / "none", cache, "no images at").kind == "missing_file"
    (tmp_path / "empty").mkdir()
    both_refuse(tmp_path / "empty", cache, "no class folders")
    save(tmp_path / "loose" / "x.png", noise(1, 4, 4))
    both_refuse(tmp_path / "loose", cache, "in no class folder")
    both_refuse(tmp_path / "loose" / "x.png", cache, "not a set of images")
    root = folder(tmp_path / "set")
    (root / "c").mkdir()
    assert str(root / "c") in both_refuse(root, cache, "has no images in it").message
    (root / "c" / "deeper").mkdir()
    assert "one level down" in both_refuse(root, cache, "has no images in it").hint
    both_refuse(folder(tmp_path / "single", classes="a"), cache, "one class only: a")
    assert "not supported" in refused(lambda: corpora.prepare_images(root, cache, 0, 2)).message


def test_mixed_sizes(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    odd = save(root / "b" / "9.png", noise(1, 6, 5))
    error = both_refuse(root, tmp_path / "c", "several sizes")
    assert str(root / "a" / "0.png") in error.message and str(odd) in error.message
    assert "6 x 6" in error.message and "5 x 6" in error.message and "model.image_size" in error.hint
    made = corpora.prepare_images(root, tmp_path / "c", 4)
    assert (made.width, made.height, made.n_images) == (4, 4, 7)
    error = both_refuse(folder(tmp_path / "wide", (4, 6)), tmp_path / "d", "6 x 4")
    assert "squares" in error.message and "model.image_size=4" in error.hint
    assert corpora.prepare_images(tmp_path / "wide", tmp_path / "d", 4).width == 4


def damaged_pngs() -> list[tuple[str, bytes]]:
    import io

    buffer = io.BytesIO()
    Image.fromarray(noise(1, 6, 6)).save(buffer, "png")
    good = buffer.getvalue()
    return [("text", b"no image"), ("empty", b""), ("cut", good[:-30]), ("flipped", good[:45] + b"\0\1" + good[47:])]


@pytest.mark.parametrize(("how", "data"), damaged_pngs())
def test_corrupt_images(how: str, data: bytes, tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    bad = root / "b" / "1.png"
    bad.write_bytes(data)
    error = refused(lambda: corpora.prepare_images(root, tmp_path / "c"))
    assert error.kind == "bad_file" and f"cannot read the image {bad}" in error.message
    assert not list((tmp_path / "c").glob("set-*")) and not list((tmp_path / "c").glob(".tmp*"))
    if how in ("text", "empty"):
        assert refused(lambda: corpora.check_images(root)).message == error.message


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda images, labels: labels.unlink(), "no labels beside"),
        (lambda images, labels: labels.write_bytes(labels.read_bytes()[:-1]), "cut short"),
        (lambda images, labels: labels.write_bytes(struct.pack(">2I", 0x801, 3) + b"\0\1\0"), "4 images"),
        (lambda images, labels: labels.write_bytes(struct.pack(">2I", 0x801, 4) + bytes(4)), "one class only: 0"),
        (lambda images, labels: labels.write_bytes(images.read_bytes()), "labels (idx1-ubyte)"),
        (lambda images, labels: labels.write_bytes(labels.read_bytes() + b"\0"), "goes on"),
        (lambda images, labels: images.write_bytes(images.read_bytes()[:-1]), "51 bytes"),
        (lambda images, labels: images.write_bytes(images.read_bytes() + b"\0"), "53 bytes"),
        (lambda images, labels: images.write_bytes(b"\0\0\x08"), "images (idx3-ubyte)"),
        (lambda images, labels: images.write_bytes(struct.pack(">4I", 0x80D, 4, 3, 3)), "images (idx3-ubyte)"),
        (lambda images, labels: images.write_bytes(struct.pack(">4I", 0x803, 4, 0, 3)), "no images"),
    ],
)  # fmt: skip
def test_damaged_idx(damage: Callable[[Path, Path], None], says: str, tmp_path: Path) -> None:
    path = idx(tmp_path / "set", noise(1, 4, 3, 3), [0, 1, 0, 1])
    damage(path, path.parent / "train-labels-idx1-ubyte")
    both_refuse(path, tmp_path / "c", says)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = idx(tmp_path / "set", noise(1, 400, 3, 3), [0, 1] * 200, packed=True)
    whole = path.read_bytes()
    for data in (whole[:-20], whole[:60] + b"junk" + whole[64:], gzip.compress(gzip.decompress(whole)[:-1])):
        path.write_bytes(data)
        error = refused(lambda: corpora.prepare_images(path, tmp_path / "c"))
        assert error.kind == "bad_file" and str(path) in error.message and "damaged" in error.message
    assert not list((tmp_path / "c").glob("*-images-*"))


def test_idx_by_other_names(tmp_path: Path) -> None:
    path = idx(tmp_path, noise(1, 4, 3, 3), [0, 1, 0, 1])
    labels = tmp_path / "train-labels-idx1-ubyte"
    both_refuse(labels, tmp_path / "c", "holds labels")
    idx(tmp_path, noise(1, 4, 3, 3), [0, 1, 0, 1], prefix="t10k")
    error = both_refuse(tmp_path, tmp_path / "c", "several sets")
    assert path.name in error.message and "val_images" in error.hint


@pytest.mark.parametrize(
    ("name", "left"),
    [("images.json", None), ("images.json", 30), ("classes.gguf", None), ("images.bin", 8), ("images.bin", 100)],
)
def test_damaged_packed_sets(name: str, left: int | None, tmp_path: Path) -> None:
    """A file gone (None) or cut after so many bytes: refused where the user named it, made again in the cache."""
    made = corpora.prepare_images(folder(tmp_path / "set"), tmp_path / "c")
    whole = (made.folder / name).read_bytes()
    if left is None:
        (made.folder / name).unlink()
    else:
        (made.folder / name).write_bytes(whole[:left])
    for call in (corpora.check_images, corpora.prepare_images):
        error = refused(functools.partial(call, made.folder))  # type: ignore[arg-type]
        assert error.kind == "bad_file" and f"{made.folder} is not a whole packed image set" in error.message
        assert name in error.message
    assert corpora.prepare_images(tmp_path / "set", tmp_path / "c") == made
    assert (made.folder / name).read_bytes() == whole


# The cache


def test_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "set")
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    first = corpora.prepare_images(root, tmp_path / "c")
    monkeypatch.setattr(images, "_pack", lambda *args: pytest.fail("packed again"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda self: pytest.fail("an unchanged folder was read again"))
        assert corpora.prepare_images(root, tmp_path / "c") == first
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "set")
    assert corpora.prepare_images(moved, tmp_path / "c") == first  # the same content
    monkeypatch.undo()
    folders = {first.folder, corpora.prepare_images(moved, tmp_path / "c", 5).folder}
    folders.add(corpora.prepare_images(moved, tmp_path / "c", 0, 3).folder)
    (moved / "a" / "0.png").rename(moved / "b" / "7.png")
    folders.add(corpora.prepare_images(moved, tmp_path / "c").folder)
    assert len(folders) == 4


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=20)
    for limit in (0.1, 0.5, 0.9):

        def stop(done: int, total: int, limit: float = limit) -> None:
            if done > limit * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            corpora.prepare_images(root, tmp_path / "c", progress=stop)
        assert not tmp_path.joinpath("c").exists() or {p.name for p in (tmp_path / "c").iterdir()} <= {"index.json"}


@pytest.mark.parametrize("packed", [False, True])
def test_progress(packed: bool, tmp_path: Path) -> None:
    path = folder(tmp_path / "s", each=9) if not packed else idx(tmp_path, noise(1, 18, 3, 3), [0, 1] * 9, packed=True)
    seen: list[tuple[int, int]] = []
    corpora.prepare_images(path, tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    size = sum(file.stat().st_size for file in path.rglob("*.png")) if not packed else path.stat().st_size
    assert seen == sorted(seen) and {total for _, total in seen} == {size} and seen[-1] == (size, size)
    assert len(seen) > 15


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    code = (
        "import sys; from toy import corpora; from pathlib import Path\n"
        "corpora.prepare_images(sys.argv[1], Path(sys.argv[2]))"
    )
    peaks = []
    for n in (20, 2000):
        path = idx(tmp_path / str(n), noise(1, n, 100, 100), [0, 1] * (n // 2))
        peaks.append(peak_memory(code, path, tmp_path / "c"))
    assert peaks[1] < peaks[0] + 8_192  # KiB; the set is 20 MB


def test_pack_images_script(tmp_path: Path) -> None:
    folder(tmp_path / "set", (8, 6))
    argv = [sys.executable, str(ROOT / "prep" / "pack_images.py"), "set", "out", "--image-size", "6", "--json"]
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    done = run(argv)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == "toy/pack-images-v1" and document["n_images"] == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["classes.gguf", "images.bin", "images.json"]
    assert corpora.prepare_images(tmp_path / "out", tmp_path / "c").width == 6
    again = run(argv)
    assert again.returncode == 2 and json.loads(again.stdout)["error"]["kind"] == "bad_flag"
    assert run([*argv, "--force"]).returncode == 0
    val = run([*argv[:3], "val", "--image-size", "6", "--like", "out"])
    assert val.returncode == 0 and "6 images of 2 classes, 6 x 6" in val.stdout
    bad = run([*argv[:2], "none", "out2"])
    assert bad.returncode == 2 and "error: no images at none" in bad.stderr and "Traceback" not in bad.stderr
    assert not (tmp_path / "out2").exists()
