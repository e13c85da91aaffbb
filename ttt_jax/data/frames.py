"""A manifest's entry to frames, int32 [17, T], cached on disk.

Rows (for a codec of 8 codebooks): 0 the text, 1 to 8 the left channel (the model's voice), 9 to 16 the right channel (the
other voice; for a mono file the codes of silence). -1 stands for what is not known: an entry without alignments has text
-1 in every frame, which the model reads as a zero vector and no loss counts. What was left out of the words is told in one
warning a recording when it is encoded, as is what is wrong with its sound; not again when its frames come from the cache.

An entry may also name a code file (`ttt_jax.data.codes`), from `python -m eval prepare` or made elsewhere: codes, int
[K, T]. K is 8 for the model's voice alone, 16 for both voices, 17 for both with the text as row 0; otherwise the text
comes from the alignments as for audio.

A `Recording` is an entry that was checked but whose frames are read when they are needed: of a code file only the header is
read at first, audio is encoded into the cache. So hours of speech cost no memory.

The cache holds one safetensors file per entry, named by a SHA-256 over the contents of the audio and alignment files, the
codec's and the tokenizer's digests. A cached file carries a checksum; one that does not match is made again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.codec import Codec
from ttt_jax.data.alignments import Kind, read_beside
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.codes import Codes, Header, read_codes, read_header
from ttt_jax.data.manifest import Entry, check_duration, read_manifest
from ttt_jax.data.stated import StatedCodec, StatedTokenizer
from ttt_jax.data.text import ABSENT, Text, Tokenizer, read_text
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest, write_atomically
from ttt_jax.utils.paths import printable

_VERSION = "ttt_jax.frames/3"  # to change whenever the same input would give other frames

log = logging.getLogger("ttt_jax")


@dataclass(frozen=True)
class Recording:
    """One recording of a manifest, its frames still to be read.

    Attributes:
        name: its folder and its name without suffix, printable.
        speaker: whose voice it is, where the manifest says so.
        shape: of its frames, [1 + 2 * num_codebooks, T], T >= 1.
        digest: of the code file and its alignments, hex; None for audio, which only its frames identify, as another version
            of a decoder can give other samples.
        read: the frames, int32 of that shape, newly read at each call. Raises `InputError` where the file is damaged, has
            tokens out of range, or is no longer what it was.
    """

    name: str
    speaker: str | None
    shape: tuple[int, int]
    digest: str | None
    read: Callable[[], np.ndarray]

    @property
    def num_frames(self) -> int:
        """T."""
        return self.shape[1]


def load_frames(entry: Entry, codec: Codec, tokenizer: Tokenizer, cache_dir: str | Path) -> np.ndarray:
    """Returns the frames of one recording, from the cache if they are there.

    Args:
        entry: An audio file, or codes made elsewhere (``.safetensors``), with its alignments if there are any.
        codec: Encodes both channels; its digest must be that of codes made elsewhere.
        tokenizer: Gives the text row.
        cache_dir: Folder of the cache, made if need be. Codes made elsewhere are read as they are.

    Returns:
        int32 [1 + 2 * num_codebooks, T]; see the module's docstring for the rows.

    Raises:
        InputError: A file is unusable, lasts less than a frame, does not last what the manifest says, or holds codes of
            another codec or outside its range; it is audio and the codec is not here; or the cache cannot be
            written.
    """
    if _is_codes(entry):
        frames, notice = _external_frames(entry, codec, tokenizer)
        warn(entry.alignment, notice)
        return frames
    if isinstance(codec, StatedCodec):
        raise not_codes(entry.path)
    return _audio_frames(entry, codec, tokenizer, _cache_path(entry, codec, tokenizer, Path(cache_dir))).frames


def open_recording(entry: Entry, codec: Codec, tokenizer: Tokenizer, cache_dir: str | Path) -> Recording:
    """Returns a recording whose frames can be read; all is checked but the tokens of a code file.

    Audio that the cache does not have is encoded. Arguments and errors are those of `load_frames`.
    """
    name = printable(f"{entry.path.parent.name}/{entry.path.stem}")
    speaker = None if entry.speaker is None else printable(entry.speaker)
    if _is_codes(entry):
        header = read_header(entry.path)
        _check_header(entry, header, codec, tokenizer)
        digest = header.checksum or file_digest(entry.path)
        if header.rows != 1 + 2 * codec.num_codebooks and entry.alignment is not None:
            text = _text(entry, header.seconds, header.num_frames, tokenizer, codec)  # told now, not hours later
            warn(entry.alignment, text.notice)
            if text.row is not None:
                digest = hashlib.sha256(f"{digest} {file_digest(entry.alignment)}".encode()).hexdigest()
        shape = (1 + 2 * codec.num_codebooks, header.num_frames)
        return Recording(
            name, speaker, shape, digest, functools.partial(_reread_codes, entry, header, codec, tokenizer)
        )
    if isinstance(codec, StatedCodec):
        raise not_codes(entry.path)
    cached = _cache_path(entry, codec, tokenizer, Path(cache_dir))
    shape = _audio_frames(entry, codec, tokenizer, cached).frames.shape
    return Recording(
        name, speaker, shape, None, functools.partial(_reread_audio, entry, shape, codec, tokenizer, cached)
    )


def open_manifest(
    path: str | Path, codec: Codec, tokenizer: Tokenizer, cache_dir: str | Path, progress: bool = True
) -> tuple[Recording, ...]:
    """Returns every recording of a manifest that is there, in its order.

    Args:
        path: The JSONL file.
        codec: See `load_frames`.
        tokenizer: See `load_frames`.
        cache_dir: See `load_frames`.
        progress: Whether to show a progress bar on standard error.

    Raises:
        InputError: As `read_manifest` and `load_frames`.
    """
    from tqdm import tqdm

    entries = read_manifest(path).entries
    bar = tqdm(entries, desc=f"encoding {Path(path).name}", unit="file", leave=False, disable=not progress)
    found = [open_recording(entry, codec, tokenizer, cache_dir) for entry in bar]
    count = Counter(recording.name for recording in found)
    return tuple(
        recording if count[recording.name] == 1 else replace(recording, name=printable(str(entry.path)))
        for recording, entry in zip(found, entries, strict=True)
    )


def warn(path: Path | None, notice: str | None) -> None:
    """Tell of the words in `path` what `Text.notice` says, if there is anything to tell."""
    if notice is not None:
        log.warning("%s: %s", path, notice)


def _is_codes(entry: Entry) -> bool:
    return entry.path.suffix == ".safetensors"


def not_codes(path: Path) -> InputError:
    """What is said where there is audio to encode and nothing but the codes of other files to know the codec by."""
    return InputError(
        f"{path} is audio, but data.codec='files' reads code files only: make codes of it with the codec of the other files"
        " (docs/data.md), or give data.codec the codec itself."
    )


class _Made(NamedTuple):
    """What was made of an audio file."""

    frames: np.ndarray
    """int32 [1 + 2 * num_codebooks, T]."""
    seconds: float
    """Length of the audio."""


def _audio_frames(entry: Entry, codec: Codec, tokenizer: Tokenizer, cached: Path) -> _Made:
    """Returns what is made of an audio entry, from the cache file `cached`, which is made if it is not there."""
    found = _read_cached(cached, codec)
    if found is not None:
        check_duration(entry, found.seconds)
        return found
    made = _encode(entry, codec, tokenizer)
    seconds = repr(made.seconds)
    metadata = {"seconds": seconds, "sha256": _checksum(made.frames, seconds)}
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, safetensors.numpy.save({"frames": made.frames}, metadata=metadata))
    except OSError as error:
        raise InputError(
            f"cache_dir {cached.parent} cannot be written ({error.strerror}): give a folder that can."
        ) from error
    return made


def _reread_audio(entry: Entry, shape: tuple[int, int], codec: Codec, tokenizer: Tokenizer, cached: Path) -> np.ndarray:
    found = _read_cached(cached, codec)
    if found is not None:
        return found.frames
    # The cache is gone. What is made again must be what it was made of before.
    if _cache_path(entry, codec, tokenizer, cached.parent) != cached:
        raise _changed(entry)
    frames = _audio_frames(entry, codec, tokenizer, cached).frames
    if frames.shape != shape:
        raise _changed(entry)
    return frames


def _reread_codes(entry: Entry, header: Header, codec: Codec, tokenizer: Tokenizer) -> np.ndarray:
    if read_header(entry.path) != header:
        raise _changed(entry)
    return _external_frames(entry, codec, tokenizer)[0]


def _changed(entry: Entry) -> InputError:
    return InputError(
        f"{entry.path} is no longer what it was when it was opened: bring the old file back, or start a new run."
    )


def _encode(entry: Entry, codec: Codec, tokenizer: Tokenizer) -> _Made:
    channels = read_audio(entry.path, codec.sample_rate)
    num_samples = channels.shape[1]
    seconds = num_samples / codec.sample_rate
    if num_samples < codec.frame_size:
        raise too_short(entry.path, seconds, codec)
    check_duration(entry, seconds)
    own = codec.encode(channels[0])
    other = codec.encode(channels[1]) if len(channels) == 2 else _silence(own.shape[1], codec)
    text = _text(entry, seconds, own.shape[1], tokenizer, codec)
    frames = np.concatenate([_row(text, own.shape[1]), own, other]).astype(np.int32)
    warn(entry.alignment, text.notice)
    return _Made(frames, seconds)


def _silence(num_frames: int, codec: Codec) -> np.ndarray:
    return codec.encode(np.zeros(num_frames * codec.frame_size, np.float32))


def _text(entry: Entry, seconds: float, num_frames: int, tokenizer: Tokenizer, codec: Codec) -> Text:
    if entry.alignment is None:
        return Text(None, None)
    if isinstance(tokenizer, StatedTokenizer) and read_beside(entry.alignment)[0] is Kind.ALIGNMENTS:
        raise InputError(
            f"{entry.alignment} has the words of {entry.path.name}, but data.codec='files' brings no tokenizer for them: give"
            " data.tokenizer, or remove the words."
        )
    return read_text(entry.alignment, seconds, num_frames, tokenizer, codec.frame_rate)


def _row(text: Text, num_frames: int) -> np.ndarray:
    """The text row with an axis before it, int32 [1, num_frames]."""
    return np.full((1, num_frames), ABSENT, np.int32) if text.row is None else text.row[None]


def _external_frames(entry: Entry, codec: Codec, tokenizer: Tokenizer) -> tuple[np.ndarray, str | None]:
    """Returns the frames of a code file, and the notice of `Text`."""
    path, voice = entry.path, codec.num_codebooks
    stored = read_codes(path)
    _check_header(entry, stored, codec, tokenizer)
    codes = stored.codes
    has_text = stored.rows == 1 + 2 * voice
    for row, values in enumerate(codes):
        is_text = has_text and row == 0
        cardinality = tokenizer.cardinality if is_text else codec.cardinality
        if values.min() < ABSENT or (cardinality is not None and values.max() >= cardinality):
            expected = "-1 or more" if cardinality is None else f"-1 to {cardinality - 1}"
            raise InputError(
                f"{path} has values from {values.min()} to {values.max()} in row {row} of its codes, expected"
                f" {expected} ({'the tokenizer' if is_text else codec.name}): encode it again."
            )
    if has_text:
        return codes, None
    num_frames = stored.num_frames
    other = codes[voice:] if stored.rows == 2 * voice else _silence(num_frames, codec)
    text = _text(entry, stored.seconds, num_frames, tokenizer, codec)
    return np.concatenate([_row(text, num_frames), codes[:voice], other]).astype(np.int32), text.notice


def _check_header(entry: Entry, stored: Codes | Header, codec: Codec, tokenizer: Tokenizer) -> None:
    """Refuses all that a code file's header shows to be unusable."""
    path, voice = entry.path, codec.num_codebooks
    _check_origin(path, stored, codec)
    if stored.rows not in (voice, 2 * voice, 1 + 2 * voice):
        raise InputError(
            f"{path} holds codes of shape {[stored.rows, stored.num_frames]}, expected [K, T] with K = {voice} (the model's"
            f" voice), {2 * voice} (both voices) or {1 + 2 * voice} (text first): write them so."
        )
    if stored.rows == voice and isinstance(codec, StatedCodec):
        raise InputError(
            f"{path} holds {voice} rows of codes, the model's voice alone, and without its codec silence cannot be encoded"
            f" for the other: write both voices, {2 * voice} rows."
        )
    check_duration(entry, stored.seconds)
    if stored.rows != 1 + 2 * voice or stored.tokenizer in (None, tokenizer.digest):
        return
    if not isinstance(tokenizer, StatedTokenizer):
        raise InputError(
            f"{path} states tokenizer {stored.tokenizer!r} in its metadata, but the tokenizer in use has the digest"
            f" {tokenizer.digest}: prepare the codes with this tokenizer, or give data.tokenizer the one that made them."
        )
    if tokenizer.digest is not None:
        raise InputError(
            f"{path} states tokenizer {stored.tokenizer!r} in its metadata, but other files of the data state"
            f" {tokenizer.digest!r}: use files whose text is of one tokenizer."
        )


