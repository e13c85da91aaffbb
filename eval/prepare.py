"""`python -m eval prepare`: any audio to code files and their manifest, once and for all. Loads no jax.

    FOLDER/prepare.json              which codec, and whether recordings are joined: the same for all of the folder
    FOLDER/codes/NAME.safetensors    a stream (`ttt_jax.data.codes`)
    FOLDER/parts/NAME.safetensors    with --join, a recording of a stream: what a run that goes on need not do again
    FOLDER/manifest.jsonl            what was made from what, and a manifest for training and evaluation

Recordings are read, resampled and encoded in blocks, in memory of constant size. Every file is written at once or not at
all, and a code file states what it was made of, so a run that was interrupted is simply started again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.codec import Codec
from ttt_jax.data import sources
from ttt_jax.data.alignments import MAIN_SPEAKER
from ttt_jax.data.audio.reader import read_blocks
from ttt_jax.data.codes import Codes, Source, read_codes, write_codes
from ttt_jax.data.corpus import CorpusConfig, load_coders
from ttt_jax.data.frames import too_short, warn
from ttt_jax.data.manifest import MANIFEST, Entry, check_duration
from ttt_jax.data.sources import Recording, Stream
from ttt_jax.data.text import ABSENT, Tokenizer, read_text
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL
from ttt_jax.utils.files import file_digest, write_atomically
from ttt_jax.utils.jsonl import read_lines
from ttt_jax.utils.paths import local, place, portable, printable

SETTINGS = "prepare.json"
_VERSION = "ttt_jax.prepare/3"  # to change whenever the same input would give other codes
_BLOCK = 1024  # frames of silence encoded at a time; bounds memory


def main(options: argparse.Namespace) -> int:
    """Encode what `options` name; the exit code: 0 all of it, `PARTIAL` where something was left out.

    Raises:
        InputError: a source or the folder is unusable, or nothing could be made.
    """
    found = sources.find(options.sources, options.layout)
    recordings = found.recordings
    codec, tokenizer = load_coders(CorpusConfig(codec=options.codec, tokenizer=options.tokenizer))
    folder = local(options.out)
    new = _open(folder, codec, options.join)
    encoder = Encoder(codec, tokenizer, options.voice)
    todo = sources.streams(found, options.join)
    made: dict[str, dict[str, Any]] = {}
    failed: dict[str, InputError] = {}
    for problem in found.problems:
        print(printable(f"skipped: {problem}"), file=sys.stderr)
    with Progress(recordings) as progress:
        try:
            for stream in todo:
                try:
                    made[stream.name] = _entry(stream, _make(stream, folder, encoder, progress, options.join), folder)
                except InputError as error:
                    failed[stream.name] = error
                    progress.skip(stream)
                    if len(recordings) > 1:
                        progress.say(f"skipped{f' the stream {stream.group}' if options.join else ''}: {error}")
        finally:  # an interrupted run leaves a manifest of what it has made
            dropped = write_manifest(folder, made, failed)
            _close(folder, new)
    for name in dropped:
        print(printable(f"left out of {folder / MANIFEST}: {name}, which is gone or damaged"), file=sys.stderr)
    if not made:
        if len(recordings) == 1:
            raise next(iter(failed.values()))
        raise InputError(f"none of {len(recordings)} recordings could be encoded, for the reasons above: mend them.")
    skipped = found.skipped + sum(len(stream.recordings) for stream in todo if stream.name in failed)
    _summarise([stream for stream in todo if stream.name in made], skipped, made, progress, folder)
    return PARTIAL if skipped else 0


class Encoder:
    """A codec, a tokenizer and a choice of voices: recordings to codes.

    Args:
        codec: encodes each channel, from a fresh state for every recording.
        tokenizer: gives the text row where there are alignments.
        voice: "own" puts the left or only channel into the rows of the model's voice, "other" into the other voice's.
    """

    def __init__(self, codec: Codec, tokenizer: Tokenizer, voice: str) -> None:
        self.codec, self.tokenizer, self.voice = codec, tokenizer, voice
        self._silence = np.empty((codec.num_codebooks, 0), np.int32)
        self._silence_state = codec.init_state()

    def identity(self, recording: Recording) -> str:
        """Digest of all that decides a recording's codes, its content known by path, size and time of change.

        Raises:
            InputError: the recording is gone.
        """
        with_text = recording.alignment is not None
        parts = [
            _VERSION,
            _stamp(recording.path),
            _stamp(recording.alignment) if with_text else None,
            recording.duration,
            self.codec.digest,
            self.tokenizer.digest if with_text else None,
            self.voice,
        ]
        return _digest(parts)

    def encode(self, recording: Recording, progress: Progress) -> Codes:
        """Return the codes of a recording: both voices, and the text row if its words are known.

        Raises:
            InputError: the audio is unusable, shorter than a frame or not as long as its manifest says, or its
                alignments are unusable. The message names the file.
        """
        identity, codec, path = self.identity(recording), self.codec, recording.path
        blocks = progress.watch(read_blocks(path, codec.sample_rate), codec.sample_rate)
        channels, num_samples = encode_blocks(blocks, codec)
        seconds = num_samples / codec.sample_rate
        if num_samples < codec.frame_size:
            raise too_short(path, seconds, codec)
        if recording.duration is not None:
            check_duration(Entry(path, recording.duration, recording.alignment), seconds)
        num_frames = channels[0].shape[1]
        voices = channels if len(channels) == 2 else [channels[0], self.silence(num_frames)]
        text = self._text(recording, seconds, num_frames, len(channels) == 1)
        rows = voices if self.voice == "own" else voices[::-1]
        if text is not None:
            rows = [text[None], *rows]
        return Codes(
            np.concatenate(rows),
            codec.frame_rate,
            codec.digest,
            codec.name,
            codec.cardinality,
            None if text is None else self.tokenizer.digest,
            self.voice,
            (Source(portable(path), file_digest(path), seconds, num_frames, 0),),
            input=identity,
        )

    def silence(self, num_frames: int) -> np.ndarray:
        """Return the codes of silence, int32 [num_codebooks, num_frames]: those of `codec.encode` on zeros."""
        while self._silence.shape[1] < num_frames:
            zeros = np.zeros(_BLOCK * self.codec.frame_size, np.float32)
            codes, self._silence_state = self.codec.encode_step(zeros, self._silence_state)
            self._silence = np.concatenate([self._silence, codes], axis=1)
        return self._silence[:, :num_frames]

    def _text(self, recording: Recording, seconds: float, num_frames: int, mono: bool) -> np.ndarray | None:
        """The text row: what the model's voice says, int32 [T]; None where it is not known."""
        if recording.alignment is None:
            return None
        # With --voice other the model's voice is the right channel: that of the other speaker, silent in a mono recording.
        found = read_text(
            recording.alignment,
            seconds,
            num_frames,
            self.tokenizer,
            self.codec.frame_rate,
            lambda word: (
                word.speaker == MAIN_SPEAKER if self.voice == "own" else not mono and word.speaker != MAIN_SPEAKER
            ),
        )
        warn(recording.alignment, found.notice)
        return found.row


