"""Building native runners: where their source is, and what is missing or stale (`ensure_built`)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from toy import __version__
from toy.errors import ToyError, os_error, shown
from toy.recipes import RUNNERS

# --- places ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """The source of the runners, and where they are built."""

    source: Path
    build: Path
    libexec: Path

    def runner(self, target: str, variant: str = "native") -> Path:
        return (self.libexec / "portable" if variant == "portable" else self.libexec) / target

    def folder(self, variant: str, device: str = "cpu") -> Path:
        """Where the runners of a device are built: each in a folder of its own, so that none is built for another."""
        return self.build / (variant if device == "cpu" else f"{variant}-{device}")

    def stamp(self, variant: str, device: str = "cpu") -> Path:
        return self.folder(variant, device) / "toy-stamp.json"


def _is_source(path: Path) -> bool:
    return (path / "CMakeLists.txt").is_file() and (path / "native").is_dir() and (path / "vendor-patches").is_dir()


def user_cache() -> Path:
    """`~/.cache/toy`, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toy"


def find_root() -> Root:
    """TOY_HOME, else the checkout that holds this package, else the source inside the installed package."""
    here = Path(__file__).resolve().parent
    if home := os.environ.get("TOY_HOME"):
        source = Path(home).expanduser().absolute()
        if not _is_source(source):
            raise ToyError(
                "missing_file",
                f"TOY_HOME={home} is not toy's source: it needs CMakeLists.txt, native/ and vendor-patches/",
                "unset TOY_HOME, or point it at a checkout of toy",
            )
    elif _is_source(here.parent):
        source = here.parent
    elif _is_source(here / "_src"):
        source = here / "_src"
    else:
        raise ToyError("missing_file", "the source of toy's runners is not found", "set TOY_HOME to a checkout of toy")
    if source != here / "_src" and os.access(source, os.W_OK):
        return Root(source, source / "build", source / "libexec")
    cache = user_cache() / __version__
    return Root(source, cache / "build", cache / "libexec")


# --- building -------------------------------------------------------------------------------------------------------


def wheel_tool(name: str) -> str | None:
    """cmake or ninja: from its wheel, beside this Python, or on PATH."""
    with contextlib.suppress(ImportError):
        module = __import__(name)
        for attribute in ("CMAKE_BIN_DIR", "BIN_DIR"):
            folder = getattr(module, attribute, None)
            if folder and os.access(tool := os.path.join(folder, name), os.X_OK):
                return tool
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def _compiler(variable: str, names: Sequence[str]) -> str | None:
    if wanted := os.environ.get(variable):
        return shutil.which(wanted.split()[0])
    return next((found for name in names if (found := shutil.which(name))), None)


def find_compiler() -> str | None:
    """The C++ compiler that a build would use: CXX, else the first of the usual names."""
    return _compiler("CXX", ("c++", "g++", "clang++"))


def _tools() -> dict[str, str]:
    cxx, cc = find_compiler(), _compiler("CC", ("cc", "gcc", "clang"))
    if cxx is None or cc is None:
        missing = "C++" if cxx is None else "C"
        variable = "CXX" if cxx is None else "CC"
        named = f": {variable}={os.environ[variable]} is not found" if os.environ.get(variable) else ""
        raise ToyError(
            "build_failed",
            f"no {missing} compiler on this machine{named}",
            f"install g++ or clang (Debian: apt install g++; macOS: xcode-select --install), or set {variable}",
        )
    tools = {"cxx": cxx, "cc": cc}
    for name in ("cmake", "ninja"):
        found = wheel_tool(name)
        if found is None:
            raise ToyError("build_failed", f"{name} is not found", f"pip install {name}")
        tools[name] = found
    return tools


def _fingerprint(root: Root, variant: str, device: str) -> str:
    """What decides whether a build is fresh: every source's size and time, the variant, the device, the compilers."""
    rows = []
    folders = [root.source / "native", root.source / "vendor-patches"]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    if entry.name not in ("tests", "__pycache__"):
                        folders.append(Path(entry.path))
                elif not entry.name.startswith("."):
                    stat = entry.stat()
                    rows.append(f"{os.path.relpath(entry.path, root.source)} {stat.st_size} {stat.st_mtime_ns}")
    stat = (root.source / "CMakeLists.txt").stat()
    names = ["CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"]
    if device == "cuda":
        names += ["CUDA_HOME", "CUDA_PATH", "CUDAARCHS"]
    flags = [os.environ.get(name, "") for name in names]
    compiler = find_compiler()
    rows += [f"CMakeLists.txt {stat.st_size} {stat.st_mtime_ns}", variant, device]
    rows += [str(root.source), str(compiler), *flags]
    return "\n".join(sorted(rows))


