"""Models in and out: other types, adapters merged, Hugging Face folders written and read again, Modelfiles."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import quants
from gguf_files import RandomModel
from harness import EXCERPT, ROOT, Toy, tree

from toy import _native
from toy.errors import ToyError
from toy.models import cards, convert, hf_export, ollama, spm_json
from toy.models.chat import ChatTemplate
from toy.models.hf_json import read as read_tokenizer_json
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import CONTROL, Vocabulary, from_metadata

sys.path.insert(0, str(ROOT / "prep"))
import hf_to_gguf

sys.path.pop(0)

Array = np.ndarray[Any, Any]

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    text = EXCERPT.read_text(encoding="utf-8")
    made = Tokenizer.from_name("bpe", lambda: [text], 300).vocabulary.padded(320)
    return dataclasses.replace(made, chat_template=CHATML)


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a small GGUF of random weights, once for each shape."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(arch: str = "llama", **shape: Any) -> Path:
        key = json.dumps([arch, shape], sort_keys=True)
        if key not in made:
            path = folder / f"{len(made)}-{arch}.gguf"
            random = RandomModel(arch=arch, vocab_size=320, **shape)
            made[key] = random.write(path, vocabulary.to_metadata() | {"general.name": "Tiny", "toy.note": "kept"})
        return made[key]

    return make


def fails(kind: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """The message of the ToyError that `function` raises; both lines are there."""
    with pytest.raises(ToyError) as caught:
        function(*arguments, **more)
    error = caught.value
    assert error.kind == kind, (error.kind, error.message)
    assert error.hint and "\n" not in error.message + error.hint
    return error.message


def types_of(path: Path) -> dict[str, str]:
    return {tensor["name"]: tensor["type"] for tensor in cards.read(path).tensors}


# --- other types ----------------------------------------------------------------------------------------------------


def test_the_command_line_knows_every_type() -> None:
    assert list(convert.TYPES) == _native.file_types()


def test_the_short_names_are_those_of_the_mixes(model: Callable[..., Path], tmp_path: Path) -> None:
    for short in set(convert.TYPE_NAMES) - set(convert.TYPES):
        convert.convert(model(), tmp_path / "short.gguf", short)
        convert.convert(model(), tmp_path / "long.gguf", f"{short}_m")
        assert (tmp_path / "short.gguf").read_bytes() == (tmp_path / "long.gguf").read_bytes()


def test_own_type_is_the_same_file(model: Callable[..., Path], tmp_path: Path) -> None:
    _native.convert(str(model()), str(tmp_path / "out.gguf"), "")
    again = _native.gguf_read(str(tmp_path / "out.gguf"))
    before = _native.gguf_read(str(model()))
    assert again["metadata"] == before["metadata"]
    assert data_of(tmp_path / "out.gguf") == data_of(model())


def data_of(path: Path) -> bytes:
    offset: int = _native.gguf_read(str(path))["data_offset"]
    return path.read_bytes()[offset:]


def rounded(x: Array, kind: str) -> Array:
    """[n, 32] -> what each block reads back as: ggml's own arithmetic, in which the scale is rounded to f16 last."""
    f32 = np.float32
    if kind in ("f16", "bf16"):
        return quants.decode(quants.encode(x, kind.upper()), kind.upper()).reshape(x.shape)
    steps = {"q8_0": 127, "q4_0": -8, "q5_0": -16, "q4_1": 15, "q5_1": 31}[kind]
    low = np.zeros((len(x), 1), dtype=f32)
    if kind.endswith("_1"):
        low, offset = x.min(axis=1, keepdims=True), f32(0.5)
        scale = (x.max(axis=1, keepdims=True) - low) / f32(steps)
    else:  # the value of largest magnitude, with its sign where the levels are not symmetric
        peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
        scale = (np.abs(peak) if steps > 0 else peak) / f32(steps)
        offset = f32(0.5 - min(steps, 0))
    scaled = (x - low) * (f32(1) / scale)
    if steps == 127:
        levels = np.trunc(scaled + np.copysign(f32(0.5), scaled))
    else:
        top = 2 * -steps - 1 if steps < 0 else steps
        levels = np.minimum(np.trunc(scaled + offset), top) + min(steps, 0)
    half_scale, half_low = (v.astype(np.float16).astype(f32) for v in (scale, low))
    return np.asarray(levels.astype(f32) * half_scale + half_low)


