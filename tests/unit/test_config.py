"""Knobs, their sources, their layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import ROOT

from toy import config, recipes
from toy.cli.config import yaml_text
from toy.cli.new import project_yaml
from toy.config import KNOBS, SECTIONS, Config, Given
from toy.config.recipe_defaults import RECIPE_DEFAULTS
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
    assert list(SECTIONS) == ["run", "model", "data", "train", "lora", "eval", "checkpoint", "log"]


def test_the_knobs_are_those_of_the_engine() -> None:
    """One list in two languages: an unknown or a missing key in config.kv is an error of the runner's."""
    source = (ROOT / "native" / "engine" / "config.cpp").read_text()
    theirs = re.findall(r'f\("([a-z0-9_.]+)", ', source)
    assert sorted(theirs) == sorted(KNOBS)


def test_the_defaults_of_a_recipe_are_values_of_its_own_knobs() -> None:
    assert set(RECIPE_DEFAULTS) == set(recipes.RECIPES)
    for recipe, values in RECIPE_DEFAULTS.items():
        for key, value in values.items():
            assert isinstance(value, KNOBS[key].type)
            assert KNOBS[key].belongs(recipe, None)
            assert value != KNOBS[key].default, f"{recipe} says {key} for nothing"
    assert {name for knob in KNOBS.values() for name in knob.recipes} <= set(recipes.RECIPES)
    assert {name for knob in KNOBS.values() for name in knob.archs} <= set(recipes.ARCHS)


@pytest.mark.parametrize("name", config.preset_names())
def test_every_shipped_preset_is_valid(name: str) -> None:
    loaded = config.load(preset=name)
    assert loaded.preset == name
    assert config.preset_doc(name)
    config.check(config.resolve(loaded.config, vocab_size=257, val_tokens=10000))
    run = loaded.config.run
    assert recipes.select(run.recipe, run.arch, run.device)


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


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_has_defaults_of_its_own(tmp_path: Path) -> None:
    loaded = config.load(flags={"run.recipe": Given("lora", "--recipe")})
    assert loaded.config.train.weight_decay == 0.0
    assert loaded.origins["train.weight_decay"] == "recipe lora"
    assert config.load(flags={"run.recipe": Given("vit-tiny", "--recipe")}).config.run.arch == "vit"
    write(tmp_path, "run:\n  recipe: lora\ntrain:\n  weight_decay: 0.2\n")
    assert config.load(project=tmp_path).config.train.weight_decay == 0.2


def test_a_preset_may_choose_recipe_and_architecture(tmp_path: Path) -> None:
    assert config.load(preset="nanogpt-char").config.run.arch == "gpt2"
    write(tmp_path, "preset: tiny\nrun:\n  recipe: from-scratch\n  arch: llama\n")
    run = config.load(project=tmp_path, preset="vit-mnist").config.run
    assert (run.recipe, run.arch) == ("vit-tiny", "vit"), "--preset is nearer than toy.yml"
    error = refused(preset="vit-mnist", flags={"run.recipe": Given("lora", "--recipe")})
    assert error.kind == "bad_flag"
    assert "vit-mnist is for vit-tiny, not for lora" in error.message


def test_a_project_of_another_recipe_keeps_its_preset_to_itself(tmp_path: Path) -> None:
    write(tmp_path, "preset: default\nmodel:\n  n_layer: 3\nrun:\n  arch: gpt2\ntrain:\n  grad_clip: 0.5\n")
    loaded = config.load(project=tmp_path, flags={"run.recipe": Given("vit-tiny", "--recipe")})
    assert loaded.foreign
    assert loaded.config.run.arch == "vit"
    assert loaded.config.train.steps == 1000, "not the preset's"
    assert loaded.config.train.grad_clip == 0.5, "what toy.yml itself says of all recipes counts"
    assert not loaded.is_explicit("model.n_layer")
    assert config.load(project=tmp_path).is_explicit("model.n_layer")


def test_knobs_of_other_recipes(tmp_path: Path) -> None:
    vit = {"run.recipe": Given("vit-tiny", "--recipe")}
    for sets, message in (
        (["lora.rank=4"], "lora.rank belongs to the recipe lora, not to from-scratch (--set)"),
        (["model.patch_size=4"], "model.patch_size belongs to the recipe vit-tiny, not to from-scratch"),
        (["model.init=donor"], "belongs to the recipe warm-start"),
        (["run.arch=gpt2", "model.rope_freq_base=500"], "belongs to the architecture llama, not to gpt2"),
        (["run.arch=gpt2", "model.n_head_kv=2"], "model.n_head_kv belongs to the architecture llama"),
    ):
        error = refused(sets=sets)
        assert message in error.message
        assert "leave" in error.hint
    assert "not to vit-tiny" in refused(sets=["data.corpus=x.txt"], flags=vit).message
    # where nobody asked for this run: a preset, a project of another recipe, a run's config.json
    assert config.load(preset="default", flags={"run.arch": Given("gpt2", "--arch")}).config.model.n_head_kv == 0
    write(tmp_path, "data:\n  corpus: book.txt\nlora:\n  rank: 3\n")
    assert config.load(project=tmp_path, flags=vit).config.data.corpus == ""
    text = config.json_text(config.to_json(config.load(sets=["run.recipe=lora", "lora.rank=4"]).config))
    write(tmp_path, text, "config.json")
    again = config.load(config_file=tmp_path / "config.json", flags=vit).config
    assert again.lora.rank == KNOBS["lora.rank"].default


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("55m", 3300),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m 5s", 5405),
        ("1.5h", 5400),
        ("0", 0),
    ],
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    assert config.load(sets=[f"run.stop_after={text}"]).config.run.stop_after == seconds
    file = write(tmp_path, f"run:\n  stop_after: {text}\n")
    assert config.load(config_file=file).config.run.stop_after == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "-3", "1m1h", "1.2.3", "h", "inf", "nan"])
