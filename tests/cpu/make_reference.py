"""Write tests/cpu/reference/*.json with PyTorch: python tests/cpu/make_reference.py

Needed when a case of parity.py, toy's initial weights or its data order change on purpose.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from parity import DUMPED, REFERENCE, run_torch  # noqa: E402


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for case in DUMPED:
            path = REFERENCE / f"{case.name}.json"
            run_torch(case, Path(scratch)).write(path)
            print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
