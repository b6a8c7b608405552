"""Sets of examples: what is learned of each kind of line, the cache, what is refused."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from example_sets import BOT, CHATML, SYSTEM, USER, arrays, marked, model, talk, vocabulary
from harness import refused, write_jsonl

from toy import corpora
from toy.corpora import examples
from toy.models import generate, gguf
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import CONTROL, NORMAL, UNKNOWN, Vocabulary, byte_vocabulary

# What is learned


def test_prompt_and_completion(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "qa.jsonl",
        {"prompt": "Q: é?\nA:", "completion": " 漢", "id": 7},
        {"prompt": "<|im_start|>x", "completion": "y<|im_end|>"},
        {"prompt": "", "completion": "on its own"},
    )
    base = model(tmp_path / "m.gguf")
    made = corpora.prepare_examples(path, base, tmp_path / "c")
    assert marked(made) == [
        "Q: é?\nA:[ 漢<|im_end|>]",
        "<|im_start|>x[y<|im_end|>]",
        "<|im_start|>[on its own<|im_end|>]",
    ]
    ids, offsets, mask = arrays(made)
    tok = Tokenizer.from_file(base)
    for prompt, start in zip(["Q: é?\nA:", "<|im_start|>x", ""], offsets, strict=False):
        asked = generate.prompt_ids(tok, prompt)  # what `toy infer` feeds
        assert ids[start : start + len(asked)] == asked
        assert mask[start : start + len(asked) + 1] == [0] * len(asked) + [1]
    assert (made.n_examples, made.longest, made.n_tokens) == (3, max(b - a for a, b in pairwise(offsets)), len(ids))
    assert made.manifest["examples"] == {
        "kinds": {"prompt": 3},
        "n_examples": 3,
        "n_learned": sum(mask),
        "longest": made.longest,
    }
    files = (made.tokens, made.offsets, made.mask)
    whole = b"".join(p.read_bytes() for p in files if p is not None)
    assert made.sha256 == made.manifest["sha256"] == hashlib.sha256(whole).hexdigest()
    assert made.vocab_size == 259


def test_what_begins_and_ends_an_example(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    for name, changes, expected in [
        ("bos", {"add_bos": True}, "<|im_start|>a[b<|im_end|>]"),
        (
            "no-end",
            {"special": {}, "types": [1] * 259, "tokens": [*byte_vocabulary().tokens[:256], "x", "y", "z"]},
            "a[b]",
        ),
    ]:
        base = tmp_path / f"{name}.gguf"
        gguf.write_vocabulary(base, replace(vocabulary(), **changes).to_metadata())  # type: ignore[arg-type]
        assert marked(corpora.prepare_examples(write_jsonl(tmp_path / "x.jsonl", row), str(base), tmp_path / "c")) == [
            expected
        ]


def test_a_completion_does_not_merge_with_its_prompt(tmp_path: Path) -> None:
    """The prompt's tokens are there first: an answer that would merge with them in the whole text does not."""
    text = tmp_path / "t.txt"
    text.write_text("abab " * 400)
    tok = corpora.prepare(text, "bpe", 262, tmp_path / "c")
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    made = corpora.prepare_examples(path, str(tok.tokenizer_gguf), tmp_path / "c")
    reader = Tokenizer.from_gguf(tok.tokenizer_gguf)
    assert len(reader.encode("ab")) == 1
    assert arrays(made)[0] == [*reader.encode("a"), *reader.encode("b"), reader.eos_id]


