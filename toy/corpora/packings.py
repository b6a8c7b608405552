"""One packing: a folder with tokens, tokenizer and manifest, written and found again; what identifies its tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from toy.corpora import packed
from toy.corpora.cache import Index
from toy.corpora.packed import MANIFEST, MASK, OFFSETS, TOKENIZER_GGUF, TOKENIZER_JSON, TOKENS, Prepared
from toy.corpora.sources import Part
from toy.errors import ToyError, shown
from toy.models import gguf
from toy.models.tokenizer import KINDS, Tokenizer


def tokenizer_spec(tokenizer: str, index: Index) -> str:
    """Identity of a tokenizer by its name: a GGUF's is that of its tokenizer and chat template, not of its weights."""
    if tokenizer in KINDS:
        return tokenizer
    path = Path(tokenizer).expanduser()
    path = path / TOKENIZER_JSON if path.is_dir() else path
    if not path.is_file():
        Tokenizer.from_file(tokenizer)  # says what is wrong
    status = path.stat()
    part = Part(path, path.name, status.st_size, status.st_mtime_ns)
    digest = index.known(part)
    if digest is None:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        digest = identity(Tokenizer.from_gguf(path)) if is_gguf else hashlib.sha256(path.read_bytes()).hexdigest()
        index.learn(part, digest)
    return digest


def identity(tok: Tokenizer) -> str:
    """The same for tokenizers that make the same ids of texts and of conversations."""
    template = tok.vocabulary.chat_template or ""
    return hashlib.sha256(f"{tok.vocabulary.sha256} {template}".encode()).hexdigest()


def load(folder: Path, tokens: Path | None = None) -> Prepared | None:
    """What was packed into `folder` before, or None: damaged packings are made again."""
    try:
        return loaded(folder, tokens)
    except (ToyError, OSError, KeyError, ValueError):
        return None


def loaded(folder: Path, tokens: Path | None = None) -> Prepared:
    """The packing in `folder`, of tokens that may lie elsewhere. Raises ToyError, OSError, KeyError or ValueError."""
    tokens_path = folder / TOKENS if tokens is None else tokens
    if tokens is None or tokens.parent == folder:
        manifest = packed.read_manifest(tokens_path)
    else:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    vocabulary = folder / TOKENIZER_GGUF
    if manifest is None or not vocabulary.is_file():
        raise ToyError("bad_file", f"{folder} holds no packed tokens", "remove it")
    as_json = folder / TOKENIZER_JSON
    about = manifest.get("examples")
    if about is not None:
        sizes = {OFFSETS: 8 * (int(about["n_examples"]) + 1), MASK: int(manifest["n_tokens"])}
        for name, size in sizes.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ToyError("bad_file", f"{folder / name} is cut short or missing", "pack the examples again")
    return Prepared(
        tokens=tokens_path.absolute(),
        tokenizer_gguf=vocabulary.absolute(),
        tokenizer_json=as_json.absolute() if as_json.is_file() else None,
        manifest=manifest,
        vocab_size=int(manifest["vocab_size"]),
        n_tokens=int(manifest["n_tokens"]),
        sha256=str(manifest["sha256"]),
        offsets=(folder / OFFSETS).absolute() if about is not None else None,
        mask=(folder / MASK).absolute() if about is not None else None,
        n_examples=int(about["n_examples"]) if about is not None else 0,
        longest=int(about["longest"]) if about is not None else 0,
    )


def describe(tok: Tokenizer) -> dict[str, Any]:
    has_json = tok.vocabulary.model == "gpt2"
    return {
        "kind": tok.kind,
        "file": TOKENIZER_JSON if has_json else TOKENIZER_GGUF,
        "gguf": TOKENIZER_GGUF,
        "sha256": tok.vocabulary.sha256,
    }


def write_tokenizer(folder: Path, tok: Tokenizer) -> None:
    gguf.write_vocabulary(folder / TOKENIZER_GGUF, tok.to_gguf_metadata())
    as_json = tok.to_json()
    if as_json is not None:
        (folder / TOKENIZER_JSON).write_text(as_json, encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def slug(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)[:40].strip("-") or "corpus"


def check_vocabulary(corpus: str | Path, model: Path, what: str) -> None:
    """Refuse packed tokens of another vocabulary than that of a model's GGUF: their ids mean other words. Texts, and
    ids of which nobody says what they are, pass. `what` the model is: donor, base, model."""
    path = Path(corpus).expanduser()
    if not packed.is_packed(path):
        return
    tokens = packed.token_file(path)
    manifest = packed.read_manifest(tokens)
    if manifest is None:
        return
    vocabulary = Tokenizer.from_gguf(model).vocabulary
    # the file of a model may name unused tokens after the tokenizer's own
    own = tokens.parent / TOKENIZER_GGUF
    same = manifest["tokenizer"].get("sha256") == vocabulary.sha256 or (
        own.is_file() and Tokenizer.from_gguf(own).vocabulary.padded(len(vocabulary)).sha256 == vocabulary.sha256
    )
    if not same:
        raise ToyError(
            "bad_file",
            f"{shown(path)} was packed with another vocabulary ({manifest['vocab_size']} tokens) than that of"
            f" the {what} {shown(model)} ({len(vocabulary)})",
            f"give the text itself: it is packed with the {what}'s tokenizer",
        )


def require_vocabulary(vocab_size: int, needed: int, tokenizer: str) -> None:
    if 0 < vocab_size < needed:
        raise too_small(vocab_size, needed, f"the tokenizer {tokenizer}")


def too_small(vocab_size: int, needed: int, what: str) -> ToyError:
    message = f"model.vocab_size={vocab_size} is too small: {what} needs {needed}"
    return ToyError("bad_config", message, f"set model.vocab_size={needed} or more, or 0 for the tokenizer's own size")


def ids_beyond(tokens: Path, largest: int, vocab_size: int, what: str) -> ToyError:
    return ToyError(
        "bad_config",
        f"corpus {tokens} has the id {largest}, beyond {what} of {vocab_size}",
        f"set model.vocab_size={largest + 1} or more, or 0 for the corpus' own, or give the right tokenizer",
    )
