"""A model as a folder for `ollama create`: the GGUF, and a Modelfile that says how to talk to it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.errors import ToyError, os_errors, shown
from toy.models import convert
from toy.models.chat import ChatTemplate, Message, TemplateError
from toy.models.convert import Progress, Source
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import from_metadata


@dataclass(frozen=True)
class Family:
    """Chat templates that write each message between a head, which names the role, and a tail."""

    head: str
    tail: str
    assistant: str = "assistant"

    def text(self, messages: list[Message]) -> str:
        """The conversation, up to where the assistant answers."""
        roles = {"assistant": self.assistant}
        turns = [self.head.format(role=roles.get(m["role"], m["role"])) + m["content"] + self.tail for m in messages]
        return "".join(turns) + self.head.format(role=self.assistant)

    @property
    def go(self) -> str:
        """The same in the language of Ollama's templates."""
        role = "{{ .Role }}"
        if self.assistant != "assistant":
            role = f'{{{{ if eq .Role "assistant" }}}}{self.assistant}{{{{ else }}}}{role}{{{{ end }}}}'
        turn = self.head.format(role=role) + "{{ .Content }}" + self.tail
        return "{{- range .Messages }}" + turn + "{{ end }}" + self.head.format(role=self.assistant)


FAMILIES = (
    Family("<|im_start|>{role}\n", "<|im_end|>\n"),  # ChatML
    Family("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
    Family("<|{role}|>\n", "<|end|>\n"),  # Phi 3
    Family("<|{role}|>\n", "</s>\n"),  # Zephyr
    Family("<start_of_turn>{role}\n", "<end_of_turn>\n", "model"),  # Gemma
)

_TALK: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def find_family(template: ChatTemplate) -> tuple[Family, str] | None:
    """The family that writes conversations as `template` does, and the system message that it puts in front of those
    that have none ("": it does not). None: no family does."""
    try:
        plain = template.render(_TALK)
    except TemplateError:
        return None
    for family in FAMILIES:
        before, after = family.text([{"role": "system", "content": "\0"}, *_TALK]).split("\0")
        if plain == family.text(_TALK):
            default = ""
        elif plain.startswith(before) and plain.endswith(after):
            default = plain[len(before) : -len(after)]
        else:
            continue
        talk: list[Message] = [{"role": "system", "content": "four"}, *_TALK]
        try:
            if default and template.render(talk) != family.text(talk):
                continue
        except TemplateError:
            continue
        return family, default
    return None


def modelfile(metadata: dict[str, Any], source: str, *, adapter: bool) -> str:
    """The Modelfile of `model.gguf` (and `adapter.gguf`), both beside it."""
    lines = [f"# made by toy from {source}", "FROM ./model.gguf"]
    if adapter:
        lines.append("ADAPTER ./adapter.gguf")
    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        return "\n".join(lines) + "\n"
    vocabulary = from_metadata(metadata, source)
    stops = [vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special]
    if vocabulary.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        found = None
        with contextlib.suppress(TemplateError):
            found = find_family(ChatTemplate(Tokenizer(vocabulary, "gguf"), source))
        if found is None:
            lines.append("# its chat template is of no family that toy knows; Ollama looks for one by itself")
        else:
            family, system = found
            lines.append(f'TEMPLATE """{family.go}"""')
            if system:
                lines.append(f'SYSTEM """{system}"""')
            stops += [i for i in vocabulary.end_ids if vocabulary.tokens[i] == family.tail.strip()]
    lines += [
        f'PARAMETER stop "{vocabulary.tokens[i]}"' for i in dict.fromkeys(stops) if '"' not in vocabulary.tokens[i]
    ]
    return "\n".join(lines) + "\n"


def export(source: Source, out: Path, type: str = "", force: bool = False, progress: Progress | None = None) -> None:
    """Write the folder `out`. A lora run keeps its adapter apart from the base, unless `type` is given: then they are
    merged. Raises ToyError (not_available) for what Ollama does not run."""
    card = source.card
    if card.architecture == "vit":
        message = f"{shown(card.path)} classes images, which Ollama does not"
        raise ToyError("not_available", message, "toy infer runs it, --to hf is for transformers")
    apart = source.adapter is not None and not type
    text = modelfile(card.metadata, card.name or card.path.name, adapter=apart)
    convert.check_target(out, force, card.path)
    with convert.new_folder(out, force) as folder:
        if source.adapter is not None and not apart:
            convert.merge(card.path, source.adapter, folder / "model.gguf", type, other_base=True, progress=progress)
        else:
            convert.convert(card.path, folder / "model.gguf", type, progress)
        if apart and source.adapter is not None:
            size = source.adapter.stat().st_size
            with os_errors("copy the adapter"):
                convert.check_space(folder, size)
                (folder / "adapter.gguf").write_bytes(source.adapter.read_bytes())
        with os_errors("write the folder"), (folder / "Modelfile").open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
