"""Running a native runner (`launch`): its environment, its lines, how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toy.builds import find_root
from toy.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, KINDS, ToyError
from toy.recipes import RUNNERS

#: What of the caller's environment reaches a runner. Everything else is dropped.
PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TMP", "TEMP", "LANG", "LC_ALL", "LC_CTYPE", "TZ",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES", "VK_ICD_FILENAMES", "VK_DRIVER_FILES", "ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS",
)  # fmt: skip

TAIL = 20  # lines of stderr that are kept for people


def environment(keys: Mapping[str, object], device: str = "cpu") -> dict[str, str]:
    """A runner's environment, built from nothing: the allow-list, then `keys`."""
    env = {name: os.environ[name] for name in PASSED if name in os.environ}
    env["GGML_NO_BACKTRACE"] = "1"  # an abort of ggml's starts a debugger, which prints where step lines go
    env.update({key: str(value) for key, value in keys.items()})
    if device == "metal":
        env["GGML_METAL_NO_RESIDENCY"] = "1"
    return env


@dataclass
class Result:
    """How a runner ended."""

    name: str
    returncode: int
    stderr: list[str] = field(default_factory=list)  # its last lines
    stopped: bool = False  # we passed a SIGINT or SIGTERM on
    out_of_memory: bool = False
    seconds: float = 0.0

    @property
    def signal(self) -> str:
        """The name of the signal that it died by ("SIGSEGV"), or ""."""
        if self.returncode >= 0:
            return ""
        try:
            return signal.Signals(-self.returncode).name
        except ValueError:
            return f"signal {-self.returncode}"

    @property
    def interrupted(self) -> bool:
        return self.returncode == EXIT_INTERRUPTED or (self.stopped and self.returncode < 0)

    def tail(self) -> list[str]:
        """Its last stderr lines, without those that become ours."""
        return [line for line in self.stderr if not line.startswith(("error: ", "hint: ", "kind: "))]

    def _told(self, word: str) -> str:
        return next((line.removeprefix(word) for line in reversed(self.stderr) if line.startswith(word)), "")

    def error(self) -> ToyError | None:
        """What to tell the user, or None when it ended well."""
        if self.returncode == 0:
            return None
        message, hint, kind = self._told("error: "), self._told("hint: "), self._told("kind: ")
        if self.interrupted:
            return ToyError("interrupted", message or f"{self.name} was interrupted", hint or "run it again")
        if self.signal:
            if self.out_of_memory:
                return ToyError(
                    "oom",
                    f"{self.name} was killed by {self.signal}: the machine ran out of memory",
                    "make the batch, the context or the model smaller; `toy train --dry-run` says what it needs",
                )
            hint = (
                "its last words are above; `toy doctor` looks at this machine"
                if self.tail()
                else "`toy doctor` looks at this machine"
            )
            return ToyError("runner_failed", f"{self.name} was killed by {self.signal}", hint)
        code = EXIT_BAD_INPUT if self.returncode == EXIT_BAD_INPUT else None
        kind = kind if kind in KINDS else "runner_failed"
        if kind == "runner_failed" and any(
            os.strerror(n) in message for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ):
            kind = "disk_full"  # where even its last event found no room
        message = message or f"{self.name} failed with exit code {self.returncode}"
        return ToyError(kind, message, hint or "`toy doctor` looks at this machine", exit_code=code)


def _oom_kills() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class _Lines:
    """Whole lines out of a pipe's pieces."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self.take, self.rest = take, b""

    def feed(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.take(line.decode("utf-8", "replace"))

    def close(self) -> None:
        if self.rest:
            self.feed(b"\n")


def launch(
    target: str,
    env: Mapping[str, str],
    *,
    variant: str = "native",
    on_stdout: Callable[[str], None] = lambda line: None,
    on_stderr: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Result:
    """Run a built runner to its end, in its own process group and with nothing but `env` in its environment.

    `on_stdout` and `on_stderr` get whole lines as they come, `on_tick` is called about ten times a second. The first
    Ctrl-C or SIGTERM is passed on as one SIGINT (the runner saves and leaves), the second kills. For the main thread.
    An exception out of a callback ends the runner in the same way, and is raised again.
    """
    path = find_root().runner(target, variant)
    tail: deque[str] = deque(maxlen=TAIL)
    before, begun = _oom_kills(), time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    stops = 0

    def stop(_number: int = 0, _frame: object = None) -> None:
        nonlocal stops
        stops += 1
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGINT if stops == 1 else signal.SIGKILL)

    def stderr_line(line: str) -> None:
        tail.append(line)
        on_stderr(line)

    failure: BaseException | None = None
    told = False
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {
        number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        try:
            process = subprocess.Popen(
                [str(path)], env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, process_group=0, pass_fds=tuple(pass_fds), bufsize=0,
                restore_signals=False,  # SIGPIPE and SIGXFSZ stay ignored, as Python has them: a full disk is an error
            )  # fmt: skip
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            device = RUNNERS.get(target, "cpu")
            hint = f"`toy install{'' if device == 'cpu' else f' --device {device}'}` builds the runners again"
            raise ToyError("runner_failed", f"cannot start {path}: {reason}", hint) from error
        if stops:
            os.killpg(process.pid, signal.SIGINT)
        with selectors.DefaultSelector() as selector:
            for pipe, take in ((process.stdout, on_stdout), (process.stderr, stderr_line)):
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, _Lines(take))
            while selector.get_map():
                ready = selector.select(0.1)
                try:
                    if stops and not told:
                        told = True
                        on_stop()
                    for key, _ in ready:
                        data = os.read(key.fd, 65536)
                        if not data:
                            selector.unregister(key.fileobj)
                        if failure is None or key.data.take is stderr_line:
                            key.data.feed(data) if data else key.data.close()
                    if failure is None:
                        on_tick()
                except Exception as error:
                    failure = failure or error
                    stop()
        returncode = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for pipe in (process.stdout, process.stderr) if process else ():
            if pipe is not None:
                pipe.close()
    if failure is not None:
        raise failure
    killed = returncode == -signal.SIGKILL and stops < 2
    return Result(target, returncode, list(tail), stops > 0, killed and _oom_kills() > before, time.monotonic() - begun)