def test_a_sentencepiece_completion_gets_no_space(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁a", "▁b", "▁", "a", "b"]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 5]
    scores = [0.0, 0, 0, -1, -2, -3, -4, -5]
    spm = Vocabulary("llama", tokens, types, scores=scores, special={"bos": 1, "eos": 2}, add_space_prefix=True)
    path = write_jsonl(
        tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a</s>", "completion": "b a"}
    )
    base = tmp_path / "spm.gguf"
    gguf.write_vocabulary(base, replace(spm, add_bos=True).to_metadata())
    made = corpora.prepare_examples(path, str(base), tmp_path / "c")
    ids, offsets, _ = arrays(made)
    assert ids[: offsets[1]] == [1, 3, 7, 2]
    assert ids[offsets[1] :] == [1, 3, 2, 4, 3, 2]  # after a control token text begins anew, as in llama.cpp


def test_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", {"text": "one"}, "", {"text": "two\nlines"})
    made = corpora.prepare_examples(path, model(tmp_path / "m.gguf"), tmp_path / "c")
    assert marked(made) == ["o[ne<|im_end|>]", "t[wo\nlines<|im_end|>]"]  # nothing predicts a first token
    with_bos = corpora.prepare_examples(path, model(tmp_path / "b.gguf", add_bos=True), tmp_path / "c")
    assert marked(with_bos)[0] == "<|im_start|>[one<|im_end|>]"


def test_lines_of_every_kind_in_one_set(tmp_path: Path) -> None:
    """General text beside chats and questions, in one file or in several: each line is learned as its kind is."""
    pair, chat_line, text = {"prompt": "a", "completion": "b"}, talk((USER, "Hi"), (BOT, "Ho")), {"text": "words"}
    base = model(tmp_path / "m.gguf", CHATML)
    path = write_jsonl(tmp_path / "x.jsonl", pair, text, chat_line, "", {"text": "more"})
    corpora.check_examples(path, base)
    made = corpora.prepare_examples(path, base, tmp_path / "c")
    chatml = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Ho<|im_end|>]\n"
    )
    assert marked(made) == ["a[b<|im_end|>]", "w[ords<|im_end|>]", chatml, "m[ore<|im_end|>]"]
    assert made.manifest["examples"]["kinds"] == {"prompt": 1, "text": 2, "messages": 1}
    for name, row in (("1", text), ("2", chat_line)):
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", row)
    assert corpora.kind_of(tmp_path / "d", texts_are_examples=True) == "examples"
    assert marked(corpora.prepare_examples(tmp_path / "d", base, tmp_path / "c")) == ["w[ords<|im_end|>]", chatml]
    # the template is asked for wherever in the set the first conversation is
    plain = model(tmp_path / "n.gguf")
    assert f"{path}:3: messages need a chat template" in refused(lambda: corpora.check_examples(path, plain)).message
    # a stream of texts is one from its first line on
    stream = write_jsonl(tmp_path / "t.jsonl", text, pair)
    assert corpora.kind_of(stream) == "text"
    error = refused(lambda: corpora.prepare(stream, "bytes", 0, tmp_path / "c"))
    assert f"{stream}:2: no text in this line" in error.message
    assert "begin the file with a prompt" in error.hint


def test_the_first_question(tmp_path: Path) -> None:
    chat_line, text = talk((SYSTEM, "Rhyme."), (USER, "Hi"), (BOT, "My")), {"text": "words"}
    assert corpora.first_question(write_jsonl(tmp_path / "a.jsonl", text, chat_line)) == ("Hi", True)
    pair = {"prompt": "Why?", "completion": "So."}
    assert corpora.first_question(write_jsonl(tmp_path / "b.jsonl", pair, chat_line)) == ("Why?", False)
    assert corpora.first_question(write_jsonl(tmp_path / "c.jsonl", text)) is None


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_tokenizers_of_their_own(tokenizer: str, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "t.jsonl", *({"prompt": f"{n} plus é is", "completion": f" {n + 1}"} for n in range(50))
    )
    size = 300 if tokenizer == "bpe" else 0
    made = corpora.prepare_examples(path, tokenizer, tmp_path / "c", vocab_size=size)
    assert marked(made)[7] == "7 plus é is[ 8<|endoftext|>]"
    assert made.vocab_size <= max(size, 257) if tokenizer != "bpe" else made.vocab_size == 300
    val = corpora.prepare_examples(
        write_jsonl(tmp_path / "v.jsonl", {"prompt": "1", "completion": " 2"}), tokenizer, tmp_path / "c", like=made
    )
    assert val.vocab_size == made.vocab_size and marked(val) == ["1[ 2<|endoftext|>]"]
    assert val.manifest["tokenizer"] == made.manifest["tokenizer"]


# Which kind a corpus is


