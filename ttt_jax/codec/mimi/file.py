"""A Mimi in one file of ours. Imports no jax.

File format: safetensors. Its tensors are exactly `ttt_jax.codec.mimi.config.shapes`, float32; its metadata:

    format    "ttt_jax.mimi/1"
    name      what results store, "mimi-8x2048": codebooks that are used, and their entries
    config    JSON of `MimiConfig`
    use       JSON of `Use`
    licence   of the weights, or "unknown"
    source    where the weights are from
    digest    SHA-256, hex, of all that codes depend on: equal digests mean equal codes
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.codec.mimi.config import MimiConfig, Use, check_use, shapes
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import write_atomically

FORMAT = "ttt_jax.mimi/1"
KEYS = ("format", "name", "config", "use", "licence", "source", "digest")
MADE_BY = "python -m ttt_jax.convert mimi"
MANY = 3  # tensors that a message names

Params = dict[str, np.ndarray]
Kind = tuple[tuple[int, ...], str]
"""A tensor's shape and type, as files name it."""
Config = TypeVar("Config", MimiConfig, Use)


class Mimi(NamedTuple):
    """What a file holds."""

    params: Params
    cfg: MimiConfig
    use: Use
    name: str
    digest: str
    metadata: dict[str, str]
    """All of it, as stored."""


def make(params: Params, cfg: MimiConfig, use: Use, *, licence: str, source: str) -> Mimi:
    """Returns the content of a file of these parameters.

    Raises `InputError` with `source` unless they are those of `cfg`, float32 and finite, and it has the codebooks that
    are used.
    """
    check_use(cfg, use, source)
    kinds = {
        key: (array.shape, "F32" if array.dtype == np.float32 else str(array.dtype)) for key, array in params.items()
    }
    _check_layout(kinds, cfg, source, "convert a sound Mimi")
    _check_finite(params, source, "convert a sound Mimi")
    name, digest = f"mimi-{use.num_codebooks}x{cfg.cardinality}", _digest(params, cfg, use)
    config = {"config": json.dumps(config_json.to_dict(cfg)), "use": json.dumps(config_json.to_dict(use))}
    metadata = {"format": FORMAT, "name": name, **config, "licence": licence, "source": source, "digest": digest}
    return Mimi({key: params[key] for key in shapes(cfg)}, cfg, use, name, digest, metadata)


def write(path: str | Path, mimi: Mimi) -> None:
    """Writes a file, all of it or nothing."""
    params = {name: np.ascontiguousarray(array) for name, array in mimi.params.items()}
    write_atomically(Path(path), safetensors.numpy.save(params, metadata=mimi.metadata))


def read(path: str | Path) -> Mimi:
    """Returns the content of a file. Raises `InputError` if it is another file, incomplete or damaged."""
    path = Path(path)
    again = f"write it again by `{MADE_BY}`"
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a Mimi that `{MADE_BY}` made.")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                given = f"has format {metadata.get('format')!r} in its metadata, expected {FORMAT!r}"
                raise InputError(f"{path} {given}: give a Mimi that `{MADE_BY}` made.")
            if missing := [key for key in KEYS if key not in metadata]:
                raise InputError(f"{path} lacks {', '.join(missing)} in its metadata: {again}.")
            cfg, use = (
                _from_json(kind, metadata[key], path, key) for kind, key in ((MimiConfig, "config"), (Use, "use"))
            )
            check_use(cfg, use, str(path))
            stored = {name: file.get_slice(name) for name in sorted(file.keys())}
            kinds = {name: (tuple(about.get_shape()), about.get_dtype()) for name, about in stored.items()}
            _check_layout(kinds, cfg, str(path), again)
            params = {name: file.get_tensor(name) for name in stored}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): {again}.") from None
    digest = _digest(params, cfg, use)
    if digest != metadata["digest"]:
        states = f"its content has the digest {digest}, its metadata state {metadata['digest']}"
        raise InputError(f"{path} is damaged, as {states}: copy it or {again}.")
    _check_finite(params, str(path), again)
    return Mimi({name: params[name] for name in shapes(cfg)}, cfg, use, metadata["name"], digest, metadata)


def _from_json(kind: type[Config], text: str, path: Path, key: str) -> Config:
    """Returns a configuration in the metadata. Raises `InputError` with the file and the key."""
    where = f"{path}: {key}"
    try:
        return config_json.from_dict(kind, json.loads(text), where)
    except InputError as error:
        raise (error if str(error).startswith(where) else InputError(f"{where} is wrong: {error}")) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): write the file again by `{MADE_BY}`.") from None


def _check_layout(stored: Mapping[str, Kind], cfg: MimiConfig, where: str, advice: str) -> None:
    """Raises `InputError` unless `stored` has the names and shapes of `cfg`, and float32 as type."""
    if max(cfg.num_layers, len(cfg.ratios)) > len(stored):
        problems = [f"has {len(stored)} tensors only"]  # listing those of `cfg` could take for ever
    else:
        problems = list(_differences(shapes(cfg), stored))
    if problems:
        raise InputError(f"{where} does not fit its configuration, as it {'; '.join(problems)}: {advice}.")


def _check_finite(params: Params, where: str, advice: str) -> None:
    if spoiled := [name for name, array in params.items() if not np.isfinite(array).all()]:
        raise InputError(f"{where} has NaN or infinite numbers in {_few(spoiled)}: {advice}.")


def _differences(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Kind]) -> Iterator[str]:
    if missing := [name for name in expected if name not in stored]:
        yield f"lacks {_few(missing)}"
    if unexpected := [name for name in stored if name not in expected]:
        yield f"has {_few(unexpected)}, which no Mimi has"
    wrong = [
        f"{name} of shape {list(stored[name][0])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name][0] != shape
    ]
    if wrong:
        yield f"has {_few(wrong)}"
    if types := [f"{name} as {dtype}" for name, (_, dtype) in stored.items() if dtype != "F32"]:
        yield f"has {_few(types)} instead of F32"


def _few(words: list[str]) -> str:
    rest = f" and {len(words) - MANY} more" if len(words) > MANY else ""
    return ", ".join(words[:MANY]) + rest


def _digest(params: Params, cfg: MimiConfig, use: Use) -> str:
    """SHA-256, hex, of all that codes depend on."""
    about = [FORMAT, dataclasses.asdict(cfg), dataclasses.asdict(use)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, shape in shapes(cfg).items():
        digest.update(f"{name}{list(shape)}".encode())
        digest.update(np.ascontiguousarray(params[name], "<f4").view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
