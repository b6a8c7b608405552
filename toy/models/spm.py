"""SentencePiece's byte-pair kind (`tokenizer.ggml.model = llama`): merges by score, unknown characters as bytes.

Text is one string with `▁` for spaces. Neighbours are merged while their concatenation is a token, the highest score
first and the leftmost among equals (Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

SPACE = "\u2581"  # ▁, which stands for a space inside tokens
_CACHED_WORDS = 65536
_CACHED_LENGTH = 32  # characters; longer words are rare and would fill the cache


class SentencePiece:
    """Encodes plain text (special tokens already cut out) by the rules above."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], add_space_prefix: bool = True):
        self._ids: dict[str, int] = {}
        for i, token in enumerate(tokens):
            self._ids[token] = i
        self._scores = list(scores) if scores else [0.0] * len(tokens)
        self._add_space_prefix = add_space_prefix
        self._words: dict[str, list[int]] = {}
        # Merges cannot cross a word's start when no token does: then words are independent, and can be cached.
        self._by_word = not any(SPACE in token.lstrip(SPACE) for token in tokens)

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """Token ids of `text`. `at_start`: it begins a text or follows a special token, so a space is put before."""
        if not text:
            return []
        if self._add_space_prefix and at_start:
            text = " " + text
        text = text.replace(" ", SPACE)
        if not self._by_word:
            return self._merge(text)
        ids: list[int] = []
        for word in _words(text):
            found = self._words.get(word)
            if found is None:
                found = self._merge(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(self._words) >= _CACHED_WORDS:
                        self._words.clear()
                    self._words[word] = found
            ids += found
        return ids

    def _merge(self, text: str) -> list[int]:
        parts = list(text)
        before = list(range(-1, len(parts) - 1))
        after = [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            token = self._ids.get(parts[left] + parts[right])
            if token is not None:
                heapq.heappush(queue, (-self._scores[token], left, right, len(parts[left]) + len(parts[right])))

        for i in range(1, len(parts)):
            consider(i - 1, i)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two was merged meanwhile
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])

        ids: list[int] = []
        for part in parts:
            if part:
                token = self._ids.get(part)
                ids += [token] if token is not None else self._bytes(part)
        return ids

    def _bytes(self, text: str) -> list[int]:
        ids = []
        for byte in text.encode():
            token = self._ids.get(f"<0x{byte:02X}>")
            if token is None and byte < 0x80:
                token = self._ids.get(chr(byte))
            if token is not None:
                ids.append(token)
        return ids


def _words(text: str) -> list[str]:
    """`text` cut where a `▁` follows something else; runs of `▁` stay with the word after them."""
    words: list[str] = []
    start = 0
    at = text.find(SPACE, 1)
    while at > 0:
        if text[at - 1] != SPACE:
            words.append(text[start:at])
            start = at
        at = text.find(SPACE, at + 1)
    words.append(text[start:])
    return words
