"""`toy runs`: the runs of this project."""

from __future__ import annotations

import time
from typing import Any

import click

from toy.cli.common import duration_text, emit, json_option, say


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("-n", "--last", type=click.IntRange(min=1), help="The last N only.")
@json_option
def command(folder: str | None, last: int | None, as_json: bool) -> None:
    """The runs of this project (or of FOLDER): state, losses, speed.

    A run is `running` for as long as a process holds its directory; a run that ended without saying so is `killed`.
    """
    from pathlib import Path

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
    lines += [cells(row) for row in rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    for line in lines:
        row_text = [
            cell.ljust(width) if n < 2 or n == 8 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(row_text).rstrip())


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(value: Any, digits: int = 4) -> str:
        return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"

    speed = row["tokens_per_second"]
    return (
        row["run_id"],
        row["state"],
        f"{row['step']}/{row['steps'] if row['steps'] is not None else '?'}",
        number(row["loss"]),
        number(row["val_loss"]),
        number(row["best_val_loss"]),
        f"{speed:,.0f}" if isinstance(speed, (int, float)) else "-",
        duration_text(row["seconds"]) if isinstance(row["seconds"], (int, float)) else "-",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"])) if row["started"] else "-",
    )
