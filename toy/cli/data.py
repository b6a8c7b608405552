"""`toy data`: look at what a runner reads: decoded tokens, those that are learned in colour."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from toy.cli.common import emit, json_option, progress_bar
from toy.errors import ToyError, shown

FORMAT = "toy/data-show-v1"
#: Around learned tokens where there are no colours.
MARKS = ("⟦", "⟧")


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Look at data as a model is trained on it.

    \b
    toy data show answers.jsonl --model base.gguf
    toy data show book.txt --tokenizer chars
    toy data show data/digits
    """
    if ctx.invoked_subcommand is None:
        raise ToyError("bad_flag", "toy data needs a verb: show", "`toy data show CORPUS` prints its first tokens")


@command.command("show")
@click.argument("corpus")
@click.option("--model", metavar="GGUF|RUN", help="Use this model's tokenizer and chat template, as lora would.")
@click.option("--tokenizer", metavar="NAME|FILE", help="bytes, chars, bpe, a tokenizer.json or a .gguf.  [bpe]")
@click.option("--vocab-size", type=click.IntRange(min=0), default=0, help="Size that bpe is trained to.  [2048]")
@click.option("-n", "--n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many to show.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of a sequence: windows of text are so long, and what it cuts off examples is counted.",
)
@json_option
def show(
    corpus: str,
    model: str | None,
    tokenizer: str | None,
    vocab_size: int,
    count: int,
    context: int | None,
    as_json: bool,
) -> None:
    """The first examples or windows of CORPUS as tokens, with what is learned in colour.

    CORPUS is what `--corpus` or `--images` takes: texts, JSONL of {text}, {prompt, completion} or {messages}, packed
    tokens, images; "" is the Python manual. It is packed as for training, into the same cache. On a terminal what is
    learned is green and bold, the rest dim; elsewhere ⟦ and ⟧ enclose it. Of a text all is: its tokens are told apart.
    """
    if model is not None and tokenizer is not None:
        raise ToyError("bad_flag", "--model and --tokenizer are two tokenizers", "give one of them")
    if model is not None:
        from toy import corpora
        from toy.models import resolve

        tokenizer = str(resolve(model))
        corpora.check_vocabulary(corpus, Path(tokenizer), "model")
    document = describe(corpus, tokenizer or "bpe", vocab_size, model is not None, count, context)
    if as_json:
        emit(FORMAT, document)
    elif document["kind"] == "images":
        show_images(document)
    else:
        show_tokens(document)


def describe(
    corpus: str, tokenizer: str, vocab_size: int, texts_are_examples: bool, count: int, context: int | None
) -> dict[str, Any]:
    from toy import corpora, runs

    cache = corpora.default_cache_dir(runs.find_project())
    if corpora.is_images(corpus):
        return _images(corpus, cache)
    kind = corpora.kind_of(corpus, texts_are_examples)
    if kind == "examples":
        corpora.check_examples(corpus, tokenizer)
        with progress_bar("packing") as progress:
            made = corpora.prepare_examples(corpus, tokenizer, cache, progress, vocab_size=vocab_size)
        return _examples(corpus, made, count, context)
    corpora.check(corpus, tokenizer, vocab_size)
    with progress_bar("packing") as progress:
        made = corpora.prepare(corpus, tokenizer, vocab_size, cache, progress)
    return _windows(corpus, made, count, context or 64)


def _about(corpus: str, kind: str, made: Any) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "kind": kind,
        "tokenizer": made.manifest["tokenizer"].get("kind"),
        "vocab_size": made.vocab_size,
        "packed": str(made.tokens.parent),
        "sha256": made.sha256,
        "n_tokens": made.n_tokens,
    }


def _examples(corpus: str, made: Any, count: int, context: int | None) -> dict[str, Any]:
    import numpy as np

    from toy.models.tokenizer import Tokenizer

    tok = Tokenizer.from_gguf(made.tokenizer_gguf)
    offsets = np.fromfile(made.offsets, "<i8", min(count, made.n_examples) + 1)
    ids = np.fromfile(made.tokens, "<i4", int(offsets[-1]))
    mask = np.fromfile(made.mask, "u1", int(offsets[-1]))
    rows = []
    for index, (start, end) in enumerate(pairwise(offsets)):
        learned = mask[start:end].astype(bool).tolist()
        rows.append(_row(tok, index, ids[start:end].tolist(), learned))
    about = made.manifest["examples"]
    document = _about(corpus, "examples", made) | {
        "kinds": about["kinds"],
        "n_examples": made.n_examples,
        "n_learned": about["n_learned"],
        "longest": made.longest,
    }
    if context is not None:
        fit = made.fit(context)
        document |= {"context": context, "cut": fit.cut, "dropped": fit.dropped, "learned_in_context": fit.n_learned}
    return document | {"examples": rows}


