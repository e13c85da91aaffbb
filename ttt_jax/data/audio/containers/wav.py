"""Wav files (RIFF, RIFX, RF64, BW64): the true beginning and end of the sound.

docs/data/audio.md ("A wav's data size") lists which stated sizes are right, mended with a warning, or refused.
"""

from __future__ import annotations

import dataclasses
import struct

from ttt_jax.data.audio.containers import mpeg
from ttt_jax.data.audio.containers.source import STRAY, Part, Source, skip_stray, skip_tags
from ttt_jax.data.audio.formats import conversion
from ttt_jax.errors import InputError

_OPEN = 0xFFFFFFFF
_NEAR = 1 << 16  # sizes this near 2**32 or 2**31 are marks: writers subtract headers, or round down to their blocks
_CHUNKS = 1000  # no header has more chunks
_KNOWN = (  # chunks without sound: a cut in one loses none
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"bext", b"iXML", b"PEAK", b"fact", b"cue ", b"smpl", b"inst", b"JUNK"),
    *(b"junk", b"PAD ", b"_PMX", b"LGWV", b"acid", b"plst", b"afsp", b"DISP", b"axml", b"chna", b"umid", b"FLLR"),
    *(b"levl", b"cart", b"ds64", b"r64m", b"aXML", b"sxml", b"dbmd", b"MD5 ", b"mext", b"qlty", b"link", b"ovwf"),
    *(b"regn", b"minf", b"elm1", b"DGDA", b"ResU", b"AFAn", b"AFmd", b"Cr8r", b"SNDM", b"SMED", b"SyLp", b"tlst"),
    *(b"strc", b"basc", b"trns", b"cate", b"CSET", b"IDIT", b"clm ", b"wamd", b"guan"),
)
_PLAIN = (1, 3, 6, 7)  # codec numbers with samples of fixed size: PCM, float, A-law, mu-law
_MPEG = (0x50, 0x55)
_EXTENSIBLE = 0xFFFE
_LARGEST = 0xFFFF0000  # bytes of sound above which the header must be that of an RF64


@dataclasses.dataclass(frozen=True)
class _Header:
    order: str  # of the bytes in numbers, as in struct
    format: bytes  # content of the fmt chunk
    whole: int | None  # end of the RIFF chunk by its size; None if not stated
    start: int  # of the sound
    size: int | None  # of the data chunk; None if not stated


def begins(source: Source, at: int) -> bool:
    """Returns whether a wav file begins at a position."""
    head = source.read(at, 12)
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:] == b"WAVE"


def find_parts(source: Source, at: int) -> list[Part]:
    """Returns the wav files, one behind the other, from `at` on. Raises `InputError`."""
    parts: list[Part] = []
    while begins(source, at):
        header = _read_header(source, at)
        end, at = _end(source, header)
        parts += _parts(source, header, end)
        at = skip_tags(source, at)
    skip_stray(source, at, "wav")
    return parts


def _read_header(source: Source, at: int) -> _Header:
    magic = source.read(at, 4)
    order = ">" if magic == b"RIFX" else "<"
    whole = struct.unpack(order + "I", source.read(at + 4, 4))[0]
    large: tuple[int, int] | None = None  # sizes of an RF64 file: of the whole, of the data
    form = b""
    begin, at = at + 8, at + 12
    for _ in range(_CHUNKS):
        header = source.read(at, 8)
        if len(header) < 8:
            break
        chunk, length = header[:4], struct.unpack(order + "I", header[4:])[0]
        at += 8
        if chunk == b"ds64":
            large = struct.unpack("<QQ", source.read(at, 16).ljust(16, b"\0"))
        elif chunk == b"fmt ":
            form = source.read(at, min(length, 1024))
            if len(form) < 14:
                raise source.cut_off(f"its fmt chunk has {len(form)} bytes")
            if struct.unpack(order + "H", form[2:4])[0] == 0:
                raise InputError(f"{source.path} has no channel (its header says 0): give one or two channels.")
        elif chunk == b"data":
            if not form:
                raise source.cut_off("it has no fmt chunk before its sound")
            size = length
            if large is not None:
                whole = large[0] if whole == _OPEN else whole
                size = large[1] if size == _OPEN else size
            end = begin + whole if whole and _none_if_open(whole) else None
            return _Header(order, form, end, at, _none_if_open(size))
        if chunk not in (b"fmt ", *_KNOWN) and STRAY <= length <= source.size - at:
            raise _unknown_chunk(source, chunk, length, at - 8)
        at += length + length % 2
    raise source.cut_off("it has no sound data after its header")


def _none_if_open(size: int) -> int | None:
    return None if size >= 1 << 62 or size == _OPEN else size


