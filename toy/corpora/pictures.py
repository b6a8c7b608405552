"""What a set of images can be, read one image at a time: a folder of class folders, or a pair of IDX files."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from toy.corpora.cache import Index, Meter
from toy.corpora.sources import Part
from toy.errors import ToyError, one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".tga"]
)
HINT = "images are a folder of class folders, an IDX images file with its labels beside it, or a packed set"
_GREY = frozenset(["1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"])
_IDX = ("idx3-ubyte", "idx1-ubyte")


@dataclass(frozen=True)
class Shape:
    """Of every image in a set. `resize`: images of other sizes are cropped to their central square and resized."""

    n_channel: int
    height: int
    width: int
    resize: bool

    @property
    def size(self) -> int:
        return self.n_channel * self.height * self.width


class Pictures(Protocol):
    """A set of labelled images on disk. `keys` name them whatever the machine; `labels` count into `classes`."""

    path: Path
    classes: list[str]
    labels: list[int]
    keys: list[str]
    n_bytes: int
    passes: int  # over those bytes

    def sha256(self, index: Index, meter: Meter) -> str:
        """Identity of pixels and classes."""

    def shape(self, image_size: int, n_channel: int, meter: Meter, at_most: int | None = None) -> Shape:
        """What the images have in common, or are made to have. `at_most`: look at so many only."""

    def images(self, shape: Shape, meter: Meter) -> Iterator[Pixels]:
        """Every image, [channel, row, column], in the order of `keys`."""


def looks_like_pictures(path: Path) -> bool:
    """IDX files by their names, and folders with a folder that has an image in it."""
    try:
        if not path.is_dir():
            return _idx_kind(path) is not None
        folders = [entry for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
        inside = any(_is_image(entry.name) for folder in folders[:100] for entry in os.scandir(folder))
        return inside or any(_idx_kind(entry) == 0 for entry in path.iterdir())
    except OSError:
        return False


def open_pictures(path: Path) -> Pictures:
    """The images at `path`. Raises ToyError (missing_file, bad_file) when there are none, or of one class only."""
    try:
        if path.is_dir():
            idx = sorted(entry for entry in path.iterdir() if _idx_kind(entry) == 0)
            if len(idx) > 1:
                hint = f"name one of them: {idx[-1]}, say; and another with --set data.val_images=FILE"
                message = f"{path} holds several sets of images: {', '.join(entry.name for entry in idx[:4])}"
                raise ToyError("bad_file", message, hint)
            return IdxPictures(idx[0]) if idx else FolderPictures(path)
        if not path.exists():
            raise ToyError("missing_file", f"no images at {path}", HINT)
        if _idx_kind(path) == 1:
            raise ToyError("bad_file", f"{path} holds labels, not images", "name the images file; labels lie beside it")
        with path.open("rb") as file:
            magic = file.read(4)
        if _idx_kind(path) == 0 or magic == b"\0\0\x08\x03":
            return IdxPictures(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    raise ToyError("bad_file", f"{path} is not a set of images", HINT)


def _unreadable(path: Path, error: OSError) -> ToyError:
    return ToyError("bad_file", f"cannot read {path}: {error.strerror or error}", "check that you may read it")


def _alike(image_size: int, height: int, width: int, where: str) -> None:
    if not image_size and height != width:
        message = f"the images of {where} are {width} x {height}, and a vit takes squares"
        raise ToyError("bad_file", message, f"--set model.image_size={min(height, width)} crops them to their centre")


def require_classes(path: Path, classes: list[str]) -> None:
    if len(classes) < 2:
        message = f"the images of {path} are of one class only: {classes[0]}"
        raise ToyError("bad_file", message, "a model learns to tell classes apart; give at least two")


# A folder of class folders


class FolderPictures:
    """`path/<class>/<image>`: classes in the order of their names; files of other kinds are left out."""

    passes = 3

    def __init__(self, path: Path):
        self.path = path
        self.labels: list[int] = []
        self.keys: list[str] = []
        self._sizes: list[tuple[int, int]] = []  # bytes and modification time
        entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
        self.classes = sorted(entry.name for entry in entries if entry.is_dir())
        if not self.classes:
            loose = any(_is_image(entry.name) for entry in entries)
            what = "lie in no class folder" if loose else "are not there: no class folders"
            raise ToyError("bad_file", f"the images of {path} {what}", HINT)
        for label, name in enumerate(self.classes):
            files = sorted(
                (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in os.scandir(path / name)
                if _is_image(entry.name) and entry.is_file()
            )
            if not files:
                inside = any(entry.is_dir() for entry in os.scandir(path / name))
                hint = f"are its class folders one level down? --images {path / name}" if inside else "remove it"
                raise ToyError("bad_file", f"the class folder {path / name} has no images in it", hint)
            self.labels += [label] * len(files)
            self.keys += [f"{name}/{file}" for file, _, _ in files]
            self._sizes += [(size, changed) for _, size, changed in files]
        self.n_bytes = sum(size for size, _ in self._sizes)
        require_classes(path, self.classes)

    def sha256(self, index: Index, meter: Meter) -> str:
        listing = hashlib.sha256(repr((self.keys, self._sizes)).encode("utf-8", "surrogateescape"))
        # one entry for the tree: it is unchanged when the names, sizes and times of all its files are
        stamp = int.from_bytes(listing.digest()[:6], "big")
        tree = Part(self.path, self.path.name, stamp, max(changed for _, changed in self._sizes))
        known = index.known(tree)
        if known is not None:
            meter.read(self.n_bytes)
            return known
        whole = hashlib.sha256()
        for key in self.keys:
            try:
                data = (self.path / key).read_bytes()
            except OSError as error:
                raise _unreadable(self.path / key, error) from error
            whole.update(key.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(data).digest())
            meter.read(len(data))
        index.learn(tree, whole.hexdigest())
        return whole.hexdigest()

    def shape(self, image_size: int, n_channel: int, meter: Meter, at_most: int | None = None) -> Shape:
        first: tuple[int, int] | None = None
        grey = True
        chosen = list(range(len(self.keys)))
        if at_most is not None:  # the first ones of every class
            each = max(1, at_most // len(self.classes))
            chosen = [i for i in chosen if i < each or self.labels[i] != self.labels[i - each]]
        for i in chosen:
            path = self.path / self.keys[i]
            size, is_grey = _header(path)
            grey &= is_grey
            first = first or size
            if size != first and not image_size:
                raise ToyError(
                    "bad_file",
                    f"images of several sizes: {self.path / self.keys[chosen[0]]} is {first[0]} x {first[1]},"
                    f" {path} is {size[0]} x {size[1]}",
                    f"--set model.image_size={min(*first, *size)} makes them all of one size",
                )
            meter.read(self._sizes[i][0])
        assert first is not None
        _alike(image_size, first[1], first[0], str(self.path))
        channels = n_channel or (1 if grey else 3)
        width, height = (image_size, image_size) if image_size else first
        return Shape(channels, height, width, resize=image_size > 0)

    def images(self, shape: Shape, meter: Meter) -> Iterator[Pixels]:
        for key, (size, _) in zip(self.keys, self._sizes, strict=True):
            pixels = read_picture(self.path / key, shape)
            if pixels.shape[1:] != (shape.height, shape.width):
                raise ToyError("bad_file", f"{self.path / key} changed while it was read", "run it again")
            yield pixels
            meter.read(size)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) as it is looked at, and whether it is grey: from the file's first bytes."""
    with _opened(path) as image:
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        width, height = image.size
        return ((height, width) if sideways else (width, height)), image.mode in _GREY


