"""From log-mel energies back to a waveform: spectrum by non-negative inversion, phase by fast Griffin-Lim, in NumPy.

Griffin & Lim 1984 with the momentum of Perraudin, Balazs & Søndergaard 2013. The first phase comes from a fixed seed,
so equal input gives equal samples.
"""

from __future__ import annotations

import numpy as np

_INVERSION_STEPS = 20
_PHASE_STEPS = 32
_MOMENTUM = 0.99
_OVERLAP = 4


def waveform(logmel: np.ndarray, filters: np.ndarray, floor: float, taper: np.ndarray, hop: int) -> np.ndarray:
    """Returns a waveform whose log-mel energies are close to `logmel`.

    `logmel` is log(power + floor), float [n, bands]; row i belongs to the window that ends at sample (i + 1) * hop.
    `filters`, float [window // 2 + 1, bands], average power. `taper`, float [window], is the analysis window; its
    length is a multiple of 4. The result is float32 [n * hop].
    """
    num_samples = len(logmel) * hop
    if not num_samples:
        return np.zeros(0, dtype=np.float32)
    # Phase retrieval needs more overlap than the rows have: columns are `step` apart, column j is centred on j * step.
    step = len(taper) // _OVERLAP
    centres = np.arange(-(-num_samples // step) + 1) * step
    logmel = _interpolate(logmel, (centres + len(taper) / 2) / hop - 1)
    power = _invert_filters(np.maximum(np.exp(logmel) - floor, 0), filters)
    audio = _griffin_lim(np.sqrt(power).astype(np.float32), taper.astype(np.float32), step)
    return audio[len(taper) // 2 :][:num_samples]


def _interpolate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    positions = np.clip(positions, 0, len(rows) - 1)
    left = np.minimum(positions.astype(int), max(len(rows) - 2, 0))
    right = np.minimum(left + 1, len(rows) - 1)
    weight = (positions - left)[:, None]
    return rows[left] * (1 - weight) + rows[right] * weight


def _invert_filters(bands: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Returns a non-negative spectrum with the given band energies, by multiplicative updates from a smooth guess."""
    cover = filters.sum(axis=1)
    cover = np.where(cover > 0, cover, np.inf)
    power = bands @ filters.T / cover
    for _ in range(_INVERSION_STEPS):
        power *= (bands / np.maximum(power @ filters, 1e-20)) @ filters.T / cover
    return power


def _griffin_lim(magnitude: np.ndarray, taper: np.ndarray, step: int) -> np.ndarray:
    """Returns samples, half a window longer at both ends, whose spectrum has about the magnitude [columns, bins]."""
    weight = _overlap_add(np.broadcast_to(np.square(taper), (len(magnitude), len(taper))), step)
    weight = np.maximum(weight, 0.01 * weight.max())

    def inverse(spectrum: np.ndarray) -> np.ndarray:
        return _overlap_add(np.fft.irfft(spectrum, len(taper)) * taper, step) / weight

    angle = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitude.shape).astype(np.float32)
    spectrum = magnitude * np.exp(1j * angle)
    previous = np.zeros_like(spectrum)
    for _ in range(_PHASE_STEPS):
        windows = np.lib.stride_tricks.sliding_window_view(inverse(spectrum), len(taper))[::step]
        consistent = np.fft.rfft(windows * taper)
        target = consistent + _MOMENTUM * (consistent - previous)
        size = np.sqrt(np.square(target.real) + np.square(target.imag))
        spectrum = target * (magnitude / np.maximum(size, 1e-12))
        previous = consistent
    return inverse(spectrum)


def _overlap_add(windows: np.ndarray, step: int) -> np.ndarray:
    columns, window = windows.shape
    blocks = windows.reshape(columns, window // step, step)
    total = np.zeros((columns + window // step - 1, step), dtype=windows.dtype)
    for block in range(window // step):
        total[block : block + columns] += blocks[:, block]
    return total.ravel()
