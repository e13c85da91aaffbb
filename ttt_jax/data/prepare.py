"""A folder of code files made from recordings, and its manifest. Imports no jax.

docs/data/prepare.md lists its files. Each is written atomically, and a code file states what it was made of, so an
interrupted run is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.codec import Codec
from ttt_jax.data.codes import Codes, Source, read_codes, write_codes
from ttt_jax.data.encode import Encoder, Watch, join_rows
from ttt_jax.data.manifest import MANIFEST, Entry
from ttt_jax.data.sources import Recording, Stream, name_of
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest, write_atomically
from ttt_jax.utils.jsonl import read_lines
from ttt_jax.utils.paths import place, portable

SETTINGS = "prepare.json"
_VERSION = "ttt_jax.prepare/4"  # to change whenever the same input would give other codes


class PreparedFolder:
    """A folder that takes the code files of streams, `joined` of several recordings or not. Close it to write its
    manifest. Raises `InputError` if the folder is unusable or has another codec or choice of joining."""

    def __init__(self, path: Path, encoder: Encoder, joined: bool) -> None:
        self.path, self._encoder, self._joined = path, encoder, joined
        self.entries: dict[str, dict[str, Any]] = {}  # lines of the manifest, by the stream's name
        self.reused: set[Path] = set()  # recordings that an earlier run encoded
        self.encoded = self.spent = 0.0  # seconds of audio that this run encoded, and of time that this took
        self._failed: set[str] = set()
        self._new_folders = _open(path, encoder.codec, joined)

    def add(self, stream: Stream, watch: Watch = lambda blocks: blocks) -> None:
        """Makes the code file of a stream, or finds the one that was made of the same recordings.

        Raises `InputError` if a recording cannot be used; an earlier code file then leaves the manifest.
        """
        try:
            codes = self._make(stream, watch)
        except InputError:
            self._failed.add(stream.name)
            raise
        path = self._codes_path(stream.name)
        self.entries[stream.name] = {
            "path": path.relative_to(self.path).as_posix(),
            "duration": codes.seconds,
            "frames": codes.num_frames,
            "group": stream.group,
            **({} if stream.speaker is None else {"speaker": stream.speaker}),
            "codec": codes.codec,
            "codec_name": codes.codec_name,
            "sha256": file_digest(path),
            "boundaries": list(codes.boundaries),
            "sources": [source._asdict() for source in codes.sources],
        }

    def close(self) -> list[str]:
        """Writes the manifest: the lines of earlier runs, those of this run in their place or behind them.

        Removes the folder if nothing was made in it. Returns earlier lines' paths whose file is gone or damaged.
        """
        fresh = {entry["path"]: entry for entry in self.entries.values()}
        stale = {self._codes_path(name).relative_to(self.path).as_posix() for name in self._failed}
        manifest, lines, dropped = self.path / MANIFEST, {}, []
        for entry in _read_manifest(manifest):
            path = entry["path"]
            if path in fresh:
                lines[path] = fresh[path]
            elif path not in stale:
                if (self.path / path).is_file() and file_digest(self.path / path) == entry.get("sha256"):
                    lines[path] = entry
                else:
                    dropped.append(path)
        lines |= fresh
        if lines or manifest.exists():
            text = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in lines.values())
            write_atomically(manifest, text.encode("utf-8", "backslashreplace"))  # JSON, too, reads \udcff
        if not any((self.path / name).exists() for name in ("codes", "parts", MANIFEST)):
            (self.path / SETTINGS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty
                for folder in self._new_folders:
                    folder.rmdir()
        return dropped

    @property
    def speed(self) -> float:
        """Seconds of audio encoded in a second; 0 before the first."""
        return self.encoded / self.spent if self.spent else 0.0

    def _make(self, stream: Stream, watch: Watch) -> Codes:
        if stream.gap is not None:
            count = len(stream.recordings)
            others = f"{count} other {'recording' if count == 1 else 'recordings'}"
            raise InputError(f"{stream.gap} is left out, so {others} cannot be joined: mend it first.")
        path = self._codes_path(stream.name)
        if not self._joined:
            return self._encode(stream.recordings[0], path, watch)
        identity = _digest([_VERSION, *(self._identity(recording) for recording in stream.recordings)])
        if (codes := _read_made(path, identity)) is not None:
            self.reused |= {recording.path for recording in stream.recordings}
            return codes
        codes = join([self._encode_part(recording, stream, watch) for recording in stream.recordings], identity)
        write_codes(path, codes)
        return codes

    def _encode_part(self, recording: Recording, stream: Stream, watch: Watch) -> Codes:
        """`_encode` for a recording of a joined stream; the error names a converted copy beside it."""
        path = recording.path
        try:
            return self._encode(recording, self.path / "parts" / f"{name_of(recording)}.safetensors", watch)
        except InputError as error:
            others = (other.path for other in stream.recordings if other.path != path)
            copy = next((other for other in others if other.with_suffix("") == path.with_suffix("")), None)
            if copy is None:
                raise
            hint = f"{copy.name} stands beside it: if that was made from it, remove {path.name}"
            raise InputError(f"{str(error).removesuffix('.')}; {hint}.") from None

    def _encode(self, recording: Recording, path: Path, watch: Watch) -> Codes:
        """Returns the codes of a recording: those in `path` if made of the same input, else new ones, written there."""
        identity = self._identity(recording)
        if (codes := _read_made(path, identity)) is not None:
            self.reused.add(recording.path)
            return codes
        began = time.perf_counter()
        codes = encode(recording, self._encoder, identity, watch)
        write_codes(path, codes)
        self.spent += time.perf_counter() - began
        self.encoded += codes.sources[0].seconds
        return codes

    def _identity(self, recording: Recording) -> str:
        """Digest of everything that a recording's codes depend on; its files count by path, size and time of change."""
        encoder, words, tokenizer = self._encoder, None, None
        if recording.alignment is not None:
            words, tokenizer = _stamp(recording.alignment), encoder.tokenizer.digest
        audio = _stamp(recording.path)
        return _digest([_VERSION, audio, words, recording.duration, encoder.codec.digest, tokenizer, encoder.voice])

    def _codes_path(self, name: str) -> Path:
        return self.path / "codes" / f"{name}.safetensors"


