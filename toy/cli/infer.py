"""`toy infer`: text out of a GGUF or a run, or the classes that a vit sees in images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toy.cli.common import CONTEXT, COUNT, THREADS, Finite, emit, json_option, say, tokenizer_or_none
from toy.errors import ToyError


@click.command()
@click.argument("model", metavar="MODEL|RUN")
@click.option("--adapter", metavar="FILE|RUN", help="A LoRA adapter over MODEL; a lora run brings its own.")
@click.option(
    "--image", "images", multiple=True, metavar="FILE", help="An image to class, with a vit; can be repeated."
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes shown for an image.")
@click.option("--prompt", help="Text to continue. Without one, standard input when piped, else a new document begins.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids to continue, in place of text.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message: apply the model's chat template.")
@click.option("--n", "n", type=COUNT, default=128, show_default=True, help="Tokens to generate.")
@click.option("--temperature", type=Finite(min=0), default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option(
    "--top-k", type=click.IntRange(0, 2**31 - 1), default=40, show_default=True, help="Likeliest tokens; 0: all."
)
@click.option("--top-p", type=Finite(0, 1, min_open=True), default=0.95, show_default=True, help="Their share; 1: all.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1337, show_default=True, help="Of the draws.")
@click.option("--threads", type=THREADS, default=0, help="0: the usable cores.")
@click.option("--context", type=CONTEXT, default=0, help="Tokens held at once; 0: the model's.")
@click.option("--logprobs", type=click.IntRange(0, 1000), default=0, help="With --json: the K likeliest at each token.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("-v", "--verbose", is_flag=True, help="Say tokens/s on stderr.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    adapter: str | None,
    images: tuple[str, ...],
    top: int,
    prompt: str | None,
    prompt_ids: str | None,
    chat: bool,
    n: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    threads: int,
    context: int,
    logprobs: int,
    device: str,
    verbose: bool,
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL: a GGUF, a run (`runs/latest`), or a name that `toy list` shows; or class images.

    The continuation goes to stdout as it comes; it ends at --n tokens, at a token that ends the text, or where the
    context is full. A lora run is its adapter over its base.
    """
    from toy.models import adapters
    from toy.models.generate import Sampling, describe_logprobs, generate, target
    from toy.models.tokenizer import Tokenizer

    _check_flags(prompt, prompt_ids, chat, logprobs, as_json)
    card, lora = adapters.choose(model, adapter)
    path = card.path
    target(card, device)  # what cannot run is said before the tokenizer is made
    _check_kind(ctx, card.architecture)
    if images:
        _classify(card, images, top, threads, device, as_json)
        return
    tokenizer = Tokenizer.from_card(card) if prompt_ids is None else tokenizer_or_none(card)
    text = None
    if prompt_ids is not None:
        ids = _ids(prompt_ids)
    else:
        text = prompt if prompt is not None else _standard_input()
        ids = _encode(tokenizer, text, chat, path)

    decoder = tokenizer.stream() if tokenizer is not None else None
    shown = False

    def show(i: int) -> None:
        nonlocal shown
        if not as_json:
            shown = True
            sys.stdout.write(decoder.push(i) if decoder is not None else f"{i} ")
            sys.stdout.flush()

    try:
        made = generate(
            card,
            ids,
            n,
            Sampling(temperature, top_k, top_p, seed),
            stop=tokenizer.stop_ids if tokenizer is not None else (),
            threads=threads,
            context=context,
            logprobs=logprobs,
            device=device,
            adapter=lora,
            on_token=show,
        )
    except ToyError:
        if shown:
            sys.stdout.write("\n")  # what stops it is said on a line of its own
        raise
    if as_json:
        answer: dict[str, Any] = {
            "model": str(path.absolute()),
            "adapter": str(lora.path.absolute()) if lora else None,
            "prompt": text,
            "prompt_ids": ids,
            "text": _text(tokenizer, made.ids),
            "ids": made.ids,
            "stop_reason": made.stop_reason,
            "logprobs": describe_logprobs(tokenizer, made) if logprobs else None,
            "timings": made.timings,
        }
        emit("toy/infer-v1", answer)
        return
    sys.stdout.write((decoder.finish() if decoder is not None else "") + "\n")
    sys.stdout.flush()
    if verbose or (sys.stderr.isatty() and sys.stdout.isatty()):
        say(_speed(made.timings, made.stop_reason))


