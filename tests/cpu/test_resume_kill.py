"""Every recipe killed with SIGKILL twenty times — during steps, saves, evaluations, the export, in later epochs —
and resumed each time: the same step lines, evaluations, checkpoint and weights, byte for byte, as the run that was
left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import JOBS, check_same


@pytest.mark.parametrize("name", JOBS)
def test_killed_twenty_times_it_leaves_the_same_bytes(name: str, built: None, tmp_path: Path) -> None:
    print(f"\n{name}: {check_same(JOBS[name], tmp_path, steps=180, n_kills=20)}")
