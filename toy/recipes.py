"""THE matrix: (recipe, arch, device) -> the runner to build and launch, and what it needs. All else asks here."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

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
#: Best first: --device auto takes the first that is here.
DEVICES = {
    "cuda": "NVIDIA GPUs.",
    "metal": "Apple GPUs.",
    "vulkan": "GPUs through Vulkan.",
    "cpu": "This machine's processors.",
}
AUTO = "auto"

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
    dtypes: tuple[str, ...] = ("f32", "bf16")  # what train.dtype can be
    needs: tuple[str, ...] = ()  # flags that must be given, or the knobs that they stand for
    gguf_archs: tuple[str, ...] = ()  # architectures of the GGUFs that it starts from
    gguf_types: tuple[str, ...] = ()  # tensor types of those GGUFs; empty: any


TEXT_ENV = ("CORPUS", "VAL_CORPUS", "TOKENIZER", "OFFSETS", "MASK", "VAL_OFFSETS", "VAL_MASK", "DATASETS")
DONOR_ENV = (*TEXT_ENV, "INIT", "GGUF")

#: Types of a base that stays frozen. Products with its matrices are computed from the quantised blocks themselves.
FROZEN_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

_CPU: tuple[Row, ...] = (
    Row("from-scratch", "llama", "cpu", target="toy-train", env=TEXT_ENV),
    Row("from-scratch", "gpt2", "cpu", target="toy-train-gpt2", env=TEXT_ENV),
    Row("warm-start", "llama", "cpu", target="toy-train", env=DONOR_ENV, needs=("--model",), gguf_archs=("llama",)),
    Row("warm-start", "gpt2", "cpu", target="toy-train-gpt2", env=DONOR_ENV, needs=("--model",), gguf_archs=("gpt2",)),
    Row(
        "lora", "llama", "cpu", target="toy-train-lora", env=(*TEXT_ENV, "GGUF", "RANK"), needs=("--model",),
        gguf_archs=("llama", "qwen2"), gguf_types=FROZEN_TYPES,
    ),
    Row(
        "vit-tiny", "vit", "cpu", target="toy-train-vit", env=("IMG_DIR", "VAL_IMG_DIR", "TOKENIZER", "DATASETS"),
        needs=("--images",),
    ),
)  # fmt: skip


def on_device(target: str, device: str) -> str:
    """The name of a runner, which is of the cpu as it stands, for another device."""
    return target if device == "cpu" else f"{target}-{device}"


#: Devices with a runner for each of the above, of the same sources, and what they compute in.
_ALSO_ON = {"cuda": ("f32", "bf16"), "vulkan": ("f32",), "metal": ("f32",)}

#: What can be trained now. Adding an architecture, a device or a recipe adds a row.
MATRIX: tuple[Row, ...] = (
    *_CPU,
    *(
        replace(row, device=device, target=on_device(row.target, device), dtypes=dtypes)
        for device, dtypes in _ALSO_ON.items()
        for row in _CPU
    ),
)

#: Words that are known each and make no sense together: (recipe, arch) -> (why, what to do).
NONSENSE = {
    ("from-scratch", "vit"): ("vit trains on images, and from-scratch on text", "--recipe vit-tiny trains it"),
    ("warm-start", "vit"): ("warm-start goes on with a model of text, and vit reads images", "--recipe vit-tiny"),
    ("lora", "vit"): (
        "lora adapts the query, key, value and feed-forward matrices of a llama, and vit has others",
        "--recipe vit-tiny trains a vit whole",
    ),
    ("lora", "gpt2"): (
        "lora adapts models with separate query, key and value matrices, and gpt2 has one for all three",
        "--recipe warm-start trains a gpt2 whole; lora takes GGUFs of llama and qwen2",
    ),
    ("vit-tiny", "llama"): ("vit-tiny trains on images, and llama reads text", "leave --arch out: vit-tiny is a vit"),
    ("vit-tiny", "gpt2"): ("vit-tiny trains on images, and gpt2 reads text", "leave --arch out: vit-tiny is a vit"),
}

#: What can be run from a GGUF now: architecture -> runner of `toy infer` on the cpu (elsewhere: see on_device).
INFER = {"llama": "toy-infer", "qwen2": "toy-infer", "gpt2": "toy-infer", "vit": "toy-infer"}

#: What can be scored now: architecture -> runner of `toy eval` on the cpu.
EVAL = {"llama": "toy-eval", "qwen2": "toy-eval", "gpt2": "toy-eval", "vit": "toy-eval"}

#: Every runner this source tree can build, with the device it needs.
RUNNERS = {row.target: row.device for row in MATRIX} | {
    on_device(name, device): device for name in ("toy-infer", "toy-eval") for device in ("cpu", *_ALSO_ON)
}

#: Recipes that start from a GGUF, and the knob that `--model` is for each.
WITH_BASE = {"lora": "lora.base", "warm-start": "model.donor"}

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
        ("run.device", "device", device, DEVICES | {AUTO: ""}),
    ):
        _known(what, word, table, origins.get(key, ""), key in given)


def device_reason(device: str) -> str:
    """Why this machine cannot use `device` whatever is built, or "" when the machine could."""
    if device == "metal" and platform.system() != "Darwin":
        return "metal needs macOS"
    if device == "cuda":
        from toy import cuda

        return cuda.reason()
    if device == "vulkan":
        from toy import devices

        return devices.vulkan_reason()
    return ""


DEVICE_HINTS = {
    "metal": "use --device cpu here",
    "cuda": "pip install 'toy[cuda]' brings the toolkit, or set CUDA_HOME; the driver comes with the system;"
    " --device cpu works now",
    "vulkan": "Debian: apt install libvulkan-dev glslc spirv-headers, and a driver such as mesa-vulkan-drivers;"
    " --device cpu works now",
}


def auto_device(recipe: str, dtype: str) -> tuple[str, str]:
    """What --device auto is for a recipe: the best device here, and why it is not a better one."""
    passed: list[str] = []
    for device in DEVICES:
        rows = [row for row in MATRIX if (row.recipe, row.device) == (recipe, device)]
        reason = device_reason(device) or _passed_over(device)
        if not reason and not rows:
            reason = f"{recipe} cannot run on {device} yet"
        if not reason and all(dtype not in row.dtypes for row in rows):
            reason = f"{device} does not train in {dtype}"
        if not reason:
            return device, "; ".join(passed)
        passed.append(reason)
    return "cpu", "; ".join(passed)


def tool_on(target: str, device: str) -> str:
    """The runner of `toy infer` or `toy eval` on a device, or a ToyError (not_available, bad_flag) with the reason."""
    if device not in (*DEVICES, AUTO):
        raise ToyError("bad_flag", f"unknown device {device!r}", f"known: {', '.join((*DEVICES, AUTO))}")
    if device == AUTO:
        there = (place for place in DEVICES if on_device(target, place) in RUNNERS)
        device = next(place for place in there if not (device_reason(place) or _passed_over(place)))
    if reason := device_reason(device):
        raise ToyError("not_available", reason, DEVICE_HINTS.get(device, ""))
    if on_device(target, device) not in RUNNERS:
        raise ToyError("not_available", f"{target} does not run on {device} yet", "--device cpu works now")
    return on_device(target, device)


def _passed_over(device: str) -> str:
    """Why a device that can be used is not the best one all the same."""
    if device == "metal":
        return "metal leaves half of a step to the cpu"
    if device != "vulkan":
        return ""
    from toy import devices

    found = devices.vulkan_usable()
    return "" if any(gpu.is_gpu for gpu in found) else f"vulkan has only {found[0].name}, which is software"


def select(recipe: str, arch: str, device: str) -> Row:
    """The row for three known words, or a ToyError (not_available) with the reason. Nothing has been built by then."""
    for row in MATRIX:
        if (row.recipe, row.arch, row.device) == (recipe, arch, device):
            if reason := device_reason(device):
                raise ToyError("not_available", reason, DEVICE_HINTS.get(device, ""))
            return row
    if (recipe, arch) in NONSENSE:
        why, hint = NONSENSE[recipe, arch]
        raise ToyError("not_available", f"{recipe} cannot train {arch}: {why}", hint)
    have = "; ".join(f"{row.recipe} with {row.arch} on {row.device}" for row in MATRIX if row.device == "cpu")
    hint = f"this toy trains: {have}"
    if device != "cpu" and (reason := device_reason(device)):
        raise ToyError("not_available", reason, DEVICE_HINTS.get(device, hint))
    if recipe not in {row.recipe for row in MATRIX}:
        raise ToyError("not_available", f"recipe {recipe} is not in this toy yet", hint)
    if arch not in {row.arch for row in MATRIX if row.recipe == recipe}:
        raise ToyError("not_available", f"recipe {recipe} cannot train {arch} yet", hint)
    raise ToyError("not_available", f"{recipe} with {arch} cannot run on {device} yet", hint)


def gguf_name(recipe: str) -> str:
    """What a run of this recipe leaves under weights/."""
    return "adapter.gguf" if recipe == "lora" else "model.gguf"


def any_row(recipe: str, arch: str, device: str, asked: bool) -> Row:
    """The row, or, where nobody asked for an architecture and the GGUF to come brings one, one of the recipe's rows."""
    if asked or recipe != "warm-start":
        return select(recipe, arch, device)
    return select(recipe, next(row.arch for row in MATRIX if row.recipe == recipe), device)


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


