"""The matrix, and what it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT

from toy import cuda, devices, recipes
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


@pytest.mark.parametrize(
    ("recipe", "arch", "target"),
    [
        ("from-scratch", "llama", "toy-train"),
        ("from-scratch", "gpt2", "toy-train-gpt2"),
        ("warm-start", "llama", "toy-train"),
        ("warm-start", "gpt2", "toy-train-gpt2"),
        ("lora", "llama", "toy-train-lora"),
        ("vit-tiny", "vit", "toy-train-vit"),
    ],
)
def test_what_can_be_trained_now(recipe: str, arch: str, target: str) -> None:
    row = recipes.select(recipe, arch, "cpu")
    assert row.target == target
    assert row.arch in recipes.INFER
    assert row.arch in recipes.EVAL


def test_every_runner_has_a_source_and_a_line_in_the_build() -> None:
    lines = (ROOT / "CMakeLists.txt").read_text()
    for name, device in recipes.RUNNERS.items():
        family = name.removesuffix(f"-{device}")
        assert (ROOT / "native" / "runners" / f"{family}.cpp").is_file()
        assert (ROOT / "native" / "engine" / "devices" / f"{device}.cpp").is_file()
        assert re.search(rf"add_toy_runner\({family} .*SOURCES native/runners/{family}\.cpp\)", lines)
    assert {row.target for row in recipes.MATRIX} | set(recipes.INFER.values()) <= set(recipes.RUNNERS)


@pytest.mark.parametrize("device", ["vulkan"])
def test_a_device_has_runners_of_its_own_for_every_recipe(device: str) -> None:
    for row in recipes.MATRIX:
        if row.device == "cpu":
            twin = next(
                other
                for other in recipes.MATRIX
                if (other.recipe, other.arch, other.device) == (row.recipe, row.arch, device)
            )
            assert twin.target == f"{row.target}-{device}"
            assert (twin.env, twin.needs, twin.gguf_types) == (row.env, row.needs, row.gguf_types)
            with pytest.raises(ToyError, match=f"cannot be trained on {device}"):
                recipes.check_knobs(twin, "bf16")


GPU, SOFTWARE = devices.Device("GeForce", is_gpu=True), devices.Device("llvmpipe", is_gpu=False)


@pytest.fixture
def with_vulkan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine with these devices and all that Vulkan's runners are built with."""

    def have(*found: devices.Device, visible: str | None = None) -> None:
        monkeypatch.setattr(devices, "vulkan_devices", lambda: found)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
        for header in ("vulkan/vulkan.hpp", "spirv/unified1/spirv.hpp"):
            (tmp_path / "include" / header).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "include" / header).touch()
        monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
        monkeypatch.delenv(devices.VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(devices.VISIBLE, visible)

    return have


def test_vulkan_says_what_it_lacks(with_vulkan: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    with_vulkan(GPU)
    assert recipes.select("from-scratch", "llama", "vulkan").target == "toy-train-vulkan"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "glslc" in recipes.device_reason("vulkan")
    with_vulkan()
    assert "finds no device" in recipes.device_reason("vulkan")
    with_vulkan(SOFTWARE)
    assert "only llvmpipe, which is software" in recipes.device_reason("vulkan")
    with_vulkan(SOFTWARE, visible="0")
    assert recipes.device_reason("vulkan") == ""
    with_vulkan(SOFTWARE, visible="1")
    assert f"{devices.VISIBLE}=1 names no device" in recipes.device_reason("vulkan")
    monkeypatch.setattr(devices, "vulkan_devices", lambda: None)
    with pytest.raises(ToyError, match="no libvulkan") as caught:
        recipes.select("vit-tiny", "vit", "vulkan")
    assert caught.value.kind == "not_available"
    assert "apt install" in caught.value.hint


def test_auto_takes_the_best_device_that_can(with_vulkan: Callable[..., None]) -> None:
    with_vulkan(GPU)
    assert recipes.auto_device("from-scratch", "f32")[0] == "vulkan"
    device, reason = recipes.auto_device("from-scratch", "bf16")
    assert device == "cpu"
    assert "vulkan does not train in bf16" in reason
    with_vulkan(SOFTWARE, visible="0")
    device, reason = recipes.auto_device("lora", "f32")
    assert device == "cpu"
    assert "llvmpipe" in reason
    with_vulkan(SOFTWARE, GPU, visible="1")
    assert recipes.auto_device("vit-tiny", "f32")[0] == "vulkan"


def test_every_cell_is_there_or_has_its_reason() -> None:
    rows = {(row.recipe, row.arch) for row in recipes.MATRIX}
    for recipe in recipes.RECIPES:
        for arch in recipes.ARCHS:
            assert ((recipe, arch) in rows) != ((recipe, arch) in recipes.NONSENSE)


@pytest.mark.parametrize("words", recipes.NONSENSE)
def test_what_makes_no_sense_says_why(words: tuple[str, str]) -> None:
    with pytest.raises(ToyError) as caught:
        recipes.select(*words, "cpu")
    assert caught.value.kind == "not_available"
    assert f"{words[0]} cannot train {words[1]}: " in caught.value.message
    assert caught.value.hint


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
    monkeypatch.setattr(cuda, "_driver", lambda: (13000, (("GPU", 90),)))
    with monkeypatch.context() as without:
        without.setattr(cuda, "toolkit", lambda: None)
        with pytest.raises(ToyError, match="cuda needs NVIDIA's toolkit") as caught:
            recipes.select("from-scratch", "llama", "cuda")
    assert caught.value.kind == "not_available"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "include/cublas_v2.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "wheels", list)
    found = cuda.toolkit()
    assert found is not None
    assert found.nvcc == tmp_path / "bin" / "nvcc"
    assert "cuda needs libcudart, which is neither with" in recipes.device_reason("cuda")
    # a library under its number only, as in the wheels
    (tmp_path / "lib").mkdir()
    for name in cuda.LIBRARIES:
        (tmp_path / "lib" / f"lib{name}.so.13").touch()
    options = cuda.cmake_options(tmp_path / "links")
    assert f"-DCUDA_cublas_LIBRARY={tmp_path / 'links' / 'libcublas.so'}" in options
    for name in ("libcublas.so", "libcublas.so.13"):  # to link with, and to start with
        assert (tmp_path / "links" / name).resolve() == tmp_path / "lib" / "libcublas.so.13"
    for driver, said in (
        (None, "there is no libcuda"),
        ((13000, ()), "cuda finds no GPU"),
        ((12080, (("GPU", 90),)), "the driver is too old: it has CUDA 12.8"),
        ((13000, (("GPU", 90),)), ""),
    ):
        monkeypatch.setattr(cuda, "_driver", lambda driver=driver: driver)
        monkeypatch.setattr(cuda, "compiler_version", lambda nvcc: 13050)
        assert said in recipes.device_reason("cuda")
    assert recipes.device_reason("cuda") == ""
    row = recipes.select("from-scratch", "llama", "cuda")
    assert row.target == "toy-train-cuda"
    for capability, dtype in ((75, "f32"), (80, "bf16"), (90, "bf16")):
        monkeypatch.setattr(cuda, "_driver", lambda capability=capability: (13050, (("GPU", capability),)))
        assert recipes.default_dtype(row) == dtype
        assert f"trains in {dtype}" in cuda.about()
    assert recipes.default_dtype(replace(row, device="cpu")) == "f32"


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
    recipes.check_knobs(row, "bf16")
    with pytest.raises(ToyError, match="bf16"):
        recipes.check_knobs(replace(row, dtypes=("f32",)), "bf16", "--set")


def test_availability_lists_everything_with_reasons() -> None:
    rows = recipes.availability()
    assert any(row["available"] for row in rows)
    assert all(row["available"] or row["reason"] for row in rows)


@pytest.mark.parametrize(
    ("architecture", "types", "kind", "found"),
    [
        ("llama", ["F32"], "model", ["warm-start", "lora"]),
        ("llama", ["Q4_K", "Q6_K", "F32"], "model", ["warm-start", "lora"]),
        ("llama", ["IQ2_XS", "F32"], "model", ["warm-start"]),
        ("qwen2", ["Q8_0", "F32"], "model", ["lora"]),
        ("gpt2", ["F16", "F32"], "model", ["warm-start"]),
        ("vit", ["F32"], "model", []),
        ("llama", ["F32"], "adapter", []),
        ("llama", [], "model", []),
        ("nonsense", ["F32"], "model", []),
    ],
)
def test_what_starts_from_a_gguf(architecture: str, types: list[str], kind: str, found: list[str]) -> None:
    assert recipes.accepts(architecture, types, kind) == found


def test_a_donor_brings_its_architecture() -> None:
    assert recipes.any_row("warm-start", "llama", "cpu", asked=False).recipe == "warm-start"
    with pytest.raises(ToyError, match="warm-start cannot train vit"):
        recipes.any_row("warm-start", "vit", "cpu", asked=True)
