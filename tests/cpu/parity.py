"""The cases in which toy and PyTorch are compared, and the files that stand in for PyTorch where it is not installed.

A dump holds, per case, the losses of PyTorch and of each step-1 gradient its norm and some projections; the initial
weights and the batches come from toy itself, which makes them from the seed, and the dump knows their hash.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import RandomModel, read
from harness import config_kv
from packed_data import patterned_images, ragged_examples, write_examples, write_images, write_tokens

Array = np.ndarray[Any, Any]
Batch = tuple[Array, Array]

REFERENCE = Path(__file__).parent / "reference"
N_STEPS = 50
#: Sign projections kept of each gradient: their mean square estimates a squared distance to within a third.
N_PROJECTIONS = 16
#: Of the images of a vit case; the last tenth validates.
N_IMAGES = 90

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed; the committed dumps are checked instead"
)


@dataclass(frozen=True)
class Case:
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    arch: str = "llama"
    recipe: str = "from-scratch"
    data: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    base: RandomModel | None = None  # what lora adapts, what warm-start begins with
    examples: bool = False  # learn the answers of ragged examples, not windows of a text
    dumped: bool = False  # has a file under reference/

    @property
    def kv(self) -> str:
        model = dict(self.model)
        if self.base is not None:
            shared = ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ff", "vocab_size", "rope_freq_base", "norm_eps")
            model = {key: value for key, value in asdict(self.base).items() if key in shared} | model
            model.setdefault("tie_embeddings", self.base.tied)
        if self.arch == "vit":
            n_patches = (model["image_size"] // model["patch_size"]) ** 2
            context = n_patches + (model.get("pool", "cls") == "cls")
            model = {"n_head_kv": 0, "vocab_size": 0, "context": context} | model
        if self.arch == "gpt2":
            model = model | {"n_head_kv": 0}
        return config_kv(
            run={"recipe": self.recipe, "arch": self.arch},
            model=model,
            train=self.train,
            data={"val_fraction": 0.1} | self.data,
            lora=self.lora,
            eval=self.eval,
        )

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

    def env(self, folder: Path) -> dict[str, str]:
        """The case's files under `folder`, as a runner's environment names them."""
        folder = folder / self.name
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        m = self.knobs.model
        if self.arch == "vit":
            images, labels = patterned_images(N_IMAGES, m.n_class, m.image_size, m.n_channel)
            return {"IMG_DIR": str(write_images(folder, images, labels, m.n_class))}
        if self.examples:
            env = write_examples(folder, ragged_examples(150, m.context, m.vocab_size))
        else:
            env = {"CORPUS": str(write_tokens(folder / "tokens.bin", m.vocab_size))}
        if self.base is not None:
            if is_new:
                self.base.write(folder / "base.gguf")
            env |= {"GGUF": str(folder / "base.gguf"), "INIT": m.init}
        return env

    def is_frozen(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.knobs.train.freeze.split(",") if pattern)


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

GPT2_CASES = [
    Case("gpt2", arch="gpt2", dumped=True),
    Case("gpt2-untied", {"tie_embeddings": False}, {"batch": 3, "schedule": "linear"}, arch="gpt2"),
    Case("gpt2-accumulated", {}, {"batch": 6, "micro_batch": 2, "schedule": "wsd"}, arch="gpt2"),
    Case(
        "gpt2-odd-sizes",
        {"n_layer": 3, "n_embd": 39, "n_head": 3, "n_ff": 53, "vocab_size": 71, "context": 21, "norm_eps": 1e-3},
        {"batch": 5, "micro_batch": 1, "grad_clip": 0.5, "warmup_steps": 0, "embedding_lr_scale": 0.5},
        arch="gpt2", dumped=True,
    ),
]  # fmt: skip


def vit_case(name: str, model: dict[str, Any], train: dict[str, Any], dumped: bool = False) -> Case:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_ff": 64, "image_size": 12, "patch_size": 4, "n_channel": 1,
             "n_class": 5}  # fmt: skip
    return Case(name, shape | model, train, arch="vit", recipe="vit-tiny", dumped=dumped)


VIT_CASES = [
    vit_case("vit", {}, {"batch": 8}, dumped=True),
    vit_case("vit-mean", {"pool": "mean", "n_channel": 3}, {"batch": 8, "micro_batch": 4, "schedule": "wsd"}),
    vit_case("vit-one", {"n_layer": 1}, {"batch": 1, "schedule": "constant"}),
    vit_case(
        "vit-odd-sizes",
        {"n_embd": 39, "n_head": 3, "n_ff": 53, "image_size": 15, "patch_size": 5, "n_channel": 3, "n_class": 11,
         "pool": "mean"},
        {"batch": 7, "weight_decay": 0.3, "grad_clip": 0.5, "warmup_steps": 0}, dumped=True,
    ),
]  # fmt: skip

#: Wide enough for a block of 256 values in every row.
WIDE = {"n_layer": 1, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 512}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def lora_case(name: str, base: RandomModel, lora: dict[str, Any] | None = None, **more: Any) -> Case:
    lora = {"rank": 4, "alpha": 6.0} | (lora or {})
    return Case(name, recipe="lora", base=base, lora=lora, **({"train": {"batch": 2}} | more))


LORA_CASES = [
    *(lora_case(f"lora-{kind}", RandomModel(kind=kind, **WIDE)) for kind in KINDS),
    # as real files are: several types, an untied head
    lora_case(
        "lora-mixed", RandomModel(kind="Q4_K", special={"ffn_down": "Q6_K", "token_embd": "Q8_0", "attn_v": "F16"},
                                  tied=False, **WIDE),
        {"rank": 3, "alpha": 3.0}, train={"batch": 4, "micro_batch": 2, "schedule": "wsd"},
    ),
    lora_case("lora-qwen2", RandomModel("qwen2"), dumped=True),
    lora_case(
        "lora-qwen2-Q4_0", RandomModel("qwen2", kind="Q4_0", special={"ffn_down": "Q8_0"}, tied=False),
        {"targets": "attn_q,attn_v,ffn_down"}, examples=True, train={"batch": 3, "grad_clip": 0.5},
    ),
    # one block's adapter as it begins, and the first factor of some of the others
    lora_case("lora-frozen", RandomModel(n_layer=3), train={"batch": 4, "freeze": "blk.1.*,*.ffn_*.lora_a"}),
    lora_case("lora-attention", RandomModel(kind="F16"), {"targets": "attn_q,attn_k", "rank": 1}),
    lora_case("lora-answers", RandomModel(kind="Q8_0"), {"targets": "ffn_up,ffn_gate,attn_output"}, examples=True,
              train={"batch": 6, "micro_batch": 2}, dumped=True),
    lora_case(
        "lora-odd-sizes", RandomModel(n_layer=3, n_embd=42, n_head=7, n_head_kv=7, n_ff=51, vocab_size=77,
        norm_eps=1e-3, rope_freq_base=500.0),
        {"rank": 7}, model={"context": 19}, train={"batch": 5, "weight_decay": 0.3, "warmup_steps": 0},
    ),
]  # fmt: skip


def warm_case(name: str, base: RandomModel, init: str = "donor", train: dict[str, Any] | None = None,
              **more: Any) -> Case:  # fmt: skip
    arch = "gpt2" if base.arch == "gpt2" else "llama"
    model = {"init": init} | more.pop("model", {})
    return Case(name, model, {"batch": 2} | (train or {}), arch=arch, recipe="warm-start", base=base, **more)


WARM_CASES = [
    warm_case("warm-start", RandomModel(), train={"freeze": "blk.0.*,output_norm.weight", "embedding_lr_scale": 0.1}),
    warm_case("warm-start-untied-Q8_0", RandomModel(kind="Q8_0", tied=False), train={"freeze": "output.weight"}),
    warm_case("warm-start-Q4_K", RandomModel(kind="Q4_K", special={"ffn_down": "Q6_K", "token_embd": "BF16"}, **WIDE)),
    warm_case("warm-start-embeddings", RandomModel(kind="F16"), "embeddings", {"freeze": "token_embd.weight"}),
    warm_case("warm-start-gpt2", RandomModel("gpt2"), train={"freeze": "*.ffn_*", "embedding_lr_scale": 3.0}),
    warm_case("warm-start-gpt2-embeddings", RandomModel("gpt2", kind="F16"), "embeddings",
              {"micro_batch": 1, "embedding_lr_scale": 0.0}),
]  # fmt: skip

EVERY_CASE = [*CASES, *GPT2_CASES, *VIT_CASES, *LORA_CASES, *WARM_CASES]
DUMPED = [*CASES, *(case for case in EVERY_CASE if case.dumped)]


def trainer(case: Case, folder: Path) -> Any:
    """A session of the case. An adapter's second factor, nothing at first, gets values, so that the first has a
    gradient too."""
    from toy import _native

    session = _native.Trainer(case.kv, case.env(folder))
    if case.recipe == "lora":
        random = np.random.RandomState(11)
        for name, value in session.weights().items():
            if name.endswith(".lora_b"):
                session.set_weight(name, (0.05 * random.standard_normal(value.shape)).astype(np.float32))
    return session


def step_batches(case: Case, folder: Path) -> Iterable[list[Batch]]:
    """The micro-batches of every step, as a training of this case reads them."""
    reader = trainer(case, folder)
    rounds = case.knobs.train.batch // case.knobs.train.micro_batch
    while True:
        yield [reader.next_batch() for _ in range(rounds)]


def inputs_hash(weights: dict[str, Array], first: list[Batch]) -> str:
    """Images are known by their labels: their pixels are scaled in f32, which is not the same bits everywhere."""
    total = hashlib.sha256()
    for name, value in weights.items():
        total.update(name.encode() + np.ascontiguousarray(value, dtype="<f4").tobytes())
    for inputs, labels in first:
        tokens = inputs.astype("<i4").tobytes() if inputs.dtype.kind == "i" else b""
        total.update(tokens + labels.astype("<i4").tobytes())
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
    def read(case: Case) -> Reference:
        return Reference(**json.loads((REFERENCE / f"{case.name}.json").read_text(encoding="utf-8")))

    def gradient_error(self, name: str, ours: Array) -> float:
        """Norm of the difference over the norm of PyTorch's gradient; estimated where only projections are known."""
        if self.gradients is not None:
            theirs = self.gradients[name]
            return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))
        distance = projections(ours, name) - np.asarray(self.projections[name])
        return float(np.sqrt(np.mean(distance**2)) / self.norms[name])


