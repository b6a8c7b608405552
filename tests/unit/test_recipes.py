"""The matrix, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy import recipes
from toy.errors import ToyError

CPU = ("from-scratch", "llama", "cpu")


def test_there_is_one_row_a_combination() -> None:
    keys = [(row.recipe, row.arch, row.device) for row in recipes.MATRIX]
    assert len(keys) == len(set(keys))
    for row in recipes.MATRIX:
        assert row.recipe in recipes.RECIPES
        assert row.arch in recipes.ARCHS
        assert row.device in recipes.DEVICES
        assert recipes.RUNNERS[row.target] == row.device


def test_what_can_be_trained_now() -> None:
    assert recipes.select(*CPU).target == "toy-train"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lora", "llama", "cpu"), "recipe lora"),
        (("warm-start", "llama", "cpu"), "recipe warm-start"),
        (("vit-tiny", "vit", "cpu"), "recipe vit-tiny"),
        (("from-scratch", "gpt2", "cpu"), "gpt2"),
    ],
)
def test_known_words_that_are_not_there_yet(words: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ToyError) as caught:
        recipes.select(*words)
    assert caught.value.kind == "not_available"
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("from-scrach", "llama", "cpu"), "from-scratch"),
        (("from-scratch", "lama", "cpu"), "llama"),
        (("from-scratch", "llama", "CPU"), "cpu"),
        (("from-scratch", "llama", "vulcan"), "vulkan"),
    ],
)
def test_unknown_words_name_the_nearest(words: tuple[str, str, str], near: str) -> None:
    keys = ["run.recipe", "run.arch", "run.device"]
    with pytest.raises(ToyError) as caught:
        recipes.check_words(*words, dict.fromkeys(keys, "--x"), keys)
    assert caught.value.kind == "bad_flag"
    assert f"did you mean {near}?" in caught.value.hint
    with pytest.raises(ToyError) as caught:
        recipes.check_words(*words, dict.fromkeys(keys, "toy.yml:3"))
    assert caught.value.kind == "bad_config"
    assert "toy.yml:3" in caught.value.message


def test_metal_off_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(ToyError, match="metal needs macOS"):
        recipes.select("from-scratch", "llama", "metal")


def test_cuda_without_and_with_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipes, "cuda_toolkit", lambda: None)
    with pytest.raises(ToyError, match="cuda needs NVIDIA's toolkit") as caught:
        recipes.select("from-scratch", "llama", "cuda")
    assert caught.value.kind == "not_available"
    monkeypatch.undo()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert recipes.cuda_toolkit() == tmp_path / "bin" / "nvcc"


@pytest.mark.parametrize(("flag", "home"), [("--rank", "lora"), ("--images", "vit-tiny"), ("--init", "warm-start")])
def test_a_flag_of_another_recipe(flag: str, home: str) -> None:
    with pytest.raises(ToyError) as caught:
        recipes.check_flags("from-scratch", ["--steps", flag])
    assert caught.value.kind == "bad_flag"
    assert flag in caught.value.message
    assert home in caught.value.message


def test_a_type_that_the_runner_does_not_compute_in() -> None:
    row = recipes.select(*CPU)
    recipes.check_knobs(row, "f32")
    if "bf16" not in row.dtypes:
        with pytest.raises(ToyError, match="bf16"):
            recipes.check_knobs(row, "bf16", "--set")


def test_availability_lists_everything_with_reasons() -> None:
    rows = recipes.availability()
    assert any(row["available"] for row in rows)
    assert all(row["available"] or row["reason"] for row in rows)


def test_no_recipe_starts_from_a_gguf_yet() -> None:
    assert recipes.accepts("llama", ["F32"]) == []
    assert recipes.accepts("nonsense") == []
