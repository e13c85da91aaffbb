"""The data of a run: its recordings, codec and tokenizer, and their fit to a model. Imports no jax."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.codec import KMEANS, MIMI, MIMI_AT, Codec, CodecInfo, load_codec
from ttt_jax.codec.stored import CONFIG, stated_tokenizer
from ttt_jax.config import MoshiConfig
from ttt_jax.data.codes import read_header
from ttt_jax.data.encode import codec_missing
from ttt_jax.data.frames import Recording, open_manifest
from ttt_jax.data.manifest import MANIFEST, Absent, read_manifest
from ttt_jax.data.text import Tokenizer, TokenizerInfo, load_tokenizer
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.paths import exists, listed, local

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "corpus"
"""Folder of the embedded corpus in a checkout."""
FILES = "files"
"""As `CorpusConfig.codec`: the codec that the code files state."""
_LEAST, _MOST = 1e-6, 1e6  # weights of sources


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Speech to train and evaluate on, its codec and its tokenizer."""

    train: str | None = None
    """Training files: a manifest (JSONL with path and duration, plain or gzip) or a prepared folder, or several with
    weights: a.jsonl:3,b.jsonl:1 takes three files of a for one of b; unset: the embedded corpus."""
    heldout: str | None = None
    """Manifest or prepared folder of the files that are evaluated at the end; unset: the embedded corpus's if `train`
    is unset, else none."""
    validation: str | None = None
    """Manifest or prepared folder of the files that are scored during training; unset: the held-out files."""
    codec: str = KMEANS
    """Codec that turns audio into codes: "kmeans" (embedded), the path of a codec file or of converted weights with
    their Mimi, "mimi:PATH" for a Mimi alone, in training also "mimi": that of the base; or "files": code files only, of
    the codec that they state. A file of such a name is ./kmeans, ./mimi or ./files."""
    tokenizer: str | None = None
    """SentencePiece model for the text stream; unset: the embedded one, with codec "files" the one that they state,
    with converted weights as codec theirs, if they have one."""
    cache: str | None = None
    """Folder for encoded data and compiled programs; unset: ttt_jax in the user's cache folder."""

    @property
    def cache_dir(self) -> Path:
        """Path of the cache folder."""
        if self.cache is not None:
            return local(self.cache)
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttt_jax"

    def resolved(self) -> CorpusConfig:
        """Returns the configuration with absolute paths. Raises `InputError` as `parse_sources`."""
        names = ["heldout", "validation", "tokenizer", "cache"]
        absolute = {name: _absolute(getattr(self, name)) for name in names if getattr(self, name) is not None}
        prefix = MIMI_AT if self.codec.startswith(MIMI_AT) else ""
        codec = self.codec.removeprefix(prefix)
        if self.codec not in (KMEANS, MIMI, FILES) and exists(codec):
            absolute["codec"] = prefix + _absolute(codec)
        if self.train is not None:
            sources = [(_absolute(path), weight) for path, weight in parse_sources(self.train)]
            absolute["train"] = ",".join(
                path if len(sources) == 1 else f"{path}:{repr(weight).removesuffix('.0')}" for path, weight in sources
            )
        return dataclasses.replace(self, **absolute)


class Source(NamedTuple):
    """Training recordings that share a weight."""

    name: str  # path given by the user
    weight: float
    recordings: tuple[Recording, ...]


class Corpus(NamedTuple):
    """Opened recordings, with their codec and tokenizer."""

    codec: Codec | CodecInfo
    tokenizer: Tokenizer | TokenizerInfo
    train: tuple[Source, ...]
    validation: tuple[Recording, ...]  # scored during training; `heldout` itself if no others were named
    heldout: tuple[Recording, ...]
    absent: dict[str, list[Absent]]  # files that are left out because they do not exist, by part

    @property
    def recordings(self) -> Iterator[Recording]:
        """Training recordings, source by source."""
        return (recording for source in self.train for recording in source.recordings)

    @property
    def missing(self) -> list[Absent]:
        """All of `absent`, each once."""
        return list(dict.fromkeys(file for part in self.absent.values() for file in part))

    def describe(self) -> dict[str, Any]:
        """Returns names, digests and sizes, as a run stores them. The frames of audio are read. Raises `InputError`."""
        described: dict[str, Any] = {
            "codec": {"name": self.codec.name, "digest": self.codec.digest},
            "tokenizer": {"digest": self.tokenizer.digest, "pieces": self.tokenizer.cardinality},
            "train": _describe(list(self.recordings)),
            "heldout": _describe(self.heldout),
        }
        if len(self.train) > 1:  # the sources differ in weight
            described["train"]["sources"] = [
                {"name": source.name, "weight": source.weight, "files": len(source.recordings)} for source in self.train
            ]
        if self.validation is not self.heldout:
            described["validation"] = _describe(self.validation)
        return described


