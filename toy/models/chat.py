"""A conversation as the text its model was trained on, by the template (Jinja) inside its GGUF."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from typing import Any

from toy.errors import ToyError, one_line
from toy.models.tokenizer import Tokenizer

Message = dict[str, Any]
#: Text, and whether it is the assistant's: what a model learns to say.
Segment = tuple[str, bool]

#: A day for templates that write today's date: the same data make the same bytes tomorrow.
_SOME_DAY = time.strptime("2024-07-26", "%Y-%m-%d")


def render(tokenizer: Tokenizer, messages: list[Message], source: str) -> str:
    """`messages` (role, content) up to where the assistant answers. `source` names the model in errors.

    Raises ToyError (bad_flag, bad_file).
    """
    if tokenizer.vocabulary.chat_template is None:
        raise ToyError("bad_flag", f"{source} has no chat template", "leave --chat out: it is not a chat model")
    try:
        return ChatTemplate(tokenizer, source).render(messages)
    except TemplateError as error:
        raise ToyError("bad_file", str(error), "leave --chat out") from error


class TemplateError(Exception):
    """A template that cannot be read, or refuses a conversation: one line that says why."""


class ChatTemplate:
    """The template of a tokenizer that has one. It came with the model, so it runs in Jinja's sandbox.

    `today`: templates that write the date get the day it is; else always the same one.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, today: bool = True):
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        mark = secrets.token_hex(16)

        class Generation(Extension):
            """`{% generation %}` encloses the assistant's words: they come out between marks."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                call = nodes.CallBlock(self.call_method("_marked"), [], [], body)
                return call.set_lineno(line)

            def _marked(self, caller: Any) -> str:
                return f"{mark}<{caller()}{mark}>"

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def strftime_now(format: str) -> str:
            return time.strftime(format) if today else time.strftime(format, _SOME_DAY)

        vocabulary = tokenizer.vocabulary
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        self._source = source
        self._marks = re.compile(f"{mark}([<>])")
        self._special = {
            f"{name}_token": vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else ""
            for name in ("bos", "eos", "pad", "unk")
        }
        self._bos = self._special["bos_token"] if vocabulary.add_bos else ""  # encoding adds it
        try:
            self._template = environment.from_string(vocabulary.chat_template or "")
        except Exception as error:  # a template can raise anything
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TemplateError:
        reason = one_line(error)[:200] or type(error).__name__
        return TemplateError(f"the chat template of {self._source} fails: {reason}")

    def _marked(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except Exception as error:  # a template can raise anything
            raise self._failed(error) from error
        return text.removeprefix(self._bos)

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation's text, without the begin token that encoding adds. Raises TemplateError."""
        return self._marks.sub("", self._marked(messages, add_generation_prompt))

    def segments(self, messages: list[Message]) -> list[Segment]:
        """The whole conversation in pieces, cut where the assistant's turns begin and end.

        They are where the template says so ({% generation %}); else what rendering one more message adds to the text
        up to where the assistant answers, which is what the model sees when it is asked. Where that does not
        hold (templates that drop earlier thoughts, say), what changes in the text when the answer does.
        """
        marked = self._marked(messages, add_generation_prompt=False)
        parts = self._marks.split(marked)
        if len(parts) > 1:
            pieces, depth = [(parts[0], False)], 0
            for sign, text in zip(parts[1::2], parts[2::2], strict=True):
                depth += 1 if sign == "<" else -1
                pieces.append((text, depth > 0))
            return [piece for piece in pieces if piece[0]]
        text, at = marked, 0
        segments: list[Segment] = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._span(messages, turn, text)
                if start >= at and end > start:
                    segments += [(text[at:start], False), (text[start:end], True)]
                    at = end
        segments.append((text[at:], False))
        return [segment for segment in segments if segment[0]]

    def _span(self, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
        """Where in `text` the answer `messages[turn]` is: by prefixes as far as they hold, by change for the rest."""
        before = after = None
        with contextlib.suppress(TemplateError):
            before = self.render(messages[:turn], add_generation_prompt=True)
            after = self.render(messages[: turn + 1], add_generation_prompt=False)
        asked = before is not None and text.startswith(before)
        if before is not None and after is not None and asked and text.startswith(after) and len(after) > len(before):
            return len(before), len(after)
        start, end = self._changing(messages, turn, text)
        return (len(before) if before is not None and asked and len(before) < start else start), end

    def _changing(self, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
        content = messages[turn]["content"]
        edges = {word[at] for word in (content, content.strip()) if word for at in (0, -1)}
        other = next(letter for letter in "ABCDE" if letter not in edges) * 3
        try:
            changed = self.render([*messages[:turn], messages[turn] | {"content": other}, *messages[turn + 1 :]], False)
        except TemplateError:
            return 0, 0
        start = _alike(text, changed)
        if start == len(text) == len(changed):
            return 0, 0
        return start, len(text) - _alike(text[start:][::-1], changed[start:][::-1])


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
