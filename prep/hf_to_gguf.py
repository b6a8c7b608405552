"""Hugging Face -> GGUF: `python prep/hf_to_gguf.py FOLDER OUT.gguf --type f16`.

FOLDER holds a llama, qwen2 or gpt2 model as it is published: config.json, model.safetensors (or several, with
model.safetensors.index.json) and tokenizer.json. OUT is a GGUF with the tokenizer inside that llama.cpp, `toy infer`
and `toy train` (lora, warm-start) take. The tensors pass through row by row: memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import counter, main_of

from toy.errors import ToyError, nearest, shown
from toy.models import convert, hf_names
from toy.models.tokenizer import Tokenizer

Json = dict[str, Any]

#: dtype of a safetensors file -> ours, and its bytes a number
DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
LARGEST_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: what it is, and where its bytes begin."""

    path: Path
    dtype: str
    shape: list[int]
    offset: int


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest)
    parser.add_argument("folder", type=Path, help="the model's folder")
    parser.add_argument("out", type=Path, help="the GGUF to write")
    parser.add_argument("--type", default="", choices=["", *convert.TYPE_NAMES], help="of the matrices [as stored]")
    parser.add_argument("--name", default="", help="general.name in the GGUF [the folder's]")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")
    return main_of("toy/hf-to-gguf-v1", parser, work)


def work(args: argparse.Namespace) -> dict[str, object]:
    convert_folder(args.folder, args.out, args.type, args.name, args.force, counter("converting"))
    size = args.out.stat().st_size
    print(f"{args.out}: {size / 2**20:,.1f} MiB", file=sys.stderr if args.json else sys.stdout)
    return {"out": str(args.out), "size": size}


def convert_folder(
    folder: Path,
    out: Path,
    type: str = "",
    name: str = "",
    force: bool = False,
    progress: convert.Progress | None = None,
) -> None:
    """Raises ToyError (missing_file, bad_file, not_available, disk_full) naming what is missing, odd or too much."""
    from toy import _native

    if not folder.is_dir():
        raise ToyError("missing_file", f"no folder at {folder}", "give the folder that holds config.json")
    convert.check_file_target(out, force)
    config = load_json(folder / "config.json")
    reader = CONFIGS.get(str(config.get("model_type")))
    if reader is None:
        message = f"{shown(folder)} holds a model of type {config.get('model_type')!r}, which toy does not convert"
        raise ToyError("not_available", message, f"toy converts {', '.join(CONFIGS)}")
    stored = read_tensors(folder)
    about = reader(Config(folder / "config.json", config))
    pieces = plan(folder, about, stored)
    metadata = {
        "general.architecture": about.arch,
        "general.type": "model",
        "general.name": name or folder.resolve().name,
        **{f"{about.arch}.{key}": value for key, value in about.numbers.items()},
        **tokenizer_metadata(folder, about.numbers["vocab_size"]),
    }
    kinds = {piece[4] for piece in pieces if len(piece[1]) > 1 and piece[0] != "position_embd.weight"}
    common = kinds.pop() if len(kinds) == 1 else "f32"
    with convert.parent_made(out):
        convert.call(_native.import_tensors, str(out), metadata, pieces, type or common, progress=progress)


def load_json(path: Path) -> Json:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToyError(
            "missing_file", f"no {path.name} in {shown(path.parent)}", "give a model's whole folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ToyError("bad_file", f"cannot read {shown(path)}: {error}", "download the file again") from error
    if not isinstance(document, dict):
        raise ToyError("bad_file", f"{shown(path)} is not a JSON object", "download the file again")
    return document


# The tensors


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, by name."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if not index.is_file():
        if any(folder.glob("*.bin")):
            hint = "save it as safetensors first: transformers' save_pretrained does"
            raise ToyError("not_available", f"{shown(folder)} holds its weights as a pickle", hint)
        raise ToyError("missing_file", f"no model.safetensors in {shown(folder)}", "give a model's whole folder")
    found: dict[str, Stored] = {}
    places = load_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise ToyError("bad_file", f"{shown(index)} has no weight_map", "download the file again")
    for part in sorted(set(places.values())):
        if Path(part).name != part or not (folder / part).is_file():
            raise ToyError("missing_file", f"{shown(index)} names {part}, which is not there", "download it too")
        found |= read_safetensors(folder / part)
    for name in places:
        if name not in found:
            raise ToyError("bad_file", f"no tensor {name} in {places[name]}", "download the file again")
    return found


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Its header is 8 bytes of length and JSON; offsets begin at its end. https://huggingface.co/docs/safetensors"""

    def broken(why: str) -> ToyError:
        return ToyError("bad_file", f"{shown(path)} is no whole safetensors file: {why}", "download the file again")

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise broken("its header ends past its end")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise broken("its header is not JSON") from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise broken(f"its entry of {name} is not as it should be") from error
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or end < begin or 8 + length + end > size:
            raise broken(f"{name} ends past its end")
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype][1] != end - begin:
            raise broken(f"{name} has {end - begin} bytes for its shape {shape}")
        found[name] = Stored(path, dtype, shape, 8 + length + begin)
    return found


