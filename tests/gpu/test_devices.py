"""Every recipe on every other device that is here, Mesa's software device too: the cpu's losses, to the byte again."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gates import GATES, NAMES, ON_DEVICE, circumstances
from harness import EXCERPT, ROOT, TINY, Toy, read_events, sets
from killing import JOBS, new_folder

from toy import builds, cuda, devices, recipes

#: A device made of software has to be named.
VISIBLE = {devices.VISIBLE: os.environ.get(devices.VISIBLE, "0")}
#: Devices that have to be here: CI is not to pass because a driver is missing.
NEEDED = os.environ.get("TOY_TEST_DEVICES", "").split(",")
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
    "llama-offload": ((*TINY, *SMALL, *sets(train__offload=True)), 1e-4),
    "gpt2": ((*TINY, "--arch", "gpt2", *SMALL_GPT2), 1e-4),
    "warm-start": (("warm-start", "--corpus", EXCERPT, "--model", "donor"), 1e-4),
    "lora": (("lora", "--corpus", EXCERPT, "--model", MIXED, "--rank", 4, *sets(model__context=24)), 2e-3),
    "lora-dropout": (("lora", "--corpus", EXCERPT, "--model", "donor", *sets(lora__dropout=0.1)), 1e-4),
    "vit-tiny": (("vit-tiny", "--images", ROOT / "data" / "digits", *SMALL_VIT), 1e-4),
}
LIBRARIES = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
#: In f32, whatever a device trains in unless it is told.
FEW = (
    "--steps", 6, "--threads", 2, "--no-sample", "--json",
    *sets(eval__every=3, checkpoint__every=3, train__dtype="f32"),
)  # fmt: skip


@dataclass
class Place:
    """A folder with a model to start from, and a device whose runners are built: minutes the first time."""

    toy: Toy
    device: str

    def train(self, *args: object, on: str = "", out: str) -> Any:
        return self.toy("train", *args, "--device", on or self.device, "--out", out)


@pytest.fixture(scope="session", params=dict.fromkeys(row.device for row in recipes.MATRIX if row.device != "cpu"))
def place(
    request: pytest.FixtureRequest, home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    device: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(devices.VISIBLE, VISIBLE[devices.VISIBLE])
        if reason := recipes.device_reason(device):
            (pytest.fail if device in NEEDED else pytest.skip)(reason)
        toy = Toy(tmp_path_factory.mktemp(device), home | VISIBLE)
        toy("install", "--device", device, timeout=1800).ok()
        toy("train", *TINY, *SMALL, "--steps", 2, "--out", "donor").ok()
        yield Place(toy, device)


def weights(document: dict[str, Any]) -> bytes:
    from toy import _native

    path = Path(document["gguf"])
    return path.read_bytes()[_native.gguf_read(str(path))["data_offset"] :]


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_learns_what_the_cpu_learns(place: Place, name: str) -> None:
    flags, far = CASES[name]
    cpu = place.train(*flags, *FEW, on="cpu", out=f"{name}-cpu").ok().document
    result = place.train(*flags, *FEW, out=f"{name}-1").ok()
    if place.device == "vulkan":
        assert "lacks operations" not in result.stderr
    first = result.document
    want, got = [float(x) for x in cpu["losses"]], [float(x) for x in first["losses"]]
    assert first["device"] == place.device
    assert len(want) == len(got) == 6
    assert got == pytest.approx(want, rel=far)
    assert first["val_loss"] == pytest.approx(cpu["val_loss"], rel=far)
    # whose size a step of AdamW hides
    norms = [[event["grad_norm"] for event in read_events(Path(run["run_dir"]), "step")] for run in (cpu, first)]
    assert norms[1] == pytest.approx(norms[0], rel=far)
    assert got[0] != got[-1]
    # killed or not, a run goes on to the byte; and so it is the same from run to run
    middle = Path(first["run_dir"]) / "checkpoints" / "step_3"
    on = place.toy("train", "--resume", middle, "--no-sample", "--json", "--out", f"{name}-on").ok().document
    assert on["device"] == place.device
    assert on["losses"] == first["losses"][3:]
    assert on["val_loss"] == first["val_loss"]
    assert weights(on) == weights(first)
    if name in ("lora-dropout", "vit-tiny"):  # an adapter, and classes
        scored = [
            place.toy("eval", first["run_dir"], "--json", "--device", device).ok().document
            for device in ("cpu", place.device)
        ]
        assert scored[1]["loss"] == pytest.approx(scored[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_of_the_device(place: Place, name: str) -> None:
    """What was recorded on a device like this one, to the byte: as many steps as the gate has lines."""
    record = f"python tests/gates.py --device {place.device}"
    folder = GATES / place.device
    if not (folder / f"{name}.txt").is_file():
        pytest.skip(f"no gate of {place.device} is recorded: {record}")
    of, here = (folder / "device").read_text().strip(), circumstances(place.device)
    if of != here:
        pytest.skip(f"the gates of {place.device} were recorded on {of}, and this is {here}")
    gate = folder / f"{name}.txt"
    steps = len(gate.read_text().splitlines())
    more = ("--no-sample", "--steps", steps, *ON_DEVICE)
    place.train("--config", GATES / f"{name}.yml", *more, out=f"gate-{name}").ok()
    result = place.toy("gate", "check", f"gate-{name}", gate)
    assert result.code == 0, f"{result.stdout}{result.stderr}if it is meant: {record} --steps {steps} {name}"


def test_a_run_moves_to_another_device(place: Place) -> None:
    begun = place.train(*TINY, *SMALL, *FEW, out="moved-1").ok().document
    middle = Path(begun["run_dir"]) / "checkpoints" / "step_3"
    moved = place.toy("train", "--resume", middle, "--device", "cpu", "--no-sample", "--json", "--out", "moved-2").ok()
    assert moved.document["device"] == "cpu"
    rest = [float(x) for x in begun["losses"][3:]]
    assert [float(x) for x in moved.document["losses"]] == pytest.approx(rest, rel=1e-4)


def test_answers_are_those_of_the_cpu(place: Place) -> None:
    words = ("--prompt", "First ", "--n", 12, "--temperature", 0, "--logprobs", 2, "--json")
    for model in ("donor", MIXED):
        made = [place.toy("infer", model, *words, "--device", device).ok().document for device in ("cpu", place.device)]
        assert len(made[1]["ids"]) == 12
        want, got = ([answer["logprobs"][0][k]["logprob"] for k in (0, 1)] for answer in made)
        # with quantised weights either rounds what they are multiplied with, each in its own way
        assert got == pytest.approx(want, abs=1e-4 if model == "donor" else 0.05)
        if model == "donor":
            assert made[0]["ids"] == made[1]["ids"]


def test_a_long_answer_is_that_of_the_cpu(place: Place) -> None:
    """Of a prompt that goes through in two batches, over slots for which a device takes several graphs."""
    prompt = ",".join(str(7 * k % 60 + 1) for k in range(600))
    words = ("--prompt-ids", prompt, "--n", 200, "--context", 1024, "--temperature", 0, "--logprobs", 2, "--json")
    want, got = (
        place.toy("infer", MIXED, *words, "--device", device).ok().document for device in ("cpu", place.device)
    )
    assert len(want["ids"]) == len(got["ids"]) == 200
    differ = [k for k, (a, b) in enumerate(zip(want["ids"], got["ids"], strict=True)) if a != b]
    first, second = (answer["logprob"] for answer in want["logprobs"][differ[0] if differ else -1])
    assert not differ or first - second < 0.1  # as likely, but for the rounding of quantised products


def test_operations_are_those_of_the_cpu(place: Place) -> None:
    """Those that toy adds to ggml, each against the cpu and twice: native/tests/devices."""
    if place.device == "metal":
        pytest.skip("metal leaves them to the cpu")
    cmake = builds.wheel_tool("cmake")
    folder, target = ROOT / "build" / f"native-{place.device}", f"test-device-{place.device}"

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(list(map(str, command)), env=os.environ, capture_output=True, text=True, check=False)

    for command in (
        [cmake, "-S", ROOT, "-B", folder, "-DTOY_TESTS=ON"],
        [cmake, "--build", folder, "--target", target],
        [folder / target],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def sanitizer() -> Path | None:
    toolkit = cuda.toolkit()
    places = [folder / "bin" / "compute-sanitizer" for folder in toolkit.folders] if toolkit else []
    found = shutil.which("compute-sanitizer")
    return next((path for path in places if path.is_file()), Path(found) if found else None)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_sanitizer_finds_nothing(place: Place, tmp_path: Path, dtype: str, tool: str) -> None:
    """A few steps of the bench's shape S and an evaluation, in micro-batches; without the command line, which keeps
    from the runner what the tool puts into its environment."""
    if place.device != "cuda":
        pytest.skip("compute-sanitizer is CUDA's")
    if (program := sanitizer()) is None:
        pytest.skip("no compute-sanitizer: pip install 'cuda-toolkit[sanitizer]'")
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_head_kv": 4, "n_ff": 172, "context": 64}
    train = {"batch": 4, "micro_batch": 2, "dtype": dtype}
    job = replace(JOBS["llama"], sections={"run": {"device": "cuda"}, "model": shape, "train": train})
    environment = job.environment(tmp_path / "run", job.files(new_folder(tmp_path / "data")), 6)
    runner = builds.find_root().runner("toy-train-cuda")
    command = [program, "--tool", tool, "--error-exitcode", "9", runner]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith("step ")]) == 6


def test_what_the_device_lacks_is_said_once(place: Place) -> None:
    told = place.train(*CASES["lora-dropout"][0], "--steps", 3, "--no-sample", out="told").ok()
    assert len(told.steps) == 3
    notes = [line for line in told.stderr.splitlines() if "lacks operations" in line]
    assert len(notes) == (1 if place.device == "metal" else 0)
    if place.device == "vulkan":
        meta = json.loads((place.toy.cwd / "told" / "meta.json").read_text())
        assert meta["gpu"] == devices.vulkan_usable()[0].name


def test_a_device_out_of_memory_says_how_much_is_needed(place: Place) -> None:
    if place.device != "vulkan" or devices.vulkan_usable()[0].is_gpu:
        pytest.skip("only a device made of software has memory that can be limited here")
    large = sets(model__n_embd=512, model__context=512, model__n_layer=30, train__batch=32, train__micro_batch=32)
    result = place.toy(
        "train", *TINY, *large, "--device", place.device, "--out", "large", "--json",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )  # fmt: skip
    assert result.code == 1
    error = result.document["error"]
    assert error["kind"] == "oom"
    assert " GiB" in error["message"]
    assert all(knob in error["hint"] for knob in ("train.micro_batch", "model.context", "model.n_embd"))


def test_the_loss_that_is_not_finite_is_found(place: Place) -> None:
    """The step is walked again, one operation after the other, whichever device it is on."""
    # the weights grow ninefold at each step: lr * weight_decay = 10
    wild = sets(
        train__learning_rate=10, train__min_learning_rate=10, train__weight_decay=1, train__grad_clip=0,
        train__warmup_steps=0,
    )  # fmt: skip
    result = place.train(*TINY, *SMALL, *wild, "--steps", 200, "--json", out="wild")
    assert result.code == 1
    error = result.document["error"]
    assert error["kind"] == "non_finite"
    assert "first bad tensor: " in error["message"]
    assert " at " in error["message"].split("first bad tensor: ")[1], "an operation, and where it is"


def test_a_device_that_is_lost_leaves_the_checkpoints(place: Place, tmp_path: Path) -> None:
    if place.device != "vulkan" or not sys.platform.startswith("linux"):
        pytest.skip("what loses the device is a loader of Vulkan's")
    loader, lost = tmp_path / "libvulkan.so.1", tmp_path / "lost"
    real = next(path for folder in LIBRARIES if (path := Path(folder) / "libvulkan.so.1").exists())
    defines = [f'-DREAL="{real}"', f'-DLOST="{lost}"']
    source = Path(__file__).with_name("lost_device.c")
    subprocess.run(["cc", "-shared", "-fPIC", *defines, "-o", loader, source, "-ldl"], check=True)
    run = place.toy.cwd / "lost"
    words = (
        "--steps",
        100000,
        *sets(checkpoint__every=1, train__warmup_steps=0),
        "--device",
        "vulkan",
        "--no-sample",
        "--out",
        "lost",
    )
    with place.toy.start("train", *TINY, *SMALL, *words, env={"LD_LIBRARY_PATH": str(tmp_path)}) as running:
        until = time.monotonic() + 200
        while not (run / "checkpoints" / "latest").exists():
            assert running.popen.poll() is None, running.popen.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        lost.touch()
        _, stderr = running.popen.communicate(timeout=120)
    assert running.popen.returncode == 1
    assert "error: the vulkan device failed: " in stderr
    end = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (end["kind"], end["error"]["kind"]) == ("run_end", "runner_failed")
    at = (run / "checkpoints" / "latest").resolve().name
    go_on = ("train", "--resume", "lost", "--steps", int(at.removeprefix("step_")) + 2, "--no-sample", "--json")
    assert len(place.toy(*go_on).ok().document["losses"]) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (sets(train__dtype="bf16"), "train.dtype = bf16 cannot be trained on {device} yet"),
        (sets(log__profile=2), "log.profile"),
    ],
)
def test_what_a_device_does_not_do_is_refused(place: Place, flags: list[str], said: str) -> None:
    if "bf16" in flags[-1] and "bf16" in recipes.select("from-scratch", "llama", place.device).dtypes:
        pytest.skip(f"{place.device} has bf16")
    result = place.train(*TINY, *flags, out="refused")
    assert result.code == 2
    assert said.format(device=place.device) in result.stderr
    assert not (place.toy.cwd / "refused").exists()


def test_no_device_of_that_number(place: Place) -> None:
    if place.device != "vulkan":
        pytest.skip("GGML_VK_VISIBLE_DEVICES is Vulkan's")
    result = place.toy("train", *TINY, "--device", "vulkan", "--out", "none", env={devices.VISIBLE: "7"})
    assert result.code == 2
    assert f"{devices.VISIBLE}=7 names no device" in result.stderr
    assert not (place.toy.cwd / "none").exists()


def test_auto_leaves_a_device_of_software_alone(place: Place) -> None:
    result = place.toy("train", *TINY, *SMALL, "--steps", 1, "--device", "auto", "--out", "auto", "--json").ok()
    real = [device.is_gpu for device in devices.vulkan_usable()]
    if place.device == "vulkan" and not any(real) and recipes.device_reason("cuda"):
        assert result.document["device"] == "cpu"
    best = result.document["device"]
    assert json.loads((place.toy.cwd / "auto" / "config.json").read_text())["run"]["device"] == best
    assert f"note: device {best}" in result.stderr
