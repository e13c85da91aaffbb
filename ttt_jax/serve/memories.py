"""Talks in files of one folder, by name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ttt_jax.errors import InputError
from ttt_jax.serve import saved, speech
from ttt_jax.serve.protocol import NAME
from ttt_jax.serve.talks import Talk

_ENDING = ".safetensors"


class Memories:
    """At most `most` files. What reads and writes them runs beside the talks."""

    def __init__(self, folder: Path, most: int, speech: speech.Speech, weights: str) -> None:
        """`weights` is the digest of the language model's weights. The folder is made when the first file is saved."""
        self._folder, self._most, self._speech, self._weights = folder, most, speech, weights
        self._saves = asyncio.Lock()

    def names(self) -> list[str]:
        """Names of the files, sorted."""
        files = self._folder.glob(f"*{_ENDING}")
        return sorted(file.stem for file in files if NAME.fullmatch(file.stem))

    async def save(self, name: str, talk: Talk) -> None:
        """Saves a talk; one of the same name is replaced. Raises `InputError` if it cannot be."""
        async with self._saves:
            names = self.names()
            if name not in names and len(names) >= self._most:
                raise InputError(
                    f"{len(names)} memories are saved, as many as may be: remove files of the server first."
                )
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                await asyncio.to_thread(saved.save, self._path(name), talk, self._speech, self._weights)
            except OSError as error:
                raise InputError(f"{name} cannot be saved ({error.strerror}): ask who runs the server.") from None
            except InputError as error:
                raise self._without_folder(error, name) from None

    async def load(self, name: str) -> dict[str, Any]:
        """The fast weights of a file, for `Talks.put_memory`. Raises `InputError` if there are none for this model."""
        if name not in self.names():
            raise InputError(f"no memory is called {name}: give one of the list.")
        return await asyncio.to_thread(self._load, name)

    def _load(self, name: str) -> dict[str, Any]:
        try:
            return speech.take_memory(saved.load(self._path(name), self._speech, self._weights).state, 0)
        except InputError as error:
            raise self._without_folder(error, name) from None

    def _without_folder(self, error: InputError, name: str) -> InputError:
        """Clients need not know folders of the server."""
        return InputError(str(error).replace(str(self._path(name)), name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_ENDING}"
