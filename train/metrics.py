"""metrics.jsonl: a line of numbers for each step and each validation."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.trackers import Tracker, flatten
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.jsonl import read_lines

if TYPE_CHECKING:  # `python -m train.plot` reads metrics without jax
    from train.step import Metrics


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file without a last line that was cut off while it was written.

    Raises `InputError` if another line is damaged.
    """
    if not path.exists():
        return []
    try:
        texts = read_lines(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): take the damaged lines out, or remove it.") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line) and line["step"] >= (lines[-1]["step"] if lines else 0):
            lines.append(line)
        elif number < len(texts):  # the last text is a line that was cut off, or empty
            raise InputError(f"{path} line {number} is damaged ({text[:40]!r}): take it out, or remove the file.")
    return lines


_DEPTHS = {"half_variance": 1, "streams": 1, "grad_norms": 1, "lr": 1, "ttt": 2}
"""Names of groups of numbers, and how deep their numbers lie."""
_NEVER_NULL = {"step", "skipped", "seconds", "frames_per_second", "frames"}
"""Names of numbers that are never null; others are null if not finite, or if nothing was scored."""
_TRAINING = {"loss", "half_variance", "streams", "grad_norm", "lr", "skipped", "ttt", "seconds", "frames_per_second"}
"""Names in the line of a training step, beside the step."""


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    validation = line.get("validation", {})
    return (
        isinstance(validation, dict)
        and line.keys() >= ({"validation", "seconds"} if "validation" in line else _TRAINING)
        and isinstance(line.get("skipped_for", ""), str)
        and all(
            _is_number(name, value, _DEPTHS.get(name, 0))
            for name, value in [*line.items(), *validation.items()]
            if name not in ("skipped_for", "validation")
        )
    )


def _is_number(name: str, value: Any, depth: int) -> bool:
    """Whether a value is a finite number, a null that `name` allows, or a group of these, `depth` groups deep."""
    if depth:
        return isinstance(value, dict) and all(_is_number(*item, depth - 1) for item in value.items())
    if value is None:
        return name not in _NEVER_NULL
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class MetricsLog:
    """Writes a run's metrics to `path` and to `trackers`; a resumed run continues the file behind step `done`.

    Without `path` this process checks the numbers, and another one writes. `streams` names the entries of
    `Metrics.streams`. Every `every` steps have a line, and the first and the last step. `skips` steps may be skipped
    because a value is not finite.
    """

    def __init__(
        self,
        path: Path | None,
        streams: Sequence[str],
        every: int,
        last_step: int,
        done: int,
        skips: int = 0,
        trackers: Sequence[Tracker] = (),
    ):
        self._streams, self._every, self._last_step, self._skips = streams, every, last_step, skips
        self._trackers, self._file, self._before = trackers, None, 0.0
        if path is not None:
            kept = [line for line in read(path) if line["step"] <= done]
            write_atomically(path, "".join(map(_as_line, kept)).encode())  # a kill in between must not lose the lines
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._mark = time.perf_counter()
        self._frames = 0
        self.rate = 0.0
        """Frames per second between the last two lines, without pauses."""

    def add(self, step: int, metrics: Metrics, frames: int, files: Mapping[tuple[int, int], str]) -> dict[str, Any]:
        """Returns the step's line and writes it if it is due.

        `frames` are the valid frames of the step, `files` their names by chunk and row. Raises `InputError` if loss,
        gradient or state are not finite more often than may be skipped.
        """
        import jax

        values = jax.device_get(metrics)
        line = {
            "step": step,
            "loss": finite(values.loss),
            "half_variance": _finite(dict(zip(self._streams, values.half_variance, strict=True))),
            "streams": _finite(dict(zip(self._streams, values.streams, strict=True))),
            "grad_norm": finite(values.grad_norm),
            "grad_norms": _finite(values.grad_norms),
            "lr": {group: float(rate) for group, rate in values.rates.items()},
            "skipped": int(values.skipped),
            "ttt": {str(layer): _finite(summary) for layer, summary in values.ttt.items()},
        }
        if not values.finite:
            reason = _not_finite(step, values, files)
            stops = "so the run stops with its last checkpoint as it was: start anew (--from) with a lower optim.lr,"
            if not self._skips:
                raise InputError(
                    f"{reason}, {stops} optim.ttt_lr or model.ttt.base_lr, a higher optim.warmup_steps, or let such"
                    " steps be skipped by --optim.skips."
                )
            if values.skipped > self._skips:
                raise InputError(
                    f"{reason}, and optim.skips={self._skips} such steps were skipped before, {stops} optim.ttt_lr or"
                    " model.ttt.base_lr."
                )
            line["skipped_for"] = reason
        self._frames += frames
        now = time.perf_counter()
        if step % self._every == 0 or step in (1, self._last_step) or "skipped_for" in line:
            self.rate = self._frames / max(now - self._mark, 1e-9)
            self._mark, self._frames = now, 0
            self._write({**line, "seconds": self._seconds(), "frames_per_second": self.rate})
        return line

    def add_validation(self, step: int, values: dict[str, Any]) -> None:
        """Writes the line of a validation after `step`."""
        self._write({"step": step, "validation": values, "seconds": self._seconds()})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time meanwhile does not count for the rate."""
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    def close(self) -> None:
        """Closes the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _seconds(self) -> float:
        return round(self._before + time.perf_counter() - self._start, 3)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(_as_line(line))
        for tracker in self._trackers:
            tracker.write(line["step"], flatten(line))


def _not_finite(step: int, values: Metrics, files: Mapping[tuple[int, int], str]) -> str:
    """Names the numbers, groups and files that are not finite."""
    scalars = {"loss": values.loss, "grad_norm": values.grad_norm}
    what = [f"{name} is {value}" for name, value in scalars.items() if not math.isfinite(value)]
    groups = [name for name, norm in values.grad_norms.items() if not math.isfinite(norm)]
    places = map(tuple, np.argwhere(~np.isfinite(values.rows)).tolist())
    rows = sorted({files.get(place, f"row {place[1]} (another process names its file)") for place in places})
    sentence = f"step {step}: {' and '.join(what) or 'the state that the step leaves is not finite'}"
    if groups:
        sentence += f", the gradient of {', '.join(groups)}"
    if rows:
        return f"{sentence}, in {', '.join(rows)}"
    return f"{sentence}, the losses of all rows are finite ({', '.join(sorted(set(files.values())))})"


def finite(value: Any) -> float | None:
    """A number, or None if it is not finite, as for streams without targets."""
    return float(value) if math.isfinite(value) else None


def _finite(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
