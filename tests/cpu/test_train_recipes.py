"""`toy train` in every recipe, through the real command line: what it leaves, says and refuses."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from harness import EXCERPT, ROOT, TINY, Toy, read_events, sets, write_jsonl

DIGITS = ROOT / "data" / "digits"
SMALL_VIT = sets(model__n_layer=1, model__n_embd=16, model__n_head=2, train__batch=8, eval__batches=2)


@dataclass
class Recipes:
    """One short run a recipe, that many tests look at and none changes."""

    at: Path
    documents: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def recipes_run(
    home: dict[str, str], built: None, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Recipes:
    at = tmp_path_factory.mktemp("recipes")
    toy = Toy(at, home)
    pairs = [{"prompt": f"What is {n}? ", "completion": f"It is {n}."} for n in range(40)]
    write_jsonl(at / "pairs.jsonl", *pairs)
    commands: dict[str, tuple[object, ...]] = {
        "gpt2": (*TINY, "--arch", "gpt2"),
        "warm-start": ("warm-start", "--model", trained.gguf, "--corpus", EXCERPT, "--init", "donor"),
        "embeddings": ("warm-start", "--model", trained.run, "--corpus", EXCERPT, "--init", "embeddings"),
        "warm-start-gpt2": ("warm-start", "--model", "gpt2", "--corpus", EXCERPT),
        "lora": ("lora", "--model", trained.run, "--corpus", EXCERPT, "--rank", 4),
        "lora-of-examples": ("lora", "--model", trained.gguf, "--corpus", "pairs.jsonl", *sets(lora__targets="attn_q")),
        "vit-tiny": ("vit-tiny", "--images", DIGITS, *SMALL_VIT),
    }
    few = ("--steps", 4, *sets(eval__every=2, checkpoint__every=2), "--json", "--no-sample")
    documents = {name: toy("train", *words, *few, "--out", name).ok().document for name, words in commands.items()}
    return Recipes(at, documents)


def test_every_recipe_trains_and_leaves_its_gguf(recipes_run: Recipes, trained: Trained) -> None:
    from toy import _native

    for name, document in recipes_run.documents.items():
        assert (document["step"], document["reason"], document["error"]) == (4, "done", None), name
        assert all(math.isfinite(float(loss)) for loss in document["losses"])
        assert document["val_loss"] > 0
        assert document["sequences_per_second"] > 0
        gguf = Path(document["gguf"])
        assert gguf.name == ("adapter.gguf" if name.startswith("lora") else "model.gguf")
        meta = _native.gguf_read(str(gguf))["metadata"]
        assert meta["general.architecture"] == ("gpt2" if "gpt2" in name else "vit" if name == "vit-tiny" else "llama")
        assert (document["accuracy"] is not None) == (name == "vit-tiny")
        more = document["total_parameters"] > document["parameters"]
        assert more == (document["base"] is not None) == name.startswith("lora")
    assert 0 <= recipes_run.documents["vit-tiny"]["accuracy"] <= 1


def test_a_donor_gives_shape_tokenizer_and_first_losses(recipes_run: Recipes, trained: Trained) -> None:
    first = {name: float(document["losses"][0]) for name, document in recipes_run.documents.items()}
    assert first["warm-start"] < 3.5, "it begins where the donor ended"
    assert first["warm-start"] < first["embeddings"] < first["gpt2"] - 1, "tied embeddings know the letters' shares"
    config = json.loads((recipes_run.at / "warm-start" / "config.json").read_text())
    for key in ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ff", "vocab_size", "context"):
        assert config["model"][key] == trained.config["model"][key]
    new = json.loads((recipes_run.at / "embeddings" / "config.json").read_text())["model"]
    assert (new["n_embd"], new["vocab_size"], new["n_layer"]) == (64, 257, 6)


def test_a_base_stays_as_it_is_and_is_named(recipes_run: Recipes, trained: Trained) -> None:
    for name in ("lora", "lora-of-examples"):
        meta = json.loads((recipes_run.at / name / "meta.json").read_text())
        assert meta["datasets"]["base"]["sha256"] == hashlib.sha256(trained.gguf.read_bytes()).hexdigest()
    config = json.loads((recipes_run.at / "lora-of-examples" / "config.json").read_text())
    assert config["lora"]["alpha"] == 16
    # "What is 39? It is 39." and the end, 22 bytes: the longest example, in eights
    assert config["model"]["context"] == 24
    assert json.loads((recipes_run.at / "lora" / "config.json").read_text())["model"]["context"] == 64


def test_images_give_the_model_its_size(recipes_run: Recipes) -> None:
    model = json.loads((recipes_run.at / "vit-tiny" / "config.json").read_text())["model"]
    assert (model["image_size"], model["patch_size"], model["n_channel"], model["n_class"]) == (28, 4, 1, 10)
    assert (model["context"], model["n_ff"], model["vocab_size"]) == (50, 64, 0)
    dry = Toy(recipes_run.at)("train", "vit-tiny", "--images", DIGITS, "--dry-run", "--json").ok().document
    assert dry["parameters"] == 5_353_738, "ViT-Tiny, for 28 pixels and ten classes"


@pytest.mark.parametrize("name", ["gpt2", "embeddings", "lora", "lora-of-examples", "vit-tiny"])
def test_every_recipe_goes_on_to_the_byte(recipes_run: Recipes, home: dict[str, str], name: str) -> None:
    toy = Toy(recipes_run.at, home)
    document = recipes_run.documents[name]
    middle = recipes_run.at / name / "checkpoints" / "step_2"
    resumed = toy("train", "--resume", middle, "--json", "--no-sample", "--out", f"{name}-on").ok().document
    assert resumed["losses"] == document["losses"][2:]
    assert resumed["resumed_from"] == {"run_id": name, "step": 2}
    assert resumed["val_loss"] == document["val_loss"]
    assert Path(resumed["gguf"]).stat().st_size > 0
    meta = json.loads((recipes_run.at / f"{name}-on" / "meta.json").read_text())
    assert meta["resumed_from"] == resumed["resumed_from"]


@pytest.mark.parametrize("name", ["lora", "lora-of-examples", "vit-tiny", "gpt2"])
def test_the_dry_run_of_every_recipe_knows_the_sizes(recipes_run: Recipes, home: dict[str, str], name: str) -> None:
    toy, made = Toy(recipes_run.at, home), recipes_run.documents[name]
    config = recipes_run.at / name / "config.json"
    plan = toy("train", "--config", config, "--dry-run", "--json").ok().document
    assert (plan["parameters"], plan["total_parameters"]) == (made["parameters"], made["total_parameters"])
    assert plan["config"]["model"] == json.loads(config.read_text())["model"]
    assert f"weights/{Path(made['gguf']).name}" in toy("train", "--config", config, "--dry-run").ok().stdout


def test_a_run_that_was_cut_off_at_its_last_step_is_finished(trained: Trained, toy: Toy) -> None:
    """Its checkpoint is whole, its evaluation and its model are missing."""
    cut = toy.cwd / "cut"
    shutil.copytree(trained.run, cut, symlinks=True)
    lines = (cut / "events.jsonl").read_text().splitlines(keepends=True)
    (cut / "events.jsonl").write_text("".join(line for line in lines if '"run_end"' not in line))
    document = toy("train", "--resume", "cut", "--json", "--no-sample", "--out", "on").ok().document
    assert (document["step"], document["losses"], document["reason"]) == (50, [], "done")
    assert document["val_loss"] == read_events(trained.run)[-1]["val_loss"]
    assert tensors(Path(document["gguf"])) == tensors(trained.gguf)


def tensors(gguf: Path) -> bytes:
    """The weights of a GGUF, without what it says of its run."""
    from toy import _native

    return gguf.read_bytes()[_native.gguf_read(str(gguf))["data_offset"] :]


def test_other_data_is_refused_by_name(trained: Trained, toy: Toy) -> None:
    (toy.cwd / "other.txt").write_text("Something else, and long enough for a sequence. " * 400)
    result = toy("train", "--resume", trained.run, "--steps", 60, "--corpus", "other.txt", "--out", "run")
    assert result.code == 2
    assert "corpus" in result.stderr.splitlines()[-2]
    assert not (toy.cwd / "run").exists()


def test_stop_after_saves_and_says_how_to_go_on(toy: Toy) -> None:
    result = toy("train", *TINY, "--steps", 1_000_000, "--stop-after", "1s", "--out", "run", "--json")
    assert result.code == 130
    document = result.document
    assert document["reason"] == "stop_after"
    assert document["error"]["kind"] == "interrupted"
    assert "run.stop_after" in document["error"]["message"]
    assert "--resume" in document["error"]["hint"]
    assert (Path(document["checkpoint"]) / "DONE").is_file()
    assert Path(document["checkpoint"]).name == f"step_{document['step']}"
    assert Path(document["gguf"]).is_file()


def test_the_shipped_presets_of_other_recipes_start(toy: Toy) -> None:
    few = ("--steps", 1, "--no-sample", *sets(eval__batches=1))
    nano = toy("train", "--preset", "nanogpt-char", "--corpus", EXCERPT, *few, "--json").ok().document
    assert (nano["recipe"], nano["arch"]) == ("from-scratch", "gpt2")
    vit = toy("train", "--preset", "vit-mnist", "--images", DIGITS, *few, "--json").ok().document
    assert (vit["recipe"], vit["arch"]) == ("vit-tiny", "vit")
