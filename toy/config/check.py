"""What must hold between knobs. Ranges of single knobs stand at their declaration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from toy.config.knobs import Config
from toy.errors import ToyError


def check(config: Config, origins: Mapping[str, str] | None = None) -> None:
    """Raise ToyError (bad_config) for the first two knobs that do not go together."""
    where = origins or {}

    def fail(key: str, message: str, hint: str) -> NoReturn:
        origin = where.get(key, "default")
        raise ToyError("bad_config", f"{key} {message} ({origin})", hint)

    model, train, data = config.model, config.train, config.data
    if model.n_embd % model.n_head:
        fits = [n for n in range(1, model.n_head + 1) if model.n_embd % n == 0 and (model.n_embd // n) % 2 == 0]
        hint = f"model.n_head = {fits[-1]} would do" if fits else "make n_embd a multiple of 2 n_head"
        fail("model.n_embd", f"= {model.n_embd} is not divisible by model.n_head = {model.n_head}", hint)
    if (model.n_embd // model.n_head) % 2:
        fail(
            "model.n_embd",
            f"/ model.n_head = {model.n_embd // model.n_head} is odd; rotary positions turn pairs",
            "make n_embd a multiple of 2 n_head",
        )
    if model.n_head_kv and model.n_head % model.n_head_kv:
        fail(
            "model.n_head_kv",
            f"= {model.n_head_kv} does not divide model.n_head = {model.n_head}",
            "each key head serves the same number of query heads; 0 gives one each",
        )
    if train.micro_batch and train.batch % train.micro_batch:
        fail(
            "train.micro_batch",
            f"= {train.micro_batch} does not divide train.batch = {train.batch}",
            "a step is a whole number of micro-batches; 0 takes the whole batch at once",
        )
    if train.warmup_steps > train.steps:
        fail(
            "train.warmup_steps",
            f"= {train.warmup_steps} is more than train.steps = {train.steps}",
            "warm up for fewer steps, or leave it at auto",
        )
    if -1 < train.min_learning_rate < 0:
        fail("train.min_learning_rate", f"= {train.min_learning_rate} is negative", "0 or more, or auto")
    if train.min_learning_rate > train.learning_rate:
        fail(
            "train.min_learning_rate",
            f"= {train.min_learning_rate} is above train.learning_rate = {train.learning_rate}",
            "it is the learning rate that the schedule ends at",
        )
    if config.eval.patience and not (data.val_corpus or data.val_fraction > 0):
        fail(
            "eval.patience",
            f"= {config.eval.patience} needs a validation part, and data.val_fraction is 0",
            "hold some of the corpus out with data.val_fraction, or name a data.val_corpus",
        )
    if config.eval.patience and not config.eval.every:
        fail("eval.patience", f"= {config.eval.patience} needs validations on the way", "set eval.every")
    if data.tokenizer == "":
        fail("data.tokenizer", "is empty", "bytes, chars, bpe, or a tokenizer file")
    if config.log.trackers:
        fail(
            "log.trackers",
            f"= {config.log.trackers!r}: this toy has no trackers",
            "leave it empty; events.jsonl has it all",
        )
