"""Residual k-means over log-mel frames: the small codec that comes with the project, in NumPy.

A frame is 80 ms of 16 kHz audio. Its features are the log-mel energies of a few short windows (the sub-frames) over the
samples of the frame and at most one window of samples before it, never later ones. ``num_codebooks`` codebooks quantise
the features one after the other, each the residual of those before it (greedy residual k-means). Decoding sums the
entries, inverts the mel filters and finds a phase (`ttt_jax.codec.griffin_lim`). The speech is intelligible, but rough.

Two laws hold by construction. *Streaming equals offline, bit by bit*: the arithmetic on a frame, in float64, does not
depend on the other frames of the call. *Silence is one code vector*: energies far below `floor` vanish in the
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

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.codec import griffin_lim
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

FORMAT = "ttt_jax.kmeans/1"
_BLOCK = 128  # frames computed at a time: bounds memory
_NUMBERS = ("sample_rate", "frame_size", "window", "floor")
_TENSORS = {"codebooks": 3, "mean": 1, "mel": 2}


class KMeansCodec:
    """The `ttt_jax.codec.Codec` of the module's docstring, of the tensors and metadata of the file format.

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

    def init_state(self) -> np.ndarray:
        """Returns the state before the first sample: silence, float32 [window - sub-frame hop]."""
        return np.zeros(self.window - self._hop, dtype=np.float32)

    def encode_step(self, audio: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the codes of the next whole frames, float [frame_size * n] -> int32 [num_codebooks, n], and the next
        state. `state`, from `init_state` or the previous call, is not changed. Raises `InputError`."""
        audio = _check_audio(audio)
        num_frames, rest = divmod(len(audio), self.frame_size)
        if rest:
            raise InputError(
                f"encode_step got {len(audio)} samples, which is not a multiple of frame_size={self.frame_size}: "
                "give whole frames and keep the rest for the next call."
            )
        samples = np.concatenate([state, audio])
        codes = [self._quantise(features_TF) for features_TF in self._blocks(samples)]
        codes_QT = np.concatenate(codes, axis=1) if codes else np.empty((self.num_codebooks, 0), np.int32)
        return codes_QT, samples[len(samples) - len(state) :].copy()

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Returns the codes of a recording, float [samples] -> int32 [num_codebooks, ceil(samples / frame_size)].

        The last frame is filled up with zeros. Raises `InputError` if `audio` is not one channel of finite samples.
        """
        audio = _check_audio(audio)
        audio = np.pad(audio, (0, -len(audio) % self.frame_size))
        return self.encode_step(audio, self.init_state())[0]

    def features(self, audio: np.ndarray) -> np.ndarray:
        """Returns the features that `encode` quantises: log-mel energies minus their mean, float64 [T, features]."""
        audio = _check_audio(audio)
        samples = np.pad(audio, (self.window - self._hop, -len(audio) % self.frame_size))
        return np.concatenate([np.empty((0, len(self._mean_F))), *self._blocks(samples)])

    def quantised_features(self, codes: np.ndarray) -> np.ndarray:
        """Returns the features of codes, int [num_codebooks, T] -> float64 [T, features]. Raises `InputError`."""
        codes_QT = np.asarray(codes)
        if codes_QT.ndim != 2 or len(codes_QT) != self.num_codebooks or not np.issubdtype(codes_QT.dtype, np.integer):
            raise InputError(
                f"decode got {codes_QT.dtype} codes of shape {codes_QT.shape}, but {self.name} needs integers of shape "
                f"[{self.num_codebooks}, T]: give the codes of one stream."
            )
        if codes_QT.size and (codes_QT.min() < 0 or codes_QT.max() >= self.cardinality):
            raise InputError(
                f"decode got codes from {codes_QT.min()} to {codes_QT.max()}, but {self.name} has entries "
                f"0 to {self.cardinality - 1}: drop absent (-1) and special tokens first."
            )
        return sum(book_VF[row_T] for book_VF, row_T in zip(self._codebooks_QVF, codes_QT, strict=True))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns audio, float32 [T * frame_size], with about the features of int codes [num_codebooks, T].

        Equal codes give equal samples. Raises `InputError` for another shape or codes outside [0, cardinality).
        """
        logmel = (self.quantised_features(codes) + self._mean_F).reshape(-1, self.num_bands)
        return griffin_lim.waveform(logmel, self._filters, self.floor, self._taper, self._hop)

    def _blocks(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the features [T, F] of some frames at a time; `samples` begins with the state before them.

        Streaming needs equal bits for any number of frames: the products below are batches of one frame each, since a
        matrix product of another shape may sum in another order.
        """
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.window)[:: self._hop]
        windows = windows.reshape(-1, self.num_subframes, self.window)
        for start in range(0, len(windows), _BLOCK):
            spectrum = np.fft.rfft(windows[start : start + _BLOCK].astype(np.float64) * self._taper)
            power = np.square(spectrum.real) + np.square(spectrum.imag)
            logmel = np.log(np.matmul(power, self._filters) + self.floor)
            yield logmel.reshape(len(logmel), -1) - self._mean_F

    def _quantise(self, features_TF: np.ndarray) -> np.ndarray:
        codes_QT = np.empty((self.num_codebooks, len(features_TF)), np.int32)
        for row_T, book_VF, half_norms_V in zip(codes_QT, self._codebooks_QVF, self._half_norms_QV, strict=True):
            # argmin |x - c|^2 = argmax <x, c> - |c|^2 / 2
            row_T[:] = (np.matmul(book_VF, features_TF[:, :, None])[:, :, 0] - half_norms_V).argmax(axis=1)
            features_TF = features_TF - book_VF[row_T]
        return codes_QT


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


def _check_audio(audio: np.ndarray) -> np.ndarray:
    audio = np.asarray(audio)
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise InputError(
            f"The codec got {audio.dtype} audio of shape {audio.shape}, expected floats of shape [samples]: "
            "give one channel with full scale 1."
        )
    audio = audio.astype(np.float32, copy=False)
    if not np.isfinite(audio).all():
        raise InputError(
            f"The codec got audio whose sample {int(np.argmin(np.isfinite(audio)))} is not finite: "
            "mend the recording or leave it out."
        )
    return audio


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
