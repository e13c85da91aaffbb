"""What a sound file holds, by walking its container: its parts, each with a length that is that of its bytes.

A length in a header may be wrong: of a file that was written to a pipe, whose recorder crashed, that is over 4 GB, or that
was joined of several by `cat`. Decoders believe it and stop early. So each container is walked here, and every part of it is
given to the decoder as a file of its own with a true header (`Window`). What cannot be true is refused, what was
mended is said.
"""

from __future__ import annotations

from ttt_jax.data.audio.containers import flac, magic, mpeg, ogg, wav
from ttt_jax.data.audio.containers.source import Part, Source, Window, skip_tags
from ttt_jax.data.audio.formats import advice
from ttt_jax.errors import InputError

__all__ = ["Part", "Source", "Window", "find_parts"]


def find_parts(source: Source) -> list[Part]:
    """The parts of a sound file in order, found in one pass over it at most, in memory of constant size.

    Raises:
        InputError: the file is empty, is no wav, flac, ogg or mp3, or is cut off or damaged.
    """
    if source.size == 0:
        raise InputError(f"{source.path} is an empty file (0 bytes): give a wav, flac, ogg or mp3 file.")
    at = skip_tags(source, 0)
    for container in (wav, ogg, flac):
        if container.begins(source, at):
            return container.find_parts(source, at)
    name = magic.name(source.read(0, magic.SIZE)) or magic.name(source.read(at, magic.SIZE))
    if name is not None and name.convertible:
        raise InputError(f"{source.path} is {name.text}, which is not read: {advice(source.path)}.")
    if name is not None:
        raise InputError(f"{source.path} is {name.text}, no sound: give a wav, flac, ogg or mp3 file.")
    parts = mpeg.find_parts(source, at)
    if not parts:
        raise InputError(f"{source.path} is not audio that can be read: give a wav, flac, ogg or mp3 file.")
    return parts
