"""The products of the PyTorch references in bf16, as train.dtype=bf16 has them: both sides of a product are rounded,
its sums are f32, and its gradients are such products too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class Product(torch.autograd.Function):
    """x [..., n] @ w [n, m]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        dy = rounded(dy)
        return dy @ rounded(w).T, rounded(x).flatten(0, -2).T @ dy.flatten(0, -2)


class Bf16(TorchFunctionMode):
    """Every `@` is such a product: the references write products with weights so, and attention as einsum."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.matmul, Tensor.__matmul__):
            return Product.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
