"""The parts of a sound file with their true lengths, found by walking its container.

Lengths in headers are wrong in files that were written to a pipe, whose recorder crashed, that are over 4 GB, or that
`cat` joined of several. Decoders trust them and stop early. So each container is walked here, and the decoder gets
every part as a file with a true header (`Window`). Impossible lengths are refused; corrected lengths are logged.
"""

from __future__ import annotations

from ttt_jax.data.audio.containers import flac, magic, mpeg, ogg, wav
from ttt_jax.data.audio.containers.source import Part, Source, Window, skip_tags
from ttt_jax.data.audio.formats import advice
from ttt_jax.errors import InputError

__all__ = ["Part", "Source", "Window", "find_parts"]


def find_parts(source: Source) -> list[Part]:
    """Returns the parts of a sound file in order, in one pass over it. Raises `InputError` if it cannot be read."""
    if source.size == 0:
        raise InputError(f"{source.path} is an empty file (0 bytes): give a wav, flac, ogg or mp3 file.")
    at = skip_tags(source, 0)
    for container in (wav, ogg, flac):
        if container.begins(source, at):
            return container.find_parts(source, at)
    for head in (source.read(0, magic.SIZE), source.read(at, magic.SIZE)):
        if (text := magic.sound(head)) is not None:
            raise InputError(f"{source.path} is {text}, which is not read: {advice(source.path)}.")
        if (text := magic.no_sound(head)) is not None:
            raise InputError(f"{source.path} is {text}, no sound: give a wav, flac, ogg or mp3 file.")
    parts = mpeg.find_parts(source, at)
    if not parts:
        raise InputError(f"{source.path} is not audio that can be read: give a wav, flac, ogg or mp3 file.")
    return parts