def plan(folder: Path, about: About, stored: dict[str, Stored]) -> list[tuple[str, list[int], str, int, str, str, int]]:
    """What `toy._native.import_tensors` writes. Raises ToyError for tensors too few, too many or of other shapes."""
    numbers, pieces, used = about.numbers, [], set()
    shapes = about.shapes
    for name in hf_names.names(about.arch, numbers["block_count"], about.tied):
        hf = name.hf if name.hf in stored else name.hf.removeprefix("transformer.")  # as GPT-2 was first published
        tensor = stored.get(hf)
        if tensor is None:
            raise ToyError("bad_file", f"{shown(folder)} has no tensor {name.hf}", "the model is not complete")
        used.add(hf)
        short = name.gguf.split(".", 2)[-1] if name.gguf.startswith("blk.") else name.gguf
        transposed = name.rows == "transposed" and name.gguf.endswith(".weight")
        wanted = shapes[short][::-1] if transposed else shapes[short]
        if tensor.shape != wanted:
            message = f"{shown(tensor.path)}: {hf} is {tensor.shape} where config.json says {wanted}"
            raise ToyError("bad_file", message, "config.json and the weights are of different models")
        if tensor.dtype not in DTYPES:
            message = f"{shown(tensor.path)}: {hf} is of type {tensor.dtype}"
            raise ToyError("not_available", message, f"toy reads {', '.join(DTYPES)}")
        order, heads = "as_is", 1
        if name.rows in ("heads", "key_heads"):
            order = "paired"
            heads = numbers["attention.head_count" + ("_kv" if name.rows == "key_heads" else "")]
        elif transposed:
            order = "transposed"
        ours = list(reversed(shapes[short]))
        pieces.append((name.gguf, ours, str(tensor.path), tensor.offset, DTYPES[tensor.dtype][0], order, heads))
    buffers = ("inv_freq", ".attn.bias", ".attn.masked_bias")
    for name in sorted(stored.keys() - used):
        if name.endswith(buffers) or (about.tied and name == "lm_head.weight"):
            continue
        message = f"{shown(folder)} has a tensor {name}, which a plain {about.arch} does not"
        raise ToyError("not_available", message, "toy converts the plain architectures")
    return pieces


# config.json


@dataclass(frozen=True)
class About:
    """A model in a GGUF's words: its keys without their prefix, and each tensor's shape (as PyTorch shows it)."""

    arch: str
    numbers: Json
    shapes: dict[str, list[int]]
    tied: bool


