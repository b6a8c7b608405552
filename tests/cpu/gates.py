"""The gates under data/gates/: each a NAME.yml, repeated as data/gates/README.md says, and NAME.txt, its recorded
step lines.

    python tests/cpu/gates.py [NAME ...]        record them anew (all of them, unless named)
    python tests/cpu/gates.py --base            make shakespeare-mixed.gguf anew; then lora and warm-start change too
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from gguf_files import rewrite
from harness import EXCERPT, ROOT, Result, Toy, sets

GATES = ROOT / "data" / "gates"
NAMES = sorted(path.stem for path in GATES.glob("*.yml"))
#: The base of lora and warm-start, and the type of each of its matrices: every type that a base comes in.
BASE = GATES / "shakespeare-mixed.gguf"
TYPES = {
    "token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "F16", "attn_output": "BF16",
    "ffn_gate": "Q4_0", "ffn_up": "Q8_0", "blk.0.ffn_down": "Q4_K", "blk.1.ffn_down": "Q6_K",
}  # fmt: skip


def train(toy: Toy, name: str, *more: object) -> Result:
    return toy("train", "--config", GATES / f"{name}.yml", "--no-sample", *more, timeout=900)


def make_base(toy: Toy) -> None:
    """A llama of 140,000 parameters, trained for half a minute, its matrices rounded to TYPES."""
    shape = {
        "model.n_layer": 2, "model.n_embd": 64, "model.n_head": 4, "model.n_head_kv": 2, "model.n_ff": 256,
        "model.context": 128, "data.tokenizer": "bytes", "train.batch": 16, "train.learning_rate": 3e-3,
        "run.build": "portable", "run.name": "shakespeare-mixed",
    }  # fmt: skip
    toy("train", "--corpus", EXCERPT, "--steps", 400, *sets(shape), "--no-sample", "--out", "base", timeout=900).ok()
    kinds = {f"{part}.weight": kind for part, kind in TYPES.items()}

    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        return next((kind for part, kind in kinds.items() if name.endswith(part)), "F32")

    rewrite(toy.cwd / "base" / "weights" / "model.gguf", BASE, kind_of)
    print(BASE.name, BASE.stat().st_size, "bytes")


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--base"] or NAMES
    with tempfile.TemporaryDirectory() as scratch:
        toy = Toy(Path(scratch))
        if "--base" in sys.argv:
            make_base(toy)
        for name in names:
            train(toy, name, "--out", name).ok()
            toy("gate", "record", name, GATES / f"{name}.txt", "--force").ok()
            print(name, (GATES / f"{name}.txt").read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
