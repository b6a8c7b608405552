"""Ids after ids, and classes of images, from the native runner `toy-infer`."""

from __future__ import annotations

import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy.errors import ToyError
from toy.models import cards
from toy.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 1337


@dataclass
class Generation:
    """What came out. `logprobs` has, for each id, the likeliest (id, natural log of probability) pairs, best first."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    stop_reason: str = "length"  # length, stop (a token that ends the text) or context (the context is full)
    timings: dict[str, float] = field(default_factory=dict)


def target(card: cards.Card, device: str = "cpu") -> str:
    """The runner for a model, checked before anything is built. Raises ToyError (not_available, bad_flag, bad_file)."""
    from toy import recipes

    if not card.tensors:
        raise ToyError("bad_file", f"{card.path} has no weights, only metadata", "give the model's own .gguf")
    runner = recipes.INFER.get(card.architecture)
    if runner is None:
        known = ", ".join(recipes.INFER)
        raise ToyError(
            "not_available",
            f"{card.path} is of the architecture {card.architecture!r}, which toy does not run",
            f"toy infer runs: {known}",
        )
    return recipes.tool_on(runner, device)


def generate(
    card: cards.Card,
    prompt: Sequence[int],
    n: int,
    sampling: Sampling,
    *,
    stop: Iterable[int] = (),
    threads: int = 0,
    context: int = 0,
    logprobs: int = 0,
    device: str = "cpu",
    adapter: cards.Card | None = None,
    on_token: Callable[[int], None] = lambda i: None,
) -> Generation:
    """Up to `n` ids after `prompt`, each given to `on_token` as it comes.

    `stop` ends the text and is not part of it. `threads` 0: the usable cores. `context` 0: the model's. `adapter`: a
    LoRA over the model, which `adapters.check` has found to fit.
    Raises ToyError.
    """
    from toy import builds, recipes, runners

    runner = target(card, device)
    window = check_prompt(card, prompt, context)
    builds.ensure_built([runner])
    out = Generation()
    last_words: list[str] = []

    def line(text: str) -> None:
        words = text.split()
        if len(words) < 2 or words[0] != "token":
            raise ToyError("runner_failed", f"{runner} printed {text!r}", "this is a bug in toy")
        out.ids.append(int(words[1]))
        if logprobs:
            pairs = (word.split(":") for word in words[2:])
            out.logprobs.append([(int(i), float(value)) for i, value in pairs])
        on_token(out.ids[-1])

    with tempfile.TemporaryDirectory(prefix="toy-infer-") as folder:
        ids = Path(folder) / "prompt.bin"
        packed = array("i", prompt)
        if sys.byteorder == "big":
            packed.byteswap()
        ids.write_bytes(packed.tobytes())
        keys: dict[str, object] = {
            "GGUF": os.fspath(card.path.absolute()),
            "PROMPT_TOKENS": ids,
            "N_PREDICT": n,
            "TEMPERATURE": repr(float(sampling.temperature)),
            "TOP_K": sampling.top_k,
            "TOP_P": repr(float(sampling.top_p)),
            "SEED": sampling.seed,
            "STOP_TOKENS": ",".join(str(i) for i in sorted(set(stop))),
            "THREADS": threads,
            "CONTEXT": context,
            "LOGPROBS": logprobs,
            **({"ADAPTER": os.fspath(adapter.path.absolute())} if adapter else {}),
        }
        env = runners.environment(keys, recipes.RUNNERS[runner])
        result = runners.launch(runner, env, on_stdout=line, on_stderr=last_words.append)
    failed = result.error()
    if failed is not None:
        raise failed
    out.timings = _timings(last_words)
    if len(out.ids) < n:
        out.stop_reason = "context" if window and len(prompt) + len(out.ids) >= window else "stop"
    return out


def check_prompt(card: cards.Card, prompt: Sequence[int], context: int) -> int:
    """The context in tokens. Raises ToyError (bad_flag) for unknown ids, and when the prompt does not fit."""
    tokens = card.metadata.get("tokenizer.ggml.tokens")
    known = len(tokens) if isinstance(tokens, list) else card.metadata.get(f"{card.architecture}.vocab_size", 0)
    if known:
        for i in prompt:
            if not 0 <= i < known:
                hint = f"ids go from 0 to {known - 1}"
                raise ToyError("bad_flag", f"the prompt has the id {i}, and the model {known} tokens", hint)
    window = context or card.context
    if window and len(prompt) > window:
        hint = "shorten the prompt" + (f", or give --context up to {card.context}" if context < card.context else "")
        raise ToyError("bad_flag", f"the prompt is {len(prompt)} tokens long, and the context {window}", hint)
    return window


def _timings(lines: list[str]) -> dict[str, float]:
    """`timing load_s=… prefill_tokens=… …`, the runner's last words, and tokens/s from them."""
    stated = next((line for line in reversed(lines) if line.startswith("timing ")), "")
    found: dict[str, float] = {}
    for word in stated.split()[1:]:
        key, _, value = word.partition("=")
        found[key] = int(value) if value.isdigit() else float(value)
    if found.get("decode_s"):
        found["tokens_per_second"] = found.get("decode_tokens", 0) / found["decode_s"]
    return found


