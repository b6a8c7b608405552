"""`toy install`: build every runner that this machine can."""

from __future__ import annotations

import time

import click

from toy import recipes
from toy.cli.common import emit, json_option
from toy.errors import shown


@click.command()
@click.option("--portable", is_flag=True, help="Also the portable variant: the same bytes on every machine.")
@json_option
def command(portable: bool, as_json: bool) -> None:
    """Build every runner this machine can, so that the first `toy train` starts at once."""
    from toy import runners

    targets = [name for name, device in recipes.RUNNERS.items() if not recipes.device_reason(device)]
    built = []
    for variant in ("native", "portable") if portable else ("native",):
        fresh, begun = runners.is_built(targets, variant), time.monotonic()
        for name, path in runners.ensure_built(targets, variant, quiet=as_json).items():
            row = {"runner": name, "variant": variant, "path": str(path), "was_fresh": fresh}
            built.append(row | {"seconds": round(time.monotonic() - begun, 3)})
            if not as_json:
                click.echo(f"{shown(path)}{'  (was up to date)' if fresh else ''}")
    others = sorted({row.device for row in recipes.MATRIX} ^ set(recipes.DEVICES))
    missing = [
        {"device": device, "reason": recipes.device_reason(device) or f"this toy has no {device} runners yet"}
        for device in others
    ]
    if as_json:
        emit("toy/install-v1", {"runners": built, "not_built": missing})
    else:
        for item in missing:
            click.echo(f"{item['device']}: {item['reason']}", err=True)
