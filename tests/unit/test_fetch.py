"""vendor-patches/fetch.py on a small sdist of our own: patched once, and never half done. No network."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCH = """what, why and test

--- a/src/ggml.c
+++ b/src/ggml.c
@@ -1,3 +1,3 @@
 int one;
-int two;
+int second;
 int three;
"""


class Vendor:
    """A folder with UPSTREAM, fetch.py and patches, and the place that ggml goes to."""

    def __init__(self, at: Path) -> None:
        self.folder, self.build = at / "vendor-patches", at / "build"
        self.dest = self.build / "ggml-src"
        self.folder.mkdir()
        self.build.mkdir()
        shutil.copy(ROOT / "vendor-patches" / "fetch.py", self.folder)
        self.sdist = self.build / "ggml-0.0.1.tar.gz"
        with tarfile.open(self.sdist, "w:gz") as archive:
            for name, text in {"src/ggml.c": "int one;\nint two;\nint three;\n", "src/other.c": "int other;\n"}.items():
                member = tarfile.TarInfo(f"upstream-0.0.1/ggml/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        self.upstream(hashlib.sha256(self.sdist.read_bytes()).hexdigest())
        self.patch(PATCH)

    def upstream(self, sha256: str) -> None:
        text = f"package = upstream\nversion = 0.0.1\nggml = 0.0.1\nsha256 = {sha256}\n"
        (self.folder / "UPSTREAM").write_text(text)

    def patch(self, text: str, name: str = "0001-second.patch") -> None:
        (self.folder / name).write_text(text)

    def fetch(self, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.folder / "fetch.py"), str(self.dest)]
        index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder)}
        return subprocess.run(
            command, env={**os.environ, **index, **env}, capture_output=True, text=True, timeout=120, check=False
        )

    def refused(self, *words: str) -> None:
        """One error line with these words, one hint line, and nothing that was not there before."""
        before = sorted(str(path) for path in self.build.rglob("*"))
        done = self.fetch()
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith("fetching ")]
        assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.stderr
        for word in words:
            assert word in lines[0]
        after = sorted(str(path) for path in self.build.rglob("*") if path.name != ".ggml-src.lock")
        assert after == [path for path in before if not path.endswith(".ggml-src.lock")]


@pytest.fixture
def vendor(tmp_path: Path) -> Vendor:
    return Vendor(tmp_path)


def test_patches_apply_once_and_in_order(vendor: Vendor) -> None:
    vendor.patch(PATCH.replace("int second;", "int zweites;").replace("int two;", "int second;"), "0002-third.patch")
    assert vendor.fetch().returncode == 0
    assert (vendor.dest / "src/ggml.c").read_text() == "int one;\nint zweites;\nint three;\n"
    before = (vendor.dest / "src/ggml.c").stat().st_mtime_ns
    assert vendor.fetch().returncode == 0
    assert (vendor.dest / "src/ggml.c").stat().st_mtime_ns == before


def test_only_what_a_patch_changes_gets_a_new_time(vendor: Vendor) -> None:
    assert vendor.fetch().returncode == 0
    times = {name: (vendor.dest / "src" / name).stat().st_mtime_ns for name in ("ggml.c", "other.c")}
    vendor.patch(PATCH.replace("int second;", "int another;"))
    assert vendor.fetch().returncode == 0
    assert (vendor.dest / "src/ggml.c").read_text() == "int one;\nint another;\nint three;\n"
    assert (vendor.dest / "src/ggml.c").stat().st_mtime_ns != times["ggml.c"]
    assert (vendor.dest / "src/other.c").stat().st_mtime_ns == times["other.c"]


@pytest.mark.parametrize("fetched", [False, True])
def test_a_patch_that_does_not_apply_leaves_the_old_tree(vendor: Vendor, fetched: bool) -> None:
    if fetched:
        assert vendor.fetch().returncode == 0
    vendor.patch(PATCH.replace("-int two;", "-int four;"))
    vendor.refused("0001-second.patch", "src/ggml.c")
    assert vendor.dest.exists() == fetched
    if fetched:
        assert (vendor.dest / "src/ggml.c").read_text() == "int one;\nint second;\nint three;\n"


def test_a_damaged_patch_is_named(vendor: Vendor) -> None:
    vendor.patch("nothing of a diff\n")
    vendor.refused("0001-second.patch")


def test_a_wrong_hash_is_refused_by_name(vendor: Vendor) -> None:
    shutil.move(vendor.sdist, vendor.folder / "upstream-0.0.1.tar.gz")  # what pip finds
    vendor.upstream("0" * 64)
    vendor.refused("upstream==0.0.1", "sha256")


def test_no_download_says_what_was_asked_for(vendor: Vendor) -> None:
    vendor.sdist.unlink()
    vendor.refused("upstream==0.0.1")
