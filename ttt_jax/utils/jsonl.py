"""Reads the lines of JSON Lines files (jsonlines.org): manifests, metrics, records.

A line ends at a line feed, perhaps after a carriage return. `str.splitlines` would also break it at a carriage return
alone, which is a blank of JSON, and at U+2028, U+0085 and others, which JSON strings may hold.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ttt_jax.errors import InputError

GZIP = b"\x1f\x8b"  # how gzip files begin; never UTF-8


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 text, plain or gzip whatever its name, without line ends and byte order mark.

    Raises `InputError` if it is damaged gzip, `OSError` if it cannot be read, `UnicodeDecodeError` if it is not UTF-8.
    """
    content = path.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is cut off or damaged gzip ({error}): copy or compress it again.") from None
    return [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
