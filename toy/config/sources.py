"""Where values come from: YAML with line numbers, a run's config.json, `--set`, flags. All become `Given`s, by knob."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toy.config.knobs import KNOBS, SECTIONS, Knob
from toy.errors import ToyError, nearest

#: Top-level keys of toy.yml that are not knobs, with their documentation.
SETTINGS = {
    "preset": "Values to start from: the name of a shipped preset.",
    "run_id_template": "Names of runs, of {arch}, {recipe}, {name}, {date}, {time} and {seq}.",
}
CONFIG_FORMAT = "toy/config-v1"
TOKENIZER_WORDS = ("bytes", "chars", "bpe")
BY_NAME = ("checkpoint.resume", "lora.base", "model.donor")

_INT = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DURATION = re.compile(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s?)?")
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where. For YAML, `--set` and flags it is text; `quoted` text is never a number."""

    value: Any
    origin: str
    quoted: bool = False
    base: Path | None = None  # what a relative path is relative to
    whole: bool = False  # out of a run's config.json, which holds every knob whether or not somebody asked for it

    @property
    def is_flag(self) -> bool:
        return self.origin.startswith("--") and not self.origin.startswith(("--set", "--config"))


@dataclass(frozen=True)
class Source:
    """One file (or the command line) taken apart: knobs, and the settings beside them."""

    knobs: dict[str, Given]
    settings: dict[str, Given]


def bad(message: str, hint: str) -> ToyError:
    return ToyError("bad_config", message, hint)


def unknown_key(key: str, origin: str) -> ToyError:
    """The error for a key that is no knob, at whatever level, naming the nearest one."""
    section, _, name = key.partition(".")
    homes = [knob.key for knob in KNOBS.values() if knob.name == (name or section)]
    if section in SECTIONS and name:
        near = homes[0] if homes else None
        if near is None and (close := nearest(name, SECTIONS[section].model_fields)):
            near = f"{section}.{close}"
        near = near or nearest(key, KNOBS)
        hint = f"did you mean {near}?" if near else f"{section} has: {', '.join(SECTIONS[section].model_fields)}"
        return bad(f"unknown key {key} ({origin})", hint)
    close = nearest(section, [*SECTIONS, *SETTINGS]) or ""
    if homes:
        hint = f"did you mean {homes[0]}?"
    elif name and close in SECTIONS:
        better = name if name in SECTIONS[close].model_fields else nearest(name, SECTIONS[close].model_fields)
        hint = f"did you mean {close}.{better or name}?"
    elif close:
        hint = f"did you mean {close}?"
    elif not name and (knob := nearest(key, [entry.name for entry in KNOBS.values()])):
        hint = f"did you mean {next(entry.key for entry in KNOBS.values() if entry.name == knob)}?"
    else:
        hint = f"the sections are: {', '.join(SECTIONS)}; `toy config show --doc` lists every key"
    return bad(f"unknown key {key} ({origin})", hint)


def wrong(knob: Knob, given: Given, why: str = "") -> ToyError:
    """The error for a value that a knob cannot take."""
    shown = given.value if isinstance(given.value, str) else json.dumps(given.value, default=str)
    shown = repr(shown) if given.quoted or knob.type is str else shown
    allowed = knob.allowed() + ("; quoted, it is text" if given.quoted and knob.type is not str else "")
    hint = f"{knob.key}: {knob.doc}"
    if knob.choices and (close := nearest(str(given.value), knob.choices)):
        hint = f"did you mean {close}? {hint}"
    is_not = why or (f"is not {allowed}" if len(knob.choices) != 1 else f"must be {allowed}")
    return bad(f"{knob.key} = {shown or 'nothing'} {is_not} ({given.origin})", hint)


def convert(knob: Knob, given: Given) -> Any:
    """The value in the knob's own type. Ranges are pydantic's business; what cannot be read at all is refused here."""
    value = given.value
    if not isinstance(value, str):
        good = (
            isinstance(value, bool)
            if knob.type is bool
            else isinstance(value, knob.type) and not isinstance(value, bool)
        )
        if knob.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not good:
            raise wrong(knob, given)
        return value
    if knob.type is str:
        text = "" if value in _NULLS and not given.quoted else value
        if "\n" in text or "\r" in text or "\0" in text:
            raise wrong(knob, given, "must be on one line")
        return absolute(knob, text, given.base) if knob.path else text
    text = value.strip()
    if knob.auto is not None and text == "auto":
        return knob.auto
    if knob.duration:
        found = seconds(text)
        if found is None:
            raise wrong(knob, given)
        return found
    if not given.quoted:
        if knob.type is bool and text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        if knob.type is int and len(text) < 100 and _INT.fullmatch(text):  # longer ones are out of any range
            return int(text)
        if knob.type is float:
            try:
                return float(text)  # "1e-3" too, which YAML 1.1 reads as text
            except ValueError:
                pass
    raise wrong(knob, given)


def seconds(text: str) -> float | None:
    """`90`, `90s`, `55m` or `1h30m` in seconds; None for anything else."""
    match = _DURATION.fullmatch(text.replace(" ", "").lower())
    if not match or not any(match.groups()):
        return None
    try:
        return sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True) if part)
    except ValueError:  # 1.2.3
        return None


def absolute(knob: Knob, text: str, base: Path | None) -> str:
    """A path knob's value, independent of the working directory."""
    if not text or (knob.key == "data.tokenizer" and text in TOKENIZER_WORDS):
        return text
    path = Path(os.path.abspath((base or Path.cwd()) / Path(text).expanduser()))
    if knob.key in BY_NAME and not path.exists():
        return text  # a run's id, or a name that `toy list` shows
    return str(path)


