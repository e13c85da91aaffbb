"""metrics.jsonl: one line of scalars for a step; and the check that they are numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from train.step import Metrics
from ttt_jax.errors import InputError
from ttt_jax.files import write_atomically


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off while it was written is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsLog:
    """Writes a run's metrics file; a resumed run continues it behind the step it resumes from."""

    def __init__(self, path: Path, streams: Sequence[str], every: int, last_step: int, done: int):
        self._streams = streams
        self._every = every
        self._last_step = last_step
        kept = [line for line in read(path) if line["step"] <= done]
        write_atomically(path, "".join(map(_as_line, kept)).encode())  # a kill in between must not lose the lines
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._mark = time.perf_counter()
        self._frames = 0
        self.rate = 0.0
        """Frames per second since the line before the last."""

    def add(self, step: int, metrics: Metrics, frames: int) -> dict[str, Any]:
        """The step's line, written if it is due; waits until the step is computed.

        Raises `InputError` if the loss or the gradient is not finite.
        """
        values = jax.device_get(metrics)
        line = {
            "step": step,
            "loss": float(values.loss),
            "half_variance": _finite(dict(zip(self._streams, values.half_variance, strict=True))),
            "streams": _finite(dict(zip(self._streams, values.streams, strict=True))),
            "grad_norm": float(values.grad_norm),
            "lr": {group: float(rate) for group, rate in values.rates.items()},
            "ttt": {str(layer): _finite(summary) for layer, summary in values.ttt.items()},
        }
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                raise InputError(
                    f"step {step}: {name} is {line[name]}, so the run stops with its last checkpoint as it was: lower"
                    " optim.lr, optim.ttt_lr or model.ttt.base_lr, or raise optim.warmup_steps."
                )
        self._frames += frames
        now = time.perf_counter()
        if step % self._every == 0 or step in (1, self._last_step):
            self.rate = self._frames / max(now - self._mark, 1e-9)
            self._mark, self._frames = now, 0
            seconds = round(self._before + now - self._start, 3)
            self._file.write(_as_line({**line, "seconds": seconds, "frames_per_second": self.rate}))
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers for JSON, which has no NaN: None for means of a stream without targets (speech without transcript)."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
