"""Losses of recordings that were scored, kept on disk as they come: a run that was killed goes on where it stopped, and
what another benchmark, rule or subset asks for is not computed twice.

One file for all that losses depend on beside the recording; a line for each recording, with its checksum. Imports no
jax.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


class Kept:
    """The losses under one model: sums of nats by recording and arm."""

    def __init__(self, cache_dir: Path, question: dict[str, Any]) -> None:
        """Reads what is there; damaged and half-written lines are left out.

        Args:
          question: all that losses depend on beside the recording: weights, codec, arms, calls.
        """
        content = json.dumps({**question, "format": FORMAT}, sort_keys=True)
        self.path = cache_dir / "scores" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.jsonl"
        self._sums: dict[str, dict[str, np.ndarray]] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                self._take(line)

    def __contains__(self, key: str) -> bool:
        return key in self._sums

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        """Sums of the losses of a recording by arm, float64 [Q]."""
        return self._sums[key]

    def add(self, found: Iterable[tuple[str, dict[str, np.ndarray]]]) -> None:
        """Keeps the losses of some recordings: on disk before it returns."""
        lines = []
        for key, sums in found:
            content = json.dumps([key, {arm: _plain(values) for arm, values in sums.items()}])
            lines.append(b"\n%08x %s" % (zlib.crc32(content.encode()), content.encode()))
            self._sums[key] = sums
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(lines))  # a line begins with its end of line: one that was cut short stays alone

    def _take(self, line: bytes) -> None:
        checksum, _, content = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(content) and content:
            key, sums = json.loads(content)
            self._sums[key] = {arm: np.array(values, np.float64) for arm, values in sums.items()}


def _plain(values: Sequence[float]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
