"""Every recipe killed with SIGKILL twenty times — during steps, saves, evaluations, the export, in later epochs —
and resumed each time: the same step lines, evaluations, checkpoint and weights, byte for byte, as the run that was
left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import JOBS, check_same, new_folder, run_through, start, weights_of


@pytest.mark.parametrize("name", JOBS)
def test_killed_twenty_times_it_leaves_the_same_bytes(name: str, built: None, tmp_path: Path) -> None:
    print(f"\n{name}: {check_same(JOBS[name], tmp_path, steps=180, n_kills=20)}")


@pytest.mark.parametrize("name", JOBS)
def test_stopped_by_sigterm_it_saves_and_goes_on(name: str, built: None, tmp_path: Path) -> None:
    job, steps = JOBS[name], 30
    files = job.files(new_folder(tmp_path / "data"))
    whole = run_through(job, job.environment(tmp_path / "whole", files, steps))
    running = start(job, job.environment(tmp_path / "stopped", files, steps))
    running.read(10)
    running.popen.terminate()
    stopped = running.end()
    assert stopped.code == 130, stopped.stderr
    latest = (stopped.run / "checkpoints" / "latest").resolve()
    assert latest.name == f"step_{len(stopped.lines)}", "it saves the step it stops at"
    resumed = run_through(job, job.environment(tmp_path / "resumed", files, steps, str(latest)))
    assert resumed.code == 0, resumed.stderr
    assert stopped.lines + resumed.lines == whole.lines
    assert weights_of(resumed.gguf) == weights_of(whole.gguf)
