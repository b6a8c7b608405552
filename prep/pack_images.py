"""Images -> a packed set: `python prep/pack_images.py IMAGES OUT --image-size 32`.

IMAGES is a folder of class folders (PNG, JPEG, BMP and others), an IDX images file with its labels beside it, or the
folder that both lie in. OUT becomes a folder that `--images OUT` takes, here or on another machine. `toy train` packs
by itself; this is for packing once, elsewhere, or for looking at the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import counter, main_of, require_free

from toy import corpora
from toy.corpora import images
from toy.errors import ToyError
from toy.models.convert import put_in_place


def pack(args: argparse.Namespace) -> dict[str, object]:
    require_free(args.out, args.force, images.MANIFEST)
    corpora.check_images(args.images, args.image_size, args.channels)
    like = corpora.prepare_images(args.like) if args.like else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=args.out.parent) as cache:
        progress = counter("packing")
        made = corpora.prepare_images(args.images, Path(cache), args.image_size, args.channels, progress, like)
        if made.folder.parent != Path(cache).absolute():
            raise ToyError("bad_flag", f"{args.images} is packed already", "copy its folder instead")
        put_in_place(made.folder, args.out)
    shape = f"{made.width} x {made.height}, {made.n_channel} channel{'s' if made.n_channel > 1 else ''}"
    print(
        f"{args.out}: {made.n_images:,} images of {len(made.classes)} classes, {shape}",
        file=sys.stderr if args.json else sys.stdout,
    )
    manifest = dict(made.manifest)
    return {"packed": manifest.pop("format"), "out": str(args.out), **manifest}


def size(text: str) -> int:
    if not text.isdecimal() or int(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pixels from 0 to 4096")
    return int(text)


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest)
    parser.add_argument("images", help="folder of class folders, IDX images file, or the folder it is in")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--image-size", type=size, default=0, help="crop to a square and resize to this  [their own]")
    parser.add_argument(
        "--channels", type=int, default=0, choices=(0, 1, 3), help="1 grey, 3 RGB  [grey where all are]"
    )
    parser.add_argument("--like", help="a packed set whose classes and statistics to use, for validation images")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")
    return main_of("toy/pack-images-v1", parser, pack)


if __name__ == "__main__":
    sys.exit(main())
