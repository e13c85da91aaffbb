"""MPEG audio (mp3; ISO/IEC 11172-3, 13818-3 and MPEG-2.5): its length by counting frames.

A frame states its own length only. Without a header that counts the frames (Xing, Info, VBRI), decoders guess their
number from the first bit rates and stop there. So the frames are counted here, and every part gets a true Info header
(http://gabriel.mp3-tech.org/mp3infotag.html). A part ends at the next such header, at a tag, and where rate or channels
change.
"""

from __future__ import annotations

import dataclasses
import functools

from ttt_jax.data.audio.containers.source import STRAY, Part, Source, count_zeros, skip_stray, skip_tags

_BLOCK = 1 << 20  # bytes read at a time
_SEARCH = 1 << 16  # bytes that are searched for a first frame: stations' streams begin within a frame
_LONGEST = 2881  # bytes of a frame
_INFO = 140  # bytes of an Info header with all its fields
_CERTAIN = 3  # frames in a row that prove MPEG audio
_PAIRS = 288  # of values in a granule: half of its 576
_OPEN = 0x7FFF0000  # counts from here on, and 0, mean "not known"
# Hz by version (3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_KBITS = {  # by (MPEG-1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclasses.dataclass(frozen=True)
class _Frame:
    length: int  # bytes
    samples: int  # of each channel
    kind: tuple[int, int, int, bool]  # version, layer, rate, mono: the same in all frames of a part
    info_at: int  # offset of a Xing or Info header: behind the side information of layer III


@dataclasses.dataclass(frozen=True)
class _Info:
    """A frame without sound that counts the frames behind it."""

    frame: bytes
    begin: int  # offset of the header in the frame
    count_at: int  # offset of the number of frames; 0 if it is missing or not a Xing header's
    size_at: int  # offset of the number of bytes, likewise
    count: int | None  # None if not stated
    size: int | None  # bytes from this frame to the end; None if not stated