def parse_sources(text: str) -> list[tuple[str, float]]:
    """Returns paths and weights of PATH[:WEIGHT][,PATH[:WEIGHT]...]; the default weight is 1.

    A part that exists as a path is a path, whatever its characters. Raises `InputError` for a bad path or weight.
    """

    def is_part(part: str) -> bool:
        path, _, weight = part.rpartition(":")
        return exists(_bare(part)) or ("," not in weight and exists(_bare(path)))

    sources = []
    for part in listed(text, is_part):
        path, colon, weight = part.rpartition(":")
        whole = not colon or exists(_bare(part))
        sources.append((_bare(part), 1.0) if whole else (_bare(path), _weight(text, part, weight)))
    if not all(path for path, _ in sources):
        raise InputError(f"data.train={text!r} names an empty path: give PATH or PATH:WEIGHT, separated by commas.")
    return sources


def load_coders(
    cfg: CorpusConfig, card: int | None = None, text_card: int | None = None, stored: dict[str, Any] | None = None
) -> tuple[Codec | CodecInfo, Tokenizer | TokenizerInfo]:
    """Returns the codec and the tokenizer of `cfg`. Raises `InputError` if one cannot be loaded.

    With codec "files" they are those that the code files state, or that `stored` (of `Corpus.describe`) states where
    the files may be gone. `card` and `text_card`, cardinalities of the model, stand for those that no file states.
    """
    if cfg.codec != FILES:
        codec = load_codec(cfg.codec)
        return codec, load_tokenizer(_default_tokenizer(cfg.codec) if cfg.tokenizer is None else cfg.tokenizer)
    if stored is not None:
        codec, text_digest = CodecInfo(**stored["codec"], cardinality=card), stored["tokenizer"]["digest"]
    else:
        codec, text_digest = _stated(cfg, card)
    tokenizer = TokenizerInfo(text_digest, text_card) if cfg.tokenizer is None else load_tokenizer(cfg.tokenizer)
    return codec, tokenizer


def _default_tokenizer(codec: str) -> Path:
    """Returns the tokenizer in the folder of weights that `codec` names; else the embedded one."""
    if codec != KMEANS and (folder := local(codec.removeprefix(MIMI_AT))).is_dir():
        info = config_json.read_json(folder / CONFIG, "a folder of weights")
        if (path := stated_tokenizer(folder, info)) is not None:
            return path
    return EMBEDDED / "tokenizer" / "spm512.model"


def fit_model(
    model: MoshiConfig,
    codec: Codec | CodecInfo,
    tokenizer: Tokenizer | TokenizerInfo,
    weights: str | None = None,
    trained_with: dict[str, str] | None = None,
) -> MoshiConfig:
    """Returns `model` with the cardinalities of the data's codec and tokenizer, where these are known.

    `weights` names the model's weights, None if they are still to be initialised. `trained_with` holds name and digest
    of the codec that they were trained with. Raises `InputError` if model and data do not fit.
    """
    codebooks = codec.num_codebooks
    if (model.n_q, model.dep_q) != (2 * codebooks, codebooks):
        raise InputError(
            f"model.n_q={model.n_q} and model.dep_q={model.dep_q} do not fit the codec {codec.name}: give"
            f" {2 * codebooks} and {codebooks}, two streams of {codebooks} codebooks of which Moshi's is predicted."
        )
    cards = model.card if codec.cardinality is None else codec.cardinality, tokenizer.cardinality or model.text_card
    if weights is not None and cards != (model.card, model.text_card):
        raise InputError(
            f"{weights} has {model.card} codes and {model.text_card} text pieces, but the codec {codec.name} has"
            f" {cards[0]} and the tokenizer {cards[1]}: give the codec and the tokenizer that the weights were trained"
            " with."
        )
    if trained_with is not None and trained_with["digest"] != codec.digest:
        raise InputError(
            f"{weights} was trained with the codec {trained_with['name']} (digest {trained_with['digest'][:12]}), but"
            f" the speech was encoded with {codec.name} (digest {(codec.digest or 'not stated')[:12]}): encode it with"
            " the checkpoint's codec."
        )
    return dataclasses.replace(model, card=cards[0], text_card=cards[1])


