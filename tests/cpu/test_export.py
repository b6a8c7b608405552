"""What goes out is what was trained: transformers and llama.cpp say of exported models what toy says of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf_files
import numpy as np
import pytest
from gguf_files import RandomModel
from harness import EXCERPT, ROOT, Toy

from toy import _native
from toy.models import convert, hf_export
from toy.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_server import LlamaCpp

sys.path.insert(0, str(ROOT / "prep"))
import hf_to_gguf

sys.path.pop(0)

Array = np.ndarray[Any, Any]

needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "torch")),
    reason="transformers or torch is not installed",
)
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp) is not installed"
)

TEXT = "First Citizen: you  are\nall resolved, ünï 12"
MESSAGES = [{"role": "system", "content": "Short."}, {"role": "user", "content": " hi\n"}]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODELS = {
    "llama": RandomModel(n_embd=64, n_ff=96, vocab_size=320),
    "llama-untied": RandomModel(n_embd=64, n_ff=96, vocab_size=320, tied=False, rope_freq_base=5e5, norm_eps=1e-6),
    "llama-multi-head": RandomModel(n_embd=96, n_head=6, n_head_kv=6, n_ff=64, n_layer=3, vocab_size=320),
    "qwen2": RandomModel("qwen2", n_embd=64, n_ff=96, vocab_size=320),
    "gpt2": RandomModel("gpt2", n_embd=64, n_ff=256, vocab_size=320),
    "gpt2-untied": RandomModel("gpt2", n_embd=64, n_ff=96, vocab_size=320, tied=False),
}


@pytest.fixture(scope="module")
def tokenizer_keys() -> dict[str, Any]:
    text = EXCERPT.read_text(encoding="utf-8")
    keys = Tokenizer.from_name("bpe", lambda: [text], 310).padded(320).to_gguf_metadata()
    return keys | {"tokenizer.chat_template": CHATML}


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tokenizer_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return MODELS[request.param].write(tmp_path_factory.mktemp("model") / f"{request.param}.gguf", tokenizer_keys)


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def our_logprobs(gguf: Path, ids: list[int], adapter: Path | None = None) -> Array:
    return log_softmax(_native.Decoder(str(gguf), adapter=str(adapter or "")).eval(ids))


def hf_logits(folder: Path, ids: list[int]) -> Array:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0, -1].float().numpy())


def difference(ours: Path, theirs: Path) -> float:
    """The largest between our log-probabilities of a model, and llama.cpp's of the 40 likeliest tokens."""
    from llama_server import LlamaCpp

    server: LlamaCpp = LlamaCpp(theirs)
    ids = Tokenizer.from_gguf(ours).encode(TEXT)
    for n in range(len(ids), 2, -1):
        _, top = server.greedy(ids[:n], 1, 40)
        if top:  # llama.cpp says nothing of the end of the text
            found = our_logprobs(ours, ids[:n])
            assert len(top[0]) == 40
            return max(abs(float(found[i]) - value) for i, value in top[0])
    raise AssertionError("the model only ever ends the text")


#: What config.json and model.safetensors were, by their first 16 hex digits of sha256, when transformers said of them
#: what toy says: holds where transformers is not installed.
EXPORTED: dict[str, tuple[str, str]] = {
    "llama": ("10f7aa32b6fbb710", "48c3d5d3940334e1"),
    "llama-untied": ("a9f22453322e55d3", "8d6ca75282154af5"),
    "llama-multi-head": ("1ee8a5d65a6ac56d", "66b89c868ca034ab"),
    "qwen2": ("6c48f4ea41161ac9", "ce90ec36a13ae05e"),
    "gpt2": ("189d9101ca051731", "c82812aa0f759265"),
    "gpt2-untied": ("63360ee1dacfd702", "fcbb97ed7ac883dd"),
}


def hashes(folder: Path) -> tuple[str, str]:
    first, second = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in ("config.json", "model.safetensors")
    )
    return first, second


def test_what_is_exported_is_what_transformers_took(model: Path, tmp_path: Path) -> None:
    hf_export.export(convert.find_source(str(model)), tmp_path / "hf")
    assert hashes(tmp_path / "hf") == EXPORTED[model.stem]


# --- transformers ---------------------------------------------------------------------------------------------------


