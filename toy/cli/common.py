"""What every command shares: the `--json` flag, the one JSON document, people's text on stderr, the shape of errors.

A command is a click command in `toy/cli/<name>.py`, decorated with `@json_option`, whose function takes `as_json`.
It raises `ToyError` for everything a user can act on, and under `--json` ends with `emit("toy/<name>-v1", {...})`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from toy.errors import ToyError

if TYPE_CHECKING:
    from rich.console import Console

    from toy.models.cards import Card
    from toy.models.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add `--json`; the command's function takes it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else there.")(
        function
    )


class Finite(click.FloatRange):
    """A number in a range; nan and inf, which compare with nothing or are above all, are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


#: What `--n`, `--threads` and `--context` of a runner can be.
COUNT = click.IntRange(1, 2**31 - 1)
THREADS = click.IntRange(0, 512)  # ggml's own limit
CONTEXT = click.IntRange(0, 1 << 20)


def tokenizer_or_none(card: Card) -> Tokenizer | None:
    """The tokenizer inside a model, for what can be done without: None when there is none that we read."""
    from toy.models.tokenizer import Tokenizer

    with contextlib.suppress(ToyError):
        return Tokenizer.from_card(card)
    return None


def plain(value: Any) -> Any:
    """`value` in types that JSON has: paths become strings, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


def emit(format: str, document: dict[str, Any]) -> None:
    """Print the command's one JSON document on stdout: `{"format": format, **document}` on one line."""
    text = json.dumps({"format": format, **plain(document)}, ensure_ascii=False, allow_nan=False)
    # Bytes of a file name that are not UTF-8 are kept by Python as lone surrogates, which no JSON reader takes.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    sys.stdout.flush()


def emit_error(format: str, error: ToyError) -> None:
    emit(format, {"error": error.as_json()})


def say(text: str) -> None:
    """A line for people, on stderr. A stderr that is gone or full never fails a command."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """A rich console on stderr (rich is imported here, not at start-up)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """`progress(done, total)`, in bytes, shown on stderr: a bar on a terminal, one line in a pipe, nothing at all when
    it is quick."""
    bar: Any = None
    said = False
    quiet_until = time.monotonic() + 0.4

    def progress(done: int, total: int) -> None:
        nonlocal bar, said
        if time.monotonic() < quiet_until or (done >= total and bar is None):
            return
        if not sys.stderr.isatty():
            if not said:
                said = True
                say(f"{doing} ({bytes_text(total)})")
            return
        if bar is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            bar = Progress(TextColumn(doing), BarColumn(), DownloadColumn(), console=console(), transient=True)
            bar.start()
            bar.add_task("", total=total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.stop()


def quote(word: object) -> str:
    """`word` as it can be typed in a shell."""
    import shlex

    text = str(word)
    if "\n" in text or "\t" in text:  # one line, in bash and zsh
        for plain, typed in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\t", "\\t")):
            text = text.replace(plain, typed)
        return f"$'{text}'"
    return shlex.quote(text)


def bytes_text(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def count_text(n: float) -> str:
    """5413120 -> '5.41 M'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.2f} {unit}"
    return f"{n:g}"


def duration_text(seconds: float) -> str:
    """3725 -> '1 h 02 min'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def refuse(kind: str, message: str, hint: str = "") -> NoReturn:
    raise ToyError(kind, message, hint)
