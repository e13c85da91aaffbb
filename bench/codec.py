"""Measures the embedded codec on the embedded corpus: ``python -m bench.codec``.

Prints, for the held-out recordings: the variance that each codebook leaves, speed, log-spectral distance of decoded
speech with a control of shuffled frames, and how much of decoded English speech a speech recogniser understands (this
last part needs PyPI's pocketsphinx and is left out without it).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from ttt_jax.codec import DEFAULT_FILE
from ttt_jax.codec.kmeans import KMeansCodec
from ttt_jax.data.alignments import Word, read_alignments
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.manifest import Entry, read_manifest

DECIBEL = 10 / np.log(10)  # of a natural logarithm of power
PAUSE = 0.2  # seconds between two words that end an utterance
UTTERANCES = 60  # English utterances for the recogniser, at most


def main() -> None:
    """Prints all figures."""
    codec = KMeansCodec.load(DEFAULT_FILE)
    entries = {
        split: read_manifest(DEFAULT_FILE.parents[1] / f"{split}.jsonl").entries for split in ("train", "heldout")
    }
    voices = {split: [read_audio(e.path, codec.sample_rate)[0] for e in some] for split, some in entries.items()}
    print(f"{codec.name}, digest {codec.digest[:16]}, {codec.num_codebooks} codebooks of {codec.cardinality} entries")
    start = time.perf_counter()
    codes = {split: [codec.encode(voice) for voice in some] for split, some in voices.items()}
    seconds = sum(len(voice) for some in voices.values() for voice in some) / codec.sample_rate
    frames = {split: sum(c.shape[1] for c in some) for split, some in codes.items()}
    print(f"encoding: {seconds / (time.perf_counter() - start):.0f} x real time; frames: {frames}")
    print_variance(codec, voices, codes)
    print_decoding(codec, voices["heldout"], codes["heldout"])
    english = [(e, v) for e, v in zip(entries["heldout"], voices["heldout"], strict=True) if "en_us" in str(e.path)]
    print_recognition(codec, english)


def print_variance(codec: KMeansCodec, voices: dict[str, list], codes: dict[str, list]) -> None:
    """Share of the features' variance (about the mean) that is left after each codebook."""
    for split in voices:
        features = np.concatenate([codec.features(voice) for voice in voices[split]])
        rows = np.concatenate(codes[split], axis=1)
        silence = codec.encode(np.zeros(1, np.float32))  # zero in every codebook but the first
        total = np.square(features - features.mean(axis=0)).mean()
        left = []
        for used in range(1, codec.num_codebooks + 1):
            first = np.where(np.arange(codec.num_codebooks)[:, None] < used, rows, silence)
            left.append(np.square(features - codec.quantised_features(first)).mean())
        shares = " ".join(f"{value / total:.3f}" for value in left)
        print(f"{split}: variance left after each codebook: {shares}; after all {DECIBEL * left[-1] ** 0.5:.2f} dB rms")


def print_decoding(codec: KMeansCodec, voices: list[np.ndarray], codes: list[np.ndarray]) -> None:
    """Log-spectral distance of decoded speech to the original, beside that of shuffled frames."""
    rng, elapsed, squares = np.random.default_rng(0), 0.0, {"decoded": [], "shuffled": []}
    seconds = 0.0
    for voice, rows in zip(voices, codes, strict=True):
        rows = rows[:, : round(10 * codec.frame_rate)]
        reference = codec.features(voice[: rows.shape[1] * codec.frame_size])
        start = time.perf_counter()
        decoded = codec.decode(rows)
        elapsed += time.perf_counter() - start
        seconds += len(decoded) / codec.sample_rate
        squares["decoded"].append(np.square(codec.features(decoded) - reference))
        shuffled = codec.decode(rng.permutation(rows, axis=1))
        squares["shuffled"].append(np.square(codec.features(shuffled) - reference))
    distances = {name: DECIBEL * np.concatenate(values).mean() ** 0.5 for name, values in squares.items()}
    print(f"decoding: {seconds / elapsed:.0f} x real time; log-spectral distance in dB to the original:", end=" ")
    print(", ".join(f"{name} {value:.1f}" for name, value in distances.items()))


def print_recognition(codec: KMeansCodec, recordings: list[tuple[Entry, np.ndarray]]) -> None:
    """Recognition by pocketsphinx of the original, of decoded codes and of decoded codes in shuffled order."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        print("recognition: left out, pocketsphinx is not installed (pip install pocketsphinx)")
        return
    recogniser = Decoder(loglevel="FATAL")
    spoken = []
    for entry, voice in recordings:
        for words in utterances(read_alignments(entry.alignment, entry.duration).words):
            texts = [re.sub(r"[^a-z']", "", word.text.lower()) for word in words]
            if len(texts) >= 3 and all(recogniser.lookup_word(text) for text in texts):
                first, last = (round(t * codec.sample_rate) for t in (words[0].start - 0.1, words[-1].end + 0.1))
                spoken.append((texts, voice[max(first, 0) : last]))
    spoken = spoken[:UTTERANCES]
    choices = " | ".join(sorted({" ".join(texts) for texts, _ in spoken}))
    recogniser.add_jsgf_string("choices", f"#JSGF V1.0; grammar g; public <s> = {choices};")

    def hear(audio: np.ndarray, search: str) -> list[str]:
        recogniser.activate_search(search)
        recogniser.start_utt()
        recogniser.process_raw((audio.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
        recogniser.end_utt()
        hypothesis = recogniser.hyp()
        return re.sub(r"\(\d+\)", "", hypothesis.hypstr).split() if hypothesis else []

    rng = np.random.default_rng(0)
    conditions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "original": lambda audio: audio,
        "decoded": lambda audio: codec.decode(codec.encode(audio)),
        "shuffled": lambda audio: codec.decode(rng.permutation(codec.encode(audio), axis=1)),
    }
    total = sum(len(texts) for texts, _ in spoken)
    print(f"recognition of {len(spoken)} English utterances, {total} words:")
    for name, change in conditions.items():
        changed = [(texts, change(audio)) for texts, audio in spoken]
        right = sum(hear(audio, "choices") == texts for texts, audio in changed)
        errors = sum(edit_distance(texts, hear(audio, "_default")) for texts, audio in changed)
        print(f"  {name:9s} utterance chosen from the {len(spoken)}: {right / len(spoken):.0%}; ", end="")
        print(f"word error rate, any words: {errors / total:.0%}", flush=True)


def utterances(words: Sequence[Word]) -> list[list[Word]]:
    """Splits words where nobody speaks for `PAUSE` seconds."""
    parts: list[list[Word]] = []
    for word in words:
        if not parts or word.start - parts[-1][-1].end > PAUSE:
            parts.append([])
        parts[-1].append(word)
    return parts


def edit_distance(left: list[str], right: list[str]) -> int:
    """Fewest insertions, deletions and substitutions of words."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


if __name__ == "__main__":
    main()
