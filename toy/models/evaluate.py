"""How good a model is, from the native runner `toy-eval`: text it finds likely, choices it prefers, images it knows.

Losses are in nats. A standard error counts windows, examples, questions or images as the independent draws, not tokens,
which come in runs.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toy.errors import ToyError, json_reason, shown
from toy.models.cards import Card
from toy.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

#: `progress(done, total)`, in items.
Progress = Callable[[int, int], None]

MOST_CONTEXT = 1024  # of a window, unless --context says so: a model's own may be far larger
_LOGITS = 1 << 26  # values that a batch's logits may have at once


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and with what. `context` 0: the model's, at most 1024."""

    card: Card
    adapter: Card | None = None
    threads: int = 0
    context: int = 0
    device: str = "cpu"

    @property
    def window(self) -> int:
        return self.context or min(self.card.context or MOST_CONTEXT, MOST_CONTEXT)


def target(card: Card, device: str = "cpu") -> str:
    """The runner for a model, checked before anything is built. Raises ToyError (not_available, bad_flag, bad_file)."""
    from toy import recipes
    from toy.models import generate

    generate.target(card, device)
    return recipes.tool_on(recipes.EVAL[card.architecture], device)


def check(subject: Subject) -> None:
    """Raises ToyError (bad_flag) for a context that the model cannot have."""
    card = subject.card
    if card.architecture == "gpt2" and card.context and subject.context > card.context:
        raise ToyError(
            "bad_flag",
            f"--context {subject.context}, and {shown(card.path)} has {card.context} learned positions",
            f"give at most --context {card.context}",
        )


def run(subject: Subject, keys: dict[str, object], take: Callable[[list[str]], None]) -> float:
    """Run `toy-eval`, each line of its output split into words and given to `take`; the seconds it took."""
    from toy import builds, recipes, runners

    runner = target(subject.card, subject.device)
    check(subject)
    builds.ensure_built([runner])
    env = {
        "GGUF": os.fspath(subject.card.path.absolute()),
        "THREADS": subject.threads,
        "CONTEXT": subject.window,
        **({"ADAPTER": os.fspath(subject.adapter.path.absolute())} if subject.adapter else {}),
        **keys,
    }
    result = runners.launch(
        runner, runners.environment(env, recipes.RUNNERS[runner]), on_stdout=lambda line: take(line.split())
    )
    failed = result.error()
    if failed is not None:
        raise failed
    return result.seconds


