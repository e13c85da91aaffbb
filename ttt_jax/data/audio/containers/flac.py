"""FLAC files (RFC 9639): their length from the last frame, as that in STREAMINFO may be missing or wrong.

Each frame states its number (or that of its first sample) and its length, and ends with a checksum over the frame. So
the last frame shows the length of the stream, and that it is whole.
"""

from __future__ import annotations

import dataclasses

from ttt_jax.data.audio.containers.source import Part, Source, skip_stray, skip_tags

_BEGIN = 42  # bytes of the magic and the STREAMINFO block
_BLOCKS = 1000  # no file has more blocks of metadata
_BACK = 1 << 20  # bytes before the end that are searched for the last frame: twice the largest frame of two channels
_TRIES = 16  # frame headers to try; the last or the one before it is whole
_RATES = (None, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)  # Hz by code
_TOTAL = (1 << 36) - 1  # largest number of samples that STREAMINFO can state; also means "not known"
_SIZES = {1: 192, **{code: 576 << code - 2 for code in range(2, 6)}, **{code: 256 << code - 8 for code in range(8, 16)}}


def begins(source: Source, at: int) -> bool:
    """Returns whether a FLAC stream begins at a position."""
    head = source.read(at, 8)
    return head[:4] == b"fLaC" and head[4] & 0x7F == 0 and head[5:8] == b"\x00\x00\x22"


def find_parts(source: Source, at: int) -> list[Part]:
    """Returns the FLAC streams, one behind the other, from `at` on. Raises `InputError`."""
    parts: list[Part] = []
    while True:
        first = _first_frame(source, at)
        following = _next(source, first)
        part, end = _part(source, at, first, following)
        if part.samples:
            parts.append(part)
        skip_stray(dataclasses.replace(source, size=following), end, "FLAC")
        if following >= source.size:
            return parts
        at = following


def _first_frame(source: Source, at: int) -> int:
    """Returns the position of the frames, behind the blocks of metadata."""
    at += 4
    for _ in range(_BLOCKS):
        head = source.read(at, 4)
        if len(head) < 4:
            break
        at += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    if at > source.size:
        raise source.cut_off("it ends within its header")
    return at


def _next(source: Source, at: int) -> int:
    """Returns the position of the next stream from `at` on, or the end of the file."""
    while (found := source.find(b"fLaC", at)) >= 0:
        if begins(source, found):
            return found
        at = found + 4
    return source.size


def _part(source: Source, at: int, first: int, following: int) -> tuple[Part, int]:
    """Returns a stream with its true length, and the end of its last frame."""
    head = source.read(at, _BEGIN)
    if len(head) < _BEGIN:
        raise source.cut_off("it ends within its header")
    stated = int.from_bytes(head[18:26], "big") & _TOTAL
    samples, end = 0, first
    if skip_tags(source, first) < following:
        samples, end = _last_frame(source, head, first, following)
    if _samples_up_to(source.read(end, 16), head) is not None:
        raise source.cut_off("its last frame is incomplete")
    if stated == _TOTAL or 0 < stated < samples:
        source.warn(f"states {stated} samples in its header, which is wrong: the {samples} that are there are read")
    elif stated > samples:
        raise source.cut_off(f"its header promises {stated} samples, its frames hold {samples}")
    fields = int.from_bytes(head[18:26], "big") & ~_TOTAL | samples
    return Part(head[:18] + fields.to_bytes(8, "big") + head[26:], at + _BEGIN, end, samples), end


def _last_frame(source: Source, head: bytes, first: int, end: int) -> tuple[int, int]:
    """Returns the number of samples up to the end of the last whole frame, and the position of that end."""
    start = max(first, end - _BACK)
    tail = source.read(start, end - start)
    found, tried = len(tail), 0
    while tried < _TRIES:
        found = max(tail.rfind(mark, 0, found) for mark in (b"\xff\xf8", b"\xff\xf9"))
        if found < 0:
            break
        samples = _samples_up_to(tail[found : found + 16], head)
        if samples is not None:
            tried += 1
            stops = [start + stop for stop in _checked_ends(tail, found)]
            clean = [stop for stop in stops if skip_tags(source, stop) >= end]
            if stops:
                return samples, (clean or stops)[-1]
        found += 1  # this mark may overlap with one before it
    raise source.cut_off("its last frame is incomplete, or none fits its header")


def _samples_up_to(header: bytes, head: bytes) -> int | None:
    """Returns the number of samples up to the end of the frame with this header; None if it is no frame header."""
    if len(header) < 6:
        return None
    variable, size_code, rate_code = header[1] & 1, header[2] >> 4, header[2] & 0xF
    if size_code == 0 or rate_code == 15 or header[3] & 1 or header[3] >> 4 > 10:
        return None
    lead = header[4]
    length = 1 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length()  # bytes of the number, coded as in UTF-8
    if not 1 <= length <= 7 or (lead >= 0x80 and length < 2) or len(header) < 4 + length + 1:
        return None
    number = lead if length == 1 else lead & (0x7F >> length)
    for byte in header[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    at = 4 + length
    extra = {6: 1, 7: 2}.get(size_code, 0)
    samples = int.from_bytes(header[at : at + extra], "big") + 1 if extra else _SIZES[size_code]
    at += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    if _rate(header, rate_code, at) not in (None, int.from_bytes(head[18:21], "big") >> 4):
        return None
    nominal = int.from_bytes(head[10:12], "big")  # samples of every frame but the last, if fixed
    return (number if variable else number * nominal) + samples


def _rate(header: bytes, code: int, end: int) -> int | None:
    """Returns the rate in Hz by a frame's code or in the bytes before `end`; None if the frame states none."""
    if code == 12:
        return header[end - 1] * 1000
    if code in (13, 14):
        return int.from_bytes(header[end - 2 : end], "big") * (1 if code == 13 else 10)
    return _RATES[code] if code < len(_RATES) else None


def _checked_ends(data: bytes, start: int) -> list[int]:
    """Returns the ends that the checksum allows for the frame at `start`: the true end, and rarely others."""
    ends, remainder = [], 0
    for at in range(start, len(data)):
        before, remainder = remainder, (remainder << 8 & 0xFFFF) ^ _CRC16[remainder >> 8 ^ data[at]]
        if remainder == 0 and before != 0:
            ends.append(at + 1)
    return ends


def _crc8(data: bytes) -> int:
    remainder = 0
    for byte in data:
        remainder = _CRC8[remainder ^ byte]
    return remainder


def _table(polynomial: int, bits: int) -> list[int]:
    """Returns the remainders of all bytes for a checksum of so many bits."""
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
        table.append(value & (1 << bits) - 1)
    return table


_CRC8, _CRC16 = _table(0x07, 8), _table(0x8005, 16)
