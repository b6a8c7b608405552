"""Locating, launching and ending runners. Those here are scripts: what is tested is how a process is treated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from toy import builds, runners
from toy.errors import ToyError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> builds.Root:
    for name in ("native", "vendor-patches", "libexec"):
        (tmp_path / name).mkdir()
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setenv("TOY_HOME", str(tmp_path))
    return builds.find_root()


def script(root: builds.Root, text: str) -> str:
    path = root.libexec / "fake"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return "fake"


def test_toy_home_must_be_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_HOME", str(tmp_path))
    with pytest.raises(ToyError, match="TOY_HOME") as caught:
        builds.find_root()
    assert caught.value.exit_code == 2


def test_no_compiler_is_said_before_anything_is_made(root: builds.Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ToyError, match=r"no C\+\+ compiler") as caught:
        builds.ensure_built(["toy-train"])
    assert (caught.value.kind, caught.value.exit_code) == ("build_failed", 1)
    assert "g++" in caught.value.hint
    assert not root.build.exists()


def test_a_build_that_fails_names_the_first_error(root: builds.Root, capsys: pytest.CaptureFixture[str]) -> None:
    (root.source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(x CXX)\nadd_executable(toy-train x.cpp)\n"
    )
    (root.source / "x.cpp").write_text("int main() { return nonsense; }\n")
    with pytest.raises(ToyError, match="nonsense") as caught:
        builds.ensure_built(["toy-train"])
    assert caught.value.kind == "build_failed"
    assert "build.log" in caught.value.hint
    assert not root.stamp("native").exists()
    assert os.listdir(root.libexec) == []
    assert "building toy-train" in capsys.readouterr().err


def test_a_build_is_fresh_until_a_source_or_the_runner_changes(root: builds.Root) -> None:
    (root.source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(x CXX)\nadd_executable(toy-train native/x.cpp)\n"
        "set_target_properties(toy-train PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${TOY_LIBEXEC})\n"
    )
    source = root.source / "native" / "x.cpp"
    source.write_text("int main() { return 3; }\n")
    path = builds.ensure_built(["toy-train"], quiet=True)["toy-train"]
    assert subprocess.run([path], check=False).returncode == 3
    assert os.listdir(root.libexec) == ["toy-train"], "no temporary file stays"
    assert builds.build_info()["compiler_version"]
    before = root.stamp("native").stat().st_mtime_ns
    assert builds.is_built(["toy-train"])
    builds.ensure_built(["toy-train"], quiet=True)
    assert root.stamp("native").stat().st_mtime_ns == before, "nothing was built"
    source.write_text("int main() { return 44; }\n")
    assert not builds.is_built(["toy-train"])
    builds.ensure_built(["toy-train"], quiet=True)
    assert subprocess.run([path], check=False).returncode == 44
    path.write_text("damaged")
    assert not builds.is_built(["toy-train"])


def test_each_device_is_built_where_it_is_asked_for_and_leaves_the_others_alone(root: builds.Root) -> None:
    (root.source / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.18)\nproject(x CXX)\nset(suffix "")\n'
        "if (NOT TOY_DEVICES STREQUAL cpu)\nset(suffix -${TOY_DEVICES})\nendif()\n"
        "foreach(name toy-train toy-train-vit)\nadd_executable(${name}${suffix} native/x.cpp)\n"
        'target_compile_definitions(${name}${suffix} PRIVATE DEVICE="${TOY_DEVICES}")\n'
        "set_target_properties(${name}${suffix} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${TOY_LIBEXEC})\nendforeach()\n"
    )
    (root.source / "native" / "x.cpp").write_text("#include <cstdio>\nint main() { puts(DEVICE); }\n")
    builds.ensure_built(["toy-train"], quiet=True)
    assert os.listdir(root.build) == ["native"], "nothing of a device that nobody asked for"
    before = root.stamp("native").read_bytes()
    paths = builds.ensure_built(["toy-train-vulkan", "toy-train"], quiet=True)
    for name, device in (("toy-train-vulkan", "vulkan"), ("toy-train", "cpu")):
        assert subprocess.run([paths[name]], check=True, capture_output=True, text=True).stdout == f"{device}\n"
    assert sorted(os.listdir(root.libexec)) == ["toy-train", "toy-train-vulkan"]
    assert root.stamp("native").read_bytes() == before
    assert builds.is_built(["toy-train-vulkan", "toy-train"])
    assert not builds.is_built(["toy-train-vulkan", "toy-train-vit-vulkan"])
    assert builds.build_info("native", "vulkan")["compiler_version"]


def test_lines_come_whole_and_the_environment_is_built_from_nothing(
    root: builds.Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    out: list[str] = []
    name = script(root, "printf 'a\\nb'; sleep 0.2; printf 'c\\nlast'; env >&2")
    result = runners.launch(name, runners.environment({"STEPS": 7}), on_stdout=out.append)
    assert out == ["a", "bc", "last"]
    assert result.returncode == 0
    assert result.error() is None
    assert "STEPS=7" in result.stderr
    assert "CUDA_VISIBLE_DEVICES=3" in result.stderr
    assert "GGML_NO_BACKTRACE=1" in result.stderr, "a debugger's words are no step lines"
    assert not any(line.startswith("SECRET") for line in result.stderr)


@pytest.mark.parametrize(
    ("text", "kind", "code", "message"),
    [
        (
            "echo 'error: the corpus is odd' >&2; echo 'hint: another' >&2; exit 2",
            "runner_failed",
            2,
            "the corpus is odd",
        ),
        ("echo 'error: no GGUF' >&2; echo 'kind: bad_file' >&2; exit 2", "bad_file", 2, "no GGUF"),
        ("echo 'error: no GGUF' >&2; echo 'kind: odd' >&2; exit 1", "runner_failed", 1, "no GGUF"),
        ("exit 1", "runner_failed", 1, "fake failed with exit code 1"),
        ("kill -SEGV $$", "runner_failed", 1, "fake was killed by SIGSEGV"),
        ("exit 130", "interrupted", 130, "interrupted"),
        ("echo 'error: cannot write x: No space left on device' >&2; exit 1", "disk_full", 1, "No space left"),
    ],
)
def test_how_it_ended(root: builds.Root, text: str, kind: str, code: int, message: str) -> None:
    error = runners.launch(script(root, text), {}).error()
    assert error is not None
    assert (error.kind, error.exit_code) == (kind, code)
    assert message in error.message
    assert error.hint


def test_only_the_last_lines_of_stderr_are_kept(root: builds.Root) -> None:
    result = runners.launch(script(root, "i=0; while [ $i -lt 50 ]; do echo line $i >&2; i=$((i+1)); done"), {})
    assert result.stderr == [f"line {n}" for n in range(30, 50)]


def test_a_runner_that_is_not_there(root: builds.Root) -> None:
    with pytest.raises(ToyError, match="cannot start") as caught:
        runners.launch("absent", {})
    assert caught.value.kind == "runner_failed"


def interrupt(_line: str = "") -> None:
    """Ctrl-C, here and now."""
    os.kill(os.getpid(), signal.SIGINT)


#: Says that it is up once it takes SIGINT; ends by itself long after the test's own limit.
PATIENT = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *a: None)
os.write(1, b"up\\n")
time.sleep(900)
"""
POLITE = PATIENT.replace("None", "(os.write(1, b'saved\\n'), os._exit(130))")


