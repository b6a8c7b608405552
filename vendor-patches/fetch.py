"""Download, verify, unpack and patch ggml: python vendor-patches/fetch.py DEST

DEST becomes a ggml source tree with every vendor-patches/*.patch applied in file-name order. The sdist stays beside it,
so that patching again needs no network. Only the standard library: CMake runs this before anything is installed.

Nothing is ever half done: the tree is made in a temporary directory beside DEST and renamed, and DEST is left as it was
when a hash is wrong or a patch does not apply. Running it again when nothing changed costs a stat and a hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent

# What toy builds now, or is to build later (CUDA, Metal, Vulkan), out of the 29 MB of the sdist.
WANTED = (
    "CMakeLists.txt",
    "LICENSE",
    "AUTHORS",
    "ggml.pc.in",
    "cmake/",
    "include/",
    "src/",
    "tests/",
)
UNWANTED = tuple(
    f"src/ggml-{name}/"
    for name in (
        "cann",
        "et",
        "hexagon",
        "hip",
        "musa",
        "opencl",
        "openvino",
        "rpc",
        "sycl",
        "virtgpu",
        "webgpu",
        "zdnn",
        "zendnn",
    )
)


class Failure(Exception):
    """A one-line message and a one-line hint."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def read_upstream() -> dict[str, str]:
    """The `key = value` lines of UPSTREAM."""
    lines = (line.split("#")[0] for line in (HERE / "UPSTREAM").read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def stamp_of(patches: list[Path]) -> str:
    """Everything that decides what the tree holds, in one hash."""
    total = hashlib.sha256()
    for path in [HERE / "UPSTREAM", HERE / "fetch.py", *patches]:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_environment() -> dict[str, str]:
    """The environment in which `python -m pip` works.

    Inside pip's own build isolation the outer pip is hidden by a PYTHONPATH; without that it is there again.
    """
    plain = {key: value for key, value in os.environ.items() if key not in ("PIP_BUILD_TRACKER", "PIP_REQ_TRACKER")}
    bare = {key: value for key, value in plain.items() if key != "PYTHONPATH"}
    for env in (plain, bare):
        if (
            subprocess.run([sys.executable, "-c", "import pip"], env=env, capture_output=True, check=False).returncode
            == 0
        ):
            return env
    raise Failure(f"{sys.executable} has no pip, which downloads ggml", "run `python -m ensurepip`, then try again")


def download(upstream: dict[str, str], sdist: Path, work: Path) -> None:
    """Put the verified sdist at `sdist`, by pip, so that a configured mirror or proxy is honoured."""
    print(
        f"fetching {upstream['package']} {upstream['version']} (ggml {upstream['ggml']})", file=sys.stderr, flush=True
    )
    requirements = work / "requirements.txt"
    requirements.write_text(f"{upstream['package']}=={upstream['version']} --hash=sha256:{upstream['sha256']}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
    ]
    command += ["--no-binary", upstream["package"], "--require-hashes", "-r", str(requirements), "-d", str(work)]
    done = subprocess.run(
        command, env=pip_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stdout:
            raise wrong_hash(upstream)
        last = next(
            (line for line in reversed(done.stdout.splitlines()) if line.startswith("ERROR")), "ERROR: no reason given"
        )
        raise Failure(
            f"pip could not download {upstream['package']}=={upstream['version']}: {last.removeprefix('ERROR: ')}",
            f"check the network or pip's index, or put the sdist at {sdist}",
        )
    found = next(iter(sorted(work.glob("*.tar.gz"))), None)
    if found is None:
        raise Failure(f"pip downloaded no sdist of {upstream['package']}", "an index that serves sdists is needed")
    if sha256_of(found) != upstream["sha256"]:
        raise wrong_hash(upstream)
    os.replace(found, sdist)


def wrong_hash(upstream: dict[str, str]) -> Failure:
    return Failure(
        f"{upstream['package']}=={upstream['version']} does not have the sha256 that vendor-patches/UPSTREAM names",
        "do not build from it; restore vendor-patches/UPSTREAM, or ask who serves your package index",
    )


def unpack(sdist: Path, tree: Path) -> None:
    """The wanted files of `<top>/ggml/` in the sdist, at `tree`."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or len(parts) < 3 or parts[1] != "ggml" or ".." in parts:
                continue
            name = "/".join(parts[2:])
            if not name.startswith(WANTED) or name.startswith(UNWANTED):
                continue
            source = archive.extractfile(member)
            assert source is not None
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            os.utime(target, (member.mtime, member.mtime))


RESTORE = "restore vendor-patches/, or refresh the patch as vendor-patches/README.md says"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def apply_patch(patch: Path, tree: Path) -> None:
    """Apply one unified diff (paths a/… b/…). The context must match exactly, at the line named: no fuzz, no offset."""
    lines = patch.read_text(encoding="utf-8").split("\n")
    at = 0
    files = 0
    while at < len(lines):
        if not lines[at].startswith("--- ") or at + 1 == len(lines) or not lines[at + 1].startswith("+++ "):
            if HUNK.match(lines[at]):
                raise Failure(f"vendor-patches/{patch.name} is damaged: line {at + 1} has no file", RESTORE)
            at += 1
            continue
        old_name, new_name = lines[at][4:].split("\t")[0], lines[at + 1][4:].split("\t")[0]
        at += 2
        files += 1
        name = (old_name if new_name == "/dev/null" else new_name)[2:]
        target = tree / name
        if tree not in target.resolve().parents:
            raise Failure(f"{patch.name} reaches outside the tree: {name}", "paths in a patch are relative to ggml")
        if old_name == "/dev/null":
            if target.exists():
                raise does_not_apply(patch, name, "the file is already there")
            old: list[str] = []
        elif target.is_file():
            old = target.read_text(encoding="utf-8").split("\n")
        else:
            raise does_not_apply(patch, name, "there is no such file")
        new: list[str] = []
        taken = 0
        while at < len(lines) and (hunk := HUNK.match(lines[at])):
            start, old_left, new_left = int(hunk[1]), int(hunk[2] or 1), int(hunk[4] or 1)
            begin = max(start - 1, 0) if old_left else start
            new += old[taken:begin]
            taken = begin
            at += 1
            while old_left > 0 or new_left > 0:
                if at == len(lines) or lines[at][:1] not in (" ", "-", "+", ""):
                    raise Failure(f"vendor-patches/{patch.name} is damaged: line {at + 1} ends a hunk early", RESTORE)
                mark, text = lines[at][:1], lines[at][1:]
                if mark in (" ", "-", ""):
                    if taken >= len(old) or old[taken] != text:
                        raise does_not_apply(patch, name, f"line {taken + 1} is not {text.strip()[:60]!r}")
                    taken, old_left = taken + 1, old_left - 1
                if mark in (" ", "+", ""):
                    new.append(text)
                    new_left -= 1
                at += 1
            while at < len(lines) and lines[at].startswith("\\"):
                at += 1
        new += old[taken:]
        if new_name == "/dev/null":
            target.unlink()
            continue
        if old_name == "/dev/null":
            new.append("")  # a new file ends in a newline
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(new), encoding="utf-8", newline="\n")
    if files == 0:
        raise Failure(f"vendor-patches/{patch.name} holds no diff", RESTORE)


def does_not_apply(patch: Path, name: str, why: str) -> Failure:
    return Failure(f"vendor-patches/{patch.name} does not apply to {name}: {why}", RESTORE)


def keep_times(tree: Path, before: Path) -> None:
    """Files that did not change keep their time stamps, so that a rebuild compiles only what a patch touched."""
    now = time.time()
    for path in tree.rglob("*"):
        if not path.is_file():
            continue
        old = before / path.relative_to(tree)
        if old.is_file() and old.stat().st_size == path.stat().st_size and old.read_bytes() == path.read_bytes():
            stat = old.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        else:
            os.utime(path, (now, now))


def swap(tree: Path, dest: Path, work: Path) -> None:
    """Rename `tree` to `dest`; what was there goes into `work`, or comes back if the rename fails."""
    aside = work / "before"
    if dest.exists():
        os.rename(dest, aside)
    try:
        os.rename(tree, dest)
    except OSError:
        if aside.exists():
            os.rename(aside, dest)
        raise


def fetch(dest: Path) -> bool:
    """Bring `dest` up to date. True if anything had to be done."""
    upstream = read_upstream()
    patches = sorted(HERE.glob("*.patch"))
    stamp = stamp_of(patches)
    stamp_file = dest / ".toy-stamp"
    dest.parent.mkdir(parents=True, exist_ok=True)
    lock = (dest.parent / f".{dest.name}.lock").open("w")  # two builds may share DEST; the lock goes with the process
    if fcntl:
        fcntl.flock(lock, fcntl.LOCK_EX)
    if stamp_file.is_file() and stamp_file.read_text() == stamp:
        return False
    sdist = dest.parent / f"ggml-{upstream['version']}.tar.gz"
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as name:
        work = Path(name)
        if not sdist.is_file() or sha256_of(sdist) != upstream["sha256"]:
            download(upstream, sdist, work)
        tree = work / "tree"
        unpack(sdist, tree)
        for patch in patches:
            apply_patch(patch, tree.resolve())
        keep_times(tree, dest)
        (tree / ".toy-stamp").write_text(stamp)
        swap(tree, dest, work)
    return True


def terminated(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt  # so that the temporary directory is removed on SIGTERM too


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: fetch.py DEST", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, terminated)
    try:
        fetch(Path(argv[1]).resolve())
    except Failure as failure:
        print(f"error: {failure}\nhint: {failure.hint}", file=sys.stderr)
        return 1
    except (OSError, tarfile.TarError, EOFError) as error:
        print(
            f"error: cannot unpack ggml: {error}\nhint: free some space, or remove {argv[1]} and try again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