def encode_blocks(blocks: Iterable[np.ndarray], codec: Codec) -> tuple[list[np.ndarray], int]:
    """Encode a recording that comes in blocks, to the bit as `codec.encode` does in one piece.

    Args:
        blocks: float32 [channels, n], any n, at the codec's rate.
        codec: encodes each channel from a fresh state.

    Returns:
        For each channel int32 [num_codebooks, T], T = ceil(samples / frame_size); and the number of samples.
    """
    size, num_samples = codec.frame_size, 0
    rest: np.ndarray | None = None
    states: list[Any] = []
    codes: list[list[np.ndarray]] = []

    def step(audio: np.ndarray) -> None:
        for channel, samples in enumerate(audio):
            found, states[channel] = codec.encode_step(samples, states[channel])
            codes[channel].append(found)

    for block in blocks:
        if rest is None:
            rest, states, codes = block[:, :0], [codec.init_state() for _ in block], [[] for _ in block]
        num_samples += block.shape[1]
        joined = np.concatenate([rest, block], axis=1)
        whole = joined.shape[1] // size * size
        rest = joined[:, whole:].copy()  # a view would keep the block
        if whole:
            step(joined[:, :whole])
    if rest is not None and rest.shape[1]:
        step(np.pad(rest, ((0, 0), (0, size - rest.shape[1]))))
    empty = np.empty((codec.num_codebooks, 0), np.int32)
    return [np.concatenate([empty, *found], axis=1) for found in codes], num_samples


