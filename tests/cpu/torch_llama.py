"""A llama in plain PyTorch, f32: the independent account of what toy computes. It takes weights by their GGUF names.

B sequences, T tokens of each, C n_embd, H query heads, K key/value heads, D = C/H head width, F n_ff, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    rope_freq_base: float
    norm_eps: float
    halves: bool = False  # rotate (i, i + D/2) as qwen2 does, not the neighbours (2i, 2i + 1)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def rope(x: Tensor, base: float, halves: bool) -> Tensor:
    """x [B, T, heads, D]: the i-th pair of position t turns by t base^(-2i/D) (Su et al., arXiv 2104.09864)."""
    n_pos, width = x.shape[1], x.shape[3]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(n_pos, dtype=torch.float64), frequency)[None, :, None, :]
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.chunk(2, -1) if halves else (x[..., 0::2], x[..., 1::2])
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """q, k, v [B, T, heads, D] -> [B, T, heads D]."""
    n_pos = q.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)


def parameters(weights: Mapping[str, Array], trains: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value), requires_grad=trains(name)) for name, value in weights.items()}


class Weights(nn.Module):
    """weights: GGUF name -> array, the slowest dimension first. `trains` tells by name what is not frozen."""

    def __init__(
        self, shape: Any, weights: Mapping[str, Array], trains: Callable[[str], bool] = lambda name: True
    ) -> None:
        super().__init__()
        self.shape = shape
        self.w = parameters(weights, trains)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.w.items() if p.requires_grad}


class Llama(Weights):
    """Without output.weight the embeddings are the head; biases are those that are there."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def attention(self, block: str, x: Tensor) -> Tensor:
        n_batch, n_pos, _ = x.shape
        s = self.shape
        q, k, v = (
            self.linear(f"{block}.attn_{name}", x).view(n_batch, n_pos, heads, -1)
            for name, heads in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv))
        )
        q, k = rope(q, s.rope_freq_base, s.halves), rope(k, s.rope_freq_base, s.halves)
        # each key head serves n_head/n_head_kv neighbouring query heads
        k, v = (t.repeat_interleave(s.n_head // s.n_head_kv, dim=2) for t in (k, v))
        return self.linear(f"{block}.attn_output", attend(q, k, v))

    def feed_forward(self, block: str, x: Tensor) -> Tensor:
        gate, up = (self.linear(f"{block}.ffn_{name}", x) for name in ("gate", "up"))
        return self.linear(f"{block}.ffn_down", fn.silu(gate) * up)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        eps = self.shape.norm_eps
        x = self.w["token_embd.weight"][tokens]
        for i in range(self.shape.n_layer):
            block = f"blk.{i}"
            x = x + self.attention(block, rms_norm(x, self.w[f"{block}.attn_norm.weight"], eps))
            x = x + self.feed_forward(block, rms_norm(x, self.w[f"{block}.ffn_norm.weight"], eps))
        x = rms_norm(x, self.w["output_norm.weight"], eps)
        return x @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def loss_sum(self, tokens: Array, labels: Array) -> Tensor:
        """Sum of the cross-entropies of all labels but the masked ones (-1)."""
        return cross_entropy_sum(self(torch.from_numpy(tokens.astype(np.int64))), labels)


def cross_entropy_sum(logits: Tensor, labels: Array) -> Tensor:
    """logits [..., V], labels [...]; -1 is masked."""
    wanted = torch.from_numpy(labels.astype(np.int64)).flatten()
    return fn.cross_entropy(logits.flatten(0, -2), wanted, ignore_index=-1, reduction="sum")
