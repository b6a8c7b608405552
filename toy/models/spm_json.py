"""SentencePiece's byte-pair kind as a `tokenizer.json`: scores become merges."""

from __future__ import annotations

from typing import Any

from toy.models.spm import SPACE
from toy.models.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the highest score of what they make first, then by their ids."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    plain = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind not in (BYTE, CONTROL, UNKNOWN)
    }
    scores = vocabulary.scores or [0.0] * len(vocabulary)
    found = [
        (-scores[ids[token]], ids[token[:cut]], ids[token[cut:]])
        for token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(found)]


def to_json(vocabulary: Vocabulary) -> str:
    """A `tokenizer.json` for a `llama` vocabulary: bytes stand in for unknown characters, `▁` for spaces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special.get("unk")
    encoder = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges_of(vocabulary),
            unk_token=vocabulary.tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    pieces: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    encoder.normalizer = normalizers.Sequence(spaces)
    encoder.decoder = decoders.Sequence(pieces)
    kinds = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    encoder.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in kinds if k in (CONTROL, UNKNOWN)]
    )
    encoder.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED])
    return str(encoder.to_str(pretty=True)) + "\n"
