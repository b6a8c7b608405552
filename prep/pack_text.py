"""Text -> packed tokens: `python prep/pack_text.py CORPUS OUT --tokenizer chars`.

CORPUS is a text file, a folder of them, a .jsonl of texts, prompts with completions, or conversations, or "" for
Python's own manual. OUT becomes a folder that `--corpus OUT` takes, here or on another machine: the ids (little-endian
int32), of examples where each begins and which tokens are learned, the manifest that makes them checkable, and the
tokenizer as a GGUF without weights and as a tokenizer.json. `toy train` packs by itself; this is for packing once,
elsewhere, or for looking at the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import counter, main_of, require_free

from toy import corpora
from toy.corpora import packed
from toy.errors import ToyError
from toy.models.convert import put_in_place


def pack(args: argparse.Namespace) -> dict[str, object]:
    require_free(args.out, args.force, packed.MANIFEST)
    examples = corpora.kind_of(args.corpus, texts_are_examples=args.examples) == "examples"
    if args.examples and not examples:
        raise ToyError("bad_flag", f"{args.corpus or 'the manual'} is no .jsonl of examples", "leave --examples out")
    if examples:
        corpora.check_examples(args.corpus, args.tokenizer)
    else:
        corpora.check(args.corpus, args.tokenizer, args.vocab_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    progress = counter("packing")
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=args.out.parent) as cache:
        if examples:
            made = corpora.prepare_examples(
                args.corpus, args.tokenizer, Path(cache), progress, vocab_size=args.vocab_size
            )
        else:
            made = corpora.prepare(args.corpus, args.tokenizer, args.vocab_size, Path(cache), progress)
        if made.tokens.parent.parent != Path(cache).absolute():
            raise ToyError("bad_flag", f"{args.corpus} is packed already", "copy its folder instead")
        put_in_place(made.tokens.parent, args.out)
    eos = made.manifest["eos_id"]
    what = f"{made.n_examples:,} examples" if examples else f"{made.n_documents:,} documents"
    print(
        f"{args.out}: {made.n_tokens:,} tokens of {made.vocab_size:,} in {what} (end of text {eos})",
        file=sys.stderr if args.json else sys.stdout,
    )
    manifest = dict(made.manifest)
    return {"packed": manifest.pop("format"), "out": str(args.out), **manifest}


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest)
    parser.add_argument("corpus", help='text file, folder, .jsonl, or "" for the Python manual')
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--tokenizer", default="bpe", help="bytes, chars, bpe, or a tokenizer.json or .gguf [bpe]")
    parser.add_argument("--vocab-size", type=int, default=0, help="size that bpe is trained to [2048]")
    parser.add_argument("--examples", action="store_true", help="lines of {text} are examples, not documents")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")
    return main_of("toy/pack-text-v1", parser, pack)


if __name__ == "__main__":
    sys.exit(main())