@functools.lru_cache(1 << 14)
def _parse(header: bytes) -> _Frame | None:
    """Returns the frame with this header of four bytes, or None if it is none. A free bit rate is not read."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    mpeg1 = version == 3
    samples = 384 if layer == 1 else 576 if layer == 3 and not mpeg1 else 1152
    hertz, per_second = _RATES[version][rate], _KBITS[mpeg1, layer][bits - 1] * 1000
    padding = header[2] >> 1 & 1
    slot = 4 if layer == 1 else 1  # bytes
    length = (samples // 8 // slot * per_second // hertz + padding) * slot
    mono = header[3] >> 6 == 3
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    return _Frame(length, samples, (version, layer, hertz, mono), 4 + side)


def find_parts(source: Source, at: int) -> list[Part]:
    """Returns the parts of MPEG audio from `at` on; none if there is no MPEG audio. Raises `InputError`."""
    begin = _search(source, at)
    if begin is None:
        return []
    if begin - at >= _LONGEST:
        raise source.cut_off(f"{begin - at} bytes before its first whole MPEG frame are no such frame")
    if begin > at:
        source.warn(f"has {begin - at} bytes before its first whole MPEG frame, which are left out")
    parts: list[Part] = []
    at = begin
    while True:
        part, end, counted = _part(source, at)
        if part is not None:
            parts.append(part)
        zeros = 0 if counted else count_zeros(source, end)
        if zeros >= STRAY:  # a broken copy leaves them
            raise source.cut_off(f"{zeros} zeros from byte {end} on are no MPEG frame, and no header counts its frames")
        if zeros:
            source.warn(f"has {zeros} zeros behind its frames at byte {end}, and may be cut off: no header counts them")
        at = skip_tags(source, end)
        if not _is_frame(source, at, 2):
            break
        # Zeros between frames are lost sound, unless another file begins behind them.
        if source.read(end, 1) == b"\0" and _info(source.read(at, _LONGEST), _parse(source.read(at, 4))) is None:
            raise source.cut_off(f"{at - end} bytes from byte {end} on are no MPEG frame")
    if 0 < source.size - at < 4 and source.read(at, 1) == b"\xff":
        raise source.cut_off("its last frame is incomplete")
    damaged = _search(source, at)
    if damaged is not None:
        raise source.cut_off(f"{damaged - at} bytes from byte {at} on are no MPEG frame")
    skip_stray(source, at, "MPEG")
    return parts


def _search(source: Source, at: int) -> int | None:
    """Returns the first position of MPEG audio from `at` on; None if none is near."""
    if _is_frame(source, at, _CERTAIN):
        return at
    data = source.read(at, _SEARCH)
    found = data.find(b"\xff")
    while found >= 0:
        if _parse(data[found : found + 4]) is not None and _is_frame(source, at + found, _CERTAIN, whole=True):
            return at + found
        found = data.find(b"\xff", found + 1)
    return None


def _is_frame(source: Source, at: int, count: int, whole: bool = False) -> bool:
    """Returns whether `count` frames of a kind stand in a row, or unless `whole` fewer up to the end."""
    kind = None
    for number in range(count):
        frame = _parse(source.read(at, 4))
        if frame is None or kind not in (None, frame.kind):
            return number > 0 and not whole and skip_tags(source, at) >= source.size
        kind, at = frame.kind, at + frame.length
    return True


def _part(source: Source, start: int) -> tuple[Part | None, int, bool]:
    """Returns the frames of one kind from a position on (None if they have no sound), their end, and whether a header
    counts them all."""
    first = _parse(source.read(start, 4))
    info = _info(source.read(start, first.length), first)
    begin = start if info is None else start + first.length
    count, end, cut, broken = _count(source, begin, first.kind)
    if broken:
        source.warn(f"holds {broken} damaged frames among {count}: they are read as far as the decoder can")
    stated = None if info is None else info.count
    if stated is not None and count < stated:
        complete = info.size is None or start + info.size <= end
        if stated - count > 1 or cut or not complete:
            raise source.cut_off(f"its header counts {stated} frames, {count} are there")
        if info.size is None:  # else the encoder counted the header's own frame
            source.warn(f"counts {stated} frames in its header, one more than are there: {count} are read")
    elif cut:
        raise source.cut_off("its last frame is incomplete")
    elif stated is not None and count > stated:
        source.warn(f"counts {stated} frames in its header, which is wrong: the {count} that are there are read")
    elif info is not None and info.count_at and stated is None:
        source.warn(f"counts no frames in its header, which is unfinished: the {count} that are there are read")
    counted = stated is not None and count <= stated
    if count == 0:
        return None, end, counted
    if first.kind[1] != 3:  # layers I and II have no such header and a constant bit rate
        return Part(b"", begin, end, count * first.samples), end, False
    if info is not None and info.count_at and len(info.frame) >= info.begin + _INFO:
        head = _true_info(first, info, count, end - start)
    else:
        head = _made_info(source.read(begin, 4), count)
    return Part(head, begin, end), end, counted


def _true_info(first: _Frame, info: _Info, count: int, size: int) -> bytes:
    """Returns the frame of a header with true numbers; delay and padding of the encoder stay."""
    frame = bytearray(info.frame)
    frame[info.count_at : info.count_at + 4] = count.to_bytes(4, "big")
    if info.size_at:
        frame[info.size_at : info.size_at + 4] = size.to_bytes(4, "big")
    frame[1] |= 1  # no checksum follows, so the header stands where decoders look for it
    shift = info.begin - first.info_at
    return bytes(frame[:4] + frame[4 + shift :] + bytes(shift))


def _made_info(header: bytes, count: int) -> bytes:
    """Returns a frame of the same kind with an Info header that states the number of frames."""
    bits = 5 if header[1] & 8 else 8  # 64 kbit/s: long enough for the header at every rate
    start = bytes([header[0], header[1] | 1, bits << 4 | header[2] & 0x0C, header[3]])
    frame = _parse(start)
    content = start.ljust(frame.info_at, b"\0") + b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return content.ljust(frame.length, b"\0")


def _count(source: Source, at: int, kind: tuple[int, int, int, bool]) -> tuple[int, int, bool, int]:
    """Counts the frames of a kind from `at` on up to the next header.

    Returns the number of whole frames, their end, whether the file ends within one more, and how many are damaged.
    """
    count, broken, block, base = 0, 0, b"", at
    while True:
        i = at - base
        if len(block) - i < _LONGEST and base + len(block) < source.size:
            block, base, i = source.read(at, _BLOCK), at, 0
        frame = _parse(block[i : i + 4])
        if frame is None or frame.kind != kind or (count and _info(block[i : i + frame.length], frame) is not None):
            return count, at, False, broken
        if at + frame.length > source.size:
            return count, at, True, broken
        broken += kind[1] == 3 and _is_damaged(block[i : i + frame.length], frame)
        count, at = count + 1, at + frame.length


def _is_damaged(data: bytes, frame: _Frame) -> bool:
    """Returns whether the side information of a frame of layer III promises more than a frame can hold."""
    mpeg1, channels = frame.kind[0] == 3, 1 if frame.kind[3] else 2
    begin = 4 if data[1] & 1 else 6  # behind a checksum
    length = frame.info_at - 4
    bits = int.from_bytes(data[begin : begin + length], "big")
    granule = 59 if mpeg1 else 63  # bits on each granule of each channel, at the end
    fields = [bits >> granule * number + granule - 21 & 0x1FFFFF for number in range(channels * (2 if mpeg1 else 1))]
    borrowed = bits >> 8 * length - (9 if mpeg1 else 8)  # bytes of frames before this one
    there = borrowed + frame.length - begin - length
    return any(field & 0x1FF > _PAIRS for field in fields) or sum(field >> 9 for field in fields) > 8 * there


def _info(data: bytes, frame: _Frame) -> _Info | None:
    """Returns the header in a frame; None if it is a frame of sound."""
    data = data[: frame.length]
    if frame.kind[1] != 3:
        return None
    if data[36:40] == b"VBRI" and len(data) >= 54:
        return _Info(data, 36, 0, 0, _stated(data[50:54]), _stated(data[46:50]))
    for at in (frame.info_at, frame.info_at + 2):  # encoders disagree on whether a checksum stands before it
        if data[at : at + 4] in (b"Xing", b"Info") and not any(data[6:at]) and len(data) >= at + 8:
            break
    else:
        return None
    flags, field = data[at + 7], at + 8
    count_at = field if flags & 1 and len(data) >= field + 4 else 0
    field += 4 if flags & 1 else 0
    size_at = field if flags & 2 and len(data) >= field + 4 else 0
    count = _stated(data[count_at : count_at + 4]) if count_at else None
    return _Info(data, at, count_at, size_at, count, _stated(data[size_at : size_at + 4]) if size_at else None)


def _stated(field: bytes) -> int | None:
    number = int.from_bytes(field, "big")
    return number if 0 < number < _OPEN else None
