"""Low-rank adapters (Hu et al., arXiv 2106.09685) over the frozen llama of torch_llama.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch_llama import Array, Llama, Shape, parameters


class Lora(Llama):
    """y = W x + b + alpha/r B A x. adapters: <base tensor>.lora_a [r, n_in] and <base tensor>.lora_b [n_out, r].
    `trains` tells by name which of them are not frozen."""

    def __init__(
        self,
        shape: Shape,
        base: Mapping[str, Array],
        adapters: Mapping[str, Array],
        alpha: float,
        trains: Callable[[str], bool],
    ) -> None:
        super().__init__(shape, base, trains=lambda name: False)
        self.adapters = parameters(adapters, trains)
        self.alpha = alpha

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.adapters.items() if p.requires_grad}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = super().linear(name, x)
        a = self.adapters.get(f"{name}.weight.lora_a")
        if a is None:
            return y
        b = self.adapters[f"{name}.weight.lora_b"]
        return y + (self.alpha / a.shape[0] * (x @ a.T)) @ b.T  # scaled where toy does: bf16 rounds what comes of it