def batch(subject: Subject, length: int) -> int:
    """Sequences of `length` tokens that are computed at once, so that the logits stay within 256 MiB."""
    tokens = subject.card.metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) else 32000
    return max(1, min(16, _LOGITS // (max(1, length) * vocabulary)))


# Numbers


def mean_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over all counted things of groups that are given by their sums, and its standard error, the groups being
    the draws (a ratio estimate, Cochran 1977, chapter 6); None for fewer than two groups."""
    total, n = math.fsum(sums), sum(counts)
    mean = total / n
    groups = len(sums)
    if groups < 2:
        return mean, None
    spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * groups / (groups - 1)) / n


def share(hits: int, n: int) -> tuple[float, float | None]:
    """A proportion and its standard error."""
    p = hits / n
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def likelihood(sums: list[float], counts: list[int], n_bytes: int) -> dict[str, Any]:
    """Token-weighted numbers of scored text."""
    n = sum(counts)
    if n == 0:
        raise ToyError("bad_file", "the text has no token to score", "a text is scored from its second token on")
    pairs = [(s, c) for s, c in zip(sums, counts, strict=True) if c]
    mean, error = mean_of_sums([s for s, _ in pairs], [c for _, c in pairs])
    perplexity = math.exp(mean) if mean < 700 else math.inf
    per_byte = n / n_bytes / math.log(2) if n_bytes else None
    return {
        "loss": mean,
        "loss_stderr": error,
        "perplexity": perplexity,
        "perplexity_stderr": None if error is None else perplexity * error,
        "bits_per_byte": None if per_byte is None else mean * per_byte,
        "bits_per_byte_stderr": None if per_byte is None or error is None else error * per_byte,
        "tokens": n,
        "bytes": n_bytes,
    }


def piece_lengths(tokenizer: Tokenizer | None, size: int) -> np.ndarray[Any, Any]:
    """Bytes of text that each id stands for; control tokens have none."""
    import numpy as np

    if tokenizer is None:
        return np.zeros(size, "i8")
    found = [len(tokenizer.piece(i)) for i in range(len(tokenizer))]
    return np.array(found + [0] * max(0, size - len(found)), "i8")


@contextmanager
def files(**arrays: np.ndarray[Any, Any]) -> Iterator[dict[str, object]]:
    """Arrays as files for the runner, by the keys of its environment."""
    with tempfile.TemporaryDirectory(prefix="toy-eval-") as folder:
        paths: dict[str, object] = {}
        for key, array in arrays.items():
            path = Path(folder) / f"{key.lower()}.bin"
            array.tofile(path)
            paths[key] = path
        yield paths


# Text


@dataclass(frozen=True)
class Text:
    """Packed tokens to score; with offsets and mask, a set of examples of which the masked tokens are scored."""

    tokens: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any] | None = None
    mask: np.ndarray[Any, Any] | None = None


def load(prepared: Any) -> Text:
    """What `corpora.prepare` or `prepare_examples` packed."""
    import numpy as np

    tokens = np.memmap(prepared.tokens, "<i4", "r")
    if prepared.offsets is None or prepared.mask is None:
        return Text(tokens)
    return Text(tokens, np.fromfile(prepared.offsets, "<i8"), np.memmap(prepared.mask, "u1", "r"))


def tail(text: Text, fraction: float) -> Text:
    """The last `fraction`, as training holds it out."""
    if text.offsets is None or text.mask is None:
        return Text(text.tokens[len(text.tokens) - int(fraction * len(text.tokens)) :])
    n = len(text.offsets) - 1
    first = n - int(fraction * n)
    start = text.offsets[first]
    return Text(text.tokens[start:], text.offsets[first:] - start, text.mask[start:])


def n_windows(n_tokens: int, context: int, stride: int) -> int:
    step = stride or context
    return 0 if n_tokens < 2 else 1 + -(-max(0, n_tokens - 1 - context) // step)


def likelihood_of(
    subject: Subject, text: Text, tokenizer: Tokenizer | None, stride: int = 0, progress: Progress = lambda n, of: None
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a corpus (every token but the first is scored once, with at least
    context - stride tokens before it after the first window), or of the learned tokens of examples."""
    window = subject.window
    if not 0 <= stride <= window:
        raise ToyError(
            "bad_flag", f"--stride {stride} is not within the context of {window}", "leave it out, or half the context"
        )
    sums: list[float] = []
    counts: list[int] = []
    cut = 0
    examples = text.offsets is not None
    total = len(text.offsets) - 1 if text.offsets is not None else n_windows(len(text.tokens), window, stride)

    def take(words: list[str]) -> None:
        nonlocal cut
        fields = dict(word.split("=") for word in words[2:])
        counts.append(int(fields["tokens"]))
        sums.append(float(fields["nll"]))
        cut += "cut" in fields
        progress(len(sums), total)

    if text.offsets is not None and text.mask is not None:
        lengths = text.offsets[1:] - text.offsets[:-1]
        longest = min(window, int(lengths.max(initial=1)))
        with files(CORPUS=text.tokens, OFFSETS=text.offsets, MASK=text.mask) as paths:
            keys = {**paths, "MODE": "examples", "BATCH": batch(subject, longest)}
            seconds = run(subject, keys, take)
        if cut and not sum(counts):
            message = f"nothing that is learned of the examples fits in a context of {window}"
            raise ToyError("bad_file", message, "give a longer --context")
        scored = _learned(text, window)
    else:
        if total == 0:
            raise ToyError("bad_file", "the text has no two tokens", "a text is scored from its second token on")
        with files(CORPUS=text.tokens) as paths:
            keys = {**paths, "MODE": "corpus", "STRIDE": stride, "BATCH": batch(subject, window)}
            seconds = run(subject, keys, take)
        scored = text.tokens[1 : 1 + sum(counts)]
    sizes = piece_lengths(tokenizer, int(scored.max(initial=0)) + 1)
    numbers = likelihood(sums, counts, int(sizes[scored].sum()))
    kind = {"examples": len(sums), "cut": cut} if examples else {"windows": len(sums), "stride": stride or window}
    return {
        "mode": "examples" if examples else "corpus",
        **numbers,
        **kind,
        "context": window,
        "seconds": seconds,
        "tokens_per_second": numbers["tokens"] / seconds if seconds else None,
    }


def _learned(text: Text, window: int) -> np.ndarray[Any, Any]:
    """The tokens that are scored of examples: what the mask says, less each example's first and what is cut off."""
    assert text.offsets is not None and text.mask is not None
    mask = text.mask.astype(bool)
    mask[text.offsets[:-1]] = False
    for start, end in zip(text.offsets[:-1], text.offsets[1:], strict=True):
        if end - start > window + 1:
            mask[start + window + 1 : end] = False
    found: np.ndarray[Any, Any] = text.tokens[mask]
    return found


# What comes next


def next_token(subject: Subject, ids: Sequence[int], top: int) -> list[tuple[int, float]]:
    """The likeliest ids after a prompt with their log-probabilities, best first."""
    import numpy as np

    if len(ids) > subject.window:
        raise ToyError(
            "bad_flag", f"the prompt is {len(ids)} tokens long, and the context {subject.window}", "shorten the prompt"
        )
    found: list[tuple[int, float]] = []
    with files(CORPUS=np.array(ids, "<i4")) as paths:
        keys = {**paths, "MODE": "next", "TOP_K": top}
        run(subject, keys, lambda words: found.append((int(words[1]), float(words[2]))))
    return found


# Choices


@dataclass(frozen=True)
class Question:
    """One line of a multiple-choice file."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


_CHOICES_HINT = 'a line is {"question": "…", "choices": ["…", "…"], "answer": 0}'


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file. Raises ToyError (missing_file, bad_file) naming file:line."""
    try:
        # at the ends of lines only: a JSON text may hold what else Python takes for one, U+2028 say
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ToyError("missing_file", f"no file of choices at {shown(path)}", _CHOICES_HINT) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or "").lower()
        raise ToyError("bad_file", f"cannot read {shown(path)}: {reason}", _CHOICES_HINT) from None
    found = [_question(f"{shown(path)}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ToyError("bad_file", f"{shown(path)} holds no questions", _CHOICES_HINT)
    return found


def _question(place: str, line: str) -> Question:
    def bad(why: str) -> ToyError:
        return ToyError("bad_file", f"{place}: {why}", _CHOICES_HINT)

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad(f"not JSON ({json_reason(error)})") from None
    if not isinstance(record, dict):
        raise bad("not an object")
    prompt = record.get("question", record.get("prompt"))
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(prompt, str):
        raise bad("no question")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise bad("no list of at least two choices, each a text")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise bad(f"its answer is {answer!r}, not the number of a choice from 0 to {len(choices) - 1}")
    return Question(prompt, tuple(choices), answer)


def continuation(tokenizer: Tokenizer, prompt: str, choice: str) -> tuple[list[int], int, int]:
    """The ids of a prompt with a choice, how many of them are the prompt's, and the bytes of the choice. A space goes
    between the two unless one is there."""
    gap = "" if not prompt or prompt[-1].isspace() or choice[0].isspace() else " "
    vocabulary = tokenizer.vocabulary
    start = [vocabulary.special["bos"]] if vocabulary.add_bos and "bos" in vocabulary.special else []
    before = start + tokenizer.encode(prompt, parse_special=True)
    whole = start + tokenizer.encode(prompt + gap + choice, parse_special=True)
    n = 0
    while n < min(len(before), len(whole) - 1) and before[n] == whole[n]:
        n += 1
    if n == 0:  # nothing before the choice: it begins a document
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        whole, n = ([first] if first is not None else []) + whole, 1
    return whole, n, len((gap + choice).encode())


def choose(
    subject: Subject, questions: list[Question], tokenizer: Tokenizer, progress: Progress = lambda n, of: None
) -> dict[str, Any]:
    """Multiple choice by likelihood: the choice with the highest log-likelihood after the question, as it is and by its
    bytes. Of equals the first wins."""
    import numpy as np

    ids: list[int] = []
    mask: list[int] = []
    offsets = [0]
    sizes: list[int] = []
    for question in questions:
        for choice in question.choices:
            whole, n, size = continuation(tokenizer, question.prompt, choice)
            ids += whole
            mask += [0] * n + [1] * (len(whole) - n)
            offsets.append(len(ids))
            sizes.append(size)
    nll: list[float] = []
    cut = 0

    def take(words: list[str]) -> None:
        nonlocal cut
        fields = dict(word.split("=") for word in words[2:])
        nll.append(float(fields["nll"]))
        cut += "cut" in fields
        progress(len(nll), len(sizes))

    longest = min(subject.window, max(end - start for start, end in pairwise(offsets)))
    arrays = {"CORPUS": np.array(ids, "<i4"), "OFFSETS": np.array(offsets, "<i8"), "MASK": np.array(mask, "u1")}
    with files(**arrays) as paths:
        # of a question that is too long the end is kept, with the choice; examples keep their beginning, as in training
        keys = {**paths, "MODE": "examples", "KEEP": "end", "BATCH": batch(subject, longest)}
        seconds = run(subject, keys, take)
    rows, at = [], 0
    for question in questions:
        scores = [-value for value in nll[at : at + len(question.choices)]]
        per_byte = [score / size for score, size in zip(scores, sizes[at:], strict=False)]
        at += len(question.choices)
        rows.append(
            {
                "question": question.prompt,
                "answer": question.answer,
                "choice": scores.index(max(scores)),
                "choice_normalised": per_byte.index(max(per_byte)),
                "log_likelihoods": scores,
            }
        )
    by_sum = share(sum(row["choice"] == row["answer"] for row in rows), len(rows))
    by_byte = share(sum(row["choice_normalised"] == row["answer"] for row in rows), len(rows))
    return {
        "mode": "choices",
        "accuracy": by_sum[0],
        "accuracy_stderr": by_sum[1],
        "accuracy_normalised": by_byte[0],
        "accuracy_normalised_stderr": by_byte[1],
        "questions": len(rows),
        "cut": cut,
        "context": subject.window,
        "seconds": seconds,
        "answers": rows,
    }


# Images


def classify(
    subject: Subject,
    folder: Path,
    classes: list[str],
    *,
    n_images: int,
    first: int = 0,
    progress: Progress = lambda n, of: None,
) -> dict[str, Any]:
    """Accuracy, loss and confusion over a packed image set from image `first` on. `classes` are the model's names, in
    order; `confusion[label][predicted]` counts."""
    confusion = [[0] * len(classes) for _ in classes]
    losses: list[float] = []

    def take(words: list[str]) -> None:
        label, nll = int(words[2].partition("=")[2]), float(words[3].partition("=")[2])
        best = int(words[4].partition(":")[0])
        if label >= 0:
            confusion[label][best] += 1
            losses.append(nll)
        progress(int(words[1]) + 1 - first, n_images - first)

    size = max(1, min(64, (1 << 24) // max(1, subject.card.parameters)))
    seconds = run(subject, {"MODE": "images", "IMG_DIR": folder, "TOP_K": 1, "FIRST": first, "BATCH": size}, take)
    if not losses:
        raise ToyError("bad_file", f"no image in {shown(folder)} has a label", "put them into folders named by class")
    loss, loss_error = mean_of_sums(losses, [1] * len(losses))
    accuracy, accuracy_error = share(sum(confusion[n][n] for n in range(len(classes))), len(losses))
    rows = []
    for n, name in enumerate(classes):
        seen = sum(confusion[n])
        rows.append({"class": name, "images": seen, "accuracy": confusion[n][n] / seen if seen else None})
    return {
        "mode": "images",
        "accuracy": accuracy,
        "accuracy_stderr": accuracy_error,
        "loss": loss,
        "loss_stderr": loss_error,
        "images": len(losses),
        "classes": rows,
        "confusion": confusion,
        "seconds": seconds,
        "images_per_second": len(losses) / seconds if seconds else None,
    }
