"""What each recipe trains on, one class a recipe: found good before anything is made, then packed for the runner.

The calls come in this order: `settle` (a base's own numbers), `check` (everything that can be refused), `guess` (the
configuration as far as it is known without packing), and, where a run is made, `pack`.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toy import config, corpora, recipes
from toy.cli.common import say
from toy.config import KNOBS, Loaded
from toy.errors import ToyError, shown

if TYPE_CHECKING:
    from toy.corpora.cache import Progress
    from toy.models.cards import Card

MOST_CONTEXT = 1024  # of a set of examples, unless model.context says more


@dataclass
class Packed:
    """Data that a runner can read."""

    config: config.Config  # with no auto left in it
    env: dict[str, object]
    datasets: dict[str, dict[str, Any]]  # for meta.json
    identities: dict[str, str]  # role -> sha256; a resumed run has the same
    n_tokens: int = 0  # all that are held in memory
    notes: list[str] = field(default_factory=list)


class Inputs(ABC):
    """What all recipes have in common."""

    def __init__(self, loaded: Loaded, row: recipes.Row, project: Path | None, cache: Path) -> None:
        self.loaded, self.row, self.project, self.cache = loaded, row, project, cache

    @property
    def cfg(self) -> config.Config:
        return self.loaded.config

    @property
    def base(self) -> Path | None:
        """The GGUF that the training starts from."""
        return None

    def settle(self) -> None:  # noqa: B027 - not every recipe has a base
        """Put what a base or the data say of the model into the configuration, or refuse what contradicts it."""

    def check(self) -> None:  # noqa: B027 - or anything to check
        """Refuse bad data, in milliseconds."""

    @abstractmethod
    def guess(self, *, exact: bool = False) -> tuple[config.Config, int]:
        """The configuration resolved, and the tokens that will be in memory, without writing. `exact`: the data is
        read for it; else what is cheap to know."""

    @abstractmethod
    def pack(self, progress: Progress) -> Packed:
        """Make what the runner reads, from the cache when it was made before."""


class Text(Inputs):
    """from-scratch: a text, cut into windows, or a set of examples."""

    @property
    def tokenizer(self) -> str:
        return self.cfg.data.tokenizer

    @cached_property
    def examples(self) -> bool:
        return corpora.kind_of(self.cfg.data.corpus, texts_are_examples=self.row.recipe == "lora") == "examples"

    @property
    def context(self) -> int:
        """The context of a text; of examples, a guess before they are packed."""
        return self.cfg.model.context or config.DEFAULT_CONTEXT

    def check(self) -> None:
        data, size = self.cfg.data, self.cfg.model.vocab_size
        fraction = 0.0 if data.val_corpus else data.val_fraction
        if not self.examples:
            corpora.check(data.corpus, self.tokenizer, size, self.context, fraction)
        else:
            corpora.check_examples(data.corpus, self.tokenizer)
        if data.val_corpus and self._same_kind():
            if self.examples:
                corpora.check_examples(data.val_corpus, self.tokenizer)
            else:
                corpora.check(data.val_corpus, self.tokenizer, 0, self.context)

    def _same_kind(self) -> bool:
        data = self.cfg.data
        kind = corpora.kind_of(data.val_corpus, texts_are_examples=self.row.recipe == "lora")
        if (kind == "examples") != self.examples:
            mine, theirs = ("examples", "a text") if self.examples else ("a text", "examples")
            raise ToyError(
                "bad_file",
                f"data.val_corpus {shown(data.val_corpus)} is {theirs}, and the corpus is {mine}",
                "validate on data of the same kind",
            )
        return True

    def guess(self, *, exact: bool = False) -> tuple[config.Config, int]:
        cfg, data, asked = self.cfg, self.cfg.data, self.cfg.model.vocab_size
        vocab = asked or {"bytes": 257, "chars": 256, "bpe": 2048}.get(self.tokenizer, 32000)
        context, tokens = self.context, 0
        corpora_named = [data.corpus, *([data.val_corpus] if data.val_corpus else [])]
        if exact and self.examples:
            with tempfile.TemporaryDirectory(
                prefix="toy-"
            ) as folder:  # what they come to is known once they are packed
                sets = [
                    corpora.prepare_examples(each, self.tokenizer, Path(folder), vocab_size=asked)
                    for each in corpora_named
                ]
                context = cfg.model.context or self.longest(*sets)
                vocab, tokens = sets[0].vocab_size, sum(each.n_tokens for each in sets)
        elif exact:
            vocab = corpora.vocabulary_size(data.corpus, self.tokenizer, asked)
            tokens = sum(corpora.token_count(each, self.tokenizer, asked, self.cache) for each in corpora_named)
        resolved = config.resolve(cfg, vocab_size=vocab)
        resolved.model.context = context
        return resolved, tokens

    def prepare(self, corpus: str, progress: Progress, like: corpora.Prepared | None = None) -> corpora.Prepared:
        size = 0 if like is not None else self.cfg.model.vocab_size
        if self.examples:
            return corpora.prepare_examples(corpus, self.tokenizer, self.cache, progress, like, vocab_size=size)
        return corpora.prepare(corpus, self.tokenizer, size, self.cache, progress, like=like)

    def longest(self, *sets: corpora.Prepared) -> int:
        """The context that the examples need."""
        return min(math.ceil(max(each.longest for each in sets) / 8) * 8, MOST_CONTEXT)

    def pack(self, progress: Progress) -> Packed:
        data = self.cfg.data
        train = self.prepare(data.corpus, progress)
        validation = self.prepare(data.val_corpus, progress, train) if data.val_corpus else None
        fraction = 0.0 if validation else data.val_fraction
        cfg, notes = self.cfg.model_copy(deep=True), []
        val = validation or train
        share = 1.0 if validation else fraction
        if train.offsets is not None:
            cfg.model.context = cfg.model.context or self.longest(*(each for each in (train, validation) if each))
            fit = train.require_examples(cfg.model.context, fraction)
            if validation:
                validation.require_examples(cfg.model.context)
            if fit.cut:
                lost = f", {fit.dropped} of them to nothing to learn" if fit.dropped else ""
                notes.append(f"{fit.cut} examples are cut to the context of {cfg.model.context} tokens{lost}")
            counts: dict[str, int] = {"val_items": int(share * val.n_examples)}
        else:
            cfg.model.context = self.context
            train.require(cfg.model.context, fraction)
            if validation:
                validation.require(cfg.model.context)
            counts = {"val_tokens": int(share * val.n_tokens)}
        resolved = config.resolve(cfg, vocab_size=train.vocab_size, **counts)
        env: dict[str, object] = {"TOKENIZER": train.tokenizer_gguf}
        packed = Packed(resolved, env, {}, {}, notes=notes)
        for prefix, role, name, each in (
            ("", "train", "corpus", train),
            ("VAL_", "validation", "val_corpus", validation),
        ):
            if each is None:
                continue
            env[f"{prefix}CORPUS"] = each.tokens
            if each.offsets is not None:
                env |= {f"{prefix}OFFSETS": each.offsets, f"{prefix}MASK": each.mask}
            packed.datasets[role] = about_tokens(each)
            packed.identities[name] = each.sha256
            packed.n_tokens += each.n_tokens
        return packed


class Donor(Text):
    """warm-start: the same, with the tokenizer and the shape of a GGUF."""

    @property
    def path(self) -> str:
        return self.cfg.model.donor

    @cached_property
    def card(self) -> Card | None:
        """The donor's metadata; None where there is none."""
        from toy.models import cards, resolve

        return cards.read(resolve(self.path).absolute()) if self.path else None

    @property
    def base(self) -> Path | None:
        return self.card.path if self.card else None

    @property
    def tokenizer(self) -> str:
        return str(self.card.path) if self.card else self.cfg.data.tokenizer

    @property
    def context(self) -> int:
        most = self.card.context if self.card else 0
        return self.cfg.model.context or min(config.DEFAULT_CONTEXT, most or config.DEFAULT_CONTEXT)

    def longest(self, *sets: corpora.Prepared) -> int:
        most = self.card.context if self.card else 0
        return min(super().longest(*sets), most or MOST_CONTEXT)

    def settle(self) -> None:
        self.name_corpus()
        init = self.cfg.model.init
        if self.card is None:
            if init == "scratch":
                return
            raise ToyError(
                "bad_flag",
                f"warm-start with --init {init} needs a donor",
                "name a GGUF with --model, or start anew with --init scratch",
            )
        self.take_base(self.card)
        if self.loaded.is_explicit("data.tokenizer"):
            raise ToyError(
                "bad_config",
                f"data.tokenizer is set ({self.loaded.origins['data.tokenizer']}), and the donor brings its own",
                "leave data.tokenizer out",
            )
        self.loaded.put("data.tokenizer", KNOBS["data.tokenizer"].default, "default")
        self.check_context(self.card)

    def name_corpus(self) -> None:
        """Without a corpus: the project's or toy's own short sequences, else the manual that every text recipe has."""
        if not self.cfg.data.corpus and (found := corpora.default_sequences(self.project)):
            self.loaded.put("data.corpus", str(found), "recipe warm-start")

    def take_base(self, card: Card) -> None:
        from toy.models.bases import base_shape, check_base, check_trainable

        asked = None if self.loaded.origins["run.arch"] == "default" else self.cfg.run.arch
        arch = check_base(card, "warm-start", asked)
        shape, origin = base_shape(card), f"the donor {shown(card.path)}"
        self.loaded.put("run.arch", arch, origin)
        self.loaded.put("model.donor", str(card.path), self.loaded.origins["model.donor"])
        config.leave_out(self.loaded)  # knobs of other architectures, now that this one is known
        init = self.cfg.model.init
        if init == "donor":
            check_trainable(card, shape)
        free = {"donor": (), "embeddings": set(shape) - {"vocab_size", "n_embd"}, "scratch": set(shape)}[init]
        self.take_shape({key: value for key, value in shape.items() if key not in free}, origin)
        if init == "embeddings" and self.loaded.is_explicit("model.n_head"):
            free = set(free) - {"n_head", "n_head_kv"}
        for key in free:
            if key in ("n_layer", "n_ff", "tie_embeddings") and init == "embeddings":
                continue  # a new model's own
            if not self.loaded.is_explicit(f"model.{key}"):
                self.loaded.put(f"model.{key}", shape[key], origin)

    def take_shape(self, shape: dict[str, Any], origin: str) -> None:
        """The base's numbers are the model's; somebody who asked for others is told."""
        for name, value in shape.items():
            key = f"model.{name}"
            mine = self.loaded.value(key)
            asked = self.loaded.is_explicit(key) and mine != KNOBS[key].auto
            if asked and not math.isclose(mine, value, rel_tol=1e-6):
                raise ToyError(
                    "bad_config",
                    f"{key} = {mine} ({self.loaded.origins[key]}) is not that of {origin}, {value}",
                    f"leave {key} out: the weights keep their shape",
                )
            self.loaded.put(key, value, origin)

    def check_context(self, card: Card) -> None:
        asked, most = self.cfg.model.context, card.context
        if not most or asked <= most:
            return
        if card.architecture == "gpt2" and self.cfg.model.init == "donor":
            raise ToyError(
                "bad_config",
                f"model.context = {asked} ({self.loaded.origins['model.context']}) is above the donor's, {most}",
                "a gpt2 has learned a vector for each position: it cannot grow",
            )
        say(f"warning: model.context = {asked} is above what {shown(card.path)} was trained with, {most}")

    def check(self) -> None:
        super().check()
        for corpus in (self.cfg.data.corpus, self.cfg.data.val_corpus):
            if self.card is not None and corpus:
                what = "donor" if self.row.recipe == "warm-start" else "base"
                corpora.check_vocabulary(corpus, self.card.path, what)

    def pack(self, progress: Progress) -> Packed:
        from toy.models import adapters

        packed = super().pack(progress)
        if self.row.recipe == "warm-start":
            packed.env["INIT"] = self.cfg.model.init
        if self.card is not None:
            packed.env["GGUF"] = self.card.path
            key = "base" if self.row.recipe == "lora" else "donor"
            packed.identities[key] = adapters.file_sha256(self.card.path)
            packed.datasets[key] = {
                "gguf": str(self.card.path),
                "sha256": packed.identities[key],
                "architecture": self.card.architecture,
                "parameters": self.card.parameters,
                "quantisation": self.card.quantisation,
            }
        return packed


