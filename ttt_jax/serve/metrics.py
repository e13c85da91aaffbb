"""What `/metrics` states, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAST = 1000
"""Ticks that the quantiles are of."""


class Metrics:
    """Counts since the start."""

    def __init__(self) -> None:
        self.begun = self.refused = self.frames = self.dropped = self.ticks = 0
        self.seconds = 0.0
        self._last: deque[float] = deque(maxlen=LAST)

    def tick(self, seconds: float, frames: int) -> None:
        """Counts a step of `frames` rows."""
        self.ticks += 1
        self.seconds += seconds
        self.frames += frames
        self._last.append(seconds)

    def quantile(self, share: float) -> float:
        """Of the seconds of the last ticks; 0 before the first."""
        last = sorted(self._last)
        return last[min(int(share * len(last)), len(last) - 1)] if last else 0.0

    def text(self, talks: int, rows: int) -> str:
        """The page, with `talks` of `rows` taken."""
        lines = []
        for name, kind, about, value in (
            ("talks", "gauge", "Talks that run or wait to be taken up.", talks),
            ("rows", "gauge", "Talks that can run at once.", rows),
            ("talks_total", "counter", "Talks that have begun.", self.begun),
            ("refused_total", "counter", "Clients that were refused for want of a row.", self.refused),
            ("frames_total", "counter", "Frames that were heard.", self.frames),
            ("dropped_frames_total", "counter", "Frames that came faster than they were heard.", self.dropped),
            ("resident_memory_bytes", "gauge", "Resident memory of the process.", resident_bytes()),
        ):
            lines += [f"# HELP ttt_jax_{name} {about}", f"# TYPE ttt_jax_{name} {kind}", f"ttt_jax_{name} {value}"]
        name = "ttt_jax_tick_seconds"
        lines += [f"# HELP {name} Time of a step of all talks; quantiles of the last {LAST}.", f"# TYPE {name} summary"]
        lines += [f'{name}{{quantile="{share}"}} {self.quantile(share):.6f}' for share in (0.5, 0.9, 0.99)]
        lines += [f"{name}_sum {self.seconds:.6f}", f"{name}_count {self.ticks}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