def _check_origin(path: Path, stored: Codes | Header, codec: Codec) -> None:
    """Refuses codes of another codec."""
    if isinstance(codec, StatedCodec):
        _check_same(path, stored, codec)
    if stored.codec != codec.digest:
        raise InputError(
            f"{path} states codec {stored.codec!r} in its metadata, but the codec in use, {codec.name}, has the digest"
            f" {codec.digest}: encode the audio with this codec and state its `digest`, or give data.codec the file of the"
            " codec that made the codes."
        )


def _check_same(path: Path, stored: Codes | Header, codec: StatedCodec) -> None:
    """Refuses codes that are not those of the codec that the other files state."""
    if stored.codec != codec.digest:
        raise InputError(
            f"{path} states codec {stored.codec!r} in its metadata, but other files of the data state {codec.digest!r}"
            f" ({codec.name}): use files of one codec."
        )
    if None not in (stored.cardinality, codec.cardinality) and stored.cardinality != codec.cardinality:
        raise InputError(
            f"{path} states cardinality {stored.cardinality} in its metadata, but {codec.name} has {codec.cardinality}"
            " entries a codebook: make the file again, or leave it out."
        )


def too_short(path: Path, seconds: float, codec: Codec) -> InputError:
    """What is said of a recording that is shorter than a frame of the codec."""
    return InputError(
        f"{path} lasts {seconds:.3f} s, less than one frame of {1 / codec.frame_rate:.3f} s: give a longer recording or"
        " leave it out."
    )


def _cache_path(entry: Entry, codec: Codec, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    alignment = file_digest(entry.alignment) if entry.alignment else "none"
    parts = (_VERSION, file_digest(entry.path), alignment, codec.digest, tokenizer.digest)
    return cache_dir / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.safetensors"


def _read_cached(path: Path, codec: Codec) -> _Made | None:
    """Returns what a cached file holds, or None where there is none or a damaged one."""
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            frames = file.get_tensor("frames")
        intact = (
            metadata["sha256"] == _checksum(frames, metadata["seconds"]) and len(frames) == 1 + 2 * codec.num_codebooks
        )
        return _Made(frames, float(metadata["seconds"])) if intact else None
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None


def _checksum(frames: np.ndarray, seconds: str) -> str:
    about = f"{frames.dtype.str}{frames.shape}{seconds}"
    return hashlib.sha256(about.encode() + frames.tobytes()).hexdigest()