def test_kind_of(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", "", {"text": "a"})
    pairs = write_jsonl(tmp_path / "p" / "p.jsonl", {"prompt": "a", "completion": "b"})
    plain = write_jsonl(tmp_path / "a.txt", "text")
    assert [corpora.kind_of(each) for each in (None, "", plain, texts, pairs)] == ["text"] * 4 + ["examples"]
    assert [corpora.kind_of(each, True) for each in (None, plain, texts, pairs.parent)] == ["text"] * 2 + [
        "examples"
    ] * 2
    assert corpora.kind_of(write_jsonl(tmp_path / "c.jsonl", talk((USER, "x"), (BOT, "y")))) == "examples"
    made = corpora.prepare_examples(pairs, "bytes", tmp_path / "c")
    assert corpora.kind_of(made.tokens.parent) == corpora.kind_of(made.tokens) == "examples"
    assert corpora.kind_of(corpora.prepare(plain, "bytes", 0, tmp_path / "c").tokens) == "text"
    write_jsonl(tmp_path / "p" / "x.txt", "text")
    assert "mixes examples (p.jsonl) with text (x.txt)" in refused(lambda: corpora.kind_of(tmp_path / "p")).message
    assert refused(lambda: corpora.kind_of(tmp_path / "none.jsonl")).kind == "missing_file"
    assert ":1: not JSON" in refused(lambda: corpora.kind_of(write_jsonl(tmp_path / "bad.jsonl", "{"))).message


def test_folders_of_examples_are_read_in_order(tmp_path: Path) -> None:
    for name in "ba":
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", {"prompt": name, "completion": name.upper()})
    made = corpora.prepare_examples(tmp_path / "d", "bytes", tmp_path / "c")
    assert marked(made) == ["a[A<|endoftext|>]", "b[B<|endoftext|>]"]


# What is refused


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "unfinished', "not JSON"),
        ("[1]", "not an object"),
        ("{}", "no text, prompt or messages"),
        ({"prompt": "a"}, "no completion in this line"),
        ({"completion": "a"}, "no prompt in this line"),
        ({"prompt": ["a"], "completion": "b"}, "the prompt of this line is not a string"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ('{"prompt": "\\ud800", "completion": "a"}', "half a surrogate"),
        ({"text": " \n"}, "the text is empty"),
        ("[" * 100_000, "not JSON (nested too deeply)"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "not JSON (a number of too many digits)"),
    ],
)  # fmt: skip
def test_bad_lines(line: Any, says: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}, "", line)
    for call in (corpora.check_examples, functools.partial(corpora.prepare_examples, cache_dir=tmp_path / "c")):
        error = refused(functools.partial(call, path, "bytes"))  # type: ignore[arg-type]
        assert error.kind == "bad_file" and f"{path}:3: " in error.message and says in error.message
    assert not list((tmp_path / "c").glob("x-*"))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages is not a list"),
        ([], "messages is not a list"),
        (["hello"], "message 1 is not an object"),
        ([{"role": USER, "content": "a"}, {"content": "b"}], "no role in message 2"),
        ([{"role": USER}], "no content in message 1"),
        ([{"role": USER, "content": [{"type": "image"}]}], "the content of message 1 is not a string"),
        ([{"role": USER, "content": "a"}, {"role": BOT, "content": " "}], "the answer in message 2 is empty"),
        ([{"role": USER, "content": "a"}], "no message of the assistant"),
    ],
)
def test_bad_messages(messages: Any, says: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", talk((USER, "a"), (BOT, "b")), {"messages": messages})
    base = model(tmp_path / "m.gguf", CHATML)
    for call in (corpora.check_examples, functools.partial(corpora.prepare_examples, cache_dir=tmp_path / "c")):
        error = refused(functools.partial(call, path, base))  # type: ignore[arg-type]
        assert error.kind == "bad_file" and f"{path}:2: " in error.message and says in error.message


def test_not_utf8_and_empty(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff", "completion": "b"}\n')
    assert f"{path}:2: not JSON (not UTF-8)" in refused(lambda: corpora.check_examples(path, "bytes")).message
    write_jsonl(path, "", "  ")
    assert "no examples" in refused(lambda: corpora.prepare_examples(path, "bytes", tmp_path / "c")).message
    assert refused(lambda: corpora.check_examples(tmp_path / "none.jsonl", "bytes")).kind == "missing_file"
    assert refused(lambda: corpora.check_examples(write_jsonl(path, {"text": "a"}), "no-such")).kind == "missing_file"


def test_an_answer_of_unknown_characters(tmp_path: Path) -> None:
    first = corpora.prepare_examples(
        write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}), "chars", tmp_path / "c"
    )
    path = write_jsonl(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "漢"})
    error = refused(lambda: corpora.prepare_examples(path, "chars", tmp_path / "c", like=first))
    assert f"{path}:2: no token to learn" in error.message


# A context


def test_cut_to_a_context(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "c" * 4} for n in (2, 10, 20)]
    made = corpora.prepare_examples(write_jsonl(tmp_path / "x.jsonl", *rows), "bytes", tmp_path / "c")
    # a context of 10 takes 11 tokens: of the second example the prompt and one token of the answer
    fit = made.require_examples(10)
    assert (fit.n_examples, fit.cut, fit.dropped, fit.n_learned) == (3, 2, 1, 5 + 1)
    assert made.require_examples(24) == made.fit(24) and made.fit(24).cut == 0 and made.fit(24).n_learned == 15
    assert made.fit(23).cut == 1 and made.fit(23).n_learned == 14
    error = refused(lambda: made.require_examples(1))
    assert "beyond the context of 1" in error.message and "2 tokens" in error.hint
    assert "none are left to validate on" in refused(lambda: made.require_examples(24, 0.1)).message
    assert made.require_examples(24, 0.4).n_examples == 2
    assert "nothing to validate on" in refused(lambda: made.require_examples(15, 0.4)).message


