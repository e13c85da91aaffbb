"""Configurations as JSON and back. Imports no jax."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass, also nested ones, as JSON gives them back (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[Config], values: Any, where: str) -> Config:
    """Returns a `kind` (a dataclass) with the fields in `values`. Missing fields keep their default.

    Raises `InputError` with the file `where` and the key if a key is unknown or a value of another type.
    """
    return conform(kind, values, where, "")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` at once or not at all. Bytes of file names that are not UTF-8 become escapes of JSON."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path, what: str) -> Any:
    """Returns the JSON value in `path`. Raises `InputError`, which asks for `what`, if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{path} is not a file: give the path of {what}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): give the path of {what}.") from None


def conform(kind: Any, value: Any, where: str, key: str) -> Any:
    """Returns `value` as the type `kind`, lists as tuples. Raises `InputError` with `where` and `key` if it differs."""
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return _build_dataclass(kind, value, where, key)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return conform(kind, value, where, key)
    if origin is tuple:
        _expect(isinstance(value, list | tuple), where, key, value, "a list")
        if args[-1] is not Ellipsis:
            _expect(len(value) == len(args), where, key, value, f"a list of {len(args)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(conform(kind, item, where, key) for kind, item in zip(kinds, value, strict=True))
    if origin is typing.Literal:
        _expect(value in args, where, key, value, " or ".join(map(repr, args)))
        return value
    if kind is float and type(value) is int:
        return float(value)
    _expect(type(value) is kind, where, key, value, f"of type {kind.__name__}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    _expect(isinstance(value, dict), where, key or "the file", value, "an object with the configuration's fields")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f'perhaps "{prefix}{near[0]}" is meant' if near else f"known are {', '.join(hints)}"
            raise InputError(f'{where} has the key "{prefix}{name}", which is no field: {hint}.')
    return kind(**{name: conform(hints[name], item, where, prefix + name) for name, item in value.items()})


def _expect(condition: bool, where: str, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{where}: {key} is {value!r}, but must be {expected}; correct it there.")