def test_what_is_no_duration(text: str) -> None:
    error = refused(sets=[f"run.stop_after={text}"])
    assert "1h30m" in error.message


def of(recipe: str, arch: str, **sections: dict[str, object]) -> Config:
    """A configuration with no auto in it."""
    values = {**sections, "run": {"recipe": recipe, "arch": arch}}
    return config.resolve(Config.model_validate(values), vocab_size=65)


@pytest.mark.parametrize(
    ("batch", "context", "width", "at_once"),
    [
        (16, 256, 256, 8), (8, 256, 256, 8), (7, 256, 256, 7), (11, 256, 256, 11), (64, 8, 2048, 64),
        (4, 512, 512, 1), (1, 2048, 512, 1), (12, 64, 512, 12), (8, 256, 2048, 2), (9, 256, 2048, 3),
        (6, 1024, 2048, 1),
    ],
)  # fmt: skip
def test_a_micro_batch_holds_so_many_activations(batch: int, context: int, width: int, at_once: int) -> None:
    """The bound, and in wide models what makes 512 tokens; a batch that cannot be cut so stays whole."""
    layers = 8 if width == 512 else 6
    sizes = {"train": {"batch": batch}, "model": {"context": context, "n_embd": width, "n_layer": layers}}
    assert config.resolve(Config.model_validate(sizes)).train.micro_batch == at_once
    sizes["train"]["micro_batch"] = batch
    assert config.resolve(Config.model_validate(sizes)).train.micro_batch == batch, "as it is asked for"
    sizes["train"] = {"batch": batch, "recompute": True}
    assert config.resolve(Config.model_validate(sizes)).train.micro_batch == at_once, "it is there to save"


def test_autos_of_each_architecture() -> None:
    assert of("from-scratch", "llama").model.n_ff == 704
    assert of("from-scratch", "gpt2").model.n_ff == 1024
    assert of("lora", "llama", lora={"rank": 6}).lora.alpha == 12
    assert of("from-scratch", "llama").lora.alpha == 0, "left alone where there is no adapter"
    for size, patch, context in ((224, 16, 197), (28, 4, 50), (32, 4, 65), (64, 8, 65), (96, 12, 65), (8, 1, 65)):
        model = of("vit-tiny", "vit", model={"image_size": size}).model
        assert (model.patch_size, model.context) == (patch, context)
    assert of("vit-tiny", "vit", model={"image_size": 28, "pool": "mean"}).model.context == 49
    assert config.image_size(640) == 224
    assert config.image_size(30) == 28
    big = config.resolve(Config.model_validate({"run": {"recipe": "vit-tiny", "arch": "vit"}}), val_items=10_000)
    assert big.eval.batches == 625, "of images the whole part"
    assert config.resolve(Config(), val_items=10_000).eval.batches == 64


