"""Small benchmarks in their official layouts, with recordings of a few samples, all different."""

import csv
import json
from pathlib import Path

import numpy as np
import soundfile

from eval.benchmarks.layouts import MINI_FILE

RATE = 16000
LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")


def wav(path: Path, samples: int = 320, rate: int = RATE) -> Path:
    """Writes noise that the file's name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.name.encode())).uniform(-0.3, 0.3, samples)
    soundfile.write(path, noise, rate, format="WAV", subtype="PCM_16")
    return path


def lexical_rows(frequencies, voices=("A", "B")):
    """Rows of sWUGGY: word i, which occurs frequencies[i] times, against a non-word, in every voice."""
    return [
        {
            "filename": f"{'n' if correct == '0' else ''}w{i}{voice}",
            "id": str(i),
            "voice": voice,
            "frequency": str(frequency) if correct == "1" else "",
            "word": f"word{i}" if correct == "1" else f"nonword{i}",
            "phones": "W ER D",
            "length": str(3 + i % 2),
            "correct": correct,
        }
        for i, frequency in enumerate(frequencies)
        for voice in voices
        for correct in "10"
    ]


def syntactic_rows(subtypes, ids=2, voices=("A", "B")):
    """Rows of sBLIMP: for each (type, subtype) sentences 0, 1, ... in every voice."""
    return [
        {
            "filename": f"{'u' if correct == '0' else ''}s-{kind}-{subtype}-{i}-{voice}",
            "id": str(i),
            "voice": voice,
            "type": kind,
            "subtype": subtype,
            "transcription": f"sentence, number {i}",
            "correct": correct,
        }
        for kind, subtype in subtypes
        for i in range(ids)
        for voice in voices
        for correct in "10"
    ]


def write_gold(folder: Path, rows, columns=None, bom=False, end="\n") -> Path:
    """Writes gold.csv alone; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gold.csv"
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), extrasaction="ignore", lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return path


def zerospeech(folder: Path, rows, samples: int = 320) -> Path:
    """Writes gold.csv and the recordings of its rows; returns the folder, such as root/lexical/dev."""
    write_gold(folder, rows)
    for row in rows:
        wav(folder / f"{row['filename']}.wav", samples)
    return folder


def lexical(root: Path, frequencies=(0, 3, 30), voices=("A", "B"), split="dev", samples: int = 320) -> Path:
    """Writes a small sWUGGY to root/lexical/split; returns that folder."""
    return zerospeech(root / "lexical" / split, lexical_rows(frequencies, voices), samples)


def syntactic(root: Path, subtypes=(("agr", "x"), ("agr", "y"), ("npi", "x")), split="dev", samples: int = 320) -> Path:
    """Writes a small sBLIMP to root/syntactic/split; returns that folder."""
    return zerospeech(root / "syntactic" / split, syntactic_rows(subtypes), samples)


def story(number: int) -> str:
    """The id of a story."""
    return f"{number:08x}-7b1c-4d0e-9a51-5c2d6e3f0a1b"


def storycloze(root: Path, stories: int = 3, folders=("sSC", "tSC"), samples: int = 320) -> Path:
    """Writes small StoryCloze folders to root/sSC and root/tSC; returns root. Numbers say nothing about partners."""
    for folder in folders:
        for i in range(stories):
            wav(root / folder / f"{i}_{story(i)}_correct.wav", samples)
            wav(root / folder / f"{2 * stories - i}_{story(i)}_incorrect.wav", samples)
    return root


def salmon(root: Path, parts=("speaker_consistency", "bg_alignment"), count: int = 3, samples: int = 320) -> Path:
    """Writes parts of a small SALMon, with two negatives each, to root/salmon_benchmark; returns that folder."""
    for part in parts:
        for i in range(count):
            for rank in range(3):
                wav(root / "salmon_benchmark" / part / f"sample_{i}_{rank}.wav", samples)
    return root / "salmon_benchmark"


def mark_mini(root: Path, seed: int = 0) -> Path:
    """Marks root as made by `python -m eval make-mini`; returns it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / MINI_FILE).write_text(json.dumps({"name": "mini", "seed": seed, "made_with": "tests"}))
    return root
