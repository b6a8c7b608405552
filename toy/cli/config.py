"""`toy config`: show the resolved configuration with the origin of each value, or validate one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from toy import config, recipes
from toy.cli.common import emit, json_option
from toy.config import KNOBS, Loaded
from toy.errors import ToyError, shown

FORMAT = "toy/config-v1"


def layer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob.")(function)
    return click.option("--preset", help="Shipped values: " + ", ".join(config.preset_names()) + ".")(function)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show or validate the configuration.

    \b
    toy config show --doc
    toy config validate toy.yml
    """
    if ctx.invoked_subcommand is None:
        raise ToyError("bad_flag", "toy config needs a verb: show or validate", "`toy config show` prints every knob")


def read(config_file: Path | None, preset: str | None, sets: tuple[str, ...], *, project: bool = True) -> Loaded:
    """Load, and check what `toy train` would check about words and the template."""
    from toy.runs import check_template, find_project

    loaded = config.load(project=find_project() if project else None, config_file=config_file, preset=preset, sets=sets)
    run = loaded.config.run
    recipes.check_words(run.recipe, run.arch, run.device, loaded.origins)
    check_template(loaded.run_id_template, loaded.template_origin)
    return loaded


@command.command("show")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file, or a run's config.json.")
@layer_options
@click.option("--defaults", is_flag=True, help="The defaults, whatever toy.yml says.")
@click.option("--doc", is_flag=True, help="With type, range and meaning of every knob.")
@json_option
def show(
    config_file: Path | None, preset: str | None, sets: tuple[str, ...], defaults: bool, doc: bool, as_json: bool
) -> None:
    """The resolved configuration, and where each value comes from."""
    loaded = read(config_file, preset, sets, project=not defaults)
    resolved = Loaded(config.resolve(loaded.config), loaded.origins)
    if as_json:
        knobs = {key: describe(key, loaded, resolved) for key in KNOBS}
        settings = {"preset": loaded.preset or None, "run_id_template": loaded.run_id_template}
        emit(FORMAT, {"config": config.to_json(resolved.config), "settings": settings, "knobs": knobs})
        return
    section = ""
    for key, knob in KNOBS.items():
        if knob.section != section:
            section = knob.section
            click.echo(f"{section}:" + (f"  # {config.SECTIONS[section].__doc__}" if doc else ""))
        row = describe(key, loaded, resolved)
        text = f"  {knob.name}: {yaml_text(row['value'])}"
        remark = row["origin"] + (f", auto: {knob.auto_doc}" if row["auto"] else "")
        click.echo(f"{text:<34}  # {remark}")
        if doc:
            click.echo(f"      {knob.doc} {knob.allowed()[:1].upper() + knob.allowed()[1:]}.")
    if doc:
        click.echo("# beside the sections, in toy.yml:")
        for key, text in config.SETTINGS.items():
            click.echo(f"#   {key}: {text}")


def describe(key: str, loaded: Loaded, resolved: Loaded) -> dict[str, Any]:
    knob = KNOBS[key]
    auto = knob.auto is not None and loaded.value(key) == knob.auto
    return {
        "value": resolved.value(key),
        "default": knob.default,
        "origin": loaded.origins[key],
        "auto": auto,
        "type": knob.type.__name__,
        "allowed": knob.allowed(),
        "unit": knob.unit,
        "doc": knob.doc,
    }


def yaml_text(value: Any) -> str:
    """A value as YAML that reads back as the same."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = (
            value and all(c.isalnum() or c in "-_./" for c in value) and not value[0].isdigit() and value[0] not in "-."
        )
        return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


@command.command("validate")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@layer_options
@json_option
def validate(file: Path | None, preset: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Check FILE (a YAML file or a run's config.json), or the project's toy.yml."""
    from toy.runs import find_project

    project = find_project()
    if file is None and project is None:
        raise ToyError("missing_file", "no toy.yml here or above", "name a file, or make a project with `toy new PATH`")
    loaded = read(file, preset, sets, project=file is None)
    checked = file or (project / "toy.yml" if project else Path("toy.yml"))
    set_knobs = [key for key, origin in loaded.origins.items() if origin != "default"]
    if as_json:
        emit(FORMAT, {"valid": True, "file": str(checked.absolute()), "set": set_knobs})
    else:
        click.echo(f"{shown(checked)} is valid: {len(set_knobs)} of {len(KNOBS)} knobs set, the rest at their defaults")
