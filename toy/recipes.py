"""THE matrix: (recipe, arch, device) -> the runner to build and launch, and what it needs. All else asks here."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy.errors import ToyError, nearest

RECIPES = {
    "from-scratch": "Train a new model from random weights.",
    "warm-start": "Go on training the weights of a GGUF.",
    "lora": "Train a low-rank adapter over a frozen GGUF.",
    "vit-tiny": "Train a small vision transformer on images.",
}
ARCHS = {
    "llama": "RMSNorm, rotary positions, grouped-query attention, SwiGLU.",
    "gpt2": "LayerNorm, learned positions, GELU.",
    "vit": "Image patches, LayerNorm, GELU, a class head.",
}
DEVICES = {
    "cpu": "This machine's processors.",
    "cuda": "NVIDIA GPUs.",
    "metal": "Apple GPUs.",
    "vulkan": "GPUs through Vulkan.",
}

#: Flags that not every recipe takes.
RECIPE_FLAGS: dict[str, tuple[str, ...]] = {
    "--corpus": ("from-scratch", "warm-start", "lora"),
    "--model": ("warm-start", "lora"),
    "--init": ("warm-start",),
    "--rank": ("lora",),
    "--images": ("vit-tiny",),
}


@dataclass(frozen=True)
class Row:
    """One runner family: what it is built from, what it reads from its environment, what it accepts."""

    recipe: str
    arch: str
    device: str
    target: str  # the executable under libexec/
    env: tuple[str, ...]  # keys besides the common ones
    dtypes: tuple[str, ...] = ("f32",)  # what train.dtype can be
    needs: tuple[str, ...] = ()  # flags that must be given
    gguf_archs: tuple[str, ...] = ()  # architectures of the GGUFs that it starts from
    gguf_types: tuple[str, ...] = ()  # tensor types of those GGUFs; empty: any


#: What can be trained now. Adding an architecture, a device or a recipe adds a row.
MATRIX: tuple[Row, ...] = (
    Row("from-scratch", "llama", "cpu", target="toy-train", env=("CORPUS", "VAL_CORPUS", "TOKENIZER")),
)

#: What can generate text from a GGUF now: architecture -> runner.
INFER = {"llama": "toy-infer"}

#: Every runner this source tree can build, with the device it needs.
RUNNERS = {"toy-train": "cpu", "toy-infer": "cpu"}

COMMON_ENV = ("TOY_RUN_DIR", "TAO_RUN_DIR", "TOY_RUN_ID", "RECIPE", "STEPS", "SEED", "TOY_CONFIG")


def _known(what: str, word: str, table: Mapping[str, str], origin: str, is_flag: bool) -> None:
    if word in table:
        return
    near = nearest(word, table)
    hint = (f"did you mean {near}? " if near else "") + f"known: {', '.join(table)}"
    where = f" ({origin})" if origin and not is_flag else ""
    raise ToyError("bad_flag" if is_flag or not origin else "bad_config", f"unknown {what} {word!r}{where}", hint)


def check_words(recipe: str, arch: str, device: str, origins: Mapping[str, str], flags: Iterable[str] = ()) -> None:
    """Refuse words that are in none of the tables, naming the nearest. `flags` are the run.* keys given as flags."""
    given = set(flags)
    for key, what, word, table in (
        ("run.recipe", "recipe", recipe, RECIPES),
        ("run.arch", "architecture", arch, ARCHS),
        ("run.device", "device", device, DEVICES),
    ):
        _known(what, word, table, origins.get(key, ""), key in given)


def device_reason(device: str) -> str:
    """Why this machine cannot use `device` whatever is built, or "" when the machine could."""
    if device == "metal" and platform.system() != "Darwin":
        return "metal needs macOS"
    if device == "cuda" and cuda_toolkit() is None:
        return "cuda needs NVIDIA's toolkit, and there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    if device == "vulkan" and shutil.which("glslc") is None:
        return "vulkan needs its headers and the shader compiler glslc"
    return ""


DEVICE_HINTS = {
    "metal": "use --device cpu here",
    "cuda": "install the CUDA toolkit or set CUDA_HOME; --device cpu works now",
    "vulkan": "Debian: apt install libvulkan-dev glslc; --device cpu works now",
}


def cuda_toolkit() -> Path | None:
    """The nvcc of this machine."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if nvcc.is_file():
                return nvcc
    if found := shutil.which("nvcc"):
        return Path(found)
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    return nvcc if nvcc.is_file() else None


def select(recipe: str, arch: str, device: str) -> Row:
    """The row for three known words, or a ToyError (not_available) with the reason. Nothing has been built by then."""
    for row in MATRIX:
        if (row.recipe, row.arch, row.device) == (recipe, arch, device):
            if reason := device_reason(device):
                raise ToyError("not_available", reason, DEVICE_HINTS.get(device, ""))
            return row
    have = "; ".join(f"{row.recipe} with {row.arch} on {row.device}" for row in MATRIX)
    hint = f"this toy trains: {have}"
    if device != "cpu" and (reason := device_reason(device)):
        raise ToyError("not_available", reason, DEVICE_HINTS.get(device, hint))
    if recipe not in {row.recipe for row in MATRIX}:
        raise ToyError("not_available", f"recipe {recipe} is not in this toy yet", hint)
    if arch not in {row.arch for row in MATRIX if row.recipe == recipe}:
        raise ToyError("not_available", f"recipe {recipe} cannot train {arch} yet", hint)
    raise ToyError("not_available", f"{recipe} with {arch} cannot run on {device} yet", hint)


def check_flags(recipe: str, given: Iterable[str]) -> None:
    """Refuse a flag that belongs to other recipes."""
    for flag in given:
        homes = RECIPE_FLAGS.get(flag)
        if homes is not None and recipe not in homes:
            raise ToyError(
                "bad_flag",
                f"{flag} belongs to the recipe{'s' if len(homes) > 1 else ''} {' and '.join(homes)}, not to {recipe}",
                f"leave {flag} out, or choose --recipe {homes[0]}",
            )


def check_knobs(row: Row, dtype: str, origin: str = "") -> None:
    """Refuse values that the configuration knows and this runner does not."""
    if dtype not in row.dtypes:
        where = f" ({origin})" if origin else ""
        raise ToyError(
            "not_available",
            f"train.dtype = {dtype} is not in this toy yet{where}",
            f"{row.target} computes in {' or '.join(row.dtypes)}",
        )


def availability() -> list[dict[str, Any]]:
    """Every (recipe, arch, device) that makes sense, with whether it can be trained here and why not."""
    rows = []
    for recipe in RECIPES:
        for arch in ("vit",) if recipe == "vit-tiny" else ("llama", "gpt2"):
            for device in DEVICES:
                try:
                    row: Row | None = select(recipe, arch, device)
                    reason = ""
                except ToyError as error:
                    row, reason = None, error.message
                rows.append(
                    {
                        "recipe": recipe,
                        "arch": arch,
                        "device": device,
                        "available": row is not None,
                        "reason": reason,
                        "runner": row.target if row else None,
                    }
                )
    return rows


def accepts(architecture: str, types: Iterable[str] = ()) -> list[str]:
    """The recipes that can start from a GGUF of this architecture whose tensors have these types."""
    kinds = {str(kind).upper() for kind in types}
    found = [
        row.recipe
        for row in MATRIX
        if architecture in row.gguf_archs and (not row.gguf_types or kinds <= set(row.gguf_types))
    ]
    return list(dict.fromkeys(found))
