"""What a user would pick instead, with PyTorch's fast paths: a llama and its LoRA by peft, a GPT-2, a vision
transformer, and nanoGPT's model. `make` gives a Task of any shape of shapes.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

Shape = dict[str, Any]  # shapes.Shape.values()


@dataclass
class Task:
    """A model whose forward pass is its loss, its optimizer, and batches without end."""

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], tuple[Tensor, Tensor]]
    version: str = torch.__version__


# --- llama ----------------------------------------------------------------------------------------------------------


class LlamaBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads, self.kv_heads = shape["n_embd"], shape["n_head"], shape["n_head_kv"]
        self.head = width // self.heads
        self.q = nn.Linear(width, self.heads * self.head, bias=False)
        self.k = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.v = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.o = nn.Linear(self.heads * self.head, width, bias=False)
        self.gate = nn.Linear(width, shape["n_ff"], bias=False)
        self.up = nn.Linear(width, shape["n_ff"], bias=False)
        self.down = nn.Linear(shape["n_ff"], width, bias=False)
        self.attn_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_batch, n_pos, _ = x.shape
        h = self.attn_norm(x)
        q = rotate(self.q(h).view(n_batch, n_pos, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(n_batch, n_pos, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = self.v(h).view(n_batch, n_pos, self.kv_heads, self.head).transpose(1, 2)
        # under autocast the products are bf16 and the rotation f32: attention takes one type
        a = fn.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.o(a.transpose(1, 2).reshape(n_batch, n_pos, -1))
        h = self.ffn_norm(x)
        out: Tensor = x + self.down(fn.silu(self.gate(h)) * self.up(h))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)  # halves, not neighbours: the faster layout, and the same work
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embd = nn.Embedding(shape["vocab_size"], shape["n_embd"])
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape["n_layer"]))
        self.norm = nn.RMSNorm(shape["n_embd"], eps=1e-5)
        head = shape["n_embd"] // shape["n_head"]
        frequency = 10000.0 ** (-torch.arange(0, head, 2) / head)
        angle = torch.outer(torch.arange(shape["context"]).float(), frequency)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        nn.init.normal_(self.embd.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embd(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = fn.linear(self.norm(x), self.embd.weight)
        return fn.cross_entropy(logits.flatten(0, 1), labels.flatten())


# --- GPT-2 and the vision transformer: LayerNorm, GELU, biases -------------------------------------------------------


class GeluBlock(nn.Module):
    def __init__(self, shape: Shape, causal: bool, bias: bool = True, approximate: str = "none") -> None:
        super().__init__()
        width, self.heads, self.causal, self.approximate = shape["n_embd"], shape["n_head"], causal, approximate
        self.attn_norm = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)
        self.ffn_norm = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, shape["n_ff"], bias=bias)
        self.down = nn.Linear(shape["n_ff"], width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n_batch, n_pos, width = x.shape
        q, k, v = (
            t.view(n_batch, n_pos, self.heads, width // self.heads).transpose(1, 2)
            for t in self.qkv(self.attn_norm(x)).split(width, dim=2)
        )
        a = fn.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(a.transpose(1, 2).reshape(n_batch, n_pos, width))
        h = fn.gelu(self.up(self.ffn_norm(x)), approximate=self.approximate)
        out: Tensor = x + self.down(h)
        return out


def init_gpt2(model: nn.Module, n_layer: int) -> None:
    """GPT-2's initialization, as nanoGPT has it."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            deep = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if deep else 0.02)


class Gpt2(nn.Module):
    """GPT-2 (tanh GELU); with `nanogpt`, the model of nanoGPT's model.py: no biases, exact GELU."""

    positions: Tensor

    def __init__(self, shape: Shape, nanogpt: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape["vocab_size"], shape["n_embd"])
        self.wpe = nn.Embedding(shape["context"], shape["n_embd"])
        how: dict[str, Any] = {"bias": False} if nanogpt else {"approximate": "tanh"}
        self.blocks = nn.ModuleList(GeluBlock(shape, True, **how) for _ in range(shape["n_layer"]))
        self.norm = nn.LayerNorm(shape["n_embd"], bias=not nanogpt)
        self.register_buffer("positions", torch.arange(shape["context"]))
        init_gpt2(self, shape["n_layer"])

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(self.positions)
        for block in self.blocks:
            x = block(x)
        logits = fn.linear(self.norm(x), self.wte.weight)
        return fn.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Vit(nn.Module):
    """ViT as it was published: patches by a convolution, a class token, exact GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, patch = shape["n_embd"], shape["patch_size"]
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, shape["context"], width))
        self.blocks = nn.ModuleList(GeluBlock(shape, False) for _ in range(shape["n_layer"]))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape["vocab_size"])

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1).to(x.dtype), x), dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return fn.cross_entropy(self.head(self.norm(x[:, 0])), labels)


# --- tasks ----------------------------------------------------------------------------------------------------------


def token_batches(shape: Shape) -> Callable[[int], tuple[Tensor, Tensor]]:
    ids = [torch.randint(shape["vocab_size"], (shape["batch"], shape["context"] + 1)) for _ in range(8)]
    return lambda n: (ids[n % 8][:, :-1], ids[n % 8][:, 1:])


def nanogpt_batches(shape: Shape) -> Callable[[int], tuple[Tensor, Tensor]]:
    """get_batch of nanoGPT's train.py: 16-bit ids, windows at random."""
    data, length = (
        np.random.default_rng(0).integers(shape["vocab_size"], size=1_000_000, dtype=np.uint16),
        shape["context"],
    )

    def batch(_: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(data) - length, (shape["batch"],))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in at])
        return x, y

    return batch


def image_batches(shape: Shape) -> Callable[[int], tuple[Tensor, Tensor]]:
    size = (shape["batch"], 3, shape["image_size"], shape["image_size"])
    images = [(torch.randn(size), torch.randint(shape["vocab_size"], (shape["batch"],))) for _ in range(4)]
    return lambda n: images[n % 4]


def adapted(shape: Shape) -> tuple[nn.Module, str]:
    """A frozen llama with peft's low-rank adapters at every matrix of its blocks; peft's version."""
    import peft

    names = ["q", "k", "v", "o", "gate", "up", "down"]
    how = peft.LoraConfig(r=shape["rank"], lora_alpha=2 * shape["rank"], lora_dropout=0.0, target_modules=names)
    return peft.inject_adapter_in_model(how, Llama(shape)), peft.__version__


def make(shape: Shape) -> Task:
    kind, version = shape["kind"], f"PyTorch {torch.__version__}"
    batch = token_batches(shape)
    if kind == "vit":
        model, batch = Vit(shape), image_batches(shape)
    elif kind == "nanogpt":
        model, batch = Gpt2(shape, nanogpt=True), nanogpt_batches(shape)
    elif kind == "gpt2":
        model = Gpt2(shape)
    elif kind == "lora":
        model, peft = adapted(shape)
        version += f", peft {peft}"
    else:
        model = Llama(shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta2 = 0.99 if kind == "nanogpt" else 0.95
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, betas=(0.9, beta2), fused=True)
    return Task(model, parameters, optimizer, batch, version)
