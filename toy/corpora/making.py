"""From a corpus to packed tokens with their tokenizer: checked first, packed once, found again by content."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toy.corpora import packed, packings
from toy.corpora.cache import Index, Meter, Progress, writing
from toy.corpora.packed import MANIFEST, TOKENIZER_GGUF, TOKENIZER_JSON, TOKENS, Prepared, TokenWriter
from toy.corpora.sources import Source, open_source, probe
from toy.errors import ToyError
from toy.models.tokenizer import DEFAULT_BPE_SIZE, KINDS, SMALLEST_BPE_SIZE, Tokenizer
from toy.models.vocabulary import placeholder_vocabulary

#: Changes when the same corpus and tokenizer would pack to other bytes.
PACKING = 1

#: Short sequences, packed, that a project or toy's own source has in `data/`.
SEQUENCES = "ts_seqs.bin"

#: What byte-level BPE makes of English, for a guess before packing.
BYTES_A_TOKEN = 3.5

_BATCH_CHARACTERS = 1 << 20
_SMALL = 1 << 23


def default_cache_dir(project: Path | None = None) -> Path:
    """`data/packed` of a project, else the user's cache (XDG_CACHE_HOME honoured)."""
    if project is not None:
        return project / "data" / "packed"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toy" / "packed"


def default_sequences(project: Path | None = None) -> Path | None:
    """The corpus of a recipe that names none: `data/ts_seqs.bin` of the project, else of toy's checkout."""
    home = os.environ.get("TOY_HOME")
    for root in (project, Path(home).expanduser() if home else None, Path(__file__).resolve().parents[2]):
        if root is not None and (root / "data" / SEQUENCES).is_file():
            return root / "data" / SEQUENCES
    return None


def check(
    corpus: str | Path | None,
    tokenizer: str = "bpe",
    vocab_size: int = 0,
    context: int = 0,
    val_fraction: float = 0.0,
) -> None:
    """The cheap validations, before anything is made: a few milliseconds, at most a small corpus read whole.

    Raises ToyError when the corpus is missing, empty, unreadable, binary or surely too short for one sequence (in its
    last `val_fraction` too), when the tokenizer's file is no tokenizer, or when `vocab_size` (0: the tokenizer's)
    cannot hold the corpus' ids.
    """
    path = Path(corpus).expanduser() if corpus else None
    if path is not None and packed.is_packed(path):
        _check_packed(packed.token_file(path), tokenizer, vocab_size, context, val_fraction)
        return
    source = open_source(path)
    probe(source)
    at_most = source.n_bytes + len(source.parts)  # a token is at least a byte; every document ends with one more
    small = source.n_bytes <= _SMALL
    if tokenizer == "chars" and small:
        characters = 0
        seen: set[str] = set()
        documents = 0
        for text, _, last in source.pieces(lambda n: None):
            characters += len(text)
            seen.update(text)
            documents += last
        at_most = characters + documents
        packings.require_vocabulary(vocab_size, len(Tokenizer.from_name("chars", lambda: seen)), tokenizer)
    elif tokenizer == "bytes":
        packings.require_vocabulary(vocab_size, len(Tokenizer.from_name("bytes")), tokenizer)
    elif tokenizer == "bpe":
        if 0 < vocab_size < SMALLEST_BPE_SIZE:
            raise packings.too_small(vocab_size, SMALLEST_BPE_SIZE, "bpe (256 bytes and the end of text)")
    elif tokenizer != "chars":
        packings.require_vocabulary(vocab_size, len(Tokenizer.from_file(tokenizer)), tokenizer)
    packed.require(source.name if path is None else str(path), at_most, context, val_fraction)


def vocabulary_size(corpus: str | Path | None, tokenizer: str = "bpe", vocab_size: int = 0) -> int:
    """The `vocab_size` that `prepare` would come to, found without writing: the corpus is read where it has to be.

    For bpe it is what is asked for (0: 2048), which a small corpus may not fill.
    """
    path = Path(corpus).expanduser() if corpus else None
    if path is not None and packed.is_packed(path):
        tokens = packed.token_file(path)
        manifest = packed.read_manifest(tokens)
        if tokenizer not in KINDS:
            own = len(Tokenizer.from_file(tokenizer))
        elif manifest is not None:
            own = int(manifest["vocab_size"])
        else:
            own = len(placeholder_vocabulary(packed.scan(tokens)[1] + 1, vocab_size))
    elif tokenizer == "bpe":
        own = vocab_size or DEFAULT_BPE_SIZE
    elif tokenizer in KINDS:
        source = open_source(path)
        own = len(Tokenizer.from_name(tokenizer, lambda: (text for text, _, _ in source.pieces(lambda n: None))))
    else:
        own = len(Tokenizer.from_file(tokenizer))
    return max(own, vocab_size)


