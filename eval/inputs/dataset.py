"""Speech to evaluate on: recordings or code files, named by a manifest, by the folder that `python -m eval prepare` made, or one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.inputs.checkpoints import Checkpoint
from eval.results.schema import Skipped
from ttt_jax.codec import Codec
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.data.codes import Codes, read_codes
from ttt_jax.data.frames import load_frames
from ttt_jax.data.manifest import MANIFEST, Entry, Manifest, is_manifest, read_manifest
from ttt_jax.data.text import ABSENT, Tokenizer
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import absolute, beside, local, printable


class EvalFile(NamedTuple):
    """One stream of speech."""

    name: str
    group: str
    """Its speaker, or its own name where that is not known: the unit of statistics, one speaker's streams are not independent."""
    frames: np.ndarray
    """Tokens, int32 [17, T]; what is not known is -1: fed as a zero vector and not scored, as in training."""
    boundaries: tuple[int, ...]
    """Frames at which another recording begins."""
    codec: dict[str, str | None]
    """Name and digest of the codec that made the codes; the name is None where a code file does not state it."""

    @property
    def text_known(self) -> np.ndarray:
        """Frames whose text is known, and so scored, bool [T]."""
        return self.frames[0] != ABSENT

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, hex."""
        return hashlib.sha256(np.ascontiguousarray(self.frames, np.int32).tobytes()).hexdigest()


def of_corpus(corpus: corpora.Corpus) -> tuple[list[EvalFile], list[Skipped]]:
    """The held-out files of a run's own corpus, as it would train on them, and those that are not there."""
    codec = {"name": corpus.codec.name, "digest": corpus.codec.digest}
    files = ((recording, recording.read()) for recording in corpus.heldout)
    found = [EvalFile(file.name, file.speaker or file.name, frames, (), codec) for file, frames in files]
    return found, [_skipped(str(one.path), one.reason) for one in corpus.absent["heldout"]]


def read(
    data: str | Path, models: Sequence[Checkpoint], most: int | None = None
) -> tuple[list[EvalFile], list[Skipped]]:
    """The streams that `data` names, and the files that could not be used.

    Args:
      data: a manifest, a folder with one, or a single recording or code file; models: all must be able to read the files;
        most: frames of a file that are taken.

    Raises:
      InputError: the manifest cannot be read, or no file at all can be used.
    """
    (entries, absent), root = _entries(local(data))
    names = _names([one.path for one in (*entries, *absent)], root)
    names, gone = names[: len(entries)], names[len(entries) :]
    coders = _Coders(models)
    found, skipped = [], [_skipped(name, one.reason) for name, one in zip(gone, absent, strict=True)]
    for entry, name in zip(entries, names, strict=True):
        try:
            if name in [one.name for one in found]:
                raise InputError(f"{data} names {entry.path} twice: it is taken once.")
            found.append(_speech(entry, name, coders, most))
        except InputError as error:
            if len(entries) == 1 and not absent:
                raise
            skipped.append(_skipped(name, str(error)))
    if not found:
        raise InputError(f"none of the {len(skipped)} files of {data} can be used; the first: {skipped[0].reason}")
    if len(codecs := {one.codec["digest"]: one for one in found}) > 1:
        of = " and ".join(
            f"{one.name} (codec {(digest or 'not stated')[:12]})" for digest, one in list(codecs.items())[:2]
        )
        raise InputError(f"{data} holds codes of {len(codecs)} codecs, such as {of}: evaluate those of one at a time.")
    return found, skipped


def first(data: str | Path, models: Sequence[Checkpoint], least: int) -> EvalFile:
    """The first stream that `data` names and that is there, as `read` gives it; it must have `least` frames. Raises `InputError`."""
    (entries, _), root = _entries(local(data))
    found = _speech(entries[0], _names([entries[0].path], root)[0], _Coders(models), None)
    frames = found.frames.shape[1]
    if frames < least:
        raise InputError(
            f"{entries[0].path} lasts {frames} frames ({frames / FRAME_RATE:.1f} s), {least} are needed: give a longer recording or ask"
            " for fewer."
        )
    return found


def embedded() -> Path:
    """The manifest of the embedded corpus's held-out files."""
    return corpora.EMBEDDED / "heldout.jsonl"


def heldout(checkpoint: Checkpoint) -> Path:
    """Returns the manifest of the run's held-out files; the embedded corpus's if there is none."""
    corpus = checkpoint.corpus
    return Path(corpus.heldout) if corpus is not None and corpus.heldout else embedded()