def default_dtype(row: Row) -> Literal["f32", "bf16"]:
    """What train.dtype is where nobody says: the faster one of a GPU that has it."""
    if row.device == "cuda" and "bf16" in row.dtypes:
        from toy import cuda

        return "bf16" if cuda.has_bf16() else "f32"
    return "f32"


def check_knobs(row: Row, dtype: str, origin: str = "") -> None:
    """Refuse values that the configuration knows and this runner does not."""
    if dtype not in row.dtypes:
        where = f" ({origin})" if origin else ""
        raise ToyError(
            "not_available",
            f"train.dtype = {dtype} cannot be trained on {row.device} yet{where}",
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


def accepts(architecture: str, types: Iterable[str] = (), kind: str = "model") -> list[str]:
    """The recipes that can start from a GGUF of this architecture whose tensors have these types. `kind` is its
    general.type: nothing starts from an adapter."""
    kinds = {str(name).upper() for name in types}
    if kind == "adapter" or not kinds:
        return []
    found = [row.recipe for row in MATRIX if architecture in row.gguf_archs and not refused_types(row, kinds)]
    return list(dict.fromkeys(found))


def refused_types(row: Row, types: Iterable[str]) -> list[str]:
    """Those of a GGUF's tensor types that this row's runner does not read."""
    return [kind for kind in types if row.gguf_types and kind.upper() not in row.gguf_types]


def starting_from(recipe: str, architecture: str) -> Row | None:
    """The row of a recipe that starts from a GGUF of this architecture, whatever its device."""
    return next((row for row in MATRIX if row.recipe == recipe and architecture in row.gguf_archs), None)
