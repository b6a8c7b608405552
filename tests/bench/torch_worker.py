"""PyTorch's side, a process that bench.py starts and that waits, idle, while the others have their turn.

torch_worker.py train SHAPE MODE DTYPE THREADS DEVICE    a number of steps a line in, seconds a step and peak memory out
torch_worker.py gemm DTYPE THREADS SECONDS DEVICE        m k n a line in, GFLOP/s of the three layouts out
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


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


def fast_paths(dtype: str) -> None:
    """What makes a GPU fast. Attention is fused, or there is an error: never a slow one in silence."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_math_sdp(dtype != "bf16")


def train(shape: dict[str, Any], mode: str, dtype: str, device: str) -> None:
    from torch_models import make

    torch.manual_seed(0)
    with torch.device(device):
        task = make(shape)
    if device != "cpu" and dtype == "bf16":  # a base that stays frozen is loaded in bf16 there
        for p in task.model.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    forward: Any = torch.compile(task.model) if mode == "compile" else task.model
    for line in sys.stdin:
        seconds = []
        for n in range(int(line)):
            begun = time.perf_counter()
            x, y = (t.to(device) for t in task.batch(n))
            task.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
                loss = forward(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(task.parameters, 1.0)
            task.optimizer.step()
            loss.item()
            seconds.append(time.perf_counter() - begun)
        answer = {
            "seconds": seconds,
            "peak_bytes": peak_resident() if device == "cpu" else torch.cuda.max_memory_reserved(),
            "parameters": sum(p.numel() for p in task.parameters),
            "version": task.version,
        }
        print(json.dumps(answer), flush=True)


def gemm(dtype: str, seconds: float, device: str) -> None:
    """Products C[m,n] = A[m,k] B[k,n] in the three layouts of a linear layer: y = x W', dx = dy W, dW = dy' x."""
    kind = DTYPES[dtype]
    at_once = 1 if device == "cpu" else 20  # products a look at the clock: starting one takes longer than it computes
    for line in sys.stdin:
        m, k, n = map(int, line.split())
        found = {}
        for layout in ("nt", "nn", "tn"):
            with torch.device(device):
                a = torch.rand(k, m).to(kind).T if layout == "tn" else torch.rand(m, k).to(kind)
                b = torch.rand(n, k).to(kind).T if layout == "nt" else torch.rand(k, n).to(kind)
            best, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end:
                begun = time.perf_counter()
                for _ in range(at_once):
                    a @ b
                if device != "cpu":
                    torch.cuda.synchronize()
                best = min(best, (time.perf_counter() - begun) / at_once)
            found[layout] = 2e-9 * m * k * n / best
        print(json.dumps(found), flush=True)


def main(words: list[str]) -> None:
    *_, device = words
    dtype, threads = (words[1], words[2]) if words[0] == "gemm" else (words[3], words[4])
    torch.set_num_threads(int(threads))
    if device != "cpu":
        fast_paths(dtype)
    if words[0] == "gemm":
        gemm(dtype, float(words[3]), device)
    else:
        train(json.loads(words[1]), words[2], dtype, device)


if __name__ == "__main__":
    main(sys.argv[1:])
