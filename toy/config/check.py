"""What must hold between knobs. Ranges of single knobs stand at their declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import NoReturn

from toy.config.knobs import TARGETS, Config
from toy.errors import ToyError, nearest

Fail = Callable[[str, str, str], NoReturn]

#: Tensors of a model, besides those of its blocks; and those of a block. `.weight` and `.bias` follow.
OUTSIDE = {
    "llama": ("token_embd", "output_norm", "output"),
    "gpt2": ("token_embd", "position_embd", "output_norm", "output"),
    "vit": ("patch_embd", "cls_embd", "position_embd", "output_norm", "output"),
}
INSIDE = {
    "llama": ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
    "gpt2": ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    "vit": ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
}
WITHOUT_BIAS = ("token_embd", "position_embd", "cls_embd")


def check(config: Config, origins: Mapping[str, str] | None = None) -> None:
    """Raise ToyError (bad_config) for the first two knobs that do not go together."""
    where = origins or {}

    def fail(key: str, message: str, hint: str) -> NoReturn:
        origin = where.get(key, "default")
        raise ToyError("bad_config", f"{key} {message} ({origin})", hint)

    if config.run.recipe == "lora":
        check_lora(config, fail)  # the shape is the base's
    elif config.run.recipe != "warm-start" or config.model.vocab_size:  # a donor's shape is known once it is read
        check_heads(config, fail)
        check_freeze(config, fail)
    if config.run.arch == "vit":
        check_images(config, fail)
    elif config.model.context == 1:
        fail("model.context", "= 1 leaves no token to predict", "2 or more, or auto")
    check_train(config, fail)
    check_eval(config, fail)
    if config.data.tokenizer == "":
        fail("data.tokenizer", "is empty", "bytes, chars, bpe, or a tokenizer file")
    if config.log.trackers:
        fail(
            "log.trackers",
            f"= {config.log.trackers!r}: this toy has no trackers",
            "leave it empty; events.jsonl has it all",
        )


def check_heads(config: Config, fail: Fail) -> None:
    model, rotary = config.model, config.run.arch == "llama"
    if model.n_embd % model.n_head:
        fits = [
            n for n in range(1, model.n_head + 1) if model.n_embd % n == 0 and not (rotary and (model.n_embd // n) % 2)
        ]
        hint = f"model.n_head = {fits[-1]} would do" if fits else "make n_embd a multiple of 2 n_head"
        fail("model.n_embd", f"= {model.n_embd} is not divisible by model.n_head = {model.n_head}", hint)
    if rotary and (model.n_embd // model.n_head) % 2:
        fail(
            "model.n_embd",
            f"/ model.n_head = {model.n_embd // model.n_head} is odd; rotary positions turn pairs",
            "make n_embd a multiple of 2 n_head",
        )
    if model.n_head_kv and not rotary and model.n_head_kv != model.n_head:
        fail(
            "model.n_head_kv",
            f"= {model.n_head_kv} is not model.n_head = {model.n_head}; {config.run.arch} has a key head for each",
            "leave it out, or train a llama for grouped queries",
        )
    if model.n_head_kv and model.n_head % model.n_head_kv:
        fail(
            "model.n_head_kv",
            f"= {model.n_head_kv} does not divide model.n_head = {model.n_head}",
            "each key head serves the same number of query heads; 0 gives one each",
        )


def check_images(config: Config, fail: Fail) -> None:
    model, data = config.model, config.data
    if model.image_size and model.patch_size and model.image_size % model.patch_size:
        fits = [n for n in range(1, model.image_size // 2 + 1) if model.image_size % n == 0]
        near = min(fits, key=lambda n: abs(n - model.patch_size), default=1)
        fail(
            "model.patch_size",
            f"= {model.patch_size} does not divide model.image_size = {model.image_size}",
            f"model.patch_size = {near} would do",
        )
    if model.n_class == 1:
        fail("model.n_class", "= 1 leaves nothing to tell apart", "two classes or more, or auto")
    if model.image_size and data.augment_crop >= model.image_size:
        fail(
            "data.augment_crop",
            f"= {data.augment_crop} moves images of {model.image_size} pixels out of sight",
            "a tenth of the image is plenty",
        )


def words_of(text: str) -> list[str]:
    """The words of a list that is written with commas, with or without spaces."""
    return [word.strip() for word in text.split(",") if word.strip()]


def lora_targets(text: str) -> list[str]:
    """The words of lora.targets, `all` spelled out."""
    words = words_of(text)
    return list(TARGETS) if "all" in words else words


def target_widths(config: Config) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix that can have an adapter, from the base's shape."""
    model = config.model
    kv = model.n_embd * (model.n_head_kv or model.n_head) // model.n_head
    wide, ff = model.n_embd, model.n_ff
    attention = {"attn_q": (wide, wide), "attn_k": (wide, kv), "attn_v": (wide, kv), "attn_output": (wide, wide)}
    return attention | {"ffn_gate": (wide, ff), "ffn_up": (wide, ff), "ffn_down": (ff, wide)}


