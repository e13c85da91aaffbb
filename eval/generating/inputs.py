"""The recordings that `python -m eval generate` is given: which, under which names, and the user's voice in them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from eval.results.schema import Skipped
from ttt_jax.data import sources
from ttt_jax.data.audio.levels import SILENT
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest
from ttt_jax.utils.paths import absolute, file_name, local, place, printable

Channel = Literal["auto", "right", "left", "mix"]
"""The user's channel of a stereo file; auto: the right one, or the left one where the right one is silent."""

DUPLEX_INPUT, DUPLEX_OUTPUT = "input.wav", "output.wav"
"""Names of Full-Duplex-Bench: a model's answer to the first lies beside it under the second."""
CODES = ".safetensors"
_log = logging.getLogger("ttt_jax")


class Input(NamedTuple):
    """A recording of the user."""

    path: Path
    name: str
    """Of its outputs: unique, a file's name."""
    digest: str
    """SHA-256 of the file, hex."""
    answer: Path | None = None
    """Where Full-Duplex-Bench expects the answer; None of other files."""

    def seed(self, base: int) -> int:
        """Returns the seed of its talk. It depends on the file's content and `base`, and on no other file."""
        return (int(self.digest[:8], 16) + base) % 2**32


def find(given: Sequence[str]) -> tuple[list[Input], list[Skipped]]:
    """Returns the recordings that files, folders and manifests name, each once, and those that cannot be used.

    Of a folder that holds files input.wav, those alone are taken. Raises `InputError` if there is none at all.
    """
    paths: dict[Path, Path] = {}
    skipped: list[Skipped] = []
    for name in given:
        try:
            found, problems = _paths(local(name))
        except InputError as error:
            found, problems = [], [str(error)]
        skipped += [Skipped(printable(name), printable(problem)) for problem in problems]
        for path in found:
            paths.setdefault(place(absolute(path)), path)
    answers = [path.name == DUPLEX_INPUT for path in paths.values()]
    names = _names(
        [absolute(path.parent if answer else path) for path, answer in zip(paths.values(), answers, strict=True)]
    )
    inputs = []
    for path, name, answer in zip(paths.values(), names, answers, strict=True):
        try:
            inputs.append(Input(path, name, file_digest(path), path.with_name(DUPLEX_OUTPUT) if answer else None))
        except InputError as error:
            skipped.append(Skipped(name, printable(str(error))))
    if not inputs:
        raise InputError(skipped[0].reason)
    return inputs, skipped


def _paths(path: Path) -> tuple[list[Path], list[str]]:
    """Returns the recordings of one word of the command line, and sentences on those that are left out."""
    if path.suffix == CODES and path.is_file():
        return [path], []
    if not path.is_dir():
        contents = sources.find([path])
    elif duplex := sorted(path.rglob(DUPLEX_INPUT), key=_natural):
        return duplex, []
    else:
        contents = sources.find([path], "folder")
    return [recording.path for recording in contents.recordings], contents.problems


def _natural(path: Path) -> list[list[str]]:
    """Returns a key that sorts numbers in names as numbers."""
    return [[piece.zfill(20) for piece in re.split(r"(\d+)", part)] for part in path.parts]


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns names of files: the last part of a path without ending, with the folders before it where they are
    alike."""
    stems = Counter(path.with_suffix("") for path in paths)
    parts = [(path.with_suffix("") if stems[path.with_suffix("")] == 1 else path).parts[1:] for path in paths]
    counts = [1] * len(paths)
    while True:
        names = ["-".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        # a.conversation.wav is the conversation of a: a recording of that name, such as an earlier one, gets another.
        names = [re.sub(r"\.conversation$", "-conversation", name) for name in names]
        times = Counter(names)
        alike = [i for i, name in enumerate(names) if times[name] > 1 and counts[i] < len(parts[i])]
        if not alike:
            break
        for i in alike:
            counts[i] += 1
    for i, path in enumerate(paths):
        if times[names[i]] > 1:  # a-b/c and a/b-c
            names[i] += f"-{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return [file_name(printable(name)) for name in names]


def read(path: Path, sample_rate: int, channel: Channel) -> np.ndarray:
    """Returns the user's voice, float32 [samples] at `sample_rate`: a channel of a stereo file, or the only one.

    Raises `InputError` if the file cannot be used.
    """
    if path.suffix == CODES:
        raise InputError(f"{path} is a file of codes, which only --score reads: give a recording.")
    audio = read_audio(path, sample_rate)
    if audio.shape[1] == 0:
        raise InputError(f"{path} is shorter than a sample at {sample_rate} Hz: give a longer recording.")
    if channel == "auto" and len(audio) == 2 and _quiet(audio[1]) and not _quiet(audio[0]):
        _log.warning("%s has no sound in its right channel, the user's: the left one is heard.", path)
        channel = "left"
    return {"auto": audio[-1], "right": audio[-1], "left": audio[0], "mix": audio.mean(0)}[channel]


def _quiet(audio: np.ndarray) -> bool:
    return float(np.abs(audio).max(initial=0)) < SILENT
