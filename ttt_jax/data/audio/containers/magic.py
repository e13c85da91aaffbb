"""Names of file formats that are not read, by a file's first bytes."""

from __future__ import annotations

import dataclasses

SIZE = 1024  # bytes that `name` needs


@dataclasses.dataclass(frozen=True)
class Name:
    """Name of a format, as in "FILE is TEXT", and whether converters of sound and video read it."""

    text: str
    convertible: bool = True


_AT_START = (
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM file"),
    (b"NIST_1A", "a NIST SPHERE file"),
    (b"caff", "a CAF file"),
    (b".snd", "an AU file"),
    (b"dns.", "an AU file"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "an ASF file (WMA, WMV)"),
    (b"#!AMR", "an AMR file"),
    (b"ADIF", "a raw AAC stream"),
    (b"riff\x2e\x91\xcf\x11", "a W64 file"),
    (b"wvpk", "a WavPack file"),
    (b"MAC ", "a Monkey's Audio file"),
    (b"TTA1", "a True Audio file"),
    (b"ajkg", "a Shorten file"),
    (b"MPCK", "a Musepack file"),
    (b"MP+", "a Musepack file"),
    (b"DSD ", "a DSF file"),
    (b"FRM8", "a DSDIFF file"),
    (b".RMF", "a RealMedia file"),
    (b".ra\xfd", "a RealAudio file"),
    (b"FLV\x01", "a Flash video"),
    (b"Creative Voice File", "a VOC file"),
    (b"2BIT", "an AVR file"),
    (b"\x0b\x77", "an AC-3 stream"),
    (b"\x7f\xfe\x80\x01", "a DTS stream"),
    (b"\x00\x00\x01\xba", "an MPEG program stream"),
)
_NO_SOUND = (
    (b"version https://git-lfs.github.com/", "the pointer of a Git LFS file that was not fetched"),
    (b"/annex/objects/", "the pointer of a git-annex file that was not fetched"),
    (b"MThd", "a MIDI file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"%PDF", "a PDF file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)


def name(head: bytes) -> Name | None:
    """Returns the format of a file that begins with `head`; None if it is not known."""
    for start, text in _AT_START:
        if head.startswith(start):
            return Name(text)
    for start, text in _NO_SOUND:
        if head.startswith(start):
            return Name(text, convertible=False)
    text = _by_more(head)
    if text is not None:
        return Name(text)
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return Name("a web page or XML", convertible=False)
    return None


def _by_more(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return "an MP4 file (m4a, m4b, mov, 3gp)"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free") and head[:2] == b"\0\0":
        return "a QuickTime or MP4 file"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return f"an {head[8:12].decode()} file"
    if head[:4] == b"FORM" and head[8:12] == b"8SVX":
        return "an 8SVX file"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "an AVI file"
    if len(head) >= 7 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # like MPEG audio, but layer 0
        return "a raw AAC stream"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 and head[2] >> 4 == 0:
        return "MPEG audio of a free bit rate"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "an MPEG transport stream"
    return None
