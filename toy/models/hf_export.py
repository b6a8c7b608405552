"""A model as a folder that Hugging Face `transformers` loads: config.json, model.safetensors, tokenizer files."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toy.errors import ToyError, os_errors, shown
from toy.models import convert, hf_json, hf_names, spm_json
from toy.models.bases import shortest
from toy.models.cards import Card
from toy.models.convert import Progress, Source
from toy.models.vocabulary import UNUSED, Vocabulary, from_metadata

#: Types of a safetensors file: ours -> its name there, transformers' name, bytes a number.
TYPES = {"f32": ("F32", "float32", 4), "f16": ("F16", "float16", 2), "bf16": ("BF16", "bfloat16", 2)}


def export(source: Source, out: Path, type: str = "", force: bool = False, progress: Progress | None = None) -> None:
    """Write the folder `out`. `type` is that of the matrices: f32, f16 or bf16; "": the model's own, f32 where those
    are quantised. Vectors stay in f32. The adapter of a lora run is added.

    Raises ToyError (not_available, bad_file, bad_flag) for what has no equal there, before anything is written.
    """
    card = source.card
    if card.architecture not in CONFIGS:
        known = ", ".join(CONFIGS)
        message = f"{shown(card.path)} is of the architecture {card.architecture!r}, which toy does not export"
        raise ToyError("not_available", message, f"toy exports {known}")
    if type and type not in TYPES:
        raise ToyError("bad_flag", f"--type {type} is none for --to hf", f"choose one of {', '.join(TYPES)}")
    convert.check_target(out, force, card.path)
    config = CONFIGS[card.architecture](card)
    parts = _parts(card, config, type)
    config["dtype"] = _common_type(parts)
    files = {"config.json": config, **_extras(card, config)}
    convert.check_space(out, sum(part.size for part in parts))
    with convert.new_folder(out, force) as folder:
        for name, document in files.items():
            text = document if isinstance(document, str) else json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            with os_errors("write the folder"), (folder / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        _write_tensors(source, folder / "model.safetensors", parts, progress)


class _Part:
    """One tensor of the safetensors file, and which rows of which GGUF tensor it is."""

    def __init__(self, name: hf_names.Name, shape: list[int], config: Mapping[str, Any], type: str) -> None:
        self.name, self.type = name, type
        self.matrix = len(shape) > 1
        ours = list(reversed(shape))
        self.first = self.count = 0
        if name.rows in ("first", "second", "third"):
            self.count = ours[0] // 3
            self.first = ("first", "second", "third").index(name.rows) * self.count
            ours[0] = self.count
        self.shape = _hf_shape(name, ours, config)
        self.order, self.n_head = "as_is", 1
        if name.rows == "transposed" and self.matrix:
            self.order = "transposed"
        elif name.rows in ("heads", "key_heads"):
            self.order = "split"
            self.n_head = config["num_attention_heads" if name.rows == "heads" else "num_key_value_heads"]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * TYPES[self.type][2]


def _hf_shape(name: hf_names.Name, ours: list[int], config: Mapping[str, Any]) -> list[int]:
    if name.rows == "transposed":
        return ours[::-1]
    if name.hf.endswith((".cls_token", ".position_embeddings")):
        return [1] * (3 - len(ours)) + ours
    if name.hf.endswith(".projection.weight"):
        return [ours[0], config["num_channels"], config["patch_size"], config["patch_size"]]
    return ours


def _parts(card: Card, config: Mapping[str, Any], type: str) -> list[_Part]:
    tensors = {str(tensor["name"]): tensor for tensor in card.tensors}
    n_layer = config.get("num_hidden_layers", config.get("n_layer", 0))
    wanted = list(hf_names.names(card.architecture, n_layer, bool(config.get("tie_word_embeddings"))))
    for name in wanted:
        if name.gguf not in tensors:
            hint = "the file is not a complete model: export it again from where it came"
            raise ToyError("bad_file", f"{shown(card.path)} has no tensor {name.gguf}", hint)
    for extra in tensors.keys() - {name.gguf for name in wanted}:
        message = f"{shown(card.path)} has a tensor {extra}, which transformers' {config['model_type']} does not"
        raise ToyError("not_available", message, "toy exports the plain architectures")
    parts = []
    for name in wanted:
        tensor = tensors[name.gguf]
        own = str(tensor["type"]).lower()
        as_type = own if own in TYPES else "f32"
        if type and len(tensor["shape"]) > 1 and "position_embd" not in name.gguf:
            as_type = type
        parts.append(_Part(name, tensor["shape"], config, as_type))
    return parts


def _common_type(parts: list[_Part]) -> str:
    types = {part.type for part in parts if part.matrix and "position_embd" not in part.name.gguf}
    return TYPES[types.pop() if len(types) == 1 else "f32"][1]


def _write_tensors(source: Source, out: Path, parts: list[_Part], progress: Progress | None) -> None:
    """https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the tensors' bytes."""
    from toy import _native

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in parts:
        offsets = [at, at + part.size]
        header[part.name.hf] = {"dtype": TYPES[part.type][0], "shape": part.shape, "data_offsets": offsets}
        at += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    convert.call(
        _native.export_tensors,
        os.fspath(source.path),
        os.fspath(source.adapter) if source.adapter else "",
        os.fspath(out),
        struct.pack("<Q", len(text)) + text,
        [(part.name.gguf, part.type, part.order, part.n_head, part.first, part.count) for part in parts],
        progress=progress,
    )