class Adapter(Donor):
    """lora: the same over a base that stays as it is."""

    @property
    def path(self) -> str:
        return self.cfg.lora.base

    def settle(self) -> None:
        if self.card is None:
            raise ToyError("bad_flag", "recipe lora needs a base", "name a GGUF with --model; `toy list` shows them")
        self.take_base(self.card)
        self.check_context(self.card)

    def take_base(self, card: Card) -> None:
        from toy.models.bases import base_shape, check_base

        check_base(card, "lora", self.cfg.run.arch)
        self.loaded.put("lora.base", str(card.path), self.loaded.origins["lora.base"])
        self.take_shape(base_shape(card), f"the base {shown(card.path)}")

    def pack(self, progress: Progress) -> Packed:
        packed = super().pack(progress)
        packed.env["RANK"] = packed.config.lora.rank
        return packed


@dataclass(frozen=True)
class Facts:
    """What is known of a set of images before it is packed."""

    side: int
    n_channel: int
    classes: list[str]
    n_images: int


class Images(Inputs):
    """vit-tiny: images and their classes."""

    def settle(self) -> None:
        if not self.cfg.data.images:
            raise ToyError(
                "bad_flag",
                "recipe vit-tiny needs images",
                "name a folder of class folders, or IDX files, with --images",
            )
        images = self.facts
        self.take("model.image_size", config.image_size(images.side))
        self.take("model.n_channel", images.n_channel)
        self.take("model.n_class", len(images.classes), must=True)

    def take(self, key: str, value: int, must: bool = False) -> None:
        asked = self.loaded.value(key)
        if must and asked not in (0, value):
            raise ToyError(
                "bad_config",
                f"{key} = {asked} ({self.loaded.origins[key]}), and the images have {value}",
                f"leave {key} out: it is counted",
            )
        if not asked:
            self.loaded.put(key, value, "the images")

    @cached_property
    def facts(self) -> Facts:
        """The first look at the images: a few of their headers. Raises ToyError for what is surely wrong with them."""
        from toy.corpora.cache import Meter
        from toy.corpora.pictures import open_pictures

        path, model = Path(self.cfg.data.images), self.cfg.model
        if (path / "images.bin").is_file() or path.name == "images.bin":
            made = corpora.prepare_images(path, self.cache)
            return Facts(made.width, made.n_channel, made.classes, made.n_images)
        pictures = open_pictures(path)
        shape = pictures.shape(model.image_size, model.n_channel, Meter(None, 0, 1), at_most=100)
        return Facts(shape.width, shape.n_channel, pictures.classes, len(pictures.keys))

    @property
    def size(self) -> int:
        """The size to bring images to; those that have it stay as they are."""
        return self.cfg.model.image_size

    def check(self) -> None:
        data = self.cfg.data
        corpora.check_images(data.images, self.size, self.cfg.model.n_channel)
        if data.val_images:
            corpora.check_images(data.val_images, self.size, self.cfg.model.n_channel)

    def guess(self, *, exact: bool = False) -> tuple[config.Config, int]:
        resolved = config.resolve(self.cfg, val_items=int(self.cfg.data.val_fraction * self.facts.n_images))
        return resolved, 0

    def pack(self, progress: Progress) -> Packed:
        data, model = self.cfg.data, self.cfg.model
        train = corpora.prepare_images(data.images, self.cache, self.size, model.n_channel, progress)
        validation = None
        if data.val_images:
            validation = corpora.prepare_images(
                data.val_images, self.cache, self.size, model.n_channel, progress, like=train
            )
        train.require(0.0 if validation else data.val_fraction)
        val_items = validation.n_images if validation else int(data.val_fraction * train.n_images)
        env: dict[str, object] = {"IMG_DIR": train.folder, "TOKENIZER": train.classes_gguf}
        packed = Packed(config.resolve(self.cfg, val_items=val_items), env, {}, {})
        for prefix, role, name, each in (
            ("", "train", "images", train),
            ("VAL_", "validation", "val_images", validation),
        ):
            if each is not None:
                env[f"{prefix}IMG_DIR"] = each.folder
                packed.datasets[role] = {"folder": str(each.folder), **each.manifest}
                packed.identities[name] = each.sha256
        return packed


INPUTS: dict[str, type[Inputs]] = {"from-scratch": Text, "warm-start": Donor, "lora": Adapter, "vit-tiny": Images}


def about_tokens(prepared: corpora.Prepared) -> dict[str, Any]:
    """What meta.json says of packed tokens."""
    manifest = prepared.manifest
    about = {
        "name": manifest.get("name"),
        "tokens": str(prepared.tokens),
        "sha256": prepared.sha256,
        "n_tokens": prepared.n_tokens,
        "vocab_size": prepared.vocab_size,
        "source": manifest.get("source"),
        "tokenizer": manifest.get("tokenizer"),
    }
    return about | ({"examples": manifest["examples"]} if "examples" in manifest else {})