def read_picture(path: Path, shape: Shape) -> Pixels:
    """[channel, row, column] of one image file.

    It is turned as its EXIF says, laid over white where it is transparent, made grey or RGB as `shape` asks; under
    `shape.resize` its central square is cut out and resized (bilinear over all the pixels that fall into one).
    """
    from PIL import Image, ImageOps

    with _opened(path) as opened:
        image = ImageOps.exif_transpose(opened)
        mode = "L" if shape.n_channel == 1 else "RGB"
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value / 256 if value else 0).convert("L")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if shape.resize:
            image = _square(image, shape.width)
        pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _square(image: Any, size: int) -> Any:
    from PIL import Image

    width, height = image.size
    if width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


class _opened:
    """An image of Pillow's; whatever goes wrong with it is an error that names the file."""

    def __init__(self, path: Path):
        self._path = path
        self._image: Any = None

    def __enter__(self) -> Any:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._image = Image.open(self._path)
        except Exception as error:  # decoders can raise anything
            raise self._failed(error) from error
        return self._image

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._image is not None:
            self._image.close()
        if isinstance(error, Exception) and not isinstance(error, (ToyError, MemoryError)):
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ToyError:
        if isinstance(error, FileNotFoundError):
            return ToyError("missing_file", f"no image at {self._path}", "check the path")
        reason = "it is no image, or damaged" if type(error).__name__ == "UnidentifiedImageError" else one_line(error)
        return ToyError("bad_file", f"cannot read the image {self._path}: {reason[:200]}", "repair or remove it")


# IDX files


def _idx_kind(path: Path) -> int | None:
    """0 for a file named like IDX images, 1 for labels, None for others."""
    name = path.name.lower().removesuffix(".gz")
    return next((n for n, ending in enumerate(_IDX) if name.endswith(ending) and not name.startswith(".")), None)