def check_lora(config: Config, fail: Fail) -> None:
    lora = config.lora
    targets = lora_targets(lora.targets)
    if not targets:
        fail("lora.targets", "is empty", f"all, or some of: {', '.join(TARGETS)}")
    for word in targets:
        if word not in TARGETS:
            near = nearest(word, (*TARGETS, "all"))
            hint = (f"did you mean {near}? " if near else "") + f"the targets are: {', '.join(TARGETS)}, or all"
            fail("lora.targets", f"has the unknown target {word!r}", hint)
    if config.model.n_ff:  # the base's shape is known
        widths = target_widths(config)
        narrow = min(targets, key=lambda name: min(widths[name]))
        if lora.rank > min(widths[narrow]):
            fail(
                "lora.rank",
                f"= {lora.rank} is above the width of {narrow}, {min(widths[narrow])}",
                "a low rank is the point of it: 4 to 64",
            )
        check_freeze(config, fail)


def tensor_names(config: Config) -> list[str]:
    """The tensors that a run could train, as they are named in its GGUF: the model's, or the adapter's."""
    arch, model = config.run.arch, config.model
    if config.run.recipe == "lora":
        targets = [target for target in TARGETS if target in lora_targets(config.lora.targets)]
        stems = [f"blk.{n}.{target}" for n in range(model.n_layer) for target in targets]
        return [f"{stem}.weight.{half}" for stem in stems for half in ("lora_a", "lora_b")]
    if arch not in OUTSIDE:
        return []
    stems = list(OUTSIDE[arch])
    if arch != "vit" and model.tie_embeddings:
        stems.remove("output")
    if arch == "vit" and model.pool == "mean":
        stems.remove("cls_embd")
    stems += [f"blk.{n}.{stem}" for n in range(model.n_layer) for stem in INSIDE[arch]]
    names = []
    for stem in stems:
        biased = stem not in WITHOUT_BIAS and (arch == "vit" or (arch == "gpt2" and stem != "output"))
        names += [f"{stem}.weight", f"{stem}.bias"] if biased else [f"{stem}.weight"]
    return names


def check_freeze(config: Config, fail: Fail) -> None:
    names = tensor_names(config)
    patterns, adapter = words_of(config.train.freeze), config.run.recipe == "lora"
    if not patterns or not names:
        return
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            like = "blk.0.* and *.lora_a" if adapter else "blk.0.* and token_embd.weight"
            hint = f"did you mean {near}?" if near else f"patterns are over names like {like}"
            what = "the adapter (the base is frozen anyway)" if adapter else "this model"
            fail("train.freeze", f"has {pattern!r}, which is no tensor of {what}", hint)
    left = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not left:
        fail(
            "train.freeze", f"= {config.train.freeze} leaves nothing to train", "leave some tensor out of the patterns"
        )
    if adapter and not any(name.endswith(".lora_b") for name in left):
        fail(
            "train.freeze",
            f"= {config.train.freeze} freezes every lora_b, which begins at zero: the adapter would stay nothing",
            "freeze *.lora_a, or whole blocks",
        )


def check_train(config: Config, fail: Fail) -> None:
    train = config.train
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


def check_eval(config: Config, fail: Fail) -> None:
    data, patience = config.data, config.eval.patience
    if not patience:
        return
    what = "data.val_images" if config.run.arch == "vit" else "data.val_corpus"
    if not (data.val_corpus or data.val_images or data.val_fraction > 0):
        fail(
            "eval.patience",
            f"= {patience} needs a validation part, and data.val_fraction is 0",
            f"hold some of the data out with data.val_fraction, or name a {what}",
        )
    if not config.eval.every:
        fail("eval.patience", f"= {patience} needs validations on the way", "set eval.every")
