"""`toy runs`: the runs of this project, one run in full, several beside each other, in one picture, and taken away."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from toy.cli import profile
from toy.cli.common import bytes_text, count_text, duration_text, emit, json_option, say
from toy.errors import ToyError, shown


class Runs(click.Group):
    """`toy runs` and `toy runs FOLDER` list, as `toy runs list` does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = next((n for n, word in enumerate(args) if not word.startswith("-")), len(args))
        if not any(word in ("-h", "--help") for word in args[:at]):
            if at < len(args) and args[at] in self.commands:
                args = [args[at], *args[:at], *args[at + 1 :]]
            elif at == len(args) or at > 0 or Path(args[at]).exists():
                args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Runs)
@json_option
def command(as_json: bool) -> None:
    """The runs of this project: state, losses, speed. Without a verb it lists them.

    \b
    toy runs show latest
    toy runs compare llama-20261121-001 latest
    toy runs plot llama-20261121-001 latest --out losses.png

    A RUN is an id, its beginning where only one run has it, `latest`, or a path.
    """


def table(lines: list[tuple[str, ...]], left: tuple[int, ...]) -> None:
    """Columns, flush right but those in `left`."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


def choose(words: tuple[str, ...]) -> list[Path]:
    """The runs that were named, each once."""
    from toy.runs import choose_run

    return list(dict.fromkeys(choose_run(word) for word in words))


# --- list -----------------------------------------------------------------------------------------------------------


@command.command("list")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("-n", "--last", type=click.IntRange(min=1), help="The last N only.")
@json_option
def list_runs(folder: str | None, last: int | None, as_json: bool) -> None:
    """The runs of this project (or of FOLDER): state, losses, speed.

    A run is `running` for as long as a process holds its directory; a run that ended without saying so is `killed`.
    """
    from toy.runs import listing, runs_dir

    path = runs_dir()
    if folder:
        path = Path(folder) / "runs" if (Path(folder) / "runs").is_dir() else Path(folder)
    rows = listing.rows(path)
    if last:
        rows = rows[-last:]
    if as_json:
        emit("toy/runs-v1", {"runs_dir": str(path.absolute()), "runs": rows})
        return
    if not rows:
        say(f"no runs in {path}; `toy train` makes one")
        return
    lines: list[tuple[str, ...]] = [("run", "state", "step", "loss", "val loss", "best", "tokens/s", "time", "started")]
    table([*lines, *(cells(row) for row in rows)], left=(0, 1, 8))


def speed(row: dict[str, Any]) -> str:
    """Tokens a second, or images."""
    tokens, images = row["tokens_per_second"], row["sequences_per_second"]
    if row["arch"] == "vit" and isinstance(images, (int, float)):
        return f"{images:,.0f} images/s"
    return f"{tokens:,.0f} tokens/s" if isinstance(tokens, (int, float)) else "-"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["run_id"],
        row["state"],
        f"{row['step']}/{row['steps'] if row['steps'] is not None else '?'}",
        number(row["loss"]),
        number(row["val_loss"]),
        number(row["best_val_loss"]),
        speed(row).removesuffix(" tokens/s"),
        duration_text(row["seconds"]) if isinstance(row["seconds"], (int, float)) else "-",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"])) if row["started"] else "-",
    )


# --- show -----------------------------------------------------------------------------------------------------------


@command.command("show")
@click.argument("run")
@json_option
def show(run: str, as_json: bool) -> None:
    """One RUN: knobs that differ from the defaults, data, losses, evaluations, checkpoints, files, how it ended."""
    from toy.runs import history, listing

    [path] = choose((run,))
    row = listing.summary(path)
    lines = history.own_lines(path)
    resumed = history.resumed_from(path)
    everything = [(str(file.relative_to(path)), size) for file, size in history.files(path)]
    document = {
        **row,
        "resumed_from": str(resumed) if resumed else None,
        "knobs": history.changed(path),
        "datasets": history.datasets(path),
        "losses": {"first": loss_of(lines, 0), "last": loss_of(lines, -1), "steps": len(lines)},
        "evaluations": history.evaluations(path),
        "profile": history.profile(path),
        "checkpoints": history.checkpoints(path),
        "files": [{"path": name, "size": size} for name, size in everything],
        "size": sum(size for _, size in everything),
    }
    if as_json:
        emit("toy/runs-show-v1", document)
        return
    show_text(path, document)


def loss_of(lines: list[str], n: int) -> str | None:
    from toy.runs import gates

    return gates.value_of(lines[n]) if lines else None


def show_text(path: Path, run: dict[str, Any]) -> None:
    def rows(title: str, pairs: list[tuple[str, str]]) -> None:
        if pairs:
            click.echo(title)
            wide = max(len(name) for name, _ in pairs)
            for name, text in pairs:
                click.echo(f"  {name:<{wide}}  {text}".rstrip())

    state = run["state"]
    if run["reason"] and run["reason"] != state:
        state += f" ({run['reason']})"
    seconds = run["seconds"]
    head = [
        ("state", state),
        ("recipe", f"{run['recipe']} {run['arch']} on {run['device']}"),
        ("name", run["name"]),
        ("step", f"{run['step']} of {run['steps']}"),
        ("resumed from", shown(run["resumed_from"]) if run["resumed_from"] else ""),
        ("parameters", count_text(run["parameters"]) if run["parameters"] else ""),
        ("time", duration_text(seconds) if isinstance(seconds, (int, float)) else ""),
        ("speed", speed(run) if run["tokens_per_second"] else ""),
        ("quality gate", run["quality_gate"] or ""),
        ("error", str((run["error"] or {}).get("message", "")) if isinstance(run["error"], dict) else ""),
        ("model", shown(run["gguf"]) if run["gguf"] else ""),
    ]
    rows(shown(path), [(name, text) for name, text in head if text])
    losses = run["losses"]
    rows("losses", [
        (name, text)
        for name, text in (
            ("first step", losses["first"]),
            ("last step", losses["last"]),
            ("validation", number(run["val_loss"]) if run["val_loss"] is not None else None),
            ("best", number(run["best_val_loss"]) if run["best_val_loss"] is not None else None),
            ("accuracy", f"{run['accuracy']:.2%}" if run["accuracy"] is not None else None),
        )
        if text
    ])  # fmt: skip
    rows("knobs", [(key, word(knob["value"])) for key, knob in run["knobs"].items()])
    rows("data", [
        (name, "  ".join(data_words(about))) for name, about in run["datasets"].items()
    ])  # fmt: skip
    evaluations = [
        (
            f"step {one['step']}",
            f"validation loss {number(one.get('val_loss'))}"
            + (f", accuracy {one['accuracy']:.2%}" if "accuracy" in one else "")
            + ("  best so far" if one.get("best") else ""),
        )
        for one in run["evaluations"]
    ]
    if len(evaluations) > 12:
        evaluations = [*evaluations[:3], ("…", f"{len(evaluations) - 9} more"), *evaluations[-6:]]
    rows("evaluations", evaluations)
    if run["profile"]:
        click.echo("\n".join(profile.table(run["profile"])))
    rows("checkpoints", [
        (f"step {one['step']}", f"{bytes_text(one['size'])}  {' '.join(one['marks'])}") for one in run["checkpoints"]
    ])  # fmt: skip
    rows(f"files, {bytes_text(run['size'])}", [(file["path"], bytes_text(file["size"])) for file in run["files"]])


def word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else ("-" if value in (None, "") else str(value))


def data_words(about: dict[str, Any]) -> list[str]:
    words = [str(about.get("name") or (shown(about["gguf"]) if "gguf" in about else ""))]
    words += [f"{about[key]:,} {key.removeprefix('n_')}" for key in ("n_tokens", "n_images") if key in about]
    words += [str(about[key]) for key in ("architecture", "quantisation") if key in about]
    return [*words, str(about.get("sha256") or "")[:16]]


# --- compare --------------------------------------------------------------------------------------------------------


@command.command("compare")
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--assert-equal", is_flag=True, help="Exit 1 unless step lines and weights are the same bytes.")
@json_option
def compare(names: tuple[str, ...], assert_equal: bool, as_json: bool) -> None:
    """Two RUNs or more beside each other: knobs, data and builds that differ, losses, the first step line that differs.

    A resumed run is compared with the lines of the run that it continues before its own. --assert-equal compares the
    steps that the runs have in common, and the weights of the last such step, tensor by tensor.
    """
    from toy.runs import compare as comparing
    from toy.runs import listing

    runs = choose(names)
    if len(runs) < 2:
        raise ToyError("bad_flag", "toy runs compare needs two different runs", "`toy runs` lists them")
    rows = [listing.summary(run) for run in runs]
    keys = (
        "run_id",
        "run_dir",
        "state",
        "step",
        "loss",
        "val_loss",
        "best_val_loss",
        "accuracy",
        "tokens_per_second",
        "parameters",
    )
    document: dict[str, Any] = {
        "runs": [{key: row[key] for key in keys} for row in rows],
        "knobs": comparing.knobs(runs),
        "datasets": comparing.datasets(runs),
        "circumstances": comparing.circumstances(runs),
        "lines": [{"run": run.name, **comparing.lines(runs[0], run)} for run in runs[1:]],
    }
    if assert_equal:
        document["equal"] = [{"run": run.name, **comparing.require_equal(runs[0], run)} for run in runs[1:]]
    if as_json:
        emit("toy/runs-compare-v1", document)
        return
    compare_text(document)


def compare_text(document: dict[str, Any]) -> None:
    runs = document["runs"]
    lines: list[tuple[str, ...]] = [("", *(run["run_id"] for run in runs))]
    for name, key, digits in (
        ("state", "state", 0), ("step", "step", 0), ("loss", "loss", 6), ("val loss", "val_loss", 6),
        ("best", "best_val_loss", 6), ("accuracy", "accuracy", 4), ("tokens/s", "tokens_per_second", 0),
        ("parameters", "parameters", 0),
    ):  # fmt: skip
        cells = [number(run[key], digits) if isinstance(run[key], float) else word(run[key]) for run in runs]
        lines.append((name, *cells))
    for title in ("knobs", "datasets", "circumstances"):
        lines += [(key, *(short(value) for value in values)) for key, values in document[title].items()]
    table(lines, left=(0,))
    for found in document["lines"]:
        click.echo(lines_text(runs[0]["run_id"], found))
    for found in document.get("equal", []):
        at = found["weights"]["step"]
        click.echo(f"equal: steps {found['steps'][0]} to {found['steps'][1]}, and the weights of step {at}")


def short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{len(value)} entries"
    text = word(value)
    return text if len(text) <= 32 else text[:15] + "…" + text[-16:]


def lines_text(first: str, found: dict[str, Any]) -> str:
    who = f"{first} and {found['run']}"
    if found["steps"] is None:
        return f"{who} have no step in common"
    a, b = found["steps"]
    difference = found["difference"]
    if difference is None:
        return f"{who}: the same step lines from {a} to {b}"
    return f"{who}: first difference at step {difference['step']}: {difference['expected']} and {difference['actual']}"


# --- plot -----------------------------------------------------------------------------------------------------------


@command.command("plot")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("losses.svg"), show_default=True, help="A .svg or a .png."
)
@json_option
def plot(names: tuple[str, ...], out: Path, as_json: bool) -> None:
    """The curves of one RUN or several in one picture: training thin, validation thick with dots."""
    from toy.errors import os_errors
    from toy.runs import curve

    if out.suffix.lower() not in (".svg", ".png"):
        raise ToyError("bad_flag", f"{shown(out)} is neither .svg nor .png", "name the picture losses.svg, say")
    if out.is_dir() or not out.absolute().parent.is_dir():
        where = "is a folder" if out.is_dir() else "cannot be made: its folder is not there"
        raise ToyError("bad_flag", f"{shown(out)} {where}", "name the picture's file with --out")
    runs = choose(names)
    drawn = [curve.series(run) for run in runs]
    empty = [run.name for run, one in zip(runs, drawn, strict=True) if not (one.train or one.validation)]
    if empty:
        raise ToyError("bad_file", f"run {empty[0]} has no losses to draw", "leave it out")
    with os_errors("write the picture"):
        curve.draw_runs(out, drawn)
    if as_json:
        emit("toy/runs-plot-v1", {"file": str(out.absolute()), "runs": [run.name for run in runs]})
    else:
        click.echo(f"drew {', '.join(run.name for run in runs)} in {shown(out)}")


# --- rm -------------------------------------------------------------------------------------------------------------


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--checkpoints-only", is_flag=True, help="Their checkpoints; models, losses and settings stay.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@json_option
def rm(names: tuple[str, ...], checkpoints_only: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove RUNs of this project, after asking. A run that is running stays, and so does everything outside runs/."""
    from toy.runs import removing, runs_dir

    runs = runs_dir()
    removals = [removing.plan(run, runs, checkpoints_only) for run in choose(names)]
    rows = [{"run": one.run.name, "path": str(one.path), "size": one.size, "files": one.files} for one in removals]
    total = sum(one.size for one in removals)
    if not as_json:
        lines: list[tuple[str, ...]] = [
            (shown(one.path), f"{one.files} files", bytes_text(one.size)) for one in removals
        ]
        if len(lines) > 1:
            lines.append(("together", "", bytes_text(total)))
        table(lines, left=(0,))
    if not dry_run:
        if not yes and (as_json or not (sys.stdin.isatty() and sys.stderr.isatty())):
            raise ToyError(
                "bad_flag", "nothing was removed: there is no terminal to ask on", "--yes removes without asking"
            )
        what = "the checkpoints of " if checkpoints_only else ""
        who = f"{what}run {removals[0].run.name}" if len(removals) == 1 else f"{what}{len(removals)} runs"
        if not yes and not click.confirm(f"remove {who}, {bytes_text(total)}?", err=True):
            raise ToyError("interrupted", "nothing was removed", "answer y to remove")
        for one in removals:
            removing.remove(one)
    if as_json:
        emit(
            "toy/runs-rm-v1",
            {"removed": [] if dry_run else rows, "would_remove": rows if dry_run else [], "size": total},
        )
    elif dry_run:
        click.echo("nothing was removed")
    else:
        click.echo(f"removed {bytes_text(total)}")
