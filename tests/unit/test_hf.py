"""Hugging Face folders written and read again: weights, configurations, images, tokenizers."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from gguf_files import RandomModel, data_of, types_of, write_vit
from harness import ROOT, fails

from toy.models import cards, convert, hf_export, ollama, spm_json
from toy.models.hf_json import read as read_tokenizer_json
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import CONTROL, Vocabulary

sys.path.insert(0, str(ROOT / "prep"))
import hf_to_gguf

sys.path.pop(0)

Array = np.ndarray[Any, Any]


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
    ("setting", "kind", "said"),
    [
        ({"model_type": "mamba"}, "not_available", "of type 'mamba'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "not_available", "has rope_scaling = "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "not_available", "has rope_parameters = "),
        ({"sliding_window": 4096}, "not_available", "has sliding_window = 4096"),
        ({"num_local_experts": 8}, "not_available", "has num_local_experts = 8"),
        ({"attention_bias": True}, "not_available", "has attention_bias = true"),
        ({"mlp_bias": True}, "not_available", "has mlp_bias = true"),
        ({"hidden_act": "relu"}, "not_available", 'has hidden_act = "relu"'),
        ({"quantization_config": {"bits": 4}}, "not_available", "has quantization_config = "),
        ({"partial_rotary_factor": 0.5}, "not_available", "has partial_rotary_factor = 0.5"),
        ({"num_hidden_layers": None}, "bad_file", "has no num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "bad_file", "has rms_norm_eps = 'small'"),
        ({"num_key_value_heads": 3}, "bad_file", "k_proj.weight is [16, 32] where config.json says [24, 32]"),
    ],
)
def test_configs_that_are_not_plain(folder: Path, setting: dict[str, Any], kind: str, said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    assert said in fails(kind, hf_to_gguf.convert_folder, folder, folder.parent / "out.gguf")


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


# --- tokenizers ---------------------------------------------------------------------------------------


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
