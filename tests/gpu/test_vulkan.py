"""Every recipe through Vulkan, on Mesa's software device or a real one: the cpu's losses, and the same bytes twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import EXCERPT, ROOT, TINY, Toy, sets

from toy import devices, recipes

#: A device made of software has to be named.
VISIBLE = {devices.VISIBLE: os.environ.get(devices.VISIBLE, "0")}
SMALL = sets(
    model__n_layer=2, model__n_embd=32, model__n_head=4, model__n_head_kv=2, model__n_ff=48, model__context=24,
    train__batch=4, train__micro_batch=2,
)  # fmt: skip
SMALL_GPT2 = sets(
    model__n_layer=2, model__n_embd=32, model__n_head=4, model__context=24, train__batch=4, train__micro_batch=2
)
SMALL_VIT = sets(model__n_layer=2, model__n_embd=32, model__n_head=2, train__batch=4, eval__batches=2)
MIXED = ROOT / "data" / "gates" / "shakespeare-mixed.gguf"
#: Name -> flags, and how far a loss may be from the cpu's, relative to it. With quantised weights the cpu rounds what
#: they are multiplied with.
CASES: dict[str, tuple[tuple[object, ...], float]] = {
    "llama": ((*TINY, *SMALL), 1e-4),
    "gpt2": ((*TINY, "--arch", "gpt2", *SMALL_GPT2), 1e-4),
    "warm-start": (("warm-start", "--corpus", EXCERPT, "--model", "donor"), 1e-4),
    "lora": (("lora", "--corpus", EXCERPT, "--model", MIXED, "--rank", 4, *sets(model__context=24)), 2e-3),
    "lora-dropout": (("lora", "--corpus", EXCERPT, "--model", "donor", *sets(lora__dropout=0.1)), 1e-4),
    "vit-tiny": (("vit-tiny", "--images", ROOT / "data" / "digits", *SMALL_VIT), 1e-4),
}


@pytest.fixture(scope="session")
def vulkan(home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A folder with a model to start from, where the runners for Vulkan are built: minutes the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(devices.VISIBLE, VISIBLE[devices.VISIBLE])
        if reason := recipes.device_reason("vulkan"):
            pytest.skip(reason)
    toy = Toy(tmp_path_factory.mktemp("vulkan"), home | VISIBLE)
    toy("install", "--device", "vulkan", timeout=1800).ok()
    toy("train", *TINY, *SMALL, "--steps", 2, "--out", "donor").ok()
    return toy


def train(toy: Toy, name: str, device: str, out: str, *more: object) -> dict[str, Any]:
    few = ("--steps", 6, "--threads", 2, *sets(eval__every=3, checkpoint__every=3), "--no-sample", "--json")
    done = toy("train", *CASES[name][0], *few, *more, "--device", device, "--out", out).ok()
    return done.document | {"stderr": done.stderr}


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_learns_what_the_cpu_learns(vulkan: Toy, name: str) -> None:
    cpu, first = train(vulkan, name, "cpu", f"{name}-cpu"), train(vulkan, name, "vulkan", f"{name}-1")
    again = train(vulkan, name, "vulkan", f"{name}-2")
    want, got = [float(x) for x in cpu["losses"]], [float(x) for x in first["losses"]]
    assert len(want) == len(got) == 6
    assert got == pytest.approx(want, rel=CASES[name][1])
    assert first["val_loss"] == pytest.approx(cpu["val_loss"], rel=CASES[name][1])
    assert got[0] != got[-1]
    # run to run: losses, evaluation and weights
    assert again["losses"] == first["losses"]
    assert again["val_loss"] == first["val_loss"]
    assert weights(again) == weights(first)
    # killed or not, a run goes on to the byte
    middle = Path(first["run_dir"]) / "checkpoints" / "step_3"
    on = vulkan("train", "--resume", middle, "--no-sample", "--json", "--out", f"{name}-on").ok().document
    assert on["device"] == "vulkan"
    assert on["losses"] == first["losses"][3:]
    assert weights(on) == weights(first)


def weights(document: dict[str, Any]) -> bytes:
    from toy import _native

    path = Path(document["gguf"])
    return path.read_bytes()[_native.gguf_read(str(path))["data_offset"] :]


def test_what_the_device_lacks_is_said_once(vulkan: Toy) -> None:
    words = ("--steps", 3, "--no-sample", "--device", "vulkan", "--out")
    told = vulkan("train", *CASES["lora-dropout"][0], *words, "told").ok()
    notes = [line for line in told.stderr.splitlines() if "lacks operations" in line]
    assert len(notes) == 1
    assert "DROPOUT" in notes[0]
    assert "OUT_PROD" not in notes[0], "products and gradients stay on the device"
    assert len(told.steps) == 3
    whole = vulkan("train", *CASES["llama"][0], *words, "whole").ok()
    assert "lacks operations" not in whole.stderr
    meta = json.loads((vulkan.cwd / "told" / "meta.json").read_text())
    assert meta["gpu"] == devices_of(vulkan)[0]


def devices_of(toy: Toy) -> list[str]:
    return [device.name for device in devices.vulkan_devices() or ()]


def test_the_loss_that_is_not_finite_is_found(vulkan: Toy) -> None:
    """The step is walked again, one operation after the other, whichever device it is on."""
    hot = sets(train__learning_rate=1e20, train__grad_clip=0, train__warmup_steps=0)
    result = vulkan("train", *TINY, *SMALL, *hot, "--steps", 20, "--device", "vulkan", "--out", "hot", "--json")
    assert result.code == 1
    error = result.document["error"]
    assert error["kind"] == "non_finite"
    assert "first bad tensor: " in error["message"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (sets(train__dtype="bf16"), "train.dtype = bf16 cannot be trained on vulkan yet"),
        (sets(log__profile=2), "log.profile"),
    ],
)
def test_what_a_device_does_not_do_is_refused(vulkan: Toy, flags: list[str], said: str) -> None:
    result = vulkan("train", *TINY, *flags, "--device", "vulkan", "--out", "refused")
    assert result.code == 2
    assert said in result.stderr
    assert not (vulkan.cwd / "refused").exists()


def test_no_device_of_that_number(vulkan: Toy) -> None:
    result = vulkan("train", *TINY, "--device", "vulkan", "--out", "none", env={devices.VISIBLE: "7"})
    assert result.code == 2
    assert f"{devices.VISIBLE}=7 names no device" in result.stderr
    assert not (vulkan.cwd / "none").exists()


def test_auto_leaves_a_device_of_software_alone(vulkan: Toy) -> None:
    found = devices.vulkan_devices() or ()
    result = vulkan("train", *TINY, *SMALL, "--steps", 1, "--device", "auto", "--out", "auto", "--json").ok()
    best = "vulkan" if any(device.is_gpu for device in found[:1]) else "cpu"
    assert result.document["device"] == best
    assert json.loads((vulkan.cwd / "auto" / "config.json").read_text())["run"]["device"] == best
    assert f"note: device {best}" in result.stderr