def _windows(corpus: str, made: Any, count: int, context: int) -> dict[str, Any]:
    """A window of context + 1 tokens trains on all of them but the first, which nothing before predicts."""
    import numpy as np

    from toy.models.tokenizer import Tokenizer

    tok = Tokenizer.from_gguf(made.tokenizer_gguf)
    ids = np.fromfile(made.tokens, "<i4", min(count * context + 1, made.n_tokens)).tolist()
    windows = [ids[at : at + context + 1] for at in range(0, max(1, len(ids) - 1), context)]
    rows = [_row(tok, index, window, [n > 0 for n in range(len(window))]) for index, window in enumerate(windows)]
    return _about(corpus, "text", made) | {"n_documents": made.n_documents, "context": context, "examples": rows}


def _row(tok: Any, index: int, ids: list[int], learned: list[bool]) -> dict[str, Any]:
    """One example: each token's text is what it adds to the text before it, so that no character comes in halves."""
    stream = tok.stream(special=True)
    texts = [stream.push(i) for i in ids]
    texts[-1] += stream.finish()
    tokens = [{"id": i, "text": text, "learned": on} for i, text, on in zip(ids, texts, learned, strict=True)]
    return {"index": index, "n_tokens": len(ids), "n_learned": sum(learned), "text": "".join(texts), "tokens": tokens}


def _images(corpus: str, cache: Path) -> dict[str, Any]:
    from toy import corpora

    with progress_bar("packing") as progress:
        made = corpora.prepare_images(corpus, cache, progress=progress)
    keys = ("n_images", "width", "height", "n_channel", "classes", "counts", "mean", "std", "sha256")
    about = {key: made.manifest[key] for key in keys}
    return {"corpus": corpus, "kind": "images", "packed": str(made.folder)} | about


# Screens


def show_images(document: dict[str, Any]) -> None:
    colour = {1: "grey", 3: "RGB"}[document["n_channel"]]
    size = f"{document['width']} x {document['height']} {colour}"
    n_class = len(document["classes"])
    click.echo(f"{shown(document['corpus'])}: {document['n_images']:,} images of {n_class} classes, {size}")
    mean, std = (", ".join(f"{value:.4f}" for value in document[key]) for key in ("mean", "std"))
    click.echo(f"  mean {mean}  deviation {std}")
    wide = max(map(len, document["classes"]))
    for name, images in document["counts"].items():
        click.echo(f"  {name:<{wide}}  {images:>9,}")


def show_tokens(document: dict[str, Any]) -> None:
    examples = document["kind"] == "examples"
    name = shown(document["corpus"]) if document["corpus"] else "the Python manual"
    tokens = f"{document['n_tokens']:,} tokens of {document['vocab_size']:,} ({document['tokenizer']})"
    if examples:
        part = 100 * document["n_learned"] / document["n_tokens"]
        click.echo(f"{name}: {counted(document['n_examples'], 'example')} of {kinds_text(document['kinds'])}, {tokens}")
        click.echo(
            f"  {document['n_learned']:,} learned ({part:.0f} %), the longest example has {document['longest']:,}"
        )
        if "context" in document:
            dropped = f", {document['dropped']:,} of them left out: nothing to learn is left"
            cut = f"{document['cut']:,} longer than that are cut" + (dropped if document["dropped"] else "")
            click.echo(f"  in a context of {document['context']}: {document['learned_in_context']:,} learned, {cut}")
    else:
        click.echo(f"{name}: {tokens} in {counted(document['n_documents'], 'document')}")
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for row in document["examples"]:
        what = "example" if examples else "window"
        learned = f", {row['n_learned']} learned" if examples else ""
        head = f"--- {what} {row['index']}: {row['n_tokens']} tokens{learned} "
        head = head.ljust(72, "-")
        click.echo("\n" + (click.style(head, fg="blue") if coloured else head))
        if coloured:
            click.echo(painted(row["tokens"], ("green", "bright_green") if examples else (None, "cyan"), examples))
        else:
            click.echo(marked(row["tokens"]) if examples else "│".join(visible(t["text"]) for t in row["tokens"]))


def painted(tokens: list[dict[str, Any]], colours: tuple[str | None, str], mask: bool) -> str:
    """Tokens in two colours by turns, so that each is seen; under a mask learned ones are bold, the others dim."""
    out = []
    for n, token in enumerate(tokens):
        if mask and not token["learned"]:
            out.append(click.style(visible(token["text"]), dim=True))
        else:
            out.append(click.style(visible(token["text"]), fg=colours[n % 2], bold=mask or None))
    return "".join(out)


def marked(tokens: list[dict[str, Any]]) -> str:
    """Each run of learned tokens between marks."""
    out, inside = [], False
    for token in tokens:
        if token["learned"] != inside:
            inside = token["learned"]
            out.append(MARKS[0] if inside else MARKS[1])
        out.append(visible(token["text"]))
    return "".join(out) + (MARKS[1] if inside else "")


def kinds_text(kinds: dict[str, int]) -> str:
    """`{prompt, completion}`; of several kinds, how many each."""
    words = {kind: "{prompt, completion}" if kind == "prompt" else f"{{{kind}}}" for kind in kinds}
    if len(kinds) == 1:
        return next(iter(words.values()))
    return " and ".join(f"{words[kind]} ({n:,})" for kind, n in kinds.items())


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def visible(text: str) -> str:
    """Ends of lines are seen, and no control character of a corpus reaches the terminal."""
    shown_text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return shown_text.replace("\n", "↵\n")