def prepare(
    corpus: str | Path | None,
    tokenizer: str = "bpe",
    vocab_size: int = 0,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    like: Prepared | None = None,
) -> Prepared:
    """Packed tokens of `corpus`, from `cache_dir` when the same content was packed before.

    `tokenizer` is bytes, chars, bpe or a file (`tokenizer.json`, `.gguf`); packed tokens bring their own, unless a file
    is given. `vocab_size` is the size that bpe is trained to; for the others a larger one adds unused tokens, so that
    the result's `vocab_size` is the one asked for (0: the tokenizer's own). `like` is a corpus whose tokenizer to use,
    for validation texts. `progress(done, total)` counts bytes of the corpus.

    Nothing is left half-written, whenever it is stopped. Raises ToyError (missing_file, bad_file,
    bad_config, disk_full).
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = Path(corpus).expanduser() if corpus else None
    if path is not None and packed.is_packed(path):
        return _prepare_packed(packed.token_file(path), tokenizer, vocab_size, cache, progress, like)
    source = open_source(path)
    probe(source)
    index = Index(cache)
    learned = like is None and tokenizer in ("chars", "bpe")
    meter = Meter(progress, source.n_bytes, passes=3 if learned else 2)
    content = source.sha256(index.known, index.learn, meter.read)
    size = like.vocab_size if like is not None else vocab_size
    kind = like.manifest["tokenizer"]["kind"] if like is not None else tokenizer if tokenizer in KINDS else "file"
    spec = like.manifest["tokenizer"]["sha256"] if like is not None else packings.tokenizer_spec(tokenizer, index)
    index.save()
    folder = _place(cache, source, kind, spec, content, size)
    found = packings.load(folder)
    if found is not None:
        return found

    def texts() -> Iterator[str]:
        return (text for text, _, _ in source.pieces(meter.read))

    if like is not None:
        tok = Tokenizer(Tokenizer.from_gguf(like.tokenizer_gguf).vocabulary, kind)
    else:
        tok = Tokenizer.from_name(tokenizer, texts, vocab_size)
        packings.require_vocabulary(vocab_size, len(tok), tokenizer)
    with writing(folder, lambda: packings.load(folder) is not None) as part:
        with (part / TOKENS).open("wb") as file:
            writer = TokenWriter(file)
            documents = _pack(source, tok, writer, meter)
        manifest = {
            "format": packed.FORMAT,
            "name": source.name,
            "dtype": "int32",
            "n_tokens": writer.n_tokens,
            "n_documents": documents,
            "n_bytes": source.n_bytes,
            "sha256": writer.sha256,
            "vocab_size": max(len(tok), size),
            "eos_id": tok.eos_id,
            "tokenizer": like.manifest["tokenizer"] if like is not None else packings.describe(tok),
            "source": {"path": None if path is None else path.name, "sha256": content},
            "packing": PACKING,
        }
        packings.write_tokenizer(part, tok.padded(size))
        packings.write_json(part / MANIFEST, manifest)
    meter.finish()
    return packings.loaded(folder)


def _place(cache: Path, source: Source, kind: str, spec: str, content: str, size: int) -> Path:
    """Where these tokens are, or would be: by content, not by name."""
    key = hashlib.sha256(json.dumps([PACKING, content, spec, size]).encode()).hexdigest()
    return cache / f"{packings.slug(source.name)}-{kind}-{key[:16]}"


def token_count(
    corpus: str | Path | None, tokenizer: str = "bpe", vocab_size: int = 0, cache_dir: Path | None = None
) -> int:
    """How many tokens `prepare` would come to, without writing: exact where they are packed already, else a guess
    from the bytes."""
    path = Path(corpus).expanduser() if corpus else None
    if path is not None and packed.is_packed(path):
        return packed.token_file(path).stat().st_size // 4
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    source, index = open_source(path), Index(cache)
    kind = tokenizer if tokenizer in KINDS else "file"
    content = source.sha256(index.known, index.learn, lambda n: None)
    found = packings.load(_place(cache, source, kind, packings.tokenizer_spec(tokenizer, index), content, vocab_size))
    if found is not None:
        return found.n_tokens
    return int(source.n_bytes / (1 if tokenizer in ("bytes", "chars") else BYTES_A_TOKEN))


def _pack(source: Source, tok: Tokenizer, writer: TokenWriter, meter: Meter) -> int:
    documents = 0
    batch: list[tuple[str, bool, bool]] = []
    waiting = 0

    def flush() -> None:
        ids = array("i")
        encoded = tok.encode_pieces([(text, first) for text, first, _ in batch])
        for (_, _, last), found in zip(batch, encoded, strict=True):
            ids.extend(found)
            if last and tok.eos_id is not None:
                ids.append(tok.eos_id)
        writer.write(ids)
        batch.clear()

    for piece in source.pieces(meter.read):
        batch.append(piece)
        waiting += len(piece[0]) + 256  # a piece costs something even when it is short
        documents += piece[2]
        if waiting >= _BATCH_CHARACTERS:
            flush()
            waiting = 0
    flush()
    return documents


# Packed tokens given by the user


def _check_packed(tokens: Path, tokenizer: str, vocab_size: int, context: int, val_fraction: float = 0.0) -> None:
    if not tokens.exists():
        raise ToyError("missing_file", f"no corpus at {tokens}", "a .bin corpus is packed tokens; is the path right?")
    manifest = packed.read_manifest(tokens)
    if manifest is not None:
        count, needed = manifest["n_tokens"], manifest["vocab_size"]
    elif tokens.stat().st_size <= 8 * _SMALL:
        count, largest, _ = packed.scan(tokens)
        needed = largest + 1
    else:
        count, needed = tokens.stat().st_size // 4, 0
    if tokenizer not in KINDS:
        have = len(Tokenizer.from_file(tokenizer))
        if have < needed:
            raise packings.ids_beyond(tokens, needed - 1, have, f"the tokenizer {tokenizer}")
    if 0 < vocab_size < needed:
        raise packings.ids_beyond(tokens, needed - 1, vocab_size, "model.vocab_size")
    packed.require(str(tokens), count, context, val_fraction)


def _prepare_packed(
    tokens: Path, tokenizer: str, vocab_size: int, cache: Path, progress: Progress | None, like: Prepared | None
) -> Prepared:
    _check_packed(tokens, tokenizer, 0, 0)
    manifest = packed.read_manifest(tokens)
    own = manifest is not None and tokenizer in KINDS and like is None and (tokens.parent / TOKENIZER_GGUF).is_file()
    if own and manifest is not None and vocab_size in (0, manifest["vocab_size"]):
        return packings.loaded(tokens.parent, tokens)
    index = Index(cache)
    meter = Meter(progress, tokens.stat().st_size, passes=1)
    count, largest, sha256 = index.scan(tokens, meter)
    index.save()
    if like is not None:
        theirs = manifest["tokenizer"].get("sha256") if manifest is not None else None
        if theirs is not None and theirs != like.manifest["tokenizer"]["sha256"]:
            raise ToyError(
                "bad_file",
                f"{tokens} was packed with another tokenizer than the corpus",
                "pack both with the same tokenizer file",
            )
        if largest >= like.vocab_size:
            raise packings.ids_beyond(tokens, largest, like.vocab_size, "the corpus' vocabulary")
        about = (manifest or {}) | {"n_tokens": count, "sha256": sha256, "tokenizer": like.manifest["tokenizer"]}
        return Prepared(tokens, like.tokenizer_gguf, like.tokenizer_json, about, like.vocab_size, count, sha256)
    if tokenizer not in KINDS:
        tok = Tokenizer.from_file(tokenizer)
    elif manifest is not None:
        tok = _own_tokenizer(tokens, manifest)
    else:
        if 0 < vocab_size <= largest:
            raise packings.ids_beyond(tokens, largest, vocab_size, "model.vocab_size")
        tok = Tokenizer(placeholder_vocabulary(largest + 1, vocab_size), "ids")
    if largest >= len(tok):
        raise packings.ids_beyond(tokens, largest, len(tok), "its tokenizer")
    packings.require_vocabulary(vocab_size, len(tok), tok.kind)
    key = hashlib.sha256(json.dumps([PACKING, sha256, tok.vocabulary.sha256, vocab_size]).encode()).hexdigest()
    folder = cache / f"{packings.slug(tokens.stem)}-{tok.kind}-{key[:16]}"
    found_before = packings.load(folder, tokens)
    if found_before is not None:
        return found_before
    with writing(folder, lambda: packings.load(folder, tokens) is not None) as part:
        about = {
            "format": packed.FORMAT,
            "name": tokens.stem,
            "dtype": "int32",
            "n_tokens": count,
            "n_documents": (manifest or {}).get("n_documents", 0),
            "n_bytes": tokens.stat().st_size,
            "sha256": sha256,
            "vocab_size": max(len(tok), vocab_size),
            "eos_id": tok.eos_id,
            "tokenizer": packings.describe(tok),
            "source": {"path": tokens.name, "sha256": sha256},
            "packing": PACKING,
        }
        if manifest is not None and "context" in manifest:
            about["context"] = manifest["context"]
        packings.write_tokenizer(part, tok.padded(vocab_size))
        packings.write_json(part / MANIFEST, about)
    return packings.loaded(folder, tokens)


def _own_tokenizer(tokens: Path, manifest: dict[str, Any]) -> Tokenizer:
    for name in (TOKENIZER_GGUF, manifest["tokenizer"].get("file"), TOKENIZER_JSON):
        if name and (tokens.parent / name).is_file():
            return Tokenizer(Tokenizer.from_file(tokens.parent / name).vocabulary, "file")
    if manifest["tokenizer"].get("kind") == "bytes":  # the one that needs no file
        return Tokenizer.from_name("bytes")
    raise ToyError(
        "missing_file",
        f"the tokenizer of {tokens} is not beside it",
        f"put {TOKENIZER_GGUF} or {TOKENIZER_JSON} there, or name one with --set data.tokenizer=FILE",
    )
