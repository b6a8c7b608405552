"""How toy trains, in plain PyTorch: learning rates, AdamW with its groups, accumulation over a step's micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, Any]

#: What train.embedding_lr_scale applies to.
EMBEDDINGS = ("token_embd.weight", "position_embd.weight")


class Model(Protocol):
    @property
    def trainable(self) -> Mapping[str, nn.Parameter]: ...

    def loss_sum(self, inputs: Array, labels: Array) -> Tensor:
        """Sum of the cross-entropies of all labels but the masked ones (-1)."""


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
    """AdamW: matrices decay, embeddings among them; norms, biases and other vectors do not; embeddings have a learning
    rate of their own. The global norm is clipped."""

    def __init__(self, model: Model, train: Any) -> None:
        self.model, self.train, self.steps_done = model, train, 0
        groups = []
        for is_embedding in (False, True):
            for is_matrix in (False, True):
                params = [
                    p for name, p in model.trainable.items()
                    if (name in EMBEDDINGS, p.dim() > 1) == (is_embedding, is_matrix)
                ]  # fmt: skip
                if params:
                    scale = train.embedding_lr_scale if is_embedding else 1.0
                    decay = train.weight_decay if is_matrix else 0.0
                    groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
        self.optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)

    def gradients(self, batches: list[tuple[Array, Array]]) -> float:
        """Loss and gradients of one step's micro-batches, divided once by the step's unmasked labels."""
        n_labels = sum(int((labels >= 0).sum()) for _, labels in batches)
        self.optimizer.zero_grad()
        total = 0.0
        for inputs, labels in batches:
            loss = self.model.loss_sum(inputs, labels) / n_labels
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def step(self, batches: list[tuple[Array, Array]]) -> float:
        loss = self.gradients(batches)
        self.steps_done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.steps_done) * group["lr_scale"]
        if self.train.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.trainable.values(), self.train.grad_clip)
        self.optimizer.step()
        return loss
