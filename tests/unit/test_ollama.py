"""Modelfiles: chat templates of known families in Ollama's language."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import CHATML

from toy.models import ollama
from toy.models.chat import ChatTemplate
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import Vocabulary

TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>",
    ),
    "gemma": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        '<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_known_families(vocabulary: Vocabulary, name: str) -> None:
    template, turn = TEMPLATES[name]
    asks = dataclasses.replace(vocabulary, chat_template=template, add_bos=name == "llama3")
    text = ollama.modelfile(asks.to_metadata(), "a model", adapter=False)
    assert f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert "SYSTEM" not in text
    assert "FROM ./model.gguf\n" in text


def test_a_template_with_a_system_message_of_its_own(vocabulary: Vocabulary) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
    )
    asks = dataclasses.replace(vocabulary, chat_template=template)
    assert 'SYSTEM """Be kind."""' in ollama.modelfile(asks.to_metadata(), "a model", adapter=True)
    found = ollama.find_family(ChatTemplate(Tokenizer(asks), "a model"))
    assert found == (ollama.FAMILIES[0], "Be kind.")


def test_templates_of_no_family(vocabulary: Vocabulary) -> None:
    odd = dataclasses.replace(vocabulary, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "TEMPLATE" not in ollama.modelfile(odd.to_metadata(), "a model", adapter=False)
    broken = dataclasses.replace(vocabulary, chat_template="{% for")
    assert "TEMPLATE" not in ollama.modelfile(broken.to_metadata(), "a model", adapter=False)
    none = dataclasses.replace(vocabulary, chat_template=None)
    assert 'TEMPLATE """{{ .Prompt }}"""' in ollama.modelfile(none.to_metadata(), "a model", adapter=False)
