"""Sets of examples: JSONL of texts, prompts with completions, and conversations -> tokens, offsets and a mask.

The mask says which tokens are learned: all of a text, a completion, the assistant's turns; each with the token that
ends it. A prompt is tokenised as `toy infer` does it, and what is learned as its continuation, so that a model trained
on an example meets the same ids when it is asked.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from toy.corpora import packed, packings
from toy.corpora.cache import Index, Meter, Progress, writing
from toy.corpora.making import default_cache_dir
from toy.corpora.packed import MANIFEST, MASK, OFFSETS, TOKENS, Prepared, TokenWriter
from toy.corpora.sources import JSONL, Part, Reading, Source, open_source, reading
from toy.errors import ToyError, json_reason
from toy.models.chat import ChatTemplate, Message, Segment, TemplateError
from toy.models.tokenizer import KINDS, Tokenizer
from toy.models.vocabulary import CONTROL, UNKNOWN

#: Changes when the same examples and tokenizer would pack to other bytes.
PACKING = 2

_HINT = 'a line is {"text": …}, {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'
_BATCH_CHARACTERS = 1 << 20
_SMALL = 1 << 22
_LOOKED_AT = 1000  # examples among which a question is looked for


@dataclass(frozen=True)
class Record:
    """One line: `kind` is text, prompt or messages. `place` is file:line."""

    place: str
    kind: str
    prompt: str = ""
    answer: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [self.prompt, self.answer, *(message["content"] for message in self.messages)]


def kind_of(corpus: str | Path | None, texts_are_examples: bool = False) -> str:
    """`text` (a stream to cut windows from) or `examples`, by the first line of a JSONL.

    `texts_are_examples`: lines of {"text"} are examples too, and not documents of a stream; after a first line of
    another kind they always are. Raises ToyError when the corpus is missing or its first line is none of the kinds.
    """
    path = Path(corpus).expanduser() if corpus else None
    if path is None:
        return "text"
    if packed.is_packed(path):
        tokens = packed.token_file(path)
        manifest = packed.read_manifest(tokens) if tokens.exists() else None
        return "examples" if manifest is not None and "examples" in manifest else "text"
    source = open_source(path)
    lines, others = _parts(source)
    if not lines:
        return "text"
    first = next(_records([lines[0]], lambda n: None), None)
    kind = "examples" if first and (first.kind != "text" or (texts_are_examples and not others)) else "text"
    if kind == "examples" and others:
        message = f"{path} mixes examples ({lines[0].name}) with text ({others[0].name})"
        raise ToyError("bad_file", message, "keep the .jsonl of examples in a folder of their own")
    return kind


def check_examples(corpus: str | Path, tokenizer: str = "bpe", like: Prepared | None = None) -> None:
    """The cheap validations, before anything is made: of a small set every line, of a large one the first.

    Raises ToyError when the corpus is missing, a line is no example, the tokenizer is none, or conversations come
    without a template that takes them.
    """
    path = Path(corpus).expanduser()
    if packed.is_packed(path):
        _load_packed(path, tokenizer, like)
        return
    source = open_source(path)
    tok = _known_tokenizer(tokenizer, like)
    conversations = 0
    for record in _records(_parts(source)[0], lambda n: None):
        conversations += record.kind == "messages"
        if record.kind == "messages" and conversations == 1:
            _Encoder(tok or Tokenizer.from_name("bytes"), tokenizer).segments(record)
        if source.n_bytes > _SMALL:
            break


def prepare_examples(
    corpus: str | Path,
    tokenizer: str = "bpe",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    like: Prepared | None = None,
    *,
    vocab_size: int = 0,
) -> Prepared:
    """Packed examples of `corpus`, from `cache_dir` when the same content was packed before.

    `tokenizer` is bytes, chars, bpe, a `tokenizer.json`, or a GGUF, whose chat template conversations are written with.
    `like` is a set (or a corpus) whose tokenizer to use, for validation. `vocab_size` is as for `corpora.prepare`.
    `progress(done, total)` counts bytes. Nothing is left half-written. Raises ToyError (missing_file, bad_file,
    bad_config, disk_full); what is wrong with a line names file:line.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = Path(corpus).expanduser()
    if packed.is_packed(path):
        return _load_packed(path, tokenizer, like)
    source = open_source(path)
    lines = _parts(source)[0]
    index = Index(cache)
    tok = _known_tokenizer(tokenizer, like)
    meter = Meter(progress, source.n_bytes, passes=2 if tok is not None else 3)
    content = source.sha256(index.known, index.learn, meter.read)
    spec = packings.identity(tok) if tok is not None else tokenizer
    index.save()
    size = like.vocab_size if like is not None else vocab_size
    key = hashlib.sha256(json.dumps(["examples", PACKING, content, spec, size]).encode()).hexdigest()
    folder = cache / f"{packings.slug(source.name)}-examples-{key[:16]}"
    found = packings.load(folder)
    if found is not None:
        return found
    if tok is None:
        texts = (text for record in _records(lines, meter.read) for text in record.texts)
        tok = Tokenizer.from_name(tokenizer, lambda: texts, vocab_size)
    packings.require_vocabulary(size, len(tok), tokenizer)
    with writing(folder, lambda: packings.load(folder) is not None) as part:
        about = _pack(part, _Encoder(tok, tokenizer), _records(lines, meter.read))
        if about["examples"]["n_examples"] == 0:
            raise ToyError("bad_file", f"{path} has no examples in it", _HINT)
        manifest = {
            "format": packed.FORMAT,
            "name": source.name,
            "dtype": "int32",
            "n_tokens": about["n_tokens"],
            "n_documents": about["examples"]["n_examples"],
            "n_bytes": source.n_bytes,
            "sha256": about["sha256"],
            "vocab_size": max(len(tok), size),
            "eos_id": tok.eos_id,
            "tokenizer": like.manifest["tokenizer"] if like is not None else packings.describe(tok),
            "source": {"path": path.name, "sha256": content},
            "packing": PACKING,
            "examples": about["examples"],
        }
        packings.write_tokenizer(part, tok.padded(size))
        packings.write_json(part / MANIFEST, manifest)
    meter.finish()
    return packings.loaded(folder)