def test_fit_counts_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "p" * (n % 7 + 1), "completion": "c" * (n % 5 + 1)} for n in range(40)]
    made = corpora.prepare_examples(write_jsonl(tmp_path / "x.jsonl", *rows), "bytes", tmp_path / "c")
    whole = [made.fit(context) for context in range(1, 14)]
    monkeypatch.setattr("toy.corpora.packed._EXAMPLES", 3)
    assert [made.fit(context) for context in range(1, 14)] == whole
    _, offsets, mask = arrays(made)
    for context, fit in enumerate(whole, 1):
        kept = [sum(mask[a : min(b, a + context + 1)]) for a, b in pairwise(offsets)]
        assert (fit.n_learned, fit.dropped) == (sum(kept), kept.count(0))


# The cache


def test_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, base = write_jsonl(tmp_path / "x.jsonl", talk((USER, "a"), (BOT, "b"))), model(tmp_path / "m.gguf", CHATML)
    first = corpora.prepare_examples(path, base, tmp_path / "c")
    monkeypatch.setattr(examples, "_pack", lambda *args: pytest.fail("packed again"))
    assert corpora.prepare_examples(path, base, tmp_path / "c") == first
    monkeypatch.undo()
    # another template, another file, another tokenizer: another packing
    other = model(tmp_path / "n.gguf", CHATML.replace("Be kind", "Be short"))
    folders = {first.tokens.parent, corpora.prepare_examples(path, other, tmp_path / "c").tokens.parent}
    write_jsonl(path, talk((USER, "a"), (BOT, "c")))
    folders.add(corpora.prepare_examples(path, base, tmp_path / "c").tokens.parent)
    assert len(folders) == 3


def test_damaged_packings_are_made_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    first = corpora.prepare_examples(path, "bytes", tmp_path / "c")
    assert first.mask is not None and first.offsets is not None
    for damage in (lambda: first.mask.write_bytes(b"\1"), first.offsets.unlink, first.tokens.unlink):  # type: ignore[union-attr]
        damage()
        again = corpora.prepare_examples(path, "bytes", tmp_path / "c")
        assert again == first and marked(again) == ["a[b<|endoftext|>]"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", *({"prompt": "a", "completion": "b" * 100} for _ in range(5000)))

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpora.prepare_examples(path, "bytes", tmp_path / "c", stop)
    assert {entry.name for entry in (tmp_path / "c").iterdir()} <= {"index.json"}


def test_progress(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", *({"prompt": "a", "completion": "b" * 100} for _ in range(500)))
    seen: list[tuple[int, int]] = []
    corpora.prepare_examples(path, "chars", tmp_path / "c", lambda done, total: seen.append((done, total)))
    size = path.stat().st_size
    assert seen == sorted(seen) and seen[-1] == (size, size) and {total for _, total in seen} == {size}


def test_packed_examples(tmp_path: Path) -> None:
    path, base = write_jsonl(tmp_path / "x.jsonl", talk((USER, "a"), (BOT, "b"))), model(tmp_path / "m.gguf", CHATML)
    made = corpora.prepare_examples(path, base, tmp_path / "c")
    assert corpora.prepare_examples(made.tokens.parent, base, tmp_path / "d") == made
    assert corpora.prepare_examples(made.tokens, "bpe", tmp_path / "d", like=made) == made
    other = corpora.prepare_examples(write_jsonl(tmp_path / "y.jsonl", {"text": "abc"}), "bytes", tmp_path / "c")
    for call in (corpora.check_examples, corpora.prepare_examples):
        assert "another tokenizer" in refused(functools.partial(call, other.tokens, base)).message  # type: ignore[arg-type]
    text = tmp_path / "a.txt"
    text.write_text("a text")
    packed_text = corpora.prepare(text, "bytes", 0, tmp_path / "c")
    assert "not a set of examples" in refused(lambda: corpora.prepare_examples(packed_text.tokens, "bytes")).message
    assert refused(lambda: corpora.prepare_examples(tmp_path / "none.bin", "bytes")).kind == "missing_file"


def test_a_base_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """The tokenizer's identity is that of its metadata: the weights behind it are never read into memory."""
    base = Path(model(tmp_path / "m.gguf", CHATML))
    os.truncate(base, 1 << 40)  # a hole
    path = tmp_path / "a.txt"
    path.write_text("some text")
    assert corpora.prepare(path, str(base), 0, tmp_path / "c").vocab_size == 259
    made = corpora.prepare_examples(
        write_jsonl(tmp_path / "x.jsonl", talk((USER, "a"), (BOT, "b"))), str(base), tmp_path / "c"
    )
    assert made.n_examples == 1
