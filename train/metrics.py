"""metrics.jsonl: a line of scalars for a step and for a validation; and the check that they are numbers."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.trackers import Tracker, flatten
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.jsonl import read_lines

if TYPE_CHECKING:  # `python -m train.plot` reads metrics without jax
    from train.step import Metrics


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off while it was written is left out.

    Raises `InputError` if another line is damaged.
    """
    if not path.exists():
        return []
    try:
        found = read_lines(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): take the damaged lines out, or remove it.") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(found, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line) and line["step"] >= (lines[-1]["step"] if lines else 0):
            lines.append(line)
        elif number < len(found):  # what follows the last line's end is a line that was cut off, or nothing
            raise InputError(f"{path} line {number} is damaged ({text[:40]!r}): take it out, or remove the file.")
    return lines


_GROUPED = {"half_variance", "streams", "grad_norms", "lr", "ttt", "validation"}
"""Values that have values of their own, by name."""
_KNOWN = {"step", "skipped", "seconds", "frames_per_second", "frames"}
"""Values that are always there: others are null where they were not finite, or nothing was scored."""
_TRAINING = {"loss", "half_variance", "streams", "grad_norm", "lr", "skipped", "ttt", "seconds", "frames_per_second"}
"""What a line has beside its step, unless it is a validation's."""


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    wanted = {"validation", "seconds"} if "validation" in line else _TRAINING
    told = isinstance(line.get("skipped_for", ""), str)
    numbers = {name: value for name, value in line.items() if name != "skipped_for"}
    return told and line.keys() >= wanted and _is_sound(numbers) and _is_sound(line.get("validation", {}))


def _is_sound(values: dict[str, Any]) -> bool:
    """Whether groups are where `_GROUPED` says so, numbers in all other places and in groups, null where it may be."""
    return all(
        is_number(value, name) and isinstance(value, dict) == (name in _GROUPED) for name, value in values.items()
    )


def is_number(value: Any, name: str) -> bool:
    """Whether a value is a finite number, null where `name` allows it, or a group of such."""
    if isinstance(value, dict):
        return all(is_number(one, own) for own, one in value.items())
    if value is None:
        return name not in _KNOWN
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class MetricsLog:
    """Writes a run's metrics file, and to `sinks` what it writes; a resumed run continues it behind the step it resumes from.

    Args:
      path: of the file; None: this process checks and counts, another one writes.
      streams: names of what `Metrics.streams` counts.
      every: steps between lines; the first and the last step have one in any case.
      skips: steps that may be left out for a value that is not finite.
    """

    def __init__(
        self,
        path: Path | None,
        streams: Sequence[str],
        every: int,
        last_step: int,
        done: int,
        skips: int = 0,
        sinks: Sequence[Tracker] = (),
    ):
        self._streams, self._every, self._last_step, self._skips = streams, every, last_step, skips
        self._sinks, self._file, self._before = sinks, None, 0.0
        if path is not None:
            kept = [line for line in read(path) if line["step"] <= done]
            write_atomically(path, "".join(map(_as_line, kept)).encode())  # a kill in between must not lose the lines
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._mark = time.perf_counter()
        self._frames = 0
        self.rate = 0.0
        """Frames per second between the last two lines, pauses left out."""

    def add(self, step: int, metrics: Metrics, frames: int, files: Mapping[tuple[int, int], str]) -> dict[str, Any]:
        """The step's line, written if it is due; waits until the step is computed.

        Args:
          frames: valid ones of the step; files: names by chunk and row, for the message.

        Raises `InputError` if the loss or the gradient is not finite, more often than may be skipped.
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
            told = _not_finite(step, values, files)
            if not self._skips:
                raise InputError(
                    f"{told}, so the run stops with its last checkpoint as it was: start anew (--from) with a lower"
                    " optim.lr, optim.ttt_lr or model.ttt.base_lr, a higher optim.warmup_steps, or let such steps be skipped by --optim.skips."
                )
            if values.skipped > self._skips:
                raise InputError(
                    f"{told}, and optim.skips={self._skips} such steps were skipped before, so the run stops with its last checkpoint as"
                    " it was: start anew (--from) with a lower optim.lr, optim.ttt_lr or model.ttt.base_lr."
                )
            line["skipped_for"] = told
        self._frames += frames
        now = time.perf_counter()
        if step % self._every == 0 or step in (1, self._last_step) or "skipped_for" in line:
            self.rate = self._frames / max(now - self._mark, 1e-9)
            self._mark, self._frames = now, 0
            self._write({**line, "seconds": self._seconds(), "frames_per_second": self.rate})
        return line

    def add_validation(self, step: int, values: dict[str, Any]) -> None:
        """Write what a validation after `step` found."""
        self._write({"step": step, "validation": values, "seconds": self._seconds()})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no training: it does not count for the rate."""
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    def close(self) -> None:
        """Close the file and the sinks."""
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def _seconds(self) -> float:
        return round(self._before + time.perf_counter() - self._start, 3)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(_as_line(line))
        for sink in self._sinks:
            sink.write(line["step"], flatten(line))


def _not_finite(step: int, values: Metrics, files: Mapping[tuple[int, int], str]) -> str:
    """Which number, group and file."""
    what = [
        f"{name} is {getattr(values, name)}"
        for name in ("loss", "grad_norm")
        if not math.isfinite(getattr(values, name))
    ]
    groups = [name for name, norm in values.grad_norms.items() if not math.isfinite(norm)]
    at = [
        (k, row) for k, losses in enumerate(values.rows) for row, loss in enumerate(losses) if not math.isfinite(loss)
    ]
    rows = sorted({files.get(place, f"row {place[1]} (another process names its file)") for place in at})
    return (
        f"step {step}: {' and '.join(what) or 'the state that the step leaves is not finite'}"
        + (f", the gradient of {', '.join(groups)}" if groups else "")
        + (
            f", in {', '.join(rows)}"
            if rows
            else f", the losses of all rows are finite ({', '.join(sorted(set(files.values())))})"
        )
    )


def finite(value: Any) -> float | None:
    """A number, or None where it is not finite: the streams without targets, and what must not happen."""
    return float(value) if math.isfinite(value) else None


def _finite(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
