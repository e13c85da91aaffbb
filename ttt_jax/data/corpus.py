"""From manifests to the recordings that a run trains on and is evaluated on. Imports no jax."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.codec import Codec, load_codec
from ttt_jax.config import FRAME_RATE
from ttt_jax.data.codes import Header, read_header
from ttt_jax.data.frames import Recording, not_codes, open_manifest
from ttt_jax.data.manifest import MANIFEST, Absent, read_manifest
from ttt_jax.data.stated import StatedCodec, StatedTokenizer
from ttt_jax.data.text import Tokenizer, load_tokenizer
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import exists, listed, local

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "corpus"
"""Folder of the embedded corpus in a checkout."""
FILES = "files"
"""As `CorpusConfig.codec`: the codec that the code files state."""
_LEAST, _MOST = 1e-6, 1e6  # weights of sources


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Which speech, and what encodes it."""

    train: str | None = None
    """Training files: a manifest (JSONL with path and duration, plain or gzip) or a prepared folder, or several with weights:
    a.jsonl:3,b.jsonl:1 takes three files of a for one of b; unset: the embedded corpus."""
    heldout: str | None = None
    """Manifest or prepared folder of the files that are evaluated at the end; unset: the embedded corpus's if `train` is unset, else none."""
    validation: str | None = None
    """Manifest or prepared folder of the files that are scored during training; unset: the held-out files."""
    codec: str = "kmeans"
    """Codec that turns audio into codes: "kmeans" (embedded), the path of a codec file, or "files": no audio, code files only,
    and whatever codec they state. A codec file of such a name is ./kmeans or ./files."""
    tokenizer: str | None = None
    """SentencePiece model for the text stream; unset: the embedded one, with codec "files" the one that the files state."""
    cache: str | None = None
    """Folder for encoded data and compiled programs; unset: ttt_jax in the user's cache folder."""

    @property
    def cache_dir(self) -> Path:
        """The cache folder in force."""
        if self.cache is not None:
            return local(self.cache)
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttt_jax"

    def resolved(self) -> CorpusConfig:
        """The same with absolute paths, so that it means the same in any folder. Raises `InputError` as `parse_sources`."""
        names = ["heldout", "validation", "tokenizer", "cache"]
        if self.codec not in ("kmeans", FILES) and exists(self.codec):
            names.append("codec")
        absolute = {name: _absolute(getattr(self, name)) for name in names if getattr(self, name) is not None}
        if self.train is not None:
            sources = [(_absolute(path), weight) for path, weight in parse_sources(self.train)]
            absolute["train"] = ",".join(
                path if len(sources) == 1 else f"{path}:{repr(weight).removesuffix('.0')}" for path, weight in sources
            )
        return dataclasses.replace(self, **absolute)


class Source(NamedTuple):
    """Recordings to train on that share a weight."""

    name: str
    """The path that was given."""
    weight: float
    """Its share of the files that rows take, relative to the other sources' weights."""
    recordings: tuple[Recording, ...]


class Corpus(NamedTuple):
    """Speech that is ready to be read, with what encoded it."""

    codec: Codec
    tokenizer: Tokenizer
    train: tuple[Source, ...]
    validation: tuple[Recording, ...]
    """Scored during training; the held-out files themselves where no others were named."""
    heldout: tuple[Recording, ...]
    absent: dict[str, list[Absent]]
    """Files that the manifests of train, heldout and validation name and that are not there, so that they are left out."""

    @property
    def recordings(self) -> Iterator[Recording]:
        """The training files, source by source."""
        return (recording for source in self.train for recording in source.recordings)

    @property
    def missing(self) -> list[Absent]:
        """All of `absent`, each once."""
        return list(dict.fromkeys(one for part in self.absent.values() for one in part))

    def describe(self) -> dict[str, Any]:
        """Names, digests and sizes, as a run stores them.

        Code files are known by their digests; audio is known by its frames, which are read for it. Raises `InputError`
        where they cannot be.
        """
        described: dict[str, Any] = {
            "codec": {"name": self.codec.name, "digest": self.codec.digest},
            "tokenizer": {"digest": self.tokenizer.digest, "pieces": self.tokenizer.cardinality},
            "train": _describe(list(self.recordings)),
            "heldout": _describe(self.heldout),
        }
        if len(self.train) > 1:  # which file is in which source
            described["train"]["sources"] = [
                {"name": source.name, "weight": source.weight, "files": len(source.recordings)} for source in self.train
            ]
        if self.validation is not self.heldout:
            described["validation"] = _describe(self.validation)
        return described


def parse_sources(text: str) -> list[tuple[str, float]]:
    """Paths and weights of PATH[:WEIGHT][,PATH[:WEIGHT]...]; a weight that is left out is 1.

    What exists as a path is one, whatever commas, colons and blanks it has; other blanks around paths and weights are
    dropped. Raises `InputError`.
    """

    def is_part(part: str) -> bool:
        path, _, weight = part.rpartition(":")
        return exists(_bare(part)) or ("," not in weight and exists(_bare(path)))

    found = []
    for part in listed(text, is_part):
        path, colon, weight = part.rpartition(":")
        whole = not colon or exists(_bare(part))
        found.append((_bare(part), 1.0) if whole else (_bare(path), _weight(text, part, weight)))
    if not all(path for path, _ in found):
        raise InputError(f"data.train={text!r} names an empty path: give PATH or PATH:WEIGHT, separated by commas.")
    return found