def labels_of(images: Path) -> Path:
    """The labels file of an IDX images file, found beside it by the usual names."""
    name = images.name.removesuffix(".gz")
    renamed = name.replace("images", "labels").replace("idx3", "idx1")
    names = [
        renamed,
        renamed.replace(".idx1", "-idx1"),
        renamed.replace("-idx1", ".idx1"),
        name.replace("idx3", "idx1"),
    ]
    for candidate in dict.fromkeys(names):
        for suffix in ("", ".gz"):
            path = images.parent / (candidate + suffix)
            if candidate != name and path.is_file():
                return path
    raise ToyError("missing_file", f"no labels beside {images}", f"put them there as {renamed} (or {renamed}.gz)")


class IdxPictures:
    """A file of grey images (idx3-ubyte, or that in gzip) and one of their labels: LeCun's format of MNIST."""

    passes = 2

    def __init__(self, path: Path):
        self.path = path
        self._labels_path = labels_of(path)
        self.n_bytes = path.stat().st_size
        with _idx(self._labels_path) as file:
            (n_labels,) = _idx_header(self._labels_path, file, 1)
            labels = _idx_read(self._labels_path, file, n_labels)
            _idx_end(self._labels_path, file)
        with _idx(path) as file:
            self._n, self._height, self._width = _idx_header(path, file, 3)
        if self._n != n_labels:
            message = f"{path} has {self._n} images, and {self._labels_path.name} {n_labels} labels"
            raise ToyError("bad_file", message, "the two files are not of one set, or one is cut short")
        if not self._n or not self._height or not self._width:
            raise ToyError("bad_file", f"{path} has no images in it", HINT)
        if path.suffix != ".gz" and self.n_bytes != 16 + self._n * self._height * self._width:
            raise _damaged(path, f"{self.n_bytes} bytes where its header says {self._n} images")
        self.labels = list(labels)
        self.keys = [str(i) for i in range(self._n)]
        self.classes = [str(i) for i in range(max(labels) + 1)]
        require_classes(path, sorted({str(label) for label in labels}))

    def sha256(self, index: Index, meter: Meter) -> str:
        digests = []
        for path in (self.path, self._labels_path):
            status = path.stat()
            part = Part(path, path.name, status.st_size, status.st_mtime_ns)
            digest = index.known(part)
            if digest is None:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                index.learn(part, digest)
            digests.append(digest)
        meter.read(self.n_bytes)
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def shape(self, image_size: int, n_channel: int, meter: Meter, at_most: int | None = None) -> Shape:
        _alike(image_size, self._height, self._width, str(self.path))
        size = (image_size, image_size) if image_size else (self._height, self._width)
        return Shape(n_channel or 1, *size, resize=image_size > 0)

    def images(self, shape: Shape, meter: Meter) -> Iterator[Pixels]:
        from PIL import Image

        size = self._height * self._width
        with _idx(self.path) as file:
            _idx_header(self.path, file, 3)
            for n in range(self._n):
                pixels = np.frombuffer(_idx_read(self.path, file, size), np.uint8).reshape(self._height, self._width)
                if (shape.height, shape.width) != pixels.shape:
                    pixels = np.asarray(_square(Image.fromarray(pixels), shape.width), dtype=np.uint8)
                yield np.repeat(pixels[None], shape.n_channel, axis=0)
                meter.read(self.n_bytes * (n + 1) // self._n - self.n_bytes * n // self._n)
            _idx_end(self.path, file)


class _idx:
    """An IDX file, unpacked as it is read."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> BinaryIO:
        try:
            with self._path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
            self._file = cast("BinaryIO", gzip.open(self._path) if packed else self._path.open("rb"))
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return self._file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        if isinstance(error, (OSError, EOFError, zlib.error)) and not isinstance(error, ToyError):
            raise _damaged(self._path, one_line(error)) from error


def _damaged(path: Path, reason: str) -> ToyError:
    return ToyError("bad_file", f"{path} is a damaged IDX file: {reason}", "download it again")


def _idx_header(path: Path, file: BinaryIO, dimensions: int) -> tuple[int, ...]:
    """The sizes in an IDX file of bytes: magic 0, 0, 8 (unsigned byte), dimensions; then big-endian uint32 each."""
    head = file.read(4 + 4 * dimensions)
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, 8, dimensions]):
        what = "images (idx3-ubyte)" if dimensions == 3 else "labels (idx1-ubyte)"
        raise _damaged(path, f"its first bytes are not those of {what}")
    return struct.unpack(f">{dimensions}I", head[4:])


def _idx_read(path: Path, file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise _damaged(path, "it is cut short")
    return data


def _idx_end(path: Path, file: BinaryIO) -> None:
    if file.read(1):
        raise _damaged(path, "it goes on after its last item")
