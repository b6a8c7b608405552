"""Adapters merged into their base: the numbers, what does not fit, lora runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from gguf_files import types_of, write_adapter
from harness import ROOT, Toy, fails

from toy.models import cards, convert

sys.path.insert(0, str(ROOT / "prep"))
import hf_to_gguf

sys.path.pop(0)

Array = np.ndarray[Any, Any]


TARGETS = {"blk.0.attn_q.weight": (32, 32), "blk.1.attn_v.weight": (16, 32), "blk.1.ffn_down.weight": (32, 64)}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_merge_adds_the_product(model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    base, adapter, out = model(kind=kind), tmp_path / "a.gguf", tmp_path / "out.gguf"
    deltas = write_adapter(adapter, TARGETS)
    convert.merge(base, adapter, out, "f32")
    before, after = gguf_files.read(base), gguf_files.read(out)
    for name, values in before.items():
        if name in deltas:
            assert np.abs(after[name] - (values + deltas[name])).max() < 2e-6 * np.abs(after[name]).max(), name
        else:
            assert after[name].tobytes() == values.tobytes(), name

    same = tmp_path / "same.gguf"
    convert.merge(base, adapter, same)
    assert types_of(same) == types_of(base)
    metadata = cards.read(same).metadata
    assert (metadata["general.name"], metadata["toy.run_id"], metadata["toy.note"]) == ("Tiny", "a-run", "kept")
    assert metadata["general.architecture"] == "llama"
    assert "adapter.type" not in metadata
    own = gguf_files.read(same)
    for name, values in after.items():
        if name not in deltas:
            assert own[name].tobytes() == values.tobytes(), name
        else:  # rounded once, from the merged value: no further off than the width of a step
            error = np.abs(own[name] - values).max() / np.abs(values).max()
            assert error <= {"F32": 0, "F16": 1 / 2048, "Q8_0": 1 / 250, "Q4_1": 1 / 14}[kind], name


#: Dies in the middle of writing, when the progress bar moves.
KILLED = """
import os, signal, sys
from pathlib import Path
from toy.models import convert
base, adapter, out = map(Path, sys.argv[1:])
convert.merge(base, adapter, out, "f32", progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
def test_a_killed_merge_leaves_nothing(model: Callable[..., Path], tmp_path: Path, is_there: bool) -> None:
    write_adapter(tmp_path / "a.gguf", TARGETS)
    folder = tmp_path / "out"
    folder.mkdir()
    if is_there:
        (folder / "m.gguf").write_bytes(b"before")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = [sys.executable, "-c", KILLED, model(), tmp_path / "a.gguf", folder / "m.gguf"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    convert.merge(model(), tmp_path / "a.gguf", folder / "m.gguf", "f32")
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]
    assert types_of(folder / "m.gguf")


def test_merging_embeddings_as_llama_cpp_keeps_them(model: Callable[..., Path], tmp_path: Path) -> None:
    """They are looked up, so A is [tokens, rank] and B [width, rank]."""
    random = np.random.RandomState(1)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((320, 2), (32, 2)))
    tensors = {"token_embd.weight.lora_a": ("F32", a), "token_embd.weight.lora_b": ("F32", b)}
    keys = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0,
    }
    gguf_files.write(tmp_path / "a.gguf", keys, tensors)
    convert.merge(model(), tmp_path / "a.gguf", tmp_path / "out.gguf")
    before, after = (gguf_files.read(path)["token_embd.weight"] for path in (model(), tmp_path / "out.gguf"))
    assert np.abs(after - (before + a @ b.T)).max() < 1e-5


