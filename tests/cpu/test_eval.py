"""`toy eval` and what is new in `toy infer`: the scorer against the decoder, runs against what their training said."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from harness import EXCERPT, ROOT, TINY, Toy, read_events, sets, write_jsonl
from refusals import check_lines

from toy._native import gguf_read

Array = np.ndarray[Any, Any]
DIGITS = ROOT / "data" / "digits"
#: Sums of a few dozen float32 log-probabilities, computed in windows and token by token.
CLOSE = 1e-4


@pytest.fixture(scope="session")
def gpt2(home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("eval-gpt2")
    return Trained(Toy(folder, home), folder, *TINY, "--arch", "gpt2", "--steps", 40)


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers can be learned in seconds."""
    rows = [{"prompt": f"{n} is", "completion": " even." if n % 2 == 0 else " odd, not even."} for n in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("eval-answers") / "answers.jsonl", *rows)


@pytest.fixture(scope="session")
def lora(trained: Trained, answers: Path, home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("eval-lora")
    flags = ("lora", "--model", trained.gguf, "--corpus", answers, "--steps", 60, "--rank", 4, "--no-sample")
    return Trained(Toy(folder, home), folder, *flags, *sets(train__learning_rate=0.01, train__batch=8))


@pytest.fixture(scope="session")
def vit(home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("eval-vit")
    small = sets(
        model__n_layer=2, model__n_embd=32, model__n_head=2, model__n_ff=64, model__patch_size=7, train__batch=32,
        train__learning_rate=0.005, eval__batches=0,
    )  # fmt: skip
    return Trained(Toy(folder, home), folder, "vit-tiny", "--images", DIGITS, "--steps", 500, *small)


def evaluate(toy: Toy, *words: object) -> dict[str, Any]:
    document = toy("eval", *words, "--json").ok().document
    assert document["format"] == "toy/eval-v1"
    return document


def write_tokens(path: Path, ids: Sequence[int]) -> Path:
    np.array(ids, "<i4").tofile(path)
    return path


def logprobs(gguf: Path, ids: Sequence[int], adapter: Path | None = None) -> list[Array]:
    """Log-probabilities of what comes after each prefix, from the decoder and its cache."""
    from toy import _native

    decoder = _native.Decoder(str(gguf), adapter=str(adapter or ""))
    found = []
    for i in ids:
        logits = np.asarray(decoder.eval([i]), "f8")
        found.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return found


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_on_what_it_held_out(toy: Toy) -> None:
    toy("train", *TINY, "--steps", 20, *sets(eval__batches=64), "--out", "run").ok()
    found = evaluate(toy, "run")
    end = read_events(toy.cwd / "run")[-1]
    assert found["mode"] == "corpus"
    assert found["loss"] == pytest.approx(end["val_loss"], abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == 1999
    assert found["context"] == 64
    assert found["windows"] == 32
    # bytes: a token is one, but for the end of text
    assert found["bytes"] == 1998
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 1999 / 1998 / math.log(2))
    assert 0 < found["loss_stderr"] < 0.2
    text = toy("eval", "run").ok().stdout
    assert "perplexity" in text
    assert "±" in text


@pytest.mark.parametrize("arch", ["trained", "gpt2"])
@pytest.mark.parametrize(("context", "stride"), [(32, 0), (32, 8), (16, 16), (64, 1)])
def test_windows_are_scored_as_the_decoder_would(
    toy: Toy, arch: str, context: int, stride: int, request: pytest.FixtureRequest
) -> None:
    gguf = request.getfixturevalue(arch).gguf
    ids = list(EXCERPT.read_bytes()[500:575])
    corpus = write_tokens(toy.cwd / "ids.bin", ids)
    found = evaluate(toy, gguf, "--corpus", corpus, "--context", context, "--stride", stride)
    step, total, end = stride or context, 0.0, 0
    while end < len(ids) - 1:
        first = end  # scored: the labels after this one
        end = min(first + (step if first else context), len(ids) - 1)
        start = max(0, end - context) if stride and stride < context else first
        after = logprobs(gguf, ids[start:end])
        total -= sum(after[at - start][ids[at + 1]] for at in range(first, end))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] * found["tokens"] == pytest.approx(total, abs=CLOSE * len(ids))


def test_more_context_helps(toy: Toy, spoken: Trained) -> None:
    (toy.cwd / "text.txt").write_text(EXCERPT.read_text()[:4000])
    losses = [
        evaluate(toy, spoken.gguf, "--corpus", "text.txt", "--context", context, "--stride", stride)
        for context, stride in ((4, 0), (64, 0), (64, 8))
    ]
    if gguf_read(str(spoken.gguf))["metadata"]["general.architecture"] == "llama":
        # a gpt2 of so few steps has learned little of its positions
        assert losses[0]["loss"] > losses[1]["loss"] > losses[2]["loss"]
    assert len({found["tokens"] for found in losses}) == 1
    assert all(3990 <= found["bytes"] < 4000 for found in losses), "all but the first token, which nothing is before"


def test_threads_change_nothing(toy: Toy, spoken: Trained) -> None:
    (toy.cwd / "text.txt").write_text(EXCERPT.read_text()[:3000])
    keys = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "tokens")
    found = [evaluate(toy, spoken.gguf, "--corpus", "text.txt", "--threads", n) for n in (1, 2, 3)]
    assert len({tuple(one[key] for key in keys) for one in found}) == 1


