"""The products of the PyTorch references in bf16, as train.dtype=bf16 has them: both sides of a product are rounded,
its sums are f32, and its gradients are such products too."""

from __future__ import annotations

import math
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


class Scores(torch.autograd.Function):
    """q [b, t, h, d], k [b, s, h, d] -> their dot products [b, h, t, s], to be divided by sqrt(d): that is in q when it
    is rounded, with log2(e) for the scores, and the gradient of the scores themselves is rounded."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.root = math.sqrt(q.shape[-1])
        log2_e = math.log2(math.e)
        powers, q, k = rounded(q * (log2_e / ctx.root)), rounded(q / ctx.root), rounded(k)
        ctx.save_for_backward(q, k)
        return EINSUM("bthd,bshd->bhts", powers, k) * (ctx.root / log2_e)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k = ctx.saved_tensors
        d = rounded(d * ctx.root)
        return EINSUM("bhts,bshd->bthd", d, k) / ctx.root, EINSUM("bhts,bthd->bshd", d, q)


class Softmax(torch.autograd.Function):
    """Of the scores; what Weighted hands back has the mean over the row taken off already."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        p = scores.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.saved_tensors[0] * d


class Weighted(torch.autograd.Function):
    """p [b, h, t, s], v [b, s, h, d] -> [b, t, h, d]. Forward p is rounded before its row is divided by the sum of it,
    where the largest one is 1; backward it is a probability."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, v: Tensor) -> Tensor:
        top, v = p.amax(-1, keepdim=True), rounded(v)
        out = EINSUM("bhts,bshd->bthd", rounded(p / top) * top, v)
        ctx.save_for_backward(p, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        p, v, out = ctx.saved_tensors
        d = rounded(d)
        mean = (d * out).sum(-1).transpose(1, 2)[..., None]
        return EINSUM("bthd,bshd->bhts", d, v) - mean, EINSUM("bhts,bthd->bshd", rounded(p), d)


EINSUM = torch.einsum
PRODUCTS = {"bthd,bshd->bhts": Scores, "bhts,bshd->bthd": Weighted}


class Bf16(TorchFunctionMode):
    """Every `@` is such a product, and every einsum: the references write those of weights and of attention so."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.matmul, Tensor.__matmul__):
            return Product.apply(*args)  # type: ignore[no-untyped-call]
        if func is torch.einsum:
            return PRODUCTS[args[0]].apply(*args[1:])  # type: ignore[no-untyped-call]
        if func is Tensor.softmax:
            return Softmax.apply(args[0])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