def test_one_interrupt_is_passed_on_once(root: builds.Root) -> None:
    out: list[str] = []
    told: list[str] = []
    (root.libexec / "fake.py").write_text(POLITE)
    name = script(root, f"exec {sys.executable} {root.libexec}/fake.py")

    def take(line: str) -> None:
        out.append(line)
        if line == "up":
            interrupt()

    result = runners.launch(name, runners.environment({}), on_stdout=take, on_stop=lambda: told.append("x"))
    assert out == ["up", "saved"]
    assert told == ["x"]
    assert result.stopped
    assert result.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"


def test_the_second_interrupt_kills(root: builds.Root) -> None:
    (root.libexec / "fake.py").write_text(PATIENT)
    name = script(root, f"exec {sys.executable} {root.libexec}/fake.py")
    result = runners.launch(name, runners.environment({}), on_stdout=interrupt, on_stop=interrupt)
    assert result.signal == "SIGKILL"
    assert result.interrupted
    error = result.error()
    assert error is not None
    assert error.kind == "interrupted"


def test_an_exception_in_a_callback_stops_the_runner(root: builds.Root) -> None:
    (root.libexec / "fake.py").write_text(POLITE)
    name = script(root, f"exec {sys.executable} {root.libexec}/fake.py")

    def fail(line: str) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        runners.launch(name, runners.environment({}), on_stdout=fail)
