"""From manifests to the token arrays that a run trains on and is evaluated on. Imports no jax."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.codec import Codec, load_codec
from ttt_jax.data.frames import encode_manifest
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import Tokenizer, load_tokenizer

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "corpus"
"""Folder of the embedded corpus in a checkout."""


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Which speech, and what encodes it."""

    train: str | None = None
    """Manifest (JSONL with path and duration) of the training files; unset: the embedded corpus."""
    heldout: str | None = None
    """Manifest of the files that are evaluated at the end; unset: the embedded corpus's if `train` is unset, else none."""
    codec: str = "kmeans"
    """Codec that turns audio into codes: "kmeans" (embedded) or the path of a codec file."""
    tokenizer: str | None = None
    """SentencePiece model for the text stream; unset: the embedded one."""
    cache: str | None = None
    """Folder for encoded data and compiled programs; unset: ttt_jax in the user's cache folder."""

    @property
    def cache_dir(self) -> Path:
        """The cache folder in force."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttt_jax"

    def resolved(self) -> CorpusConfig:
        """The same with absolute paths, so that it means the same in any folder."""
        names = ("train", "heldout", "tokenizer", "cache") + (("codec",) if Path(self.codec).exists() else ())
        paths = {name: getattr(self, name) for name in names}
        absolute = {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path is not None}
        return dataclasses.replace(self, **absolute)


class Corpus(NamedTuple):
    """Encoded speech, int32 [17, T_i] per file, with what encoded it."""

    codec: Codec
    tokenizer: Tokenizer
    train: list[np.ndarray]
    heldout: list[np.ndarray]
    heldout_names: list[str]
    heldout_speakers: list[str | None]

    def describe(self) -> dict[str, Any]:
        """Names, digests and sizes, as a run stores them."""
        return {
            "codec": {"name": self.codec.name, "digest": self.codec.digest},
            "tokenizer": {"digest": self.tokenizer.digest, "pieces": self.tokenizer.cardinality},
            "train": _describe(self.train),
            "heldout": _describe(self.heldout),
        }


def load_coders(cfg: CorpusConfig) -> tuple[Codec, Tokenizer]:
    """The codec and the tokenizer of `cfg`. Raises `InputError`."""
    return load_codec(cfg.codec), load_tokenizer(cfg.tokenizer or EMBEDDED / "tokenizer" / "spm512.model")


def load(cfg: CorpusConfig, codec: Codec, tokenizer: Tokenizer) -> Corpus:
    """Read and encode the files of `cfg`; what was encoded before comes from the cache. Raises `InputError`."""
    train_manifest = cfg.train or EMBEDDED / "train.jsonl"
    heldout_manifest = cfg.heldout or (EMBEDDED / "heldout.jsonl" if cfg.train is None else None)
    for manifest in filter(None, (train_manifest, heldout_manifest)):
        read_manifest(manifest)  # a mistake in the second is told before the first is encoded
    frames = cfg.cache_dir / "frames"
    train = encode_manifest(train_manifest, codec, tokenizer, frames)
    heldout = encode_manifest(heldout_manifest, codec, tokenizer, frames) if heldout_manifest else []
    return Corpus(
        codec,
        tokenizer,
        [file for _, file in train],
        [file for _, file in heldout],
        [f"{entry.path.parent.name}/{entry.path.stem}" for entry, _ in heldout],
        [entry.speaker for entry, _ in heldout],
    )


def _describe(files: list[np.ndarray]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file.shape).encode())
        digest.update(np.ascontiguousarray(file, np.int32).tobytes())
    return {"files": len(files), "frames": sum(file.shape[1] for file in files), "digest": digest.hexdigest()}