def encode(recording: Recording, encoder: Encoder, identity: str, watch: Watch) -> Codes:
    """Returns the codes of a recording: both streams, below the text if it is known. Raises `InputError`."""
    codec, path = encoder.codec, recording.path
    duration = math.nan if recording.duration is None else recording.duration
    encoded = encoder.encode(Entry(path, duration, recording.alignment), watch)
    with_text, num_frames = encoded.text is not None, encoded.codes.shape[1]
    return Codes(
        encoded.frames if with_text else encoded.codes,
        codec.frame_rate,
        codec.digest,
        codec.name,
        codec.cardinality,
        encoder.tokenizer.digest if with_text else None,
        encoder.voice,
        (Source(portable(path), file_digest(path), encoded.seconds, num_frames, 0),),
        input=identity,
    )


def join(parts: Sequence[Codes], identity: str) -> Codes:
    """Returns the codes of recordings one behind the other; if only some have a text row, the others' text is -1."""
    with_text = any(part.has_text for part in parts)
    starts = np.cumsum([0, *(part.num_frames for part in parts)]).tolist()
    rows = [join_rows(None, part.codes) if with_text and not part.has_text else part.codes for part in parts]
    return parts[0]._replace(
        codes=np.concatenate(rows, axis=1),
        tokenizer=next((part.tokenizer for part in parts if part.has_text), None),
        sources=tuple(part.sources[0]._replace(start=start) for part, start in zip(parts, starts, strict=False)),
        boundaries=tuple(starts[1:-1]),
        input=identity,
    )


def _read_made(path: Path, identity: str) -> Codes | None:
    """Returns the codes in `path` if they were made of the same input."""
    try:
        codes = read_codes(path)
    except InputError:
        return None
    return codes if codes.input == identity else None


def _open(folder: Path, codec: Codec, joined: bool) -> list[Path]:
    """Makes the folder with its settings, or checks them; returns the folders that were made, the deepest first."""
    settings = {"format": _VERSION, "codec": codec.digest, "codec_name": codec.name, "join": joined}
    path = folder / SETTINGS
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_settings(folder, settings)
        elif (folder / MANIFEST).exists():
            raise InputError(f"{folder} holds a {MANIFEST} that is not from `prepare`: give another folder for --out.")
        else:
            write_atomically(path, json.dumps(settings, indent=2).encode() + b"\n")
        _read_manifest(folder / MANIFEST)  # a damaged one must show before the work
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made or used ({error.strerror}): give another folder.") from None
    return new


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        earlier = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict) or earlier.keys() != settings.keys():
        raise InputError(f"{folder / SETTINGS} is damaged: give another folder for --out, or remove this one.")
    if (earlier["format"], earlier["codec"]) != (settings["format"], settings["codec"]):
        raise InputError(
            f"{folder} holds codes of {earlier['codec_name']} ({earlier['format']}, digest {earlier['codec']}), but"
            f" this run uses {settings['codec_name']} ({settings['format']}, digest {settings['codec']}): give another"
            " folder for --out, or the codec of this one."
        )
    if earlier["join"] != settings["join"]:
        raise InputError(
            f"{folder} was prepared {'with' if earlier['join'] else 'without'} --join, this run is"
            f" {'with' if settings['join'] else 'without'} it: give another folder for --out, or choose as before."
        )


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in read_lines(path) if line.strip()]
    except FileNotFoundError:
        return []
    except ValueError:
        entries = [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries):
        raise InputError(f"{path} is damaged: remove it and run again, which makes it anew from the code files.")
    return entries


def _stamp(path: Path) -> list[Any]:
    """Path, size and time of change of a file."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): bring it back or leave it out.") from None
    return [portable(place(path)), stat.st_size, stat.st_mtime_ns]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