KINDS = {"f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_formats(model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source, out = model(n_embd=64, n_ff=96, tied=False), tmp_path / "out.gguf"
    convert.convert(source, out, kind)
    convert.convert(out, tmp_path / "f32.gguf", "f32")
    metadata = cards.read(out).metadata
    assert metadata["general.file_type"] == KINDS[kind]
    assert metadata["general.name"] == "Tiny"
    assert metadata["toy.note"] == "kept"
    assert metadata["tokenizer.chat_template"] == CHATML
    types, after = types_of(out), gguf_files.read(tmp_path / "f32.gguf")
    for name, values in gguf_files.read(source).items():
        if values.ndim == 1:
            assert (types[name], after[name].tobytes()) == ("F32", values.tobytes()), name
        else:
            own = types[name].lower()
            assert own == ("q8_0" if name == "output.weight" and kind[0] == "q" else kind), name
            assert (after[name].reshape(-1, 32) == rounded(values.reshape(-1, 32), own)).all(), name


#: The largest error of a value, in parts of the largest of its block of 32 (a bound, from the width of a step).
STEPS = {
    "q8_0": 1 / 127,
    "q6_k": 1 / 15,
    "q5_1": 1 / 15,
    "q5_0": 1 / 15,
    "q5_k_s": 1 / 8,
    "q4_k_s": 1 / 5,
    "q4_1": 1 / 7,
}


@pytest.mark.parametrize("kind", STEPS)
def test_what_is_quantised_is_near(model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source = model(n_embd=256, n_ff=256)
    convert.convert(source, tmp_path / "q.gguf", kind)
    convert.convert(tmp_path / "q.gguf", tmp_path / "f.gguf", "f32")
    before, after = gguf_files.read(source), gguf_files.read(tmp_path / "f.gguf")
    for name, values in before.items():
        blocks = (256 if "k" in kind else 32) if values.ndim > 1 else values.size
        largest = np.abs(values.reshape(-1, blocks)).max(axis=1, keepdims=True)
        difference = np.abs(after[name] - values).reshape(-1, blocks)
        assert (difference <= largest * STEPS[kind]).all(), (name, (difference / largest).max())
    again = tmp_path / "again.gguf"
    convert.convert(tmp_path / "q.gguf", again, kind)
    assert again.read_bytes() == (tmp_path / "q.gguf").read_bytes()


def test_types_are_those_that_llama_cpp_chooses(model: Callable[..., Path], tmp_path: Path) -> None:
    """q4_k_m over 16 layers: the head and the outer eighths of v and down in six bits; vectors and positions in f32."""
    out = tmp_path / "out.gguf"
    convert.convert(model(n_layer=16, n_embd=256, n_ff=256, tied=False), out, "q4_k_m")
    types = types_of(out)
    assert cards.read(out).metadata["general.file_type"] == 15
    assert cards.read(out).metadata["general.quantization_version"] == 2
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
    finer = [i for i in range(16) if types[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert (
        finer == [i for i in range(16) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    )
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}

    convert.convert(model(n_embd=256, n_ff=256), out, "q4_k_m")
    assert types_of(out)["token_embd.weight"] == "Q6_K"  # the embeddings are the head too

    convert.convert(model("gpt2", n_embd=256, n_ff=256), out, "q4_k_m")
    types = types_of(out)
    assert (types["position_embd.weight"], types["blk.0.attn_qkv.weight"]) == ("F32", "Q5_K")


def test_rows_that_are_no_whole_blocks_get_another_type(model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for kind, head, matrix in (("q4_k_m", "Q8_0", "Q5_0"), ("q5_k_s", "Q8_0", "Q5_1"), ("q6_k", "Q8_0", "Q8_0")):
        convert.convert(model(n_embd=64, n_ff=80), out, kind)
        types = types_of(out)
        assert (types["token_embd.weight"], types["blk.0.attn_q.weight"]) == (head, matrix), kind
        assert types["blk.0.ffn_down.weight"] == "F16", kind  # 80 is no multiple of 32


def with_value(source: Path, target: Path, tensor: str, value: float) -> Path:
    """A copy of an f32 model whose tensor begins with `value`."""
    data = bytearray(source.read_bytes())
    model = _native.gguf_read(str(source))
    [at] = [t["offset"] for t in model["tensors"] if t["name"] == tensor]
    struct.pack_into("<f", data, model["data_offset"] + at, value)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(model: Callable[..., Path], tmp_path: Path, value: float) -> None:
    odd, out = with_value(model(), tmp_path / "odd.gguf", "blk.1.attn_k.weight", value), tmp_path / "out.gguf"
    assert "blk.1.attn_k.weight" in fails("non_finite", convert.convert, odd, out, "q8_0")
    assert os.listdir(tmp_path) == ["odd.gguf"]


def test_what_f16_cannot_hold_is_named(model: Callable[..., Path], tmp_path: Path) -> None:
    odd, out = with_value(model(), tmp_path / "odd.gguf", "blk.1.attn_k.weight", -7e4), tmp_path / "out.gguf"
    for kind in ("f16", "q4_0"):
        assert "blk.1.attn_k.weight" in fails("bad_flag", convert.convert, odd, out, kind)
    convert.convert(odd, out, "bf16")


# --- whole or absent ------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing(model: Callable[..., Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert done <= total
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(model(), tmp_path / "out.gguf", "f16", interrupt)
    with pytest.raises(KeyboardInterrupt):  # as the terminal sends it: Python's handler runs between tensors
        convert.convert(model(), tmp_path / "out.gguf", "f16", lambda done, total: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        hf_export.export(convert.find_source(str(model())), tmp_path / "hf", progress=interrupt)
    assert not os.listdir(tmp_path)


def test_progress_is_told_to_the_end(model: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert.convert(model(), tmp_path / "out.gguf", "q8_0", lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


@pytest.mark.parametrize("to", ["gguf", "hf", "ollama"])
def test_a_disk_that_fills_up(model: Callable[..., Path], cold_toy: Toy, to: str) -> None:
    result = cold_toy("export", model(), "--to", to, "--type", "f32", "--out", "out", preexec_fn=limit_files)
    assert result.code == 1
    assert result.stderr.startswith("error: cannot write")
    assert not os.listdir(cold_toy.cwd)


def test_a_disk_too_small_is_seen_first(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails("disk_full", hf_export.export, convert.find_source(str(model())), tmp_path / "hf")
    assert not os.listdir(tmp_path)


def test_what_is_there_is_kept(model: Callable[..., Path], cold_toy: Toy) -> None:
    shutil.copy(model(), cold_toy.cwd / "m.gguf")
    for to in ("hf", "ollama", "gguf"):
        flags = ("export", "m.gguf", "--to", to, "--type", "f16", "--out", f"there-{to}")
        cold_toy(*flags).ok()
        before = tree(cold_toy.cwd)
        result = cold_toy(*flags)
        assert (result.code, result.stderr.splitlines()[0]) == (2, f"error: there-{to} is there already")
        assert tree(cold_toy.cwd) == before
        cold_toy(*flags, "--force").ok()
        assert tree(cold_toy.cwd) == before
    result = cold_toy("export", "m.gguf", "--to", "gguf", "--type", "f16", "--out", "m.gguf", "--force", "--json")
    assert (result.code, result.document["error"]["message"]) == (2, "m.gguf is what is read")


def test_a_folder_that_is_replaced_is_there_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for content in ("old", "new"):
        with convert.new_folder(out, force=True) as folder:
            (folder / "file").write_text(content)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "new"

    rename = os.replace

    def stopped(source: Path, target: Path) -> None:
        if Path(target) == out and Path(source).parent == tmp_path:  # the new one, when the old one is put aside
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), convert.new_folder(out, force=True) as folder:
        (folder / "file").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "new"


# --- adapters -------------------------------------------------------------------------------------------------------


def write_adapter(
    path: Path,
    targets: dict[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 3,
    more: dict[str, Any] | None = None,
) -> dict[str, Array]:
    """A LoRA in llama.cpp's format. targets: tensor -> (rows, columns). Returns what it adds to each tensor."""
    random, tensors, deltas = np.random.RandomState(seed), {}, {}
    for name, (rows, columns) in targets.items():
        a = random.standard_normal((rank, columns)).astype(np.float32) / columns**0.5
        b = random.standard_normal((rows, rank)).astype(np.float32)
        tensors |= {f"{name}.lora_a": ("F32", a), f"{name}.lora_b": ("F32", b)}
        deltas[name] = (8.0 / rank) * (b.astype(np.float64) @ a)
    keys = {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
        "toy.run_id": "a-run",
    }  # fmt: skip
    gguf_files.write(path, {k: v for k, v in (keys | (more or {})).items() if v is not None}, tensors)
    return deltas


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
    assert said in fails("bad_file", convert.merge, model(), adapter, tmp_path / "out.gguf")
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


# --- Hugging Face, there and back -----------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_there_and_back(model: Callable[..., Path], tmp_path: Path, arch: str, tied: bool, kind: str) -> None:
    source = model(arch, tied=tied, kind=kind, special={"position_embd": "F32"})
    hf_export.export(convert.find_source(str(source)), tmp_path / "hf")
    header, data = read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__") == len(data)
    hf_to_gguf.convert_folder(tmp_path / "hf", tmp_path / "back.gguf")
    assert types_of(tmp_path / "back.gguf") == types_of(source)
    before, after = gguf_files.read(source), gguf_files.read(tmp_path / "back.gguf")
    assert all(after[name].tobytes() == values.tobytes() for name, values in before.items())

    ours, theirs = cards.read(source).metadata, cards.read(tmp_path / "back.gguf").metadata
    for key in ours.keys() - {"general.name", "toy.note", "general.file_type"}:
        assert theirs[key] == ours[key], key


def test_types_on_the_way(model: Callable[..., Path], tmp_path: Path) -> None:
    """A quantised model goes out in f32, or as it is asked; vectors stay in f32."""
    source = convert.find_source(str(model(kind="Q8_0")))
    for type, matrix in (("", "F32"), ("f16", "F16"), ("bf16", "BF16")):
        hf_export.export(source, tmp_path / (type or "own"), type)
        header, _ = read_safetensors(tmp_path / (type or "own") / "model.safetensors")
        assert header["model.layers.0.mlp.up_proj.weight"]["dtype"] == matrix
        assert header["model.norm.weight"]["dtype"] == "F32"
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    fails("bad_flag", hf_export.export, source, tmp_path / "x", "q8_0")
    hf_to_gguf.convert_folder(tmp_path / "own", tmp_path / "back.gguf", "q8_0")
    assert data_of(tmp_path / "back.gguf")[:64]
    again = gguf_files.read(tmp_path / "back.gguf")["blk.0.attn_q.weight"]
    assert np.abs(again - gguf_files.read(model(kind="Q8_0"))["blk.0.attn_q.weight"]).max() < 1e-3


def test_several_files(model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    hf_export.export(convert.find_source(str(model())), folder)
    header, data = read_safetensors(folder / "model.safetensors")
    header.pop("__metadata__")
    places, names = {}, sorted(header)
    for n, part in enumerate((names[::2], names[1::2])):
        file, table, body = f"model-{n}.safetensors", {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            table[name] = header[name] | {"data_offsets": [len(body), len(body) + end - begin]}
            body += data[begin:end]
            places[name] = file
        text = json.dumps(table).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + body)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hf_to_gguf.convert_folder(folder, tmp_path / "back.gguf")
    before, after = gguf_files.read(model()), gguf_files.read(tmp_path / "back.gguf")
    assert all(after[name].tobytes() == values.tobytes() for name, values in before.items())
    (folder / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in fails("missing_file", hf_to_gguf.convert_folder, folder, tmp_path / "x.gguf")


@pytest.fixture
def folder(model: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    hf_export.export(convert.find_source(str(model())), tmp_path / "hf")
    yield tmp_path / "hf"
    assert not list(tmp_path.glob("*.gguf*"))


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = read_safetensors(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


NAME = "model.layers.1.mlp.up_proj.weight"


def rename(header: dict[str, Any], to: str) -> None:
    header[to] = header.pop(NAME)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda h: h.pop(NAME), "bad_file", f"has no tensor {NAME}"),
        (lambda h: rename(h, "model.layers.1.mlp.experts.0.weight"), "bad_file", f"has no tensor {NAME}"),
        (lambda h: h.update({"visual.weight": h[NAME]}), "not_available", "has a tensor visual.weight"),
        (lambda h: h[NAME].update(shape=[32, 64]), "bad_file", f"{NAME} is [32, 64] where config.json says [64, 32]"),
        (lambda h: h[NAME].update(shape=[64, 64]), "bad_file", f"{NAME} has 8192 bytes for its shape [64, 64]"),
        (lambda h: h[NAME].update(data_offsets=[0, 1 << 60]), "bad_file", f"{NAME} ends past its end"),
        (lambda h: h[NAME].update(data_offsets="x"), "bad_file", f"its entry of {NAME}"),
        (lambda h: h[NAME].update(dtype="F8_E4M3"), "not_available", f"{NAME} is of type F8_E4M3"),
    ],
)
def test_odd_tensors(folder: Path, change: Callable[[dict[str, Any]], None], kind: str, said: str) -> None:
    change_header(folder / "model.safetensors", change)
    assert said in fails(kind, hf_to_gguf.convert_folder, folder, folder.parent / "out.gguf")


def test_damaged_files(folder: Path) -> None:
    path, out = folder / "model.safetensors", folder.parent / "out.gguf"
    whole = path.read_bytes()
    for damaged, said in (
        (b"", "its header ends past its end"),
        (whole[:6], "its header ends past its end"),
        (b"\xff" * 8 + whole[8:], "its header ends past its end"),
        (whole[:8] + b"?" + whole[9:], "its header is not JSON"),
        (whole[:-100], "ends past its end"),
    ):
        path.write_bytes(damaged)
        assert said in fails("bad_file", hf_to_gguf.convert_folder, folder, out)
    path.unlink()
    fails("missing_file", hf_to_gguf.convert_folder, folder, out)
    (folder / "pytorch_model.bin").touch()
    assert "pickle" in fails("not_available", hf_to_gguf.convert_folder, folder, out)
    (folder / "config.json").write_text("{")
    fails("bad_file", hf_to_gguf.convert_folder, folder, out)
    (folder / "config.json").unlink()
    fails("missing_file", hf_to_gguf.convert_folder, folder, out)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ({"model_type": "mamba"}, "not_available"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "not_available"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "not_available"),
        ({"sliding_window": 4096}, "not_available"),
        ({"num_local_experts": 8}, "not_available"),
        ({"attention_bias": True}, "not_available"),
        ({"mlp_bias": True}, "not_available"),
        ({"hidden_act": "relu"}, "not_available"),
        ({"quantization_config": {"bits": 4}}, "not_available"),
        ({"partial_rotary_factor": 0.5}, "not_available"),
        ({"num_hidden_layers": None}, "bad_file"),
        ({"rms_norm_eps": "small"}, "bad_file"),
        ({"num_key_value_heads": 3}, "bad_file"),
    ],
)
def test_configs_that_are_not_plain(folder: Path, setting: dict[str, Any], kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    message = fails(kind, hf_to_gguf.convert_folder, folder, folder.parent / "out.gguf")
    [key] = setting
    assert key in message or kind == "bad_file" or key == "model_type"


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in fails("missing_file", hf_to_gguf.convert_folder, folder, folder.parent / "out.gguf")


def test_the_script(model: Callable[..., Path], tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(ROOT / "prep" / "hf_to_gguf.py"), *args]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    hf_export.export(convert.find_source(str(model("gpt2"))), tmp_path / "hf")
    assert run("hf", "out.gguf", "--type", "f16", "--name", "Mine").stdout == "out.gguf: 0.1 MiB\n"
    assert cards.read(tmp_path / "out.gguf").metadata["general.name"] == "Mine"
    again = run("hf", "out.gguf")
    assert (again.returncode, again.stderr.splitlines()[0]) == (2, "error: out.gguf is there already")
    assert run("nowhere", "x.gguf").returncode == 2


def test_gpt2_as_it_was_first_published(model: Callable[..., Path], tmp_path: Path) -> None:
    """Names without `transformer.`, the masks among them, and a head that is written out though it is tied."""
    hf_export.export(convert.find_source(str(model("gpt2"))), tmp_path / "hf")

    def change(header: dict[str, Any]) -> None:
        for name in [name for name in header if name.startswith("transformer.")]:
            header[name.removeprefix("transformer.")] = header.pop(name)
        header["h.0.attn.bias"] = {"dtype": "U8", "shape": [1, 1], "data_offsets": [0, 1]}
        header["lm_head.weight"] = header["wte.weight"]

    change_header(tmp_path / "hf" / "model.safetensors", change)
    hf_to_gguf.convert_folder(tmp_path / "hf", tmp_path / "back.gguf")
    before, after = gguf_files.read(model("gpt2")), gguf_files.read(tmp_path / "back.gguf")
    assert before.keys() == after.keys()
    assert all(after[name].tobytes() == values.tobytes() for name, values in before.items())


def test_models_without_an_equal(model: Callable[..., Path], tmp_path: Path) -> None:
    random = RandomModel(vocab_size=320)
    odd = {
        "llama.rope.scaling.type": "yarn", "llama.expert_count": 8, "llama.rope.dimension_count": 4,
        "llama.attention.value_length": 16,
    }  # fmt: skip
    for key, value in odd.items():
        path = random.write(tmp_path / "odd.gguf", {key: value})
        message = fails("not_available", hf_export.export, convert.find_source(str(path)), tmp_path / "hf")
        assert key in message
    factors = {"rope_freqs.weight": ("F32", np.ones(4, dtype=np.float32))}
    gguf_files.write(tmp_path / "odd.gguf", random.metadata, random.tensors() | factors)
    message = fails("not_available", hf_export.export, convert.find_source(str(tmp_path / "odd.gguf")), tmp_path / "hf")
    assert "rope_freqs.weight" in message
    gguf_files.write(tmp_path / "odd.gguf", {"general.architecture": "mamba"}, random.tensors())
    message = fails("not_available", hf_export.export, convert.find_source(str(tmp_path / "odd.gguf")), tmp_path / "hf")
    assert "mamba" in message


# --- images ---------------------------------------------------------------------------------------------------------


def write_vit(path: Path, pool: str = "cls") -> Path:
    """width 32, two layers, images of 8 x 8 in one channel, patches of 4, three classes."""
    random = np.random.RandomState(5)
    tensors: dict[str, tuple[str, Array]] = {}

    def add(name: str, *shape: int, middle: float = 0) -> None:
        tensors[name] = ("F32", (middle + 0.3 * random.standard_normal(shape)).astype(np.float32))

    add("patch_embd.weight", 32, 16)
    add("patch_embd.bias", 32)
    if pool == "cls":
        add("cls_embd.weight", 32)
    add("position_embd.weight", 5 if pool == "cls" else 4, 32)
    for i in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}.weight", 32, middle=1)
            add(f"blk.{i}.{norm}.bias", 32)
        for name, rows, columns in (
            ("attn_qkv", 96, 32),
            ("attn_output", 32, 32),
            ("ffn_up", 64, 32),
            ("ffn_down", 32, 64),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns)
            add(f"blk.{i}.{name}.bias", rows)
    add("output_norm.weight", 32, middle=1)
    add("output_norm.bias", 32)
    add("output.weight", 3, 32)
    add("output.bias", 3)
    numbers = {
        "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-6, "image_size": 8, "patch_size": 4, "channel_count": 1, "class_count": 3,
        "pooling": pool, "classes": ["a", "b", "c"], "image_mean": [0.25], "image_std": [0.5],
    }  # fmt: skip
    keys = {"general.architecture": "vit"} | {f"toy.vit.{key}": value for key, value in numbers.items()}
    return gguf_files.write(path, keys, tensors)


def test_vit_at_hugging_face(tmp_path: Path) -> None:
    source = convert.find_source(str(write_vit(tmp_path / "vit.gguf")))
    hf_export.export(source, tmp_path / "hf")
    header, data = read_safetensors(tmp_path / "hf" / "model.safetensors")
    weights = gguf_files.read(tmp_path / "vit.gguf")

    def values(name: str) -> Array:
        entry = header[name]
        begin, end = entry["data_offsets"]
        return np.frombuffer(data[begin:end], dtype="<f4").reshape(entry["shape"])

    assert values("vit.embeddings.patch_embeddings.projection.weight").shape == (32, 1, 4, 4)
    assert values("vit.embeddings.cls_token").shape == (1, 1, 32)
    assert values("vit.embeddings.position_embeddings").shape == (1, 5, 32)
    for n, part in enumerate(("query", "key", "value")):
        rows = slice(32 * n, 32 * n + 32)
        prefix = f"vit.encoder.layer.1.attention.attention.{part}"
        assert (values(f"{prefix}.weight") == weights["blk.1.attn_qkv.weight"][rows]).all()
        assert (values(f"{prefix}.bias") == weights["blk.1.attn_qkv.bias"][rows]).all()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_mean"] == [0.25]

    mean = convert.find_source(str(write_vit(tmp_path / "mean.gguf", "mean")))
    assert "mean pooling" in fails("not_available", hf_export.export, mean, tmp_path / "x")
    assert "Ollama" in fails("not_available", ollama.export, source, tmp_path / "x")
    convert.convert(tmp_path / "vit.gguf", tmp_path / "q.gguf", "q8_0")
    types = types_of(tmp_path / "q.gguf")
    assert (types["position_embd.weight"], types["output.weight"], types["patch_embd.weight"]) == ("F32", "Q8_0", "F16")


# --- tokenizers and templates ---------------------------------------------------------------------------------------


def test_a_begin_token_is_put_in_front(vocabulary: Vocabulary, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Encoder

    asks = dataclasses.replace(vocabulary, add_bos=True)
    RandomModel(vocab_size=320).write(tmp_path / "m.gguf", asks.to_metadata())
    hf_export.export(convert.find_source(str(tmp_path / "m.gguf")), tmp_path / "hf")
    encoder = Encoder.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in ("First Citizen:", "äöü  x\n"):
        assert encoder.encode(text).ids == Tokenizer(asks).encode(text, add_special=True)


SENTENCE_PIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]


def sentence_piece(**changes: Any) -> Vocabulary:
    types = [2, CONTROL, CONTROL, *[6] * 256, *[1] * (len(SENTENCE_PIECE) - 259)]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0]
    made = Vocabulary("llama", SENTENCE_PIECE, types, scores=scores, pre="", special={"unk": 0, "bos": 1, "eos": 2})
    return dataclasses.replace(made, add_bos=True, add_space_prefix=True, **changes)


def test_sentence_piece_as_json(tmp_path: Path) -> None:
    vocabulary = sentence_piece()
    text = spm_json.to_json(vocabulary)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    again = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert (again.model, again.tokens, again.add_space_prefix) == ("llama", SENTENCE_PIECE, True)
    from tokenizers import Tokenizer as Encoder

    encoder, ours = Encoder.from_str(text), Tokenizer(vocabulary)
    for sample in ("ab ab", " aab  abä🙂\n", "", "b", "</s>ab"):
        assert encoder.encode(sample, add_special_tokens=False).ids == ours.encode(sample, parse_special=True)
        assert encoder.decode(ours.encode(sample)) == sample

    RandomModel(vocab_size=len(SENTENCE_PIECE)).write(tmp_path / "m.gguf", vocabulary.to_metadata())
    hf_export.export(convert.find_source(str(tmp_path / "m.gguf")), tmp_path / "hf")
    encoder = Encoder.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert encoder.encode("ab").ids == ours.encode("ab", add_special=True)


def test_a_sentence_piece_without_an_equal(tmp_path: Path) -> None:
    """Two ways to the same token, where the leftmost pair comes first: no order of merges does that."""
    tokens = [*SENTENCE_PIECE[:259], "▁", "a", "e", "ae", "ea", "aea"]
    odd = dataclasses.replace(
        sentence_piece(), tokens=tokens, types=[2, CONTROL, CONTROL, *[6] * 256, *[1] * 6], scores=[0.0] * len(tokens)
    )
    ours = Tokenizer(odd)
    from tokenizers import Tokenizer as Encoder

    theirs = Encoder.from_str(spm_json.to_json(odd))
    text = "eaeaea"
    assert ours.encode(text) != theirs.encode(text, add_special_tokens=False).ids


TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>",
    ),
    "gemma": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        '<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_known_families(vocabulary: Vocabulary, name: str) -> None:
    template, turn = TEMPLATES[name]
    asks = dataclasses.replace(vocabulary, chat_template=template, add_bos=name == "llama3")
    text = ollama.modelfile(asks.to_metadata(), "a model", adapter=False)
    assert f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert "SYSTEM" not in text
    assert "FROM ./model.gguf\n" in text


def test_a_template_with_a_system_message_of_its_own(vocabulary: Vocabulary) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
    )
    asks = dataclasses.replace(vocabulary, chat_template=template)
    assert 'SYSTEM """Be kind."""' in ollama.modelfile(asks.to_metadata(), "a model", adapter=True)
    found = ollama.find_family(ChatTemplate(Tokenizer(asks), "a model"))
    assert found == (ollama.FAMILIES[0], "Be kind.")


def test_templates_of_no_family(vocabulary: Vocabulary) -> None:
    odd = dataclasses.replace(vocabulary, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "TEMPLATE" not in ollama.modelfile(odd.to_metadata(), "a model", adapter=False)
    broken = dataclasses.replace(vocabulary, chat_template="{% for")
    assert "TEMPLATE" not in ollama.modelfile(broken.to_metadata(), "a model", adapter=False)
    none = dataclasses.replace(vocabulary, chat_template=None)
    assert 'TEMPLATE """{{ .Prompt }}"""' in ollama.modelfile(none.to_metadata(), "a model", adapter=False)


def test_export_command(model: Callable[..., Path], cold_toy: Toy) -> None:
    shutil.copy(model(), cold_toy.cwd / "m.gguf")
    answer = cold_toy("export", "m.gguf", "--to", "gguf", "--type", "q8_0", "--json").ok().document
    assert (answer["format"], answer["out"]) == ("toy/export-v1", str(cold_toy.cwd / "m-q8_0.gguf"))
    assert cards.read(cold_toy.cwd / "m-q8_0.gguf").quantisation == "Q8_0"
    answer = cold_toy("export", "m.gguf", "--to", "hf", "--json").ok().document
    assert [Path(path).name for path in answer["files"]] == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    written = from_metadata(cards.read(model()).metadata, "m")
    assert json.loads((cold_toy.cwd / "m-hf" / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    assert written.chat_template == CHATML
    result = cold_toy("export", "m.gguf", "--to", "gguf")
    assert (result.code, "needs --type" in result.stderr) == (2, True)
    assert cold_toy("export", "m.gguf", "--to", "onnx").code == 2
    assert cold_toy("export", "nothing.gguf", "--to", "hf").code == 2
