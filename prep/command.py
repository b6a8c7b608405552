"""What the scripts of this folder share: errors and documents, a count of progress, the target that they replace."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.errors import ToyError
from toy.models.convert import check_replaceable


def require_free(out: Path, force: bool, manifest: str) -> None:
    """Raises ToyError (bad_flag) where OUT is there, and may not be replaced: `manifest` tells what was packed."""
    if out.exists() and not force:
        raise ToyError("bad_flag", f"{out} is there already", "choose another folder, or --force to replace it")
    check_replaceable(out, (manifest,))


def counter(doing: str) -> Callable[[int, int], None] | None:
    """`progress(done, total)` on a terminal; None elsewhere."""

    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\r{doing} {100 * done / max(1, total):3.0f} %", end=end, file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None


def main_of(format: str, parser: argparse.ArgumentParser, work: Callable[..., dict[str, object]]) -> int:
    """Runs `work(args)`; under `--json` prints its document, or its error. The exit code."""
    parser.add_argument("--json", action="store_true", help="print what was written as JSON on stdout")
    args = parser.parse_args()
    try:
        document = work(args)
    except ToyError as error:
        if args.json:
            print(json.dumps({"format": format, "error": error.as_json()}, ensure_ascii=False))
        else:
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}\nhint: check the path and its permissions", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted\nhint: nothing was left half-written; run it again", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({"format": format, **document}, ensure_ascii=False))
    return 0