def load(cfg: CorpusConfig, codec: Codec | CodecInfo, tokenizer: Tokenizer | TokenizerInfo) -> Corpus:
    """Opens the files of `cfg`; audio that is not in the cache is encoded. Raises `InputError`."""
    manifests = _by_part(cfg)  # all are read before the first file is encoded, so that mistakes show at once
    absent = {
        part: [file for path in paths for file in read_manifest(path).absent] for part, paths in manifests.items()
    }

    def opened(*paths: Path) -> tuple[Recording, ...]:
        folder = cfg.cache_dir / "frames"
        return tuple(recording for path in paths for recording in open_manifest(path, codec, tokenizer, folder))

    train = tuple(Source(name, weight, opened(manifest)) for name, weight, manifest in _sources(cfg))
    heldout = opened(*manifests["heldout"])
    validation = heldout if cfg.validation is None else opened(*manifests["validation"])
    return Corpus(codec, tokenizer, train, validation, heldout, absent)


def _stated(cfg: CorpusConfig, card: int | None) -> tuple[CodecInfo, str | None]:
    """Returns the codec and the tokenizer's digest that code files state; reads headers until all is known."""
    codec, text_digest = None, None
    manifests = [path for paths in _by_part(cfg).values() for path in paths]
    for path in (entry.path for manifest in manifests for entry in read_manifest(manifest).entries):
        if path.suffix != ".safetensors":
            raise codec_missing(path)
        header = read_header(path)
        if header.codec is None:
            raise InputError(
                f"{path} does not state its codec, which data.codec='files' relies on: write the codec's digest under"
                " 'codec' in its metadata."
            )
        if codec is None:
            codec = CodecInfo(header.codec_name or f"codec {header.codec[:12]}", header.codec, header.cardinality)
        if codec.cardinality is None:
            codec = dataclasses.replace(codec, cardinality=header.cardinality)
        if header.rows == 1 + 2 * codec.num_codebooks:
            text_digest = text_digest or header.tokenizer
        if codec.cardinality is not None and text_digest is not None:
            break
    return codec if codec.cardinality is not None else dataclasses.replace(codec, cardinality=card), text_digest


def _sources(cfg: CorpusConfig) -> list[tuple[str, float, Path]]:
    """Returns name, weight and manifest of each source of training files."""
    sources = [(str(EMBEDDED / "train.jsonl"), 1.0)] if cfg.train is None else parse_sources(cfg.train)
    return [(path, weight, _manifest(path)) for path, weight in sources]


def _by_part(cfg: CorpusConfig) -> dict[str, list[Path]]:
    """Returns the manifests of training, held-out and validation files."""
    heldout = str(EMBEDDED / "heldout.jsonl") if cfg.train is cfg.heldout is None else cfg.heldout
    return {
        "train": [manifest for _, _, manifest in _sources(cfg)],
        "heldout": [] if heldout is None else [_manifest(heldout)],
        "validation": [] if cfg.validation is None else [_manifest(cfg.validation)],
    }


def _manifest(path: str) -> Path:
    """Returns `path` itself, or the manifest in it if it is a folder."""
    manifest = local(path)
    if not manifest.is_dir():
        return manifest
    if not (manifest / MANIFEST).is_file():
        raise InputError(
            f"{path} is a folder without {MANIFEST}: give a manifest, or a folder that python -m eval prepare made."
        )
    return manifest / MANIFEST


def _bare(path: str) -> str:
    """Returns a path unchanged if it exists, else without blanks around it."""
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
