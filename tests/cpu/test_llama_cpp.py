"""The exported model in llama.cpp: the same ids, the same log-probabilities, the same text as in `toy infer`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Trained
from harness import Toy

if TYPE_CHECKING:
    from llama_server import LlamaCpp

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp) is not installed"
)

PROMPTS = ["First Citizen:\nWe are", "The ", "O", "MENENIUS:\nI tell you, friends, most charitable care\n"]
TEXTS = [
    "Before we proceed any further, hear me speak.",
    "  two spaces, a tab\tand lines\n\n\nthree",
    "It's we'll CAN'T I'd",
    "1234567890 3.14 1,000",
    "äöü ß é ñ — “quoted” … 你好 🙂 \u200d",
    "snake_case camelCase <tag> {x: [1]} a+b=c",
    "",
]


def load(gguf: Path, **options: Any) -> LlamaCpp:
    from llama_server import LlamaCpp

    return LlamaCpp(gguf, **options)


def infer(toy: Toy, model: Path, *flags: object, n: int = 64, logprobs: int = 5) -> dict[str, Any]:
    common = ("--n", n, "--temperature", 0, "--logprobs", logprobs, "--json")
    return toy("infer", model, *flags, *common).ok().document


def candidates(document: dict[str, Any]) -> list[list[tuple[int, float]]]:
    return [[(c["id"], c["logprob"]) for c in token] for token in document["logprobs"]]


def worst(ours: list[list[tuple[int, float]]], theirs: list[list[tuple[int, float]]]) -> float:
    """The largest difference of a log-probability that both lists hold; every token's best is in both."""
    differences = []
    for mine, other in zip(ours, theirs, strict=True):
        known = dict(other)
        assert mine[0][0] in known
        differences += [abs(value - known[i]) for i, value in mine if i in known]
    return max(differences)


def same_up_to_a_tie(ours: dict[str, Any], ids: list[int], top: list[list[tuple[int, float]]]) -> int:
    """How many tokens are the same: all, or up to one where two are equally likely to within rounding in both."""
    for n, (a, b) in enumerate(zip(ours["ids"], ids, strict=True)):
        if a != b:
            for either in (dict(candidates(ours)[n]), dict(top[n])):
                assert abs(either[a] - either[b]) < 2e-5, (n, a, b, either)
            return n
    return len(ids)


@needs_llama_cpp
def test_llama_cpp_says_the_same(spoken: Trained, toy: Toy) -> None:
    """64 greedy tokens and their log-probabilities. f32 on both sides, so what is left is the order of sums;
    llama.cpp takes a gpt2's GELU from a table in f16."""
    server = load(spoken.gguf)
    noise = 1e-4 if spoken.config["run"]["arch"] == "llama" else 1e-3
    said = set()
    for prompt in PROMPTS:
        ours = infer(toy, spoken.run, "--prompt", prompt)
        ids, top = server.greedy(ours["prompt_ids"], 64, 5)
        same = same_up_to_a_tie(ours, ids, top)
        assert worst(candidates(ours)[:same], top[:same]) < noise
        said.update(ids)
    assert len(said) > 4, "the model says too little to prove anything"


@needs_llama_cpp
def test_llama_cpp_as_it_comes_says_the_same(spoken: Trained, toy: Toy) -> None:
    """With its defaults llama.cpp keeps keys and values in f16: eleven bits, which moves these by 1.5e-3."""
    ours = infer(toy, spoken.run, "--prompt", PROMPTS[0])
    _, top = load(spoken.gguf, exact=False).greedy(ours["prompt_ids"], 64, 5)
    assert worst(candidates(ours), top) < 1e-2


@needs_llama_cpp
def test_llama_cpp_tokenizes_alike(spoken: Trained) -> None:
    from toy.models.tokenizer import Tokenizer

    server, tokenizer = load(spoken.gguf), Tokenizer.from_gguf(spoken.gguf)
    kind = spoken.config["data"]["tokenizer"]
    for text in [*TEXTS, *PROMPTS]:
        if kind == "chars" and not known_characters(tokenizer, text):
            continue
        ids = tokenizer.encode(text)
        assert ids == server.tokenize(text), text
        assert tokenizer.decode(ids) == text
        if ids:
            assert server.detokenize(ids) == text


def known_characters(tokenizer: Any, text: str) -> bool:
    return all(tokenizer.decode(tokenizer.encode(c)) == c for c in text)