def join(parts: Sequence[Codes], identity: str) -> Codes:
    """Return the codes of recordings one behind the other; where only some have a text row, the others' text is absent."""
    with_text = any(part.has_text for part in parts)
    starts = np.cumsum([0, *(part.num_frames for part in parts)]).tolist()
    rows = [_with_text(part) if with_text else part.codes for part in parts]
    return parts[0]._replace(
        codes=np.concatenate(rows, axis=1),
        tokenizer=next((part.tokenizer for part in parts if part.has_text), None),
        sources=tuple(part.sources[0]._replace(start=start) for part, start in zip(parts, starts, strict=False)),
        joints=tuple(starts[1:-1]),
        input=identity,
    )


def _with_text(part: Codes) -> np.ndarray:
    if part.has_text:
        return part.codes
    return np.concatenate([np.full((1, part.num_frames), ABSENT, np.int32), part.codes])


def _make(stream: Stream, folder: Path, encoder: Encoder, progress: Progress, joined: bool) -> Codes:
    """The codes of a stream, from its file if that was made of the same before, else made and written."""
    if stream.gap is not None:
        others = f"{len(stream.recordings)} other {_plural('recording', len(stream.recordings))}"
        raise InputError(f"{stream.gap} is left out, so {others} cannot be joined: mend it as said above.")
    path = _codes_path(folder, stream.name)
    if not joined:
        return _encoded(stream.recordings[0], path, encoder, progress)
    identity = _digest([_VERSION, *(encoder.identity(recording) for recording in stream.recordings)])
    found = _found(path, identity)
    if found is not None:
        for recording in stream.recordings:
            progress.reuse(recording)
        return found
    parts = [folder / "parts" / f"{sources.name_of(recording)}.safetensors" for recording in stream.recordings]
    codes = [_part(r, stream, part, encoder, progress) for r, part in zip(stream.recordings, parts, strict=True)]
    whole = join(codes, identity)
    write_codes(path, whole)
    return whole


def _part(recording: Recording, stream: Stream, path: Path, encoder: Encoder, progress: Progress) -> Codes:
    """The codes of a recording of a stream, as `_encoded`; of a bad one it is told what may have been made from it."""
    try:
        return _encoded(recording, path, encoder, progress)
    except InputError as error:
        bare = recording.path.with_suffix("")
        alike = [r.path for r in stream.recordings if r.path.with_suffix("") == bare and r is not recording]
        if not alike:
            raise
        hint = f"{alike[0].name} stands beside it: if that was made from it, remove {recording.path.name}"
        raise InputError(f"{str(error).removesuffix('.')}; {hint}.") from None


def _encoded(recording: Recording, path: Path, encoder: Encoder, progress: Progress) -> Codes:
    """The codes of one recording: those in `path` if they were made of the same, else made and written there."""
    found = _found(path, encoder.identity(recording))
    if found is not None:
        progress.reuse(recording)
        return found
    progress.begin(recording)
    codes = encoder.encode(recording, progress)
    write_codes(path, codes)
    progress.done(recording, codes.sources[0])
    return codes


