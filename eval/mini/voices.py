"""Synthesisers of the mini benchmarks: the system programs flite and espeak-ng, called with text or phones."""

from __future__ import annotations

import abc
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from eval.mini.words import Phones, bare
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

RATE = 16_000
"""Samples a second of all recordings."""

_FRAME = RATE // 100
_QUIET = 10 ** (-45 / 20)
"""Of the loudest 10 ms: frames below it at either end are no speech."""
MARGIN = RATE // 10
"""Silence at either end, samples."""
_LEVEL, _PEAK = 0.05, 0.9
"""Root mean square of speech, -26 dB of full scale; and the largest sample, for the sake of which it is lower."""


class Synthesiser(abc.ABC):
    """A program with voices."""

    NAME: ClassVar[str]
    VOICES: ClassVar[dict[str, str]]
    """Gender by the voice's name; the first four are the usual ones."""

    LIST: ClassVar[str]
    """Option that lists the voices."""

    def version(self) -> str:
        """Returns the version that the program states."""
        found = re.search(r"\d+(\.\d+)+", self._output("--version"))
        return found.group() if found else "unknown"

    def has(self, voice: str) -> bool:
        """Returns whether a voice is installed; the programs speak with another if it is not."""
        return self._entry(voice) in self._output(self.LIST).split()

    def _output(self, option: str) -> str:
        done = subprocess.run([self.NAME, option], capture_output=True, text=True)
        return done.stdout + done.stderr

    @abc.abstractmethod
    def _entry(self, voice: str) -> str:
        """Returns the word that stands for a voice in the program's list."""

    @abc.abstractmethod
    def _text(self, voice: str, text: str, wav: Path) -> list[str]:
        """Returns the command that writes a text to a file."""

    @abc.abstractmethod
    def _phones(self, voice: str, phones: Phones, wav: Path) -> list[str]:
        """Returns the command that writes phones to a file."""

    def say(self, text: str | Phones, voice: str) -> np.ndarray:
        """Returns a text, or phones, as float32 [samples] at `RATE`: `tidy`, one level for all."""
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "speech.wav"
            command = (self._text if isinstance(text, str) else self._phones)(voice, text, wav)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not wav.is_file():
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise InputError(f"{self.NAME} did not speak with the voice {voice} ({reason}): install it again.")
            return tidy(read_audio(wav, RATE)[0])


class Flite(Synthesiser):
    """CMU Flite with its compiled voices (a licence like BSD)."""

    NAME = "flite"
    VOICES = {"slt": "f", "rms": "m", "awb": "m", "kal16": "m"}

    LIST = "-lv"

    def _entry(self, voice: str) -> str:
        return voice

    def _text(self, voice: str, text: str, wav: Path) -> list[str]:
        return [self.NAME, "-voice", voice, "-t", text, "-o", str(wav)]

    def _phones(self, voice: str, phones: Phones, wav: Path) -> list[str]:
        names = ["ax" if phone == "AH0" else bare((phone,))[0].lower() for phone in phones]
        return [self.NAME, "-voice", voice, "-p", " ".join(["pau", *names, "pau"]), "-o", str(wav)]


