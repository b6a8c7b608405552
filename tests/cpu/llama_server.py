"""llama.cpp in this process, by the wheel xllamacpp: the independent reader of what toy writes."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A model in llama.cpp's server, with a LoRA adapter if one is given. `exact`: keys and values in f32, attention
    unfused; otherwise its defaults."""

    def __init__(self, gguf: Path, *, exact: bool = True, context: int = 0, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = context
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        params.n_parallel = 1
        # one thread: on a busy machine llama.cpp's threads wait for each other far longer than they compute
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.ui = False
        params.verbosity = 0
        params.cache_ram_mib = 0
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        address = self.server.listening_address + path
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(request).encode(), headers)) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        found: list[int] = self.post("/tokenize", request)["tokens"]
        return found

    def detokenize(self, ids: list[int]) -> str:
        return str(self.post("/detokenize", {"tokens": ids})["content"])

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        return str(self.post("/apply-template", {"messages": messages})["prompt"])

    def greedy(self, ids: list[int], n: int, logprobs: int) -> tuple[list[int], list[list[tuple[int, float]]]]:
        """Greedy continuation, and at each token the likeliest (id, natural log of probability), best first."""
        request = {
            "prompt": ids, "n_predict": n, "temperature": 0.0, "n_probs": logprobs, "return_tokens": True,
            "cache_prompt": False, "samplers": ["temperature"],
        }  # fmt: skip
        answer = self.post("/completion", request)
        top = [
            [(c["id"], c["logprob"]) for c in token["top_logprobs"]]
            for token in answer.get("completion_probabilities", [])
        ]
        return answer["tokens"], top