def _entries(path: Path) -> tuple[Manifest, Path]:
    """The files that a path names, and the folder that their names are relative to."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise InputError(
            f"{path} has no {MANIFEST}: make codes of the recordings in it first (python -m eval prepare {path} --out FOLDER)."
        )
    manifest = path / MANIFEST if path.is_dir() else path
    if is_manifest(manifest):
        return read_manifest(manifest), manifest.parent
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a manifest (.jsonl), a prepared folder, audio or codes (.safetensors)."
        )
    # No manifest says how long it should be: of nan no length differs.
    return Manifest([Entry(path, math.nan, beside(path, ".json"))], []), path.parent.parent


def _skipped(name: str, reason: str) -> Skipped:
    return Skipped(printable(name), printable(reason))


def _speech(entry: Entry, name: str, coders: _Coders, most: int | None) -> EvalFile:
    frames, joints, codec = _load(entry, coders)
    check_tokens(str(entry.path), frames, coders.models)
    frames = frames[:, :most]
    joints = tuple(joint for joint in joints if joint < frames.shape[1])
    return EvalFile(name, printable(entry.speaker or name), frames, joints, codec)


def check_tokens(name: str, frames: np.ndarray, models: Sequence[Checkpoint]) -> None:
    """Raise `InputError` if a checkpoint has no such tokens, so that the codes must be another codec's."""
    for model in models:
        cfg = model.cfg
        if frames.shape[0] != cfg.num_streams:
            raise InputError(
                f"{name} has {frames.shape[0]} token streams, but {model.name} reads {cfg.num_streams}: encode it with the codec that"
                " the checkpoint was trained with."
            )
        for what, part, card in (("codes", frames[1:], cfg.card), ("text", frames[:1], cfg.text_card)):
            if part.max() >= card:
                raise InputError(
                    f"{name} has {what} up to {part.max()}, but {model.name} knows 0 to {card - 1}: encode it with the codec and"
                    " the tokenizer that the checkpoint was trained with."
                )


class _Coders:
    """Codec and tokenizer of the checkpoints, loaded when the first file needs them."""

    def __init__(self, models: Sequence[Checkpoint]):
        self.models = models
        self._loaded: tuple[Codec, Tokenizer, Path] | None = None

    @property
    def unknown(self) -> bool:
        """Whether no checkpoint says which codec it needs: converted weights do not."""
        return all(model.corpus is None for model in self.models)

    def check(self, path: Path, digest: str | None, name: str | None, cardinality: int | None) -> None:
        """Raise `InputError` unless codes made by the codec with this digest are those of all checkpoints.

        Converted weights do not say which codec they need; the number of its entries is all that can be compared.
        """
        for model in self.models:
            if cardinality is not None and cardinality != model.cfg.card:
                raise InputError(
                    f"{path} was encoded with {name or 'a codec'} of {cardinality} entries a codebook, but {model.name} has"
                    f" {model.cfg.card}: encode the speech with the checkpoint's codec."
                )
            if model.codec is not None and model.codec["digest"] != digest:
                raise InputError(
                    f"{path} was encoded with {name or 'a codec'} (digest {(digest or 'not stated')[:12]}), but {model.name} was trained with"
                    f" {model.codec['name']} (digest {model.codec['digest'][:12]}): encode the speech with the checkpoint's codec."
                )

    def get(self, path: Path) -> tuple[Codec, Tokenizer, Path]:
        """Codec, tokenizer and folder of cached frames."""
        if self.unknown:
            raise InputError(
                f"{path} is audio, but converted weights do not say which codec they need: prepare code files first (docs/data.md)."
            )
        if self._loaded is None:
            model = next(model for model in self.models if model.corpus is not None)
            cfg = model.cfg
            coders = corpora.stored_coders(model.corpus, model.about, cfg.card, cfg.text_card)
            self._loaded = *coders, model.cache_dir / "frames"
            codec = self._loaded[0]
            self.check(path, codec.digest, codec.name, codec.cardinality)
        return self._loaded


def _load(entry: Entry, coders: _Coders) -> tuple[np.ndarray, tuple[int, ...], dict[str, str | None]]:
    """Tokens [17, T] of an entry, text -1 where unknown, its joints and its codec."""
    if entry.path.suffix != ".safetensors":
        codec, tokenizer, cache = coders.get(entry.path)
        return load_frames(entry, codec, tokenizer, cache), (), {"name": codec.name, "digest": codec.digest}
    found = read_codes(entry.path)
    coders.check(entry.path, found.codec, found.codec_name, found.cardinality)
    codec = {"name": found.codec_name, "digest": found.codec}
    if coders.unknown:
        return _both_voices(entry.path, found, coders.models[0].cfg.dep_q), found.joints, codec
    return load_frames(entry, *coders.get(entry.path)), found.joints, codec


def _both_voices(path: Path, found: Codes, codebooks: int) -> np.ndarray:
    """Tokens [17, T] of a code file for which there is no codec here to encode silence with."""
    if len(found.codes) not in (2 * codebooks, 2 * codebooks + 1):
        raise InputError(
            f"{path} has {len(found.codes)} rows of codes, but converted weights need {2 * codebooks} (both voices) or"
            f" {2 * codebooks + 1} (text first): write the other voice too (docs/data.md)."
        )
    text = [] if found.has_text else [np.full((1, found.num_frames), ABSENT, np.int32)]
    return np.concatenate([*text, found.codes])


def _names(paths: Sequence[Path], root: Path) -> list[str]:
    """Of files, short and each its own: the path below the manifest's folder without suffix, or all of it where two would be alike."""

    def short(path: Path) -> str:
        path, folder = absolute(path), absolute(root)
        path = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.parent.name, path.name)
        parts = path.with_suffix("").parts
        return printable("/".join(parts[1:] if len(parts) > 1 and parts[0] == "codes" else parts))

    named: dict[str, set[Path]] = {}
    for path in paths:
        named.setdefault(short(path), set()).add(absolute(path))
    return [short(path) if len(named[short(path)]) == 1 else printable(str(path)) for path in paths]
