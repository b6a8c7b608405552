"""What the tests share: the real command line as a subprocess, configurations for the in-process engine, small data."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import pytest

from toy.errors import ToyError

ROOT = Path(__file__).resolve().parents[1]
#: A megabyte of Shakespeare, llama.cpp's tokenizer cases: not part of the repository.
SHARED = Path(os.environ.get("TOY_TEST_DATA", ROOT.parent / "shared" / "data"))
#: The first 20,000 bytes of it, which are.
EXCERPT = ROOT / "data" / "gates" / "shakespeare-20k.txt"
#: Flags of a run that takes a second: the shipped preset tiny on the excerpt.
TINY = ("--preset", "tiny", "--corpus", EXCERPT, "--no-sample")

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a command line left: exit code (negative: the signal that killed it), stdout, stderr."""

    argv: list[str]
    code: int
    stdout: str
    stderr: str

    @property
    def steps(self) -> list[str]:
        return [line for line in self.stdout.splitlines() if line.startswith("step ")]

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document of `--json`; stdout holds nothing else."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    def ok(self) -> Result:
        assert self.code == 0, f"{self.argv} ended with {self.code}\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}"
        return self


@dataclass
class Toy:
    """The command line, run in `cwd` with an environment of its own: caches and home are the test session's."""

    cwd: Path
    env: dict[str, str] = field(default_factory=dict)

    def environment(self, extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
        # of toy's own variables only the one that says which source to test
        env = {key: value for key, value in os.environ.items() if not key.startswith("TOY_") or key == "TOY_HOME"}
        # a wide terminal that is none: no colours, no wrapped lines
        env |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1"} | self.env
        for key, value in (extra or {}).items():
            env.pop(key, None)
            if value is not None:
                env[key] = value
        return env

    @staticmethod
    def argv(*args: object) -> list[str]:
        return [sys.executable, "-m", "toy", *(str(arg) for arg in args)]

    def __call__(
        self,
        *args: object,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout: float = 300,
        preexec_fn: Callable[[], None] | None = None,
    ) -> Result:
        argv = self.argv(*args)
        done = subprocess.run(
            argv,
            cwd=cwd or self.cwd,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=preexec_fn,
        )
        return Result(argv, done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def start(
        self, *args: object, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> Iterator[Process]:
        """The command line in a process group of its own, as a shell starts it; killed with its children at the end."""
        argv = self.argv(*args)
        with subprocess.Popen(
            argv,
            cwd=cwd or self.cwd,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            started = Process(argv, process)
            family = [*started.children(), process.pid]
            try:
                yield started
            finally:
                for pid in {*family, *started.children()}:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@dataclass
class Process:
    argv: list[str]
    popen: subprocess.Popen[str]

    def children(self) -> list[int]:
        try:
            return [child.pid for child in psutil.Process(self.popen.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def runner(self, name: str = "toy-train", timeout: float = 120) -> int:
        """The pid of the native runner, once it is there."""

        def find() -> int | None:
            for pid in self.children():
                with contextlib.suppress(psutil.Error):
                    if psutil.Process(pid).name() == name:
                        return pid
            return None

        return wait_for(find, timeout, f"a process {name} under {self.argv}", self)

    def read_step(self, step: int) -> list[str]:
        """Read stdout up to the line of `step`."""
        assert self.popen.stdout is not None
        lines = []
        for line in self.popen.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(f"step {step}:"):
                return lines
        _, stderr = self.popen.communicate()
        raise AssertionError(f"no step {step} from {self.argv}:\n{lines}\n{stderr}")

    def interrupt(self, group: bool) -> None:
        """Ctrl-C as a terminal sends it (`group`), or a SIGINT to the command line alone."""
        if group:
            os.killpg(self.popen.pid, signal.SIGINT)
        else:
            os.kill(self.popen.pid, signal.SIGINT)

    def finish(self, timeout: float = 120) -> Result:
        stdout, stderr = self.popen.communicate(timeout=timeout)
        return Result(self.argv, self.popen.returncode, stdout, stderr)


def wait_for(look: Callable[[], T | None], timeout: float, what: str, process: Process | None = None) -> T:
    """Poll until `look` finds something."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = look()
        if found is not None and found is not False:
            return found
        if process is not None and process.popen.poll() is not None:
            left = process.finish()
            raise AssertionError(f"{what}: the process ended with {left.code}\n{left.stdout}\n{left.stderr}")
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout} s")


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def environment_of(pid: int) -> dict[str, str]:
    return dict(psutil.Process(pid).environ())


def read_events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in events if kind is None or event["kind"] == kind]


def tree(*places: Path) -> dict[str, int | str]:
    """Every file below `places` with its size: two of them are equal when nothing was left behind or taken away."""
    found: dict[str, int | str] = {}
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            else:
                found[str(path)] = path.stat().st_size if path.is_file() else "/"
    return found


def sets(knobs: Mapping[str, object] | None = None, **more: object) -> list[str]:
    """--set flags; in a keyword's name `__` stands for the dot."""
    pairs = {**(knobs or {}), **{key.replace("__", "."): value for key, value in more.items()}}
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


def write_jsonl(path: Path, *rows: object) -> Path:
    """A line a row: JSON, or the text itself where it is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refused(call: Callable[[], object]) -> ToyError:
    """The error that `call` raises, in the words of the contract: one line, and one that says what to do."""
    with pytest.raises(ToyError) as caught:
        call()
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.hint
    return caught.value


def fails(kind: str, function: Callable[..., Any], *args: Any, **more: Any) -> str:
    """The message of the error of that kind which `function` raises."""
    error = refused(lambda: function(*args, **more))
    assert error.kind == kind, (error.kind, error.message)
    return error.message


def peak_memory(code: str, *args: object) -> int:
    """KiB of memory that a Python process of its own takes at the most to run `code`. Reads /proc."""
    last = "\nfrom pathlib import Path; print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    argv = [sys.executable, "-c", code + last, *map(str, args)]
    return int(subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def config_kv(**sections: Mapping[str, Any]) -> str:
    """A resolved config.kv for `toy._native`: the defaults, a tiny model, and what is given by section."""
    from toy.config import Config, check, resolve, to_kv

    base: dict[str, dict[str, Any]] = {
        "run": {"threads": 1},
        "model": {
            "n_layer": 2, "n_embd": 32, "n_head": 4, "n_head_kv": 2, "n_ff": 64, "vocab_size": 64, "context": 16,
        },
        "train": {"steps": 50, "batch": 4, "learning_rate": 3e-3, "warmup_steps": 10},
        "eval": {"every": 0},
    }  # fmt: skip
    merged = {name: base.get(name, {}) | dict(sections.get(name, {})) for name in {**base, **sections}}
    config = Config.model_validate(merged)
    check(config)
    return to_kv(resolve(config))


def without_root_powers() -> None:
    """Before an exec: permissions count, though we are root (a container's tests often run as root)."""
    if os.geteuid() != 0:
        return
    import ctypes

    drop_from_bounding_set, override, read_search = 24, 1, 2  # prctl(2), capabilities(7)
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (override, read_search):
        if libc.prctl(drop_from_bounding_set, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