class Config:
    """config.json. Raises ToyError (bad_file, not_available) for what is missing, or not plain."""

    def __init__(self, path: Path, values: Json) -> None:
        self._path, self._values = path, values
        self.refuse("quantization_config", None)
        self.refuse("add_cross_attention", None, False)
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            self.refuse(key, None, 0, 1)

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            near = nearest(key, self._values)
            what = f"has no {key}" if value is None else f"has {key} = {value!r}"[:120]
            raise ToyError("bad_file", f"{shown(self._path)} {what}", f"it has {near}" if near else "is it whole?")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ToyError(
                "bad_file", f"{shown(self._path)} has {key} = {value!r}"[:200], "a number above 0 belongs there"
            )
        return float(value)

    def refuse(self, key: str, *plain: object) -> None:
        """`key` must be absent or one of `plain`."""
        value = self._values.get(key)
        if key in self._values and value not in plain:
            message = f"{shown(self._path)} has {key} = {json.dumps(value)[:80]}, which toy does not run"
            raise ToyError("not_available", message, "toy converts the plain architectures")

    def rope_theta(self) -> float:
        """transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
        for key in ("rope_scaling", "rope_parameters"):
            value = self._values.get(key)
            kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else None
            if value is not None and kind != "default":
                self.refuse(key)
        parameters = self._values.get("rope_parameters")
        if isinstance(parameters, dict) and "rope_theta" in parameters:
            return Config(self._path, parameters).real("rope_theta", 10000.0)
        return self.real("rope_theta", 10000.0)


def gated(config: Config, arch: str, bias: bool) -> About:
    n_embd, n_head = config.whole("hidden_size"), config.whole("num_attention_heads")
    n_kv, n_ff = config.whole("num_key_value_heads", n_head), config.whole("intermediate_size")
    head = config.whole("head_dim", n_embd // n_head)
    config.refuse("hidden_act", "silu", "swish")
    config.refuse("attention_bias", None, bias)
    config.refuse("mlp_bias", None, False)
    config.refuse("partial_rotary_factor", None, 1, 1.0)
    if config.get("use_sliding_window", arch != "qwen2"):
        config.refuse("sliding_window", None)
    vocabulary = config.whole("vocab_size")
    numbers: Json = {
        "block_count": config.whole("num_hidden_layers"),
        "context_length": config.whole("max_position_embeddings"),
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_rms_epsilon": config.real("rms_norm_eps", 1e-6),
        "rope.dimension_count": head,
        "rope.freq_base": config.rope_theta(),
        "vocab_size": vocabulary,
    }
    if head * n_head != n_embd:
        numbers |= {"attention.key_length": head, "attention.value_length": head}
    shapes = {
        "token_embd.weight": [vocabulary, n_embd],
        "output.weight": [vocabulary, n_embd],
        "output_norm.weight": [n_embd],
        "attn_norm.weight": [n_embd],
        "attn_q.weight": [head * n_head, n_embd],
        "attn_k.weight": [head * n_kv, n_embd],
        "attn_v.weight": [head * n_kv, n_embd],
        "attn_q.bias": [head * n_head],
        "attn_k.bias": [head * n_kv],
        "attn_v.bias": [head * n_kv],
        "attn_output.weight": [n_embd, head * n_head],
        "ffn_norm.weight": [n_embd],
        "ffn_gate.weight": [n_ff, n_embd],
        "ffn_up.weight": [n_ff, n_embd],
        "ffn_down.weight": [n_embd, n_ff],
    }
    return About(arch, numbers, shapes, bool(config.get("tie_word_embeddings", False)))


def gpt2(config: Config) -> About:
    n_embd, n_positions, vocabulary = config.whole("n_embd"), config.whole("n_positions"), config.whole("vocab_size")
    n_ff = config.whole("n_inner", 4 * n_embd)
    config.refuse("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    config.refuse("scale_attn_by_inverse_layer_idx", None, False)
    config.refuse("scale_attn_weights", None, True)
    numbers: Json = {
        "block_count": config.whole("n_layer"),
        "context_length": n_positions,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": config.whole("n_head"),
        "attention.layer_norm_epsilon": config.real("layer_norm_epsilon", 1e-5),
        "vocab_size": vocabulary,
    }
    shapes = {
        "token_embd.weight": [vocabulary, n_embd],
        "position_embd.weight": [n_positions, n_embd],
        "output.weight": [vocabulary, n_embd],
    }
    for name, rows, columns in (
        ("attn_qkv", 3 * n_embd, n_embd),
        ("attn_output", n_embd, n_embd),
        ("ffn_up", n_ff, n_embd),
        ("ffn_down", n_embd, n_ff),
    ):
        shapes |= {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}
    for name in ("attn_norm", "ffn_norm", "output_norm"):
        shapes |= {f"{name}.weight": [n_embd], f"{name}.bias": [n_embd]}
    return About("gpt2", numbers, shapes, bool(config.get("tie_word_embeddings", True)))


CONFIGS: dict[str, Callable[[Config], About]] = {
    "llama": lambda config: gated(config, "llama", bias=False),
    "qwen2": lambda config: gated(config, "qwen2", bias=True),
    "gpt2": gpt2,
}


# The tokenizer


def tokenizer_metadata(folder: Path, vocab_size: int) -> Json:
    if not (folder / "tokenizer.json").is_file():
        hint = "make one: transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise ToyError("missing_file", f"no tokenizer.json in {shown(folder)}", hint)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    if len(tokenizer) > vocab_size:
        message = f"the tokenizer of {shown(folder)} has {len(tokenizer)} tokens, the model {vocab_size}"
        raise ToyError("bad_file", message, "tokenizer.json and the weights are of different models")
    vocabulary = tokenizer.padded(vocab_size).vocabulary
    with suppress(FileNotFoundError, UnicodeDecodeError):  # where transformers 5 puts it
        vocabulary = replace(vocabulary, chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"))
    for name, i in end_ids(folder):
        if i < vocab_size and name not in vocabulary.special:
            vocabulary = replace(vocabulary, special={**vocabulary.special, name: i})
    return vocabulary.to_metadata()


def end_ids(folder: Path) -> Iterator[tuple[str, int]]:
    """A second id that ends an answer, where generation_config.json names several."""
    with suppress(ToyError):
        ends = load_json(folder / "generation_config.json").get("eos_token_id")
        if isinstance(ends, list) and len(ends) > 1 and all(isinstance(i, int) for i in ends):
            yield "eot", ends[1]


if __name__ == "__main__":
    sys.exit(main())
