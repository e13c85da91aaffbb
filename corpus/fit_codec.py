"""Fits the embedded codec to the training recordings of the embedded corpus: ``python -m corpus.fit_codec``.

Residual k-means, one codebook after the other: k-means++ starts, Lloyd's iterations with unused entries moved to badly
coded frames, the best of several starts. One entry of the first codebook is pinned to digital silence and one entry of
every later codebook to zero, so that silence has one exact code. Equal recordings give equal parameters on one machine.

For other recordings give ``--manifest``, ``--out`` and the metadata ``--name``, ``--licence``, ``--fitted-to``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttt_jax.codec import DEFAULT_FILE
from ttt_jax.codec.kmeans import FORMAT, KMeansCodec, mel_filters
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.manifest import read_manifest
from ttt_jax.errors import InputError

SAMPLE_RATE = 16000
FRAME_SIZE = 1280
WINDOW = 512
BANDS = 40
SUBFRAMES = 5
LOWEST_HZ, HIGHEST_HZ = 60.0, 7600.0
FLOOR = 3e-7  # white noise at -65 dB of full scale: above the corpus' pauses, below its faintest speech
NUM_CODEBOOKS = 8
CARDINALITY = 64
STARTS = 3
ITERATIONS = 40

MANIFEST = DEFAULT_FILE.parents[1] / "train.jsonl"
OF_EMBEDDED = {  # wrong for any other recordings
    "out": DEFAULT_FILE,
    "name": f"melkmeans-{NUM_CODEBOOKS}x{CARDINALITY}",
    "licence": "CC-BY-SA-3.0",
    "fitted_to": "the training recordings of the embedded corpus (see NOTICE)",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the codec, writes it and prints how much each codebook explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="recordings; unset: the embedded corpus")
    group = parser.add_argument_group("the codec's file (all four are needed with another manifest)")
    group.add_argument("--out", type=Path, help="path of the file")
    group.add_argument("--name", help="the codec's name, stored with every result")
    group.add_argument("--licence", help="terms of the recordings, which hold for the codec too")
    group.add_argument("--fitted-to", help="description of the recordings")
    args = parser.parse_args(argv)
    missing = [f"--{key.replace('_', '-')}" for key in OF_EMBEDDED if getattr(args, key) is None]
    if missing and args.manifest.resolve() != MANIFEST.resolve():
        parser.error(
            f"{args.manifest} is not the embedded corpus, so the codec needs its own file and metadata: give"
            f" {', '.join(missing)}."
        )
    about = {key: default if getattr(args, key) is None else getattr(args, key) for key, default in OF_EMBEDDED.items()}
    out = about.pop("out")
    try:
        voices = [read_audio(entry.path, SAMPLE_RATE)[0] for entry in read_manifest(args.manifest).entries]
    except InputError as error:
        parser.error(str(error))
    codec = fit(voices, **about)
    out.parent.mkdir(parents=True, exist_ok=True)
    codec.save(out)
    print(f"{out}: {codec.name}, {out.stat().st_size} bytes, digest {codec.digest}")


def fit(voices: list[np.ndarray], name: str, licence: str, fitted_to: str) -> KMeansCodec:
    """Returns a codec fitted to recordings, float32 [samples] at `SAMPLE_RATE`; the other arguments are metadata."""
    sizes = {"sample_rate": SAMPLE_RATE, "frame_size": FRAME_SIZE, "window": WINDOW, "floor": FLOOR}
    about = {"licence": licence, "fitted_to": fitted_to}
    metadata = {"format": FORMAT, "name": name, **{key: str(size) for key, size in sizes.items()}, **about}
    mel = mel_filters(BANDS, WINDOW, SAMPLE_RATE, LOWEST_HZ, HIGHEST_HZ)
    size = SUBFRAMES * BANDS
    # A codec with empty codebooks computes the features.
    empty = {"codebooks": np.zeros((1, 1, size)), "mean": np.zeros(size), "mel": mel}
    front = KMeansCodec(empty, metadata)
    logmel_NF = np.concatenate([front.features(voice) for voice in voices])
    mean_F = logmel_NF.mean(axis=0)
    silence_F = front.features(np.zeros(FRAME_SIZE, np.float32))[0] - mean_F
    codebooks_QVF = fit_codebooks((logmel_NF - mean_F).astype(np.float32), silence_F.astype(np.float32))
    return KMeansCodec({"codebooks": codebooks_QVF, "mean": mean_F, "mel": mel}, metadata)


def fit_codebooks(features_NF: np.ndarray, silence_F: np.ndarray) -> np.ndarray:
    """Returns codebooks float32 [NUM_CODEBOOKS, CARDINALITY, F] for the rows of `features_NF`."""
    rng = np.random.default_rng(0)
    rest_NF = features_NF
    books = []
    for index in range(NUM_CODEBOOKS):
        pinned_F = silence_F if index == 0 else np.zeros_like(silence_F)
        book_VF = min((_k_means(rest_NF, pinned_F, rng) for _ in range(STARTS)), key=lambda fit: fit[1])[0]
        books.append(book_VF)
        rest_NF = rest_NF - book_VF[_nearest(rest_NF, book_VF)[0]]
        share = np.square(rest_NF).sum() / np.square(features_NF).sum()
        print(f"codebook {index + 1}: {share:.4f} of the variance left", flush=True)
    # Shuffled, so that silence is not id 0: code that confuses the two shows.
    return np.stack([rng.permutation(book_VF) for book_VF in books])


def _k_means(rows_NF: np.ndarray, pinned_F: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Returns entries [CARDINALITY, F], the first one pinned, and the mean squared error."""
    book_VF = np.empty((CARDINALITY, rows_NF.shape[1]), np.float32)
    book_VF[0] = pinned_F
    distance_N = np.square(rows_NF - pinned_F).sum(axis=1)
    for entry in range(1, CARDINALITY):
        chosen = np.searchsorted(
            np.cumsum(distance_N, dtype=np.float64), rng.uniform() * distance_N.sum(dtype=np.float64)
        )
        book_VF[entry] = rows_NF[min(chosen, len(rows_NF) - 1)]
        distance_N = np.minimum(distance_N, np.square(rows_NF - book_VF[entry]).sum(axis=1))
    for _ in range(ITERATIONS):
        nearest_N, distance_N = _nearest(rows_NF, book_VF)
        member_NV = np.eye(CARDINALITY, dtype=np.float32)[nearest_N]
        sums_VF, counts_V = member_NV.T @ rows_NF, member_NV.sum(axis=0)
        unused_V = counts_V == 0
        unused_V[0] = False
        book_VF[1:] = (sums_VF / np.maximum(counts_V, 1)[:, None])[1:]
        book_VF[unused_V] = rows_NF[np.argsort(distance_N)[len(rows_NF) - unused_V.sum() :]]
    return book_VF, float(_nearest(rows_NF, book_VF)[1].mean())


def _nearest(rows_NF: np.ndarray, book_VF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each row's nearest entry and its squared distance, [N] both."""
    partial_NV = np.square(book_VF).sum(axis=1) - 2 * rows_NF @ book_VF.T
    return partial_NV.argmin(axis=1), partial_NV.min(axis=1) + np.square(rows_NF).sum(axis=1)


if __name__ == "__main__":
    main()
