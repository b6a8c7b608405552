"""`toy install`: build every runner that this machine can."""

from __future__ import annotations

import time

import click

from toy import recipes
from toy.cli.common import emit, json_option
from toy.errors import ToyError, shown


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Of which device; auto: the best one here.")
@click.option("--portable", is_flag=True, help="Also the portable variant: the same bytes on every machine.")
@json_option
def command(device: str, portable: bool, as_json: bool) -> None:
    """Build every runner of a device, so that the first `toy train` starts at once."""
    from toy import builds

    recipes.check_words("from-scratch", "llama", device, {"run.device": "--device"}, ["run.device"])
    if device == recipes.AUTO:
        device, _ = recipes.auto_device("from-scratch", "f32")
    if reason := recipes.device_reason(device):
        raise ToyError("not_available", reason, recipes.DEVICE_HINTS.get(device, ""))
    targets = [name for name, where in recipes.RUNNERS.items() if where == device]
    if not targets:
        raise ToyError("not_available", f"this toy has no {device} runners yet", "--device cpu works now")
    built = []
    for variant in ("native", "portable") if portable else ("native",):
        fresh, begun = builds.is_built(targets, variant), time.monotonic()
        for name, path in builds.ensure_built(targets, variant, quiet=as_json).items():
            row = {"runner": name, "variant": variant, "path": str(path), "was_fresh": fresh}
            built.append(row | {"seconds": round(time.monotonic() - begun, 3)})
            if not as_json:
                click.echo(f"{shown(path)}{'  (was up to date)' if fresh else ''}")
    missing = [
        {"device": other, "reason": recipes.device_reason(other) or f"`toy install --device {other}` builds them"}
        for other in recipes.DEVICES
        if other != device and other in recipes.RUNNERS.values()
    ]
    if as_json:
        emit("toy/install-v1", {"runners": built, "not_built": missing})
    else:
        for item in missing:
            click.echo(f"{item['device']}: {item['reason']}", err=True)
