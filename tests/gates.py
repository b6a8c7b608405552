"""The gates under data/gates/: each a NAME.yml, repeated as data/gates/README.md says, and NAME.txt, its recorded
step lines.

    python tests/gates.py [NAME ...]        record them anew (all of them, unless named)
    python tests/gates.py --base            make shakespeare-mixed.gguf anew; then lora and warm-start change too
    python tests/gates.py --device cuda     record those of a device, DEVICE/NAME.txt, and which one it is
                          --steps 5         only so many steps: one of a device made of software takes a second or two
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gguf_files import rewrite
from harness import EXCERPT, ROOT, Result, Toy, sets

from toy.runs import bundle

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


#: How a gate runs on another device: in f32, whatever that device would rather train in.
ON_DEVICE = sets({"run.build": "native", "train.dtype": "f32"})


def circumstances(device: str) -> str:
    """What the bytes of a device hang on: it and its driver, and the processor, which is the device where that is made
    of software."""
    cpu = bundle.cpu_info()
    return f"{bundle.gpu_name(device)}; {cpu['name']}: {' '.join(cpu['simd'])}"


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--device", default="")
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))}: of {', '.join(NAMES)}")
    folder = GATES / args.device
    if args.steps and not args.device:
        parser.error("--steps is for the gates of a device")
    flags = ("--device", args.device, *ON_DEVICE) if args.device else ()
    flags += ("--steps", args.steps) if args.steps else ()
    with tempfile.TemporaryDirectory() as scratch:
        toy = Toy(Path(scratch))
        if args.base:
            make_base(toy)
        for name in args.names or NAMES:
            train(toy, name, "--out", name, *flags).ok()
            folder.mkdir(exist_ok=True)
            toy("gate", "record", name, folder / f"{name}.txt", "--force").ok()
            print(name, (folder / f"{name}.txt").read_text().splitlines()[-1])
            if args.device:
                (folder / "device").write_text(circumstances(args.device) + "\n")


if __name__ == "__main__":
    main()
