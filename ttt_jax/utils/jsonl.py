"""Lines of JSON Lines files (jsonlines.org): manifests, metrics, records.

A line ends at a line feed, perhaps with a carriage return. A carriage return alone is a blank of
JSON, and JSON strings may hold U+2028, U+0085 and other characters at which `str.splitlines` breaks a text.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ttt_jax.errors import InputError

GZIP = b"\x1f\x8b"  # how gzip files begin; never UTF-8


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text, plain or gzip whatever its name, without their ends; a byte order mark is left
    out.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        InputError: it is gzip and cut off or damaged.
    """
    content = path.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is cut off or damaged gzip ({error}): copy or compress it again.") from None
    return [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