# config.json


class _Keys:
    """The architecture's own numbers of a GGUF. Raises ToyError (bad_file) for what is not there."""

    def __init__(self, card: Card, prefix: str) -> None:
        self._card, self._prefix = card, prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self._card.metadata.get(self._prefix + key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            what = f"has {self._prefix}{key} = {value!r}"[:200] if value is not None else f"has no {self._prefix}{key}"
            raise ToyError(
                "bad_file", f"{shown(self._card.path)} {what}", "the file is no complete model: get it again"
            )
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        return shortest(float(value)) if isinstance(value, (int, float)) else default

    def refuse(self, key: str, *plain: object) -> None:
        value = self.get(key)
        if value is not None and value not in plain:
            message = f"{shown(self._card.path)} has {self._prefix}{key} = {value}, which toy does not export"
            raise ToyError("not_available", message, "toy exports the plain architectures")


def _shape(card: Card, name: str) -> list[int]:
    found = next((tensor["shape"] for tensor in card.tensors if tensor["name"] == name), None)
    if found is None:
        hint = "the file is not a complete model: export it again from where it came"
        raise ToyError("bad_file", f"{shown(card.path)} has no tensor {name}", hint)
    return [int(n) for n in found]


def _text_config(card: Card) -> dict[str, Any]:
    tokenizer = "tokenizer.ggml."
    return {
        "vocab_size": _shape(card, "token_embd.weight")[-1],
        "tie_word_embeddings": not any(tensor["name"] == "output.weight" for tensor in card.tensors),
        "bos_token_id": card.metadata.get(f"{tokenizer}bos_token_id"),
        "eos_token_id": card.metadata.get(f"{tokenizer}eos_token_id"),
        "pad_token_id": card.metadata.get(f"{tokenizer}padding_token_id"),
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _gated_config(card: Card) -> dict[str, Any]:
    keys = _Keys(card, f"{card.architecture}.")
    n_embd, n_head = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head = keys.whole("attention.key_length", n_embd // n_head)
    keys.refuse("attention.value_length", head)
    keys.refuse("rope.dimension_count", head)
    keys.refuse("rope.scaling.type", "none", "")
    keys.refuse("expert_count", 0)
    keys.refuse("attention.sliding_window", 0)
    theta = keys.real("rope.freq_base", 10000.0)
    config = {
        "num_hidden_layers": keys.whole("block_count"),
        "hidden_size": n_embd,
        "num_attention_heads": n_head,
        "num_key_value_heads": keys.whole("attention.head_count_kv", n_head),
        "intermediate_size": keys.whole("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # transformers 5
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    return config | _text_config(card) | {"head_dim": head}


def _llama_config(card: Card) -> dict[str, Any]:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return kind | _gated_config(card) | {"attention_bias": False, "mlp_bias": False}


def _qwen2_config(card: Card) -> dict[str, Any]:
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return kind | _gated_config(card) | {"use_sliding_window": False, "sliding_window": None}


def _gpt2_config(card: Card) -> dict[str, Any]:
    keys = _Keys(card, "gpt2.")
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": keys.whole("block_count"),
        "n_embd": keys.whole("embedding_length"),
        "n_head": keys.whole("attention.head_count"),
        "n_inner": keys.whole("feed_forward_length"),
        "n_positions": _shape(card, "position_embd.weight")[-1],
        "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    return config | _text_config(card)


def _vit_config(card: Card) -> dict[str, Any]:
    keys = _Keys(card, "toy.vit.")
    if keys.get("pooling") != "cls":
        message = f"{shown(card.path)} takes the mean of its patches ({keys.get('pooling')} pooling)"
        raise ToyError("not_available", message, "transformers' ViT reads the class token: train with model.pool=cls")
    classes = [str(name) for name in keys.get("classes") or []]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "num_hidden_layers": keys.whole("block_count"),
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_attention_heads": keys.whole("attention.head_count"),
        "layer_norm_eps": keys.real("attention.layer_norm_epsilon", 1e-6),
        "image_size": keys.whole("image_size"),
        "patch_size": keys.whole("patch_size"),
        "num_channels": keys.whole("channel_count"),
        "hidden_act": "gelu_pytorch_tanh",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }


CONFIGS: dict[str, Callable[[Card], dict[str, Any]]] = {
    "llama": _llama_config,
    "qwen2": _qwen2_config,
    "gpt2": _gpt2_config,
    "vit": _vit_config,
}


# What stands beside it


def _extras(card: Card, config: Mapping[str, Any]) -> dict[str, Any]:
    """File name -> document or text."""
    if card.architecture == "vit":
        return {"preprocessor_config.json": _preprocessor(card, config)}
    ends = [config["eos_token_id"]]
    ends += [card.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ends if len(ends) > 1 else config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    files: dict[str, Any] = {"generation_config.json": generation}
    if not isinstance(card.metadata.get("tokenizer.ggml.tokens"), list):
        return files
    vocabulary = _used(from_metadata(card.metadata, shown(card.path)))
    text = hf_json.to_json(vocabulary) if vocabulary.model == "gpt2" else _sentence_piece(card, vocabulary)
    assert text is not None
    return {
        **files,
        "tokenizer.json": _with_begin(text, vocabulary),
        "tokenizer_config.json": _tokenizer_config(vocabulary, config),
    }


def _used(vocabulary: Vocabulary) -> Vocabulary:
    """Without the unused tokens at the end: they only make the numbers of tokens and of rows equal."""
    size = len(vocabulary)
    while size > 1 and vocabulary.types[size - 1] == UNUSED:
        size -= 1
    return replace(
        vocabulary, tokens=vocabulary.tokens[:size], types=vocabulary.types[:size], scores=vocabulary.scores[:size]
    )


def _preprocessor(card: Card, config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [shortest(x) for x in card.metadata.get("toy.vit.image_mean") or []],
        "image_std": [shortest(x) for x in card.metadata.get("toy.vit.image_std") or []],
    }


def _tokenizer_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    special = vocabulary.special
    names = {
        f"{name}_token": vocabulary.tokens[special[name]] for name in ("bos", "eos", "unk", "pad") if name in special
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", config.get("n_positions")),
    }
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    return settings


def _with_begin(text: str, vocabulary: Vocabulary) -> str:
    """The tokenizer, putting the begin and end tokens where the model asks for them."""
    special = vocabulary.special
    before = [special["bos"]] if vocabulary.add_bos and "bos" in special else []
    after = [special["eos"]] if vocabulary.add_eos and "eos" in special else []
    if not before and not after:
        return text
    document = json.loads(text)
    tokens = vocabulary.tokens

    def pieces(kind: str, type_id: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": kind, "type_id": type_id}}
        special_pieces = [
            [{"SpecialToken": {"id": tokens[i], "type_id": type_id}} for i in ids] for ids in (before, after)
        ]
        return [*special_pieces[0], middle, *special_pieces[1]]

    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in {*before, *after}},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, and 3 more: 12.5 % of 1,000!",
    "def f(x):\n    return {x: [1, 2]}  # two  spaces\n\n\tand a tab",
    "äöü ß é ñ — “quoted” … 你好 🙂",
    " it's we'll, leading and trailing spaces ",
)


def _sentence_piece(card: Card, vocabulary: Vocabulary) -> str:
    """Scores as merges: of the pairs that make a token, in the order of the scores of what they make.

    Equal to SentencePiece's own algorithm but where several pairs make the same token; texts are cut both ways to see.
    Raises ToyError (not_available) where they differ.
    """
    from tokenizers import Tokenizer as Encoder

    from toy.models.tokenizer import Tokenizer

    text = spm_json.to_json(vocabulary)
    encoder, ours = Encoder.from_str(text), Tokenizer(vocabulary)
    for sample in _SAMPLES:
        if encoder.encode(sample, add_special_tokens=False).ids != ours.encode(sample):
            raise ToyError(
                "not_available",
                f"the SentencePiece tokenizer of {shown(card.path)} has no equal tokenizer.json",
                "take the tokenizer.json that the model was published with, or --to gguf",
            )
    return text
