"""Models in other types: their numbers, which tensor gets which type, whole files or none, the command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import quants
from conftest import CHATML
from gguf_files import data_of, types_of
from harness import Toy, fails, tree

from toy import _native
from toy.errors import ToyError
from toy.models import cards, convert, hf_export
from toy.models.vocabulary import from_metadata

Array = np.ndarray[Any, Any]


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
    assert "\nerror: cannot write" in "\n" + result.stderr  # below its progress, on a slow machine
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


def test_only_folders_of_ours_are_replaced(tmp_path: Path) -> None:
    """--force with the wrong path takes nobody's files away."""
    home, photos, empty = (tmp_path / name for name in ("home", "photos", "empty"))
    for folder in (home / "letters", photos, empty):
        folder.mkdir(parents=True)
    (home / "config.json").write_text("mine")
    (photos / "a.png").write_text("mine")
    for out in (home, photos, tmp_path):
        with pytest.raises(ToyError, match="holds other things"), convert.new_folder(out, force=True):
            pass
    assert ((home / "config.json").read_text(), (photos / "a.png").read_text()) == ("mine", "mine")
    with convert.new_folder(empty, force=True) as made:
        (made / "config.json").write_text("{}")
    assert (empty / "config.json").is_file()


def test_a_folder_that_is_replaced_is_there_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for content in ("old", "new"):
        with convert.new_folder(out, force=True) as folder:
            (folder / "config.json").write_text(content)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "new"

    rename = os.replace

    def stopped(source: Path, target: Path) -> None:
        if Path(target) == out and Path(source).parent == tmp_path:  # the new one, when the old one is put aside
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), convert.new_folder(out, force=True) as folder:
        (folder / "config.json").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "new"


KILLED = """
import os, signal, sys
from pathlib import Path
from toy.models import convert
with convert.new_folder(Path(sys.argv[1]), force=False) as folder:
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_export_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    kept = [tmp_path / ".out-settings", tmp_path / ".other-toy-1-0"]
    for folder in kept:
        folder.mkdir()
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, out], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (left,) = {*tmp_path.iterdir()} - {*kept}
    assert left.name.startswith(".out-toy-")
    with convert.new_folder(out, force=False) as first:
        assert not left.exists()
        with pytest.raises(KeyboardInterrupt), convert.new_folder(out, force=False):
            assert first.is_dir(), "whoever is still at it is left alone"
            raise KeyboardInterrupt
        (first / "config.json").write_text("{}")
    assert {*tmp_path.iterdir()} == {out, *kept}


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
