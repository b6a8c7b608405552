"""The GGUF files on this machine, where people's tools keep them, each once by its real path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from toy.errors import ToyError
from toy.models import cards

_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_DEPTH = 6  # folders below a root that are looked into


@dataclass
class Found:
    """A model as its user knows it: `name` is `name:tag` for Ollama, `repo/file` for a hub, else a path."""

    source: str
    name: str
    path: Path
    also: list[str] = field(default_factory=list)
    card: cards.Card | None = None
    error: str | None = None


def discover(project: Path | None = None, *, read: bool = True) -> list[Found]:
    """Every model found, in the order of the places looked at. `read=False`: names and paths only.

    Broken files are listed with their `error`. Files that hold a tokenizer alone are left out.
    """
    seen: dict[str, Found] = {}
    for found in _everywhere(project or Path.cwd()):
        real = os.path.realpath(found.path)
        if real in seen:
            if found.name not in (seen[real].name, *seen[real].also):
                seen[real].also.append(found.name)
            continue
        seen[real] = found
        if read:
            try:
                found.card = cards.read(found.path)
            except ToyError as error:
                found.error = error.message
    return [found for found in seen.values() if found.card is None or found.card.tensors]


def _everywhere(project: Path) -> Iterator[Found]:
    for folder in ("data", "runs"):
        for path in _ggufs(project / folder):
            if path.name != "tokenizer.gguf":
                yield Found("project", path.relative_to(project).as_posix(), path)
    for root in os.environ.get("TOY_MODEL_DIR", "").split(os.pathsep):
        if root:
            folder_path = Path(root).expanduser()
            for path in _ggufs(folder_path):
                yield Found("TOY_MODEL_DIR", path.relative_to(folder_path).as_posix(), path)
    yield from _hugging_face()
    yield from _ollama()
    for folder_path in _lm_studio_folders():
        for path in _ggufs(folder_path):
            yield Found("LM Studio", path.relative_to(folder_path).as_posix(), path)


def _ggufs(root: Path, depth: int = _DEPTH) -> list[Path]:
    """Files named *.gguf under `root`, sorted; links to files are followed, links to folders are not.

    What a checkpoint holds is left out: weights among moments, which are no model to run.
    """
    found: list[Path] = []
    start = len(root.parts)
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        deeper = len(here.parts) - start < depth
        folders[:] = sorted(f for f in folders if deeper and not f.startswith(".") and f != "checkpoints")
        found += [here / name for name in sorted(names) if name.lower().endswith(".gguf")]
    return found


def _home() -> Path:
    return Path(os.path.expanduser("~"))


def _hugging_face() -> Iterator[Found]:
    """`models--owner--repo/snapshots/<revision>/file`, links into `blobs/`."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(_home() / ".cache")
    home = os.environ.get("HF_HOME") or str(Path(cache) / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub")
    for repo in _folders(hub.expanduser()):
        if not repo.name.startswith("models--"):
            continue
        name = repo.name.removeprefix("models--").replace("--", "/")
        for revision in _folders(repo / "snapshots"):
            for path in _ggufs(revision):
                yield Found("Hugging Face", f"{name}/{path.relative_to(revision).as_posix()}", path)


def _ollama() -> Iterator[Found]:
    """`manifests/<host>/<owner>/<name>/<tag>`, JSON that names a blob."""
    stated = os.environ.get("OLLAMA_MODELS")
    roots = (
        [Path(stated).expanduser()]
        if stated
        else [_home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]
    )
    for root in roots:
        manifests = root / "manifests"
        for folder, folders, names in os.walk(manifests):
            folders.sort()
            for tag in sorted(names):
                found = _ollama_model(root, manifests, Path(folder) / tag)
                if found is not None:
                    yield found


def _ollama_model(root: Path, manifests: Path, manifest: Path) -> Found | None:
    parts = manifest.relative_to(manifests).parts
    if len(parts) < 4 or manifest.name.startswith("."):
        return None
    host, owner, *names, tag = parts
    name = "/".join(names)
    if owner != "library" or host != "registry.ollama.ai":
        name = f"{owner}/{name}"
    if host != "registry.ollama.ai":
        name = f"{host}/{name}"
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        digest = next((layer["digest"] for layer in layers if layer.get("mediaType") == _OLLAMA_MODEL), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Found("Ollama", f"{name}:{tag}", manifest, error=f"{manifest}: not a manifest ({error})")
    if digest is None:
        return None
    return Found("Ollama", f"{name}:{tag}", root / "blobs" / str(digest).replace(":", "-"))


def _lm_studio_folders() -> list[Path]:
    home = _home()
    try:
        stated = Path((home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip())
    except OSError:
        stated = home / ".lmstudio"
    return list(dict.fromkeys([stated / "models", home / ".lmstudio/models", home / ".cache/lm-studio/models"]))


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:
        return []
