"""tests/cpu/test_resume_kill.py at other moments: a hundred more kills a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import JOBS, check_same


@pytest.mark.parametrize("seed", range(2, 7))
@pytest.mark.parametrize("name", JOBS)
def test_killed_twenty_times_it_leaves_the_same_bytes(name: str, seed: int, built: None, tmp_path: Path) -> None:
    print(f"\n{name}: {check_same(JOBS[name], tmp_path, steps=180, n_kills=20, seed=seed)}")
