"""Entry of `python -m ttt_jax.serve`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ttt_jax.errors import InputError
from ttt_jax.utils.command import parse, run

HELP = """Talks with a checkpoint in a browser, or by Kyutai's clients.

  python -m ttt_jax.serve runs/tiny
  python -m ttt_jax.serve weights/moshiko-ttt --rows 16
  python -m moshi.client

docs/serve.md describes the protocol and who may talk."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The live server."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a training run, or of converted weights."""
    codec: str | None = None
    """Codec in place of the checkpoint's: a file, or a folder of converted weights with a Mimi."""
    rows: int = 4
    """Talks at once; memory and the time of a step grow with it."""
    host: str = "127.0.0.1"
    """Address to listen at. Where other machines can reach it, clients need a token."""
    port: int = 8998
    """Port to listen at; 0: a free one."""
    token: str | None = None
    """Token that clients must give; unset: none on this machine's own address, else one is drawn and printed."""
    origin: tuple[str, ...] = ()
    """Origins of pages of other servers that may talk, such as https://example.org."""
    tls_cert: Path | None = None
    """File of the TLS certificate, PEM; browsers give a page the microphone only by https, or on this machine."""
    tls_key: Path | None = None
    """File of its key, PEM."""
    static: Path | None = None
    """Folder of another page, with an index.html."""
    memories: Path | None = None
    """Folder of saved talks; unset: memories/ in that of the checkpoint."""
    max_memories: int = 100
    """Saved talks that the folder may hold."""
    every: int = 5
    """Frames from one measurement of the memory that a page shows to the next."""
    queue: int = 25
    """Frames of a talk that may wait; of further ones the oldest are dropped."""
    max_message: int = 1 << 16
    """Largest message in bytes."""
    idle: float = 60.0
    """Seconds without a message after which a talk is closed."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_memories", "every", "queue", "max_message"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} cannot be: give 1 or more.")
        if not self.idle > 0:
            raise InputError(f"--idle {self.idle} cannot be: give a positive number of seconds.")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"--port {self.port} cannot be: give 0 to 65535.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together: give both or none.")
        for origin in self.origin:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#]+", origin):
                raise InputError(f"--origin {origin} is no origin: give scheme and host alone, as https://example.org.")
        if self.memories is not None and self.memories.exists() and not self.memories.is_dir():
            raise InputError(f"--memories {self.memories} is no folder: give one; it is made when a talk is saved.")
        if self.token == "":
            raise InputError("--token is empty: give some text, or leave it out.")


def main(args: Sequence[str]) -> int:
    """Runs the command line `args`. Returns the exit code."""
    options = parse(Options, "python -m ttt_jax.serve", args, description=HELP)
    from ttt_jax.serve import server

    return server.serve(options)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