@pytest.mark.parametrize(
    ("recipe", "arch", "sections", "message", "hint"),
    [
        ("vit-tiny", "vit", {"model": {"image_size": 30, "patch_size": 4}}, "model.patch_size = 4 does not", "= 3"),
        ("vit-tiny", "vit", {"model": {"n_embd": 100, "n_head": 3}}, "is not divisible by model.n_head", "n_head = 2"),
        ("vit-tiny", "vit", {"model": {"n_class": 1}}, "model.n_class = 1", "two classes"),
        (
            "vit-tiny", "vit", {"model": {"image_size": 28, "patch_size": 7}, "data": {"augment_crop": 28}},
            "data.augment_crop = 28", "tenth",
        ),
        ("from-scratch", "gpt2", {"model": {"n_head": 8, "n_head_kv": 4}}, "model.n_head_kv = 4 is not", "llama"),
        ("from-scratch", "llama", {"model": {"context": 1}}, "model.context = 1", "2 or more"),
        ("from-scratch", "llama", {"train": {"freeze": "blk.9.*"}}, "train.freeze has 'blk.9.*'", ""),
        ("from-scratch", "llama", {"train": {"freeze": "token_embed.weight"}}, "train.freeze", "token_embd.weight"),
        ("from-scratch", "gpt2", {"train": {"freeze": "*"}}, "leaves nothing to train", ""),
        ("from-scratch", "gpt2", {"train": {"freeze": "*.weight, *.bias"}}, "leaves nothing to train", ""),
        ("lora", "llama", {"train": {"freeze": "token_embd.weight"}}, "the base is frozen anyway", "blk.0.*"),
        (
            "lora", "llama", {"train": {"freeze": "blk.0.attn_q.weight"}}, "is no tensor of the adapter",
            "blk.0.attn_q.weight.lora_",
        ),
        ("lora", "llama", {"train": {"freeze": "blk.*"}}, "leaves nothing to train", ""),
        ("lora", "llama", {"train": {"freeze": "*_b, blk.0.*"}}, "every lora_b, which begins at zero", "lora_a"),
        (
            "lora", "llama", {"train": {"freeze": "*ffn_up*"}, "lora": {"targets": "attn_q"}},
            "is no tensor of the adapter", "",
        ),
        ("lora", "llama", {"lora": {"targets": "attn_qq"}}, "unknown target 'attn_qq'", "did you mean attn_q?"),
        ("lora", "llama", {"lora": {"targets": " , "}}, "lora.targets is empty", "attn_q"),
        ("lora", "llama", {"lora": {"rank": 257}}, "lora.rank = 257 is above the width of attn_q, 256", ""),
        (
            "lora", "llama", {"model": {"n_head_kv": 2}, "lora": {"rank": 65, "targets": "attn_q,attn_v"}},
            "above the width of attn_v, 64", "",
        ),
        ("vit-tiny", "vit", {"eval": {"patience": 2}, "data": {"val_fraction": 0.0}}, "eval.patience", "val_images"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_in_a_recipe(
    recipe: str, arch: str, sections: dict[str, dict[str, object]], message: str, hint: str
) -> None:
    with pytest.raises(ToyError) as caught:
        config.check(of(recipe, arch, **sections))
    assert caught.value.kind == "bad_config"
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_what_goes_together_in_a_recipe() -> None:
    config.check(of("from-scratch", "gpt2", model={"n_embd": 21, "n_head": 7}))  # odd heads: nothing rotates
    config.check(of("from-scratch", "llama", train={"freeze": "blk.0.*,token_embd.weight"}))
    config.check(of("from-scratch", "gpt2", train={"freeze": "*.bias"}))
    config.check(of("lora", "llama", lora={"targets": "ffn_up, attn_q", "rank": 256}))
    config.check(of("lora", "llama", train={"freeze": "blk.0.*, *.lora_a"}))
    config.check(of("lora", "llama", model={"n_embd": 576, "n_head": 7}))  # the base's business
    config.check(of("vit-tiny", "vit", eval={"patience": 2}, data={"val_fraction": 0.0, "val_images": "x"}))


def test_lists_are_written_for_the_runner_without_spaces() -> None:
    resolved = of("lora", "llama", lora={"targets": " ffn_up, attn_q,"}, train={"freeze": "blk.0.* , *.lora_a"})
    assert (resolved.lora.targets, resolved.train.freeze) == ("ffn_up,attn_q", "blk.0.*,*.lora_a")
    assert of("lora", "llama", lora={"targets": "attn_q, all"}).lora.targets == "all"


@pytest.mark.parametrize("rank", ["0", "-1", "1.5"])
def test_ranks_that_are_none(rank: str) -> None:
    assert "lora.rank" in refused(sets=["run.recipe=lora", f"lora.rank={rank}"]).message
    assert refused(sets=["run.recipe=lora", "lora.dropout=1"]).message.startswith("lora.dropout = 1 is not")


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
        if knob.auto is not None and knob.belongs("from-scratch", "llama"):
            assert getattr(getattr(resolved, knob.section), knob.name) != knob.auto, knob.key
    assert resolved.model.context == 256
    assert resolved.model.n_ff == 704
    assert resolved.model.n_head_kv == 8
    assert resolved.train.micro_batch == 8
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


@pytest.mark.parametrize("preset", [*config.preset_names(), "none"])
@pytest.mark.parametrize("recipe", [None, "warm-start", "lora", "vit-tiny"])
def test_the_toy_yml_of_a_new_project_says_what_is_in_effect(tmp_path: Path, preset: str, recipe: str | None) -> None:
    flags = {"run.recipe": Given(recipe, "--recipe", quoted=True)} if recipe else {}
    try:
        loaded = config.load(preset=preset, flags=flags)
    except ToyError as error:
        assert "preset" in error.message
        return
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
    run = loaded.config.run
    for key, origin in everything.origins.items():
        of_base = run.recipe == "lora" and key.startswith("model.")
        if KNOBS[key].belongs(run.recipe, run.arch) and not of_base:
            assert origin.startswith("toy.yml:"), key
        elif not of_base:
            assert origin == "default", key


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
