"""What GPUs this machine has, asked of their drivers, and whether a runner for them can be built."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: ggml's: which of Vulkan's devices may be used, by number. Without it, those that are not made of software.
VISIBLE = "GGML_VK_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    name: str
    is_gpu: bool  # not a processor that plays one


def _ask_vulkan() -> list[Device]:
    """Vulkan's devices, in its order. Raises OSError without the loader; a driver may do worse: see vulkan_devices."""
    loader = ctypes.CDLL({"darwin": "libvulkan.1.dylib"}.get(sys.platform, "libvulkan.so.1"))

    class Create(ctypes.Structure):  # VkInstanceCreateInfo
        _fields_ = (
            ("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("flags", ctypes.c_uint32),
            ("application", ctypes.c_void_p), ("n_layers", ctypes.c_uint32), ("layers", ctypes.c_void_p),
            ("n_extensions", ctypes.c_uint32), ("extensions", ctypes.c_void_p),
        )  # fmt: skip

    instance, n = ctypes.c_void_p(), ctypes.c_uint32()
    if loader.vkCreateInstance(ctypes.byref(Create(type=1)), None, ctypes.byref(instance)) != 0:
        return []
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(n), None)
    handles = (ctypes.c_void_p * n.value)()
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(n), handles)
    found = []
    for handle in handles[: n.value]:
        # VkPhysicalDeviceProperties, far below 4 KiB: four numbers, the type, the name, and what we do not read
        properties = ctypes.create_string_buffer(4096)
        loader.vkGetPhysicalDeviceProperties(ctypes.c_void_p(handle), properties)
        kind = int.from_bytes(properties.raw[16:20], sys.byteorder)
        name = properties.raw[20 : 20 + 256].split(b"\0")[0].decode("utf-8", "replace")
        found.append(Device(name, is_gpu=kind != 4))  # VK_PHYSICAL_DEVICE_TYPE_CPU
    return found


@functools.cache
def vulkan_devices() -> tuple[Device, ...] | None:
    """Vulkan's devices; None where there is no loader. Asked in a process of its own: a driver may crash or hang."""
    code = "from toy import devices; devices._print_vulkan()"
    places = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=30, check=True)
        rows = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    return None if rows is None else tuple(Device(**row) for row in rows)


def _print_vulkan() -> None:
    try:
        print(json.dumps([vars(device) for device in _ask_vulkan()]))
    except OSError:
        print("null")


def vulkan_usable() -> list[Device]:
    """Those that ggml would use."""
    found = vulkan_devices() or ()
    named = os.environ.get(VISIBLE)
    if named is None:
        return [device for device in found if device.is_gpu]
    return [found[int(word)] for word in named.split(",") if word.strip().isdigit() and int(word) < len(found)]


def _has_file(variables: Sequence[str], below: str, places: Sequence[str]) -> bool:
    roots = [os.path.join(os.environ[name], "include") for name in variables if os.environ.get(name)]
    return any(os.path.isfile(os.path.join(root, below)) for root in (*roots, *places))


def vulkan_reason() -> str:
    """Why this machine cannot train through Vulkan, or ""."""
    found = vulkan_devices()
    if found is None:
        return "vulkan needs its loader, and there is no libvulkan"
    if not found:
        return "vulkan finds no device: no driver for one is installed"
    if not vulkan_usable():
        if VISIBLE in os.environ:
            return f"{VISIBLE}={os.environ[VISIBLE]} names no device: vulkan has {len(found)}, counted from 0"
        return f"vulkan finds only {found[0].name}, which is software ({VISIBLE}=0 uses it all the same)"
    if shutil.which("glslc") is None:
        return "vulkan needs the shader compiler glslc to be built"
    places = ("/usr/include", "/usr/local/include", "/opt/homebrew/include")
    for header in ("vulkan/vulkan.hpp", "spirv/unified1/spirv.hpp"):
        if not _has_file(("VULKAN_SDK",), header, places):
            return f"vulkan needs the header {header} to be built"
    return ""
