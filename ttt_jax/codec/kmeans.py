"""Residual k-means over log-mel frames: the small codec that comes with the project, in NumPy.

A frame is 80 ms of 16 kHz audio. Its features are the log-mel energies of a few short windows (the sub-frames) over the
samples of the frame and at most one window of samples before it, never later ones. ``num_codebooks`` codebooks quantise
the features one after the other, each the residual of those before it (greedy residual k-means). Decoding sums the
entries, inverts the mel filters and finds a phase, frame by frame (`ttt_jax.codec.spectrogram_inversion`). The speech
is intelligible, but rough.

Two laws hold by construction. *Streaming equals offline, bit by bit*: the arithmetic on a frame does not depend on the
other frames and rows of the call. *Silence is one code vector*: energies far below `floor` vanish in the
logarithm, one entry of the first codebook is exactly the silent frame, and one entry of every later codebook is exactly
zero.

File format: safetensors, written by `KMeansCodec.save`.

    codebooks  float32 [num_codebooks, cardinality, features]; features = sub-frames * bands, sub-frames first
    mean       float32 [features]         mean log-mel of the material it was fitted to
    mel        float32 [bands, window // 2 + 1]   mel filters, every row sums to 1
    metadata   format "ttt_jax.kmeans/1", name, sample_rate (Hz), frame_size (samples), window (samples),
               floor (power), licence, fitted_to
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.codec import spectrogram_inversion
from ttt_jax.codec.base import Codec, check_audio, check_channel, check_codes, check_mask
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

FORMAT = "ttt_jax.kmeans/1"
_BLOCK = 128  # frames computed at a time: bounds memory
_NUMBERS = ("sample_rate", "frame_size", "window", "floor")
_TENSORS = {"codebooks": 3, "mean": 1, "mel": 2}


class EncoderState(NamedTuple):
    """What the next frame of each of B streams takes from those before."""

    samples: np.ndarray  # float32 [B, window - sub-frame hop]: the last samples


class KMeansCodec(Codec):
    """The codec of the module's docstring, of the tensors and metadata of the file format.

    Raises `InputError`, which names `source`, if a tensor or a metadata key is missing or invalid.
    """

    def __init__(self, tensors: dict[str, np.ndarray], metadata: dict[str, str], source: str = "codec") -> None:
        numbers = _check(tensors, metadata, source)
        self.metadata = dict(metadata)
        self.name: str = metadata["name"]
        self.sample_rate = int(numbers["sample_rate"])
        self.frame_size = int(numbers["frame_size"])
        self.frame_rate = self.sample_rate / self.frame_size
        self.window = int(numbers["window"])
        self.floor = numbers["floor"]
        self.num_codebooks, self.cardinality, features = tensors["codebooks"].shape
        self.num_bands = len(tensors["mel"])
        self.num_subframes = features // self.num_bands
        self._hop = self.frame_size // self.num_subframes
        self.tensors: dict[str, np.ndarray] = {
            key: np.ascontiguousarray(tensors[key], dtype=np.float32) for key in _TENSORS
        }
        self.digest: str = _digest(self.tensors, numbers)
        codebooks_QVF = self.tensors["codebooks"].astype(np.float64)
        self._codebooks_QVF = codebooks_QVF
        self._half_norms_QV = 0.5 * np.square(codebooks_QVF).sum(axis=-1)
        self._mean_F = self.tensors["mean"].astype(np.float64)
        self._filters = np.ascontiguousarray(self.tensors["mel"].T, dtype=np.float64)
        self._taper = taper(self.window)
        self._inversion = spectrogram_inversion.Inversion(
            self._filters, self.floor, self._taper, self.frame_size, self.num_subframes
        )

    @classmethod
    def load(cls, path: str | Path) -> KMeansCodec:
        """Returns the codec stored at `path`. Raises `InputError` if it is no file of this format."""
        path = Path(path)
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                present = set(file.keys())
                tensors = {key: file.get_tensor(key) for key in _TENSORS if key in present}
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"The codec file {path} cannot be read ({error}); expected a safetensors file written by "
                "KMeansCodec.save, so check the path or use codec 'kmeans' for the embedded one."
            ) from error
        return cls(tensors, metadata, str(path))

    def save(self, path: str | Path) -> None:
        """Writes the codec to `path`, all of it or nothing."""
        write_atomically(Path(path), safetensors.numpy.save(self.tensors, metadata=self.metadata))

    def init_encoder(self, batch: int) -> EncoderState:
        """Silence before the first sample."""
        return EncoderState(np.zeros((batch, self.window - self._hop), np.float32))

    def encode_step(
        self, audio: np.ndarray, state: EncoderState, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, EncoderState]:
        """As `Codec.encode_step`, in float64."""
        audio, mask = check_audio(self, audio, mask)
        # The frames that there are move to the front of their row: there they follow each other.
        order = np.argsort(~mask, axis=1, kind="stable")
        audio = np.take_along_axis(audio.reshape(*mask.shape, self.frame_size), order[..., None], axis=1)
        samples = np.concatenate([state.samples, audio.reshape(len(mask), mask.shape[1] * self.frame_size)], axis=1)
        count = mask.sum(axis=1)
        is_there = np.arange(mask.shape[1]) < count[:, None]
        codes = np.full((len(mask), self.num_codebooks, mask.shape[1]), -1, np.int32)
        for rows, frames, features_NF in self._features(samples, is_there):
            codes[rows, :, order[rows, frames]] = self._quantise(features_NF).T
        last = count[:, None] * self.frame_size + np.arange(state.samples.shape[1])
        return codes, EncoderState(np.take_along_axis(samples, last, axis=1))

    def init_decoder(self, batch: int) -> spectrogram_inversion.State:
        """Silence before the first frame."""
        return self._inversion.init_state(batch)

    def decode_step(
        self, codes: np.ndarray, state: spectrogram_inversion.State, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, spectrogram_inversion.State]:
        """As `Codec.decode_step`, one frame after the other."""
        codes, mask = check_codes(self, codes, mask)
        audio = np.zeros((*mask.shape, self.frame_size), np.float32)
        state = spectrogram_inversion.State(*(leaf.copy() for leaf in state))
        for frame, is_there in enumerate(mask.T):
            if is_there.any():
                logmel = self._sum_entries(codes[is_there, :, frame]) + self._mean_F
                logmel = logmel.reshape(len(logmel), self.num_subframes, self.num_bands)
                before = spectrogram_inversion.State(*(leaf[is_there] for leaf in state))
                audio[is_there, frame], after = self._inversion(logmel, before)
                for leaf, new in zip(state, after, strict=True):
                    leaf[is_there] = new
        return audio.reshape(len(mask), mask.shape[1] * self.frame_size), state

    def fork(self, state: NamedTuple) -> NamedTuple:
        """As `Codec.fork`: the state itself, as no call changes it."""
        return state

    def reset(self, state: NamedTuple, rows: np.ndarray) -> NamedTuple:
        """As `Codec.reset`. Raises `InputError` if `rows` is not bool [B]."""
        batch = len(state[0])
        rows = check_mask(rows, (batch,))
        fresh = self.init_encoder(batch) if isinstance(state, EncoderState) else self.init_decoder(batch)
        return type(state)(*(np.where(rows[:, None], new, old) for new, old in zip(fresh, state, strict=True)))

    def features(self, audio: np.ndarray) -> np.ndarray:
        """Returns the features that `encode` quantises: log-mel energies minus their mean, float64 [T, features].

        `audio` as for `encode`. Raises `InputError`.
        """
        check_channel(audio)
        audio, mask = check_audio(self, np.pad(audio, (0, -len(audio) % self.frame_size))[None], None)
        samples = np.concatenate([self.init_encoder(1).samples, audio], axis=1)
        blocks = [features_NF for _, _, features_NF in self._features(samples, mask)]
        return np.concatenate([np.empty((0, len(self._mean_F))), *blocks])

    def quantised_features(self, codes: np.ndarray) -> np.ndarray:
        """Returns the features of codes, int [num_codebooks, T] -> float64 [T, features]. Raises `InputError`."""
        return self._sum_entries(check_codes(self, np.asarray(codes)[None])[0][0].T)

    def _features(self, samples: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields rows [N], frames [N] and features [N, F] of some frames at a time that `mask`, bool [B, n], keeps.

        `samples`, [B, n * frame_size + ...], begin with the state before them. Streaming needs equal bits for any
        number of frames: the products below are batches of one frame each, since a matrix product of another shape may
        sum in another order.
        """
        if not mask.any():
            return
        context = self.window - self._hop + self.frame_size
        windows = np.lib.stride_tricks.sliding_window_view(samples, context, axis=1)[:, :: self.frame_size]
        windows = np.lib.stride_tricks.sliding_window_view(windows, self.window, axis=2)[:, :, :: self._hop]
        places = np.argwhere(mask)
        for start in range(0, len(places), _BLOCK):
            rows, frames = places[start : start + _BLOCK].T
            spectrum = np.fft.rfft(windows[rows, frames] * self._taper)
            power = np.square(spectrum.real) + np.square(spectrum.imag)
            logmel = np.log(np.matmul(power, self._filters) + self.floor)
            yield rows, frames, logmel.reshape(len(logmel), -1) - self._mean_F

    def _quantise(self, features_NF: np.ndarray) -> np.ndarray:
        codes_QN = np.empty((self.num_codebooks, len(features_NF)), np.int32)
        for row_N, book_VF, half_norms_V in zip(codes_QN, self._codebooks_QVF, self._half_norms_QV, strict=True):
            # argmin |x - c|^2 = argmax <x, c> - |c|^2 / 2
            row_N[:] = (np.matmul(book_VF, features_NF[:, :, None])[:, :, 0] - half_norms_V).argmax(axis=1)
            features_NF = features_NF - book_VF[row_N]
        return codes_QN

    def _sum_entries(self, codes_NQ: np.ndarray) -> np.ndarray:
        return sum(book_VF[codes_N] for book_VF, codes_N in zip(self._codebooks_QVF, codes_NQ.T, strict=True))


