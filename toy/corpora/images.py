"""From images to a packed set that a runner maps into memory: checked first, packed once, found again by content.

A set is a folder. `images.bin`: 64 bytes of header (magic `TOYIMG1\\0`, then little-endian uint32 n_images, n_channel,
height, width, n_class), int32 labels[n_images] (-1: unknown), uint8 pixels [image][channel][row][column].
`images.json` is its manifest, `classes.gguf` the names of the classes and the mean and deviation of each channel, for
the runner. Images lie in the order of a hash of their names: the end, held out for validation, is like the rest.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toy.corpora import packings
from toy.corpora.cache import Index, Meter, Progress, writing
from toy.corpora.making import default_cache_dir
from toy.corpora.pictures import Pictures, Pixels, Shape, looks_like_pictures, open_pictures, read_picture
from toy.errors import ToyError
from toy.models import gguf

FORMAT = "toy/images-v1"
IMAGES, MANIFEST, CLASSES_GGUF = "images.bin", "images.json", "classes.gguf"

#: Changes when the same images would pack to other bytes.
PACKING = 1

_MAGIC = b"TOYIMG1\0"
_HEADER = 64
_NO_READING = Meter(None, 0, 1)


@dataclass(frozen=True)
class PreparedImages:
    """A set that a runner can read. `sha256` is that of `images.bin`."""

    folder: Path
    manifest: dict[str, Any]
    n_images: int
    width: int
    height: int
    n_channel: int
    classes: list[str]
    sha256: str

    @property
    def classes_gguf(self) -> Path:
        return self.folder / CLASSES_GGUF

    def require(self, val_fraction: float = 0.0) -> None:
        """Raises ToyError (bad_file) when no image is left to train on, or to validate on."""
        n_val = int(self.n_images * val_fraction)
        if n_val == self.n_images or (val_fraction > 0 and n_val == 0):
            what = "validate" if n_val == 0 else "train"
            message = f"the {self.n_images} images of {self.manifest.get('name')} leave none to {what} on"
            raise ToyError("bad_file", message, "give more images, data.val_images, or another data.val_fraction")


def is_images(path: str | Path) -> bool:
    """Whether `path` looks like a set of images, and not like a text: by names, at a glance."""
    if not str(path):
        return False
    path = Path(path).expanduser()
    return _packed_folder(path) is not None or looks_like_pictures(path)


def check_images(path: str | Path, image_size: int = 0, n_channel: int = 0) -> None:
    """The cheap validations, before anything is made: the files are listed, and a few are looked at.

    Raises ToyError when there are no images, a class has none or there is only one, the labels are missing or of
    another number, a file is damaged, or sizes differ where `image_size` (0: theirs) makes them no common one.
    """
    path = Path(path).expanduser()
    packed = _packed_folder(path)
    if packed is not None:
        _require_shape(_loaded(packed), image_size, n_channel)
    else:
        open_pictures(path).shape(image_size, n_channel, _NO_READING, at_most=100)


def prepare_images(
    path: str | Path,
    cache_dir: Path | None = None,
    image_size: int = 0,
    n_channel: int = 0,
    progress: Progress | None = None,
    like: PreparedImages | None = None,
) -> PreparedImages:
    """The packed set of the images at `path`, from `cache_dir` when the same content was packed before.

    `path` is a folder of class folders, an IDX images file (or the folder it lies in with its labels), or a packed set.
    `image_size` (0: theirs, all the same) is what they are resized to, after a crop to their central square;
    `n_channel` is 1 (grey) or 3 (RGB), 0: grey where all are. `like` is a set whose classes, shape and statistics to
    use, for validation. `progress(done, total)` counts bytes. Nothing is left half-written, and memory does not grow
    with the pixels.
    Raises ToyError (missing_file, bad_file, bad_config, disk_full).
    """
    path = Path(path).expanduser()
    if n_channel not in (0, 1, 3):
        raise ToyError("bad_config", f"images of {n_channel} channels are not supported", "1 (grey) or 3 (RGB)")
    packed = _packed_folder(path)
    if packed is not None:
        made = _loaded(packed)
        _require_shape(made, image_size, n_channel)
        if like is not None:
            _require_classes(path, made.classes, like)
            _require_like(path, Shape(made.n_channel, made.height, made.width, False), like)
        return made
    pictures = open_pictures(path)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    index = Index(cache)
    meter = Meter(progress, pictures.n_bytes, pictures.passes)
    content = pictures.sha256(index, meter)
    index.save()
    stats = [like.classes, like.manifest["mean"], like.manifest["std"]] if like is not None else None
    if like is not None:
        _require_classes(path, pictures.classes, like)
        n_channel = n_channel or like.n_channel
    key = hashlib.sha256(json.dumps(["images", PACKING, content, image_size, n_channel, stats]).encode()).hexdigest()
    folder = cache / f"{packings.slug(pictures.path.name.split('.')[0])}-images-{key[:16]}"
    found = _load(folder)
    if found is None:
        shape = pictures.shape(image_size, n_channel, meter)
        if like is not None:
            _require_like(path, shape, like)
        with writing(folder, lambda: _load(folder) is not None) as part:
            _pack(part, pictures, shape, meter, content, like)
        meter.finish()
        found = _loaded(folder)
    return found


def pack_one(files: Sequence[str | Path], image_size: int, n_channel: int, out_dir: Path) -> Path:
    """A set of these image files without labels, for `toy infer --image`; each cropped and resized as in training."""
    shape = Shape(n_channel, image_size, image_size, resize=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / IMAGES).open("wb") as file:
        file.write(_header(len(files), shape, 0) + b"\xff" * 4 * len(files))
        for path in files:
            file.write(read_picture(Path(path).expanduser(), shape).tobytes())
    _write_about(out_dir, {"name": "images", "n_images": len(files), "classes": [], "counts": {}}, shape, [0.0], [1.0])
    return out_dir


# Packing


def _pack(
    folder: Path, pictures: Pictures, shape: Shape, meter: Meter, content: str, like: PreparedImages | None
) -> None:
    n = len(pictures.keys)
    classes = pictures.classes if like is None else like.classes
    names = [hashlib.sha256(f"{PACKING} {key}".encode("utf-8", "surrogateescape")).digest() for key in pictures.keys]
    place = np.empty(n, dtype=np.int64)
    place[sorted(range(n), key=names.__getitem__)] = np.arange(n)
    labels = np.empty(n, dtype="<i4")
    labels[place] = pictures.labels
    counts = np.zeros((shape.n_channel, 256), dtype=np.int64)
    with (folder / IMAGES).open("wb") as file:
        file.write(_header(n, shape, len(classes)) + labels.tobytes())
        for at, pixels in zip(place, pictures.images(shape, meter), strict=True):
            file.seek(_HEADER + 4 * n + int(at) * shape.size)
            file.write(pixels.tobytes())
            _count(pixels, counts)
    mean, std = _statistics(counts)
    if like is not None:
        mean, std = like.manifest["mean"], like.manifest["std"]
    about = {
        "name": pictures.path.name,
        "n_images": n,
        "classes": classes,
        "counts": {name: int((labels == label).sum()) for label, name in enumerate(classes)},
        "source": {"path": pictures.path.name, "sha256": content},
        "packing": PACKING,
    }
    _write_about(folder, about, shape, mean, std)


def _header(n_images: int, shape: Shape, n_class: int) -> bytes:
    sizes = struct.pack("<5I", n_images, shape.n_channel, shape.height, shape.width, n_class)
    return (_MAGIC + sizes).ljust(_HEADER, b"\0")


def _count(pixels: Pixels, counts: np.ndarray[Any, Any]) -> None:
    for channel, values in enumerate(pixels):
        counts[channel] += np.bincount(values.ravel(), minlength=256)


def _statistics(counts: np.ndarray[Any, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1, from the counts of each value."""
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    return [float(m) for m in mean], [float(s) or 1.0 for s in std]  # a channel of one value stays that


