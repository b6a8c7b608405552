"""THE knobs: each declared once, with its type, default, range, unit and one line of documentation.

Flags, `--set`, YAML, `config.json`, `config.kv`, validation, `toy config show` and a new project's toy.yml come from
here. A default that reads "auto" is filled by `toy.config.resolve`; what a recipe has instead of these defaults stands
in `toy.config.recipe_defaults`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel, ConfigDict, Field


def knob(
    default: Any,
    doc: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    unit: str = "",
    auto: tuple[Any, str] | None = None,
    path: bool = False,
    duration: bool = False,
    recipes: tuple[str, ...] = (),
    archs: tuple[str, ...] = (),
) -> Any:
    """One knob. `min` and `max` are part of the range, `above` is not. `auto` is (the value that means auto, what is
    filled in). `path`: text that may name a file, relative to the file (or the shell) that it was written in.
    `duration`: seconds that can be written as 90s, 55m or 1h30m. `recipes`, `archs`: the only ones that have it."""
    extra: dict[str, Any] = {"unit": unit, "auto": list(auto) if auto else None, "path": path, "duration": duration}
    extra |= {"recipes": list(recipes), "archs": list(archs)}
    return Field(
        default,
        description=doc,
        ge=min,
        le=max,
        gt=above,
        allow_inf_nan=False if isinstance(default, float) else None,
        json_schema_extra=extra,
    )


#: The matrices of a block that can have an adapter.
TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

TEXT = ("from-scratch", "warm-start", "lora")
IMAGES = ("vit-tiny",)
DONOR = ("warm-start",)
LORA = ("lora",)
WHOLE = ("from-scratch", "warm-start", "vit-tiny")  # recipes that train the model's own weights


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())


class Run(Section):
    """What kind of training, where."""

    recipe: str = knob("from-scratch", "Kind of training.")
    arch: str = knob("llama", "Model family.")
    device: str = knob("cpu", "Where the runner computes.")
    build: Literal["native", "portable"] = knob(
        "native", "Runner build: for this machine, or a fixed instruction set with the same bytes everywhere."
    )
    seed: int = knob(1337, "Seed of initial weights and data order.", min=0, max=2**63 - 1)
    threads: int = knob(0, "Threads; the losses do not depend on it.", min=0, max=512, auto=(0, "all usable cores"))
    name: str = knob("", "Name of the run, for `{name}` in run_id_template and for lists.")
    notes: str = knob("", "Anything to remember about the run.")
    stop_after: float = knob(
        0.0, "Save and stop after so long (90s, 55m, 1h30m), to be resumed; 0: never.", min=0.0, max=1e9, duration=True
    )


class Model(Section):
    """Shape of the network."""

    n_layer: int = knob(6, "Transformer blocks.", min=1, max=1000)
    n_embd: int = knob(256, "Width of the residual stream.", min=2, max=65536)
    n_head: int = knob(8, "Attention heads; divides n_embd (llama: into heads of even width).", min=1, max=1024)
    n_head_kv: int = knob(
        0,
        "Key and value heads (grouped-query attention); divides n_head.",
        min=0,
        max=1024,
        auto=(0, "n_head"),
        archs=("llama",),
    )
    n_ff: int = knob(
        0,
        "Width of the feed-forward layer.",
        min=0,
        max=1048576,
        auto=(0, "llama: 8/3 n_embd, rounded up to a multiple of 32; gpt2, vit: 4 n_embd"),
    )
    vocab_size: int = knob(
        0,
        "Tokens in the vocabulary; for bpe, the size to train.",
        min=0,
        max=1048576,
        auto=(0, "the tokenizer's; 2048 for bpe"),
        recipes=TEXT,
    )
    context: int = knob(
        0,
        "Longest sequence, in training and after.",
        min=0,
        max=1048576,
        unit="tokens",
        auto=(0, "256; lora: the longest example, 1024 at most"),
        recipes=TEXT,
    )
    rope_freq_base: float = knob(
        10000.0, "Base of the rotary position frequencies.", min=1.0, max=1e9, archs=("llama",)
    )
    norm_eps: float = knob(1e-5, "Added to the mean square in RMSNorm and LayerNorm.", above=0.0, max=0.1)
    tie_embeddings: bool = knob(True, "Use the token embedding as the output matrix too.", recipes=TEXT)
    init_std: float = knob(0.02, "Standard deviation of the initial weights.", above=0.0, max=1.0, recipes=WHOLE)
    image_size: int = knob(
        0,
        "Height and width that images are brought to.",
        min=0,
        max=4096,
        unit="pixels",
        auto=(0, "the images' own up to 224"),
        recipes=IMAGES,
    )
    patch_size: int = knob(
        0,
        "Height and width of a patch; divides image_size.",
        min=0,
        max=1024,
        unit="pixels",
        auto=(0, "16 for images of 224, 4 for 28"),
        recipes=IMAGES,
    )
    n_channel: int = knob(
        0,
        "Colours of a pixel: 1 for grey, 3 for RGB.",
        min=0,
        max=4,
        unit="channels",
        auto=(0, "the images' own"),
        recipes=IMAGES,
    )
    n_class: int = knob(0, "Classes told apart.", min=0, max=1_000_000, auto=(0, "those of the images"), recipes=IMAGES)
    pool: Literal["cls", "mean"] = knob(
        "cls", "What the head reads: a class token, or the mean of all patches.", recipes=IMAGES
    )
    init: Literal["scratch", "donor", "embeddings"] = knob(
        "scratch", "Initial weights: random, the donor's, or the donor's token embedding only.", recipes=DONOR
    )
    donor: str = knob("", "GGUF that the weights come from: a file, a run or a name.", path=True, recipes=DONOR)


class Data(Section):
    """What it learns from."""

    corpus: str = knob(
        "",
        "Text, folder, JSONL (`text`; `prompt`, `completion`; `messages`) or packed tokens; empty: Python's manual.",
        path=True,
        recipes=TEXT,
    )
    tokenizer: str = knob(
        "bpe",
        "`bytes`, `chars`, `bpe` (trained on the corpus), or a tokenizer file.",
        path=True,
        recipes=("from-scratch", "warm-start"),
    )
    val_fraction: float = knob(0.1, "Share of the data, at its end, held out for validation.", min=0.0, max=0.9)
    val_corpus: str = knob("", "A corpus of its own for validation, instead of val_fraction.", path=True, recipes=TEXT)
    shuffle: bool = knob(True, "Visit the data in a seeded random order, a new one each epoch.")
    images: str = knob(
        "", "Folder of a folder for each class, IDX files (MNIST's), or packed images.", path=True, recipes=IMAGES
    )
    val_images: str = knob(
        "", "Images of their own for validation, instead of val_fraction.", path=True, recipes=IMAGES
    )
    augment_crop: int = knob(
        0, "Move each training image by up to so many pixels; 0: not.", min=0, max=256, unit="pixels", recipes=IMAGES
    )
    augment_flip: bool = knob(False, "Mirror every second training image, left to right.", recipes=IMAGES)


class Train(Section):
    """The optimisation."""

    steps: int = knob(1000, "Optimizer updates.", min=1, max=1_000_000_000)
    batch: int = knob(16, "Sequences (or images) a step.", min=1, max=1_000_000, unit="sequences")
    micro_batch: int = knob(
        0,
        "Sequences at once; the rest of the batch is accumulated. Divides batch.",
        min=0,
        max=1_000_000,
        unit="sequences",
        auto=(0, "the batch, or what 160 MiB of activations hold, 512 tokens at least"),
    )
    learning_rate: float = knob(1e-3, "Peak learning rate.", min=0.0, max=10.0)
    min_learning_rate: float = knob(
        -1.0, "Learning rate at the last step.", min=-1.0, max=10.0, auto=(-1.0, "learning_rate / 10")
    )
    warmup_steps: int = knob(
        -1,
        "Steps of linear warm-up from zero.",
        min=-1,
        max=1_000_000_000,
        unit="steps",
        auto=(-1, "steps / 10, 100 at most"),
    )
    schedule: Literal["constant", "cosine", "linear", "wsd"] = knob(
        "cosine", "Shape of the learning rate after the warm-up; wsd holds it, then falls in the last fifth."
    )
    optimizer: Literal["adamw"] = knob("adamw", "Update rule.")
    beta1: float = knob(0.9, "AdamW: decay of the first moment.", min=0.0, max=0.99999)
    beta2: float = knob(0.95, "AdamW: decay of the second moment.", min=0.0, max=0.999999)
    eps: float = knob(1e-8, "AdamW: added to the root of the second moment.", min=1e-30, max=1.0)
    weight_decay: float = knob(0.1, "Decoupled weight decay, not on norms and biases.", min=0.0, max=100.0)
    grad_clip: float = knob(1.0, "Largest global norm of the gradient; 0: no clipping.", min=0.0, max=1e6)
    dtype: Literal["f32", "bf16"] = knob(
        "f32",
        "Products of weights: f32, or rounded to bf16 as they are computed, with sums and everything stored in f32;"
        " where nobody says, cuda takes bf16 if the GPU has it.",
    )
    freeze: str = knob(
        "",
        "Tensors that stay as they begin: patterns with * and ?, comma between them; lora: over the adapter's tensors.",
    )
    embedding_lr_scale: float = knob(
        1.0, "Learning rate of token and position embeddings, relative to the rest.", min=0.0, max=1000.0, recipes=WHOLE
    )
    recompute: bool = knob(
        False, "Compute a block's activations again for its gradients: less memory, a third more work, the same bytes."
    )
    offload: bool = knob(
        False,
        "Keep weights, gradients and moments in this machine's memory and update them there; a GPU holds activations.",
    )


class Lora(Section):
    """The adapter."""

    base: str = knob("", "GGUF that the adapter is for: a file, a run or a name.", path=True, recipes=LORA)
    rank: int = knob(8, "Width of the adapter's two matrices.", min=1, max=65536, recipes=LORA)
    alpha: float = knob(
        0.0, "Weight of the adapter: alpha / rank.", min=0.0, max=1e6, auto=(0.0, "2 rank"), recipes=LORA
    )
    targets: str = knob("all", "What is adapted: " + ", ".join(TARGETS) + ", comma between them, or all.", recipes=LORA)
    dropout: float = knob(
        0.0, "Share of the adapter's inputs that is left out while training.", min=0.0, max=0.99, recipes=LORA
    )


class Eval(Section):
    """Validation."""

    every: int = knob(100, "Steps between validations; 0: at the end only.", min=0, max=1_000_000_000, unit="steps")
    batches: int = knob(
        0,
        "Batches (of train.batch) a validation reads.",
        min=0,
        max=1_000_000,
        unit="batches",
        auto=(0, "the whole validation part; of text, 64 at most"),
    )
    patience: int = knob(
        0, "Stop after so many validations without a new best; 0: never.", min=0, max=1_000_000, unit="validations"
    )


class Checkpoint(Section):
    """Saving and resuming."""

    every: int = knob(
        0, "Steps between checkpoints; 0: at the end, and when stopped.", min=0, max=1_000_000_000, unit="steps"
    )
    keep: int = knob(2, "Checkpoints kept, besides the best.", min=1, max=1_000_000)
    keep_best: bool = knob(True, "Keep the checkpoint with the lowest validation loss.")
    resume: str = knob("", "Run or checkpoint to go on from.", path=True)
    keep_every: int = knob(
        0, "Checkpoints at multiples of so many steps stay for ever; 0: none.", min=0, max=1_000_000_000, unit="steps"
    )


class Log(Section):
    """What is written down."""

    every: int = knob(1, "Steps between step events in events.jsonl.", min=1, max=1_000_000_000, unit="steps")
    trackers: str = knob("", "Trackers to send events to (none yet).")
    profile: int = knob(0, "Steps whose time is told by operation; 0: none.", min=0, max=10_000, unit="steps")


class Config(Section):
    """Every knob of a run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    lora: Lora = Lora()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


