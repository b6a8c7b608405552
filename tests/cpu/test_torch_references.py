"""The PyTorch models that judge toy, judged by transformers: the same logits from the same random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf_files import RandomModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

C, F, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT, EPS = 24, 40, 2, 3, 1, 50, 17, 3e-4


def randomise(model: Any) -> Any:
    random = np.random.RandomState(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.tensor(0.3 * random.standard_normal(p.shape), dtype=torch.float32))
    return model.eval()


def tokens() -> Any:
    return torch.tensor(np.random.RandomState(6).randint(0, VOCABULARY, (3, CONTEXT)))


def same(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=2e-4, atol=2e-4)
    assert theirs.std() > 0.1


def block_names(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{i}.{theirs}": f"blk.{i}.{ours}" for i in range(LAYERS) for theirs, ours in names.items()}


def gguf_weights(model: Any, names: dict[str, str], transposed: bool = False) -> dict[str, Any]:
    """transposed: theirs are Conv1D, [n_in, n_out]."""
    state = model.state_dict()
    found = {}
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in state:
                value = state[f"{theirs}.{part}"]
                turn = transposed and value.dim() == 2 and ours.startswith("blk.")
                found[f"{ours}.{part}"] = np.ascontiguousarray((value.T if turn else value).numpy())
    return found


def test_gpt2() -> None:
    from torch_gpt2 import Gpt2, Shape

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=C, n_layer=LAYERS, n_head=HEADS, n_inner=F,
        layer_norm_epsilon=EPS, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    names = block_names("transformer.h", {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }) | {
        "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    }  # fmt: skip
    ours = Gpt2(Shape(LAYERS, C, HEADS, EPS), gguf_weights(theirs, names, transposed=True))
    same(ours(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_llama_and_qwen2(arch: str) -> None:
    """llama's GGUFs hold rotary pairs side by side; Hugging Face's rotate halves, so rows of q and k are reordered."""
    from torch_llama import Llama, Shape

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[arch]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=C, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT, rms_norm_eps=EPS,
        tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = randomise(model_class(config))
    names = block_names("model.layers", {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }) | {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
    weights = gguf_weights(theirs, names)
    assert ("blk.0.attn_q.bias" in weights) is (arch == "qwen2")
    if arch == "llama":
        for i in range(LAYERS):
            for name, heads in (("q", HEADS), ("k", KV_HEADS)):
                w = weights[f"blk.{i}.attn_{name}.weight"]
                weights[f"blk.{i}.attn_{name}.weight"] = w.reshape(heads, 2, -1, C).swapaxes(1, 2).reshape(w.shape)
    shape = Shape(LAYERS, C, HEADS, KV_HEADS, 500.0, EPS, halves=arch == "qwen2")
    same(Llama(shape, weights)(tokens()), theirs(tokens()).logits)


def test_vit() -> None:
    from torch_gpt2 import Shape
    from torch_vit import Vit, patches_of

    size, patch, channels = 12, 4, 3
    config = transformers.ViTConfig(
        hidden_size=C, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=F,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=EPS, image_size=size, patch_size=patch, num_channels=channels,
        num_labels=7, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomise(transformers.ViTForImageClassification(config))
    names = block_names("vit.layers", {
        "layernorm_before": "attn_norm", "attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v",
        "attention.o_proj": "attn_output", "layernorm_after": "ffn_norm", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    }) | {
        "vit.embeddings.patch_embeddings.projection": "patch_embd", "vit.layernorm": "output_norm",
        "classifier": "output",
    }  # fmt: skip
    weights = gguf_weights(theirs, names)
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            qkv = [weights.pop(f"blk.{i}.{x}.{kind}") for x in "qkv"]
            weights[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(qkv)
    weights["patch_embd.weight"] = weights["patch_embd.weight"].reshape(C, -1)
    embeddings = theirs.vit.embeddings
    weights["cls_embd.weight"] = embeddings.cls_token.detach().numpy().ravel()
    weights["position_embd.weight"] = embeddings.position_embeddings.detach().numpy()[0]
    images = np.random.RandomState(8).standard_normal((3, channels, size, size)).astype(np.float32)
    ours = Vit(Shape(LAYERS, C, HEADS, EPS), weights)
    same(ours(torch.from_numpy(patches_of(images, patch))), theirs(torch.from_numpy(images)).logits)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_an_adapter_is_a_change_of_its_matrices(arch: str) -> None:
    """With alpha/r B A added to the weights, the base alone computes the same."""
    from torch_llama import Llama, Shape
    from torch_lora import Lora

    model = RandomModel(arch=arch, vocab_size=VOCABULARY)
    base = {name: values for name, (_, values) in model.tensors().items()}
    shape = Shape(2, 32, 4, 2, 10000.0, 1e-5, halves=arch == "qwen2")
    random, adapters, merged = np.random.RandomState(9), {}, dict(base)
    for name, value in base.items():
        if "attn_q.weight" in name or "ffn_down" in name:
            shapes = (3, value.shape[1]), (value.shape[0], 3)
            a, b = (random.standard_normal(shape).astype(np.float32) / 4 for shape in shapes)
            adapters |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            merged[name] = value + 6 / 3 * b @ a
    same(Lora(shape, base, adapters, alpha=6, trains=lambda name: True)(tokens()), Llama(shape, merged)(tokens()))
