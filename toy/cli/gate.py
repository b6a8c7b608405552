"""`toy gate`: a run's step lines against stored ones, byte for byte; a run's metrics against thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toy.cli.common import emit, json_option, quote
from toy.errors import ToyError, os_errors, shown

FORMAT = "toy/gate-v1"


def losses_file(run: str) -> Path:
    """The step lines of a run: its id, its directory, `runs/latest`, or a losses.txt."""
    from toy.runs import choose_run

    path = Path(run).expanduser()
    return path if path.is_file() else choose_run(run) / "losses.txt"


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Record a run's step lines, check a run against them, or hold its metrics to thresholds.

    \b
    toy gate record runs/latest data/gates/mine.txt
    toy gate check  runs/latest data/gates/mine.txt
    toy gate metric runs/latest 'val_loss<=1.9'
    """
    if ctx.invoked_subcommand is None:
        raise ToyError(
            "bad_flag",
            "toy gate needs a verb: record, check or metric",
            "`toy gate check RUN FILE` compares byte for byte",
        )


@command.command("record")
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@json_option
def record(run: str, file: Path, force: bool, as_json: bool) -> None:
    """Store RUN's step lines in FILE."""
    from toy.runs import gates
    from toy.runs.bundle import write_atomic

    source = losses_file(run)
    lines = gates.read_lines(source, "run's losses.txt")
    if file.is_dir():
        raise ToyError("bad_file", f"{shown(file)} is a folder", "name the gate's file")
    if file.exists() and not force:
        raise ToyError("bad_flag", f"{shown(file)} is there already", "another name, or --force to replace it")
    with os_errors("write the gate"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(line + "\n" for line in lines))
    if as_json:
        emit(FORMAT, {"verb": "record", "run": str(source.parent), "file": str(file.absolute()), "steps": len(lines)})
    else:
        click.echo(f"recorded {len(lines)} step lines in {shown(file)}")
        click.echo(f"check another run with: toy gate check RUN {quote(shown(file))}")


@command.command("check")
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def check(run: str, file: Path, as_json: bool) -> None:
    """Compare RUN's step lines with FILE, byte for byte; exit 1 at the first difference."""
    from toy.runs import gates

    want = gates.read_lines(file, "gate")
    got = gates.read_lines(losses_file(run), "run's losses.txt")
    difference = gates.compare(want, got)
    if difference is not None:
        hint = "compare config.json, the build (native or portable) and meta.json of the two runs"
        raise ToyError("gate_mismatch", gates.explain(difference, want, got), hint, data=difference)
    if as_json:
        emit(FORMAT, {"verb": "check", "run": run, "file": str(file.absolute()), "steps": len(want), "equal": True})
    else:
        click.echo(f"equal: {len(want)} step lines, byte for byte")


@command.command("metric")
@click.argument("run")
@click.argument("expressions", nargs=-1, required=True, metavar="EXPRESSION...")
@json_option
def metric(run: str, expressions: tuple[str, ...], as_json: bool) -> None:
    """Hold RUN to every EXPRESSION, `'val_loss<=1.9'` say; exit 1 where one fails.

    Metrics: val_loss, best_val_loss, final_loss, accuracy, perplexity, tokens_per_second, steps. Operators: < <= > >=
    ==. The verdict is noted in the run's events, apart from how the run ended.
    """
    from toy.runs import choose_run, metrics

    checks = [metrics.parse(text) for text in expressions]
    path = choose_run(run)
    verdict = metrics.judge(path, checks)
    metrics.note(path, verdict)
    document = {"verb": "metric", "run": str(path), **verdict}
    failed = [check for check in verdict["checks"] if not check["passed"]]
    if failed:
        words = "; ".join(f"{check['metric']} = {number(check['value'])}, not {words_of(check)}" for check in failed)
        hint = "train longer or with other knobs; `toy runs compare` puts runs beside each other"
        raise ToyError("gate_mismatch", f"{path.name}: {words}", hint, data=document)
    if as_json:
        emit(FORMAT, document)
    else:
        for check in verdict["checks"]:
            click.echo(f"passed: {check['metric']} = {number(check['value'])} {words_of(check)}")


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def words_of(check: dict[str, Any]) -> str:
    return f"{check['operator']} {check['threshold']:g}"