@dataclasses.dataclass(frozen=True)
class Knob:
    """What is declared about one knob, for messages and documentation."""

    key: str  # "train.steps"
    type: type  # int, float, bool or str
    default: Any
    doc: str
    unit: str
    choices: tuple[str, ...]
    min: float | None
    max: float | None
    above: float | None
    auto: Any  # the value that stands for "auto", or None
    auto_doc: str
    path: bool
    duration: bool
    recipes: tuple[str, ...]  # the only recipes that have it; empty: all
    archs: tuple[str, ...]  # the same of architectures

    @property
    def section(self) -> str:
        return self.key.split(".")[0]

    @property
    def name(self) -> str:
        return self.key.split(".")[1]

    def belongs(self, recipe: str, arch: str | None) -> bool:
        """Whether this recipe and architecture (None: not known yet) have the knob."""
        return (not self.recipes or recipe in self.recipes) and (not self.archs or arch is None or arch in self.archs)

    def allowed(self) -> str:
        """What the knob takes, in words: "a whole number from 1 to 1000"."""
        if self.choices:
            return "one of " + ", ".join(self.choices) if len(self.choices) > 1 else self.choices[0]
        if self.type is bool:
            return "true or false"
        if self.type is str:
            return "text"
        if self.duration:
            return "a duration: seconds, or 90s, 55m, 2h, 1h30m"
        text = "a whole number" if self.type is int else "a number"
        low = None if self.min is None or self.min == self.auto == -1 else self.min
        if self.auto == -1 and self.min == -1:
            low = 0
        if low is not None and self.max is not None:
            text += f" from {number(low)} to {number(self.max)}"
        elif self.above is not None:
            text += f" above {number(self.above)}" + (f", at most {number(self.max)}" if self.max is not None else "")
        if self.unit:
            text += f" ({self.unit})"
        return text + (", or auto" if self.auto is not None else "")


