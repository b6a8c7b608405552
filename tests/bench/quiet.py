"""Whether a machine is quiet enough to measure on: what other programs computed while one side had its turn."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

#: Share of the machine that others may take in a turn. Two programs that both want all cores slow each other down by
#: far more than their share, and not alike.
OTHERS = 0.05
PATIENCE = 600.0  # seconds to wait for a quiet machine, in all

TICKS = os.sysconf("SC_CLK_TCK")


class Busy(Exception):
    """The machine was never quiet."""


def all_seconds() -> float | None:
    """CPU seconds of everything since boot; None where that is not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS


def own_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of this process, of children that have ended, and of those in `pids` that have not."""
    total = sum(os.times()[:4])
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


class Quiet:
    """Runs turns, and repeats one during which others computed more than OTHERS of the machine, unless told not to
    guard."""

    def __init__(self, guards: bool = True) -> None:
        self.guards = guards
        self.worst = 0.0  # of the turns that count
        self.repeated = 0
        self.left = PATIENCE
        self.pids: set[int] = set()  # our children that wait

    def turn(self, run: Callable[[], None], undo: Callable[[], object]) -> None:
        """One turn. `undo` takes back what a turn that does not count has noted down."""
        while True:
            begun, total, own = time.monotonic(), all_seconds(), own_seconds(self.pids)
            run()
            now = all_seconds()
            if total is None or now is None or not self.guards:
                return
            others = (now - total) - (own_seconds(self.pids) - own)
            share = max(0.0, others / (time.monotonic() - begun) / (os.cpu_count() or 1))
            if share <= OTHERS:
                self.worst = max(self.worst, share)
                return
            undo()
            self.repeated += 1
            print(f"others used {100 * share:.0f} % of the machine: that turn is repeated", file=sys.stderr)
            self.left -= time.monotonic() - begun + 5
            if self.left < 0:
                raise Busy(f"other programs use {100 * share:.0f} % of this machine: end them, or measure later")
            time.sleep(5)
