"""Bad input and bad luck, through the real command line: the documented exit code, one `error:` line that names the
thing, one `hint:` line, no traceback, nothing left behind; the same as one document under --json."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from harness import (
    EXCERPT,
    ROOT,
    TINY,
    Result,
    Toy,
    is_alive,
    read_events,
    tree,
    wait_for,
    without_root_powers,
    write_jsonl,
)

from toy.errors import KINDS

TINY_FLAGS = " ".join(str(flag) for flag in TINY)


@dataclass(frozen=True)
class Row:
    """One bad command line. `words` must be in the error line, `hint` in the hint."""

    args: str
    kind: str
    words: str
    hint: str = ""
    env: tuple[tuple[str, str], ...] = ()


def row(args: str, kind: str, words: str, hint: str = "", **env: str) -> Row:
    return Row(args, kind, words, hint, tuple(env.items()))


ROWS = {
    # words
    "recipe": row("train from-scrach", "bad_flag", "from-scrach", "from-scratch"),
    "recipe-flag": row("train --recipe lorra", "bad_flag", "lorra", "lora"),
    "two-recipes": row("train from-scratch --recipe lora", "bad_flag", "lora"),
    "arch": row("train --arch lama", "bad_flag", "lama", "llama"),
    "lora-of-a-vit": row("train lora --arch vit --model good.gguf", "not_available", "vit has others", "vit-tiny"),
    "lora-of-a-gpt2": row(
        "train lora --arch gpt2 --model gpt2.gguf", "not_available", "one for all three", "warm-start"
    ),
    "vit-tiny-of-a-llama": row("train vit-tiny --arch llama --images pictures", "not_available", "images", "--arch"),
    "from-scratch-of-a-vit": row("train --arch vit", "not_available", "images", "vit-tiny"),
    "warm-start-of-a-vit": row("train warm-start --arch vit --model vit.gguf", "not_available", "images", "vit-tiny"),
    "device": row("train --device gpu", "bad_flag", "gpu", "cpu"),
    "device-in-a-file": row("train --config device.yml", "bad_config", "cpuu", "cpu"),
    "command": row("trian", "bad_flag", "trian", "train"),
    "flag": row("train --stepz 5", "bad_flag", "--stepz", "--steps"),
    "flag-of-lora": row("train --rank 8", "bad_flag", "--rank", "lora"),
    "flag-of-warm-start": row("train --init model.gguf", "bad_flag", "--init", "warm-start"),
    "flag-of-two-recipes": row("train --model model.gguf", "bad_flag", "--model"),
    "flag-of-vit": row("train --images photos", "bad_flag", "--images", "vit-tiny"),
    "flag-of-another-recipe": row(
        "train vit-tiny --images pictures --corpus {excerpt}", "bad_flag", "--corpus", "leave"
    ),
    "knob-of-another-recipe": row("train --set lora.rank=4", "bad_config", "lora.rank", "--recipe lora"),
    "knob-of-another-architecture": row(
        "train --arch gpt2 --set model.rope_freq_base=500", "bad_config", "model.rope_freq_base", "--arch llama"
    ),
    "preset-of-another-recipe": row("train lora --model good.gguf --preset vit-mnist", "bad_flag", "vit-mnist"),
    "duration": row("train --stop-after soon", "bad_config", "soon", "1h30m"),
    "preset": row("train --preset tinny", "bad_flag", "tinny", "tiny"),
    # bases and donors
    "lora-without-a-base": row("train lora --corpus {excerpt}", "bad_flag", "needs a base", "--model"),
    "warm-start-without-a-donor": row("train warm-start", "bad_flag", "needs a donor", "--init scratch"),
    "embeddings-without-a-donor": row("train warm-start --init embeddings", "bad_flag", "needs a donor", "--model"),
    "init": row("train warm-start --init donr --model good.gguf", "bad_config", "donr", "donor"),
    "base-missing": row("train lora --model nowhere.gguf", "missing_file", "nowhere.gguf"),
    "base-truncated": row("train lora --model truncated.gguf", "bad_file", "truncated.gguf"),
    "base-not-a-gguf": row("train lora --model not.gguf", "bad_file", "not.gguf"),
    "base-unreadable": row("train lora --model secret.gguf", "bad_file", "secret.gguf"),
    "base-without-weights": row("train lora --model vocabulary.gguf", "bad_file", "no weights"),
    "base-without-a-tokenizer": row("train lora --model mute.gguf", "bad_file", "no tokenizer"),
    "base-is-a-gpt2": row("train lora --model gpt2.gguf", "not_available", "'gpt2'", "warm-start takes this one"),
    "base-is-a-vit": row("train lora --model vit.gguf", "not_available", "'vit'", "qwen2"),
    "base-is-a-mamba": row("train lora --model mamba.gguf", "not_available", "'mamba'", "llama"),
    "base-is-an-adapter": row("train lora --model adapter.gguf", "bad_file", "an adapter", "toy merge"),
    "base-is-a-lora-run": row("train lora --model lora-run", "bad_file", "an adapter", "toy merge"),
    "base-of-another-shape": row("train lora --model shape.gguf", "bad_file", "64 x 200"),
    "base-without-its-shape": row("train lora --model shapeless.gguf", "bad_file", "llama.feed_forward_length"),
    "base-keeps-its-shape": row(
        "train lora --model good.gguf --set model.n_layer=5",
        "bad_config",
        "model.n_layer = 5",
        "leave model.n_layer out",
    ),
    "donor-is-an-adapter": row("train warm-start --model adapter.gguf", "bad_file", "an adapter"),
    "donor-is-a-vit": row("train warm-start --model vit.gguf", "not_available", "'vit'", "gpt2, llama"),
    "donor-of-another-architecture": row(
        "train warm-start --arch gpt2 --model good.gguf", "bad_config", "run.arch is gpt2", "leave --arch out"
    ),
    "donor-with-another-vocabulary": row(
        "train warm-start --model good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "base-with-another-vocabulary": row(
        "train lora --model good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "donor-with-less-vocabulary": row("train warm-start --model good.gguf --corpus ids.bin", "bad_config", "4999"),
    "donor-and-a-tokenizer": row(
        "train warm-start --model good.gguf --set data.tokenizer=chars", "bad_config", "data.tokenizer", "leave"
    ),
    "context-beyond-a-gpt2": row(
        "train warm-start --model gpt2.gguf --corpus {excerpt} --set model.context=65", "bad_config", "donor's, 64"
    ),
    # adapters
    "rank-none": row("train lora --model good.gguf --rank 0", "bad_config", "lora.rank = 0"),
    "rank-above-the-width": row("train lora --model good.gguf --rank 65", "bad_config", "lora.rank = 65", "4 to 64"),
    "rank-of-letters": row("train lora --model good.gguf --rank many", "bad_flag", "--rank"),
    "target": row("train lora --model good.gguf --set lora.targets=atn_q", "bad_config", "atn_q", "attn_q"),
    "targets-none": row("train lora --model good.gguf --set lora.targets=", "bad_config", "lora.targets is empty"),
    "dropout": row("train lora --model good.gguf --set lora.dropout=1", "bad_config", "lora.dropout"),
    "adapter-for-another-base": row(
        "infer other.gguf --adapter adapter.gguf --prompt a", "bad_file", "another base", "trained on"
    ),
    "adapter-for-another-architecture": row(
        "infer gpt2.gguf --adapter adapter.gguf --prompt a", "bad_file", "is a gpt2", "trained on"
    ),
    "adapter-that-is-a-model": row("infer good.gguf --adapter good.gguf --prompt a", "bad_file", "not an adapter"),
    "merge-into-another-base": row("merge other.gguf adapter.gguf out.gguf", "bad_file", "other.gguf", "--other-base"),
    # frozen tensors
    "freeze-nothing": row("train --set train.freeze=blk.77.*", "bad_config", "blk.77.*"),
    "freeze-everything": row("train --set train.freeze=*", "bad_config", "nothing to train"),
    "freeze-a-base": row(
        "train lora --model good.gguf --set train.freeze=*norm*", "bad_config", "base is frozen anyway", "*.lora_a"
    ),
    "freeze-every-second-factor": row(
        "train lora --model good.gguf --set train.freeze=*.lora_b", "bad_config", "begins at zero", "*.lora_a"
    ),
    # examples
    "examples-not-json": row("train lora --model good.gguf --corpus broken.jsonl", "bad_file", "broken.jsonl:2"),
    "examples-without-a-role": row("train lora --model good.gguf --corpus role.jsonl", "bad_file", "role.jsonl:1"),
    "examples-without-an-answer": row("train lora --model good.gguf --corpus asked.jsonl", "bad_file", "asked.jsonl:1"),
    "examples-empty-answer": row("train lora --model good.gguf --corpus silent.jsonl", "bad_file", "silent.jsonl:2"),
    "examples-nested-too-deeply": row("train --corpus deep.jsonl", "bad_file", "deep.jsonl:1: not JSON (nested too"),
    "template-missing": row("train lora --model good.gguf --corpus chat.jsonl", "bad_file", "chat template", "prompt"),
    "validation-of-another-kind": row(
        "train lora --model good.gguf --corpus pairs.jsonl --set data.val_corpus={excerpt}", "bad_file", "val_corpus"
    ),
    # images
    "images-none": row("train vit-tiny", "bad_flag", "needs images", "--images"),
    "images-missing": row("train vit-tiny --images nowhere", "missing_file", "nowhere"),
    "images-empty": row("train vit-tiny --images folder", "bad_file", "folder"),
    "images-of-mixed-sizes": row("train vit-tiny --images mixed", "bad_file", "9 x 9", "model.image_size=8"),
    "images-damaged": row("train vit-tiny --images damaged", "bad_file", "damaged"),
    "images-of-one-class": row("train vit-tiny --images single", "bad_file", "one class"),
    "images-for-a-text-model": row("infer good.gguf --image pictures/a/01.png", "bad_flag", "--image", "--prompt"),
    "text-for-a-vit": row("infer vit.gguf --prompt a", "bad_flag", "--prompt", "--image"),
    "image-damaged": row("infer vit.gguf --image damaged/b/00.png", "bad_file", "00.png"),
    "images-not-images": row("train vit-tiny --images short.txt", "bad_file", "short.txt"),
    "patches": row(
        "train vit-tiny --images pictures --set model.patch_size=5", "bad_config", "model.patch_size = 5", "= 4"
    ),
    "classes": row("train vit-tiny --images pictures --set model.n_class=7", "bad_config", "n_class = 7", "leave"),
    "crop": row("train vit-tiny --images pictures --set data.augment_crop=8", "bad_config", "data.augment_crop"),
    # validation
    "patience-without-validation": row(
        "train --set eval.patience=3 --set data.val_fraction=0", "bad_config", "eval.patience", "data.val_corpus"
    ),
    "patience-without-images": row(
        "train vit-tiny --images pictures --set eval.patience=3 --set data.val_fraction=0",
        "bad_config",
        "eval.patience",
        "data.val_images",
    ),
    "patience-without-evaluations": row(
        "train --set eval.patience=3 --set eval.every=0", "bad_config", "eval.patience"
    ),
    # corpora
    "corpus-missing": row("train --corpus nowhere.txt", "missing_file", "nowhere.txt"),
    "corpus-empty": row("train --corpus empty.txt", "bad_file", "empty.txt"),
    "corpus-unreadable": row("train --corpus secret.txt", "bad_file", "secret.txt", "read"),
    "corpus-binary": row("train --corpus binary.txt", "bad_file", "binary.txt"),
    "corpus-short": row("train --corpus short.txt", "bad_file", "short.txt"),
    "corpus-empty-folder": row("train --corpus folder", "bad_file", "folder"),
    "corpus-jsonl-without-text": row("train --corpus other.jsonl", "bad_file", "other.jsonl"),
    "corpus-torn-ids": row("train --corpus torn.bin", "bad_file", "torn.bin"),
    "corpus-negative-ids": row("train --corpus negative.bin", "bad_file", "negative.bin"),
    "validation-corpus-missing": row("train --set data.val_corpus=gone.txt", "missing_file", "gone.txt"),
    "tokenizer-missing": row("train --set data.tokenizer=mine.json", "missing_file", "mine.json"),
    "vocabulary-too-small": row("train --corpus ids.bin --set model.vocab_size=100", "bad_config", "4999"),
    "vocabulary-too-small-for-bytes": row(
        f"train {TINY_FLAGS} --set model.vocab_size=200", "bad_config", "model.vocab_size"
    ),
    # models
    "model-missing": row("infer nowhere.gguf --prompt a", "missing_file", "nowhere.gguf"),
    "model-truncated": row("infer truncated.gguf --prompt a", "bad_file", "truncated.gguf"),
    "model-cut-in-its-head": row("infer head.gguf --prompt a", "bad_file", "head.gguf"),
    "model-not-a-gguf": row("infer not.gguf --prompt a", "bad_file", "not.gguf"),
    "model-of-another-architecture": row("infer mamba.gguf --prompt a", "not_available", "mamba"),
    "model-without-weights": row("infer vocabulary.gguf --prompt a", "bad_file", "vocabulary.gguf"),
    "model-unreadable": row("infer secret.gguf --prompt a", "bad_file", "secret.gguf"),
    "model-is-an-empty-folder": row("infer folder --prompt a", "missing_file", "folder"),
    "eval-with-another-vocabulary": row(
        "eval good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "data-with-another-vocabulary": row(
        "data show chars.packed --model good.gguf", "bad_file", "another vocabulary", "the text itself"
    ),
    "describe-missing": row("describe nowhere.gguf", "missing_file", "nowhere.gguf"),
    "describe-truncated": row("describe truncated.gguf", "bad_file", "truncated.gguf"),
    "describe-not-a-gguf": row("describe not.gguf", "bad_file", "not.gguf"),
    "prompt-id-beyond": row("infer good.gguf --prompt-ids 1,9999", "bad_flag", "9999"),
    "prompt-ids-of-letters": row("infer good.gguf --prompt-ids a,b", "bad_flag", "--prompt-ids"),
    "prompt-too-long": row(f"infer good.gguf --prompt {'a' * 70}", "bad_flag", "70"),
    "infer-n": row("infer good.gguf --prompt a --n 0", "bad_flag", "--n"),
    # configuration
    "set-unknown-knob": row("train --set train.stepz=5", "bad_config", "train.stepz", "train.steps"),
    "set-unknown-section": row("train --set trian.steps=5", "bad_config", "trian", "train"),
    "set-unknown-setting": row("train --set preste=tiny", "bad_config", "preste", "preset"),
    "set-not-a-pair": row("train --set steps", "bad_config", "steps"),
    "file-unknown-section": row("train --config section.yml", "bad_config", "modell", "model"),
    "file-unknown-knob": row("train --config knob.yml", "bad_config", "n_layers", "n_layer"),
    "json-unknown-knob": row("train --config knob.json", "bad_config", "n_layers", "n_layer"),
    "file-missing": row("train --config gone.yml", "missing_file", "gone.yml"),
    "file-not-yaml": row("train --config broken.yml", "bad_config", "broken.yml:"),
    "range-low": row("train --steps 0", "bad_config", "train.steps"),
    "range-high": row("train --set train.beta1=1.5", "bad_config", "train.beta1"),
    "range-negative": row("train --set train.learning_rate=-1", "bad_config", "train.learning_rate"),
    "not-finite": row("train --set train.learning_rate=nan", "bad_config", "train.learning_rate"),
    "type-of-a-flag": row("train --steps many", "bad_flag", "--steps"),
    "type-digits": row("train --steps 1 --set train.batch=1__0", "bad_config", "train.batch", "train.batch"),
    "type-too-many-digits": row(f"train --set train.batch={'9' * 5000}", "bad_config", "train.batch", "train.batch"),
    "type-whole-number": row("train --set model.n_embd=12.5", "bad_config", "model.n_embd"),
    "type-truth": row("train --set model.tie_embeddings=perhaps", "bad_config", "model.tie_embeddings"),
    "type-choice": row("train --set train.schedule=cosin", "bad_config", "train.schedule", "cosine"),
    # sizes
    "heads": row("train --set model.n_embd=65 --set model.n_head=4", "bad_config", "n_embd"),
    "key-heads": row(
        "train --set model.n_head=4 --set model.n_head_kv=3 --set model.n_embd=64", "bad_config", "n_head_kv"
    ),
    "micro-batch": row("train --set train.batch=8 --set train.micro_batch=3", "bad_config", "micro_batch"),
    "too-large": row(
        "train --set model.n_layer=1000 --set model.n_embd=65536 --set model.n_head=64", "oom", "parameters"
    ),
    # places
    "out-not-writable": row(f"train {TINY_FLAGS} --out locked/run", "bad_flag", "locked"),
    "out-holds-a-run": row(f"train {TINY_FLAGS} --out old-run", "bad_flag", "old-run"),
    "out-is-not-empty": row(f"train {TINY_FLAGS} --out full", "bad_flag", "full"),
    "out-is-a-file": row(f"train {TINY_FLAGS} --out short.txt", "bad_flag", "short.txt"),
    "out-under-a-file": row(f"train {TINY_FLAGS} --out short.txt/run", "bad_flag", "short.txt"),
    "new-not-empty": row("new full", "bad_flag", "full", "--force"),
    "resume-missing": row("train --resume llama-1", "missing_file", "llama-1"),
    "resume-from-another-recipe": row(
        "train lora --model good.gguf --resume old-run", "resume_mismatch", "from-scratch, not lora", "--recipe"
    ),
    "resume-from-another-architecture": row(
        "train --arch gpt2 --resume old-run", "resume_mismatch", "llama, not gpt2", "--arch"
    ),
    "resume-from-a-torn-checkpoint": row(
        "train --resume torn-run/checkpoints/step_50 --steps 60", "bad_file", "no whole checkpoint", "its run"
    ),
    "resume-without-a-checkpoint": row("train --resume lone-run --steps 60", "missing_file", "lone-run"),
    "resume-at-the-end": row("train --resume old-run", "bad_flag", "step 50", "--steps 100"),
    "root-not-found": row(f"train {TINY_FLAGS} --out run", "missing_file", "TOY_HOME", TOY_HOME="/nowhere"),
    "root-not-found-install": row("install", "missing_file", "TOY_HOME", TOY_HOME="/nowhere"),
    # gates and runs
    "gate-run-missing": row("gate check llama-1 gate.txt", "missing_file", "llama-1"),
    "gate-file-missing": row("gate check old-run gone.txt", "missing_file", "gone.txt"),
    "gate-not-lines": row("gate check old-run short.txt", "bad_file", "short.txt"),
}


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


def check_lines(result: Result, kind: str) -> tuple[str, str]:
    """The error and the hint of a command without --json."""
    lines = result.stderr.splitlines()
    assert result.code == KINDS[kind], result
    assert [line for line in lines if line.startswith("error: ")] == [lines[-2]], result.stderr
    assert [line for line in lines if line.startswith("hint: ")] == [lines[-1]], result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines[-1]) > len("hint: ")
    return lines[-2], lines[-1]


def check_document(result: Result, kind: str) -> dict[str, Any]:
    """The error of a command with --json."""
    assert result.code == KINDS[kind], result
    [line] = result.stdout.splitlines()
    document = json.loads(line)
    assert document["format"].startswith("toy/")
    assert document["error"]["kind"] == kind, document
    assert document["error"]["hint"]
    assert "\n" not in document["error"]["message"]
    assert "Traceback" not in result.stderr
    assert "error: " not in result.stderr
    return document["error"]  # type: ignore[no-any-return]


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


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_devices_of_other_machines(cold_toy: Toy, source: Path, device: str) -> None:
    """Said before any build: the source is fresh, and stays so."""
    if device == "metal" and sys.platform == "darwin":
        pytest.skip("metal is here")
    # where nvcc is, the reason is another (there are no cuda runners yet), and nothing else differs
    env = {"TOY_HOME": str(source), "CUDA_HOME": None, "CUDA_PATH": None}
    before = tree(source)
    told = cold_toy("train", *TINY, "--device", device, env=env)
    message, hint = check_lines(told, "not_available")
    assert device in message
    assert "cpu" in hint
    check_document(cold_toy("train", *TINY, "--device", device, "--json", env=env), "not_available")
    assert tree(source) == before
    assert not list(cold_toy.cwd.iterdir())


# --- building -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The runners' source without anything built; what a fetch once downloaded comes along."""
    from toy.runners import find_root

    root = find_root()
    copy = tmp_path / "source"
    for name in ("native", "vendor-patches"):
        shutil.copytree(root.source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root.source / "CMakeLists.txt", copy)
    for sdist in root.build.glob("*.tar.gz"):
        (copy / "build").mkdir(exist_ok=True)
        shutil.copy(sdist, copy / "build")
    return copy