class EspeakNg(Synthesiser):
    """eSpeak NG (GPL-3; what it speaks is free to use)."""

    NAME = "espeak-ng"
    VOICES = {
        **{"en-us+f2": "f", "en-us+m2": "m", "en-us+f3": "f", "en-us+m1": "m"},
        **{"en-us+f4": "f", "en-us+f1": "f", "en-us+m3": "m", "en-us+m7": "m"},
    }

    LIST = "--voices=variant"

    _PHONES = {
        **{"AA": "A:", "AE": "a", "AH": "V", "AO": "O:", "AW": "aU", "AY": "aI", "EH": "E", "ER": "3:", "EY": "eI"},
        **{"IH": "I", "IY": "i:", "OW": "oU", "OY": "OI", "UH": "U", "UW": "u:"},
        **{"CH": "tS", "DH": "D", "HH": "h", "JH": "dZ", "NG": "N", "SH": "S", "TH": "T", "Y": "j", "ZH": "Z"},
    }
    """Where its name of a phone is not the small letter."""
    _UNSTRESSED = {"AH": "@", "ER": "3", "IY": "i"}

    def _entry(self, voice: str) -> str:
        return f"!v/{voice.partition('+')[2]}"

    def _text(self, voice: str, text: str, wav: Path) -> list[str]:
        return [self.NAME, "-v", voice, "-w", str(wav), text]

    def _phones(self, voice: str, phones: Phones, wav: Path) -> list[str]:
        spelled = ""
        for phone, plain in zip(phones, bare(phones), strict=True):
            stress = phone[len(plain) :]
            name = self._PHONES.get(plain, plain.lower())
            if stress == "0":
                name = self._UNSTRESSED.get(plain, name)
            spelled += {"1": "'", "2": ","}.get(stress, "") + name
        return self._text(voice, f"[[{spelled}]]", wav)


SYNTHESISERS: dict[str, Synthesiser] = {kind.NAME: kind() for kind in (Flite, EspeakNg)}
"""By name; the one preferred is first, because its phones are clearer."""


def find(name: str | None) -> Synthesiser:
    """Returns the synthesiser of this name, or the first that is installed. Raises `InputError` if there is none."""
    found = next((each for each in ([name] if name else SYNTHESISERS) if shutil.which(each)), None)
    if found is None:
        what = f"{name} is not" if name else f"none of {' and '.join(SYNTHESISERS)} is"
        raise InputError(
            f"{what} installed, but speech is made with it: install it, on Debian and Ubuntu by"
            f" `apt-get install {name or next(iter(SYNTHESISERS))}`."
        )
    return SYNTHESISERS[found]


def choose(synthesiser: Synthesiser, names: str | None) -> list[str]:
    """Returns the voices that `names` joins by commas; without, the usual four. Raises `InputError` for others."""
    voices = list(synthesiser.VOICES)[:4] if names is None else [name.strip() for name in names.split(",")]
    for voice in voices:
        if voice not in synthesiser.VOICES:
            raise InputError(
                f"{voice or 'an empty name'} is no voice of {synthesiser.NAME} that is used here: give some of"
                f" {', '.join(synthesiser.VOICES)}."
            )
        if not synthesiser.has(voice):
            raise InputError(
                f"the voice {voice} of {synthesiser.NAME} is not installed: install all its voices, or give other"
                " --voices."
            )
    if len(set(voices)) < len(voices):
        raise InputError(f"--voices {names} names a voice twice: give each once.")
    return voices


def speech(audio: np.ndarray) -> slice:
    """Returns where the speech in float32 [samples] lies: what is no quieter than 45 dB below its loudest 10 ms.

    Raises `InputError` if all is silent.
    """
    frames = len(audio) // _FRAME
    energy = np.sqrt((audio[: frames * _FRAME].reshape(frames, _FRAME) ** 2).mean(1))
    if not energy.any():
        raise InputError("the synthesiser gave silence: give another --synthesiser or other --voices.")
    loud = np.flatnonzero(energy > energy.max() * _QUIET)
    return slice(loud[0] * _FRAME, (loud[-1] + 1) * _FRAME)


def tidy(audio: np.ndarray) -> np.ndarray:
    """Returns the speech in float32 [samples] at one level, with a tenth of a second of silence at either end."""
    return np.pad(level(audio[speech(audio)]), MARGIN)


def level(audio: np.ndarray) -> np.ndarray:
    """Returns float32 [samples] scaled to the level of all recordings. `audio` is not silent."""
    scale = min(_LEVEL / np.sqrt(np.mean(audio**2)), _PEAK / np.abs(audio).max())
    return (audio * scale).astype(np.float32)


def same_length(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two recordings, the shorter with silence behind it, so that no length tells them apart."""
    length = max(len(one), len(other))
    return np.pad(one, (0, length - len(one))), np.pad(other, (0, length - len(other)))
