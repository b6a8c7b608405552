"""The command table: it drives help, `toy --manifest` and dispatch. A module is imported when its command is called."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import click

from toy.errors import EXIT_OK, ToyError, nearest, one_line, os_error


class Entry(NamedTuple):
    module: str
    help: str
    group: str
    format: str  # of the JSON document that --json prints
    verbs: tuple[str, ...] = ()  # subcommands whose documents have a format of their own, toy/runs-show-v1


COMMANDS: dict[str, Entry] = {
    "new": Entry("toy.cli.new", "Make a project: toy.yml, a corpus, runs/.", "Train", "toy/new-v1"),
    "train": Entry("toy.cli.train", "Train a model; leaves a run bundle and a GGUF.", "Train", "toy/train-v1"),
    "runs": Entry(
        "toy.cli.runs",
        "The runs of this project: list, show, compare, plot, remove.",
        "Train",
        "toy/runs-v1",
        ("show", "compare", "plot", "rm"),
    ),
    "gate": Entry("toy.cli.gate", "Hold a run to stored step lines, or to metrics.", "Train", "toy/gate-v1"),
    "data": Entry("toy.cli.data", "Look at a corpus as tokens, with what is learned.", "Train", "toy/data-show-v1"),
    "infer": Entry("toy.cli.infer", "Generate text, or class images, with a GGUF or a run.", "Models", "toy/infer-v1"),
    "eval": Entry("toy.cli.eval", "Measure a model: perplexity, choices, images.", "Models", "toy/eval-v1"),
    "merge": Entry("toy.cli.merge", "A model and its LoRA adapter as one model.", "Models", "toy/merge-v1"),
    "export": Entry(
        "toy.cli.export", "A model for transformers, Ollama, or as another type.", "Models", "toy/export-v1"
    ),
    "list": Entry("toy.cli.list", "The GGUF models on this machine.", "Models", "toy/list-v1"),
    "describe": Entry("toy.cli.describe", "One model: metadata, shapes, tokenizer.", "Models", "toy/describe-v1"),
    "config": Entry("toy.cli.config", "Show or validate the configuration.", "Setup", "toy/config-v1"),
    "install": Entry("toy.cli.install", "Build every runner this machine can.", "Setup", "toy/install-v1"),
    "doctor": Entry("toy.cli.doctor", "What this machine has, and what is missing.", "Setup", "toy/doctor-v1"),
}

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Table(click.Group):
    """A click group over COMMANDS: help needs the table only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = importlib.import_module(entry.module).command
        command.name = cmd_name
        command.context_settings = {**CONTEXT, **command.context_settings}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS:
            near = nearest(name, COMMANDS)
            hint = f"did you mean `toy {near}`?" if near else "`toy --help` lists the commands"
            raise ToyError("bad_flag", f"unknown command {name!r}", hint)
        return name, self.get_command(ctx, name), args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in dict.fromkeys(entry.group for entry in COMMANDS.values()):
            with formatter.section(group):
                formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items() if entry.group == group])


def show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from toy import __version__

        click.echo(f"toy {__version__}")
        ctx.exit()