def _end(source: Source, header: _Header) -> tuple[int, int]:
    """Returns the end of the sound, and the position from which to look for another file."""
    start, size = header.start, header.size
    there = source.size - start
    if size is None or (size > there and min(abs(size - (1 << 32)), abs(size - (1 << 31))) <= _NEAR):
        return _mended(source, header, source.size)
    if size > there:
        raise InputError(
            f"{source.path} is cut off or damaged (its header states {size} bytes of sound, {there} are there): copy"
            " the file again or, if the sound is whole, write it anew, for example by"
            f" {conversion(source.path, '-ignore_length 1 ')}."
        )
    if there - size >= 1 << 32:
        counted = size + (there - size >> 32 << 32)
        if (after := _after(source, start, counted)) is not None:
            source.warn(
                f"states {size} bytes of sound, counted in 32 bits: the {counted} bytes that are there are read"
            )
            return start + counted, after
    agree = header.whole is not None and header.whole - (start + size) in (0, 1)
    silence = not agree and source.read(start + size, 2) == b"\0\0"  # where the sizes agree, zeros are padding
    if not silence and (after := _after(source, start, size)) is not None:
        return start + size, after
    if size == 0 or header.whole is None:
        return _mended(source, header, source.size)
    if agree:
        if (count := source.size - header.whole) >= STRAY:
            raise source.cut_off(f"{count} bytes from byte {header.whole} on are neither wav sound nor a tag")
        return start + size, header.whole
    return _mended(source, header, header.whole if start + size < header.whole < source.size else source.size)


def _unknown_chunk(source: Source, name: bytes, length: int, at: int) -> InputError:
    return source.cut_off(f"its chunk {name.decode('latin-1')!r} of {length} bytes at byte {at} may be sound")


def _mended(source: Source, header: _Header, limit: int) -> tuple[int, int]:
    """Returns the end of sound of unknown size: the next wav header or `limit`."""
    start, end, at = header.start, limit, header.start
    while (found := source.find(b"WAVEfmt ", at)) >= 0:
        at = found + 8
        if found - 8 >= start and begins(source, found - 8):
            end = min(end, found - 8)
            break
    stated = "no length" if header.size is None else f"{header.size} bytes of sound"
    source.warn(f"states {stated} in its header, which is wrong: the {end - start} bytes that are there are read")
    return end, _skip_chunks(source, end)


def _after(source: Source, start: int, size: int) -> int | None:
    """Returns the end of the chunks behind `size` bytes of sound; None if the bytes there prove the size wrong."""
    for at in dict.fromkeys((start + size + size % 2, start + size)):  # some writers leave out the padding
        after = _skip_chunks(source, at)
        behind = skip_tags(source, after)
        ends = behind >= source.size or begins(source, behind)
        if ends and (size > 0 or after > at or after >= source.size or begins(source, after)):
            return after
        if after > at and source.read(at, 4) in _KNOWN:
            return after
    return None


def _skip_chunks(source: Source, at: int) -> int:
    """Returns the end of the chunks that begin at a position.

    Raises:
        InputError: one of them is, or may be, sound.
    """
    unknown = 0
    for _ in range(_CHUNKS):
        header = source.read(at, 8)
        name = header[:4]
        if len(header) < 8 or name in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
            return at
        # A length in the wrong byte order does not fit the file.
        lengths = [int.from_bytes(header[4:], order) for order in ("little", "big")]
        fits = [length for length in lengths if at + 8 + length <= source.size]
        rest = source.size - at - 8
        if name in _KNOWN:
            length = fits[0] if fits else rest
            if dataclasses.replace(source, size=at + 8 + length).find(b"WAVEfmt ", at) >= 0:
                raise source.cut_off(f"its chunk {name.decode()!r} at byte {at} holds another wav file")
        elif name == b"data":
            raise _unknown_chunk(source, name, fits[0] if fits else rest, at)
        elif all(0x20 <= byte < 0x7F for byte in name) and fits and name[:3] not in (b"TAG", b"ID3", b"APE"):
            length = fits[0]
            unknown += length
            if unknown >= STRAY:
                raise _unknown_chunk(source, name, length, at)
        else:
            return at
        at = min(at + 8 + length + length % 2, source.size)
    return at


def _parts(source: Source, header: _Header, end: int) -> list[Part]:
    """Returns the sound with a header of true sizes; MPEG audio without."""
    order, form, start = header.order, header.format, header.start
    codec, _, _, _, block = struct.unpack(order + "HHIIH", form[:14])
    if codec in _MPEG:
        parts = mpeg.find_parts(dataclasses.replace(source, size=end), start)
        whole = parts[-1].end if parts else start
        if end - whole >= STRAY:
            raise source.cut_off(f"of the {end - start} bytes of MPEG audio in it {whole - start} are frames")
        return parts
    if codec == _EXTENSIBLE and len(form) >= 26:
        codec = struct.unpack(order + "H", form[24:26])[0]
    size, samples = end - start, None
    if codec in _PLAIN:
        if block == 0:
            raise source.cut_off("its header states 0 bytes for a sample")
        samples = size // block
        size = samples * block
    chunks = b"fmt " + struct.pack(order + "I", len(form)) + form + bytes(len(form) % 2)
    if size <= _LARGEST:
        whole = 4 + len(chunks) + 8 + size
        magic = b"RIFX" if order == ">" else b"RIFF"
        head = magic + struct.pack(order + "I", whole) + b"WAVE" + chunks + b"data" + struct.pack(order + "I", size)
    elif order == ">":
        raise InputError(f"{source.path} is a RIFX file of more than 4 GB: convert it to flac or RF64.")
    else:
        large = b"ds64" + struct.pack("<IQQQI", 28, 4 + 36 + len(chunks) + 8 + size, size, samples or 0, 0)
        head = b"RF64" + struct.pack("<I", _OPEN) + b"WAVE" + large + chunks + b"data" + struct.pack("<I", _OPEN)
    return [Part(head, start, start + size, samples)]