def load_coders(
    cfg: CorpusConfig, card: int | None = None, text_card: int | None = None
) -> tuple[Codec | StatedCodec, Tokenizer | StatedTokenizer]:
    """The codec and the tokenizer of `cfg`. Raises `InputError`.

    With codec "files" they are what the files state; `card` and `text_card` stand for cardinalities that no file states,
    which are None otherwise.
    """
    if cfg.codec != FILES:
        return load_codec(cfg.codec), load_tokenizer(
            EMBEDDED / "tokenizer" / "spm512.model" if cfg.tokenizer is None else cfg.tokenizer
        )
    codec, digest = None, None
    manifests = [path for paths in _by_part(cfg).values() for path in paths]
    for entry in (entry for path in manifests for entry in read_manifest(path).entries):
        header = _header(entry.path)
        if codec is None:
            name = header.codec_name or f"codec {header.codec[:12]}"
            codec = StatedCodec(name, header.codec, header.frame_rate, header.cardinality)
        if codec.cardinality is None:
            codec = dataclasses.replace(codec, cardinality=header.cardinality)
        if header.rows == 1 + 2 * codec.num_codebooks:
            digest = digest or header.tokenizer
        if codec.cardinality is not None and digest is not None:
            break
    if codec.cardinality is None:
        codec = dataclasses.replace(codec, cardinality=card)
    return codec, _stated_tokenizer(cfg, digest, text_card)


def stored_coders(
    cfg: CorpusConfig, meta: dict[str, Any], card: int, text_card: int
) -> tuple[Codec | StatedCodec, Tokenizer | StatedTokenizer]:
    """`load_coders` for a run whose files may be gone: with codec "files", what `Corpus.describe` stored in `meta`.

    `card` and `text_card` are the model's. Raises `InputError`.
    """
    if cfg.codec != FILES:
        return load_coders(cfg)
    codec = StatedCodec(meta["codec"]["name"], meta["codec"]["digest"], FRAME_RATE, card)
    return codec, _stated_tokenizer(cfg, meta["tokenizer"]["digest"], text_card)


def load(cfg: CorpusConfig, codec: Codec | StatedCodec, tokenizer: Tokenizer | StatedTokenizer) -> Corpus:
    """Open the files of `cfg`; audio that was not encoded before is encoded into the cache. Raises `InputError`."""
    manifests = _by_part(cfg)  # all: a mistake in the last is told before the first is encoded
    absent = {part: [one for path in paths for one in read_manifest(path).absent] for part, paths in manifests.items()}

    def opened(manifest: Path | None) -> tuple[Recording, ...]:
        return open_manifest(manifest, codec, tokenizer, cfg.cache_dir / "frames") if manifest is not None else ()

    train = tuple(Source(name, weight, opened(manifest)) for name, weight, manifest in _sources(cfg))
    heldout = opened(_heldout(cfg))
    validation = heldout if cfg.validation is None else opened(_manifest(cfg.validation))
    return Corpus(codec, tokenizer, train, validation, heldout, absent)


def _header(path: Path) -> Header:
    """Of a code file that states its codec."""
    if path.suffix != ".safetensors":
        raise not_codes(path)
    header = read_header(path)
    if header.codec is None:
        raise InputError(
            f"{path} does not state its codec, which data.codec='files' relies on: write the codec's digest under 'codec' in"
            " its metadata."
        )
    return header


def _stated_tokenizer(cfg: CorpusConfig, digest: str | None, cardinality: int | None) -> Tokenizer | StatedTokenizer:
    return load_tokenizer(cfg.tokenizer) if cfg.tokenizer is not None else StatedTokenizer(digest, cardinality)


def _sources(cfg: CorpusConfig) -> list[tuple[str, float, Path]]:
    """Name, weight and manifest of the training data."""
    if cfg.train is None:
        return [(str(EMBEDDED / "train.jsonl"), 1.0, EMBEDDED / "train.jsonl")]
    return [(path, weight, _manifest(path)) for path, weight in parse_sources(cfg.train)]


def _heldout(cfg: CorpusConfig) -> Path | None:
    if cfg.heldout is not None:
        return _manifest(cfg.heldout)
    return EMBEDDED / "heldout.jsonl" if cfg.train is None else None


def _by_part(cfg: CorpusConfig) -> dict[str, list[Path]]:
    """The manifests of what is trained on, held out, and for validation alone."""
    heldout = _heldout(cfg)
    return {
        "train": [manifest for _, _, manifest in _sources(cfg)],
        "heldout": [] if heldout is None else [heldout],
        "validation": [] if cfg.validation is None else [_manifest(cfg.validation)],
    }


def _manifest(path: str) -> Path:
    """The manifest that `path` names: itself, or that of the folder."""
    found = local(path)
    if not found.is_dir():
        return found
    if not (found / MANIFEST).is_file():
        raise InputError(
            f"{path} is a folder without {MANIFEST}: give a manifest, or a folder that python -m eval prepare made."
        )
    return found / MANIFEST


def _bare(path: str) -> str:
    """A path as it is if it exists, else without blanks around it."""
    return path if exists(path) else path.strip()


def _weight(text: str, part: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not _LEAST <= value <= _MOST:
        raise InputError(
            f"data.train={text!r} has the part {part!r}, which neither exists nor ends in a weight from {_LEAST:f} to"
            f" {_MOST:.0f} ({weight!r}): give PATH or PATH:WEIGHT, separated by commas."
        )
    return value


def _absolute(path: str) -> str:
    return str(local(path).absolute())


def _describe(recordings: Sequence[Recording]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for recording in recordings:
        if recording.digest is not None:
            digest.update(recording.digest.encode())
            continue
        frames = recording.read()
        digest.update(repr(frames.shape).encode())
        digest.update(np.ascontiguousarray(frames, np.int32).tobytes())
    frames = sum(recording.num_frames for recording in recordings)
    return {"files": len(recordings), "frames": frames, "digest": digest.hexdigest()}
