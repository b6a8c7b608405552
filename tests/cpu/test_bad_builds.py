"""Builds that cannot be, fail or are interrupted: no half a runner is left, and nothing beside the build's folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from harness import TINY, Toy, is_alive, tree, wait_for
from refusals import check_document, check_lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The runners' source without anything built; what a fetch once downloaded comes along."""
    from toy.builds import find_root

    root = find_root()
    copy = tmp_path / "source"
    for name in ("native", "vendor-patches"):
        shutil.copytree(root.source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root.source / "CMakeLists.txt", copy)
    for sdist in root.build.glob("*.tar.gz"):
        (copy / "build").mkdir(exist_ok=True)
        shutil.copy(sdist, copy / "build")
    return copy


def test_no_compiler(cold_toy: Toy, source: Path, tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "bin").mkdir()
    env = {"TOY_HOME": str(source), "PATH": str(tmp_path / "bin"), "CXX": None, "CC": None}
    before = tree(source, cold_toy.cwd, Path(home["HOME"]))
    message, hint = check_lines(cold_toy("train", *TINY, env=env), "build_failed")
    assert "compiler" in message
    assert "g++" in hint
    check_document(cold_toy("train", *TINY, "--json", env=env), "build_failed")
    wrong, _ = check_lines(cold_toy("train", *TINY, env=env | {"CXX": "no-such-compiler"}), "build_failed")
    assert "no-such-compiler" in wrong
    assert tree(source, cold_toy.cwd, Path(home["HOME"])) == before


def test_a_build_that_fails(cold_toy: Toy, source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'error: this compiler is out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    env = {"TOY_HOME": str(source), "CXX": str(compiler)}
    message, hint = check_lines(cold_toy("train", *TINY, env=env), "build_failed")
    assert "compiler" in message
    assert "build.log" in hint
    assert not (source / "libexec").exists()
    assert not list(cold_toy.cwd.iterdir())


@pytest.mark.parametrize("group", [True, False], ids=["terminal", "alone"])
def test_ctrl_c_during_the_build(cold_toy: Toy, source: Path, group: bool) -> None:
    with cold_toy.start("train", *TINY, env={"TOY_HOME": str(source)}) as process:
        objects = source / "build" / "native" / "ggml"
        wait_for(lambda: next(objects.rglob("*.o"), None), 300, "the first object", process)
        family = process.children()
        process.interrupt(group)
        result = process.finish(30)
        left = [pid for pid in family if is_alive(pid)]
    check_lines(result, "interrupted")
    assert result.stdout == ""
    assert left == []
    assert not (source / "libexec").exists()
    assert not (source / "build" / "native" / "toy-stamp.json").exists()
    assert not list(cold_toy.cwd.iterdir())


def test_a_wrong_hash_leaves_nothing(cold_toy: Toy, source: Path) -> None:
    sdists = list((source / "build").glob("*.tar.gz")) if (source / "build").is_dir() else []
    if not sdists:
        pytest.skip("no downloaded ggml beside the build")
    patch = next((source / "vendor-patches").glob("0001*.patch"))
    patch.write_text(patch.read_text().replace("@@ -", "@@ -9", 1))
    told = cold_toy("install", env={"TOY_HOME": str(source)})
    message, _ = check_lines(told, "build_failed")
    assert "0001" in message
    assert not (source / "build" / "ggml-src").exists()
    assert not (source / "libexec").exists()


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_devices_of_other_machines(cold_toy: Toy, source: Path, device: str) -> None:
    """Said before any build: the source is fresh, and stays so."""
    if device == "metal" and sys.platform == "darwin":
        pytest.skip("metal is here")
    # where nvcc is, the reason is another (there are no cuda runners yet), and nothing else differs
    env = {"TOY_HOME": str(source), "CUDA_HOME": None, "CUDA_PATH": None}
    before = tree(source)
    told = cold_toy("train", *TINY, "--device", device, env=env)
    message, hint = check_lines(told, "not_available")
    assert device in message
    assert "cpu" in hint
    check_document(cold_toy("train", *TINY, "--device", device, "--json", env=env), "not_available")
    assert tree(source) == before
    assert not list(cold_toy.cwd.iterdir())
