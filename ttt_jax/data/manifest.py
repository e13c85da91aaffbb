"""Manifests in moshi-finetune's format.

docs/data/manifest.md describes them. Audio is not opened here.
"""

from __future__ import annotations

import codecs
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ttt_jax.data.audio import formats
from ttt_jax.errors import InputError
from ttt_jax.utils.jsonl import GZIP, read_lines
from ttt_jax.utils.paths import Missing, beside, missing, native, spelled

MANIFEST = "manifest.jsonl"
"""Name of the manifest in a folder that `python -m eval prepare` made."""
TOLERANCE = 0.5  # seconds by which a manifest or an alignment may disagree with its audio
_HEAD = 4096  # bytes that show whether a file is text


@dataclass(frozen=True)
class Entry:
    """One recording of a manifest."""

    path: Path  # of the audio
    duration: float  # seconds that the manifest states
    alignment: Path | None  # the JSON beside the audio; None if there is none
    speaker: str | None = None  # None if the manifest does not state it


class Absent(NamedTuple):
    """A recording of a manifest whose audio or alignment does not exist."""

    path: Path  # of the audio
    reason: str  # sentence that names the line of the manifest
    speaker: str | None = None


class Manifest(NamedTuple):
    """The recordings of a manifest, in its order."""

    entries: list[Entry]  # at least one
    absent: list[Absent]


def is_manifest(path: Path) -> bool:
    """Returns whether a file is a manifest: named .jsonl or .jsonl.gz, or text with no ending of audio or codes."""
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return True
    if formats.is_read(path) or formats.is_other(path) or path.suffix == ".safetensors" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(GZIP):
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except (OSError, zlib.error, UnicodeDecodeError):  # no text
        return False
    return text != "" and not any(character < " " and character not in "\t\r\n" for character in text)


def read_manifest(path: str | Path) -> Manifest:
    """Returns the recordings of a manifest. Raises `InputError` if a line is unusable or no audio file exists."""
    path = Path(path)
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of a manifest.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a manifest.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give the path of a manifest.") from None
    recordings = [_parse_entry(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not recordings:
        raise InputError(
            f'{path} is empty: a manifest has one line {{"path": ..., "duration": seconds}} per recording.'
        )
    entries = [recording for recording in recordings if isinstance(recording, Entry)]
    absent = [recording for recording in recordings if isinstance(recording, Absent)]
    if not entries:
        first = absent[0].reason
        raise InputError(first if len(absent) == 1 else f"none of the {len(absent):,} recordings is there: {first}")
    return Manifest(entries, absent)


def check_duration(entry: Entry, seconds: float) -> None:
    """Raises `InputError` if the audio lasts `seconds`, more than `TOLERANCE` off the entry's duration (unless NaN)."""
    if abs(entry.duration - seconds) > TOLERANCE:
        raise InputError(
            f"{entry.path} lasts {seconds:.2f} s but its manifest says {entry.duration:.2f} s: correct the duration"
            " or replace the audio file."
        )


def _parse_entry(manifest: Path, number: int, line: str) -> Entry | Absent:
    where = f"{manifest} line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): every line of a manifest must be one JSON object.") from None
    form = 'expected {"path": ..., "duration": seconds}'
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object: {form}.")
    for key in ("path", "duration"):
        if key not in record:
            raise InputError(f'{where} has no "{key}": {form}.')
    name, duration = record["path"], record["duration"]
    if not _is_name(name):
        raise InputError(f'{where} has "path": {name!r}: expected the name of an audio file.')
    is_number = isinstance(duration, int | float) and not isinstance(duration, bool)
    if not is_number or not 0 < duration <= sys.float_info.max:
        raise InputError(f'{where} has "duration": {duration!r}: expected seconds greater than 0.')
    speaker = record.get("speaker")
    if isinstance(speaker, bool) or not isinstance(speaker, str | int | None):
        raise InputError(f'{where} has "speaker": {speaker!r}: expected a name or a number, or no such key.')
    speaker = None if speaker in (None, "") else str(speaker)
    audio = spelled(manifest.parent / native(name))
    if (problem := missing(audio)) is not None:
        return Absent(audio, f"{where} names {audio}, which {problem.problem}: {_advice(problem, name)}.", speaker)
    alignment = beside(audio, ".json")
    if alignment is not None and (problem := missing(alignment)) is not None:
        return Absent(
            audio, f"{where} names {audio}, whose {alignment.name} {problem.problem}: {problem.advice}.", speaker
        )
    return Entry(audio, float(duration), alignment, speaker)


def _is_name(value: object) -> bool:
    """Returns whether a file can have this name."""
    try:
        return isinstance(value, str) and bool(native(value)) and "\0" not in value
    except UnicodeEncodeError:
        return False


def _advice(problem: Missing, name: str) -> str:
    """Returns advice on a missing file, by the way the manifest names it."""
    if problem.problem != "is not there":
        return problem.advice
    if name.startswith("~"):
        return "~ stands for no folder in a manifest, write the whole path"
    if "\\" in name:
        return "write / between folders"
    return "paths are relative to the manifest's folder"