@needs_transformers
def test_transformers_says_the_same(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hf_export.export(convert.find_source(str(model)), tmp_path / "hf")
    assert hashes(tmp_path / "hf") == EXPORTED[model.stem]
    ours = Tokenizer.from_gguf(model)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    ids = theirs(TEXT)["input_ids"]
    assert ids == ours.encode(TEXT, add_special=True)
    assert theirs.decode(ids) == TEXT
    prompt = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    from toy.models.chat import render

    assert prompt == render(ours, MESSAGES, "the model")
    assert np.abs(log_softmax(hf_logits(tmp_path / "hf", ids)) - our_logprobs(model, ids)).max() < 1e-5

    # and what transformers writes comes back
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    again.save_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "again")
    hf_to_gguf.convert_folder(tmp_path / "again", tmp_path / "back.gguf")
    before, after = gguf_files.read(model), gguf_files.read(tmp_path / "back.gguf")
    assert all(after[name].tobytes() == values.tobytes() for name, values in before.items())
    assert Tokenizer.from_gguf(tmp_path / "back.gguf").vocabulary.chat_template == CHATML


@needs_transformers
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel"])
def test_what_transformers_makes_comes_in(
    kind: str, dtype: str, tokenizer_keys: dict[str, Any], tmp_path: Path
) -> None:
    """A model that transformers made up, in several files of 16-bit numbers."""
    import torch
    import transformers

    torch.manual_seed(3)
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=320, bos_token_id=1, eos_token_id=1
        )
    else:
        make = getattr(transformers, kind.replace("ForCausalLM", "Config"))
        config = make(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
            vocab_size=320, max_position_embeddings=64, rope_theta=5e4, initializer_range=0.2,
        )  # fmt: skip
    model = getattr(transformers, kind)(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    source = MODELS["llama"].write(tmp_path / "tokenizer.gguf", tokenizer_keys)
    (tmp_path / "hf" / "tokenizer.json").write_text(Tokenizer.from_gguf(source).to_json() or "", encoding="utf-8")

    hf_to_gguf.convert_folder(tmp_path / "hf", tmp_path / "own.gguf")
    hf_to_gguf.convert_folder(tmp_path / "hf", tmp_path / "f32.gguf", "f32")
    kinds = {t["type"] for t in _native.gguf_read(str(tmp_path / "own.gguf"))["tensors"] if len(t["shape"]) > 1}
    assert kinds - {"F32"} == {"F16" if dtype == "float16" else "BF16"}
    ids = [5, 17, 300, 2, 99, 5]
    assert np.abs(our_logprobs(tmp_path / "f32.gguf", ids) - log_softmax(hf_logits(tmp_path / "hf", ids))).max() < 1e-5


@needs_transformers
def test_a_vit_at_transformers(tmp_path: Path) -> None:
    import torch
    from torch_gpt2 import Shape
    from torch_vit import Vit, patches_of
    from transformers import AutoModelForImageClassification

    gguf = gguf_files.write_vit(tmp_path / "vit.gguf")
    hf_export.export(convert.find_source(str(gguf)), tmp_path / "hf")
    images = np.random.RandomState(2).standard_normal((5, 1, 8, 8)).astype(np.float32)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf", local_files_only=True)
    ours = Vit(Shape(2, 32, 4, 1e-6), gguf_files.read(gguf))  # test_torch_parity_vit holds it against toy's
    with torch.no_grad():
        found = theirs(torch.from_numpy(images)).logits
        expected = ours(torch.from_numpy(patches_of(images, 4)))
    assert float((found - expected).abs().max()) < 1e-5
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@needs_llama_cpp
def test_llama_cpp_says_the_same(model: Path, tmp_path: Path) -> None:
    """f16 and q8_0, written out again in f32: the same numbers in either program. Of gpt2, llama.cpp looks GELU up in a
    table of f16."""
    for kind in ("f16", "q8_0"):
        convert.convert(model, tmp_path / "small.gguf", kind)
        convert.convert(tmp_path / "small.gguf", tmp_path / "f32.gguf", "f32")
        assert difference(tmp_path / "f32.gguf", tmp_path / "f32.gguf") < 1e-3


@needs_llama_cpp
@pytest.mark.parametrize("kind", [kind for kind in convert.TYPES if kind != "f32"])
def test_llama_cpp_reads_every_type(kind: str, tokenizer_keys: dict[str, Any], tmp_path: Path) -> None:
    """Products with quantised weights round what they multiply to eight bits, in either program: near, not equal."""
    shape = RandomModel(n_embd=256, n_head=8, n_head_kv=4, n_ff=512, vocab_size=320, tied=False)
    source = shape.write(tmp_path / "f32.gguf", tokenizer_keys)
    convert.convert(source, tmp_path / "small.gguf", kind)
    convert.convert(tmp_path / "small.gguf", tmp_path / "again.gguf", "f32")
    assert difference(tmp_path / "again.gguf", tmp_path / "small.gguf") < 0.1


# --- adapters -------------------------------------------------------------------------------------------------------

TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_adapter(base: Path, path: Path, rank: int = 4) -> Path:
    """Over every target of every layer, large enough to change what the model says."""
    random, tensors = np.random.RandomState(11), {}
    for tensor in _native.gguf_read(str(base))["tensors"]:
        if any(tensor["name"].endswith(f"{target}.weight") for target in TARGETS):
            columns, rows = tensor["shape"]
            a = random.standard_normal((rank, columns)) / columns**0.5
            tensors[f"{tensor['name']}.lora_a"] = ("F32", a.astype(np.float32))
            b = 0.3 * random.standard_normal((rows, rank))
            tensors[f"{tensor['name']}.lora_b"] = ("F32", b.astype(np.float32))
    arch = _native.gguf_read(str(base))["metadata"]["general.architecture"]
    keys = {"general.type": "adapter", "general.architecture": arch, "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    return gguf_files.write(path, keys, tensors)


@needs_llama_cpp
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_merged_says_what_the_adapter_says(
    arch: str, kind: str, tokenizer_keys: dict[str, Any], tmp_path: Path
) -> None:
    shape = RandomModel(arch, kind, n_embd=64, n_ff=96, vocab_size=320)
    base = shape.write(tmp_path / "base.gguf", tokenizer_keys)
    adapter, ids = write_adapter(base, tmp_path / "adapter.gguf"), Tokenizer.from_gguf(base).encode(TEXT)
    convert.convert(base, tmp_path / "f32.gguf", "f32")
    convert.merge(base, adapter, tmp_path / "merged.gguf", "f32")
    applied, merged = our_logprobs(tmp_path / "f32.gguf", ids, adapter), our_logprobs(tmp_path / "merged.gguf", ids)
    assert np.abs(applied - merged).max() < 1e-4
    assert np.abs(applied - our_logprobs(tmp_path / "f32.gguf", ids)).max() > 0.1
    assert difference(tmp_path / "merged.gguf", tmp_path / "merged.gguf") < 1e-3


# --- a model that others made ---------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Names in a folder whose half gigabytes are removed at once."""
    import shutil

    yield lambda name: tmp_path / name
    shutil.rmtree(tmp_path)


@needs_transformers
def test_smollm_at_transformers(smollm: Path, cold_toy: Toy, scratch: Callable[[str], Path]) -> None:
    """Q4_1 out in f32, through transformers, and back: the same log-probabilities, and the same tensors."""
    from transformers import AutoTokenizer

    cold_toy("export", smollm, "--to", "hf", "--out", scratch("hf")).ok()
    theirs = AutoTokenizer.from_pretrained(scratch("hf"), local_files_only=True)
    ours = Tokenizer.from_gguf(smollm)
    for text in (TEXT, "  def f(x):\n\treturn 3.14 + x  # 你好 🙂", "it's WE'LL"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    ids = ours.encode("The capital of France is")
    hf_to_gguf.convert_folder(scratch("hf"), scratch("back.gguf"))
    found = log_softmax(hf_logits(scratch("hf"), ids))
    best = found.argsort()[-50:]
    assert np.abs(our_logprobs(scratch("back.gguf"), ids) - found)[best].max() < 1e-3
    convert.convert(smollm, scratch("f32.gguf"), "f32")
    before, after = gguf_files.read(scratch("f32.gguf")), gguf_files.read(scratch("back.gguf"))
    assert all(after[name].tobytes() == values.tobytes() for name, values in before.items())