def _write_about(
    folder: Path, about: dict[str, Any], shape: Shape, mean: Sequence[float], std: Sequence[float]
) -> None:
    """The manifest and the runner's GGUF of the set in `folder`. A single mean or std is every channel's."""
    mean, std = (list(stat) * (shape.n_channel if len(stat) == 1 else 1) for stat in (mean, std))
    with (folder / IMAGES).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    sizes = {"width": shape.width, "height": shape.height, "n_channel": shape.n_channel}
    manifest = {"format": FORMAT} | about | sizes | {"mean": mean, "std": std, "sha256": sha256}
    packings.write_json(folder / MANIFEST, manifest)
    metadata: dict[str, Any] = {"general.architecture": "vit"}
    if about["classes"]:
        metadata["toy.vit.classes"] = about["classes"]
    metadata |= {"toy.vit.image_mean": mean, "toy.vit.image_std": std}
    gguf.write_vocabulary(folder / CLASSES_GGUF, metadata)


# Packed sets


def _packed_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path if (path / IMAGES).is_file() else None
    if path.name == IMAGES and path.is_file():
        return path.parent
    return None


def _load(folder: Path) -> PreparedImages | None:
    try:
        return _loaded(folder)
    except (ToyError, OSError):
        return None


def _loaded(folder: Path) -> PreparedImages:
    """The set in `folder`, its manifest checked against the header and the size. Raises ToyError (bad_file)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with (folder / IMAGES).open("rb") as file:
            head = file.read(_HEADER)
        size = (folder / IMAGES).stat().st_size
        keys = ("n_images", "n_channel", "height", "width")
        numbers = [int(manifest[key]) for key in keys]
        classes = [str(name) for name in manifest["classes"]]
        sha256 = str(manifest["sha256"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad_set(folder, one_reason(error)) from error
    if head[:8] != _MAGIC or len(head) < _HEADER:
        raise _bad_set(folder, f"{IMAGES} does not begin as one")
    if [*struct.unpack("<5I", head[8:28])] != [*numbers, len(classes)]:
        raise _bad_set(folder, f"{IMAGES} and {MANIFEST} are of two sets")
    n_images, n_channel, height, width = numbers
    if size != _HEADER + n_images * (4 + n_channel * height * width):
        raise _bad_set(folder, f"{IMAGES} is cut short")
    if not (folder / CLASSES_GGUF).is_file():
        raise _bad_set(folder, f"{CLASSES_GGUF} is missing")
    return PreparedImages(folder.absolute(), manifest, n_images, width, height, n_channel, classes, sha256)


def one_reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{Path(str(error.filename)).name}: {(error.strerror or '').lower()}"
    return f"{MANIFEST} lacks {error}" if isinstance(error, KeyError) else f"{MANIFEST}: {error}"


def _bad_set(folder: Path, reason: str) -> ToyError:
    return ToyError("bad_file", f"{folder} is not a whole packed image set: {reason}", "pack the images again")


# What a set must be


def _require_shape(made: PreparedImages, image_size: int, n_channel: int) -> None:
    if image_size not in (0, made.width) or n_channel not in (0, made.n_channel):
        have = f"{made.width} x {made.height}, {made.n_channel} channel{'s' if made.n_channel > 1 else ''}"
        message = f"{made.folder} was packed as {have}, and another shape is asked for"
        hint = f"--set model.image_size={made.width}, n_channel={made.n_channel}; or pack the images themselves again"
        raise ToyError("bad_config", message, hint)
    if made.width != made.height:
        raise ToyError("bad_file", f"{made.folder} holds images that are not square", "pack them with an image size")


def _require_classes(path: Path, classes: list[str], like: PreparedImages) -> None:
    missing = [name for name in like.classes if name not in classes]
    added = [name for name in classes if name not in like.classes]
    numbered = classes == [str(i) for i in range(len(classes))] and not added  # labels need not reach the last class
    if (missing and not numbered) or added or [name for name in like.classes if name in classes] != classes:
        what = f"has the class {added[0]!r}" if added else f"lacks the class {missing[0]!r}" if missing else "differs"
        message = f"the images of {path} have other classes than those trained on: it {what}"
        raise ToyError(
            "bad_file", message, f"validation images are of the same classes: {', '.join(like.classes[:12])}"
        )


def _require_like(path: Path, shape: Shape, like: PreparedImages) -> None:
    ours = (shape.width, shape.height, shape.n_channel)
    theirs = (like.width, like.height, like.n_channel)
    if ours != theirs:
        ours_text, theirs_text = (f"{w} x {h} with {c} channel{'s' * (c > 1)}" for w, h, c in (ours, theirs))
        message = f"the images of {path} are {ours_text}, those trained on {theirs_text}"
        raise ToyError("bad_file", message, f"--set model.image_size={like.width} makes both of one size")