def torch_model(case: Case, weights: dict[str, Array], folder: Path) -> Any:
    """The case's model in PyTorch: toy's initial weights; for lora over the base as numpy dequantises it."""
    import torch_gpt2
    import torch_llama
    import torch_lora
    import torch_vit

    m = case.knobs.model

    def trains(name: str) -> bool:
        return not case.is_frozen(name)

    if case.arch in ("gpt2", "vit"):
        cls = torch_gpt2.Gpt2 if case.arch == "gpt2" else torch_vit.Vit
        return cls(torch_gpt2.Shape(m.n_layer, m.n_embd, m.n_head, m.norm_eps), weights, trains)
    halves = case.base is not None and case.base.arch == "qwen2"
    shape = torch_llama.Shape(m.n_layer, m.n_embd, m.n_head, m.n_head_kv, m.rope_freq_base, m.norm_eps, halves)
    if case.recipe == "lora":
        base = read(Path(case.env(folder)["GGUF"]))
        rank = case.knobs.lora.rank  # a matrix of rank 1 comes as a vector
        factors = {n: w.reshape((rank, -1) if n.endswith(".lora_a") else (-1, rank)) for n, w in weights.items()}
        return torch_lora.Lora(shape, base, factors, case.knobs.lora.alpha, trains)
    return torch_llama.Llama(shape, weights, trains)


