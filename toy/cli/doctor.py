"""`toy doctor`: what this machine has, and what each missing piece would enable."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from toy import __version__, recipes
from toy.cli.common import bytes_text, emit, json_option
from toy.errors import ToyError, shown


@click.command()
@json_option
def command(as_json: bool) -> None:
    """What this machine has, and what each missing piece would enable."""
    findings = examine()
    if as_json:
        emit("toy/doctor-v1", {"ok": all(row["ok"] for row in findings if row["needed"]), "findings": findings})
        return
    width = max(len(row["what"]) for row in findings)
    for row in findings:
        mark = "ok " if row["ok"] else ("NO " if row["needed"] else "-  ")
        click.echo(f"{mark} {row['what']:<{width}}  {row['found']}")
        if row["enables"] and not row["ok"]:
            click.echo(f"    {'':<{width}}  {row['enables']}")


def finding(what: str, ok: bool, found: str, enables: str = "", *, needed: bool = True, **data: Any) -> dict[str, Any]:
    return {"what": what, "ok": ok, "found": found, "enables": enables, "needed": needed, **data}


def examine() -> list[dict[str, Any]]:
    return [*toy_itself(), *building(), *machine(), *backends()]


def toy_itself() -> list[dict[str, Any]]:
    from toy import builds

    rows = [finding("toy", True, f"{__version__}, Python {platform.python_version()}")]
    try:
        root = builds.find_root()
    except ToyError as error:
        return [*rows, finding("source", False, error.message, error.hint)]
    rows.append(finding("source", True, str(root.source)))
    try:
        from toy import _native

        rows.append(finding("native module", True, f"toy._native, ggml {_native.ggml_version()}"))
    except (ImportError, AttributeError) as error:
        rows.append(
            finding("native module", False, str(error), "pip install . builds it: --dry-run, toy describe, toy infer")
        )
    usable = [device for device in dict.fromkeys(recipes.RUNNERS.values()) if not recipes.device_reason(device)]
    for device, variant in [(device, variant) for device in usable for variant in ("native", "portable")]:
        here = [name for name, where in recipes.RUNNERS.items() if where == device]
        fresh = [name for name in here if builds.is_built([name], variant)]
        missing = [name for name in here if name not in fresh]
        text = f"{', '.join(fresh) or 'none'} built" + (f"; to build: {', '.join(missing)}" if missing else "")
        option = f" --device {device}" * (device != "cpu") + " --portable" * (variant == "portable")
        hint = f"`toy install{option}` builds them; so does the first command that needs one"
        what = f"runners ({variant})" if device == "cpu" else f"runners ({variant}, {device})"
        rows.append(finding(what, not missing, text, hint, needed=False, built=fresh))
    return rows


def building() -> list[dict[str, Any]]:
    from toy import builds

    compiler = builds.find_compiler()
    enables = "needed to build the runners (Debian: apt install g++; macOS: xcode-select --install)"
    found = f"{compiler}: {builds.compiler_version(compiler)}" if compiler else "none found"
    rows = [finding("C++ compiler", compiler is not None, found, enables)]
    for name in ("cmake", "ninja", "pip"):
        tool = builds.wheel_tool(name) if name != "pip" else None
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        ok = bool(tool) or (name == "pip" and bool(version))
        why = "fetches ggml's source" if name == "pip" else "needed to build the runners"
        rows.append(
            finding(
                name,
                ok,
                f"{version or 'found'} {tool or ''}".strip() if ok else "missing",
                f"{why}: pip install {name}",
            )
        )
    return rows


def machine() -> list[dict[str, Any]]:
    from toy import builds, config
    from toy.runs import bundle

    cpu = bundle.cpu_info()
    simd = cpu["simd"]
    best = "AVX-512" if "avx512f" in simd else "AVX2" if "avx2" in simd else "NEON" if "asimd" in simd else ""
    rows = [
        finding("processor", True, cpu["name"]),
        finding(
            "SIMD",
            bool(best),
            f"{best or 'none known'}: {' '.join(simd)}",
            "without AVX2 or NEON training is slow",
            needed=False,
        ),
        finding("threads", True, f"{config.usable_cores()} usable of {os.cpu_count()}", threads=config.usable_cores()),
        finding(
            "memory", True, f"{bytes_text(bundle.memory_bytes())}{available_memory()}", bytes=bundle.memory_bytes()
        ),
    ]
    for what, place in (("disk, here", Path.cwd()), ("disk, cache", builds.user_cache())):
        there = place
        while not there.exists():
            there = there.parent
        usage = shutil.disk_usage(there)
        enough = usage.free > 1 << 30
        rows.append(
            finding(
                what,
                enough,
                f"{bytes_text(usage.free)} free at {shown(there)}",
                "building takes 0.3 GiB",
                needed=False,
                bytes=usage.free,
            )
        )
    return rows


def available_memory() -> str:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return f", {bytes_text(int(line.split()[1]) * 1024)} available"
    except (OSError, ValueError):
        pass
    return ""


def backends() -> list[dict[str, Any]]:
    from toy import cuda

    have = {row.device for row in recipes.MATRIX}
    best, passed = recipes.auto_device("from-scratch", "f32")
    rows = []
    for device, about in recipes.DEVICES.items():
        reason = recipes.device_reason(device)
        if not reason and device not in have:
            reason = f"this machine could, but this toy has no {device} runners yet"
        rows.append(
            finding(
                f"device {device}",
                not reason,
                reason or (cuda.about() if device == "cuda" else about),
                recipes.DEVICE_HINTS.get(device, "") if recipes.device_reason(device) else "",
                needed=device == "cpu",
            )
        )
    rows.append(finding("device auto", True, f"{best}{f': {passed}' if passed else ''}", device=best))
    return rows
