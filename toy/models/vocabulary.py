"""A tokenizer as a GGUF states it: the tokens, their kinds, the merges or scores, and the special ids.

Everything that makes or reads a tokenizer meets here, so that text is cut alike whether the tokenizer came from a
`tokenizer.json`, from a GGUF, or from a corpus, and alike in llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toy.errors import ToyError
from toy.models import pretokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

END_OF_TEXT = "<|endoftext|>"

#: Special ids a GGUF may name: our short name -> key after `tokenizer.ggml.`.
SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}

# Tokens that end an answer in the models we know, wherever the file forgets to say so.
_END_TEXTS = frozenset(
    [
        *("<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<|eom_id|>", "<|return|>", "<|call|>", "<end_of_utterance>"),
    ]
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokens (GPT-2's table), by byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = [""] * 256
    for byte in printable:
        table[byte] = chr(byte)
    spare = 256
    for byte in range(256):
        if not table[byte]:
            table[byte] = chr(spare)
            spare += 1
    return table


ALPHABET = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


@dataclass(frozen=True)
class Vocabulary:
    """`model` is `gpt2` (byte-level BPE, with `merges` and `pre`) or `llama` (SentencePiece, with `scores`)."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str = "gpt-2"
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text, sorted: eos, eot, eom, and tokens known to mean it."""
        ids = {self.special[name] for name in ("eos", "eot", "eom") if name in self.special}
        ids |= {i for i, token in enumerate(self.tokens) if token in _END_TEXTS}
        return sorted(ids)

    def to_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` keys of a GGUF."""
        out: dict[str, Any] = {"tokenizer.ggml.model": self.model}
        if self.model == "gpt2":
            out["tokenizer.ggml.pre"] = self.pre
        out["tokenizer.ggml.tokens"] = list(self.tokens)
        if self.model == "llama":
            out["tokenizer.ggml.scores"] = [float(score) for score in self.scores]
        out["tokenizer.ggml.token_type"] = list(self.types)
        if self.model == "gpt2":
            out["tokenizer.ggml.merges"] = list(self.merges)
        for name, key in SPECIAL_KEYS.items():
            if name in self.special:
                out[f"tokenizer.ggml.{key}"] = self.special[name]
        out["tokenizer.ggml.add_bos_token"] = self.add_bos
        out["tokenizer.ggml.add_eos_token"] = self.add_eos
        out["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        if self.chat_template is not None:
            out["tokenizer.chat_template"] = self.chat_template
        return out

    @property
    def sha256(self) -> str:
        """Identity of the tokenizer: the same for the same ids on the same text (the chat template aside)."""
        metadata = self.to_metadata()
        metadata.pop("tokenizer.chat_template", None)
        return hashlib.sha256(json.dumps(metadata, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def padded(self, size: int) -> Vocabulary:
        """The same vocabulary with unused tokens up to `size`, for models whose embedding has more rows."""
        spare = range(len(self.tokens), size)
        return replace(
            self,
            tokens=[*self.tokens, *(f"[PAD{i}]" for i in spare)],
            types=[*self.types, *(UNUSED for _ in spare)],
            scores=[*self.scores, *(-10000.0 for _ in spare)] if self.scores else [],
        )


def from_metadata(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """The vocabulary in a GGUF's metadata. `source` names the file in errors."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(model, str) or not isinstance(tokens, list) or not tokens:
        raise ToyError("bad_file", f"{source} has no tokenizer inside", "pass ids with --prompt-ids, or another model")
    if model not in ("gpt2", "llama"):
        raise ToyError(
            "not_available",
            f"{source} has a tokenizer of kind {model!r}, which toy does not read",
            "toy reads byte-level BPE (gpt2) and SentencePiece (llama); pass ids with --prompt-ids",
        )
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    scores = metadata.get("tokenizer.ggml.scores") or []
    merges = metadata.get("tokenizer.ggml.merges") or []
    if len(types) != len(tokens) or (scores and len(scores) != len(tokens)):
        raise ToyError("bad_file", f"{source}: tokens, types and scores differ in number", "convert the model again")
    special = {
        name: int(metadata[f"tokenizer.ggml.{key}"])
        for name, key in SPECIAL_KEYS.items()
        if 0 <= int(metadata.get(f"tokenizer.ggml.{key}", -1)) < len(tokens)
    }
    pre = str(metadata.get("tokenizer.ggml.pre") or "default") if model == "gpt2" else ""
    known = pretokenizers.PRE_TOKENIZERS.get(pre)
    if model == "llama":  # SentencePiece's own defaults, where the file is silent
        special = {"unk": 0, "bos": 1, "eos": 2} | special if len(tokens) > 2 else special
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=_with_end_tokens(tokens, types),
        merges=merges,
        scores=scores,
        pre=pre,
        special=special,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or (known and known.add_bos))),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", model == "llama")),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _with_end_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """Types with the well-known end tokens as control, whatever the file says (llama.cpp corrects them too)."""
    return [CONTROL if token in _END_TEXTS else kind for token, kind in zip(tokens, types, strict=True)]


def byte_vocabulary() -> Vocabulary:
    """256 tokens, one a byte (id = byte), and the end of text."""
    return _byte_level(list(ALPHABET), [])


def character_vocabulary(characters: set[str]) -> Vocabulary:
    """One token for each of `characters`, in code point order, then the pieces that several-byte ones are merged from.

    A byte-level tokenizer sees bytes, so a character of several bytes is built by merges, byte after byte; its pieces
    need tokens of their own. Of a character that is not there, the bytes without a token are dropped, as in llama.cpp.
    """
    tokens: list[str] = []
    pieces: set[str] = set()
    merges: dict[str, None] = {}
    for character in sorted(characters):
        spelled = [ALPHABET[byte] for byte in character.encode()]
        tokens.append("".join(spelled))
        for i in range(1, len(spelled)):
            left = "".join(spelled[:i])
            merges[f"{left} {spelled[i]}"] = None
            pieces |= {left, spelled[i]}
    # Shorter left sides first: "ab"+"c" can only be merged once "a"+"b" was.
    ordered = sorted(merges, key=lambda merge: (len(merge), merge))
    return _byte_level(tokens + sorted(pieces - set(tokens), key=lambda piece: (len(piece), piece)), ordered)


def bpe_vocabulary(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> Vocabulary:
    """A trained byte-level BPE, with the end of text as its last token."""
    return _byte_level(list(tokens), [f"{left} {right}" for left, right in merges])


def _byte_level(tokens: list[str], merges: list[str]) -> Vocabulary:
    end = len(tokens)
    return Vocabulary(
        model="gpt2",
        tokens=[*tokens, END_OF_TEXT],
        types=[NORMAL] * end + [CONTROL],
        merges=merges,
        special={"bos": end, "eos": end},
    )


def placeholder_vocabulary(n_ids: int, size: int = 0) -> Vocabulary:
    """For packed ids without a tokenizer: the text of id 7 is `[7]`, both ways, and the last id ends a text.

    The tokens are user-defined, so that llama.cpp and toy read `[1][2]` as the ids 1, 2 and print them so. `size` is
    the vocabulary wanted (0: one more than `n_ids`, for the end of text; exactly `n_ids`: there is no end of text).
    """
    size = max(n_ids, size) if size else n_ids + 1
    if size == n_ids:
        return Vocabulary(model="gpt2", tokens=[f"[{i}]" for i in range(size)], types=[USER_DEFINED] * size)
    return Vocabulary(
        model="gpt2",
        tokens=[*(f"[{i}]" for i in range(size - 1)), END_OF_TEXT],
        types=[USER_DEFINED] * (size - 1) + [CONTROL],
        special={"bos": size - 1, "eos": size - 1},
    )
