"""Text -> packed tokens: `python prep/pack_text.py CORPUS OUT --tokenizer chars`.

CORPUS is a text file, a folder of them, a .jsonl with a text in every line, or "" for Python's own manual. OUT becomes
a folder that `--corpus OUT` takes, here or on another machine: the ids (little-endian int32), the manifest that makes
them checkable, and the tokenizer as a GGUF without weights and as a tokenizer.json. `toy train` packs by itself; this
is for packing once, elsewhere, or for looking at the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy import corpora
from toy.errors import ToyError


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest)
    parser.add_argument("corpus", help='text file, folder, .jsonl, or "" for the Python manual')
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--tokenizer", default="bpe", help="bytes, chars, bpe, or a tokenizer.json or .gguf [bpe]")
    parser.add_argument("--vocab-size", type=int, default=0, help="size that bpe is trained to [2048]")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")
    args = parser.parse_args()
    try:
        pack(args.corpus, args.out, args.tokenizer, args.vocab_size, args.force)
    except ToyError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted\nhint: nothing was left half-written; run it again", file=sys.stderr)
        return 130
    return 0


def pack(corpus: str, out: Path, tokenizer: str, vocab_size: int, force: bool) -> None:
    if out.exists() and not force:
        raise ToyError("bad_flag", f"{out} is there already", "choose another folder, or --force to replace it")
    corpora.check(corpus, tokenizer, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=out.parent) as cache:
        made = corpora.prepare(corpus, tokenizer, vocab_size, Path(cache), show if sys.stderr.isatty() else None)
        if made.tokens.parent.parent != Path(cache).absolute():
            raise ToyError("bad_flag", f"{corpus} is packed already", "copy its folder instead")
        if out.exists():
            shutil.rmtree(out)
        made.tokens.parent.rename(out)
    eos = made.manifest["eos_id"]
    print(
        f"{out}: {made.n_tokens:,} tokens of {made.vocab_size:,} in {made.n_documents:,} documents (end of text {eos})"
    )


def show(done: int, total: int) -> None:
    print(
        f"\rpacking {100 * done / max(1, total):3.0f} %", end="\n" if done >= total else "", file=sys.stderr, flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
