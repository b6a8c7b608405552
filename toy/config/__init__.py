"""The configuration: knobs declared once (`knobs.py`), read from many places (`sources.py`), laid over each other here.

Order: defaults < preset < toy.yml < --config FILE < --set key=value < flags. Every value remembers where it came from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toy.config import sources
from toy.config.check import check
from toy.config.knobs import KNOBS, SECTIONS, Config, Knob
from toy.config.resolve import resolve, usable_cores
from toy.config.sources import CONFIG_FORMAT, SETTINGS, Given, bad
from toy.errors import ToyError, nearest

__all__ = [
    "CONFIG_FORMAT",
    "KNOBS",
    "SECTIONS",
    "SETTINGS",
    "Config",
    "Given",
    "Knob",
    "Loaded",
    "check",
    "load",
    "preset_names",
    "resolve",
    "to_json",
    "to_kv",
    "usable_cores",
]

PRESETS = Path(__file__).parent / "presets"
DEFAULT_TEMPLATE = "{arch}-{date}-{seq}"


@dataclass
class Loaded:
    """A configuration, the origin of each value ("default", "preset tiny", "toy.yml:7", "--set", "--steps"), and the
    settings that are not knobs."""

    config: Config
    origins: dict[str, str]
    run_id_template: str = DEFAULT_TEMPLATE
    template_origin: str = "default"
    preset: str = ""
    given: dict[str, Given] = field(default_factory=dict)

    def is_flag(self, key: str) -> bool:
        return key in self.given and self.given[key].is_flag

    def value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.config, section), name)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yml"))


def preset_doc(name: str) -> str:
    """The first comment line of a preset."""
    first = (PRESETS / f"{name}.yml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip()


def read_preset(given: Given) -> sources.Source:
    names = preset_names()
    if given.value not in names:
        close = nearest(str(given.value), names)
        kind = "bad_flag" if given.origin == "--preset" else "bad_config"
        hint = (f"did you mean {close}? " if close else "") + f"the presets are: {', '.join(names)}"
        raise ToyError(kind, f"unknown preset {given.value!r} ({given.origin})", hint)
    file = PRESETS / f"{given.value}.yml"
    return sources.read_file(file, f"preset {given.value}", PRESETS)


def load(
    *,
    project: Path | None = None,
    config_file: Path | None = None,
    preset: str | None = None,
    sets: tuple[str, ...] | list[str] = (),
    flags: dict[str, Given] | None = None,
) -> Loaded:
    """Lay all sources over the defaults, and validate each value and all of them together.

    `project` is the folder whose toy.yml counts. Raises ToyError (bad_config, missing_file, bad_file, bad_flag).
    """
    layers: list[sources.Source] = []
    if project is not None:
        layers.append(sources.read_file(project / "toy.yml", "toy.yml"))
    if config_file is not None:
        file = config_file / "config.json" if config_file.is_dir() else config_file
        layers.append(sources.read_file(file, str(file)))
    layers.append(sources.read_sets(sets))
    if preset is not None:
        layers[-1].settings["preset"] = Given(preset, "--preset")
    settings = {key: given for layer in layers for key, given in layer.settings.items()}
    if "preset" in settings and settings["preset"].value not in ("", "none"):
        shipped = read_preset(settings["preset"])
        name = settings["preset"].value
        layers.insert(
            0,
            sources.Source(
                {key: Given(g.value, f"preset {name}", g.quoted, g.base) for key, g in shipped.knobs.items()}, {}
            ),
        )
    layers.append(sources.Source(flags or {}, {}))
    given = {key: item for layer in layers for key, item in layer.knobs.items()}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, item in given.items():
        knob = KNOBS[key]
        values[knob.section][knob.name] = sources.convert(knob, item)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        raise sources.wrong(KNOBS[key], given.get(key, Given(first["input"], "default"))) from None
    loaded = Loaded(config, {key: given[key].origin if key in given else "default" for key in KNOBS}, given=given)
    if "preset" in settings:
        loaded.preset = settings["preset"].value
    if "run_id_template" in settings:
        template = settings["run_id_template"]
        if not isinstance(template.value, str) or not template.value:
            raise bad(f"run_id_template is not text ({template.origin})", SETTINGS["run_id_template"])
        loaded.run_id_template, loaded.template_origin = template.value, template.origin
    check(config, loaded.origins)
    return loaded


def _kv_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def to_kv(config: Config) -> str:
    """`config.kv`: every knob, `section.key=value` a line, for the runner."""
    return "".join(
        f"{section}.{name}={_kv_text(value)}\n"
        for section, values in config.model_dump().items()
        for name, value in values.items()
    )


def to_json(config: Config, project: Path | None = None) -> dict[str, Any]:
    """`config.json`: the same, typed. Paths inside `project` are written relative to it, so that it can be moved."""
    document: dict[str, Any] = config.model_dump()
    if project is not None:
        for knob in KNOBS.values():
            value = document[knob.section][knob.name]
            if knob.path and value and Path(value).is_absolute() and Path(value).is_relative_to(project):
                document[knob.section][knob.name] = str(Path(value).relative_to(project))
    return {"format": CONFIG_FORMAT, **document}


def json_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
