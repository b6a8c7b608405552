"""Bad input, through the real command line: the documented exit code, one `error:` line that names the thing, one
`hint:` line, no traceback, nothing left behind; the same as one document under --json."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_rows import ROWS
from conftest import Trained
from harness import EXCERPT, ROOT, TINY, Toy, tree, without_root_powers, write_jsonl
from refusals import check_document, check_lines


@pytest.fixture(scope="session")
def others(home: dict[str, str], built: None, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every other kind, of one step: gpt2, lora, vit; and images to train it on."""
    from PIL import Image

    at = tmp_path_factory.mktemp("others")
    toy = Toy(at, home)
    for folder, names, odd in (("pictures", "ab", 8), ("mixed", "ab", 9), ("single", "a", 8), ("damaged", "ab", 8)):
        for name in names:
            (at / folder / name).mkdir(parents=True)
            for n in range(20):
                side = odd if (name, n) == ("a", 0) else 8
                pixels = bytes((n * 7 + 31 * i) % 256 for i in range(side * side))
                Image.frombytes("L", (side, side), pixels).save(at / folder / name / f"{n:02d}.png")
    (at / "damaged" / "b" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    one = ("--steps", 1, "--no-sample", "--out")
    toy("train", "--arch", "gpt2", *TINY, *one, "gpt2-run").ok()
    toy("train", "lora", "--model", trained.gguf, "--corpus", EXCERPT, *one, "lora-run").ok()
    small = ("--set", "model.n_layer=1", "--set", "model.n_embd=12")
    toy("train", "vit-tiny", "--images", "pictures", *small, *one, "vit-run").ok()
    return at


@pytest.fixture
def things(cold_toy: Toy, trained: Trained, others: Path) -> Iterator[Path]:
    """A directory with everything that ROWS name."""
    from toy import _native

    at = cold_toy.cwd
    good = trained.gguf.read_bytes()
    (at / "empty.txt").touch()
    (at / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (at / "short.txt").write_text("To be, or not.\n")
    (at / "secret.txt").write_text("secret " * 1000)
    (at / "secret.gguf").write_bytes(good)
    (at / "folder").mkdir()
    (at / "other.jsonl").write_text('{"title": "no text in here"}\n' * 100)
    (at / "torn.bin").write_bytes(b"\1" * 4001)
    (at / "negative.bin").write_bytes(struct.pack("<1000i", *([-1] * 1000)))
    (at / "ids.bin").write_bytes(struct.pack("<5000i", *range(5000)))
    (at / "good.gguf").write_bytes(good)
    (at / "truncated.gguf").write_bytes(good[: len(good) // 2])
    (at / "head.gguf").write_bytes(good[:300])
    (at / "not.gguf").write_bytes(b"This is no model.\n" * 100)
    (at / "mamba.gguf").write_bytes(good.replace(b"llama", b"mamba"))
    _native.gguf_write(str(at / "vocabulary.gguf"), {"general.architecture": "llama", "llama.block_count": 2})
    examples(at)
    for name in ("pictures", "mixed", "single", "damaged", "lora-run"):
        shutil.copytree(others / name, at / name, symlinks=True)
    for name in ("gpt2", "vit"):
        shutil.copy(others / f"{name}-run" / "weights" / "model.gguf", at / f"{name}.gguf")
    shutil.copy(others / "lora-run" / "weights" / "adapter.gguf", at / "adapter.gguf")
    width = b"llama.feed_forward_length"
    value = good.index(width) + len(width) + 4
    assert struct.unpack("<I", good[value : value + 4]) == (192,)
    (at / "shape.gguf").write_bytes(good[:value] + struct.pack("<I", 200) + good[value + 4 :])
    (at / "shapeless.gguf").write_bytes(good.replace(width, width[:-1] + b"_"))
    (at / "fraction.gguf").write_bytes(good[: value - 4] + struct.pack("<If", 6, 1e30) + good[value + 4 :])
    (at / "other.gguf").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (at / "mute.gguf").write_bytes(good.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nothin"))
    (at / "device.yml").write_text("run:\n  device: cpuu\n")
    (at / "section.yml").write_text("modell:\n  n_layer: 2\n")
    (at / "knob.yml").write_text("model:\n  n_layers: 2\n")
    (at / "knob.json").write_text('{"model": {"n_layers": 2}}')
    (at / "broken.yml").write_text("model:\n  n_layer: [1, 2\n")
    (at / "full").mkdir()
    (at / "full" / "something").touch()
    shutil.copytree(trained.run, at / "old-run", symlinks=True)
    shutil.copytree(trained.run, at / "torn-run", symlinks=True)
    (at / "torn-run" / "checkpoints" / "step_50" / "DONE").unlink()
    shutil.copytree(trained.run, at / "lone-run", ignore=shutil.ignore_patterns("checkpoints"))
    (at / "gate.txt").write_text("step 1: loss=1\n")
    (at / "locked").mkdir()
    for path, mode in (("locked", 0o555), ("secret.txt", 0), ("secret.gguf", 0)):
        (at / path).chmod(mode)
    yield at
    (at / "locked").chmod(0o755)


def examples(at: Path) -> None:
    """Good and bad sets of examples, and a corpus packed with a tokenizer of its own."""
    from toy import corpora

    asked, answered = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    pair = {"prompt": "Why? ", "completion": "So."}
    lines: dict[str, list[object]] = {
        "pairs": [pair] * 20,
        "broken": [pair],
        "silent": [pair, pair | {"completion": " "}],
        "deep": ["[" * 100_000],
        "chat": [{"messages": [asked, answered]}],
        "asked": [{"messages": [asked]}],
        "role": [{"messages": [{"content": "Why?"}, answered]}],
    }
    for name, records in lines.items():
        write_jsonl(at / f"{name}.jsonl", *records)
    with (at / "broken.jsonl").open("a") as file:
        file.write("no JSON\n")
    packed = corpora.prepare(EXCERPT, "chars", cache_dir=at / "packings").tokens.parent
    shutil.move(packed, at / "chars.packed")
    shutil.rmtree(at / "packings")


@pytest.mark.parametrize("name", ROWS)
def test_refused(name: str, cold_toy: Toy, things: Path, home: dict[str, str]) -> None:
    bad = ROWS[name]
    args = bad.args.format(excerpt=EXCERPT).split()
    before = tree(things, Path(home["HOME"]))
    told = cold_toy(*args, env=dict(bad.env), preexec_fn=without_root_powers)
    message, hint = check_lines(told, bad.kind)
    assert told.stdout == ""
    assert bad.words in message
    assert bad.hint in hint

    document = check_document(cold_toy(*args, "--json", env=dict(bad.env), preexec_fn=without_root_powers), bad.kind)
    assert document["message"] == message.removeprefix("error: ")
    assert document["hint"] == hint.removeprefix("hint: ")
    assert tree(things, Path(home["HOME"])) == before


def test_too_short_to_validate(toy: Toy) -> None:
    """Long enough to train on, but its last tenth holds no sequence: known for sure when it is packed."""
    (toy.cwd / "short.txt").write_text("x" * 400)
    told = toy("train", "--corpus", "short.txt", "--set", "data.tokenizer=bytes", "--set", "model.context=64")
    message, hint = check_lines(told, "bad_file")
    assert "validate" in message
    assert hint
    assert [path.name for path in toy.cwd.iterdir()] == ["short.txt"]


def test_examples_that_end_up_all_masked(toy: Toy, things: Path) -> None:
    """Every answer begins beyond the context: known when they are packed, and no run is left behind."""
    write_jsonl(things / "long.jsonl", {"prompt": "a" * 100, "completion": "b"})
    flags = ("lora", "--model", "good.gguf", "--corpus", "long.jsonl", "--set", "data.val_fraction=0")
    message, hint = check_lines(toy("train", *flags, "--set", "model.context=16", "--out", "run"), "bad_file")
    assert "long" in message
    assert "model.context" in hint
    assert not (toy.cwd / "run").exists()


@pytest.mark.parametrize(
    "name", ["set-unknown-knob", "corpus-missing", "heads", "base-is-an-adapter", "rank-above-the-width", "patches"]
)
def test_a_dry_run_refuses_the_same(name: str, cold_toy: Toy, things: Path) -> None:
    bad = ROWS[name]
    message, _ = check_lines(cold_toy(*bad.args.split(), "--dry-run"), bad.kind)
    assert bad.words in message


@pytest.mark.parametrize(("text", "words", "hint"), [
    ("trian:\n  steps: 5\n", "trian", "train"),
    ("train:\n  stepz: 5\n", "toy.yml:2", "train.steps"),
    ("preste: tiny\n", "preste", "preset"),
    ("train:\n  steps: many\n", "whole number", "train.steps"),
])  # fmt: skip
def test_a_bad_project_file(cold_toy: Toy, text: str, words: str, hint: str) -> None:
    (cold_toy.cwd / "toy.yml").write_text(text)
    for command in (("train",), ("config", "validate"), ("train", "--dry-run")):
        told = cold_toy(*command)
        message, said = check_lines(told, "bad_config")
        assert words in message
        assert hint in said
    assert [path.name for path in cold_toy.cwd.iterdir()] == ["toy.yml"]


def test_the_repository_stays_clean() -> None:
    """What these tests started wrote into their own directories."""
    assert not (ROOT / "runs").exists()
