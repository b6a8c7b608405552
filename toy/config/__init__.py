"""The configuration: knobs declared once (`knobs.py`), read from many places (`sources.py`), laid over each other here.

Order: defaults < the recipe's < preset < toy.yml < --config FILE < --set key=value < flags. Every value remembers where
it came from.
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
from toy.config.recipe_defaults import RECIPE_DEFAULTS
from toy.config.resolve import DEFAULT_CONTEXT, image_size, resolve, usable_cores
from toy.config.sources import CONFIG_FORMAT, SETTINGS, Given, bad
from toy.errors import ToyError, nearest

__all__ = [
    "CONFIG_FORMAT",
    "DEFAULT_CONTEXT",
    "KNOBS",
    "SECTIONS",
    "SETTINGS",
    "Config",
    "Given",
    "Knob",
    "Layers",
    "Loaded",
    "build",
    "check",
    "gather",
    "image_size",
    "leave_out",
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
    foreign: bool = False  # toy.yml is about another recipe than this run

    def is_flag(self, key: str) -> bool:
        return key in self.given and self.given[key].is_flag

    def is_explicit(self, key: str) -> bool:
        """Whether somebody asked for this value, for this recipe: no default, no preset, no copy in a config.json."""
        given = self.given.get(key)
        if given is None or given.whole or given.origin.startswith(("preset ", "recipe ")):
            return False
        return not (self.foreign and given.origin.startswith("toy.yml:"))

    def value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.config, section), name)

    def put(self, key: str, value: Any, origin: str) -> None:
        section, name = key.split(".")
        setattr(getattr(self.config, section), name, value)
        self.origins[key] = origin


@dataclass
class Layers:
    """What all sources say, laid over each other and not yet read as values: the recipe is known, and flags that depend
    on it can be added."""

    given: dict[str, Given]
    settings: dict[str, Given]
    recipe: str
    foreign: bool


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


def gather(
    *,
    project: Path | None = None,
    config_file: Path | None = None,
    preset: str | None = None,
    sets: tuple[str, ...] | list[str] = (),
    flags: dict[str, Given] | None = None,
) -> Layers:
    """All sources, laid over each other. `project` is the folder whose toy.yml counts.

    A project's toy.yml is about one recipe. Under another (`toy train lora` in a project that trains from scratch) its
    preset, recipe and architecture do not count. Raises ToyError (bad_config, missing_file, bad_file, bad_flag).
    """
    mine = sources.Source({}, {})
    if project is not None:
        mine = sources.read_file(project / "toy.yml", "toy.yml")
    layers = [mine]
    if config_file is not None:
        file = config_file / "config.json" if config_file.is_dir() else config_file
        layers.append(sources.read_file(file, str(file)))
    layers.append(sources.read_sets(sets))
    if preset is not None:
        layers[-1].settings["preset"] = Given(preset, "--preset")
    layers.append(sources.Source(flags or {}, {}))
    settings = {key: given for layer in layers for key, given in layer.settings.items()}
    shipped = _preset_layer(settings)
    named = "preset" in settings and settings["preset"] is not mine.settings.get("preset")

    def recipe_of(*order: sources.Source) -> Given:
        found = [layer.knobs["run.recipe"] for layer in order if "run.recipe" in layer.knobs]
        return found[-1] if found else Given(KNOBS["run.recipe"].default, "default")

    # a preset that was asked for on the command line knows its recipe better than toy.yml
    order = [mine, shipped, *layers[1:]] if named else [shipped, *layers]
    recipe = recipe_of(*order)
    own = recipe_of(mine) if named else recipe_of(shipped, mine)
    foreign = project is not None and recipe.value != own.value
    if foreign:
        for key in ("run.recipe", "run.arch"):
            mine.knobs.pop(key, None)
        if not named:
            shipped = sources.Source({}, {})
            settings.pop("preset", None)
    if shipped.knobs.get("run.recipe", recipe).value != recipe.value:
        meant, name = shipped.knobs["run.recipe"].value, settings["preset"]
        kind = "bad_flag" if name.origin == "--preset" else "bad_config"
        raise ToyError(
            kind, f"preset {name.value} is for {meant}, not for {recipe.value}", "leave the preset out, or the recipe"
        )
    defaults = RECIPE_DEFAULTS.get(recipe.value, {})
    layers.insert(0, sources.Source({key: Given(v, f"recipe {recipe.value}") for key, v in defaults.items()}, {}))
    layers.insert(1, shipped)
    if named:  # and its architecture too
        for key in ("run.recipe", "run.arch"):
            if key in shipped.knobs:
                mine.knobs.pop(key, None)
    given = {key: item for layer in layers for key, item in layer.knobs.items()}
    return Layers(given, settings, str(recipe.value), foreign)


def _preset_layer(settings: dict[str, Given]) -> sources.Source:
    if "preset" not in settings or settings["preset"].value in ("", "none"):
        return sources.Source({}, {})
    shipped, name = read_preset(settings["preset"]), settings["preset"].value
    return sources.Source(
        {key: Given(g.value, f"preset {name}", g.quoted, g.base) for key, g in shipped.knobs.items()}, {}
    )


def build(layers: Layers) -> Loaded:
    """The values of the layers, each valid and all of them together. Raises ToyError (bad_config)."""
    given, settings = layers.given, layers.settings
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
    origins = {key: given[key].origin if key in given else "default" for key in KNOBS}
    loaded = Loaded(config, origins, given=given, foreign=layers.foreign)
    if "preset" in settings:
        loaded.preset = settings["preset"].value
    if "run_id_template" in settings:
        template = settings["run_id_template"]
        if not isinstance(template.value, str) or not template.value:
            raise bad(f"run_id_template is not text ({template.origin})", SETTINGS["run_id_template"])
        loaded.run_id_template, loaded.template_origin = template.value, template.origin
    leave_out(loaded)
    check(config, loaded.origins)
    return loaded


def load(**sources_of: Any) -> Loaded:
    """`build(gather(...))`: the configuration of a project, a file, a preset, `--set`s and flags."""
    return build(gather(**sources_of))


def leave_out(loaded: Loaded) -> None:
    """Put knobs that this recipe and architecture do not have back to their defaults, or refuse those that somebody
    asked for. Raises ToyError (bad_config)."""
    cfg = loaded.config
    recipe = cfg.run.recipe
    if recipe not in RECIPE_DEFAULTS:
        return  # a word that is refused elsewhere
    # a donor brings its architecture, and is read later
    arch = None if recipe == "warm-start" and loaded.origins["run.arch"] == "default" else cfg.run.arch
    for key, knob in KNOBS.items():
        value = loaded.value(key)
        if knob.belongs(recipe, arch):
            continue
        asked = loaded.is_explicit(key) and value != knob.default
        if asked and not (key == "model.n_head_kv" and value == cfg.model.n_head):
            if knob.recipes and recipe not in knob.recipes:
                homes, this, what, flag = knob.recipes, recipe, "recipe", "--recipe"
            else:
                homes, this, what, flag = knob.archs, str(arch), "architecture", "--arch"
            several = "s" if len(homes) > 1 else ""
            raise bad(
                f"{key} belongs to the {what}{several} {' and '.join(homes)}, not to {this} ({loaded.origins[key]})",
                f"leave {key} out, or choose {flag} {homes[0]}",
            )
        loaded.put(key, knob.default, "default")


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