def number(value: float) -> str:
    """A number as a person writes it: 1000, 0.001, 1e-08."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e19 else repr(float(value))


def _of(key: str, field: Any) -> Knob:
    extra = field.json_schema_extra or {}
    limits: dict[str, float | None] = {"ge": None, "le": None, "gt": None}
    for mark in field.metadata:
        for name, cls in (("ge", annotated_types.Ge), ("le", annotated_types.Le), ("gt", annotated_types.Gt)):
            if isinstance(mark, cls):
                limits[name] = getattr(mark, name)
    annotation = field.annotation
    choices: tuple[str, ...] = ()
    if typing.get_origin(annotation) is Literal:
        choices, annotation = typing.get_args(annotation), str
    auto, auto_doc = extra["auto"] or (None, "")
    return Knob(
        key, annotation, field.default, field.description, extra["unit"], choices,
        limits["ge"], limits["le"], limits["gt"], auto, auto_doc, extra["path"], extra["duration"],
        tuple(extra["recipes"]), tuple(extra["archs"]),
    )  # fmt: skip


def _sections() -> dict[str, type[Section]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


SECTIONS: types.MappingProxyType[str, type[Section]] = types.MappingProxyType(_sections())
KNOBS: types.MappingProxyType[str, Knob] = types.MappingProxyType(
    {
        f"{section}.{name}": _of(f"{section}.{name}", field)
        for section, model in SECTIONS.items()
        for name, field in model.model_fields.items()
    }
)