def _known_tokenizer(tokenizer: str, like: Prepared | None) -> Tokenizer | None:
    """The tokenizer, unless it is yet to be learned from the examples."""
    if like is not None:
        return Tokenizer.from_gguf(like.tokenizer_gguf)
    return None if tokenizer in ("chars", "bpe") else Tokenizer.from_name(tokenizer)


def _load_packed(path: Path, tokenizer: str, like: Prepared | None) -> Prepared:
    """Examples that were packed before. Their ids are a tokenizer's: no other one may come with them."""
    if not packed.token_file(path).exists():
        raise ToyError("missing_file", f"no examples at {path}", "give the folder that was packed, or a .jsonl")
    made = packings.loaded(packed.token_file(path).parent)
    if made.offsets is None:
        raise ToyError("bad_file", f"{path} is a packed text, not a set of examples", _HINT)
    theirs = made.manifest["tokenizer"].get("sha256")
    wanted = None
    if like is not None:
        wanted = like.manifest["tokenizer"]["sha256"]
    elif tokenizer not in KINDS:
        wanted = Tokenizer.from_file(tokenizer).vocabulary.sha256
    if wanted is not None and theirs != wanted:
        message = f"{path} was packed with another tokenizer than {tokenizer if like is None else 'the corpus'}"
        raise ToyError("bad_file", message, "pack the examples again, with the GGUF that is trained as the tokenizer")
    return made


# Lines


def first_question(corpus: str | Path) -> tuple[str, bool] | None:
    """What the first example that asks something asks, and whether as a chat; None where none does, as in {text}."""
    path = Path(corpus).expanduser()
    if packed.is_packed(path):
        return None
    for record in islice(_records(_parts(open_source(path))[0], lambda n: None), _LOOKED_AT):
        asked = [message["content"] for message in record.messages if message["role"] == "user"]
        question = asked[0] if asked else record.prompt
        if question.strip():
            return question, bool(asked)
    return None


def _parts(source: Source) -> tuple[list[Part], list[Part]]:
    lines = [part for part in source.parts if part.name.endswith(tuple(JSONL))]
    return lines, [part for part in source.parts if part not in lines]