def _found(path: Path, identity: str) -> Codes | None:
    try:
        codes = read_codes(path)
    except InputError:
        return None
    return codes if codes.input == identity else None


def _open(folder: Path, codec: Codec, joined: bool) -> list[Path]:
    """Make the folder, or see that what is in it goes with this run; the folders that were made, the deepest first."""
    settings = {"format": _VERSION, "codec": codec.digest, "codec_name": codec.name, "join": joined}
    path = folder / SETTINGS
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_settings(folder, settings)
        elif (folder / MANIFEST).exists():
            raise InputError(f"{folder} holds a {MANIFEST} that is not from `prepare`: give another folder for --out.")
        else:
            write_atomically(path, json.dumps(settings, indent=2).encode() + b"\n")
        _read_manifest(folder / MANIFEST)  # that it is damaged is told before the work
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made or used ({error.strerror}): give another folder.") from None
    return new


def _close(folder: Path, new: Iterable[Path]) -> None:
    """Remove the settings and the folders that `_open` made if nothing was made of them: a run that failed binds no other."""
    if any((folder / name).exists() for name in ("codes", "parts", MANIFEST)):
        return
    (folder / SETTINGS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty
        for one in new:
            one.rmdir()


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        earlier = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict) or earlier.keys() != settings.keys():
        raise InputError(f"{folder / SETTINGS} is damaged: give another folder for --out, or remove this one.")
    if (earlier["format"], earlier["codec"]) != (settings["format"], settings["codec"]):
        raise InputError(
            f"{folder} holds codes of {earlier['codec_name']} ({earlier['format']}, digest {earlier['codec']}), but this"
            f" run uses {settings['codec_name']} ({settings['format']}, digest {settings['codec']}): give another folder"
            " for --out, or the codec of this one."
        )
    if earlier["join"] != settings["join"]:
        raise InputError(
            f"{folder} was prepared {'with' if earlier['join'] else 'without'} --join, this run is"
            f" {'with' if settings['join'] else 'without'} it: give another folder for --out, or choose as before."
        )


def _codes_path(folder: Path, name: str) -> Path:
    return folder / "codes" / f"{name}.safetensors"


def _entry(stream: Stream, codes: Codes, folder: Path) -> dict[str, Any]:
    """The manifest's line of a stream."""
    path = _codes_path(folder, stream.name)
    return {
        "path": path.relative_to(folder).as_posix(),
        "duration": codes.seconds,
        "frames": codes.num_frames,
        "group": stream.group,
        **({} if stream.speaker is None else {"speaker": stream.speaker}),
        "codec": codes.codec,
        "codec_name": codes.codec_name,
        "sha256": file_digest(path),
        "joints": list(codes.joints),
        "sources": [source._asdict() for source in codes.sources],
    }


def write_manifest(folder: Path, made: dict[str, dict[str, Any]], failed: Iterable[str]) -> list[str]:
    """Write the manifest: what earlier runs made, and `made` in its place or behind it.

    Args:
        folder: where it stands.
        made: the lines of this run by the name of their stream.
        failed: names of streams that this run could not make; an earlier line of theirs no longer holds.

    Returns:
        Paths in earlier lines that are left out, since their code file is gone or not what the line says.
    """
    fresh = {entry["path"]: entry for entry in made.values()}
    stale = {f"codes/{name}.safetensors" for name in failed}
    lines, dropped = {}, []
    for entry in _read_manifest(folder / MANIFEST):
        path = entry["path"]
        if path in fresh:
            lines[path] = fresh[path]
        elif path not in stale:
            if (folder / path).is_file() and file_digest(folder / path) == entry.get("sha256"):
                lines[path] = entry
            else:
                dropped.append(path)
    lines |= fresh
    if lines or (folder / MANIFEST).exists():
        text = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in lines.values())
        write_atomically(folder / MANIFEST, text.encode("utf-8", "backslashreplace"))  # JSON, too, reads \udcff
    return dropped


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


