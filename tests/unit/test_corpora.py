"""Corpora to packed tokens: every kind of corpus, the manifest, the cache, what is refused, and what a stop leaves."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
from harness import ROOT, peak_memory, refused

from toy import corpora
from toy.corpora import Prepared, making, packed, sources
from toy.models import gguf
from toy.models.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. It's 12 o'clock: é 漢字 🦙\n" * 40


def ids_of(prepared: Prepared) -> list[int]:
    return [i for block in packed.read_ids(prepared.tokens) for i in block]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_clean(cache: Path) -> None:
    """Nothing half-written: only whole packings and the index."""
    for path in cache.iterdir() if cache.exists() else ():
        assert path.name == "index.json" or (path / "tokens.bin").is_file(), path


# What a corpus can be


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_text_file(tokenizer: str, tmp_path: Path) -> None:
    made = corpora.prepare(
        write(tmp_path / "a b.txt", TEXT), tokenizer, 300 if tokenizer == "bpe" else 0, tmp_path / "c"
    )
    tok = Tokenizer.from_gguf(made.tokenizer_gguf)
    ids = ids_of(made)
    assert ids == [*tok.encode(TEXT), tok.eos_id]
    assert tok.decode(ids) == TEXT
    data = made.tokens.read_bytes()
    assert made.manifest == {
        "format": "toy/packed-v1",
        "name": "a b",
        "dtype": "int32",
        "n_tokens": len(ids),
        "n_documents": 1,
        "n_bytes": len(TEXT.encode()),
        "sha256": hashlib.sha256(data).hexdigest(),
        "vocab_size": len(tok),
        "eos_id": tok.eos_id,
        "tokenizer": {
            "kind": tokenizer,
            "file": "tokenizer.json",
            "gguf": "tokenizer.gguf",
            "sha256": tok.vocabulary.sha256,
        },
        "source": {"path": "a b.txt", "sha256": made.manifest["source"]["sha256"]},
        "packing": 1,
    }
    assert json.loads(made.tokens.with_suffix(".json").read_text()) == made.manifest
    assert (made.n_tokens, made.vocab_size, made.sha256) == (len(ids), len(tok), made.manifest["sha256"])
    assert data[:4] == ids[0].to_bytes(4, "little")
    assert made.tokenizer_json is not None
    assert Tokenizer.from_file(made.tokenizer_json).vocabulary.sha256 == tok.vocabulary.sha256
    assert gguf.read(made.tokenizer_gguf)["tensors"] == []
    assert_clean(tmp_path / "c")


def test_folder_is_one_document_a_file_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write(folder / "b.md", "second")
    write(folder / "a" / "z.txt", "first")
    write(folder / "c.jsonl", '{"text": "third"}\n\n{"text": "fourth", "n": 1}\n{"text": ""}\n')
    write(folder / "picture.png", b"\x89PNG\0\0")
    write(folder / ".git" / "x.txt", "hidden")
    write(folder / "empty.txt", "")
    made = corpora.prepare(folder, "bytes", 0, tmp_path / "c")
    text = bytes(256 if i < 0 else i for i in ids_of(made) if i != 256).decode()
    assert text == "firstsecondthirdfourth"
    assert made.n_documents == 4
    assert ids_of(made).count(256) == 4


def test_default_is_pythons_manual(tmp_path: Path) -> None:
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    made = corpora.prepare(None, "bytes", 0, tmp_path)
    assert made.n_documents == len(topics)
    ids = ids_of(made)
    ends = [i for i, token in enumerate(ids) if token == 256]
    documents = [bytes(ids[a + 1 : b]).decode() for a, b in zip([-1, *ends], ends, strict=False)]
    assert sorted(documents) == sorted(topics.values())
    assert documents != [topics[key] for key in sorted(topics)]  # the end, held out, is not the end of the alphabet
    assert corpora.prepare("", "bytes", 0, tmp_path) == made


def test_byte_order_mark_and_line_ends_are_kept_apart(tmp_path: Path) -> None:
    made = corpora.prepare(write(tmp_path / "w.txt", b"\xef\xbb\xbfa\r\nb"), "bytes", 0, tmp_path / "c")
    assert ids_of(made) == [*b"a\r\nb", 256]


def test_control_tokens_in_a_corpus_are_text(tmp_path: Path) -> None:
    made = corpora.prepare(write(tmp_path / "t.txt", "a<|endoftext|>b"), "bpe", 270, tmp_path / "c")
    assert ids_of(made).count(int(made.manifest["eos_id"])) == 1


def test_long_documents_are_packed_as_a_whole_would_be(tmp_path: Path) -> None:
    """Pieces of 64 KiB end where no token spans: the ids are those of the whole text."""
    text = TEXT * 100 + "no spaces here" * 3 + "\n" + "x" * 200_000 + " and " + "line\n" * 20_000
    path = write(tmp_path / "long.txt", text)
    made = corpora.prepare(path, "bpe", 400, tmp_path / "c")
    tok = Tokenizer.from_gguf(made.tokenizer_gguf)
    pieces = [piece for piece, _, _ in sources.open_source(path).pieces(lambda n: None)]
    assert len(pieces) > 5 and "".join(pieces) == text
    whole = TEXT * 100
    assert ids_of(made)[: len(tok.encode(whole)) - 5] == tok.encode(whole)[:-5]
    assert tok.decode(ids_of(made)) == text


def test_file_tokenizer(tmp_path: Path) -> None:
    first = corpora.prepare(write(tmp_path / "a.txt", TEXT), "bpe", 300, tmp_path / "c")
    other = write(tmp_path / "b.txt", "another text")
    for file in (first.tokenizer_gguf, first.tokenizer_json):
        made = corpora.prepare(other, str(file), 0, tmp_path / "c")
        assert Tokenizer.from_gguf(first.tokenizer_gguf).decode(ids_of(made)) == "another text"
        assert made.vocab_size == 300


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_validation_texts_use_the_same_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    train = corpora.prepare(write(tmp_path / "a.txt", TEXT), tokenizer, 300, tmp_path / "c")
    val = corpora.prepare(write(tmp_path / "v.txt", "The dog is ünseen."), tokenizer, 0, tmp_path / "c", like=train)
    tok = Tokenizer.from_gguf(train.tokenizer_gguf)
    assert ids_of(val) == [*tok.encode("The dog is ünseen."), tok.eos_id]
    assert val.vocab_size == train.vocab_size == 300
    assert val.manifest["tokenizer"] == train.manifest["tokenizer"]
    again = corpora.prepare(val.tokens, tokenizer, 0, tmp_path / "c", like=train)
    assert again.tokens == val.tokens
    other = corpora.prepare(tmp_path / "v.txt", "bytes", 0, tmp_path / "c")
    if tokenizer != "bytes":
        assert (
            "another tokenizer"
            in refused(lambda: corpora.prepare(other.tokens, "bpe", 0, tmp_path / "c", like=train)).message
        )


def test_a_larger_vocabulary_is_padded(tmp_path: Path) -> None:
    made = corpora.prepare(write(tmp_path / "a.txt", TEXT), "bytes", 320, tmp_path / "c")
    assert made.vocab_size == made.manifest["vocab_size"] == 320
    assert len(Tokenizer.from_gguf(made.tokenizer_gguf)) == 320
    assert max(ids_of(made)) == 256


# Packed tokens


def test_packed_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    made = corpora.prepare(write(tmp_path / "a.txt", TEXT), "chars", 0, tmp_path / "c")
    for name in (made.tokens, made.tokens.parent):
        again = corpora.prepare(name, "bpe", 0, tmp_path / "other")
        assert again == made
    assert not (tmp_path / "other").exists()
    larger = corpora.prepare(made.tokens, "bpe", 500, tmp_path / "other")
    assert larger.tokens == made.tokens
    assert len(Tokenizer.from_gguf(larger.tokenizer_gguf)) == larger.vocab_size == 500


def test_bare_packed_tokens_get_a_placeholder_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "ts_seqs.bin", array("i", [5, 0, 41, 7] * 30).tobytes())
    made = corpora.prepare(path, "bpe", 0, tmp_path / "c")
    assert made.tokens == path
    assert (made.n_tokens, made.vocab_size, made.manifest["eos_id"]) == (120, 43, 42)
    assert Tokenizer.from_gguf(made.tokenizer_gguf).decode([5, 0, 41]) == "[5][0][41]"
    assert corpora.prepare(path, "bpe", 0, tmp_path / "c") == made
    assert corpora.prepare(path, "bytes", 64, tmp_path / "c").vocab_size == 64
    exact = corpora.prepare(path, "bytes", 42, tmp_path / "c")
    assert (exact.vocab_size, exact.manifest["eos_id"]) == (42, None)
    error = refused(lambda: corpora.check(path, "bpe", 41))
    assert error.kind == "bad_config" and "id 41" in error.message and "model.vocab_size=42" in error.hint
    assert refused(lambda: corpora.prepare(path, "bpe", 41, tmp_path / "c")).kind == "bad_config"


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "is empty"), (b"12345", "5 bytes"), (array("i", [1, 2, -3]).tobytes(), "id -3 at token 2")],
)
def test_bad_packed_tokens(data: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", data)
    for call in (lambda: corpora.check(path), lambda: corpora.prepare(path, "bpe", 0, tmp_path / "c")):
        error = refused(call)
        assert error.kind == "bad_file" and says in error.message and str(path) in error.message


def test_vocabulary_size_is_what_prepare_comes_to(tmp_path: Path) -> None:
    text, bare = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.bin", array("i", [5, 0, 41]).tobytes())
    made = corpora.prepare(text, "bpe", 300, tmp_path / "c")
    for corpus, tokenizer in [(text, "bytes"), (text, "chars"), (None, "chars"), (bare, "bpe"), (made.tokens, "bytes")]:
        for asked in (0, 500):
            size = corpora.vocabulary_size(corpus, tokenizer, asked)
            assert size == corpora.prepare(corpus, tokenizer, asked, tmp_path / "c").vocab_size
    assert corpora.vocabulary_size(text, str(made.tokenizer_json)) == 300
    assert corpora.vocabulary_size(text, "bpe", 700) == 700


def test_packed_tokens_cut_short_or_without_their_tokenizer(tmp_path: Path) -> None:
    made = corpora.prepare(write(tmp_path / "a.txt", TEXT), "chars", 0, tmp_path / "c")
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "t.bin").write_bytes(made.tokens.read_bytes())
    (folder / "t.json").write_text(json.dumps(made.manifest))
    error = refused(lambda: corpora.prepare(folder / "t.bin", "bpe", 0, tmp_path / "d"))
    assert error.kind == "missing_file" and "tokenizer" in error.message
    (folder / "t.bin").write_bytes(made.tokens.read_bytes()[:-8])
    error = refused(lambda: corpora.check(folder / "t.bin"))
    assert error.kind == "bad_file" and "manifest says" in error.message
    (folder / "t.json").write_text("{}")
    assert "not a manifest" in refused(lambda: corpora.check(folder / "t.bin")).message


# What is refused


def test_missing_and_empty(tmp_path: Path) -> None:
    assert refused(lambda: corpora.check(tmp_path / "none.txt")).kind == "missing_file"
    assert refused(lambda: corpora.check(tmp_path / "none.bin")).kind == "missing_file"
    assert "is empty" in refused(lambda: corpora.check(write(tmp_path / "e.txt", ""))).message
    (tmp_path / "folder").mkdir()
    assert "no text files" in refused(lambda: corpora.check(tmp_path / "folder")).message
    write(tmp_path / "folder" / "x.txt", "")
    assert "is empty" in refused(lambda: corpora.check(tmp_path / "folder")).message
    assert "not a file" in refused(lambda: corpora.check("/dev/null")).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.txt", TEXT)
    path.chmod(0)
    error = refused(lambda: corpora.check(path))
    assert error.kind == "bad_file" and "Permission" in error.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"text\0more", "a NUL byte at byte 4"),
        (b"caf\xe9 au lait", "not UTF-8 at byte 3"),
        (b"cut \xf0\x9f\xa6", "not UTF-8, cut short at byte 4"),
        (b"x" * 400_000 + b"\xff", "not UTF-8 at byte 400000"),
        (("é" * 200_000 + "\0").encode(), "a NUL byte at byte 400000"),
        (b"x" * (1 << 18) + b"\xc3(", f"not UTF-8 at byte {1 << 18}"),
        (b"x" * ((1 << 18) - 1) + b"\xc3(", f"not UTF-8 at byte {(1 << 18) - 1}"),
    ],
)  # fmt: skip
def test_binary(data: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "b.txt", data)
    for tokenizer in ("bytes", "chars", "bpe"):
        error = refused(functools.partial(corpora.prepare, path, tokenizer, 0, tmp_path / "c"))
        assert error.kind == "bad_file"
        assert says in error.message and str(path) in error.message
    assert_clean(tmp_path / "c")
    if len(data) < 60_000:
        assert says in refused(lambda: corpora.check(path)).message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "unfinished', "not JSON"),
        ('{"content": "x"}', "no text"),
        ('{"text": 3}', "no text"),
        ("[1]", "no text"),
        ('{"text": "\\ud800"}', "half a surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_jsonl_names_the_line(line: str | bytes, says: str, tmp_path: Path) -> None:
    data = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "x.jsonl", b'{"text": "good"}\n\n' + data + b"\n")
    error = refused(lambda: corpora.prepare(path, "bytes", 0, tmp_path / "c"))
    assert error.kind == "bad_file"
    assert f"{path}:3" in error.message and says in error.message
    assert_clean(tmp_path / "c")


def test_too_short(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", "0123456789")
    corpora.check(path, "bytes", 0, 10)
    assert "too short" in refused(lambda: corpora.check(path, "bytes", 0, 11)).message
    assert "too short" in refused(lambda: corpora.check(write(tmp_path / "é.txt", "é" * 9), "chars", 0, 10)).message
    made = corpora.prepare(path, "bytes", 0, tmp_path / "c")
    made.require(10)
    made.require(5, 0.5 + 1e-9) if made.n_tokens > 11 else None
    assert "train on" in refused(lambda: made.require(11)).message
    assert "validate on" in refused(lambda: made.require(5, 0.1)).message


def test_too_short_for_its_validation_part(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", "0123456789" * 10)
    made = corpora.prepare(path, "bytes", 0, tmp_path / "c")
    for corpus in (path, made.tokens):
        for tokenizer in ("bytes", "chars"):
            corpora.check(corpus, tokenizer, 0, 9, 0.1)
            error = refused(functools.partial(corpora.check, corpus, tokenizer, 0, 10, 0.1))
            assert "10 tokens to validate on" in error.message
    made.require(9, 0.1)
    assert "validate on" in refused(lambda: made.require(10, 0.1)).message


@pytest.mark.parametrize(("tokenizer", "needed"), [("bytes", 257), ("chars", 21), ("bpe", 257)])
def test_vocabulary_smaller_than_the_ids(tokenizer: str, needed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghijklmnopqrst" * 30)
    error = refused(lambda: corpora.check(path, tokenizer, needed - 1, 8))
    assert error.kind == "bad_config" and f"needs {needed}" in error.message
    assert refused(lambda: corpora.prepare(path, tokenizer, needed - 1, tmp_path / "c")).kind == "bad_config"
    corpora.check(path, tokenizer, needed, 8)
    assert corpora.prepare(path, tokenizer, needed, tmp_path / "c").vocab_size == needed


def test_bad_tokenizer_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    assert refused(lambda: corpora.check(path, "no-such-tokenizer")).kind == "missing_file"
    assert refused(lambda: corpora.check(path, str(write(tmp_path / "t.json", "{}")))).kind == "bad_file"
    assert refused(lambda: corpora.prepare(path, "no-such-tokenizer", 0, tmp_path / "c")).kind == "missing_file"
    assert not (tmp_path / "c").exists()


# The cache, and being stopped


def test_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    os.utime(path, (time.time() - 60, time.time() - 60))
    first = corpora.prepare(path, "chars", 0, tmp_path / "c")
    stamp = first.tokens.stat().st_mtime_ns
    monkeypatch.setattr(sources, "_file_sha256", lambda *args: pytest.fail("an unchanged file was read again"))
    monkeypatch.setattr(making, "_pack", lambda *args: pytest.fail("packed again"))
    assert corpora.prepare(path, "chars", 0, tmp_path / "c") == first
    assert first.tokens.stat().st_mtime_ns == stamp
    monkeypatch.undo()
    # the same content under another name is the same packing of it; other content is another
    path.write_text(TEXT + "more")
    changed = corpora.prepare(path, "chars", 0, tmp_path / "c")
    assert changed.tokens != first.tokens and changed.n_tokens == first.n_tokens + 4
    assert corpora.prepare(path, "bytes", 0, tmp_path / "c").tokens not in (changed.tokens, first.tokens)


def test_damaged_packings_and_index_are_made_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    os.utime(path, (1, 1))
    first = corpora.prepare(path, "chars", 0, tmp_path / "c")
    whole = first.tokens.read_bytes()
    for damage in (
        lambda: first.tokens.write_bytes(whole[:-4]),
        lambda: first.tokens.with_suffix(".json").write_text("{"),
        first.tokenizer_gguf.unlink,
        lambda: (tmp_path / "c" / "index.json").write_text('{"x": 3, "y": [1]}'),
    ):
        damage()
        again = corpora.prepare(path, "chars", 0, tmp_path / "c")
        assert again == first and again.tokens.read_bytes() == whole and again.tokenizer_gguf.is_file()
    assert_clean(tmp_path / "c")


def test_progress_counts_the_corpus_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = write(tmp_path / "a.txt", TEXT * 300)
    corpora.prepare(path, "chars", 0, tmp_path / "c", lambda done, total: seen.append((done, total)))
    size = path.stat().st_size
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size) and len(seen) > 5


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_interrupt_leaves_nothing(tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT * 400)
    for limit in (0.1, 0.5, 0.99):

        def stop(done: int, total: int, limit: float = limit) -> None:
            if done > limit * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            corpora.prepare(path, tokenizer, 0, tmp_path / "c", stop)
        assert_clean(tmp_path / "c")
        assert not list((tmp_path / "c").glob("a-*"))


def test_kill_leaves_nothing_that_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT * 3000)
    code = f"from toy import corpora; corpora.prepare({str(path)!r}, 'chars', 0, {str(tmp_path / 'c')!r})"
    for number in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            end = time.monotonic() + 60
            while not list((tmp_path / "c").glob(".tmp-*/tokens.bin")) and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.005)
            process.send_signal(number)
        assert process.returncode != 0
        assert not list((tmp_path / "c").glob("a-*"))
    made = corpora.prepare(path, "chars", 0, tmp_path / "c")
    assert made.n_tokens > 0
    assert_clean(tmp_path / "c")  # the leftovers of the killed one are gone too


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: packed.TokenWriter, ids: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed.TokenWriter, "write", full)  # a real full disk needs a mount of its own
    path = write(tmp_path / "a.txt", TEXT)
    error = refused(lambda: corpora.prepare(path, "bytes", 0, tmp_path / "c"))
    assert error.kind == "disk_full" and error.exit_code == 1
    assert_clean(tmp_path / "c")


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    write(tmp_path / "c", "a file is in the way")
    error = refused(lambda: corpora.prepare(write(tmp_path / "a.txt", TEXT), "bytes", 0, tmp_path / "c"))
    assert error.kind == "bad_file" and str(tmp_path) in error.message


def test_default_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corpora.default_cache_dir(tmp_path) == tmp_path / "data" / "packed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.default_cache_dir() == tmp_path / "toy" / "packed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_constant(tmp_path: Path) -> None:
    """Packing 20 MB takes no more memory than 2 MB: measured in a process of its own."""
    code = (
        "import sys; from toy import corpora; from pathlib import Path\n"
        "corpora.prepare(sys.argv[1], 'chars', 0, Path(sys.argv[2]))"
    )
    peaks = []
    for name, times in (("small", 700), ("large", 7_000)):
        path = write(tmp_path / f"{name}.txt", TEXT * times)
        peaks.append(peak_memory(code, path, tmp_path / "c"))
    assert peaks[1] < peaks[0] + 16_384  # KiB: the allocator's own slack


def test_pack_text_script(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", TEXT)
    argv = [sys.executable, str(ROOT / "prep" / "pack_text.py"), "a.txt", "out", "--tokenizer", "chars"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tokenizer.gguf",
        "tokenizer.json",
        "tokens.bin",
        "tokens.json",
    ]
    made = corpora.prepare(tmp_path / "out", "bpe", 0, tmp_path / "c")
    assert Tokenizer.from_gguf(made.tokenizer_gguf).decode(ids_of(made)) == TEXT
    again = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "error:" in again.stderr and "hint:" in again.stderr
    assert subprocess.run([*argv, "--force"], cwd=tmp_path, check=False, capture_output=True).returncode == 0
    write(tmp_path / "mine" / "letter.txt", TEXT)
    wrong = [*argv[:3], "mine", "--tokenizer", "chars", "--force"]
    kept = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert kept.returncode == 2 and "holds other things than tokens.json" in kept.stderr
    assert (tmp_path / "mine" / "letter.txt").read_text() == TEXT
    (tmp_path / "qa.jsonl").write_text('{"text": "ab"}\n')
    packing = [*argv[:2], "qa.jsonl", "qa", "--tokenizer", "bytes", "--examples", "--json"]
    document = json.loads(subprocess.run(packing, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    assert document["format"] == "toy/pack-text-v1" and document["examples"]["n_examples"] == 1
    assert corpora.prepare_examples(tmp_path / "qa", "bytes").n_tokens == 3
    bad = [*argv[:2], "none.txt", "out2"]
    missing = subprocess.run(bad, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and "no corpus" in missing.stderr and "Traceback" not in missing.stderr
    assert not (tmp_path / "out2").exists()
