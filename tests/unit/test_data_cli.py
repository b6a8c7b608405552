"""`toy data show`: what the screen and the JSON say of examples, texts and images; the defaults under data/."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT, Toy, write_jsonl

from toy import corpora
from toy.corpora import packed
from toy.models import gguf
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import byte_vocabulary

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path, {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})


def test_examples_between_marks(toy: Toy) -> None:
    rows = [{"prompt": f"{n} = é\n", "completion": "one\n\x1btwo"} for n in range(5)]
    write_jsonl(toy.cwd / "qa.jsonl", *rows)
    lines = toy("data", "show", "qa.jsonl", "--tokenizer", "bytes", "-n", 2).ok().stdout.splitlines()
    assert lines == [
        "qa.jsonl: 5 examples of {prompt, completion}, 80 tokens of 257 (bytes)",
        "  45 learned (56 %), the longest example has 16",
        "",
        "--- example 0: 16 tokens, 9 learned ------------------------------------",
        "0 = é↵",
        "⟦one↵",
        "\\x1btwo<|endoftext|>⟧",
        "",
        "--- example 1: 16 tokens, 9 learned ------------------------------------",
        "1 = é↵",
        "⟦one↵",
        "\\x1btwo<|endoftext|>⟧",
    ]
    cut = toy("data", "show", "qa.jsonl", "--tokenizer", "bytes", "--context", 8).ok().stdout
    assert "in a context of 8: 10 learned, 5 longer than that are cut\n" in cut


def test_conversations_as_json(toy: Toy) -> None:
    base = toy.cwd / "m.gguf"
    gguf.write_vocabulary(base, replace(byte_vocabulary(), chat_template=TEMPLATE).to_metadata())
    talk = [("user", "Hé"), ("assistant", "Ho")]
    write_jsonl(toy.cwd / "t.jsonl", {"messages": [{"role": role, "content": content} for role, content in talk]})
    document = toy("data", "show", "t.jsonl", "--model", base, "--json").ok().document
    (example,) = document.pop("examples")
    assert document == {
        "format": "toy/data-show-v1", "corpus": "t.jsonl", "kind": "examples", "tokenizer": "gguf", "vocab_size": 257,
        "packed": document["packed"], "sha256": document["sha256"], "n_tokens": 14, "kinds": {"messages": 1},
        "n_examples": 1, "n_learned": 6, "longest": 14,
    }  # fmt: skip
    tokens = example.pop("tokens")
    assert example == {"index": 0, "n_tokens": 14, "n_learned": 6, "text": "u: Hé\na: Ho<|endoftext|>\n"}
    assert "".join(token["text"] for token in tokens if token["learned"]) == "a: Ho<|endoftext|>"
    assert [token["id"] for token in tokens][4:6] == list("é".encode())
    assert [token["text"] for token in tokens][4:6] == ["", "é"]


def test_examples_of_several_kinds(toy: Toy) -> None:
    write_jsonl(toy.cwd / "x.jsonl", {"prompt": "a", "completion": "b"}, {"text": "cd"}, {"text": "ef"})
    shown = toy("data", "show", "x.jsonl", "--tokenizer", "bytes").ok().stdout
    assert shown.startswith("x.jsonl: 3 examples of {prompt, completion} (1) and {text} (2), 9 tokens")


def test_more_than_there_is(toy: Toy) -> None:
    """No number asks for more memory than the corpus takes."""
    most = 10**15
    write_jsonl(toy.cwd / "x.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    (toy.cwd / "a.txt").write_text("abcdefgh" * 3)
    for corpus, n in (("x.jsonl", 2), ("a.txt", 1)):
        flags = ("--tokenizer", "bytes", "-n", most, "--context", most, "--json")
        assert len(toy("data", "show", corpus, *flags).ok().document["examples"]) == n


def test_texts_and_lines_of_texts(toy: Toy) -> None:
    (toy.cwd / "a.txt").write_text("abcdefgh" * 3)
    shown = toy("data", "show", "a.txt", "--tokenizer", "chars", "--context", 3, "-n", 2).ok().stdout
    assert shown.splitlines()[0] == "a.txt: 25 tokens of 9 (chars) in 1 document"
    assert shown.splitlines()[2:] == [
        "--- window 0: 4 tokens -------------------------------------------------", "a│b│c│d", "",
        "--- window 1: 4 tokens -------------------------------------------------", "d│e│f│g",
    ]  # fmt: skip
    write_jsonl(toy.cwd / "t.jsonl", {"text": "ab"}, {"text": "cd"})
    stream = toy("data", "show", "t.jsonl", "--tokenizer", "bytes", "--json").ok().document
    assert (stream["kind"], stream["n_documents"], len(stream["examples"])) == ("text", 2, 1)
    base = toy.cwd / "m.gguf"
    gguf.write_vocabulary(base, byte_vocabulary().to_metadata())
    lora = toy("data", "show", "t.jsonl", "--model", base, "--json").ok().document
    assert (lora["kind"], lora["kinds"], lora["n_examples"]) == ("examples", {"text": 2}, 2)
    again = toy("data", "show", lora["packed"], "--json").ok().document
    assert again["examples"] == lora["examples"]


def test_images(toy: Toy) -> None:
    shown = toy("data", "show", ROOT / "data" / "digits").ok().stdout.splitlines()
    assert shown[0].endswith("1,600 images of 10 classes, 28 x 28 grey")
    assert shown[2].split() == ["0", "160"] and len(shown) == 12
    document = toy("data", "show", ROOT / "data" / "digits", "--json").ok().document
    assert (document["kind"], document["n_images"], document["counts"]["7"]) == ("images", 1600, 160)


def test_colours_on_a_terminal(toy: Toy) -> None:
    write_jsonl(toy.cwd / "qa.jsonl", {"prompt": "ask", "completion": "say"})
    argv = toy.argv("data", "show", "qa.jsonl", "--tokenizer", "bytes")

    def screen(**env: str) -> str:
        parent, child = pty.openpty()
        with subprocess.Popen(
            argv, cwd=toy.cwd, env=toy.environment({"TERM": "xterm", "NO_COLOR": None} | env), stdout=child,
            stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            os.close(child)
            data = b""
            while True:
                try:
                    block = os.read(parent, 4096)
                except OSError:  # how a terminal says that its writer is gone
                    break
                data += block
            assert process.wait(60) == 0
        os.close(parent)
        return data.decode()

    coloured = screen()
    assert "\x1b[2ma\x1b[0m\x1b[2ms\x1b[0m" in coloured  # context is dim
    assert "\x1b[92m\x1b[1ms\x1b[0m\x1b[32m\x1b[1ma\x1b[0m" in coloured  # what is learned bold, in two greens
    assert "⟦" not in coloured
    plain = screen(NO_COLOR="1")
    assert "ask⟦say<|endoftext|>⟧" in plain and "\x1b" not in plain


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["none.txt"], "no corpus at none.txt"),
        (["bad.jsonl"], "bad.jsonl:1: no completion"),
        (["talk.jsonl"], "talk.jsonl:1: messages need a chat template"),
        (["good.jsonl", "--model", "no-such-model"], "no-such-model"),
        (["good.jsonl", "--model", "m.gguf", "--tokenizer", "bpe"], "two tokenizers"),
        (["good.jsonl", "-n", "0"], "-n"),
        (["single"], "one class only"),
        ([], "corpus"),
    ],
)
def test_bad_input(argv: list[str], says: str, toy: Toy) -> None:
    from PIL import Image

    write_jsonl(toy.cwd / "bad.jsonl", {"prompt": "a"})
    write_jsonl(toy.cwd / "good.jsonl", {"prompt": "a", "completion": "b"})
    write_jsonl(toy.cwd / "talk.jsonl", {"messages": [{"role": "assistant", "content": "b"}]})
    (toy.cwd / "single" / "a").mkdir(parents=True)
    Image.new("L", (4, 4)).save(toy.cwd / "single" / "a" / "x.png")
    result = toy("data", "show", *argv)
    lines = result.stderr.splitlines()
    assert result.code == 2 and result.stdout == "", result
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert says.lower() in lines[0].lower()
    document = toy("data", "show", *argv, "--json").document
    assert document["format"] == "toy/data-show-v1" and document["error"]["message"] in lines[0]


def test_a_verb_is_needed(toy: Toy) -> None:
    result = toy("data")
    assert result.code == 2 and "needs a verb" in result.stderr
    assert "show" in toy("data", "--help").ok().stdout
    assert "did you mean" in toy("data", "shwo").stderr


# What lies under data/


def test_default_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corpora.default_sequences() == corpora.default_sequences(tmp_path) == ROOT / "data" / "ts_seqs.bin"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ts_seqs.bin").write_bytes(bytes(8))
    assert corpora.default_sequences(tmp_path) == tmp_path / "data" / "ts_seqs.bin"
    monkeypatch.setenv("TOY_HOME", str(tmp_path))
    assert corpora.default_sequences() == tmp_path / "data" / "ts_seqs.bin"


def test_the_committed_sequences(tmp_path: Path) -> None:
    path = ROOT / "data" / "ts_seqs.bin"
    corpora.check(path, "bpe", 0, 128, 0.1)
    made = corpora.prepare(path, "bpe", 0, tmp_path / "c")
    manifest = packed.read_manifest(path)
    assert manifest is not None and made.tokens == path and made.manifest["context"] == manifest["context"] == 128
    assert (made.vocab_size, made.n_tokens, made.sha256) == (257, manifest["n_tokens"], manifest["sha256"])
    text = Tokenizer.from_gguf(made.tokenizer_gguf).decode(next(packed.read_ids(path)), special=True)
    stories = text.split("<|endoftext|>")
    assert len(stories) == manifest["n_documents"] + 1 and len(set(stories)) == len(stories)
    assert path.stat().st_size <= 200_000
    # the script makes the same bytes
    made_again = [sys.executable, str(ROOT / "prep" / "make_ts_seqs.py"), str(tmp_path)]
    subprocess.run(made_again, check=True, capture_output=True)
    for name in ("ts_seqs.bin", "ts_seqs.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