def test_a_prompt_is_read_at_once_as_token_by_token(spoken: Trained, toy: Toy) -> None:
    """Batched prefill and the KV cache: the continuation of a continuation is the same."""
    whole = infer(toy, spoken.run, "--prompt", PROMPTS[0], n=40)
    ids = whole["prompt_ids"] + whole["ids"][:15]
    rest = infer(toy, spoken.run, "--prompt-ids", ",".join(map(str, ids)), n=25)
    assert rest["ids"] == whole["ids"][15:]
    assert worst(candidates(rest), candidates(whole)[15:]) < 1e-4


# --- a model that others made ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm_server(smollm: Path) -> LlamaCpp:
    pytest.importorskip("xllamacpp")
    return load(smollm, context=512)


def test_smollm_tokenizes_as_in_llama_cpp(smollm: Path, smollm_server: LlamaCpp) -> None:
    from toy.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(smollm)
    for text in [*TEXTS, *PROMPTS]:
        assert tokenizer.encode(text) == smollm_server.tokenize(text), text
    marked = "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.encode(marked, parse_special=True) == smollm_server.tokenize(marked, parse_special=True)
    assert tokenizer.encode(marked) == smollm_server.tokenize(marked)


@pytest.fixture(scope="module")
def smollm_f32(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from gguf_files import dequantise

    path = dequantise(smollm, tmp_path_factory.mktemp("smollm") / "smollm-f32.gguf")
    yield path
    path.unlink()  # half a gigabyte


@needs_llama_cpp
def test_smollm_in_f32_says_the_same(smollm_f32: Path, toy: Toy) -> None:
    """The whole model of 135 M parameters, its weights written out: the same tokens, log-probabilities within 1e-3."""
    server = load(smollm_f32, context=512)
    ours = infer(toy, smollm_f32, "--prompt", "def fibonacci(n):\n")
    ids, top = server.greedy(ours["prompt_ids"], 64, 5)
    assert ours["ids"] == ids[: len(ours["ids"])]
    assert worst(candidates(ours), top[: len(ours["ids"])]) < 1e-3

    question = "What is the capital of France?"
    answer = infer(toy, smollm_f32, "--chat", "--prompt", question, n=24)
    prompt = server.apply_template([{"role": "user", "content": question}])
    assert answer["prompt_ids"] == server.tokenize(prompt, parse_special=True)
    ids, top = server.greedy(answer["prompt_ids"], 24, 5)
    assert answer["ids"] == ids[: len(answer["ids"])]
    assert worst(candidates(answer), top[: len(answer["ids"])]) < 1e-3


#: Quantised products round activations to eight bits, block by block, and where a value sits between two roundings
#: another ggml goes the other way. In this model, small and at four bits, either program is 0.3 nats from the f32 model
#: on average, 0.9 at worst, and they are as far from each other; two bounds on that, and equality up to a tie within.
MEAN_NOISE, WORST_NOISE = 0.6, 1.5


def agreement(ours: dict[str, Any], ids: list[int], top: list[list[tuple[int, float]]]) -> int:
    """How many tokens agree before the first that differs; that one must be a tie within the noise in both."""
    mine = candidates(ours)
    same = next((n for n, (a, b) in enumerate(zip(ours["ids"], ids, strict=False)) if a != b), len(ours["ids"]))
    noise = [worst([a], [b]) for a, b in zip(mine[:same], top[:same], strict=True)]
    assert sum(noise) / len(noise) < MEAN_NOISE, noise
    assert max(noise) < WORST_NOISE, noise
    if same < len(ours["ids"]):
        a, b = ours["ids"][same], ids[same]
        for either in (dict(mine[same]), dict(top[same])):
            assert abs(either[a] - either[b]) < WORST_NOISE, (same, mine[same], top[same])
    return same


def test_quantised_smollm_goes_on_as_in_llama_cpp(smollm: Path, smollm_server: LlamaCpp, toy: Toy) -> None:
    """Where the two part is a matter of luck: ten prompts agree on 3 to 48 of their first 48 tokens, 24 on average."""
    agreed = []
    for prompt in ("The capital of France is", "def fibonacci(n):\n", "The theory of relativity", "Water boils at"):
        ours = infer(toy, smollm, "--prompt", prompt, logprobs=10)
        ids, top = smollm_server.greedy(ours["prompt_ids"], 64, 10)
        agreed.append(agreement(ours, ids, top))
    assert min(agreed) >= 2, agreed
    assert sum(agreed) >= 64, agreed


def test_quantised_smollm_answers_as_in_llama_cpp(smollm: Path, smollm_server: LlamaCpp, toy: Toy) -> None:
    ours = infer(toy, smollm, "--chat", "--prompt", "What is the capital of France?", n=24, logprobs=10)
    ids, top = smollm_server.greedy(ours["prompt_ids"], 24, 10)
    assert agreement(ours, ids, top) >= 4
