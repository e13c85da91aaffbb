"""Wav files (RIFF, RIFX, RF64, BW64): the true beginning and end of the sound.

The size S of the data chunk is compared with the A bytes that follow its header. Every correction is logged.

- S <= A, and behind S bytes the file ends, or there are chunks, tags or another wav file: S is true.
- S > A, and S is within 64 KiB of 2**32 or 2**31, or missing: the mark of a writer that could not go back to the header
  (a pipe, a crash). All A bytes are sound. Any other S > A is refused: the copy may be broken.
- S = 0 with other bytes behind it: such a mark too.
- A exceeds S by 2**32 or more: S was counted in 32 bits; the multiples of 2**32 are added.
- 0 < S < A, and the size of the whole (the RIFF field) does not end where S does: S is wrong. The sound goes on to the
  end of the RIFF chunk, or of the file; zeros there are silence. If both sizes agree, zeros are padding, and other
  bytes are stray: less than 1 KiB is ignored with a warning, more is refused.

Chunks of metadata are skipped. A second data chunk, or 1 KiB or more in unknown chunks, may be sound: refused.
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
_TAGS = (b"TAG", b"APETAGEX", b"ID3\x03", b"ID3\x04")
_TAIL = 1 << 16  # bytes at the end that are searched for chunks behind sound of wrong size
_PLAIN = (1, 3, 6, 7)  # codec numbers with samples of fixed size: PCM, float, A-law, mu-law
_ADPCM = (2, 0x11, 0x31)  # codecs whose blocks have a number of samples in the header: Microsoft's, IMA's, GSM
_NOT_STATED = 16000  # bytes a second that ffmpeg writes for any ADPCM
_MPEG = (0x50, 0x55)
_ROUNDED = 0.02  # share by which encoders round the bytes a second
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
    """Returns the wav files, one behind the other, from `at` on.

    Raises:
        InputError: the file is cut off or damaged, or states no channel.
    """
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
    whole: int | None = struct.unpack(order + "I", source.read(at + 4, 4))[0]
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
            _check_format(source, form, order)
        elif chunk == b"data":
            if not form:
                raise source.cut_off("it has no fmt chunk before its sound")
            size: int | None = length
            if large is not None:
                whole = large[0] if whole == _OPEN else whole
                size = large[1] if size == _OPEN else size
            return _Header(order, form, begin + whole if _is_stated(whole) else None, at, _none_if_open(size))
        if chunk not in (b"fmt ", *_KNOWN) and STRAY <= length <= source.size - at:
            raise _unknown_chunk(source, chunk, length, at - 8)
        at += length + length % 2
    raise source.cut_off("it has no sound data after its header")


def _check_format(source: Source, form: bytes, order: str) -> None:
    if len(form) < 14:
        raise source.cut_off(f"its fmt chunk has {len(form)} bytes")
    if struct.unpack(order + "HH", form[:4])[1] == 0:
        raise InputError(f"{source.path} has no channel (its header says 0): give one or two channels.")


def _is_stated(size: int) -> bool:
    return size != 0 and _none_if_open(size) is not None


def _none_if_open(size: int) -> int | None:
    return None if size >= 1 << 62 or size == _OPEN else size


def _is_mark(size: int) -> bool:
    return abs(size - (1 << 32)) <= _NEAR or abs(size - (1 << 31)) <= _NEAR


def _end(source: Source, header: _Header) -> tuple[int, int]:
    """Returns the end of the sound, and the position from which to look for another file."""
    start, size = header.start, header.size
    there = source.size - start
    if size is None or (size > there and _is_mark(size)):
        return _mended(source, header, source.size)
    if size > there:
        raise _wrong_size(source, size, there)
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


def _wrong_size(source: Source, size: int, there: int) -> InputError:
    return InputError(
        f"{source.path} is cut off or damaged (its header states {size} bytes of sound, {there} are there): copy the"
        " file again or, if the sound is whole, write it anew, for example by"
        f" {conversion(source.path, '-ignore_length 1 ')}."
    )


def _unknown_chunk(source: Source, name: bytes, length: int, at: int) -> InputError:
    return source.cut_off(f"its chunk {name.decode('latin-1')!r} of {length} bytes at byte {at} may be sound")


def _mended(source: Source, header: _Header, limit: int) -> tuple[int, int]:
    """Returns the end of sound of unknown size: the next wav header, chunks or a tag at the end, or `limit`."""
    start, end = header.start, limit
    at = start
    while (found := source.find(b"WAVEfmt ", at)) >= 0:
        at = found + 8
        if found - 8 >= start and begins(source, found - 8):
            end = min(end, found - 8)
            break
    end = _before_chunks(source, start, end)
    stated = "no length" if header.size is None else f"{header.size} bytes of sound"
    source.warn(f"states {stated} in its header, which is wrong: the {end - start} bytes that are there are read")
    return end, _skip_chunks(source, end)


def _before_chunks(source: Source, start: int, end: int) -> int:
    """Returns the position of known chunks or tags at the end of the sound, else `end`."""
    begin = max(start, end - _TAIL)
    tail = source.read(begin, end - begin)
    bounded = dataclasses.replace(source, size=end)
    places = [tail.find(mark) for mark in (*_KNOWN, *_TAGS)]
    for place in sorted(place for place in places if place >= 0):
        at = begin + place
        if skip_tags(bounded, _skip_chunks(bounded, at)) == end and _fits(bounded, at):
            return at
    return end


def _fits(source: Source, at: int) -> bool:
    """Returns whether the chunk or tag at a position is whole, not cut by the end."""
    header = source.read(at, 8)
    if header[:4] not in _KNOWN:
        return header[:3] != b"TAG" or source.size - at == 128
    return any(at + 8 + int.from_bytes(header[4:], order) <= source.size for order in ("little", "big"))


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
    _check_rate(source, form, order, codec)
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


def _check_rate(source: Source, form: bytes, order: str, codec: int) -> None:
    """Warns if the header's bytes a second contradict its rate and block size."""
    rate, per_second, block = struct.unpack(order + "IIH", form[4:14])
    samples = 1
    if codec in _ADPCM and len(form) >= 20:
        samples = struct.unpack(order + "H", form[18:20])[0]
        if per_second == _NOT_STATED:
            return
    elif codec not in _PLAIN:
        return
    if abs(per_second * samples - rate * block) > _ROUNDED * rate * block:
        source.warn(
            f"states {per_second} bytes a second in its header, which does not fit its {rate} Hz and {block} bytes for"
            f" each {'sample' if samples == 1 else f'{samples} samples'}: it is read at {rate} Hz"
        )