def classify(
    card: cards.Card, images: Sequence[str | Path], top: int, *, threads: int = 0, device: str = "cpu"
) -> list[list[tuple[str, float]]]:
    """For each image file the likeliest classes of a vit with their probabilities, best first. Raises ToyError."""
    from toy import builds, corpora, recipes, runners

    runner = target(card, device)
    seen = cards.vision(card)
    builds.ensure_built([runner])
    found: list[list[tuple[str, float]]] = []

    def line(text: str) -> None:
        words = text.split()
        if len(words) < 3 or words[0] != "image":
            raise ToyError("runner_failed", f"{runner} printed {text!r}", "this is a bug in toy")
        pairs = (word.split(":") for word in words[2:])
        found.append([(str(seen["classes"][int(i)]), float(value)) for i, value in pairs])

    with tempfile.TemporaryDirectory(prefix="toy-infer-") as folder:
        packed = corpora.pack_one(images, seen["image_size"], seen["n_channel"], Path(folder) / "images")
        keys: dict[str, object] = {
            "GGUF": os.fspath(card.path.absolute()),
            "IMG_DIR": packed,
            "TOP_K": min(top, len(seen["classes"])),
            "THREADS": threads,
        }
        failed = runners.launch(runner, runners.environment(keys, recipes.RUNNERS[runner]), on_stdout=line).error()
    if failed is not None:
        raise failed
    return found


def sample_text(
    gguf: str | Path,
    prompt: str = "",
    n: int = 200,
    seed: int = 1337,
    temperature: float = 0.8,
    threads: int = 0,
    adapter: str | Path | None = None,
    chat: bool = False,
) -> str:
    """A continuation of `prompt` by the model in `gguf`, with an adapter over it; without a prompt, the beginning of a
    new document. `chat`: the answer to it."""
    from toy.models import adapters

    card, lora = adapters.choose(os.fspath(gguf), os.fspath(adapter) if adapter else None)
    tokenizer = Tokenizer.from_card(card)
    sampling = Sampling(temperature=temperature, seed=seed)
    ids = chat_ids(tokenizer, prompt, str(gguf)) if chat else prompt_ids(tokenizer, prompt)
    made = generate(card, ids, n, sampling, stop=tokenizer.stop_ids, threads=threads, adapter=lora)
    decoder = tokenizer.stream()
    return "".join(decoder.push(i) for i in made.ids) + decoder.finish()


def chat_ids(tokenizer: Tokenizer, message: str, source: str) -> list[int]:
    """Ids up to where the assistant answers a user's message. Raises ToyError (bad_flag, bad_file)."""
    from toy.models.chat import render

    return prompt_ids(tokenizer, render(tokenizer, [{"role": "user", "content": message}], source))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt; of an empty one, the token that stands between documents. Raises ToyError (bad_flag)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ToyError("bad_flag", "the prompt is not UTF-8 text", "pass ids with --prompt-ids instead") from None
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if text or start is None:
            raise ToyError("bad_flag", "the prompt has no token that the model knows", "give another --prompt")
        ids = [start]
    return ids


def describe_logprobs(tokenizer: Tokenizer | None, made: Generation) -> list[list[dict[str, Any]]]:
    """The log-probabilities with the text of each candidate."""
    return [
        [
            {"id": i, "text": tokenizer.decode([i], special=True) if tokenizer else None, "logprob": value}
            for i, value in candidates
        ]
        for candidates in made.logprobs
    ]
