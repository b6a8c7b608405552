"""What a user would pick instead, at the shapes of bench.py: a llama in PyTorch with its fast paths (rms_norm, scaled
dot-product attention, fused AdamW, one clip), f32. Started by bench.py: a number of steps in, a line of JSON out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn


class Block(nn.Module):
    def __init__(self, shape: dict[str, int]) -> None:
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
        a = fn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
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

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        self.embd = nn.Embedding(shape["vocab_size"], shape["n_embd"])
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["n_layer"]))
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


def peak_resident() -> int:
    """VmHWM: the peak of this program alone (getrusage remembers the process that forked it)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(shape: dict[str, int], mode: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Llama(shape)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward: Any = torch.compile(model) if mode == "compile" else model
    size = (shape["batch"], shape["context"] + 1)
    batches = [torch.randint(shape["vocab_size"], size) for _ in range(8)]

    for line in sys.stdin:
        seconds = []
        for n in range(int(line)):
            begun = time.perf_counter()
            batch = batches[n % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            loss = forward(batch[:, :-1], batch[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss.item()
            seconds.append(time.perf_counter() - begun)
        answer = {
            "seconds": seconds,
            "peak_rss_bytes": peak_resident(),
            "parameters": sum(p.numel() for p in parameters),
            "version": torch.__version__,
        }
        print(json.dumps(answer), flush=True)


def gemm(threads: int, products: list[tuple[int, int, int]]) -> None:
    """GFLOP/s of f32 products C[m,n] = A[m,k] B[k,n] in the three layouts of a linear layer, as JSON lines."""
    torch.set_num_threads(threads)
    for m, k, n in products:
        for layout in ("nt", "nn", "tn"):
            a = torch.rand(k, m).T if layout == "tn" else torch.rand(m, k)
            b = torch.rand(n, k).T if layout == "nt" else torch.rand(k, n)
            best, end = float("inf"), time.perf_counter() + 0.5
            while time.perf_counter() < end:
                begun = time.perf_counter()
                a @ b
                best = min(best, time.perf_counter() - begun)
            print(json.dumps({"layout": layout, "m": m, "k": k, "n": n, "gflops": 2e-9 * m * k * n / best}), flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "gemm":
        gemm(int(words[1]), [tuple(map(int, word.split("x"))) for word in words[2:]])  # type: ignore[misc]
    else:
        main(json.loads(words[0]), words[1], int(words[2]))