@pytest.mark.parametrize(
    ("targets", "more", "said"),
    [
        ({"blk.7.attn_q.weight": (32, 32)}, {}, "adapts blk.7.attn_q.weight, which"),
        ({"blk.0.attn_q.weight": (32, 48)}, {}, "blk.0.attn_q.weight is 48 x 4 by 4 x 32"),
        (TARGETS, {"general.architecture": "gpt2"}, "is for architecture gpt2"),
        (TARGETS, {"general.type": "model"}, "is no adapter"),
        (TARGETS, {"adapter.type": "control_vector"}, "is an adapter of kind 'control_vector'"),
        (TARGETS, {"adapter.alora.invocation_tokens": [1, 2]}, "that certain tokens switch on"),
        ({}, {}, "holds no tensors"),
        (TARGETS, {"toy.lora.base_sha256": "0" * 64}, "was trained over another file than"),
    ],
)
def test_adapters_that_do_not_fit(
    model: Callable[..., Path],
    tmp_path: Path,
    targets: dict[str, tuple[int, int]],
    more: dict[str, Any],
    said: str,
) -> None:
    adapter = tmp_path / "a.gguf"
    write_adapter(adapter, targets, more=more)
    assert said in fails("bad_file", convert.merge, model(), adapter, tmp_path / "new" / "folder" / "out.gguf")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_half_an_adapter(model: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    ones = np.ones((4, 32), dtype=np.float32)
    for part, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        gguf_files.write(tmp_path / "a.gguf", keys, {f"blk.0.attn_q.weight.{part}": ("F32", ones)})
        message = fails("bad_file", convert.merge, model(), tmp_path / "a.gguf", tmp_path / "out.gguf")
        assert f"has no blk.0.attn_q.weight.{other}" in message
    gguf_files.write(tmp_path / "a.gguf", keys, {"blk.0.attn_norm.weight": ("F32", ones[0])})
    message = fails("bad_file", convert.merge, model(), tmp_path / "a.gguf", tmp_path / "out.gguf")
    assert "blk.0.attn_norm.weight, which is no part of a LoRA" in message


def test_merge_command(model: Callable[..., Path], cold_toy: Toy) -> None:
    adapter, base = cold_toy.cwd / "a.gguf", model()
    write_adapter(adapter, TARGETS)
    answer = cold_toy("merge", base, adapter, "out.gguf", "--type", "q8_0", "--json").ok().document
    assert answer["format"] == "toy/merge-v1"
    assert (answer["tensors_changed"], answer["type"]) == (3, "q8_0")
    assert answer["size"] == (cold_toy.cwd / "out.gguf").stat().st_size
    result = cold_toy("merge", base, adapter, "out.gguf")
    assert (result.code, result.stderr.splitlines()[0]) == (2, "error: out.gguf is there already")
    result = cold_toy("merge", adapter, base, "x.gguf", "--json")
    assert (result.code, result.document["error"]["kind"]) == (2, "bad_file")
    assert cold_toy("merge", base, adapter, "x.gguf", "--type", "q9").code == 2
    result = cold_toy("export", adapter, "--to", "hf")
    assert result.code == 2
    assert "is an adapter" in result.stderr
    assert "hint: toy merge BASE ADAPTER OUT" in result.stderr


def lora_run(folder: Path, base: Path, sha256: str | None = None) -> Path:
    """What is read of a lora run: its config.json and its adapter."""
    run = folder / "runs" / "lora-1"
    (run / "weights").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"lora": {"base": str(base)}}), encoding="utf-8")
    (run / "events.jsonl").write_text("")
    write_adapter(run / "weights" / "adapter.gguf", TARGETS, more={"toy.lora.base_sha256": sha256})
    return run


def test_a_lora_run_is_exported_with_its_base(model: Callable[..., Path], cold_toy: Toy) -> None:
    run = lora_run(cold_toy.cwd, model())
    merged = cold_toy("export", run, "--to", "gguf", "--json").ok().document
    assert Path(merged["out"]) == run / "weights" / "merged.gguf"
    cold_toy("merge", model(), run, "by-hand.gguf").ok()
    assert (cold_toy.cwd / "by-hand.gguf").read_bytes() == Path(merged["out"]).read_bytes()

    cold_toy("export", run, "--to", "hf", "--out", "hf").ok()
    back = cold_toy.cwd / "back.gguf"
    hf_to_gguf.convert_folder(cold_toy.cwd / "hf", back)
    ours, theirs = gguf_files.read(Path(merged["out"])), gguf_files.read(back)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)

    cold_toy("export", run, "--to", "ollama", "--out", "apart").ok()
    assert sorted(os.listdir(cold_toy.cwd / "apart")) == ["Modelfile", "adapter.gguf", "model.gguf"]
    assert "ADAPTER ./adapter.gguf\n" in (cold_toy.cwd / "apart" / "Modelfile").read_text()
    cold_toy("export", run, "--to", "ollama", "--type", "q8_0", "--out", "joined").ok()
    assert sorted(os.listdir(cold_toy.cwd / "joined")) == ["Modelfile", "model.gguf"]


def test_a_base_that_is_gone(model: Callable[..., Path], cold_toy: Toy) -> None:
    lora_run(cold_toy.cwd, cold_toy.cwd / "gone.gguf")
    result = cold_toy("export", "runs/lora-1", "--to", "hf")
    assert result.code == 2
    assert "gone.gguf" in result.stderr
