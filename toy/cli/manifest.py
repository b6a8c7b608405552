"""`toy --manifest`: the command table with every option and its type, for tools that write command lines."""

from __future__ import annotations

from typing import Any

import click

from toy import __version__
from toy.cli import COMMANDS, Table
from toy.cli.common import emit
from toy.errors import KINDS


def option(param: click.Parameter) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": param.name,
        "kind": param.param_type_name,
        "type": "flag" if getattr(param, "is_flag", False) else param.type.name,
        "required": param.required,
        "multiple": bool(getattr(param, "multiple", False)) or param.nargs == -1,
        "default": None,
    }
    if isinstance(param, click.Option):
        row["flags"] = [*param.opts, *param.secondary_opts]
        row["help"] = param.help or ""
    if isinstance(param.type, click.Choice):
        row["choices"] = list(param.type.choices)
    default = param.default
    if default is False or isinstance(default, (str, int, float)):
        row["default"] = default
    return row


def describe(name: str, command: click.Command, ctx: click.Context) -> dict[str, Any]:
    with click.Context(command, info_name=name, parent=ctx) as inner:
        row: dict[str, Any] = {
            "name": name,
            "help": " ".join((command.help or command.short_help or "").split("\b")[0].split()),
            "options": [option(param) for param in command.get_params(inner) if "--help" not in param.opts],
        }
        if isinstance(command, click.Group):
            row["commands"] = [
                describe(sub, found, inner)
                for sub in command.list_commands(inner)
                if (found := command.get_command(inner, sub)) is not None
            ]
    return row


def manifest(ctx: click.Context) -> None:
    table = ctx.command
    assert isinstance(table, Table)
    commands = []
    for name, entry in COMMANDS.items():
        command = table.get_command(ctx, name)
        assert command is not None
        commands.append(
            {**describe(name, command, ctx), "help": entry.help, "group": entry.group, "format": entry.format}
        )
    emit("toy/manifest-v1", {"version": __version__, "commands": commands, "error_kinds": KINDS})
