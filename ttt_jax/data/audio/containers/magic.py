"""Names of file formats that are not read, by a file's first bytes."""

from __future__ import annotations

SIZE = 1024  # bytes that show a format

_SOUND = {
    b"\x1a\x45\xdf\xa3": "a Matroska or WebM file",
    b"NIST_1A": "a NIST SPHERE file",
    b"caff": "a CAF file",
    b".snd": "an AU file",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "an ASF file (WMA, WMV)",
    b"#!AMR": "an AMR file",
    b"ADIF": "a raw AAC stream",
    b"riff\x2e\x91\xcf\x11": "a W64 file",
    b"wvpk": "a WavPack file",
    b"MAC ": "a Monkey's Audio file",
    b"FLV\x01": "a Flash video",
    b"\x0b\x77": "an AC-3 stream",
}
_NO_SOUND = {
    b"version https://git-lfs.github.com/": "the pointer of a Git LFS file that was not fetched",
    b"/annex/objects/": "the pointer of a git-annex file that was not fetched",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"%PDF": "a PDF file",
}


def sound(head: bytes) -> str | None:
    """Returns the format of sound or video that begins with `head`; None if it is not known."""
    for start, text in _SOUND.items():
        if head.startswith(start):
            return text
    if head[4:8] == b"ftyp" or (head[4:8] in (b"moov", b"mdat", b"wide", b"free") and head[:2] == b"\0\0"):
        return "an MP4 file (m4a, m4b, mov, 3gp)"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return f"an {head[8:12].decode()} file"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "an AVI file"
    if len(head) >= 7 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # like MPEG audio, but layer 0
        return "a raw AAC stream"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 and head[2] >> 4 == 0:
        return "MPEG audio of a free bit rate"
    return None


def no_sound(head: bytes) -> str | None:
    """Returns the format of a file without sound that begins with `head`; None if it is not known."""
    for start, text in _NO_SOUND.items():
        if head.startswith(start):
            return text
    is_page = head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml"))
    return "a web page or XML" if is_page else None