def _records(parts: Iterable[Part], read: Reading) -> Iterator[Record]:
    """All examples of JSONL files, of one kind or of several. Raises ToyError (bad_file) naming file:line."""
    for part in parts:
        assert part.path is not None
        with reading(part.path), part.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                read(len(line))
                data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not data.strip():
                    continue
                yield _record(f"{part.path}:{number}", data)


def _record(place: str, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ToyError("bad_file", f"{place}: not JSON ({json_reason(error)})", _HINT) from None
    if not isinstance(value, dict):
        raise ToyError("bad_file", f"{place}: not an object with a text, a prompt or messages", _HINT)
    if "messages" in value:
        return Record(place, "messages", messages=_messages(place, value["messages"]))
    if "prompt" in value or "completion" in value:
        prompt, answer = (_string(place, value, key) for key in ("prompt", "completion"))
        if not answer.strip():
            raise ToyError("bad_file", f"{place}: the completion is empty", "every example needs an answer to learn")
        return Record(place, "prompt", prompt=prompt, answer=answer)
    if "text" not in value:
        raise ToyError("bad_file", f"{place}: no text, prompt or messages in this line", _HINT)
    text = _string(place, value, "text")
    if not text.strip():
        raise ToyError("bad_file", f"{place}: the text is empty", "remove the line")
    return Record(place, "text", answer=text)


def _string(place: str, value: dict[str, Any], key: str, of: str = "this line") -> str:
    text = value.get(key)
    if not isinstance(text, str):
        message = f"{place}: no {key} in {of}" if text is None else f"{place}: the {key} of {of} is not a string"
        raise ToyError("bad_file", message, _HINT)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ToyError("bad_file", f"{place}: the {key} holds half a surrogate pair", _HINT) from None
    return text


def _messages(place: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ToyError("bad_file", f"{place}: messages is not a list of messages", _HINT)
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise ToyError("bad_file", f"{place}: message {number} is not an object", _HINT)
        role = _string(place, message, "role", f"message {number}")
        content = _string(place, message, "content", f"message {number}")
        if role == "assistant" and not content.strip():
            hint = "every answer needs words to learn; remove the message or the line"
            raise ToyError("bad_file", f"{place}: the answer in message {number} is empty", hint)
    if not any(message["role"] == "assistant" for message in value):
        message = f"{place}: no message of the assistant, so nothing to learn"
        raise ToyError("bad_file", message, 'give its answer: {"role": "assistant", "content": …}')
    return tuple(value)


# Tokens


class _Encoder:
    """Records to ids and masks."""

    def __init__(self, tok: Tokenizer, name: str):
        self._tok = tok
        self._name = name
        self._template: ChatTemplate | None = None
        self._stops = set(tok.stop_ids)
        vocabulary = tok.vocabulary
        written = [i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN) and vocabulary.tokens[i]]
        self._control = {vocabulary.tokens[i]: i for i in written}
        longest_first = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(longest_first)})") if longest_first else None
        self.end = tok.eos_id if tok.eos_id is not None else next(iter(tok.stop_ids), None)

    def segments(self, record: Record) -> list[Segment]:
        """The example's text in pieces, each learned or not."""
        if record.kind != "messages":
            return [(record.prompt, False), (record.answer, True)]
        if self._template is None:
            if self._tok.vocabulary.chat_template is None:
                raise ToyError(
                    "bad_file",
                    f"{record.place}: messages need a chat template, and {self._name} has none",
                    'give lines of {"prompt": …, "completion": …}, or a base model that has one',
                )
            try:
                self._template = ChatTemplate(self._tok, self._name, today=False)
            except TemplateError as error:
                hint = 'give lines of {"prompt": …, "completion": …}, or another base model'
                raise ToyError("bad_file", str(error), hint) from error
        try:
            return self._template.segments(list(record.messages))
        except TemplateError as error:
            hint = "are the roles, and their order, ones that this model knows?"
            raise ToyError("bad_file", f"{record.place}: {error}", hint) from error

    def encode(self, records: list[Record]) -> list[tuple[array[int], bytearray]]:
        """Ids and mask of each record; their texts go through the tokenizer together."""
        pieces: list[tuple[str, bool]] = []
        plans: list[list[tuple[int | None, bool]]] = []  # per record: (control id, or None for the next piece; learned)
        for record in records:
            plan: list[tuple[int | None, bool]] = []
            at_start = True
            for text, learned in self.segments(record):
                for part in self._cut.split(text) if self._cut else [text]:
                    if part in self._control:
                        plan.append((self._control[part], learned))
                        at_start = True  # as llama.cpp: text after a control token begins anew
                    elif part:
                        pieces.append((part, at_start))
                        plan.append((None, learned))
                        at_start = False
            plans.append(plan)
        encoded = iter(self._tok.encode_pieces(pieces))
        return [self._joined(record, plan, encoded) for record, plan in zip(records, plans, strict=True)]

    def _joined(
        self, record: Record, plan: list[tuple[int | None, bool]], encoded: Iterator[array[int]]
    ) -> tuple[array[int], bytearray]:
        ids, mask = array("i"), bytearray()
        bos = self._tok.bos_id
        if self._tok.vocabulary.add_bos and bos is not None:
            ids.append(bos)
        elif record.kind == "prompt" and not record.prompt:  # as `toy infer` without a prompt
            ids.extend(i for i in [bos if bos is not None else self.end] if i is not None)
        mask.extend(bytes(len(ids)))
        for control, learned in plan:
            found = next(encoded) if control is None else (control,)
            ids.extend(found)
            mask.extend((b"\1" if learned else b"\0") * len(found))
        if record.kind == "messages":
            self._learn_ends(ids, mask)
        if mask:
            mask[0] = 0  # no position before it predicts it
        if 1 not in mask:
            hint = "every example needs an answer in characters that the tokenizer knows"
            raise ToyError("bad_file", f"{record.place}: no token to learn in this line", hint)
        if self.end is not None and ids[-1] not in self._stops and (mask[-1] or record.kind != "messages"):
            ids.append(self.end)
            mask.append(1)
        return ids, mask

    def _learn_ends(self, ids: array[int], mask: bytearray) -> None:
        """Each learned span ends with the token that ends the turn: what follows it is the template's, not learned."""
        at = 0
        while (start := mask.find(1, at)) >= 0:
            end = mask.find(0, start)
            at = end = len(mask) if end < 0 else end
            last = next((i for i in range(end - 1, start, -1) if ids[i] in self._stops), None)
            if last is not None:
                mask[last + 1 : end] = bytes(end - last - 1)
            elif end < len(ids) and ids[end] in self._stops:
                mask[end] = 1
                at = end + 1


