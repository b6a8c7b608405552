"""Text to ids and back: llama.cpp's own cases, round trips, and the ways a tokenizer travels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import vocabularies

from toy.errors import ToyError
from toy.models import gguf, hf_json
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import (
    CONTROL,
    END_OF_TEXT,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    from_metadata,
    placeholder_vocabulary,
)

SAMPLE = "To be, or not to be: that is the question.\n\nWhether 'tis nobler in 12345 minds… é 漢字 🦙\n"


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    pools = [
        " \n\t\r",
        "abcXYZ",
        "'\"!?.,;:-()<>|[]{}",
        "0123456789½²",
        "éüçжяกあ漢한",
        "🦙🚀👩‍👧",
        "\u00a0\u200b\u3000\x00\x1f",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 80)))


def own(kind: str) -> Tokenizer:
    return Tokenizer.from_name(
        kind, lambda: [SAMPLE, *(random_text(i) for i in range(40))], 400 if kind == "bpe" else 0
    )


def through_gguf(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    gguf.write_vocabulary(path, tokenizer.to_gguf_metadata())
    return Tokenizer.from_gguf(path)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_llama_cpp_cases(name: str) -> None:
    cases = vocabularies.cases(name)
    tokenizer = vocabularies.read_vocabulary(name)
    assert len(cases) == 47
    wrong = {text: tokenizer.encode(text) for text, ids in cases if tokenizer.encode(text) != ids}
    assert not wrong
    assert [tokenizer.decode(ids) for _, ids in cases] == [text for text, _ in cases]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_own_kinds_round_trip_everywhere(kind: str, tmp_path: Path) -> None:
    tokenizer = own(kind)
    read = through_gguf(tokenizer, tmp_path / "t.gguf")
    (tmp_path / "tokenizer.json").write_text(str(tokenizer.to_json()), encoding="utf-8")
    imported = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert read.vocabulary == tokenizer.vocabulary
    assert imported.vocabulary.sha256 == tokenizer.vocabulary.sha256
    for text in [SAMPLE, "", *(random_text(i) for i in range(40)), *vocabularies.texts()]:
        ids = tokenizer.encode(text)
        assert read.encode(text) == imported.encode(text) == ids
        known = kind != "chars" or set(text) <= set(SAMPLE).union(*(random_text(i) for i in range(40)))
        if known:
            assert tokenizer.decode(ids) == text


def test_bytes_are_ids() -> None:
    tokenizer = Tokenizer.from_name("bytes")
    assert len(tokenizer) == 257
    assert tokenizer.encode("é\n") == list("é\n".encode())
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (256, 256, [256])
    assert tokenizer.vocabulary.merges == []


def test_chars_are_the_characters_of_the_corpus() -> None:
    tokenizer = Tokenizer.from_name("chars", lambda: ["héé", "🦙 h"])
    # ' ', 'h', 'é', '🦙', then the pieces of é (2 bytes) and 🦙 (4 bytes: 4 pieces, and 2 halves on the way)
    assert [tokenizer.decode([i]) for i in range(4)] == [" ", "h", "é", "🦙"]
    assert tokenizer.encode("🦙 hé") == [3, 0, 1, 2]
    assert len(tokenizer) == 4 + 2 + 6 + 1
    assert tokenizer.eos_id == len(tokenizer) - 1


def test_a_character_that_chars_never_saw_is_dropped_but_joins_nothing() -> None:
    tokenizer = Tokenizer.from_name("chars", lambda: ["é"])
    assert tokenizer.encode("x") == []
    lead, tail = (tokenizer.vocabulary.tokens.index(token) for token in ("Ã", "©"))
    assert tokenizer.encode("èé") == [lead, 0]  # è shares its first byte with é
    # the bytes C3 (of è) and A9 (of ʩ, CA A9) have two unknown bytes between them: they are no é
    assert tokenizer.encode("èʩ") == [lead, tail]


def test_bpe_is_deterministic_and_holds_every_byte() -> None:
    first, second = own("bpe"), own("bpe")
    assert first.vocabulary == second.vocabulary
    assert len(first) == 400
    everything = bytes(range(128)).decode() + "".join(map(chr, range(128, 2048)))
    assert first.decode(first.encode(everything)) == everything


def test_bpe_too_small() -> None:
    with pytest.raises(ToyError) as caught:
        Tokenizer.from_name("bpe", lambda: [SAMPLE], 256)
    assert caught.value.kind == "bad_config"
    assert "257" in caught.value.hint


def test_our_tokenizer_json_is_read_alike_by_its_own_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    tokenizer = own("bpe")
    library = Library.from_str(str(tokenizer.to_json()))
    for i in range(60):
        text = random_text(i)
        assert library.encode(text).ids == tokenizer.encode(text)
        assert library.decode(tokenizer.encode(text)) == text
    assert library.encode(END_OF_TEXT).ids == [tokenizer.eos_id]


def test_special_tokens_are_parsed_only_when_asked() -> None:
    tokenizer = own("bpe")
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    ids = tokenizer.encode(text, parse_special=True)
    assert ids.count(tokenizer.eos_id or -1) == 1
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, special=True) == text


def test_the_longest_special_token_wins() -> None:
    tokens = ["a", "<x>", "<x><y>", "u<"]
    tokenizer = Tokenizer(Vocabulary("gpt2", tokens, [NORMAL, CONTROL, CONTROL, USER_DEFINED]))
    assert tokenizer.encode("<x><y>a<x>", parse_special=True) == [2, 0, 1]
    assert tokenizer.encode("au<a") == [0, 3, 0]


def test_stream_never_splits_a_character() -> None:
    tokenizer = Tokenizer.from_name("bytes")
    text = "aé漢🦙!"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🦙", "!"]
    assert stream.finish() == ""
    cut = tokenizer.stream()
    assert "".join(cut.push(i) for i in tokenizer.encode("🦙")[:2]) + cut.finish() == "\ufffd"


def test_sentence_piece_streams_what_it_encoded() -> None:
    tokenizer = vocabularies.read_vocabulary("llama-spm") if _has("llama-spm") else _small_sentence_piece()
    for text in vocabularies.texts():
        stream = tokenizer.stream()
        out = "".join(stream.push(i) for i in tokenizer.encode(text)) + stream.finish()
        assert out == (" " + text if text else "")  # with the space that was put before


def _has(name: str) -> bool:
    return (vocabularies.SHARED / "vocab" / f"ggml-vocab-{name}.gguf").exists()


def _small_sentence_piece() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "l", "o", "▁l", "lo", "▁lo"]
    types = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [*[0.0] * 259, -5.0, -6.0, -7.0, -1.0, -2.0, -3.0]
    return Tokenizer(
        Vocabulary("llama", tokens, types, scores=scores, special={"bos": 1, "eos": 2}, add_space_prefix=True)
    )


def test_sentence_piece_merges_by_score() -> None:
    tokenizer = _small_sentence_piece()
    tokens = tokenizer.vocabulary.tokens
    # "▁l" scores above "lo", and then "▁l" + "o" makes "▁lo"; the last l has no o
    assert [tokens[i] for i in tokenizer.encode("lo lol")] == ["▁lo", "▁lo", "l"]
    assert [tokens[i] for i in tokenizer.encode("lé")] == ["▁l", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode(" lo  lo")) == " lo  lo"


def test_unknown_pre_tokenizer_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    metadata = own("bpe").to_gguf_metadata() | {"tokenizer.ggml.pre": "of-tomorrow"}
    tokenizer = Tokenizer(from_metadata(metadata, "x.gguf"))
    assert tokenizer.encode("Hello there") == own("bpe").encode("Hello there")
    tokenizer = Tokenizer(from_metadata(metadata, "x.gguf"))
    tokenizer.encode("again")
    assert capsys.readouterr().err.count("of-tomorrow") == 1


def test_padding_adds_unused_tokens() -> None:
    tokenizer = own("bpe")
    padded = tokenizer.padded(450)
    assert len(padded) == 450
    assert padded.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert padded.decode([449]) == ""
    assert padded.eos_id == tokenizer.eos_id
    assert tokenizer.padded(100) is tokenizer


def test_placeholder_reads_and_prints_ids() -> None:
    tokenizer = Tokenizer(placeholder_vocabulary(100))
    assert tokenizer.encode("[7][99]") == [7, 99]
    assert tokenizer.decode([7, 99]) == "[7][99]"
    assert tokenizer.eos_id == 100


def _hf(model: dict[str, Any], **parts: Any) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a tokenizer.json"),
        ('{"a": 1}', "not a tokenizer.json"),
        (_hf({"type": "WordPiece", "vocab": {"a": 0}}), "WordPiece"),
        (_hf({"type": "BPE", "vocab": {"a": 0}, "merges": []}), "neither"),
        (
            _hf(
                {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "q+"}, "behavior": "Isolated", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                },
            ),
            "no name in a GGUF",
        ),
    ],
)
def test_bad_tokenizer_files(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ToyError) as caught:
        Tokenizer.from_file(path)
    assert caught.value.kind == "bad_file"
    assert says in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(ToyError) as caught:
        Tokenizer.from_name(str(tmp_path / "none.json"))
    assert caught.value.kind == "missing_file"


def test_hf_json_names_the_cuts_and_the_special_tokens(tmp_path: Path) -> None:
    vocabulary = own("bpe").vocabulary
    document = json.loads(str(hf_json.to_json(vocabulary)))
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    document["added_tokens"].append({"id": len(vocabulary), "content": "<|im_end|>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}", "add_bos_token": True})
    )
    read = Tokenizer.from_name(str(tmp_path)).vocabulary
    assert read.pre == "smollm"
    assert read.special["eos"] == len(vocabulary)
    assert read.types[-1] == CONTROL
    assert read.chat_template == "{{ messages }}"
    assert read.add_bos


def test_sentence_piece_json(tmp_path: Path) -> None:
    small = _small_sentence_piece().vocabulary
    merges = ["▁ l", "l o", "▁l o", "▁ lo"]
    document = {
        "added_tokens": [{"id": i, "content": small.tokens[i], "special": True} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(small.tokens)},
            "merges": merges,
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    read = Tokenizer.from_file(path)
    assert read.vocabulary.model == "llama"
    assert read.vocabulary.types == small.types
    assert read.to_json() is None
    for text in ("lo lol", "lé", "", "  o"):
        assert read.encode(text) == _small_sentence_piece().encode(text)
    again = through_gguf(read, tmp_path / "t.gguf")
    assert again.encode("lo lol") == read.encode("lo lol")
    assert again.encode("lo", add_special=True) == [1, *read.encode("lo")]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tokenizer.ggml.model": "bert"}, "not_available"),
        ({"tokenizer.ggml.tokens": []}, "bad_file"),
        ({"tokenizer.ggml.token_type": [1]}, "bad_file"),
    ],
)
def test_bad_metadata(change: dict[str, Any], kind: str) -> None:
    with pytest.raises(ToyError) as caught:
        from_metadata(own("bpe").to_gguf_metadata() | change, "x.gguf")
    assert caught.value.kind == kind
    assert "x.gguf" in caught.value.message