def test_no_compiler(cold_toy: Toy, source: Path, tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "bin").mkdir()
    env = {"TOY_HOME": str(source), "PATH": str(tmp_path / "bin"), "CXX": None, "CC": None}
    before = tree(source, cold_toy.cwd, Path(home["HOME"]))
    message, hint = check_lines(cold_toy("train", *TINY, env=env), "build_failed")
    assert "compiler" in message
    assert "g++" in hint
    check_document(cold_toy("train", *TINY, "--json", env=env), "build_failed")
    wrong, _ = check_lines(cold_toy("train", *TINY, env=env | {"CXX": "no-such-compiler"}), "build_failed")
    assert "no-such-compiler" in wrong
    assert tree(source, cold_toy.cwd, Path(home["HOME"])) == before


def test_a_build_that_fails(cold_toy: Toy, source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'error: this compiler is out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    env = {"TOY_HOME": str(source), "CXX": str(compiler)}
    message, hint = check_lines(cold_toy("train", *TINY, env=env), "build_failed")
    assert "compiler" in message
    assert "build.log" in hint
    assert not (source / "libexec").exists()
    assert not list(cold_toy.cwd.iterdir())


@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
def test_ctrl_c_during_the_build(cold_toy: Toy, source: Path, group: bool) -> None:
    with cold_toy.start("train", *TINY, env={"TOY_HOME": str(source)}) as process:
        objects = source / "build" / "native" / "ggml"
        wait_for(lambda: next(objects.rglob("*.o"), None), 300, "the first object", process)
        family = process.children()
        process.interrupt(group)
        result = process.finish(30)
        left = [pid for pid in family if is_alive(pid)]
    check_lines(result, "interrupted")
    assert result.stdout == ""
    assert left == []
    assert not (source / "libexec").exists()
    assert not (source / "build" / "native" / "toy-stamp.json").exists()
    assert not list(cold_toy.cwd.iterdir())


def test_a_wrong_hash_leaves_nothing(cold_toy: Toy, source: Path) -> None:
    sdists = list((source / "build").glob("*.tar.gz")) if (source / "build").is_dir() else []
    if not sdists:
        pytest.skip("no downloaded ggml beside the build")
    patch = next((source / "vendor-patches").glob("0001*.patch"))
    patch.write_text(patch.read_text().replace("@@ -", "@@ -9", 1))
    told = cold_toy("install", env={"TOY_HOME": str(source)})
    message, _ = check_lines(told, "build_failed")
    assert "0001" in message
    assert not (source / "build" / "ggml-src").exists()
    assert not (source / "libexec").exists()


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bpe", "chars"])
@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
def test_ctrl_c_during_packing(toy: Toy, home: dict[str, str], tokenizer: str, group: bool) -> None:
    corpus = toy.cwd / "large.txt"
    line = EXCERPT.read_text()
    with corpus.open("w") as file:
        for n in range(1500):
            file.write(f"{n}\n{line}")
    before = tree(toy.cwd, Path(home["HOME"]) / ".cache" / "toy")
    flags = ("--corpus", corpus, "--set", f"data.tokenizer={tokenizer}", "--no-sample")
    with toy.start("train", "--preset", "tiny", *flags) as process:
        wait_for(lambda: "packing" in said(process.popen), 60, "packing", process)
        process.interrupt(group)
        result = process.finish(60)
    check_lines(result, "interrupted")
    after = tree(toy.cwd, Path(home["HOME"]) / ".cache" / "toy")
    assert {path: size for path, size in after.items() if before.get(path) != size} == {}


def said(popen: subprocess.Popen[str]) -> str:
    """The next line of stderr."""
    assert popen.stderr is not None
    return popen.stderr.readline()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
def test_ctrl_c_during_training(toy: Toy, group: bool, as_json: bool) -> None:
    flags = ["--json"] if as_json else []
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run", *flags) as process:
        losses = toy.cwd / "run" / "losses.txt"
        wait_for(lambda: losses.is_file() and "step 5:" in losses.read_text(), 120, "step 5", process)
        process.interrupt(group)
        result = process.finish()
    lines = losses.read_text().splitlines()
    if as_json:
        assert check_document(result, "interrupted")["message"]
        assert result.document["losses"] == [line.split("=")[1] for line in lines]
    else:
        message, hint = check_lines(result, "interrupted")
        assert f"step {len(lines)}" in message
        assert "--resume" in hint
        assert result.stdout.splitlines() == lines
    run = toy.cwd / "run"
    assert (run / "checkpoints" / "latest" / "DONE").is_file()
    assert (run / "checkpoints" / "latest").resolve().name == f"step_{len(lines)}"
    assert read_events(run)[-1]["reason"] == "interrupted"
    assert not list(run.rglob("*.tmp"))


def test_a_runner_that_dies_by_a_signal(toy: Toy) -> None:
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run") as process:
        process.read_step(5)
        os.kill(process.runner(), signal.SIGSEGV)
        result = process.finish()
    message, _ = check_lines(result, "runner_failed")
    assert "killed by SIGSEGV" in message
    end = read_events(toy.cwd / "run")[-1]
    assert (end["kind"], end["reason"], end["error"]["kind"]) == ("run_end", "killed", "runner_failed")
    assert end["step"] >= 5

    with toy.start("train", *TINY, "--steps", 1_000_000, "--json") as process:
        os.kill(process.runner(), signal.SIGKILL)
        result = process.finish()
    assert "killed by SIGKILL" in check_document(result, "runner_failed")["message"]
    states = [run["state"] for run in toy("runs", "--json").ok().document["runs"]]
    assert states == ["killed"]


def test_a_reader_that_goes_away(toy: Toy) -> None:
    """`toy train | head -2`: the run stops, and says why on stderr."""
    with toy.start("train", *TINY, "--steps", 1_000_000, "--out", "run") as process:
        process.read_step(2)
        runner = process.runner()
        assert process.popen.stdout is not None
        process.popen.stdout.close()
        code = process.popen.wait(60)
        assert process.popen.stderr is not None
        stderr = process.popen.stderr.read()
    assert code != 0
    assert "Traceback" not in stderr
    assert not is_alive(runner)


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk needs root and mount")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=False)


def test_a_disk_too_small_is_refused_first(toy: Toy, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        message, hint = check_lines(toy("train", *TINY, "--out", disk / "run"), "disk_full")
        check_document(toy("train", *TINY, "--out", disk / "run", "--json"), "disk_full")
        assert not list(disk.iterdir())
    assert str(tmp_path / "disk") in message or "disk" in message
    assert hint


def test_a_disk_that_fills_up(toy: Toy, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24m") as disk:
        flags = ("--steps", 100000, "--set", "checkpoint.every=10", "--set", "log.every=10", "--out", disk / "run")
        with toy.start("train", *TINY, *flags) as process:
            process.read_step(12)
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"\0" * 65536)
            result = process.finish()
        message, _ = check_lines(result, "disk_full")
        assert "disk" in message or "room" in message or "space" in message
        run = disk / "run"
        for saved in (run / "checkpoints").glob("step_*"):
            assert (saved / "DONE").is_file(), saved
        assert not list(run.rglob("*.tmp"))
        assert [line for line in result.steps if not line.startswith("step ")] == []


def file_limit(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_file_that_may_not_grow(toy: Toy) -> None:
    """A limit on file sizes is a full disk too, and the signal that comes with it (SIGXFSZ) kills no runner."""
    toy("train", *TINY, "--steps", 1, "--out", "before").ok()  # the packed tokens are there
    result = toy("train", *TINY, "--steps", 20, "--out", "run", preexec_fn=file_limit(400_000))
    message, _ = check_lines(result, "disk_full")
    assert "checkpoints" in message or "state.gguf" in message
    run = toy.cwd / "run"
    assert not list((run / "checkpoints").glob("step_*"))
    assert read_events(run)[-1]["error"]["kind"] == "disk_full"


def test_the_repository_stays_clean() -> None:
    """What these tests started wrote into their own directories."""
    assert not (ROOT / "runs").exists()
