"""A conversation as the text its model was trained on, by the template (Jinja) inside its GGUF."""

from __future__ import annotations

import json
import time
from typing import Any

from toy.errors import ToyError
from toy.models.tokenizer import Tokenizer


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], source: str) -> str:
    """`messages` (role, content) up to where the assistant answers. `source` names the model in errors.

    Templates come with the model, so they run in Jinja's sandbox. Raises ToyError (bad_flag, bad_file).
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it is a no-op."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    vocabulary = tokenizer.vocabulary
    if vocabulary.chat_template is None:
        raise ToyError("bad_flag", f"{source} has no chat template", "leave --chat out: it is not a chat model")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    special = {
        f"{name}_token": vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else ""
        for name in ("bos", "eos", "pad", "unk")
    }
    try:
        text = environment.from_string(vocabulary.chat_template).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **special
        )
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ToyError("bad_file", f"the chat template of {source} fails: {reason}", "leave --chat out") from error
    if vocabulary.add_bos and special["bos_token"]:
        text = text.removeprefix(special["bos_token"])  # encoding adds it
    return text
