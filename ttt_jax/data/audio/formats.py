"""Sound and video formats by the endings of file names."""

from __future__ import annotations

import shlex
from pathlib import Path

READ = (".wav", ".wave", ".bwf", ".rf64", ".flac", ".fla", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mp1", ".mpga")
"""Endings of files that `ttt_jax.data.audio.reader` reads."""

OTHER = (
    *(".3gp", ".8svx", ".aac", ".ac3", ".ac4", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".asf", ".au"),
    *(".avi", ".avr", ".caf", ".dff", ".dsf", ".dts", ".eac3", ".flv", ".gsm", ".m2ts", ".m4a", ".m4b", ".m4v"),
    *(".mka", ".mkv", ".mov", ".mp4", ".mpc", ".mpeg", ".mpg", ".mts", ".pcm", ".qt", ".ra", ".raw", ".rm"),
    *(".sd2", ".shn", ".snd", ".sph", ".spx", ".tta", ".voc", ".w64", ".weba", ".webm", ".wma", ".wmv", ".wv"),
)
"""Endings of other sound and video, which must be converted first."""


def is_read(path: Path) -> bool:
    """Returns whether a file is audio that is read, by its ending."""
    return path.suffix.lower() in READ


def is_other(path: Path) -> bool:
    """Returns whether a file is sound or video that must be converted first, by its ending."""
    return path.suffix.lower() in OTHER


def conversion(path: Path, options: str = "") -> str:
    """Returns the command that writes the sound of a file as flac beside it, with options for reading it."""
    new = f"{path.stem}.flac" if path.suffix.lower() != ".flac" else f"{path.stem}-new.flac"
    return f"ffmpeg {options}-i {shlex.quote(path.name)} {shlex.quote(new)}"


def advice(path: Path) -> str:
    """Returns the end of a message: how to convert a file."""
    return f"convert it first, for example by {conversion(path)}"
