"""Every recipe, and an answer, on a device whose kernels are CUDA's, run by the CPU: what it has it computes, the
scheduler leaves the rest to the CPU. Driver, streams, CUDA graphs and cuBLAS are not in it."""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT, read_events
from killing import JOBS, new_folder

from toy import builds

GATES = ROOT / "data" / "gates"
#: How far a loss may be from the CPU's, relative to it. In bf16 a sum of another order may be rounded another way.
FAR = {"f32": 1e-5, "bf16": 2e-3}
#: f32 and bf16 differ in products and attention; what a family has besides is in either.
RUNS = [
    ("llama", "f32"),
    ("llama", "bf16"),
    ("gpt2", "bf16"),
    ("warm-start", "f32"),
    ("lora", "bf16"),
    ("vit-tiny", "f32"),
]
STEPS = 2


def begin(name: str, device: str, dtype: str, folder: Path) -> dict[str, str]:
    """The environment of steps of two micro-batches each, with one evaluation."""
    job = JOBS[name]
    sections = {section: dict(knobs) for section, knobs in job.sections.items()}
    sections["run"] = {"device": device}
    sections["train"] = sections.get("train", {}) | {"batch": 2, "micro_batch": 1, "dtype": dtype, "warmup_steps": 0}
    sections["eval"] = {"every": 0, "batches": 1, "patience": 0}
    job = replace(job, sections=sections)
    return os.environ | job.environment(folder / "run", job.files(new_folder(folder / "data")), STEPS)


def train(name: str, device: str, dtype: str, runner: Path, folder: Path) -> dict[str, list[float]]:
    """Losses of the steps and of the evaluation, and norms of the gradients, whose size a step of AdamW hides."""
    environment = begin(name, device, dtype, folder)
    done = subprocess.run([runner], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        "loss": [float(line.split("loss=")[1]) for line in done.stdout.splitlines()],
        "val_loss": [event["val_loss"] for event in read_events(folder / "run", "eval")],
        "grad_norm": [event["grad_norm"] for event in read_events(folder / "run", "step")],
    }


def emulated(name: str) -> Path:
    runner = builds.find_root().folder("native") / f"{name}-cuda-on-cpu"
    if not runner.is_file():
        pytest.skip("the native tests are not built: cmake -DTOY_TESTS=ON")
    return runner


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_a_recipe_learns_what_the_cpu_learns(built: None, name: str, dtype: str, tmp_path: Path) -> None:
    runner = emulated(JOBS[name].runner)
    want = train(name, "cpu", dtype, builds.find_root().runner(JOBS[name].runner), tmp_path / "cpu")
    got = train(name, "cuda", dtype, runner, tmp_path / "cuda")
    assert len(want["loss"]) == len(want["grad_norm"]) == STEPS
    assert len(want["val_loss"]) > 0
    for what, values in want.items():
        assert got[what] == pytest.approx(values, rel=FAR[dtype]), what


def test_an_answer_is_that_of_the_cpu(built: None, tmp_path: Path) -> None:
    """A prompt in one batch, then tokens one by one, until the graph that they share has read all it can, and on."""
    prompt = tmp_path / "prompt"
    prompt.write_bytes(struct.pack("<40i", *(7 * k % 60 + 1 for k in range(40))))
    environment = os.environ | {
        "GGUF": str(GATES / "shakespeare-mixed.gguf"), "PROMPT_TOKENS": str(prompt), "N_PREDICT": "240",
        "CONTEXT": "300", "LOGPROBS": "1",
    }  # fmt: skip
    answers = []
    for runner in (builds.find_root().runner("toy-infer"), emulated("toy-infer")):
        done = subprocess.run([runner], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.append([line.split() for line in done.stdout.splitlines()])
    want, got = answers
    assert len(want) == 240
    assert [line[1] for line in got] == [line[1] for line in want]
    likely = [[float(line[2].split(":")[1]) for line in answer] for answer in answers]
    assert likely[1] == pytest.approx(likely[0], abs=1e-4)


def test_scratch_memory_that_a_device_lacks_is_said(built: None, tmp_path: Path) -> None:
    """What kernels work in is taken while a step is computed."""
    environment = begin("llama", "cuda", "f32", tmp_path) | {"CUDA_ON_CPU_SCRATCH": "100"}
    done = subprocess.run([emulated("toy-train")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [error, hint, kind] = done.stderr.splitlines()[-3:]
    assert error == "error: the cuda device is out of memory: no scratch memory; 1.00 of 1.00 GiB are free"
    assert all(knob in hint for knob in ("train.micro_batch", "model.context", "model.n_embd"))
    assert kind == "kind: oom"
    assert read_events(tmp_path / "run", "run_end")[0]["error"]["kind"] == "oom"
