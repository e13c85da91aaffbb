"""Levels of a recording: refuses samples that cannot be sound and warns of recordings that are hardly usable."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np

from ttt_jax.errors import InputError

LARGEST = 16.0  # 24 dB above full scale: no overshoot and no gain by mistake, but far below integers of 8 bits or more
INTEGER = 2.0**31  # the largest sample that is written as an integer
LOUD = 2.0  # 6 dB above full scale; lossy codecs overshoot by 1 to 4 dB
SILENT = 0.001  # -60 dB of full scale: below the noise of any room that was recorded for speech
FULL = 0.999  # a sample of 16 bits within 32 steps of full scale
CLIPPED = 0.01  # share; speech that is not clipped reaches its peak in less than 1 of 1,000 samples

_log = logging.getLogger("ttt_jax")


class Levels:
    """The levels of one recording, block by block; `samples` counts those of all channels."""

    def __init__(self, path: Path):
        self._path = path
        self.samples, self._seconds = 0, 0.0
        self._full, self._peak = 0, 0.0

    def add(self, block: np.ndarray, sample_rate: int, written_as_floats: bool) -> None:
        """Adds samples, float32 [n, channels], at a rate in Hz; `written_as_floats` states the file's encoding.

        Raises `InputError` if they are not finite or far beyond full scale.
        """
        size = np.abs(block)
        peak = float(size.max(initial=0.0))  # NaN if there is one
        if not peak <= LARGEST:
            bad = int(np.argmax(~(size <= LARGEST).all(axis=1)))
            second = f"{self._seconds + bad / sample_rate:.1f}"
            if not np.isfinite(peak):
                raise InputError(f"{self._path} holds NaN or infinity near second {second}: write the file again.")
            if peak > INTEGER or not written_as_floats:
                raise InputError(
                    f"{self._path} is damaged (it holds samples of {peak:.6g} near second {second}, where full scale is"
                    " 1): copy or encode the file again."
                )
            raise InputError(
                f"{self._path} holds samples of {peak:.6g} near second {second}, where full scale is 1: divide them by"
                " the full scale of the original integers, 32768 for 16 bits."
            )
        self._peak = max(self._peak, peak)
        self._full += int((size >= FULL).sum())
        self.samples += block.size
        self._seconds += len(block) / sample_rate

    def report(self) -> None:
        """Warns if the whole recording is too loud, nearly silent or clipped."""
        if self.samples == 0:
            return
        if self._peak > LOUD:
            _log.warning(
                "%s has a peak of %.1f, where full scale is 1: its samples are used unchanged.", self._path, self._peak
            )
        if self._peak == 0:
            _log.warning("%s is silent: all its samples are 0.", self._path)
        elif self._peak < SILENT:
            decibels = 20 * math.log10(self._peak)
            _log.warning("%s is nearly silent: its peak is %.0f dB of full scale.", self._path, decibels)
        share = self._full / self.samples
        if share > CLIPPED:
            _log.warning("%s is clipped: %.0f %% of its samples are at full scale.", self._path, 100 * share)