def base_of(file: Path) -> Path:
    """What paths written in `file` are relative to: its project, or else its own folder."""
    folder = Path(os.path.abspath(file)).parent
    for parent in (folder, *folder.parents):
        if (parent / "toy.yml").is_file():
            return parent
    return folder


def read_text(file: Path, shown: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ToyError("missing_file", f"no such config file: {shown}", "check the path after --config") from None
    except IsADirectoryError:
        raise ToyError(
            "bad_file", f"{shown} is a folder, not a config file", "name a YAML file, or a run's config.json"
        ) from None
    except UnicodeDecodeError:
        raise bad(f"{shown} is not UTF-8 text", "a config is YAML, or a run's config.json") from None
    except OSError as error:
        raise ToyError(
            "bad_file", f"cannot read {shown}: {(error.strerror or '').lower()}", "check its permissions"
        ) from None


def read_file(file: Path, shown: str, base: Path | None = None) -> Source:
    """A YAML file or a run's config.json. `shown` is its name in messages."""
    text = read_text(file, shown)
    where = base or base_of(file)
    return read_json(text, shown, where) if file.suffix == ".json" else read_yaml(text, shown, where)


def read_yaml(text: str, shown: str, base: Path) -> Source:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{shown}:{mark.line + 1}" if mark else shown
        raise bad(
            f"{at}: not YAML: {error.problem or error.context}", "check the indentation and the colons there"
        ) from None
    except yaml.YAMLError as error:
        raise bad(f"{shown}: not YAML: {' '.join(str(error).split())}", "check the file's characters") from None
    source = Source({}, {})
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in _NULLS):
        return source
    for key, node, at in _entries(root, shown, ""):
        if key in SETTINGS:
            source.settings[key] = _scalar(node, key, at, base)
        elif key in SECTIONS:
            if isinstance(node, yaml.ScalarNode) and node.value in _NULLS and node.style is None:
                continue
            for name, value, line in _entries(node, shown, key):
                full = f"{key}.{name}"
                if full not in KNOBS:
                    raise unknown_key(full, line)
                source.knobs[full] = _scalar(value, full, line, base)
        else:
            raise unknown_key(key, at)
    return source


def _entries(node: yaml.Node, shown: str, section: str) -> list[tuple[str, yaml.Node, str]]:
    at = f"{shown}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        what = f"{section} is a section" if section else "a config is made of sections"
        raise bad(f"{at}: {what}, with `key: value` lines in it", f"the sections are: {', '.join(SECTIONS)}")
    entries: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value in node.value:
        line = f"{shown}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise bad(f"{line}: a key must be a word", "write `key: value`")
        key = key_node.value
        if key in entries:
            full = f"{section}.{key}" if section else key
            raise bad(f"{full} stands twice: {entries[key][2]} and {line}", "keep one of the two lines")
        entries[key] = (key, value, line)
    return list(entries.values())


def _scalar(node: yaml.Node, key: str, at: str, base: Path) -> Given:
    if not isinstance(node, yaml.ScalarNode):
        name = key.rpartition(".")[2]
        raise bad(f"{key} takes one value, not a list or a section ({at})", f"write `{name}: value`")
    return Given(node.value, at, node.style in ("'", '"'), base)


def read_json(text: str, shown: str, base: Path) -> Source:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for n, (key, _) in enumerate(pairs):
            if key in (other for other, _ in pairs[:n]):
                raise bad(f"{key} stands twice in {shown}", "keep one of the two")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise bad(
            f"{shown}:{error.lineno}: not JSON: {error.msg.lower()}", "give a run's config.json, or a YAML file"
        ) from None
    except RecursionError:
        raise bad(f"{shown}: not a config", "give a run's config.json, or a YAML file") from None
    if not isinstance(document, dict):
        raise bad(f"{shown}: not a config", f"a config has the sections {', '.join(SECTIONS)}")
    format = document.pop("format", CONFIG_FORMAT)
    if format != CONFIG_FORMAT:
        raise bad(f"{shown} is {format!r}, not {CONFIG_FORMAT!r}", "give a run's config.json, or a YAML file")
    source = Source({}, {})
    for key, value in document.items():
        if key in SETTINGS:
            source.settings[key] = Given(value, shown, isinstance(value, str), base)
            continue
        if key not in SECTIONS:
            raise unknown_key(key, shown)
        if not isinstance(value, dict):
            raise bad(f"{key} is a section ({shown})", "write it as an object")
        for name, item in value.items():
            full = f"{key}.{name}"
            if full not in KNOBS:
                raise unknown_key(full, shown)
            if item is None or isinstance(item, (dict, list)):
                raise wrong(KNOBS[full], Given(item, shown))
            source.knobs[full] = Given(item, shown, isinstance(item, str), base, whole=True)
    return source


def read_sets(sets: tuple[str, ...] | list[str]) -> Source:
    """`--set section.key=value`, any number of times; a later one wins."""
    source = Source({}, {})
    for word in sets:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise bad(f"--set {word!r} is not key=value", "write --set train.steps=100")
        if key in SETTINGS:
            source.settings[key] = Given(value.strip(), "--set")
            continue
        if key not in KNOBS:
            raise unknown_key(key, "--set")
        source.knobs[key] = Given(value if KNOBS[key].type is str else value.strip(), "--set", base=Path.cwd())
    return source