def taper(window: int) -> np.ndarray:
    """Returns a periodic Hann window of unit energy: white noise of variance s gives power s in every bin."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return hann / np.sqrt(np.square(hann).sum())


def mel_filters(num_bands: int, window: int, sample_rate: int, low: float, high: float) -> np.ndarray:
    """Returns triangles equally spaced on the mel scale (2595 log10(1 + f/700)) from `low` to `high` Hz.

    They are float32 [num_bands, window // 2 + 1]; every row sums to 1, so that a filter averages power.
    """
    edges_mel = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), num_bands + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    bins = np.linspace(0, sample_rate / 2, window // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.clip(np.minimum(rising, falling), 0, None)
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def _check(tensors: dict[str, np.ndarray], metadata: dict[str, str], source: str) -> dict[str, float]:
    hint = "fit it again with `python -m corpus.fit_codec` or use codec 'kmeans' for the embedded one."
    if metadata.get("format") != FORMAT:
        raise InputError(f"{source} has format {metadata.get('format')!r} in its metadata, expected {FORMAT!r}; {hint}")
    missing = [key for key in _TENSORS if key not in tensors]
    missing += [key for key in ("name", *_NUMBERS) if key not in metadata]
    if missing:
        raise InputError(f"{source} lacks {', '.join(missing)}, which every {FORMAT} file has; {hint}")
    try:
        numbers = {key: float(metadata[key]) for key in _NUMBERS}
    except ValueError as error:
        raise InputError(
            f"{source} has metadata that is no number ({error}), expected numbers for {', '.join(_NUMBERS)}; {hint}"
        ) from error
    shapes = {key: tensors[key].shape for key in _TENSORS}
    fits = (
        all(0 < value < np.inf for value in numbers.values())
        and all(numbers[key].is_integer() for key in ("sample_rate", "frame_size", "window"))
        and all(len(shapes[key]) == rank and all(shapes[key]) for key, rank in _TENSORS.items())
        and shapes["codebooks"][2] == shapes["mean"][0]
        and shapes["mean"][0] % shapes["mel"][0] == 0
        and shapes["mel"][1] == int(numbers["window"]) // 2 + 1
        and int(numbers["frame_size"]) % (shapes["mean"][0] // shapes["mel"][0]) == 0
    )
    if not fits or not all(np.isfinite(tensors[key]).all() for key in _TENSORS):
        raise InputError(
            f"{source} has parameters that do not fit together or are not finite ({shapes}, {numbers}); {hint}"
        )
    return numbers


def _digest(tensors: dict[str, np.ndarray], numbers: dict[str, float]) -> str:
    """SHA-256 over the parameters that determine the codes; name and licence do not."""
    digest = hashlib.sha256(json.dumps([FORMAT, sorted(numbers.items())]).encode())
    for key in sorted(tensors):
        digest.update(f"{key}{tensors[key].shape}".encode())
        digest.update(tensors[key].astype("<f4").tobytes())
    return digest.hexdigest()