def _check_flags(prompt: str | None, prompt_ids: str | None, chat: bool, logprobs: int, as_json: bool) -> None:
    if prompt is not None and prompt_ids is not None:
        raise ToyError("bad_flag", "--prompt and --prompt-ids cannot be given together", "leave one of them out")
    if chat and prompt_ids is not None:
        raise ToyError("bad_flag", "--chat needs text, not --prompt-ids", "give the message with --prompt")
    if logprobs and not as_json:
        raise ToyError("bad_flag", "--logprobs shows in the JSON document only", "add --json")


def _check_kind(ctx: click.Context, architecture: str) -> None:
    """Refuse flags of text with a vit, and of images with anything else."""
    from click.core import ParameterSource

    given = {
        option.opts[0]
        for option in ctx.command.params
        if option.name and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }
    if architecture != "vit":
        for flag in ("--image", "--top"):
            if flag in given:
                hint = "give --prompt" if flag == "--image" else "--top-k is for drawing tokens, --logprobs shows them"
                raise ToyError("bad_flag", f"{flag}, and the model is a {architecture}, which reads text", hint)
        return
    text = given - {"model", "--image", "--top", "--threads", "--device", "--verbose", "-v", "--json"}
    if text:
        raise ToyError("bad_flag", f"{min(text)}, and the model is a vit, which sees images", "give --image FILE")
    if "--image" not in given:
        raise ToyError("bad_flag", "the model is a vit, and there is no image", "give --image FILE")


def _classify(card: Any, images: tuple[str, ...], top: int, threads: int, device: str, as_json: bool) -> None:
    """The likeliest classes of each image, as a small table."""
    from toy.models import generate

    found = generate.classify(card, images, top, threads=threads, device=device)
    if as_json:
        rows = [
            {"image": image, "classes": [{"class": name, "probability": p} for name, p in classes]}
            for image, classes in zip(images, found, strict=True)
        ]
        emit("toy/infer-v1", {"model": str(card.path.absolute()), "adapter": None, "images": rows})
        return
    wide = max(len(name) for classes in found for name, _ in classes)
    for image, classes in zip(images, found, strict=True):
        if len(images) > 1:
            click.echo(f"{image}:")
        for name, p in classes:
            click.echo(f"{'  ' if len(images) > 1 else ''}{name:<{wide}}  {100 * p:6.2f} %")


def _ids(stated: str) -> list[int]:
    words = stated.replace(",", " ").split()
    try:
        ids = [int(word) for word in words]
    except ValueError as error:
        wrong = str(error).rsplit(":", 1)[-1].strip()
        raise ToyError("bad_flag", f"--prompt-ids has {wrong}, which is no id", "give ids like 1,2,3") from None
    if not ids:
        raise ToyError("bad_flag", "--prompt-ids is empty", "give ids like 1,2,3")
    return ids


def _standard_input() -> str:
    """What was piped in, less its last newline; nothing on a terminal."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return ""
    try:
        data = sys.stdin.buffer.read()
    except OSError:
        return ""
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8 text (byte {error.start})"
        raise ToyError("bad_flag", message, "pass ids with --prompt-ids instead") from None


def _encode(tokenizer: Any, text: str, chat: bool, path: Path) -> list[int]:
    from toy.models.generate import chat_ids, prompt_ids

    if not chat:
        return prompt_ids(tokenizer, text)
    if not text.strip():
        raise ToyError("bad_flag", "--chat needs a message", 'give one: --prompt "Hello"')
    return chat_ids(tokenizer, text, str(path))


def _text(tokenizer: Any, ids: list[int]) -> str | None:
    if tokenizer is None:
        return None
    decoder = tokenizer.stream()
    return "".join(decoder.push(i) for i in ids) + str(decoder.finish())


def _speed(timings: dict[str, float], reason: str) -> str:
    prefill = timings.get("prefill_tokens", 0) / (timings.get("prefill_s") or float("inf"))
    why = {"length": "as many as asked for", "stop": "the text ended", "context": "the context is full"}[reason]
    return (
        f"{timings.get('decode_tokens', 0):.0f} tokens ({why}), {timings.get('tokens_per_second', 0):.1f} tokens/s; "
        f"prompt {timings.get('prefill_tokens', 0):.0f} tokens, {prefill:.0f} tokens/s"
    )
