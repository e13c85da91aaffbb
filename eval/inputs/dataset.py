"""Files to evaluate on: recordings or code files, from a manifest, a prepared folder, or a single path."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.results.schema import Skipped
from ttt_jax.checkpoints import loading
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.codec import Codec, CodecInfo
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.data.codes import read_header
from ttt_jax.data.frames import FrameReader
from ttt_jax.data.manifest import MANIFEST, Entry, Manifest, is_manifest, read_manifest
from ttt_jax.data.text import ABSENT, Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import absolute, beside, local, printable


class EvalFile(NamedTuple):
    """One stream of speech."""

    name: str
    group: str
    """Speaker, or the name if it is not known: the unit of statistics, as files of a speaker are not independent."""
    frames: np.ndarray
    """Tokens, int32 [17, T]; unknown tokens are -1: fed as a zero vector and not scored, as in training."""
    boundaries: tuple[int, ...]
    """Frames at which another recording begins."""
    codec: dict[str, str | None]
    """Name and digest of the codec; the name is None if a code file does not give it."""

    @property
    def text_known(self) -> np.ndarray:
        """Frames whose text is known and so is scored, bool [T]."""
        return self.frames[0] != ABSENT

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, hex."""
        return hashlib.sha256(np.ascontiguousarray(self.frames, np.int32).tobytes()).hexdigest()


def of_corpus(corpus: corpora.Corpus) -> tuple[list[EvalFile], list[Skipped]]:
    """Returns the held-out files of a run's corpus, and those that do not exist."""
    codec = {"name": corpus.codec.name, "digest": corpus.codec.digest}
    files = [EvalFile(file.name, file.speaker or file.name, file.read(), (), codec) for file in corpus.heldout]
    return files, [_skipped(str(absent.path), absent.reason) for absent in corpus.absent["heldout"]]


def read(
    data: str | Path, checkpoints: Sequence[Checkpoint], most: int | None = None
) -> tuple[list[EvalFile], list[Skipped]]:
    """Returns the files that `data` names, cut to `most` frames, and those that not all checkpoints can read.

    Raises `InputError` if the manifest cannot be read, or no file can be used.
    """
    return _files(str(data), *_entries(local(data)), checkpoints, most)


def read_paths(
    paths: Sequence[Path], data: str, checkpoints: Sequence[Checkpoint]
) -> tuple[list[EvalFile], list[Skipped]]:
    """As `read`, of the recordings or code files `paths`, which errors call `data`."""
    entries = [Entry(path, math.nan, beside(path, ".json")) for path in paths]
    return _files(data, Manifest(entries, []), paths[0].parent.parent, checkpoints, None)


def _files(
    data: str, manifest: Manifest, root: Path, checkpoints: Sequence[Checkpoint], most: int | None
) -> tuple[list[EvalFile], list[Skipped]]:
    entries, absent = manifest
    names = iter(_names([entry.path for entry in (*absent, *entries)], root))
    reader = _Reader(checkpoints)
    files, skipped = [], [_skipped(next(names), entry.reason) for entry in absent]
    for entry, name in zip(entries, names, strict=True):
        try:
            if name in [file.name for file in files]:
                raise InputError(f"{data} names {entry.path} twice: it is taken once.")
            files.append(_eval_file(entry, name, reader, most))
        except InputError as error:
            if len(entries) == 1 and not absent:
                raise
            skipped.append(_skipped(name, str(error)))
    if not files:
        raise InputError(f"none of the {len(skipped)} files of {data} can be used; the first: {skipped[0].reason}")
    if len(codecs := {file.codec["digest"]: file for file in files}) > 1:
        examples = [f"{file.name} (codec {(digest or 'not stated')[:12]})" for digest, file in codecs.items()]
        raise InputError(
            f"{data} holds codes of {len(codecs)} codecs, such as {' and '.join(examples[:2])}: evaluate those of one"
            " at a time."
        )
    return files, skipped


def first(data: str | Path, checkpoints: Sequence[Checkpoint], least: int) -> EvalFile:
    """Returns the first existing file that `data` names. Raises `InputError` if it has fewer than `least` frames."""
    (entries, _), root = _entries(local(data))
    file = _eval_file(entries[0], _names([entries[0].path], root)[0], _Reader(checkpoints), None)
    frames = file.frames.shape[1]
    if frames < least:
        raise InputError(
            f"{entries[0].path} lasts {frames} frames ({frames / FRAME_RATE:.1f} s), {least} are needed: give a longer"
            " recording or ask for fewer."
        )
    return file


def embedded() -> Path:
    """Returns the manifest of the embedded corpus's held-out files."""
    return corpora.EMBEDDED / "heldout.jsonl"


def heldout(checkpoint: Checkpoint) -> Path:
    """Returns the manifest of the run's held-out files; the embedded corpus's if there is none."""
    corpus = checkpoint.corpus
    return Path(corpus.heldout) if corpus is not None and corpus.heldout else embedded()


