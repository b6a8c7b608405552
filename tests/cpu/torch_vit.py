"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) in plain PyTorch, f32, by toy's GGUF names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch_gpt2 import Blocks
from torch_llama import Array, cross_entropy_sum


def patches_of(images: Array, patch: int) -> Array:
    """[B, channels, height, width] -> [B, patches row by row, a patch's values: column fastest, then row, channel]."""
    n, channels, height, width = images.shape
    grid = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    return np.asarray(grid.transpose(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * patch * patch))


class Vit(Blocks):
    """With cls_embd.weight the class token, put first, is read; otherwise the mean of the patches."""

    causal = False

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, T, P P channels] -> logits [B, classes]."""
        x = self.linear("patch_embd", patches)
        has_class_token = "cls_embd.weight" in self.w
        if has_class_token:
            x = torch.cat((self.w["cls_embd.weight"].expand(len(x), 1, -1), x), dim=1)
        x = self.blocks(x + self.w["position_embd.weight"])
        return self.linear("output", x[:, 0] if has_class_token else x.mean(1))

    def loss_sum(self, patches: Array, labels: Array) -> Tensor:
        return cross_entropy_sum(self(torch.from_numpy(patches.astype(np.float32))), labels)
