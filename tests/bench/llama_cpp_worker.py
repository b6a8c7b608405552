"""llama.cpp by the wheel xllamacpp, waiting between its turns: llama_cpp_worker.py GGUF THREADS.

A line `prefill N` or `decode N` in, tokens/s out.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def start(gguf: str, threads: int) -> Any:
    """Its server, with its own defaults for all that makes it fast."""
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    params.ui = False
    params.verbosity = 0
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def completion(server: Any, ids: list[int], n: int) -> dict[str, Any]:
    request = {"prompt": ids, "n_predict": n, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
    address, headers = server.listening_address + "/completion", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(request).encode(), headers)) as answer:
        found: dict[str, Any] = json.load(answer)["timings"]
    return found


def main(gguf: str, threads: int) -> None:
    server = start(gguf, threads)
    for line in sys.stdin:
        what, n = line.split()
        if what == "prefill":
            found = completion(server, list(range(1000, 1000 + int(n))), 1)["prompt_per_second"]
        else:
            found = completion(server, [1], int(n))["predicted_per_second"]
        version = importlib.metadata.version("xllamacpp")
        print(json.dumps({"tokens_per_second": found, "version": f"xllamacpp {version}"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
