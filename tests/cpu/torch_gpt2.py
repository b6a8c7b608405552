"""A GPT-2 (Radford et al. 2019) in plain PyTorch, f32, by its GGUF names. The legend is in torch_llama.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as fn
from torch_llama import Array, Weights, attend, cross_entropy_sum


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    norm_eps: float


class Blocks(Weights):
    """What GPT-2 and a vision transformer share: pre-norm blocks, LayerNorm and GELU (tanh form), biases everywhere."""

    causal = True

    def norm(self, name: str, x: Tensor) -> Tensor:
        return fn.layer_norm(x, (x.shape[-1],), self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.shape.norm_eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def blocks(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> the same, normed at the end."""
        for i in range(self.shape.n_layer):
            block = f"blk.{i}"
            qkv = self.linear(f"{block}.attn_qkv", self.norm(f"{block}.attn_norm", x))
            q, k, v = (t.unflatten(-1, (self.shape.n_head, -1)) for t in qkv.chunk(3, -1))
            x = x + self.linear(f"{block}.attn_output", attend(q, k, v, self.causal))
            h = fn.gelu(self.linear(f"{block}.ffn_up", self.norm(f"{block}.ffn_norm", x)), approximate="tanh")
            x = x + self.linear(f"{block}.ffn_down", h)
        return self.norm("output_norm", x)


class Gpt2(Blocks):
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]; without output.weight the embeddings are the head."""
        x = self.blocks(self.w["token_embd.weight"][tokens] + self.w["position_embd.weight"][: tokens.shape[1]])
        return x @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def loss_sum(self, tokens: Array, labels: Array) -> Tensor:
        return cross_entropy_sum(self(torch.from_numpy(tokens.astype(np.int64))), labels)