class Progress:
    """A bar over the seconds of audio of all recordings, with how much faster than real time they are encoded."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        from tqdm import tqdm

        self._ahead = {recording.path: _expected_seconds(recording.path) for recording in recordings}
        self._behind = 0.0  # expected seconds of the recordings that are finished
        self._current = 0.0  # seconds heard of the one at hand
        self._began = 0.0
        self.encoded = 0.0
        """Seconds of audio encoded, not counting what was there already."""
        self.spent = 0.0
        """Seconds of time it took."""
        self.reused: set[Path] = set()
        """Recordings that were encoded before."""
        self._bar = tqdm(
            total=math.ceil(sum(self._ahead.values())),
            desc="encoding",
            mininterval=0.5,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s of audio [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, recording: Recording) -> None:
        """A recording is about to be encoded."""
        self._began = time.perf_counter()
        self._current = 0.0

    def watch(self, blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
        """Yield the blocks, float32 [channels, n], and count them once they have been dealt with."""
        for block in blocks:
            yield block
            self._current += block.shape[1] / sample_rate
            self._show()

    def done(self, recording: Recording, source: Source) -> None:
        """The recording that was begun is encoded and stored."""
        self.encoded += source.seconds
        self.spent += time.perf_counter() - self._began
        self._finish(recording)

    def reuse(self, recording: Recording) -> None:
        """A recording was encoded before."""
        self.reused.add(recording.path)
        self._finish(recording)

    def skip(self, stream: Stream) -> None:
        """A stream was left out."""
        for recording in stream.recordings:
            self._finish(recording)

    def say(self, text: str) -> None:
        """Print a line to standard error, above the bar."""
        self._bar.write(printable(text), file=sys.stderr)

    @property
    def speed(self) -> float:
        """Seconds of audio encoded in a second; 0 before the first."""
        return self.encoded / self.spent if self.spent else 0.0

    def _finish(self, recording: Recording) -> None:
        self._current = 0.0
        self._behind += self._ahead.pop(recording.path, 0.0)
        if self.speed:
            self._bar.set_postfix_str(f"{self.speed:.0f} times real time", refresh=False)
        self._show()

    def _show(self) -> None:
        self._bar.update(min(math.ceil(self._behind + self._current - 1e-6), self._bar.total) - self._bar.n)


def _expected_seconds(path: Path) -> float:
    """What a file's header says it lasts; 0 where it cannot be read, which encoding it will tell."""
    import soundfile

    try:
        info = soundfile.info(os.fsencode(path))
    except (OSError, soundfile.SoundFileError):
        return 0.0
    return info.duration if info.frames < 1 << 48 else 0.0  # a streamed flac states no length


def _summarise(
    done: list[Stream], skipped: int, made: dict[str, dict[str, Any]], progress: Progress, folder: Path
) -> None:
    recordings = [recording.path for stream in done for recording in stream.recordings]
    hours = sum(entry["duration"] for entry in made.values()) / 3600
    before = sum(path in progress.reused for path in recordings)
    speed = f", the others at {progress.speed:.0f} times real time" if progress.encoded else ""
    print(
        f"{len(done)} code {_plural('file', len(done))} of {len(recordings)} {_plural('recording', len(recordings))},"
        f" {hours:.2f} hours of audio; {before} encoded before{speed};"
        f" {skipped} {_plural('recording', skipped)} skipped"
    )
    print(f"manifest: {folder / MANIFEST}")
    print(f"next: python -m eval stream RUN --data {folder}")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _stamp(path: Path) -> list[Any]:
    """What tells a file from another and from an earlier one of its name."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): bring it back or leave it out.") from None
    return [portable(place(path)), found.st_size, found.st_mtime_ns]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
