"""`tokenizer.json` of the Hugging Face `tokenizers` library, to and from our `Vocabulary`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from toy.errors import ToyError
from toy.models import pretokenizers
from toy.models.vocabulary import (
    ALPHABET,
    BYTE,
    CONTROL,
    END_OF_TEXT,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)

_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")
_BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]")


def read(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`; the file beside it (`tokenizer_config.json`) names the special tokens."""
    document = _load(path)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise ToyError(
            "bad_file",
            f"{path} holds a {kind or 'unknown'} tokenizer" if kind else f"{path} is not a tokenizer.json",
            "toy takes byte-pair tokenizers (type BPE): byte-level ones and SentencePiece ones with byte fallback",
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    tokens, types, special_names = _tokens(path, model["vocab"], document.get("added_tokens") or [])
    settings = _settings(path)
    special = _special_ids(tokens, settings)
    if "eos" not in special:
        special["eos"] = len(tokens)
        tokens.append(END_OF_TEXT)
        types.append(CONTROL)
    special.setdefault("bos", special["eos"])
    template = settings.get("chat_template")
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "chat_template": template if isinstance(template, str) else None,
    }
    if _is_byte_level(document):
        pre = _pre_name(path, document.get("pre_tokenizer"))
        add_bos = bool(settings.get("add_bos_token", pretokenizers.PRE_TOKENIZERS[pre].add_bos))
        return Vocabulary(model="gpt2", merges=merges, pre=pre, add_bos=add_bos, **common)
    if model.get("byte_fallback") and "<0x00>" in model["vocab"]:
        return _sentence_piece(document, merges, special_names, settings, common)
    raise ToyError(
        "bad_file",
        f"{path} is neither a byte-level BPE nor a SentencePiece BPE with byte fallback",
        "llama.cpp could not tokenize alike; choose another tokenizer, or bytes, chars or bpe",
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToyError("missing_file", f"no tokenizer at {path}", "give bytes, chars, bpe or a file") from None
    except OSError as error:
        raise ToyError("bad_file", f"cannot read {path}: {error.strerror}", "check the file's permissions") from error
    except ValueError as error:
        raise ToyError("bad_file", f"{path} is not JSON: {error}", "give a tokenizer.json or a .gguf") from error
    if not isinstance(document, dict):
        raise ToyError("bad_file", f"{path} is not a tokenizer.json", "give a tokenizer.json or a .gguf")
    return document


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _tokens(
    path: Path, vocab: dict[str, int], added: list[dict[str, Any]]
) -> tuple[list[str], list[int], dict[str, bool]]:
    by_id = {i: token for token, i in vocab.items()} | {token["id"]: token["content"] for token in added}
    size = max(by_id, default=-1) + 1
    if size == 0 or size > 4 * len(by_id) + 4096:
        raise ToyError("bad_file", f"{path}: token ids are not a usable range", "is the file whole?")
    special = {token["content"]: bool(token.get("special")) for token in added}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [
        UNUSED if i not in by_id else NORMAL if t not in special else CONTROL if special[t] else USER_DEFINED
        for i, t in enumerate(tokens)
    ]
    return tokens, types, special


def _special_ids(tokens: list[str], settings: dict[str, Any]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    special: dict[str, int] = {}
    for name, key, usual in (("bos", "bos_token", _BEGIN_NAMES), ("eos", "eos_token", _END_NAMES)):
        stated = settings.get(key)
        stated = stated.get("content") if isinstance(stated, dict) else stated
        chosen = stated if stated in ids else next((token for token in usual if token in ids), None)
        if chosen is not None:
            special[name] = ids[chosen]
    for name, key in (("unk", "unk_token"), ("pad", "pad_token")):
        stated = settings.get(key)
        stated = stated.get("content") if isinstance(stated, dict) else stated
        if stated in ids:
            special[name] = ids[stated]
    return special


def _is_byte_level(document: dict[str, Any]) -> bool:
    steps = _steps(document.get("pre_tokenizer"))
    return any(step.get("type") == "ByteLevel" for step in steps)


def _steps(part: dict[str, Any] | None, key: str = "pretokenizers") -> list[dict[str, Any]]:
    if not part:
        return []
    return list(part.get(key, [])) if part.get("type") == "Sequence" else [part]


def _pre_name(path: Path, part: dict[str, Any] | None) -> str:
    """The GGUF name of the cuts in `pre_tokenizer`."""
    patterns: list[str] = []
    known = True
    for step in _steps(part):
        kind = step.get("type")
        if kind == "ByteLevel":
            known &= not step.get("add_prefix_space", False)
            if step.get("use_regex", True):
                patterns.append(pretokenizers.GPT2)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern", {})
            patterns.append(pattern.get("Regex", "") if isinstance(pattern, dict) else "")
        else:
            known = False
    name = pretokenizers.name_of(tuple(patterns)) if known else None
    if name is None:
        raise ToyError(
            "bad_file",
            f"{path} cuts text into words in a way that has no name in a GGUF",
            "llama.cpp could not tokenize alike; give the model's .gguf, or use bytes, chars or bpe",
        )
    return name


def _sentence_piece(
    document: dict[str, Any],
    merges: list[str],
    special: dict[str, bool],
    settings: dict[str, Any],
    common: dict[str, Any],
) -> Vocabulary:
    """Merge ranks become scores: a token's score is minus the rank of the first merge that makes it."""
    tokens: list[str] = common["tokens"]
    scores = [0.0 if token in special else -float(len(merges) + 1) for token in tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    for rank in range(len(merges) - 1, -1, -1):
        made = ids.get(merges[rank].replace(" ", ""))
        if made is not None:
            scores[made] = -float(rank)
    types = list(common["types"])
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif token == "<unk>":
            types[i] = UNKNOWN
            common["special"].setdefault("unk", i)
    prefix = any(step.get("type") == "Prepend" for step in _steps(document.get("normalizer"), "normalizers"))
    prefix |= any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(document.get("pre_tokenizer"))
    )
    common = common | {"types": types}
    return Vocabulary(
        model="llama",
        scores=scores,
        pre="",
        add_bos=bool(settings.get("add_bos_token", True)),
        add_space_prefix=prefix,
        **common,
    )


def to_json(vocabulary: Vocabulary) -> str | None:
    """A `tokenizer.json` that cuts text as `vocabulary` does, or None: the SentencePiece kind has no equal there."""
    if vocabulary.model != "gpt2":
        return None
    from tokenizers import AddedToken, decoders

    encoder = byte_level_encoder(vocabulary)
    encoder.decoder = decoders.ByteLevel()
    by_kind: dict[int, list[Any]] = {CONTROL: [], USER_DEFINED: []}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in by_kind:
            by_kind[kind].append(AddedToken(token, normalized=False, special=kind == CONTROL))
    encoder.add_special_tokens(by_kind[CONTROL])
    encoder.add_tokens(by_kind[USER_DEFINED])
    return str(encoder.to_str(pretty=True)) + "\n"


def byte_level_encoder(vocabulary: Vocabulary, *, all_bytes: bool = False) -> Any:
    """A `tokenizers.Tokenizer` for plain text: it knows no special tokens, those are cut out before.

    Bytes that have no token are dropped before merging, so their neighbours could join. llama.cpp drops them after. For
    its ids, ask for `all_bytes` and drop the ids past the vocabulary: they stand for those bytes.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    if all_bytes:
        for byte, character in enumerate(ALPHABET):
            ids.setdefault(character, len(vocabulary.tokens) + byte)
    merges: list[Any] = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    pre = pretokenizers.PRE_TOKENIZERS.get(vocabulary.pre)
    if pre is None:
        _warn_once(vocabulary.pre)
        pre = pretokenizers.PRE_TOKENIZERS["gpt-2"]
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception:  # of no kind of its own: a merge whose parts or result are no tokens, which can never be made
        merges = [pair for pair in merges if len(pair) == 2 and {*pair, "".join(pair)} <= ids.keys()]
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
    encoder = Tokenizer(model)
    if pre.patterns == (pretokenizers.GPT2,):
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        cuts = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        encoder.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return encoder


_warned: set[str] = set()


def _warn_once(pre: str) -> None:
    if pre not in _warned:
        _warned.add(pre)
        message = f"warning: the model's pre-tokenizer {pre!r} is unknown; cutting text as GPT-2 does, ids may differ"
        print(message, file=sys.stderr)
