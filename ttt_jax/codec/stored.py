"""The codec and the tokenizer in a folder of weights, as its `config.json` states them. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.utils import config_json

CONFIG = "config.json"
"""File of a folder of weights that describes it."""


class StoredCodec(NamedTuple):
    """The codec in a folder of weights."""

    name: str
    digest: str
    path: Path
    """A file that `ttt_jax.codec.mimi.file` reads."""


def stated(folder: Path, info: Mapping[str, Any]) -> StoredCodec | None:
    """Returns the codec in a folder whose `config.json` holds `info`; None if it states none. Raises `InputError`."""
    if (codec := info.get("codec")) is None:
        return None
    where = str(folder / CONFIG)
    codec = config_json.conform(dict, codec, where, "codec")
    name, digest, file = (
        config_json.conform(str, codec.get(key), where, f"codec.{key}") for key in ("name", "digest", "file")
    )
    return StoredCodec(name, digest, folder / file)


def stated_tokenizer(folder: Path, info: Mapping[str, Any]) -> Path | None:
    """Returns the SentencePiece model in a folder whose `config.json` holds `info`; None if it states none.

    Raises `InputError`.
    """
    where = str(folder / CONFIG)
    source = config_json.conform(dict, info.get("source", {}), where, "source")
    name = config_json.conform(str | None, source.get("tokenizer"), where, "source.tokenizer")
    return None if name is None else folder / name
