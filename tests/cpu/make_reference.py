"""Write tests/cpu/reference/*.json with PyTorch: python tests/cpu/make_reference.py

Needed when a case of parity.py, toy's initial weights or its data order change on purpose.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from parity import CASES, REFERENCE, run_torch, write_tokens  # noqa: E402


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            tokens = write_tokens(Path(scratch) / "tokens.bin", case.knobs.model.vocab_size)
            path = REFERENCE / f"{case.name}.json"
            run_torch(case, tokens).write(path)
            print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
