"""A llama in plain PyTorch, f32: the independent account of what toy computes. It takes weights by their GGUF names.

B sequences, T tokens of each, C n_embd, H query heads, K key/value heads, D = C/H head width, F n_ff, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    rope_freq_base: float
    norm_eps: float


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def rope(x: Tensor, base: float) -> Tensor:
    """x [B, T, heads, D]: the pair (2i, 2i + 1) of position t turns by t base^(-2i/D) (Su et al., arXiv 2104.09864)."""
    n_pos, width = x.shape[1], x.shape[3]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(n_pos, dtype=torch.float64), frequency)[None, :, None, :]
    cos, sin = angle.cos().float(), angle.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Llama(nn.Module):
    """weights: GGUF name -> array, the slowest dimension first. Without output.weight the embeddings are the head."""

    def __init__(self, shape: Shape, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        super().__init__()
        self.shape = shape
        self.w = {name: nn.Parameter(torch.tensor(value)) for name, value in weights.items()}

    def attention(self, block: str, x: Tensor) -> Tensor:
        n_batch, n_pos, _ = x.shape
        s = self.shape
        q, k, v = (
            (x @ self.w[f"{block}.attn_{name}.weight"].T).view(n_batch, n_pos, heads, -1)
            for name, heads in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv))
        )
        q, k = rope(q, s.rope_freq_base), rope(k, s.rope_freq_base)
        # each key head serves n_head/n_head_kv neighbouring query heads
        k, v = (t.repeat_interleave(s.n_head // s.n_head_kv, dim=2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
        return out @ self.w[f"{block}.attn_output.weight"].T

    def feed_forward(self, block: str, x: Tensor) -> Tensor:
        gate, up, down = (self.w[f"{block}.ffn_{name}.weight"] for name in ("gate", "up", "down"))
        return (fn.silu(x @ gate.T) * (x @ up.T)) @ down.T

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

    def loss_sum(self, tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Tensor:
        """Sum of the cross-entropies of all labels but the masked ones (-1)."""
        logits = self(torch.from_numpy(tokens.astype(np.int64)))
        wanted = torch.from_numpy(labels.astype(np.int64))
        return fn.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")


def learning_rate(train: Any, step: int) -> float:
    """Of step 1..steps: linear warm-up, then constant; cosine or linear down to the minimum at the last step; wsd:
    constant, then linear over the last fifth of what comes after the warm-up."""
    high, low, warmup = train.learning_rate, train.min_learning_rate, train.warmup_steps
    if step <= warmup:
        return float(high * step / warmup)
    done = (step - warmup) / (train.steps - warmup)
    falling = {
        "constant": 0.0,
        "cosine": (1 - math.cos(math.pi * done)) / 2,
        "linear": done,
        "wsd": max(0.0, (done - 0.8) / 0.2),
    }[train.schedule]
    return float(high + (low - high) * falling)


class Trainer:
    """AdamW with two groups (matrices decay, embeddings among them; norms do not), the global norm clipped."""

    def __init__(self, model: Llama, train: Any) -> None:
        self.model, self.train, self.steps_done = model, train, 0
        matrices = [p for p in model.w.values() if p.dim() > 1]
        vectors = [p for p in model.w.values() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)

    def gradients(self, batches: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> float:
        """Loss and gradients of one step's micro-batches, divided once by the step's unmasked tokens."""
        n_labels = sum(int((labels >= 0).sum()) for _, labels in batches)
        self.optimizer.zero_grad()
        total = 0.0
        for tokens, labels in batches:
            loss = self.model.loss_sum(tokens, labels) / n_labels
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def step(self, batches: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> float:
        loss = self.gradients(batches)
        self.steps_done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.steps_done)
        if self.train.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.w.values(), self.train.grad_clip)
        self.optimizer.step()
        return loss
