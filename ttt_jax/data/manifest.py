"""Manifests in moshi-finetune's format.

A manifest is a JSONL file, one recording a line: ``{"path": ..., "duration": seconds}``; paths are relative to the
manifest's folder, further keys are left unread. Beside a recording a JSON of the same stem may hold its words
(`ttt_jax.data.alignments`).
Nothing here opens audio: `check_duration` is for the one who does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ttt_jax.errors import InputError

TOLERANCE = 0.5  # seconds by which a manifest or an alignment may disagree with its audio


@dataclass(frozen=True)
class Entry:
    """One recording of a manifest.

    Attributes:
        path: the audio file.
        duration: seconds, as the manifest states them.
        alignment: the JSON beside the audio, which may hold its words; None if there is none.
        speaker: whose voice it is, if the manifest says so: streams of one speaker are no independent witnesses.
    """

    path: Path
    duration: float
    alignment: Path | None
    speaker: str | None = None


def read_manifest(path: str | Path) -> list[Entry]:
    """Return the recordings of a JSONL manifest in its order; blank lines are skipped.

    Raises:
        InputError: the manifest is missing, empty or not JSONL, a line lacks a field or holds a wrong one, or an audio
            file is not there. The message names the line.
    """
    path = Path(path)
    lines = enumerate(_read_text(path, "manifest").splitlines(), start=1)
    entries = [_parse_entry(path, number, line) for number, line in lines if line.strip()]
    if not entries:
        raise InputError(
            f'{path} is empty: a manifest has one line {{"path": ..., "duration": seconds}} per recording.'
        )
    return entries


def check_duration(entry: Entry, seconds: float) -> None:
    """Raise `InputError` unless the audio's real length `seconds` is the entry's duration to within `TOLERANCE`."""
    if abs(entry.duration - seconds) > TOLERANCE:
        raise InputError(
            f"{entry.path} lasts {seconds:.2f} s but its manifest says {entry.duration:.2f} s: correct the duration"
            " or replace the audio file."
        )


def _read_text(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of a {kind}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a {kind}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give the path of a {kind}.") from None


def _parse_entry(manifest: Path, number: int, line: str) -> Entry:
    where = f"{manifest} line {number}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): every line must be one JSON object.") from None
    if not isinstance(record, dict):
        raise InputError(f'{where} is not a JSON object: expected {{"path": ..., "duration": seconds}}.')
    for key in ("path", "duration"):
        if key not in record:
            raise InputError(f'{where} has no "{key}": expected {{"path": ..., "duration": seconds}}.')
    name, duration = record["path"], record["duration"]
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f'{where} has "path": {name!r}: expected the name of an audio file.')
    if not _is_number(duration) or duration <= 0:
        raise InputError(f'{where} has "duration": {duration!r}: expected seconds greater than 0.')
    speaker = record.get("speaker")
    if speaker is not None and not isinstance(speaker, str):
        raise InputError(f'{where} has "speaker": {speaker!r}: expected a name, or no such key.')
    audio = manifest.parent / name
    if not audio.is_file():
        raise InputError(f"{where} names {audio}, which is not there: paths are relative to the manifest's folder.")
    alignment = audio.with_suffix(".json")
    return Entry(audio, float(duration), alignment if alignment.is_file() else None, speaker)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
