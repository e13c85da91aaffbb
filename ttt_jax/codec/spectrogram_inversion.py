"""From log-mel energies back to a waveform, frame by frame and without look-ahead, in NumPy.

The spectrum comes from non-negative inversion of the mel filters. The phase comes from real-time iterative spectrogram
inversion (Beauregard, Zhu & Wyse 2005): the samples that earlier frames gave are fixed, and those of the frame follow
from them by the iteration of Griffin & Lim 1984 with the momentum of Perraudin, Balazs & Søndergaard 2013. Windows that
reach beyond the frame are held at its last energies, but fade: a later frame can add to their fixed half, but not take
away. All this happens on pre-emphasised samples, since leakage of the strong low bands would fill the faint
high ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_INVERSION_STEPS = 20
_PHASE_STEPS = 24
_MOMENTUM = 0.99
_OVERLAP = 4  # windows over a sample, at least: phase retrieval needs more than the rows of energies have
_FADE = 1.0  # in the logarithm of power, over a quarter of a window
_EMPHASIS = 0.9


class State(NamedTuple):
    """What the next frame of each of B streams takes from those before."""

    logmel: np.ndarray  # float64 [B, bands]: the last energies
    samples: np.ndarray  # float32 [B, n]: the last samples


class Inversion:
    """Inverts log(power + `floor`) of frames of `frame_size` samples.

    Row i of a frame's `rows` rows belongs to the window that ends at its sample (i + 1) * frame_size / rows.
    `filters`, float [window // 2 + 1, bands], average power; `taper`, float [window], is the analysis window.
    """

    def __init__(self, filters: np.ndarray, floor: float, taper: np.ndarray, frame_size: int, rows: int) -> None:
        window = len(taper)
        self._floor, self._frame_size = floor, frame_size
        self._filters = filters.astype(np.float32)
        cover = self._filters.sum(axis=1)
        self._spread = np.ascontiguousarray((self._filters / np.where(cover > 0, cover, np.inf)[:, None]).T)
        self._taper = taper.astype(np.float32)
        common = math.gcd(window, frame_size)
        self._step = max(s for s in range(1, max(window // _OVERLAP, 1) + 1) if common % s == 0)
        # Column i is centred on centres[i]; they are all that reach into the frame, and begin before its end.
        centres = np.arange(-((window // 2 - 1) // self._step), frame_size // self._step + 1) * self._step
        self._index = np.arange(len(centres))[:, None] * self._step + np.arange(window)
        self._past = window // 2 - centres[0]  # samples before the frame in its first column
        position = (centres + window / 2) * rows / frame_size  # 0 is the last row before the frame, 1 its first
        self._left = np.minimum(position.astype(int), rows - 1)
        self._weight = np.minimum(position - self._left, 1)[:, None]
        self._fade = np.exp(-_FADE * _OVERLAP / window * np.maximum(centres + window / 2 - frame_size, 0))[:, None]
        bins = np.exp(-2j * np.pi * np.arange(window // 2 + 1) / window)
        self._emphasis = np.abs(1 - _EMPHASIS * bins).astype(np.float32)
        cover = self._overlap_add(np.broadcast_to(np.square(self._taper), (1, len(centres), window)))
        self._cover = np.maximum(cover, 0.01 * cover.max())
        self._mirror = np.arange(cover.size) % (2 * self._past)
        angle = np.random.default_rng(0).uniform(-np.pi, np.pi, (len(centres), len(bins)))
        self._faint = (1e-6 * np.exp(1j * angle)).astype(np.complex64)  # gives a phase where nothing was before

    def init_state(self, batch: int) -> State:
        """Returns the state before the first frames: silence."""
        logmel = np.full((batch, self._filters.shape[1]), np.log(self._floor))
        return State(logmel, np.zeros((batch, self._past + 1), np.float32))

    def __call__(self, logmel: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Returns the samples of one frame of each stream, float [B, rows, bands] -> float32 [B, frame_size], with
        about these energies, and the state after them."""
        rows = np.concatenate([state.logmel[:, None], logmel], axis=1)
        left, right = np.take(rows, self._left, axis=1), np.take(rows, self._left + 1, axis=1)
        columns = left * (1 - self._weight) + right * self._weight
        power = self._invert_filters(np.maximum(np.exp(columns) - self._floor, 0) * self._fade)
        before = state.samples[:, 1:] - np.float32(_EMPHASIS) * state.samples[:, :-1]
        emphasised = self._find_samples(np.sqrt(power) * self._emphasis, before)
        audio = _deemphasise(np.concatenate([state.samples[:, -1:], emphasised], axis=1))[:, 1:]
        samples = np.concatenate([state.samples, audio], axis=1)[:, -self._past - 1 :]
        return audio, State(logmel[:, -1], samples)

    def _invert_filters(self, bands: np.ndarray) -> np.ndarray:
        """Returns a non-negative spectrum with these band energies, by multiplicative updates from a smooth guess."""
        bands = bands.astype(np.float32)
        power = np.matmul(bands, self._spread)
        for _ in range(_INVERSION_STEPS):
            ratio = bands / np.maximum(np.matmul(power, self._filters), np.float32(1e-20))
            power *= np.matmul(ratio, self._spread)
        return power

    def _find_samples(self, magnitude: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Returns the frame's samples, which follow on those `before`; magnitude is [B, columns, bins]."""
        # The first phase is that of the samples before, played backwards, forwards and so on.
        mirrored = np.take(np.concatenate([before, before[:, ::-1]], axis=1), self._mirror, axis=1)
        spectrum = _scaled(self._spectrum(mirrored) + self._faint, magnitude)
        previous = np.zeros_like(spectrum)
        for _ in range(_PHASE_STEPS):
            consistent = self._spectrum(self._signal(spectrum, before))
            target = consistent + np.float32(_MOMENTUM) * (consistent - previous)
            spectrum = _scaled(target, magnitude)
            previous = consistent
        return self._signal(spectrum, before)[:, self._past :][:, : self._frame_size]

    def _spectrum(self, audio: np.ndarray) -> np.ndarray:
        return np.fft.rfft(np.take(audio, self._index, axis=1) * self._taper)

    def _signal(self, spectrum: np.ndarray, before: np.ndarray) -> np.ndarray:
        audio = self._overlap_add(np.fft.irfft(spectrum, len(self._taper)) * self._taper) / self._cover
        audio[:, : self._past] = before
        return audio

    def _overlap_add(self, windows: np.ndarray) -> np.ndarray:
        batch, columns, window = windows.shape
        blocks = windows.reshape(batch, columns, window // self._step, self._step)
        total = np.zeros((batch, columns + window // self._step - 1, self._step), np.float32)
        for block in range(window // self._step):
            total[:, block : block + columns] += blocks[:, :, block]
        return total.reshape(batch, -1)


def _scaled(spectrum: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.square(spectrum.real) + np.square(spectrum.imag))
    return spectrum * (magnitude / np.maximum(size, np.float32(1e-12)))


def _deemphasise(audio: np.ndarray) -> np.ndarray:
    """Returns y of y[n] = audio[n] + _EMPHASIS * y[n - 1]: the product of (1 + (_EMPHASIS z) ** (2 ** i)) inverts."""
    shift, factor = 1, _EMPHASIS
    while shift < audio.shape[1]:
        audio[:, shift:] += np.float32(factor) * audio[:, :-shift]
        shift, factor = 2 * shift, factor * factor
    return audio