def show_manifest(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from toy.cli.manifest import manifest

        manifest(ctx)
        ctx.exit()


@click.command(
    cls=Table,
    context_settings=CONTEXT,
    invoke_without_command=True,
    epilog="`toy COMMAND --help` says more. Every command takes --json. TOY_DEBUG=1 shows tracebacks.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="The version.")
@click.option(
    "--manifest",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_manifest,
    help="Every command with its options and types, as JSON.",
)
@click.pass_context
def toy(ctx: click.Context) -> None:
    """Train small transformers on this machine, and run the GGUF that comes out.

    \b
    toy new play && cd play && toy train
    toy infer runs/latest --prompt The
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def usage_error(error: click.UsageError) -> ToyError:
    """A click error in the error contract's words, with the nearest flag or subcommand in the hint."""
    ctx = error.ctx
    path = (ctx.command_path if ctx else "toy").replace("__main__.py", "toy")
    hint = f"`{path} --help` lists the options"
    if isinstance(error, click.NoSuchOption):
        message = f"unknown option {error.option_name}"
        known: list[str] = []
        if ctx is not None:
            known = [opt for param in ctx.command.get_params(ctx) for opt in param.opts if opt.startswith("--")]
        near = nearest(error.option_name, known)
        if near:
            hint = f"did you mean {near}? `{path} --help` lists the options"
    else:
        message = one_line(error.format_message()).rstrip(".")
        message = message[:1].lower() + message[1:]
        if ctx is not None and isinstance(ctx.command, click.Group) and message.startswith("no such command"):
            names = ctx.command.list_commands(ctx)
            message = message.split(". Did you mean")[0]
            near = nearest(message.split("'")[1] if "'" in message else "", names)
            hint = f"did you mean `{path} {near}`?" if near else f"`{path}` has: {', '.join(names)}"
    return ToyError("bad_flag", message, hint)


def as_toy_error(error: BaseException) -> ToyError:
    """Any exception as the one kind of error that users see."""
    if isinstance(error, ToyError):
        return error
    if isinstance(error, click.UsageError):
        return usage_error(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return ToyError("interrupted", "interrupted", "nothing is left half-written; run the command again")
    if isinstance(error, click.ClickException):
        return ToyError("bad_flag", one_line(error.format_message()), "`toy --help` lists the commands")
    if isinstance(error, MemoryError):
        return ToyError("oom", "this machine's memory is full", "make the model, the batch or the corpus smaller")
    if isinstance(error, OSError):
        return os_error(error)
    return ToyError(
        "bug",
        f"{type(error).__name__}: {one_line(error)}"[:400],
        "this is a fault of toy's own; TOY_DEBUG=1 shows the traceback to report",
    )


def format_of(argv: Sequence[str]) -> str:
    """The JSON format of the command that `argv` calls, for errors that come before its parsing is done."""
    name, verb = [*(word for word in argv if not word.startswith("-")), "", ""][:2]
    if name not in COMMANDS:
        return "toy/error-v1"
    return f"toy/{name}-{verb}-v1" if verb in COMMANDS[name].verbs else COMMANDS[name].format


def report(error: ToyError, argv: Sequence[str]) -> None:
    """Show `error` as the contract says: two lines on stderr, or one document on stdout under --json."""
    from toy.cli.common import emit_error, say

    before_dashes = argv[: argv.index("--")] if "--" in argv else argv
    if "--json" in before_dashes:
        with contextlib.suppress(OSError):
            emit_error(error.data.pop("format", None) or format_of(argv), error)  # type: ignore[arg-type]
    else:
        say(f"error: {one_line(error.message)}")
        if error.hint:
            say(f"hint: {one_line(error.hint)}")


def leave_stdout() -> None:
    """If stdout cannot be written (its reader is gone, its disk full), point it at nothing, so that the interpreter's
    last flush does not fail too."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def take_signals() -> None:
    """SIGTERM and a closed terminal end a command as Ctrl-C does: nothing stays half-written.

    SIGINT is taken even where a shell started us with it ignored (`toy train &` in a script), so that `kill -INT`
    always saves and stops.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def ignore_signals() -> None:
    """From here on only words are said: an impatient second Ctrl-C must not cut them off."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def run(argv: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code: Any = toy.main(args=list(argv), prog_name="toy", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        ignore_signals()
        leave_stdout()  # `toy list | head`
        return 1
    except BaseException as error:
        ignore_signals()
        if os.environ.get("TOY_DEBUG", "") not in ("", "0"):
            import traceback

            traceback.print_exc()
        shown = as_toy_error(error)
        if isinstance(error, OSError):
            leave_stdout()
        report(shown, argv)
        return shown.exit_code


def interrupted(argv: Sequence[str]) -> int:
    """Ctrl-C before a command began; the exit code."""
    error = as_toy_error(KeyboardInterrupt())
    report(error, argv)
    return error.exit_code


def main() -> NoReturn:
    take_signals()
    code = run(sys.argv[1:])
    ignore_signals()
    sys.exit(code)
