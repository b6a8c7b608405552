"""`toy eval`: how good a model is, on text, on choices, on images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toy.cli.common import CONTEXT, THREADS, duration_text, emit, json_option, progress_bar, tokenizer_or_none
from toy.errors import ToyError, shown

if TYPE_CHECKING:
    from toy.models.evaluate import Subject, Text

FORMAT = "toy/eval-v1"


@click.command()
@click.argument("model", metavar="MODEL|RUN")
@click.option("--adapter", metavar="FILE|RUN", help="A LoRA adapter over MODEL; a lora run brings its own.")
@click.option("--corpus", metavar="PATH", help="Text, folder, JSONL or packed tokens: perplexity, bits per byte.")
@click.option("--choices", metavar="FILE", help="Multiple choice by likelihood: JSONL of question, choices, answer.")
@click.option("--images", metavar="PATH", help="Images in class folders, IDX or packed: accuracy of a vit.")
@click.option("--prompt", metavar="TEXT", help="The log-probabilities of what comes after TEXT.")
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Candidates after --prompt.")
@click.option("--context", type=CONTEXT, default=0, help="Tokens of a window; 0: the model's, 1024 at most.")
@click.option("--stride", type=CONTEXT, default=0, help="Tokens from a window to the next; 0: the context.")
@click.option("--threads", type=THREADS, default=0, help="0: the usable cores.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@json_option
def command(
    model: str,
    adapter: str | None,
    corpus: str | None,
    choices: str | None,
    images: str | None,
    prompt: str | None,
    top: int,
    context: int,
    stride: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL: a GGUF, a run, or a name that `toy list` shows.

    \b
    toy eval runs/latest                               the data that the run held out
    toy eval model.gguf --corpus book.txt --stride 512
    toy eval model.gguf --choices questions.jsonl
    toy eval runs/latest --prompt "The " --top 5

    Windows overlap by context - stride tokens, so that every token is scored once with at least so many before it. Of
    examples (JSONL of prompts or messages) the answers' tokens are scored. Numbers after ± are standard errors.
    """
    from toy.models import adapters, evaluate

    asked = {"--corpus": corpus, "--choices": choices, "--images": images, "--prompt": prompt}
    given = [flag for flag, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ToyError("bad_flag", f"{' and '.join(given)} cannot be given together", "measure one thing at a time")
    card, found = adapters.choose(model, adapter)
    subject = evaluate.Subject(card, found, threads, context, device)
    evaluate.target(card, device)
    evaluate.check(subject)
    check_flags(card.architecture, given, stride)
    if prompt is not None:
        document = next_token(subject, prompt, top)
    elif choices is not None:
        document = choose(subject, Path(choices).expanduser())
    elif card.architecture == "vit":
        document = classify(subject, images, model)
    else:
        document = score(subject, corpus, stride, model)
    names = {"model": str(card.path.absolute()), "adapter": str(found.path.absolute()) if found else None}
    if as_json:
        emit(FORMAT, {**names, **document})
    else:
        show(document)


def check_flags(architecture: str, given: list[str], stride: int) -> None:
    images = architecture == "vit"
    for flag in given:
        if (flag == "--images") != images:
            what = "a vit, which sees images" if images else f"a {architecture}, which reads text"
            hint = "give --images" if images else "give --corpus, --choices or --prompt"
            raise ToyError("bad_flag", f"{flag}, and the model is {what}", hint)
    if stride and (images or (given and given != ["--corpus"])):
        raise ToyError("bad_flag", "--stride is for a corpus", "leave it out")


class Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def progress(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self.bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            from toy.cli.common import console

            columns = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console(), transient=True)
            self.bar.start()
            self.bar.add_task("", total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total)


# --- each kind ------------------------------------------------------------------------------------------------------


def score(subject: Subject, corpus: str | None, stride: int, model: str) -> dict[str, Any]:
    from toy.models import evaluate

    if corpus is None:
        text, about = held_out(model)
    else:
        text, about = pack(subject, corpus)
    if stride and text.offsets is not None:
        raise ToyError("bad_flag", "--stride is for a text, and examples are scored one by one", "leave it out")
    with Bar("scoring") as bar:
        tokenizer = tokenizer_or_none(subject.card)
        return {**evaluate.likelihood_of(subject, text, tokenizer, stride, bar.progress), "data": about}


def pack(subject: Subject, corpus: str) -> tuple[Text, dict[str, Any]]:
    """A corpus, tokenised as the model does it."""
    from toy import corpora, runs
    from toy.corpora import packed
    from toy.models import evaluate

    path = Path(corpus).expanduser()
    cache = corpora.default_cache_dir(runs.find_project())
    if not path.exists():
        raise ToyError("missing_file", f"no corpus at {shown(path)}", "check the path")
    own = packed.is_packed(path) and packed.read_manifest(packed.token_file(path)) is None
    tokenizer = str(subject.card.path)
    if own:  # bare ids
        count, largest, sha256 = packed.scan(packed.token_file(path))
        prepared = packed.Prepared(packed.token_file(path), path, None, {"name": path.stem}, largest + 1, count, sha256)
    else:
        corpora.check_vocabulary(path, subject.card.path, "model")
        examples = corpora.kind_of(path) == "examples"
        with progress_bar("packing the corpus") as bar:
            if examples:
                prepared = corpora.prepare_examples(path, tokenizer, cache, bar)
            else:
                prepared = corpora.prepare(path, tokenizer, 0, cache, bar)
    about = {"path": str(path.absolute()), "name": prepared.manifest.get("name"), "sha256": prepared.sha256}
    return evaluate.load(prepared), about


def held_out(model: str) -> tuple[Text, dict[str, Any]]:
    """What the run that `model` names validated on."""
    import numpy as np

    from toy.corpora import packed
    from toy.models import evaluate
    from toy.runs import history, read_json

    run = run_of(model)
    about = read_json(run / "meta.json").get("datasets") or {}
    fraction = history.knobs(run).get("data.val_fraction") or 0.0
    role = "validation" if "validation" in about else "train"
    data = about.get(role) or {}
    tokens = Path(str(data.get("tokens", "")))
    if not tokens.is_file():
        raise ToyError("missing_file", f"the data of run {run.name} is not there any more", "name some with --corpus")
    text = evaluate.Text(np.memmap(tokens, "<i4", "r"))
    if "examples" in data:
        offsets, mask = tokens.parent / packed.OFFSETS, tokens.parent / packed.MASK
        text = evaluate.Text(text.tokens, np.fromfile(offsets, "<i8"), np.memmap(mask, "u1", "r"))
    if role == "train":
        if fraction <= 0:
            raise ToyError("bad_flag", f"run {run.name} held nothing out", "name a text with --corpus")
        text = evaluate.tail(text, fraction)
    return text, {"run": run.name, "part": role, "name": data.get("name"), "sha256": data.get("sha256")}


def run_of(model: str) -> Path:
    from toy.runs import find_run

    try:
        return find_run(model)
    except ToyError:
        raise ToyError(
            "bad_flag", "nothing to measure the model on", "give --corpus, --choices, --images or --prompt"
        ) from None


def next_token(subject: Subject, prompt: str, top: int) -> dict[str, Any]:
    from toy.models import evaluate
    from toy.models.generate import prompt_ids
    from toy.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(subject.card.path)
    ids = prompt_ids(tokenizer, prompt)
    found = evaluate.next_token(subject, ids, top)
    rows = [{"id": i, "text": tokenizer.decode([i], special=True), "logprob": value} for i, value in found]
    return {"mode": "next", "prompt": prompt, "prompt_ids": ids, "top": rows}


def choose(subject: Subject, path: Path) -> dict[str, Any]:
    from toy.models import evaluate
    from toy.models.tokenizer import Tokenizer

    questions = evaluate.read_questions(path)
    with Bar("choosing") as bar:
        tokenizer = Tokenizer.from_gguf(subject.card.path)
        answers = evaluate.choose(subject, questions, tokenizer, bar.progress)
    return {**answers, "data": {"path": str(path.absolute())}}


def classify(subject: Subject, images: str | None, model: str) -> dict[str, Any]:
    from toy import corpora, runs
    from toy.models import evaluate
    from toy.runs import history, read_json

    like = as_set(subject.card)
    first = 0
    if images is not None:
        cache = corpora.default_cache_dir(runs.find_project())
        path = Path(images).expanduser()
        with progress_bar("packing the images") as packing:
            made = corpora.prepare_images(path, cache, like.width, like.n_channel, packing, like=like)
        about: dict[str, Any] = {"path": str(path.absolute()), "sha256": made.sha256}
    else:
        run = run_of(model)
        data = read_json(run / "meta.json").get("datasets") or {}
        role = "validation" if "validation" in data else "train"
        folder = Path(str((data.get(role) or {}).get("folder", "")))
        if not (folder / "images.bin").is_file():
            raise ToyError("missing_file", f"the images of run {run.name} are not there any more", "give --images")
        made = corpora.prepare_images(folder, None, like=like)
        if role == "train":
            first = made.n_images - int((history.knobs(run).get("data.val_fraction") or 0.0) * made.n_images)
        if first == made.n_images:
            raise ToyError("bad_flag", f"run {run.name} held nothing out", "name images with --images")
        about = {"run": run.name, "part": role, "sha256": made.sha256}
    with Bar("looking") as bar:
        found = evaluate.classify(
            subject, made.folder, like.classes, n_images=made.n_images, first=first, progress=bar.progress
        )
    return {**found, "data": about}


def as_set(card: Any) -> Any:
    """What images must be for this model: their size, channels and classes."""
    from toy.corpora import PreparedImages
    from toy.models.cards import vision

    seen = vision(card)
    manifest = {"mean": seen["mean"], "std": seen["std"]}
    size, channels = seen["image_size"], seen["n_channel"]
    return PreparedImages(Path(), manifest, 0, size, size, channels, seen["classes"], "")


# --- for people -----------------------------------------------------------------------------------------------------


def show(document: dict[str, Any]) -> None:
    mode = document["mode"]
    if mode == "next":
        for row in document["top"]:
            click.echo(f"{row['logprob']:9.4f}  {row['text']!r}  {row['id']}")
        return
    rows: list[tuple[str, str]] = []
    if mode in ("corpus", "examples"):
        rows = [
            ("loss", pair(document, "loss", 4) + " nats a token"),
            ("perplexity", pair(document, "perplexity", 3)),
            ("bits per byte", pair(document, "bits_per_byte", 4)),
        ]
        what = f"{document['windows']} windows" if mode == "corpus" else f"{document['examples']} examples"
        how = f" of {document['context']}, {document['stride']} apart" if mode == "corpus" else ""
        cut = f", {document['cut']} cut" if document.get("cut") else ""
        rows.append(("scored", f"{document['tokens']:,} tokens ({document['bytes']:,} bytes) in {what}{how}{cut}"))
    elif mode == "choices":
        rows = [
            ("accuracy", percent(document, "accuracy")),
            ("normalised", percent(document, "accuracy_normalised") + "  by bytes"),
            ("questions", f"{document['questions']}" + (f", {document['cut']} choices cut" if document["cut"] else "")),
        ]
    else:
        rows = [
            ("accuracy", percent(document, "accuracy")),
            ("loss", pair(document, "loss", 4) + " nats an image"),
            ("images", f"{document['images']:,}"),
        ]
    rows.append(("time", duration_text(document["seconds"])))
    for name, text in rows:
        click.echo(f"{name:<14} {text}")
    if mode == "images":
        confusion(document)


def pair(document: dict[str, Any], key: str, digits: int) -> str:
    value, error = document[key], document[f"{key}_stderr"]
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def percent(document: dict[str, Any], key: str) -> str:
    value, error = document[key], document[f"{key}_stderr"]
    return f"{100 * value:.2f} %" + (f" ± {100 * error:.2f}" if error is not None else "")


def confusion(document: dict[str, Any]) -> None:
    """Each class with its accuracy and what it was taken for; of many classes, the mistakes only."""
    names = [row["class"] for row in document["classes"]]
    wide = max(len(name) for name in names)
    click.echo("")
    for n, row in enumerate(document["classes"]):
        if not row["images"]:
            continue
        mistakes = sorted(
            ((count, names[k]) for k, count in enumerate(document["confusion"][n]) if k != n and count), reverse=True
        )
        taken = ", ".join(f"{name} {count}" for count, name in mistakes[:4]) + (", …" if len(mistakes) > 4 else "")
        line = f"{row['class']:<{wide}}  {100 * row['accuracy']:6.2f} % of {row['images']:<6}"
        click.echo(line + (f" taken for: {taken}" if taken else ""))
    if len(names) <= 12:
        cell = max(len(str(max(max(row) for row in document["confusion"]))), 4, *(min(len(name), 8) for name in names))
        click.echo("\n" + " " * wide + "  " + " ".join(name[:cell].rjust(cell) for name in names))
        for name, counts in zip(names, document["confusion"], strict=True):
            click.echo(f"{name:<{wide}}  " + " ".join(str(count or ".").rjust(cell) for count in counts))
