"""Knobs, their sources, their layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toy import config
from toy.cli.config import yaml_text
from toy.cli.new import project_yaml
from toy.config import KNOBS, SECTIONS, Config, Given
from toy.errors import ToyError


def refused(**layers: object) -> ToyError:
    with pytest.raises(ToyError) as caught:
        config.load(**layers)  # type: ignore[arg-type]
    return caught.value


def write(folder: Path, text: str, name: str = "toy.yml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", KNOBS.values(), ids=list(KNOBS))
def test_every_knob_is_documented_and_its_default_is_allowed(knob: config.Knob) -> None:
    assert knob.doc.endswith(".")
    assert knob.allowed()
    assert isinstance(knob.default, knob.type)
    if knob.auto is not None:
        assert knob.auto_doc


def test_the_sections_are_those_of_the_architecture() -> None:
    assert list(SECTIONS) == ["run", "model", "data", "train", "eval", "checkpoint", "log"]


@pytest.mark.parametrize("name", config.preset_names())
def test_every_shipped_preset_is_valid(name: str) -> None:
    loaded = config.load(preset=name)
    assert loaded.preset == name
    assert config.preset_doc(name)
    config.check(config.resolve(loaded.config, vocab_size=257, val_tokens=10000))


# --- layers ---------------------------------------------------------------------------------------------------------


def test_the_order_of_the_layers(tmp_path: Path) -> None:
    write(tmp_path, "preset: tiny\ntrain:\n  batch: 5\n  steps: 2\n  beta1: 0.5\n")
    file = write(tmp_path, "train:\n  steps: 3\n  beta1: 0.6\n", "other.yml")
    flags = {"train.steps": Given("5", "--steps")}
    loaded = config.load(project=tmp_path, config_file=file, sets=["train.steps=4", "train.beta1=0.7"], flags=flags)
    train = loaded.config.train
    assert (train.steps, train.beta1, train.batch) == (5, 0.7, 5)
    assert loaded.config.model.n_layer == 2, "the preset's"
    assert loaded.config.train.beta2 == 0.95, "the default"
    assert loaded.origins["train.steps"] == "--steps"
    assert loaded.origins["train.beta1"] == "--set"
    assert loaded.origins["train.batch"] == "toy.yml:3"
    assert loaded.origins["model.n_layer"] == "preset tiny"
    assert loaded.origins["train.beta2"] == "default"


def test_a_preset_flag_wins_over_the_preset_of_toy_yml(tmp_path: Path) -> None:
    write(tmp_path, "preset: char-small\n")
    assert config.load(project=tmp_path, preset="tiny").config.data.tokenizer == "bytes"


def test_floats_as_yaml_1_1_misreads_them(tmp_path: Path) -> None:
    file = write(tmp_path, "train:\n  learning_rate: 1e-3\n  eps: 1E-9\n  weight_decay: 1\n")
    train = config.load(config_file=file).config.train
    assert (train.learning_rate, train.eps, train.weight_decay) == (1e-3, 1e-9, 1.0)


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    file = write(tmp_path, "run:\n  name: 007\n  notes: yes\n")
    run = config.load(config_file=file).config.run
    assert (run.name, run.notes) == ("007", "yes")


def test_auto_can_be_written(tmp_path: Path) -> None:
    file = write(tmp_path, "train:\n  warmup_steps: auto\nmodel:\n  n_ff: auto\n")
    assert config.load(config_file=file).config.train.warmup_steps == -1


def test_an_empty_file_and_empty_sections_are_fine(tmp_path: Path) -> None:
    assert config.load(config_file=write(tmp_path, "")).config == Config()
    assert config.load(config_file=write(tmp_path, "# nothing\ntrain:\nmodel: ~\n")).config == Config()


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "conf").mkdir(parents=True)
    elsewhere.mkdir()
    write(project, "data:\n  corpus: data/book.txt\n")
    file = write(project / "conf", "data:\n  val_corpus: data/val.txt\n", "more.yml")
    monkeypatch.chdir(elsewhere)
    data = config.load(project=project, config_file=file, sets=["data.tokenizer=tok.json"]).config.data
    assert data.corpus == str(project / "data/book.txt")
    assert data.val_corpus == str(project / "data/val.txt"), "relative to the project above the file"
    assert data.tokenizer == str(elsewhere / "tok.json")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("trian:\n  steps: 3\n", "unknown key trian (c.yml:1)", "did you mean train?"),
        ("train:\n\n  stepz: 3\n", "unknown key train.stepz (c.yml:3)", "did you mean train.steps?"),
        ("steps: 3\n", "unknown key steps", "did you mean train.steps?"),
        ("model:\n  steps: 3\n", "unknown key model.steps", "did you mean train.steps?"),
        ("trian.steps: 3\n", "unknown key trian.steps", "did you mean train.steps?"),
        ("lora:\n  rank: 3\n", "belongs to the recipe lora", ""),
        ("train:\n  steps: many\n", "train.steps = many is not a whole number from 1", "Optimizer updates"),
        ("train:\n  steps: 1.5\n", "train.steps = 1.5 is not a whole number", ""),
        ("train:\n  steps: 0\n", "train.steps = 0 is not a whole number from 1", ""),
        ("train:\n  steps: true\n", "train.steps = true is not", ""),
        ('train:\n  steps: "3"\n', "quoted, it is text", ""),
        ("train:\n  steps:\n", "train.steps = nothing", ""),
        ("train:\n  steps: [3]\n", "train.steps takes one value", ""),
        ("train:\n  learning_rate: .inf\n", "train.learning_rate = .inf is not a number from 0 to 10", ""),
        ("train:\n  learning_rate: nan\n", "train.learning_rate = nan is not", ""),
        ("train:\n  learning_rate: -1\n", "train.learning_rate = -1 is not", ""),
        ("data:\n  shuffle: maybe\n", "data.shuffle = maybe is not true or false", ""),
        ("train:\n  schedule: cosin\n", "is not one of constant, cosine", "did you mean cosine?"),
        ("train:\n  steps: 1\n  steps: 2\n", "train.steps stands twice: c.yml:2 and c.yml:3", ""),
        ("train:\n  steps: 1\ntrain:\n  batch: 2\n", "train stands twice", ""),
        ("train: 3\n", "c.yml:1: train is a section", ""),
        ("- a\n", "c.yml:1: a config is made of sections", ""),
        ("a: [b\n", "c.yml:2: not YAML", ""),
        ("train:\n\tsteps: 2\n", "c.yml:2: not YAML", ""),
        ("preset: tyny\n", "unknown preset 'tyny'", "did you mean tiny?"),
        ("log:\n  trackers: wandb\n", "log.trackers", ""),
        ("run:\n  seed: 99999999999999999999\n", "run.seed = 99999999999999999999 is not", ""),
        ("run:\n  name: |\n    two\n    lines\n", "must be on one line", ""),
    ],
)
def test_bad_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text, "c.yml")
    error = refused(config_file=Path("c.yml"))
    assert error.kind == "bad_config"
    assert error.exit_code == 2
    assert message in error.message
    assert hint in error.hint
    assert error.hint
    assert "\n" not in error.message + error.hint


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.n_embd=100", "model.n_head=8"], "model.n_embd = 100 is not divisible by model.n_head = 8"),
        (["model.n_embd=12", "model.n_head=4"], "is odd"),
        (["model.n_head=8", "model.n_head_kv=3"], "model.n_head_kv = 3 does not divide"),
        (["train.batch=10", "train.micro_batch=4"], "train.micro_batch = 4 does not divide"),
        (["train.steps=10", "train.warmup_steps=11"], "train.warmup_steps = 11 is more than"),
        (["train.min_learning_rate=0.1"], "is above train.learning_rate"),
        (["train.min_learning_rate=-0.5"], "is negative"),
        (["eval.patience=3", "data.val_fraction=0"], "needs a validation part"),
        (["eval.patience=3", "eval.every=0"], "needs validations on the way"),
        (["data.tokenizer="], "data.tokenizer is empty"),
    ],
)
def test_knobs_that_do_not_go_together(sets: list[str], message: str) -> None:
    error = refused(sets=sets)
    assert error.kind == "bad_config"
    assert message in error.message
    assert "(--set)" in error.message


@pytest.mark.parametrize("word", ["train.steps", "=3", "train.step=3", "steps=3"])
def test_bad_sets(word: str) -> None:
    assert refused(sets=[word]).kind == "bad_config"


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert refused(config_file=tmp_path / "none.yml").kind == "missing_file"
    (tmp_path / "config.json").mkdir()
    assert refused(config_file=tmp_path / "config.json").kind == "missing_file"


def test_a_range_error_of_a_flag_names_the_flag() -> None:
    error = refused(flags={"train.steps": Given("0", "--steps")})
    assert "(--steps)" in error.message


# --- resolving and writing ------------------------------------------------------------------------------------------


def test_resolve_leaves_no_auto() -> None:
    resolved = config.resolve(Config(), vocab_size=2048, val_tokens=100_000)
    for knob in KNOBS.values():
        if knob.auto is not None:
            assert getattr(getattr(resolved, knob.section), knob.name) != knob.auto, knob.key
    assert resolved.model.n_ff == 704
    assert resolved.model.n_head_kv == 8
    assert resolved.train.micro_batch == 16
    assert resolved.train.warmup_steps == 100
    assert resolved.train.min_learning_rate == 1e-4
    assert resolved.eval.batches == 25
    assert config.resolve(Config(), val_tokens=10**8).eval.batches == 64
    assert Config().model.n_ff == 0, "the original is left alone"


def test_config_json_reads_back_as_the_same(tmp_path: Path) -> None:
    loaded = config.load(preset="tiny", sets=['run.notes=é "quoted" 😀', "data.corpus=book.txt"])
    resolved = config.resolve(loaded.config, vocab_size=257)
    write(tmp_path, config.json_text(config.to_json(resolved)), "config.json")
    assert config.load(config_file=tmp_path / "config.json").config == resolved
    assert config.load(config_file=tmp_path).config == resolved, "a run's directory will do"


def test_paths_in_a_project_are_written_relative(tmp_path: Path) -> None:
    write(tmp_path, "data:\n  corpus: data/book.txt\n  val_corpus: /somewhere/else.txt\n")
    loaded = config.load(project=tmp_path)
    document = config.to_json(loaded.config, tmp_path)
    assert document["data"]["corpus"] == "data/book.txt"
    assert document["data"]["val_corpus"] == "/somewhere/else.txt"
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    write(run, config.json_text(document), "config.json")
    assert config.load(config_file=run).config == loaded.config


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"train": {"step": 3}}',
        '{"train": 3}',
        '{"train": {"steps": null}}',
        '{"train": {"steps": "3"}}',
        '{"train": {"steps": 3',
        '{"train": {}, "train": {}}',
        '{"run": {"seed": true}}',
        '{"format": "toy/meta-v1"}',
    ],
)
def test_bad_json(tmp_path: Path, text: str) -> None:
    assert refused(config_file=write(tmp_path, text, "config.json")).kind == "bad_config"


def test_config_kv_holds_every_knob_once() -> None:
    lines = config.to_kv(config.resolve(Config(), vocab_size=257)).splitlines()
    assert [line.split("=", 1)[0] for line in lines] == list(KNOBS)
    values = dict(line.split("=", 1) for line in lines)
    assert values["data.shuffle"] == "true"
    assert values["train.eps"] == "1e-08"
    assert values["data.corpus"] == ""


@pytest.mark.parametrize("preset", config.preset_names())
def test_the_toy_yml_of_a_new_project_says_what_is_in_effect(tmp_path: Path, preset: str) -> None:
    loaded = config.load(preset=preset)
    text = project_yaml(preset, loaded)
    write(tmp_path, text)
    mine = config.load(project=tmp_path)
    assert mine.config.model_copy(update={"data": loaded.config.data}) == loaded.config
    uncommented = "\n".join(
        line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in text.splitlines()
    )
    write(tmp_path, uncommented)
    everything = config.load(project=tmp_path)
    assert everything.config == mine.config
    assert all(origin.startswith("toy.yml:") for origin in everything.origins.values())


@pytest.mark.parametrize(
    "value", ["", "plain", "3", "yes please", 'a "b" \\ c', "#x", "-", "true", "a: b", "é", 0.1, 1e-8, True, 7]
)
def test_values_are_written_as_yaml_that_reads_back(tmp_path: Path, value: object) -> None:
    key = {bool: "data.shuffle", int: "train.steps", float: "train.eps"}.get(type(value), "run.notes")
    section, name = key.split(".")
    file = write(tmp_path, f"{section}:\n  {name}: {yaml_text(value)}\n")
    assert config.load(config_file=file).value(key) == value


def test_config_show_json_is_a_config(tmp_path: Path) -> None:
    document = json.loads(json.dumps(config.to_json(Config())))
    assert document["format"] == "toy/config-v1"
    assert set(document) == {"format", *SECTIONS}
