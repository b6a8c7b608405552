"""The cases in which toy and PyTorch are compared, and the files that stand in for PyTorch where it is not installed.

A dump holds, per case, the losses of PyTorch and of each step-1 gradient its norm and some projections; the initial
weights and the batches come from toy itself, which makes them from the seed, and the dump knows their hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import EXCERPT, config_kv

Array = np.ndarray[Any, Any]
Batch = tuple[Array, Array]

REFERENCE = Path(__file__).parent / "reference"
N_STEPS = 50
#: Sign projections kept of each gradient: their mean square estimates a squared distance to within a third.
N_PROJECTIONS = 16


@dataclass(frozen=True)
class Case:
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def kv(self) -> str:
        return config_kv(model=self.model, train=self.train, data={"val_fraction": 0.1})

    @property
    def knobs(self) -> Any:
        """The same as `kv`, resolved, as attributes."""
        from toy.config import Config, resolve

        values: dict[str, dict[str, str]] = {}
        for line in self.kv.splitlines():
            key, value = line.split("=", 1)
            section, name = key.split(".")
            values.setdefault(section, {})[name] = value
        return resolve(Config.model_validate(values, strict=False))


CASES = [
    Case("multi-head", {"n_head_kv": 4}, {"batch": 1}),
    Case("grouped-query", {"n_head_kv": 2}, {"batch": 1}),
    Case("one-key-head", {"n_head_kv": 1}, {"batch": 3, "schedule": "linear"}),
    Case("grouped-query-batch", {"n_head_kv": 2}, {"batch": 4}),
    Case("multi-head-batch-untied", {"n_head_kv": 4, "tie_embeddings": False}, {"batch": 4, "schedule": "constant"}),
    Case("accumulated-untied", {"tie_embeddings": False}, {"batch": 4, "micro_batch": 1, "schedule": "wsd"}),
    Case("accumulated", {}, {"batch": 8, "micro_batch": 2}),
    # sizes that are no multiple of a vector register or of a matrix tile, and knobs away from their defaults
    Case(
        "odd-sizes",
        {
            "n_layer": 3, "n_embd": 42, "n_head": 7, "n_head_kv": 7, "n_ff": 51, "vocab_size": 77, "context": 19,
            "rope_freq_base": 500.0, "norm_eps": 1e-3, "init_std": 0.05,
        },
        {
            "batch": 5, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "grad_clip": 0.5,
            "warmup_steps": 0,
        },
    ),
]  # fmt: skip


def write_tokens(path: Path, vocab_size: int = 64) -> Path:
    """Packed tokens with structure to learn: bytes of Shakespeare, folded into the vocabulary."""
    text = np.frombuffer(EXCERPT.read_bytes(), dtype=np.uint8)
    (text.astype("<i4") % vocab_size).tofile(path)
    return path


def trainer(case: Case, tokens: Path) -> Any:
    from toy import _native

    return _native.Trainer(case.kv, str(tokens))


def step_batches(case: Case, tokens: Path) -> Iterable[list[Batch]]:
    """The micro-batches of every step, as a training of this case reads them."""
    reader = trainer(case, tokens)
    rounds = case.knobs.train.batch // case.knobs.train.micro_batch
    while True:
        yield [reader.next_batch() for _ in range(rounds)]


def inputs_hash(weights: dict[str, Array], first: list[Batch]) -> str:
    total = hashlib.sha256()
    for name, value in weights.items():
        total.update(name.encode() + np.ascontiguousarray(value, dtype="<f4").tobytes())
    for batch_tokens, labels in first:
        total.update(batch_tokens.astype("<i4").tobytes() + labels.astype("<i4").tobytes())
    return total.hexdigest()


def projections(value: Array, name: str) -> Array:
    """value . s_i for N_PROJECTIONS vectors s_i of signs; the bits of SHAKE-256 over the tensor's name."""
    n = value.size
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest((n * N_PROJECTIONS + 7) // 8), dtype=np.uint8)
    signs = np.unpackbits(bits)[: n * N_PROJECTIONS].reshape(N_PROJECTIONS, n).astype(np.float64) * 2 - 1
    return np.asarray(signs @ value.astype(np.float64).ravel())


@dataclass
class Reference:
    """What PyTorch says of a case, live or from a file."""

    inputs: str
    losses: list[float]
    norms: dict[str, float]
    projections: dict[str, list[float]]
    gradients: dict[str, Array] | None = None  # live only

    def write(self, path: Path) -> None:
        document = {
            "inputs": self.inputs,
            "losses": [round(loss, 7) for loss in self.losses],
            "norms": {name: float(f"{norm:.6g}") for name, norm in self.norms.items()},
            "projections": {name: [float(f"{x:.6g}") for x in xs] for name, xs in self.projections.items()},
        }
        rows = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in document.items())
        path.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Reference:
        return Reference(**json.loads(path.read_text(encoding="utf-8")))

    def gradient_error(self, name: str, ours: Array) -> float:
        """Norm of the difference over the norm of PyTorch's gradient; estimated where only projections are known."""
        if self.gradients is not None:
            theirs = self.gradients[name]
            return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))
        distance = projections(ours, name) - np.asarray(self.projections[name])
        return float(np.sqrt(np.mean(distance**2)) / self.norms[name])


def run_torch(case: Case, tokens: Path) -> Reference:
    """Train the case in PyTorch from toy's initial weights on toy's batches."""
    import torch
    import torch_llama

    torch.set_num_threads(1)
    knobs = case.knobs
    m = knobs.model
    weights = trainer(case, tokens).weights()
    shape = torch_llama.Shape(m.n_layer, m.n_embd, m.n_head, m.n_head_kv, m.rope_freq_base, m.norm_eps)
    model = torch_llama.Llama(shape, weights)
    steps = iter(step_batches(case, tokens))
    first = next(steps)

    reference = torch_llama.Trainer(model, knobs.train)
    losses = [reference.gradients(first)]
    gradients = {name: p.grad.numpy().astype(np.float64) for name, p in model.w.items() if p.grad is not None}
    reference.step(first)
    losses += [reference.step(next(steps)) for _ in range(N_STEPS - 1)]
    return Reference(
        inputs_hash(weights, first),
        losses,
        {name: float(np.linalg.norm(g)) for name, g in gradients.items()},
        {name: projections(g, name).tolist() for name, g in gradients.items()},
        gradients,
    )
