"""CUDA's sources compile, where there is a toolkit: an installed one, or NVIDIA's wheels (pip install 'toy[cuda]')."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from toy import builds, cuda


@pytest.mark.parametrize("name", ["training", "opt-step-adamw", "out-prod", "attn", "fattn-decode", "ggml-cuda"])
def test_a_source_of_the_step_compiles(built: None, tmp_path: Path, name: str) -> None:
    toolkit = cuda.toolkit()
    if toolkit is None or toolkit.missing():
        pytest.skip("no CUDA toolkit here")
    ggml = builds.find_root().build / "ggml-src"
    header = toolkit.header("cublas_v2.h")
    assert header is not None
    flags = ["-std=c++17", "-gencode=arch=compute_90,code=sm_90", "-extended-lambda", "-DGGML_CUDA_STRICT_F32"]
    flags += [
        "-DGGML_CUDA_USE_GRAPHS",
        "-DGGML_CUDA_NO_VMM",
        "-DGGML_CUDA_NO_FA",
        "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128",
    ]
    done = subprocess.run(
        [
            str(toolkit.nvcc), "-c", str(ggml / "src" / "ggml-cuda" / f"{name}.cu"), "-o", str(tmp_path / "out.o"),
            *flags, f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", f"-I{header.parent}",
        ],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
