"""The shapes that are measured, what their matrix products cost, and what toy aims for at each. Shapes are those of
README.md's table, and every side reads them from here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

DTYPES = ("f32", "bf16")


@dataclass(frozen=True)
class Shape:
    """One model with its batch. `kind` is what both sides build: llama, lora, gpt2, nanogpt or vit."""

    name: str
    kind: str
    batch: int
    context: int  # vit: patches and the class token
    vocab_size: int  # vit: classes
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    warm: int  # steps of a round that are not counted
    measured: int  # and those that are
    rank: int = 0
    image_size: int = 0
    patch_size: int = 0

    @property
    def items(self) -> int:
        """Tokens a step; of images, images."""
        return self.batch if self.kind == "vit" else self.batch * self.context

    @property
    def unit(self) -> str:
        return "images/s" if self.kind == "vit" else "tokens/s"

    def values(self) -> dict[str, object]:
        return asdict(self)

    def flops(self) -> float:
        """Floating-point operations of a step's matrix products, two a multiply-add: README.md has the formula.

        What a product is needed for counts, not what an implementation happens to compute: causal attention is half
        of a square, frozen weights take no gradient, and nothing is counted twice for being computed again.
        """
        n, width = self.batch * self.context, self.n_embd
        kv = width * self.n_head_kv // self.n_head
        if self.kind in ("llama", "lora"):
            matrices = [(width, width), (width, kv), (width, kv), (width, width), *[(width, self.n_ff)] * 3]
        else:
            matrices = [(width, 3 * width), (width, width), (width, self.n_ff), (width, self.n_ff)]
        layer = sum(a * b for a, b in matrices)
        # q k' and p v: 2 products of context x context x width for a sequence, half of them under a causal mask
        attention = 2 * self.batch * self.context**2 * width * (1.0 if self.kind == "vit" else 0.5)
        # of a class token alone, the head reads one row an image
        head = width * self.vocab_size * (self.batch if self.kind == "vit" else n)
        passes = 3  # forward, gradient of the activations, gradient of the weights
        products = 3 * self.n_layer * attention
        if self.kind == "lora":
            adapters = self.rank * sum(a + b for a, b in matrices)
            products += 2 * (self.n_layer * n * layer + head) + 3 * self.n_layer * n * adapters
        else:
            products += passes * (self.n_layer * n * layer + head)
        if self.kind == "vit":
            products += 2 * self.batch * (self.context - 1) * 3 * self.patch_size**2 * width  # pixels take no gradient
        return 2.0 * products


def llama(name: str, v: int, d: int, n: int, h: int, kv: int, ff: int, b: int, t: int, warm: int, k: int) -> Shape:
    return Shape(name, "llama", b, t, v, d, n, h, kv, ff, warm, k)


SMOLLM2 = {"vocab_size": 49152, "n_embd": 576, "n_layer": 30, "n_head": 9, "n_head_kv": 3, "n_ff": 1536}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        llama("S", 256, 64, 2, 4, 4, 172, 4, 64, 20, 200),
        llama("M", 4096, 256, 6, 8, 4, 688, 8, 256, 1, 5),
        llama("L", 8192, 512, 8, 8, 4, 1376, 4, 512, 1, 3),
        Shape("X", "llama", 1, 256, **SMOLLM2, warm=1, measured=3),
        Shape("X-lora", "lora", 1, 256, **SMOLLM2, warm=1, measured=4, rank=8),
        Shape("gpt2-124M", "gpt2", 1, 256, 50257, 768, 12, 12, 12, 3072, 1, 3),
        Shape("nanogpt-char", "nanogpt", 12, 64, 65, 128, 4, 4, 4, 512, 5, 40),
        Shape("vit-tiny", "vit", 8, 197, 10, 192, 12, 3, 3, 768, 1, 5, image_size=224, patch_size=16),
    )
}


@dataclass(frozen=True)
class Target:
    """What a cell of the table is held to; None: nothing."""

    speed: float | None  # toy's over the best of PyTorch, at least
    memory: float | None  # toy's peak over that PyTorch's, at most
    share: float | None  # of the roof, at least


#: shape -> (f32, bf16)
TARGETS: dict[str, tuple[Target, Target]] = {
    "S": (Target(3, 0.1, 0.45), Target(3, 0.1, None)),
    "M": (Target(1.3, 0.4, 0.80), Target(1.5, 0.4, 0.60)),
    "L": (Target(1.2, 0.4, 0.85), Target(1.3, 0.4, 0.70)),
    "X": (Target(1.5, 0.85, 0.75), Target(1.5, 0.85, 0.62)),
    "X-lora": (Target(1.4, 0.35, None), Target(1.4, 0.35, None)),
    "gpt2-124M": (Target(1.5, 0.85, 0.75), Target(1.4, 0.85, 0.65)),
    "nanogpt-char": (Target(1.5, 0.15, 0.75), Target(2, 0.15, None)),
    "vit-tiny": (Target(1.3, 0.5, 0.70), Target(1.4, 0.5, 0.55)),
}


def target(shape: str, dtype: str) -> Target:
    return TARGETS[shape][DTYPES.index(dtype)]


#: What bench_gpu.py trains: the same models on batches that fill a GPU.
GPU_SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        replace(SHAPES["gpt2-124M"], batch=16, context=1024, warm=5, measured=20),
        replace(SHAPES["X"], name="llama-135M", batch=8, context=2048, warm=5, measured=20),
        replace(SHAPES["X-lora"], name="lora-135M", batch=8, context=2048, warm=5, measured=20),
        replace(SHAPES["M"], warm=20, measured=100),
    )
}
GPU_TARGETS = {
    "gpt2-124M": Target(1.1, None, 0.45),
    "llama-135M": Target(1.1, None, None),
    "lora-135M": Target(1.3, 0.6, None),
    "M": Target(None, None, None),
}
#: A product large enough for any GPU's full speed.
GPU_ROOF = [(8192, 8192, 8192)]
#: What is learned for losses to be compared: model M, with so few tokens a step that 500 steps do not learn by heart.
GPU_LOSSES = replace(SHAPES["M"], batch=4, context=128)


def tiny(shape: Shape) -> Shape:
    """The same with next to nothing to compute, to try a bench itself. A lora's model is that of its base."""
    few = {"batch": 2, "context": 32, "warm": 1, "measured": 2}
    if shape.kind != "lora":
        few |= {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_ff": 128}
        few["n_head_kv"] = 2 if shape.n_head_kv < shape.n_head else 4
    return replace(shape, **few)  # type: ignore[arg-type]


#: tokens x in x out of products that any implementation can do at full speed: what training is held against.
ROOF = [(1024, 1024, 1024), (2048, 512, 1376)]
#: the same out of the linear layers of M, its head, L's, and a larger square one: `--gemm` shows them one by one.
PRODUCTS = [
    (2048, 256, 256), (2048, 256, 688), (2048, 688, 256), (2048, 256, 4096), (2048, 512, 1376), (2048, 1376, 512),
    (256, 576, 1536), (1024, 1024, 1024),
]  # fmt: skip
