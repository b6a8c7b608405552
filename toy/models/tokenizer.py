"""Text to ids and back, alike in `toy` and in llama.cpp."""

from __future__ import annotations

import codecs
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toy.errors import ToyError
from toy.models import hf_json
from toy.models.spm import SPACE, SentencePiece
from toy.models.vocabulary import (
    ALPHABET,
    BYTE,
    BYTE_OF,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    bpe_vocabulary,
    byte_vocabulary,
    character_vocabulary,
    from_metadata,
)

if TYPE_CHECKING:
    from toy.models.cards import Card

# The library warns on every fork of a process that used its threads unless this says that they are meant.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

KINDS = ("bytes", "chars", "bpe")
DEFAULT_BPE_SIZE = 2048
SMALLEST_BPE_SIZE = 257  # every byte, and the end of text


class Tokenizer:
    """One `Vocabulary`, with what encodes and decodes by it. `kind` is bytes, chars, bpe, file or gguf."""

    def __init__(self, vocabulary: Vocabulary, kind: str = "file"):
        self.vocabulary = vocabulary
        self.kind = kind
        self._encoder: Any = None
        self._has_all_bytes = True
        self._table: dict[int, str] = {}
        self._pieces: dict[int, bytes] = {}
        self._specials: list[tuple[str, int, bool]] | None = None

    # Where tokenizers come from

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """The tokenizer inside a GGUF. Raises ToyError (missing_file, bad_file, not_available)."""
        from toy.models import gguf

        return cls(from_metadata(gguf.read(path)["metadata"], str(path)), "gguf")

    @classmethod
    def from_card(cls, card: Card) -> Tokenizer:
        """The same, of a GGUF whose metadata is already read: with a large vocabulary that takes a while."""
        return cls(from_metadata(card.metadata, str(card.path)), "gguf")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """A `tokenizer.json` or a GGUF, told apart by its first bytes."""
        path = Path(path).expanduser()
        if path.is_dir() and (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except FileNotFoundError:
            hint = f"give one of {', '.join(KINDS)}, or the path of a tokenizer.json or a .gguf"
            raise ToyError("missing_file", f"no tokenizer named {str(path)!r}", hint) from None
        except OSError as error:
            hint = "give the path of a tokenizer.json or a .gguf"
            raise ToyError("bad_file", f"cannot read {path}: {error.strerror}", hint) from error
        if magic == b"GGUF":
            return cls.from_gguf(path)
        return cls(hf_json.read(path), "file")

    @classmethod
    def from_name(cls, name: str, texts: Callable[[], Iterable[str]] | None = None, vocab_size: int = 0) -> Tokenizer:
        """`bytes`, `chars` or `bpe` (both learned from `texts()`, pieces of the corpus), or a file.

        `vocab_size` is what `bpe` aims at (0: 2048); it can end smaller when the corpus has too few different pairs.
        """
        if name == "bytes":
            return cls(byte_vocabulary(), name)
        if name not in KINDS:
            return cls.from_file(name)
        if texts is None:
            raise ToyError(
                "bad_config", f"the tokenizer {name!r} is made from a corpus", "give the file of a tokenizer"
            )
        if name == "chars":
            characters: set[str] = set()
            for text in texts():
                characters.update(text)
            return cls(character_vocabulary(characters), name)
        return cls(_train_bpe(texts(), vocab_size or DEFAULT_BPE_SIZE), name)

    def padded(self, size: int) -> Tokenizer:
        """The same tokenizer with unused tokens up to `size`."""
        return self if size <= len(self) else Tokenizer(self.vocabulary.padded(size), self.kind)

    # What it is

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def eos_id(self) -> int | None:
        return self.vocabulary.special.get("eos")

    @property
    def bos_id(self) -> int | None:
        return self.vocabulary.special.get("bos")

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: end of text, of turn, of message."""
        return self.vocabulary.end_ids

    def to_gguf_metadata(self) -> dict[str, object]:
        return self.vocabulary.to_metadata()

    def to_json(self) -> str | None:
        return hf_json.to_json(self.vocabulary)

    # Encoding

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`.

        `add_special`: with the begin (and end) tokens the model asks for. `parse_special`: control tokens written out
        in the text, `<|im_end|>` say, become their ids; without it they are ordinary text. User-defined ones always do.
        """
        special = self.vocabulary.special
        ids: list[int] = []
        if add_special and self.vocabulary.add_bos and "bos" in special:
            ids.append(special["bos"])
        ids += self._encode_piece(text, at_start=True, parse_special=parse_special)
        if add_special and self.vocabulary.add_eos and "eos" in special:
            ids.append(special["eos"])
        return ids

    def encode_pieces(self, pieces: list[tuple[str, bool]]) -> list[array[int]]:
        """Ids of pieces of documents, each with whether it begins its document; pieces end where words do.

        Control tokens written out in a corpus stay ordinary text.
        """
        if self.vocabulary.model == "llama" or self._special_tokens(parse_special=False):
            return [array("i", self._encode_piece(text, at_start)) for text, at_start in pieces]
        if self.kind in ("bytes", "chars"):
            return [self._encode_characters(text) for text, _ in pieces]
        encoded = self._byte_level().encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
        return [array("i", self._known(one.ids)) for one in encoded]

    def _encode_piece(self, text: str, at_start: bool, parse_special: bool = False) -> list[int]:
        ids: list[int] = []
        for fragment in self._cut(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                at_start = True
            else:
                ids += self._encode_plain(fragment, at_start)
                at_start = False
        return ids

    def _encode_characters(self, text: str) -> array[int]:
        """For tokenizers that never join characters: a table, filled as characters come.

        The ids pass through a string of those code points, because that stays in C: UTF-32 is an array of 32-bit ids.
        """
        if self.kind == "bytes":
            as_ids = text.encode().decode("latin-1")
        else:
            for character in set(map(ord, set(text))) - self._table.keys():
                ids = self._encode_plain(chr(character), False)
                self._table[character] = "".join(map(chr, ids))
            as_ids = text.translate(self._table)
        ids_array = array("i")
        ids_array.frombytes(as_ids.encode("utf-32-le" if sys.byteorder == "little" else "utf-32-be", "surrogatepass"))
        return ids_array

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        vocabulary = self.vocabulary
        if vocabulary.model != "llama":
            return self._known(self._byte_level().encode(text, add_special_tokens=False).ids)
        if self._encoder is None:
            self._encoder = SentencePiece(vocabulary.tokens, vocabulary.scores, vocabulary.add_space_prefix)
        return cast("SentencePiece", self._encoder).encode(text, at_start)

    def _byte_level(self) -> Any:
        if self._encoder is None:
            self._encoder = hf_json.byte_level_encoder(self.vocabulary, all_bytes=True)
            self._has_all_bytes = set(ALPHABET) <= set(self.vocabulary.tokens)
        return self._encoder

    def _known(self, ids: list[int]) -> list[int]:
        return ids if self._has_all_bytes else [i for i in ids if i < len(self.vocabulary)]

    def _special_tokens(self, parse_special: bool) -> list[tuple[str, int]]:
        """Tokens cut out of the text before it is encoded, longest first."""
        if self._specials is None:
            vocabulary = self.vocabulary
            always = [i for i, kind in enumerate(vocabulary.types) if kind == USER_DEFINED]
            written = [i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN)]
            found = [(vocabulary.tokens[i], i, True) for i in always]
            found += [(vocabulary.tokens[i], i, False) for i in written]
            self._specials = sorted((entry for entry in found if entry[0]), key=lambda entry: -len(entry[0].encode()))
        return [(token, i) for token, i, always_cut in self._specials if always_cut or parse_special]

    def _cut(self, text: str, parse_special: bool) -> list[str | int]:
        fragments: list[str | int] = [text] if text else []
        for token, i in self._special_tokens(parse_special):
            if token not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                for n, part in enumerate(fragment.split(token)):
                    if n:
                        cut.append(i)
                    if part:
                        cut.append(part)
            fragments = cut
        return fragments

    # Decoding

    def piece(self, i: int, special: bool = False) -> bytes:
        """The bytes that id `i` stands for; control tokens are empty unless `special`."""
        if not 0 <= i < len(self.vocabulary):
            return b""
        kind = self.vocabulary.types[i]
        if kind in (CONTROL, UNKNOWN):
            return self.vocabulary.tokens[i].encode() if special else b""
        if i not in self._pieces:
            self._pieces[i] = self._piece(self.vocabulary.tokens[i], kind)
        return self._pieces[i]

    def _piece(self, token: str, kind: int) -> bytes:
        if kind == UNUSED:
            return b""
        if kind == BYTE and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        if kind != NORMAL:
            return token.encode()
        if self.vocabulary.model == "llama":
            return token.replace(SPACE, " ").encode()
        return b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in token)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 come out as U+FFFD. A space that encoding put before is taken off."""
        data = b"".join(self.piece(i, special) for i in ids)
        if self.vocabulary.add_space_prefix and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def stream(self, special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time, as a continuation of what was before."""
        return StreamDecoder(self, special)


class StreamDecoder:
    """Turns ids into text as they come, never half a character: bytes wait until the character is whole."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False):
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        return self._decoder.decode(self._tokenizer.piece(i, self._special))

    def finish(self) -> str:
        """What is left: an unfinished character comes out as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Byte-level BPE learned from `texts` with GPT-2's cuts; the same texts give the same bytes, however many threads.

    Raises ToyError when `vocab_size` cannot even hold the bytes.
    """
    if vocab_size < SMALLEST_BPE_SIZE:
        message = f"model.vocab_size={vocab_size} is too small for bpe"
        hint = f"bpe needs at least {SMALLEST_BPE_SIZE} (256 bytes and the end of text); or use the tokenizer chars"
        raise ToyError("bad_config", message, hint)
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(ALPHABET), special_tokens=[], show_progress=False
    )
    trainable.train_from_iterator(texts, trainer)
    ids = trainable.get_vocab()
    model = json.loads(trainable.to_str())["model"]
    return bpe_vocabulary(sorted(ids, key=ids.__getitem__), [(left, right) for left, right in model["merges"]])
