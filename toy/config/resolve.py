"""Filling in what is left at "auto", so that config.json and config.kv hold every value that the run used."""

from __future__ import annotations

import math
import os
from pathlib import Path

from toy.config.check import words_of
from toy.config.knobs import Config

MOST_EVAL_BATCHES = 64  # what an evaluation reads of a text at most, unless eval.batches says so
DEFAULT_CONTEXT = 256
FULL_SPEED = 512  # tokens at once from which the products of a processor lose little
MOST_ACTIVATIONS = 160 << 20  # bytes of activations of a micro-batch, unless 512 tokens take more
LARGEST_IMAGE = 224  # what ViT-Tiny was made for; larger images are brought to it unless model.image_size says so


def usable_cores() -> int:
    """Processors this process may use: its affinity mask, cut by the control group's quota (a container's limit)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def image_size(side: int) -> int:
    """The size for images of `side` pixels, their own up to 224: a multiple of 4 from 16 on, so that patches fit."""
    side = min(side, LARGEST_IMAGE)
    return side if side < 16 else side // 4 * 4


def patch_size(image: int) -> int:
    """A patch for images of `image` pixels: at least 7 patches a side, at most 16 pixels. 224 -> 16, 32 and 28 -> 4."""
    limit = min(16, max(1, image // 7))
    return next(size for size in range(limit, 0, -1) if image % size == 0)


def activation_bytes(config: Config) -> int:
    """What a token leaves in memory for the gradients, about: of each block its input, q, k, v, what attention makes,
    the sum after it, and the feed-forward layer before its activation function. Norms are computed again.

    With train.recompute it is less; sequences at once stay the same, so that what it saves is saved."""
    model = config.model
    block = 6 * model.n_embd + (1 if config.run.arch in ("gpt2", "vit") else 2) * model.n_ff
    return 4 * model.n_layer * block


def micro_batch(config: Config) -> int:
    """Sequences at once: as many as keep activations within a bound, but enough to run at full speed. The update is the
    same however a batch is cut; on other devices it is not cut, because their speed wants all of it."""
    batch, context = config.train.batch, config.model.context
    if config.run.device != "cpu":
        return batch
    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    most = MOST_ACTIVATIONS // (context * activation_bytes(config))
    within = [n for n in sizes if n <= most]
    fast = [n for n in sizes if n * context >= FULL_SPEED]
    return max(within[-1] if within else 1, fast[0] if fast else batch)


def resolve(
    config: Config, *, vocab_size: int | None = None, val_tokens: int | None = None, val_items: int | None = None
) -> Config:
    """A copy with no auto left in it. `vocab_size` is the tokenizer's, once it is known, and `val_tokens` the size of
    the validation part; where the data is not one long text, `val_items` counts its examples or images."""
    out = config.model_copy(deep=True)
    model, train = out.model, out.train
    out.run.threads = out.run.threads or usable_cores()
    model.n_head_kv = model.n_head_kv or model.n_head
    wide = 4 * model.n_embd if out.run.arch in ("gpt2", "vit") else math.ceil(8 * model.n_embd / 3 / 32) * 32
    model.n_ff = model.n_ff or wide
    if vocab_size is not None:
        model.vocab_size = vocab_size
    if out.run.arch == "vit":
        model.image_size = model.image_size or LARGEST_IMAGE
        model.patch_size = model.patch_size or patch_size(model.image_size)
        model.n_channel = model.n_channel or 3
        model.context = (model.image_size // model.patch_size) ** 2 + (model.pool == "cls")
    model.context = model.context or DEFAULT_CONTEXT
    train.freeze = ",".join(words_of(train.freeze))
    if out.run.recipe == "lora":
        targets = words_of(out.lora.targets)
        out.lora.targets = "all" if "all" in targets else ",".join(targets)
        out.lora.alpha = out.lora.alpha or 2.0 * out.lora.rank
    train.micro_batch = train.micro_batch or micro_batch(out)
    if out.eval.batches == 0 and (val_tokens is not None or val_items is not None):
        items = max(1, (val_tokens or 0) // model.context) if val_items is None else max(1, val_items)
        whole = math.ceil(items / train.batch)
        out.eval.batches = whole if out.run.arch == "vit" else min(MOST_EVAL_BATCHES, whole)
    if train.min_learning_rate < 0:
        train.min_learning_rate = train.learning_rate / 10
    if train.warmup_steps < 0:
        train.warmup_steps = min(100, train.steps // 10)
    return out
