"""Conversations as examples: how templates are followed, what is learned of each turn, templates that refuse."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from example_sets import ASK, BOT, CHATML, SYSTEM, USER, Talk, arrays, marked, model, talk
from harness import refused, write_jsonl

from toy import corpora
from toy.models import chat, generate
from toy.models.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        pytest.param(
            CHATML, ASK,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n[Hello.<|im_end|>]\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[ So long\n<|im_end|>]\n",
            id="chatml with a default system prompt",
        ),
        pytest.param(
            CHATML, [(SYSTEM, "Rhyme."), (USER, "Hi"), (BOT, "My"), (USER, "trailing")],
            "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[My<|im_end|>]\n"
            "<|im_start|>user\ntrailing<|im_end|>\n",
            id="system prompt, and a last question",
        ),
        pytest.param(
            CHATML, [(BOT, "I begin"), (USER, "Hm"), (BOT, "I begin")],
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n[I begin<|im_end|>]\n"
            "<|im_start|>user\nHm<|im_end|>\n<|im_start|>assistant\n[I begin<|im_end|>]\n",
            id="the assistant begins",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}"
            "<|im_end|>{% else %}U: {{ m.content }} {% endif %}{% endfor %}", ASK,
            "U: Hi A: [Hello.<|im_end|>]U: Bye A: [ So long\n<|im_end|>]",
            id="generation tags, the end of turn outside them",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }}\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}", ASK,
            "u:Hi\na:[Hello.\n]u:Bye\na:[So long\n<|im_end|>]",
            id="trims, and ends no turn by a token",
        ),
        pytest.param(
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}", ASK,
            "<user>Hi<|im_end|>[<assistant>Hello.<|im_end|>]<user>Bye<|im_end|>[<assistant> So long\n<|im_end|>]",
            id="no generation prompt: the model says its header",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if loop.last %}{{ m.content }}"
            "{% else %}{{ m.content.split('</t>')[-1] }}{% endif %}<|im_end|>"
            "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}",
            [(USER, "Hi"), (BOT, "<t>hm</t>Hello"), (USER, "Bye"), (BOT, "<t>so</t>Bye")],
            "U:HiA:[Hello<|im_end|>]U:ByeA:[<t>so</t>Bye<|im_end|>]",
            id="earlier thoughts are dropped",
        ),
        pytest.param(
            "{{ bos_token }}{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
            "{% for m in messages %}"
            "{{ '[I]' ~ m.content ~ '[/I]' if m.role == 'user' else m.content ~ eos_token }}{% endfor %}",
            ASK, "<|im_start|>[I]Hi[/I][Hello.<|im_end|>][I]Bye[/I][ So long\n<|im_end|>]",
            id="raises on what is not whole",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}{{ m.content }}{{ strftime_now('%d %b %Y') }}{% endfor %}",
            [(USER, "a"), (BOT, "b")],
            "usera26 Jul 2024[assistantb26 Jul 2024<|im_end|>]",
            id="the date is always the same one",
        ),
    ],
)  # fmt: skip
def test_conversations(template: str, messages: Talk, expected: str, tmp_path: Path) -> None:
    base = model(tmp_path / "m.gguf", template)
    made = corpora.prepare_examples(write_jsonl(tmp_path / "t.jsonl", talk(*messages)), base, tmp_path / "c")
    assert marked(made) == [expected]


def test_a_conversation_is_what_the_model_is_asked_with(tmp_path: Path) -> None:
    """The tokens up to an answer are those of `toy infer --chat`."""
    base = model(tmp_path / "m.gguf", CHATML, add_bos=True)
    tok = Tokenizer.from_file(base)
    made = corpora.prepare_examples(
        write_jsonl(tmp_path / "t.jsonl", talk((USER, "Hi"), (BOT, "Ho"))), base, tmp_path / "c"
    )
    ids, _, mask = arrays(made)
    asked = generate.prompt_ids(tok, chat.render(tok, [{"role": USER, "content": "Hi"}], "m"))
    assert ids[: mask.index(1)] == asked
    assert tok.decode(ids[len(asked) :], special=True) == "Ho<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role ~ ' role') }}", [(SYSTEM, "x"), (BOT, "y")], "no system role"),
        ("{{ messages[9].role }}", [(USER, "x"), (BOT, "y")], "fails"),
        ("{% for", [(USER, "x"), (BOT, "y")], "fails"),
        ("nothing of it", [(USER, "x"), (BOT, "y")], "no token to learn"),
    ],
)  # fmt: skip
def test_templates_that_refuse(template: str, messages: Talk, says: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", talk(*messages))
    error = refused(lambda: corpora.prepare_examples(path, model(tmp_path / "m.gguf", template), tmp_path / "c"))
    assert error.kind == "bad_file" and says in error.message
    assert "m.gguf" in error.message or f"{path}:1" in error.message
    assert not list((tmp_path / "c").glob("t-*"))


def test_no_template(tmp_path: Path) -> None:
    path, base = write_jsonl(tmp_path / "t.jsonl", talk((USER, "x"), (BOT, "y"))), model(tmp_path / "m.gguf")
    for call in (corpora.check_examples, functools.partial(corpora.prepare_examples, cache_dir=tmp_path / "c")):
        for tokenizer in (base, "bytes", "bpe"):
            error = refused(functools.partial(call, path, tokenizer))  # type: ignore[arg-type]
            assert "need a chat template" in error.message and f"{path}:1" in error.message
            assert "completion" in error.hint and "base" in error.hint
