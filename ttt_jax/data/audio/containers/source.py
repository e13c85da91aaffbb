"""A file to walk, a part of it as a file, and the tags and stray bytes around parts."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path
from typing import BinaryIO

from ttt_jax.errors import InputError

_BLOCK = 1 << 20  # bytes read at a time in a search
STRAY = 1024  # fewer unknown bytes behind the sound are ignored: too few to be sound worth keeping
_LYRICS = 1 << 16  # bytes of the longest Lyrics3 tag

_log = logging.getLogger("ttt_jax")


@dataclasses.dataclass(frozen=True)
class Source:
    """An open file (or the first `size` bytes of it) and the path that messages name."""

    path: Path
    file: BinaryIO
    size: int

    def read(self, at: int, count: int) -> bytes:
        """Returns up to `count` bytes from position `at`, fewer at the end."""
        self.file.seek(at)
        return self.file.read(max(0, min(count, self.size - at)))

    def find(self, pattern: bytes, at: int) -> int:
        """Returns the first position of `pattern` from `at` on, or -1."""
        while at < self.size:
            block = self.read(at, _BLOCK)
            if (found := block.find(pattern)) >= 0:
                return at + found
            if at + len(block) >= self.size or not block:
                return -1
            at += len(block) - len(pattern) + 1
        return -1

    def cut_off(self, detail: str) -> InputError:
        """Returns the error for a file that is not whole."""
        return InputError(f"{self.path} is cut off or damaged ({detail}): copy or encode the file again.")

    def warn(self, text: str) -> None:
        """Logs a sentence about the file."""
        _log.warning("%s %s.", self.path, text)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part that is decoded alone: `head`, then the bytes `start` to `end` of the file."""

    head: bytes  # a header with true lengths that replaces the file's; empty if the file's is true
    start: int
    end: int
    samples: int | None = None  # of each channel; None if only the decoder counts them


class Window:
    """A part as a file that libsndfile reads. Stores an error of the file in `error`: decoders cannot raise it."""

    def __init__(self, source: Source, part: Part):
        self._source, self._part, self._at = source, part, 0
        self._size = len(part.head) + part.end - part.start
        self.error: OSError | None = None

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a position, counted from the start, from here or from the end."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        """Fills `buffer` as far as there are bytes; returns their number."""
        head = self._part.head
        if self._at < len(head):
            data = head[self._at : self._at + len(buffer)]
        else:
            position = self._part.start + self._at - len(head)
            try:
                data = self._source.read(position, min(len(buffer), max(0, self._part.end - position)))
            except OSError as error:
                self.error, data = error, b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def skip_tags(source: Source, at: int) -> int:
    """Returns the position behind all tags (ID3v1, ID3v2, APE, Lyrics3) and zeros at `at`."""
    while at < source.size:
        length = _tag(source, at)
        if length == 0:
            return at
        at = min(at + length, source.size)
    return at


def skip_stray(source: Source, at: int, kind: str) -> None:
    """Skips tags and, with a warning, few other bytes from `at` to the end. Refuses many, which may be sound."""
    at = skip_tags(source, at)
    count = source.size - at
    if count >= STRAY:
        raise source.cut_off(f"{count} bytes from byte {at} on are neither {kind} sound nor a tag")
    if count > 0:
        source.warn(f"ends with {count} bytes that are neither sound nor a tag, which are left out")


def _footed_tag(source: Source, at: int) -> int:
    """Returns the length of an APE tag without header from a position to the end, or to an ID3v1 tag there; or 0."""
    for end in (source.size, source.size - 128):
        footer = source.read(end - 32, 32) if end - 32 >= at else b""
        if footer[:8] == b"APETAGEX" and at + int.from_bytes(footer[12:16], "little") == end:
            return end - at
    return 0


def _tag(source: Source, at: int) -> int:
    """Returns the length of the tag or of the zeros at a position, or 0."""
    head = source.read(at, 32)
    if head[:1] == b"\0":
        return count_zeros(source, at)
    if head[:3] == b"ID3" and len(head) >= 10 and head[3] < 0xFF and max(head[6:10]) < 0x80:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)  # with a footer
    if head[:8] == b"APETAGEX" and len(head) == 32:
        is_header = head[23] & 0x20
        return 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
    if head[:3] == b"TAG":
        return 128
    if head[:11] == b"LYRICSBEGIN":
        text = source.read(at, _LYRICS)
        ends = [found + 9 for mark in (b"LYRICS200", b"LYRICSEND") if (found := text.find(mark)) >= 0]
        return min(ends, default=0)
    return _footed_tag(source, at)


def count_zeros(source: Source, at: int) -> int:
    """Returns the number of zeros from a position on."""
    start = at
    while block := source.read(at, _BLOCK):
        rest = block.lstrip(b"\0")
        at += len(block) - len(rest)
        if rest:
            break
    return at - start
