"""Stand-ins for a codec and a tokenizer that are known by what code files state of them: enough to train on their codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ttt_jax.errors import InputError


@dataclass(frozen=True)
class StatedCodec:
    """What is known of a codec that is not here: the fields of `ttt_jax.codec.Codec` that need no audio.

    Attributes:
        name: for messages.
        digest: SHA-256, hex.
        frame_rate: frames a second.
        cardinality: entries of a codebook; None where nobody says.
        num_codebooks: rows of one voice.
    """

    name: str
    digest: str
    frame_rate: float
    cardinality: int | None
    num_codebooks: int = 8

    def encode(self, audio: object) -> NoReturn:
        """Raises `InputError`: there is nothing to encode with."""
        raise self._absent("encode")

    def decode(self, codes: object) -> NoReturn:
        """Raises `InputError`: there is nothing to decode with."""
        raise self._absent("decode")

    def _absent(self, what: str) -> InputError:
        return InputError(
            f"data.codec='files' cannot {what} audio, since of the codec {self.name} no more than its codes is here: give"
            " data.codec the codec itself."
        )


@dataclass(frozen=True)
class StatedTokenizer:
    """What is known of a tokenizer that is not here: its text rows can be read, words cannot be made into tokens.

    Attributes:
        digest: SHA-256, hex; None where nobody says.
        cardinality: number of ids; None where nobody says.
    """

    digest: str | None
    cardinality: int | None

    def encode(self, word: object) -> NoReturn:
        """Raises `InputError`: there is nothing to encode with."""
        raise self._absent()

    def decode(self, ids: object) -> NoReturn:
        """Raises `InputError`: there is nothing to decode with."""
        raise self._absent()

    def _absent(self) -> InputError:
        return InputError(
            "data.tokenizer is unset, and of the tokenizer of the code files no more than its tokens is here: give its"
            " SentencePiece model."
        )
