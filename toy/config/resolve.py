"""Filling in what is left at "auto", so that config.json and config.kv hold every value that the run used."""

from __future__ import annotations

import math
import os
from pathlib import Path

from toy.config.knobs import Config

MOST_EVAL_BATCHES = 64  # what an evaluation reads at most, unless eval.batches says so


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


def resolve(config: Config, *, vocab_size: int | None = None, val_tokens: int | None = None) -> Config:
    """A copy with no auto left in it. `vocab_size` is the tokenizer's, once it is known, and `val_tokens` the size of
    the validation part."""
    out = config.model_copy(deep=True)
    model, train = out.model, out.train
    out.run.threads = out.run.threads or usable_cores()
    model.n_head_kv = model.n_head_kv or model.n_head
    model.n_ff = model.n_ff or math.ceil(8 * model.n_embd / 3 / 32) * 32
    if vocab_size is not None:
        model.vocab_size = vocab_size
    train.micro_batch = train.micro_batch or train.batch
    if out.eval.batches == 0 and val_tokens is not None:
        sequences = max(1, val_tokens // model.context)
        out.eval.batches = min(MOST_EVAL_BATCHES, math.ceil(sequences / train.micro_batch))
    if train.min_learning_rate < 0:
        train.min_learning_rate = train.learning_rate / 10
    if train.warmup_steps < 0:
        train.warmup_steps = min(100, train.steps // 10)
    return out
