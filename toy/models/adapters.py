"""A model with its adapter: which base an adapter belongs to, and whether the two fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from toy.errors import ToyError, shown
from toy.models import cards, resolve
from toy.models.cards import Card


def is_adapter(card: Card) -> bool:
    return card.metadata.get("general.type") == "adapter"


def choose(model: str, adapter: str | None = None) -> tuple[Card, Card | None]:
    """The model that `model` names, and its adapter: the one named, or that of a lora run (whose base is found by the
    run's configuration). Raises ToyError (missing_file, bad_file, bad_flag) where the two do not fit."""
    card = cards.read(resolve(model))
    if is_adapter(card):
        if adapter is not None:
            raise ToyError(
                "bad_flag", f"{shown(card.path)} is an adapter itself", "name its base, or leave --adapter out"
            )
        base = cards.read(base_of(card))
        check(base, card)
        return base, card
    if adapter is None:
        return card, None
    found = cards.read(resolve(adapter))
    check(card, found)
    return card, found


def base_of(card: Card) -> Path:
    """The base of the adapter that a lora run left. Raises ToyError (bad_flag, missing_file)."""
    from toy import runs
    from toy.runs import history

    run = card.path.absolute().parent.parent
    stated = history.knobs(run).get("lora.base") if runs.is_run(run) else None
    if not stated:
        raise ToyError(
            "bad_flag",
            f"{shown(card.path)} is an adapter, and in no run that names its base",
            f"name the base, and --adapter {shown(card.path)}",
        )
    path = Path(str(stated)).expanduser()
    path = path if path.is_absolute() else (runs.find_project(run) or Path.cwd()) / path
    if not path.is_file():
        raise ToyError(
            "missing_file",
            f"the base of run {run.name} is not there: {shown(path)}",
            f"name the base where it is now, and --adapter {shown(card.path)}",
        )
    return path


def check(base: Card, adapter: Card) -> None:
    """Raises ToyError (bad_file) when `adapter` is none, or was made for another base: by its architecture, by the
    shapes of its tensors, by the hash of the base that it remembers."""
    name, other = shown(adapter.path), shown(base.path)
    if not is_adapter(adapter):
        raise ToyError("bad_file", f"{name} is a model, not an adapter", "name the adapter.gguf of a lora run")
    if is_adapter(base):
        raise ToyError("bad_file", f"{other} is an adapter, not a model", "name the base that the adapter is for")

    def unfit(why: str) -> ToyError:
        return ToyError("bad_file", f"{name} {why}", "name the base that the adapter was trained on")

    if adapter.architecture != base.architecture:
        raise unfit(f"adapts a {adapter.architecture} model, and {other} is a {base.architecture}")
    shapes = {str(tensor["name"]): list(tensor["shape"]) for tensor in base.tensors}
    for tensor in adapter.tensors:
        target, _, half = str(tensor["name"]).rpartition(".")
        shape = list(tensor["shape"])
        if half not in ("lora_a", "lora_b"):
            raise unfit(f"holds the tensor {tensor['name']}, which is no part of an adapter")
        if target not in shapes:
            raise unfit(f"adapts {target}, which {other} does not have")
        if (half == "lora_a" and shape[0] != shapes[target][0]) or (
            half == "lora_b" and shape[-1] != shapes[target][-1]
        ):
            sizes = " x ".join(str(n) for n in shapes[target])
            raise unfit(f"does not fit {other}: {target} is {sizes} there")
    stated = adapter.metadata.get("toy.lora.base_sha256")
    if isinstance(stated, str) and stated and stated != file_sha256(base.path):
        raise unfit(f"was trained on another base than {other}: its hash begins {stated[:12]}")


def file_sha256(path: Path) -> str:
    """The hash of a file, remembered by path, size and time."""
    from toy.builds import user_cache
    from toy.corpora.cache import Index
    from toy.corpora.sources import Part

    status = path.stat()
    part = Part(path, path.name, status.st_size, status.st_mtime_ns)
    index = Index(user_cache() / "hashes")
    digest = index.known(part)
    if digest is None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index.learn(part, digest)
        index.save()
    return digest