def _pack(folder: Path, encoder: _Encoder, records: Iterator[Record]) -> dict[str, Any]:
    """Writes tokens, offsets and mask of all records; counts and hashes."""
    kinds: Counter[str] = Counter()
    about: dict[str, Any] = {"kinds": kinds, "n_examples": 0, "n_learned": 0, "longest": 0}
    files = [(folder / name).open("wb") for name in (TOKENS, OFFSETS, MASK)]
    with files[0] as tokens, files[1] as starts, files[2] as marks:
        writer = TokenWriter(tokens)
        _write_offsets(starts, [0])
        for batch in _batches(records):
            ids, mask, ends = array("i"), bytearray(), []
            for found, learned in encoder.encode(batch):
                ids.extend(found)
                mask.extend(learned)
                ends.append(writer.n_tokens + len(ids))
                about["longest"] = max(about["longest"], len(found))
            writer.write(ids)
            marks.write(mask)
            _write_offsets(starts, ends)
            kinds.update(record.kind for record in batch)
            about["n_examples"] += len(batch)
            about["n_learned"] += mask.count(1)
    digest = hashlib.sha256()
    for name in (TOKENS, OFFSETS, MASK):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return {"n_tokens": writer.n_tokens, "sha256": digest.hexdigest(), "examples": about}


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    waiting = 0
    for record in records:
        batch.append(record)
        waiting += sum(map(len, record.texts)) + 256  # a line costs something even when it is short
        if waiting >= _BATCH_CHARACTERS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _write_offsets(file: BinaryIO, offsets: list[int]) -> None:
    values = array("q", offsets)
    if sys.byteorder == "big":
        values.byteswap()
    file.write(values.tobytes())
