"""What the tensors of a model are called in a GGUF and at Hugging Face, and how their rows lie in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Name(NamedTuple):
    """One tensor. `rows`: as_is; transposed (GPT-2's Conv1D); heads or key_heads, whose rotary pairs lie side by side
    in a GGUF and half a head apart at Hugging Face; or the first, second, third third of a joined tensor."""

    gguf: str
    hf: str
    rows: str = "as_is"


def _gated(rope: bool, bias: bool) -> tuple[list[Name], list[Name]]:
    """llama and its kin: outside the layers, and in each."""
    outside = [
        Name("token_embd.weight", "model.embed_tokens.weight"),
        Name("output_norm.weight", "model.norm.weight"),
        Name("output.weight", "lm_head.weight"),
    ]
    q, k = ("heads", "key_heads") if rope else ("as_is", "as_is")
    layer = [
        Name("attn_norm.weight", "input_layernorm.weight"),
        Name("attn_q.weight", "self_attn.q_proj.weight", q),
        Name("attn_k.weight", "self_attn.k_proj.weight", k),
        Name("attn_v.weight", "self_attn.v_proj.weight"),
        Name("attn_output.weight", "self_attn.o_proj.weight"),
        Name("ffn_norm.weight", "post_attention_layernorm.weight"),
        Name("ffn_gate.weight", "mlp.gate_proj.weight"),
        Name("ffn_up.weight", "mlp.up_proj.weight"),
        Name("ffn_down.weight", "mlp.down_proj.weight"),
    ]
    if bias:
        layer += [Name(f"attn_{part}.bias", f"self_attn.{part}_proj.bias") for part in "qkv"]
    return outside, layer


def _both(gguf: str, hf: str, rows: str = "as_is") -> list[Name]:
    return [Name(f"{gguf}.weight", f"{hf}.weight", rows), Name(f"{gguf}.bias", f"{hf}.bias")]


def _gpt2() -> tuple[list[Name], list[Name]]:
    outside = [
        Name("token_embd.weight", "transformer.wte.weight"),
        Name("position_embd.weight", "transformer.wpe.weight"),
        *_both("output_norm", "transformer.ln_f"),
        Name("output.weight", "lm_head.weight"),
    ]
    layer = [
        *_both("attn_norm", "ln_1"),
        *_both("attn_qkv", "attn.c_attn", "transposed"),
        *_both("attn_output", "attn.c_proj", "transposed"),
        *_both("ffn_norm", "ln_2"),
        *_both("ffn_up", "mlp.c_fc", "transposed"),
        *_both("ffn_down", "mlp.c_proj", "transposed"),
    ]
    return outside, layer


def _vit() -> tuple[list[Name], list[Name]]:
    outside = [
        Name("cls_embd.weight", "vit.embeddings.cls_token"),
        Name("position_embd.weight", "vit.embeddings.position_embeddings"),
        *_both("patch_embd", "vit.embeddings.patch_embeddings.projection"),
        *_both("output_norm", "vit.layernorm"),
        *_both("output", "classifier"),
    ]
    attention = "attention.attention"
    layer = [
        *_both("attn_norm", "layernorm_before"),
        *(
            Name(f"attn_qkv.{kind}", f"{attention}.{part}.{kind}", third)
            for part, third in (("query", "first"), ("key", "second"), ("value", "third"))
            for kind in ("weight", "bias")
        ),
        *_both("attn_output", "attention.output.dense"),
        *_both("ffn_norm", "layernorm_after"),
        *_both("ffn_up", "intermediate.dense"),
        *_both("ffn_down", "output.dense"),
    ]
    return outside, layer


#: architecture -> (names outside the layers, names in a layer, where the layers are at Hugging Face)
TABLES = {
    "llama": (*_gated(rope=True, bias=False), "model.layers"),
    "qwen2": (*_gated(rope=False, bias=True), "model.layers"),
    "gpt2": (*_gpt2(), "transformer.h"),
    "vit": (*_vit(), "vit.encoder.layer"),
}


def names(arch: str, n_layer: int, tied: bool) -> Iterator[Name]:
    """Every tensor of a model, each once a part. `tied`: the head is the embeddings, and has no tensor of its own."""
    outside, layer, prefix = TABLES[arch]
    for name in outside:
        if not (tied and name.hf == "lm_head.weight"):
            yield name
    for i in range(n_layer):
        for name in layer:
            yield Name(f"blk.{i}.{name.gguf}", f"{prefix}.{i}.{name.hf}", name.rows)