def test_what_comes_next(toy: Toy, spoken: Trained) -> None:
    found = evaluate(toy, spoken.gguf, "--prompt", "What is", "--top", 7)
    [after] = (
        toy("infer", spoken.gguf, "--prompt", "What is", "--n", 1, "--temperature", 0, "--logprobs", 7, "--json")
        .ok()
        .document["logprobs"]
    )
    assert [row["id"] for row in found["top"]] == [row["id"] for row in after]
    assert [row["text"] for row in found["top"]] == [row["text"] for row in after]
    for row, other in zip(found["top"], after, strict=True):
        assert row["logprob"] == pytest.approx(other["logprob"], abs=CLOSE)


# --- examples and choices -------------------------------------------------------------------------------------------


def test_only_what_is_learned_is_scored(toy: Toy, trained: Trained, answers: Path) -> None:
    found = evaluate(toy, trained.gguf, "--corpus", answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    total, n = 0.0, 0
    for row in rows:
        prompt, answer = list(row["prompt"].encode()), [*row["completion"].encode(), 256]
        after = logprobs(trained.gguf, prompt + answer[:-1])[len(prompt) - 1 :]
        total -= sum(values[i] for values, i in zip(after, answer, strict=True))
        n += len(answer)
    assert (found["mode"], found["examples"], found["cut"]) == ("examples", 60, 0)
    assert found["tokens"] == n
    assert found["bytes"] == n - 60, "the token that ends an answer is no byte of it"
    assert found["loss"] == pytest.approx(total / n, abs=CLOSE)


def test_an_example_that_is_too_long_loses_its_end(toy: Toy, trained: Trained) -> None:
    """As in training."""
    row = {"prompt": "x" * 15, "completion": "yes"}
    write_jsonl(toy.cwd / "long.jsonl", {**row, "completion": "yes" * 10}, row, {**row, "prompt": "x" * 30})
    found = evaluate(toy, trained.gguf, "--corpus", "long.jsonl", "--context", 17)
    assert (found["cut"], found["tokens"], found["bytes"]) == (3, 6, 6)
    after = logprobs(trained.gguf, list(b"x" * 15 + b"ye"))
    total = -sum(after[14 + n][i] for n, i in enumerate(b"yes"))
    assert found["loss"] * 6 == pytest.approx(2 * total, abs=10 * CLOSE)

    message, hint = check_lines(toy("eval", trained.gguf, "--corpus", "long.jsonl", "--context", 14), "bad_file")
    assert "context of 14" in message
    assert "--context" in hint


def test_a_question_that_is_too_long_loses_its_beginning(toy: Toy, trained: Trained) -> None:
    write_jsonl(toy.cwd / "q.jsonl", {"question": "x" * 100, "choices": ["yes", "no"], "answer": 0})
    found = evaluate(toy, trained.gguf, "--choices", "q.jsonl", "--context", 18)
    assert found["cut"] == 2
    for choice, score in zip((b" yes", b" no"), found["answers"][0]["log_likelihoods"], strict=True):
        tokens = list(b"x" * (19 - len(choice)) + choice)
        after = logprobs(trained.gguf, tokens[:-1])
        assert score == pytest.approx(sum(after[n - 1][tokens[n]] for n in range(19 - len(choice), 19)), abs=10 * CLOSE)


def test_choices_are_ranked_by_likelihood(toy: Toy, trained: Trained) -> None:
    rows = [
        {"question": "First", "choices": [" Citizen", "\x01\x02", " the"], "answer": 0},
        {"prompt": "We are", "choices": ["zz", "accounted poor citizens"], "answer": 1},
    ]
    write_jsonl(toy.cwd / "q.jsonl", *rows)
    found = evaluate(toy, trained.gguf, "--choices", "q.jsonl")
    for row, answer in zip(rows, found["answers"], strict=True):
        prompt = str(row.get("question", row.get("prompt"))).encode()
        scores, per_byte = [], []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            text = (choice if choice[0].isspace() else " " + choice).encode()
            after = logprobs(trained.gguf, [*prompt, *text])
            scores.append(sum(after[len(prompt) - 1 + n][i] for n, i in enumerate(text)))
            per_byte.append(scores[-1] / len(text))
        assert answer["log_likelihoods"] == pytest.approx(scores, abs=10 * CLOSE)
        assert answer["choice"] == int(np.argmax(scores))
        assert answer["choice_normalised"] == int(np.argmax(per_byte))
    hits = [answer["choice"] == answer["answer"] for answer in found["answers"]]
    assert found["accuracy"] == sum(hits) / 2
    assert found["questions"] == 2
    assert "accuracy" in toy("eval", trained.gguf, "--choices", "q.jsonl").ok().stdout


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_lora_run_is_its_adapter_over_its_base(toy: Toy, trained: Trained, lora: Trained, answers: Path) -> None:
    adapter = lora.run / "weights" / "adapter.gguf"
    base, both = evaluate(toy, trained.gguf, "--corpus", answers), evaluate(toy, lora.run, "--corpus", answers)
    assert both["loss"] < base["loss"] - 0.5
    assert Path(both["model"]) == trained.gguf
    assert Path(both["adapter"]) == adapter
    for words in ((trained.gguf, "--adapter", adapter), (trained.run, "--adapter", lora.run), (adapter,)):
        assert evaluate(toy, *words, "--corpus", answers)["loss"] == both["loss"]
    held_out = evaluate(toy, lora.run)
    assert held_out["loss"] == pytest.approx(read_events(lora.run)[-1]["val_loss"], abs=1e-5)
    after = logprobs(trained.gguf, b"8 is", adapter)[-1]
    top = evaluate(toy, lora.run, "--prompt", "8 is", "--top", 1)["top"][0]
    assert top["logprob"] == pytest.approx(after.max(), abs=CLOSE)


def test_infer_runs_the_adapter(toy: Toy, trained: Trained, lora: Trained) -> None:
    flags = ("--prompt", "8 is", "--n", 10, "--temperature", 0, "--logprobs", 2, "--json")
    plain = toy("infer", trained.gguf, *flags).ok().document
    adapted = toy("infer", lora.run, *flags).ok().document
    named = toy("infer", trained.run, "--adapter", lora.run, *flags).ok().document
    assert plain["adapter"] is None
    assert adapted["adapter"] == named["adapter"]
    assert adapted["logprobs"] == named["logprobs"] != plain["logprobs"]


def test_an_adapter_for_another_base_is_refused(toy: Toy, trained: Trained, lora: Trained, gpt2: Trained) -> None:
    adapter = toy.cwd / "adapter.gguf"
    shutil.copy(lora.run / "weights" / "adapter.gguf", adapter)
    toy("train", *TINY, "--steps", 2, "--seed", 7, "--out", "same-shape").ok()
    toy("train", *TINY, "--steps", 2, *sets(model__n_embd=32), "--out", "narrow").ok()
    for base, words in (
        ("narrow", "does not fit"),
        ("same-shape", "was trained on another base"),
        (gpt2.run, "adapts a llama model"),
    ):
        for verb in ("infer", "eval"):
            result = toy(verb, base, "--adapter", adapter, "--prompt", "x")
            assert result.code == 2, (verb, base)
            assert words in result.stderr.splitlines()[0]
            assert len(result.stderr.splitlines()) == 2
    lost = toy("infer", adapter, "--prompt", "x")
    assert (lost.code, "in no run" in lost.stderr) == (2, True)


def test_a_base_that_is_gone_is_named(toy: Toy, trained: Trained, lora: Trained) -> None:
    run = toy.cwd / "moved"
    shutil.copytree(lora.run, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    config["lora"]["base"] = "/nowhere/base.gguf"
    (run / "config.json").write_text(json.dumps(config))
    result = toy("eval", "moved", "--prompt", "x")
    assert result.code == 2
    assert "/nowhere/base.gguf" in result.stderr
    toy("eval", trained.run, "--adapter", "moved", "--prompt", "x").ok()


# --- images ---------------------------------------------------------------------------------------------------------


def digits() -> tuple[Array, Array]:
    images = gzip.decompress(next(DIGITS.glob("*images*")).read_bytes())
    labels = gzip.decompress(next(DIGITS.glob("*labels*")).read_bytes())
    return np.frombuffer(images, "u1", offset=16).reshape(-1, 28, 28), np.frombuffer(labels, "u1", offset=8)


def test_accuracy_is_what_training_saw(toy: Toy, vit: Trained) -> None:
    found = evaluate(toy, vit.run)
    end = read_events(vit.run, "eval")[-1]
    assert found["mode"] == "images"
    assert found["accuracy"] == pytest.approx(end["accuracy"])
    assert found["loss"] == pytest.approx(end["val_loss"], abs=1e-5)
    assert found["images"] == 160
    assert [row["class"] for row in found["classes"]] == [str(n) for n in range(10)]
    for n, row in enumerate(found["classes"]):
        assert sum(found["confusion"][n]) == row["images"]
        assert row["accuracy"] == pytest.approx(found["confusion"][n][n] / row["images"])
    assert sum(row["images"] for row in found["classes"]) == 160
    whole = evaluate(toy, vit.gguf, "--images", DIGITS)
    assert whole["images"] == 1600
    assert whole["accuracy"] > 0.5
    text = toy("eval", vit.run).ok().stdout
    assert "accuracy" in text
    assert "taken for" in text


def test_infer_classes_images(toy: Toy, vit: Trained) -> None:
    from PIL import Image

    images, labels = digits()
    files = []
    for n in range(20):
        Image.fromarray(images[n]).save(toy.cwd / f"{n}.png")
        files += ["--image", f"{n}.png"]
    document = toy("infer", vit.run, *files, "--top", 3, "--json").ok().document
    assert document["format"] == "toy/infer-v1"
    assert [row["image"] for row in document["images"]] == [f"{n}.png" for n in range(20)]
    for row in document["images"]:
        values = [one["probability"] for one in row["classes"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert 0 < sum(values) <= 1 + 1e-6
    hits = sum(
        row["classes"][0]["class"] == str(label) for row, label in zip(document["images"], labels[:20], strict=True)
    )
    assert hits >= 10
    # the same twenty as a set with labels: the same answers
    for n in range(20):
        folder = toy.cwd / "set" / str(labels[n])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy.cwd / f"{n}.png", folder)
    for label in set(range(10)) - set(labels[:20].tolist()):  # every class has an image
        Image.fromarray(images[labels.tolist().index(label)]).save((toy.cwd / "set" / f"{label}").with_suffix(".png"))
        (toy.cwd / "set" / str(label)).mkdir()
        shutil.move(toy.cwd / "set" / f"{label}.png", toy.cwd / "set" / str(label))
    found = evaluate(toy, vit.run, "--images", "set")
    extra = found["images"] - 20
    assert abs(found["accuracy"] * found["images"] - hits) <= extra
    plain = toy("infer", vit.run, "--image", "0.png", "--top", 2).ok().stdout
    assert len(plain.splitlines()) == 2
    assert "%" in plain


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input(toy: Toy, trained: Trained, gpt2: Trained, vit: Trained, answers: Path) -> None:
    (toy.cwd / "empty.jsonl").write_text("")
    (toy.cwd / "bad.png").write_bytes(b"no picture")
    (toy.cwd / "beyond.bin").write_bytes(np.array([1, 2, 999], "<i4").tobytes())
    (toy.cwd / "one.bin").write_bytes(np.array([1], "<i4").tobytes())
    llama, picture = trained.gguf, vit.gguf
    cases: list[tuple[list[object], str]] = [
        (["eval", llama], "--corpus"),
        (["eval", "nothing", "--prompt", "x"], "toy list"),
        (["eval", llama, "--corpus", "none.txt"], "check the path"),
        (["eval", llama, "--corpus", "x", "--prompt", "y"], "one thing at a time"),
        (["eval", llama, "--corpus", EXCERPT, "--context", 16, "--stride", 17], "half the context"),
        (["eval", llama, "--prompt", "x", "--stride", 2], "leave it out"),
        (["eval", llama, "--corpus", answers, "--stride", 2], "leave it out"),
        (["eval", llama, "--images", DIGITS], "--corpus"),
        (["eval", llama, "--choices", "empty.jsonl"], "choices"),
        (["eval", llama, "--corpus", "beyond.bin"], "tokenizer"),
        (["eval", llama, "--corpus", "one.bin"], "second token"),
        (["eval", llama, "--prompt", "x" * 65], "shorten"),
        (["eval", gpt2.gguf, "--corpus", EXCERPT, "--context", 65], "at most --context 64"),
        (["eval", picture, "--corpus", EXCERPT], "--images"),
        (["eval", picture, "--prompt", "x"], "--images"),
        (["eval", picture, "--images", "none"], ""),
        (["eval", llama, "--adapter", llama, "--prompt", "x"], "adapter.gguf"),
        (["infer", llama, "--image", "bad.png"], "--prompt"),
        (["infer", picture, "--prompt", "x"], "--image"),
        (["infer", picture], "--image"),
        (["infer", picture, "--image", "bad.png", "--temperature", 1], "--image"),
        (["infer", picture, "--image", "bad.png"], ""),
        (["infer", picture, "--image", "none.png"], ""),
        (["infer", llama, "--top", 3, "--prompt", "x"], "--top-k"),
    ]
    for words, hint in cases:
        result = toy(*words)
        assert result.code == 2, (words, result.stderr)
        lines = result.stderr.splitlines()
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], (words, result.stderr)
        assert hint in lines[1], (words, result.stderr)
        document = toy(*words, "--json").document
        assert document["format"] == ("toy/eval-v1" if words[0] == "eval" else "toy/infer-v1")