def run_torch(case: Case, folder: Path) -> Reference:
    """Train the case in PyTorch from toy's initial weights on toy's batches."""
    import torch
    from torch_train import Trainer

    torch.set_num_threads(1)
    weights = trainer(case, folder).weights()
    model = torch_model(case, weights, folder)
    steps = iter(step_batches(case, folder))
    first = next(steps)

    reference = Trainer(model, case.knobs.train)
    losses = [reference.gradients(first)]
    gradients = {name: p.grad.numpy().astype(np.float64) for name, p in model.trainable.items() if p.grad is not None}
    reference.step(first)
    losses += [reference.step(next(steps)) for _ in range(N_STEPS - 1)]
    return Reference(
        inputs_hash(weights, first),
        losses,
        {name: float(np.linalg.norm(g)) for name, g in gradients.items()},
        {name: projections(g, name).tolist() for name, g in gradients.items()},
        gradients,
    )


def check_frozen(case: Case, folder: Path) -> None:
    """What train.freeze names keeps its bytes and has no gradient; all else changes."""
    ours = trainer(case, folder)
    before = ours.weights()
    frozen = {name for name in before if case.is_frozen(name)}
    assert bool(frozen) is bool(case.knobs.train.freeze)
    for _ in range(2):
        ours.step()
    assert set(ours.gradients()) == set(before) - frozen
    after = ours.weights()
    still = {name for name in before if np.array_equal(before[name], after[name])}
    if case.knobs.train.embedding_lr_scale == 0:
        frozen |= {"token_embd.weight", "position_embd.weight"}
    assert still == frozen


def check_against(case: Case, reference: Reference, folder: Path) -> None:
    """toy's losses over N_STEPS steps and its first gradients are those of the reference."""
    ours = trainer(case, folder)
    first = next(iter(step_batches(case, folder)))
    assert inputs_hash(ours.weights(), first) == reference.inputs, (
        "toy's initial weights or batches are not those of the dump: if that is meant, run tests/cpu/make_reference.py"
    )
    losses, first_gradients = [], {}
    for i in range(N_STEPS):
        result = ours.step()
        losses.append(result["loss"])
        if i == 0:
            first_gradients = ours.gradients()
    # f32 sums in another order: 1e-7 at each operation, grown by 50 steps of feedback
    np.testing.assert_allclose(losses, reference.losses, rtol=2e-4)
    assert set(first_gradients) == set(reference.norms)
    errors = {name: reference.gradient_error(name, g) for name, g in first_gradients.items()}
    assert max(errors.values()) < 1e-3, {name: e for name, e in errors.items() if not e < 1e-3}