def _file_mark(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def build_info(variant: str = "native", device: str = "cpu") -> dict[str, Any]:
    """What the last build of this variant recorded: compiler, its version, flags."""
    try:
        info = json.loads(find_root().stamp(variant, device).read_text())["info"]
    except (OSError, ValueError, KeyError):
        return {}
    return info if isinstance(info, dict) else {}


def is_built(targets: Sequence[str], variant: str = "native") -> bool:
    """Whether these runners are there and of these sources."""
    root = find_root()
    return all(_is_fresh(root, names, variant, device) for device, names in _by_device(targets).items())


def _by_device(targets: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(RUNNERS.get(name, "cpu"), []).append(name)
    return groups


def _is_fresh(root: Root, targets: Sequence[str], variant: str, device: str) -> bool:
    try:
        stamp = json.loads(root.stamp(variant, device).read_text())
        built = stamp["targets"]
        fresh = all(built.get(name) and built[name] == _file_mark(root.runner(name, variant)) for name in targets)
        return fresh and stamp["fingerprint"] == _fingerprint(root, variant, device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_built(targets: Sequence[str], variant: str = "native", *, quiet: bool = False) -> dict[str, Path]:
    """The paths of these runners, built first when one is missing or stale. Costs milliseconds when none is.

    Progress goes to stderr, everything else to `build/<variant>/build.log`. A build that fails or is interrupted leaves
    the runners that were there before, whole. Raises ToyError (build_failed, disk_full, interrupted, missing_file).
    """
    root = find_root()
    for device, names in _by_device(targets).items():
        _ensure(root, names, variant, device, quiet)
    return {name: root.runner(name, variant) for name in targets}


def _ensure(root: Root, targets: list[str], variant: str, device: str, quiet: bool) -> None:
    if _is_fresh(root, targets, variant, device):
        return
    tools = _tools()
    folder = root.folder(variant, device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "toy-build.lock"):
            if not _is_fresh(root, targets, variant, device):  # another toy may have built them meanwhile
                _build(root, targets, variant, device, tools, quiet)
    except OSError as error:
        raise os_error(error, "build the runners") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another toy that is building the runners", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(root: Root, targets: list[str], variant: str, device: str, tools: dict[str, str], quiet: bool) -> None:
    folder = root.folder(variant, device)
    log = folder / "build.log"
    begun = time.monotonic()
    fingerprint = _fingerprint(root, variant, device)
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={root.source}\n" not in cache.read_text(errors="replace"):
        cache.unlink()  # the tree was moved, or another toy of this version built here
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
    # Linked here first: a runner under libexec/ is only ever replaced whole.
    linked = folder / "linked"
    configure = [
        tools["cmake"], "-S", str(root.source), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        f"-DCMAKE_CXX_COMPILER={tools['cxx']}", f"-DCMAKE_C_COMPILER={tools['cc']}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTOY_VARIANT={variant}", f"-DTOY_DEVICES={device}", f"-DTOY_LIBEXEC={linked}", "-DTOY_PYTHON_MODULE=OFF",
    ]  # fmt: skip
    if device == "cuda":
        from toy import cuda

        configure += cuda.cmake_options(folder / "toolkit")
    from toy.config.resolve import usable_cores

    # ninja itself, not cmake --build: each of its jobs is a process group of its own, and only ninja can end them all
    compile = [tools["ninja"], "-C", str(folder), "-j", str(usable_cores()), *targets]
    with log.open("w", encoding="utf-8") as out, _Progress(targets, variant, device, quiet) as progress:
        for command in (configure, compile):
            out.write("$ " + " ".join(command) + "\n")
            out.flush()
            code = _logged(command, out, progress)
            if code != 0:
                raise _build_error(log)
    for name in targets:
        final = root.runner(name, variant)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            shutil.copy2(linked / name, temporary)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    stamp = root.stamp(variant, device)
    try:
        before = json.loads(stamp.read_text())
        marks = before["targets"] if before["fingerprint"] == fingerprint else {}
    except (OSError, ValueError, KeyError):
        marks = {}
    marks.update({name: _file_mark(root.runner(name, variant)) for name in targets})
    document = {"fingerprint": fingerprint, "targets": marks, "info": _info(folder, variant, tools["cxx"])}
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps(document))
    os.replace(temporary, stamp)
    if not quiet:
        print(f"built {', '.join(targets)} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def compiler_version(compiler: str) -> str:
    """The first line that `compiler --version` prints."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n", 1)[0].strip()


def _info(folder: Path, variant: str, compiler: str) -> dict[str, Any]:
    """The compiler, its version, and the flags that the training loop was compiled with."""
    flags = ""
    with contextlib.suppress(OSError, ValueError, KeyError):
        for entry in json.loads((folder / "compile_commands.json").read_text()):
            if "/native/engine/" in entry["file"] or "/native/train/" in entry["file"]:
                words = shlex.split(entry["command"])
                flags = " ".join(word for word in words if re.match(r"-(O|m|f|std|g$|DNDEBUG$)", word))
                break
    return {"variant": variant, "compiler": compiler, "compiler_version": compiler_version(compiler), "flags": flags}


def _logged(command: list[str], out: Any, progress: _Progress) -> int:
    """Run one build command in its own process group, its output into the log. Ctrl-C ends the whole group."""
    env = {key: value for key, value in os.environ.items() if key not in ("NINJA_STATUS", "CMAKE_GENERATOR")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", process_group=0, env=env,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            out.write(line)
            progress.line(line)
        out.flush()
        return process.wait()
    except BaseException as error:
        end_group(process)
        if isinstance(error, KeyboardInterrupt):
            raise ToyError(
                "interrupted",
                "interrupted while the runners were being built",
                "nothing is left half-built; run it again",
            ) from None
        raise


def end_group(process: subprocess.Popen[Any], patience: float = 5.0) -> None:
    """End a process and its children: politely, so that they clean up (ninja ends its jobs), then by force."""

    def gone() -> bool:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return process.returncode is not None
        return False

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if gone():
                return
            time.sleep(0.02)


def _build_error(log: Path) -> ToyError:
    """The first line of the log that says what went wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(lines)
    if "No space left on device" in text:
        return ToyError(
            "disk_full", "the disk is full: the runners could not be built", f"free some space; {shown(log)}"
        )
    for n, line in enumerate(lines):
        if line.startswith("error: "):  # our own fetch.py
            hint = (
                lines[n + 1].removeprefix("hint: ") if n + 1 < len(lines) and lines[n + 1].startswith("hint: ") else ""
            )
            return ToyError(
                "build_failed", line.removeprefix("error: "), f"{hint}; the whole log: {shown(log)}".lstrip("; ")
            )
    first = next((line for line in lines if re.search(r"(fatal )?error:|undefined reference|ld: ", line)), "")
    if not first:
        at = next((n for n, line in enumerate(lines) if line.startswith("CMake Error")), None)
        if at is not None:
            first = next((line for line in lines[at + 1 :] if line.strip()), lines[at])
    first = " ".join((first or (lines[-1] if lines else "no output")).split())
    return ToyError("build_failed", f"the runners do not build: {first[:300]}", f"the whole log: {shown(log)}")


class _Progress:
    """Build progress on stderr: one moving line on a terminal, a line or two in a pipe."""

    def __init__(self, targets: list[str], variant: str, device: str, quiet: bool) -> None:
        self.text = f"building {', '.join(targets)} ({variant})"
        self.patience = "a minute or two" if device == "cpu" else "some minutes"  # a device's library has many kernels
        self.quiet = quiet
        self.tty = sys.stderr.isatty() and not quiet
        self.status: Any = None

    def __enter__(self) -> Self:
        if self.tty:
            from rich.console import Console

            self.status = Console(stderr=True, highlight=False).status(self.text)
            self.status.__enter__()
        elif not self.quiet:
            print(f"{self.text}; the first time takes {self.patience}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.status is not None:
            self.status.__exit__(*exc)

    def line(self, line: str) -> None:
        if self.status is not None and (match := re.match(r"\[(\d+)/(\d+)\]", line)):
            self.status.update(f"{self.text}: {match[1]} of {match[2]}")
        elif line.startswith("fetching "):
            if self.status is not None:
                self.status.update(line.strip())
            elif not self.quiet:
                print(line.strip(), file=sys.stderr, flush=True)