def _entries(path: Path) -> tuple[Manifest, Path]:
    """Returns the files that a path names, and the folder that their names are relative to."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise InputError(
            f"{path} has no {MANIFEST}: make codes of the recordings in it first (python -m eval prepare {path} --out"
            " FOLDER)."
        )
    manifest = path / MANIFEST if path.is_dir() else path
    if is_manifest(manifest):
        return read_manifest(manifest), manifest.parent
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a manifest (.jsonl), a prepared folder, audio or codes (.safetensors)."
        )
    # The length is not known in advance: nan differs from no length.
    return Manifest([Entry(path, math.nan, beside(path, ".json"))], []), path.parent.parent


def _skipped(name: str, reason: str) -> Skipped:
    return Skipped(printable(name), printable(reason))


def _eval_file(entry: Entry, name: str, reader: _Reader, most: int | None) -> EvalFile:
    frames, boundaries, codec = reader.read(entry)
    frames = frames[:, :most]
    boundaries = tuple(frame for frame in boundaries if frame < frames.shape[1])
    return EvalFile(name, printable(entry.speaker or name), frames, boundaries, codec)


class _Reader:
    """Reads files with the codec and the tokenizer of the checkpoints, loaded for the first file that needs them."""

    def __init__(self, checkpoints: Sequence[Checkpoint]):
        self._checkpoints = checkpoints
        runs = [checkpoint for checkpoint in checkpoints if checkpoint.corpus is not None]
        with_mimi = [checkpoint for checkpoint in checkpoints if checkpoint.corpus is None and checkpoint.codec]
        self._source = next(iter(runs + with_mimi), None)
        """The checkpoint that brings codec and tokenizer."""

    def read(self, entry: Entry) -> tuple[np.ndarray, tuple[int, ...], dict[str, str | None]]:
        """Returns tokens int32 [17, T], boundaries, and name and digest of the codec.

        Converted weights without a Mimi read code files with both streams only; without a tokenizer they read no words
        beside a file.
        """
        if entry.path.suffix != ".safetensors":
            if self._source is None:
                raise InputError(
                    f"{entry.path} is audio, but converted weights do not say which codec they need: prepare code files"
                    " first, or convert the weights with their Mimi (docs/data.md)."
                )
            codec = self._frame_reader.codec
            self._check(entry.path, codec, self._frame_reader.tokenizer)
            return self._frames(entry, self._frame_reader), (), {"name": codec.name, "digest": codec.digest}
        header, configs = read_header(entry.path), [checkpoint.cfg for checkpoint in self._checkpoints]
        codec = CodecInfo(header.codec_name or "a codec", header.codec, header.cardinality, configs[0].dep_q)
        self._check(entry.path, codec, TokenizerInfo())
        if self._source is not None:
            reader = self._frame_reader if header.rows == configs[0].dep_q else self._code_reader
            self._check(entry.path, reader.codec, reader.tokenizer)
            frames = self._frames(entry, reader)
        else:
            codec = dataclasses.replace(codec, cardinality=min(cfg.card for cfg in configs))
            tokenizer = TokenizerInfo(cardinality=min(cfg.text_card for cfg in configs))
            frames = FrameReader(codec, tokenizer, "").open(dataclasses.replace(entry, alignment=None)).read()
        return frames, header.boundaries, {"name": header.codec_name, "digest": header.codec}

    def _frames(self, entry: Entry, reader: FrameReader) -> np.ndarray:
        if self._source.corpus is None and isinstance(reader.tokenizer, TokenizerInfo):
            entry = dataclasses.replace(entry, alignment=None)
        return reader.open(entry).read()

    @functools.cached_property
    def _frame_reader(self) -> FrameReader:
        return FrameReader(*loading.coders(self._source), self._source.cache_dir / "frames")

    @functools.cached_property
    def _code_reader(self) -> FrameReader:
        """As `_frame_reader`, for code files of both streams, for which the Mimi of weights need not be read."""
        source = self._source
        if source.corpus is not None:
            return self._frame_reader
        codec = CodecInfo(source.codec["name"], source.codec["digest"], source.cfg.card, source.cfg.dep_q)
        return FrameReader(codec, loading.tokenizer_of_weights(source), "")

    def _check(self, path: Path, codec: Codec | CodecInfo, tokenizer: Tokenizer | TokenizerInfo) -> None:
        for checkpoint in self._checkpoints:
            try:
                corpora.fit_model(checkpoint.cfg, codec, tokenizer, checkpoint.name, checkpoint.codec)
            except InputError as error:
                raise InputError(f"{path} does not fit {checkpoint.name}: {error}") from None


def _names(paths: Sequence[Path], root: Path) -> list[str]:
    """Returns unique names: paths below the manifest's folder without suffix, or whole paths if two would be alike."""

    def short(path: Path) -> str:
        path, folder = absolute(path), absolute(root)
        path = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.parent.name, path.name)
        parts = path.with_suffix("").parts
        return printable("/".join(parts[1:] if len(parts) > 1 and parts[0] == "codes" else parts))

    paths_of: dict[str, set[Path]] = {}
    for path in paths:
        paths_of.setdefault(short(path), set()).add(absolute(path))
    return [short(path) if len(paths_of[short(path)]) == 1 else printable(str(path)) for path in paths]
