"""Ogg files: their links (RFC 3533), which are files joined one behind the other, checked page by page.

A link is whole if its pages are numbered without a gap, their checksums are right, their positions (granules) never go
back, and each of its streams ends with a page that has the end mark. The position of that page is the length of the
stream. It may drop samples of the last page only, and the decoder must reach it.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

from ttt_jax.data.audio.containers.source import Part, Source, skip_stray, skip_tags
from ttt_jax.data.audio.formats import advice
from ttt_jax.errors import InputError

_HEADER = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4  # flags of a page: it begins, it ends a stream
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_NO_POSITION = -1  # of a page on which no packet ends
_READ = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus"}
_OTHER = {b"\x7fFLAC": "FLAC", b"Speex   ": "Speex", b"\x80theora": "Theora video"}


@dataclasses.dataclass
class _Stream:
    number: int = 0  # of the last page
    position: int = 0
    ended: bool = False


def begins(source: Source, at: int) -> bool:
    """Returns whether an Ogg page begins at a position."""
    return source.read(at, 4) == b"OggS"


def find_parts(source: Source, at: int) -> list[Part]:
    """Returns the links from `at` on. Raises `InputError`."""
    parts: list[Part] = []
    while begins(source, at):
        end = _link(source, at)
        parts.append(Part(b"", at, end))
        at = skip_tags(source, end)
    skip_stray(source, at, "Ogg")
    return parts


def _link(source: Source, start: int) -> int:
    """Walks the pages of one link; returns its end."""
    streams: dict[int, _Stream] = {}
    names: list[str] = []
    at, beginning = start, True
    while not (streams and not beginning and all(stream.ended for stream in streams.values())):
        head = source.read(at, _HEADER.size + 255)
        if head[:4] != b"OggS":
            # A first page may have the end mark: a stream without samples.
            missing = "its last Ogg page lacks the end mark" if at >= source.size else f"byte {at} begins no Ogg page"
            raise source.cut_off(missing)
        if len(head) < _HEADER.size:
            raise source.cut_off("its last Ogg page is incomplete")
        _, version, flags, position, serial, number, stated, segments = _HEADER.unpack(head[: _HEADER.size])
        lengths = head[_HEADER.size : _HEADER.size + segments]
        body = at + _HEADER.size + segments
        end = body + sum(lengths)
        if len(lengths) < segments or end > source.size:
            raise source.cut_off("its last Ogg page is incomplete")
        if checksum(source.read(at, end - at)) != stated:
            raise source.cut_off(f"the checksum of the Ogg page at byte {at} is wrong")
        if flags & _FIRST:
            if not beginning:
                raise source.cut_off(f"another stream begins at byte {at} before the last one has its end mark")
            if version != 0 or serial in streams:
                raise source.cut_off(f"the Ogg page at byte {at} has a wrong header")
            streams[serial] = _Stream(number, 0, bool(flags & _LAST))
            content = source.read(body, 8)
            names += [name for magic, name in (_READ | _OTHER).items() if content.startswith(magic)]
        else:
            beginning = False
            stream = streams.get(serial)
            if version != 0 or stream is None or stream.ended:
                raise source.cut_off(f"the Ogg page at byte {at} has a wrong header")
            _advance(source, stream, flags, position, number, at)
        at = end
    if len(names) != 1 or names[0] not in _READ.values():
        held = " and ".join(names) if names else "no known stream"
        raise InputError(
            f"{source.path} is an Ogg file that holds {held}, where one stream of Vorbis or Opus is read:"
            f" {advice(source.path)}."
        )
    return at


def checksum(page: bytes) -> int:
    """Returns the CRC-32 of an Ogg page, its checksum field taken as 0.

    It is zlib's on bytes in reverse bit order, starting from 0 and not inverted at the end.
    """
    page = page[:22] + bytes(4) + page[26:]
    remainder = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(remainder.to_bytes(4, "little").translate(_REVERSED), "big")


def _advance(source: Source, stream: _Stream, flags: int, position: int, number: int, at: int) -> None:
    if number != stream.number + 1 & 0xFFFFFFFF:
        raise source.cut_off(f"Ogg pages are missing before byte {at}: number {number} follows {stream.number}")
    if position != _NO_POSITION:
        if position < stream.position:
            raise source.cut_off(f"the Ogg page at byte {at} states position {position}, less than the page before it")
        stream.position = position
    elif flags & _LAST:
        raise source.cut_off("its last Ogg page states no length")
    stream.number, stream.ended = number, bool(flags & _LAST)
