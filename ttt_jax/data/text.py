"""Text tokens: a SentencePiece model and the text row of a stream.

Moshi's ids: EPAD (0) on the frame before a word's first token, PAD (3) where no text is due. A SentencePiece model
trained with unk_id=0, bos_id=1, eos_id=2, pad_id=3 leaves both free. Any other model works too: `Tokenizer.encode`
drops a word's tokens 0 and 3, which would read as EPAD and PAD.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ttt_jax.data.alignments import MAIN_SPEAKER, Word, read_alignments
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import local

EPAD = 0
PAD = 3
ABSENT = -1
"""Token that is not known; equals `ttt_jax.moshi.delays.ABSENT`, whose module loads jax."""
_WORD_START = "\u2581"  # SentencePiece's mark


class Tokenizer:
    """Words to ids, 0 to cardinality - 1, and back by a SentencePiece model; `digest` is the SHA-256 of its file."""

    def __init__(self, processor, digest: str):
        self._processor = processor
        self.cardinality: int = processor.get_piece_size()
        self.digest = digest
        self._silent = {EPAD, PAD, processor.bos_id(), processor.eos_id()}

    def encode(self, word: str) -> list[int]:
        """Returns the ids of one word, without begin or end marks.

        Unknown pieces are dropped; byte pieces (<0xE4>) are known. A partly known word keeps its known pieces if they
        have a letter or a digit, else it has no ids. The mark of a word's beginning alone is no token.
        """
        tokens = self._processor.encode(word.strip())
        left = [token for token in tokens if token not in (EPAD, PAD, self._processor.unk_id())]
        text = "".join(self._processor.id_to_piece(token) for token in left).replace(_WORD_START, "")
        meant = text if len(left) == len(tokens) else any(map(str.isalnum, text))
        return left if meant else []

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of a row of ids without EPAD, PAD, begin and end marks and absent (negative) ids."""
        return self._processor.decode([int(i) for i in ids if i >= 0 and int(i) not in self._silent])

    def begins_word(self, token: int) -> bool:
        """Returns whether the piece of an id, 0 or more, is the first of a word."""
        return self._processor.id_to_piece(int(token)).startswith(_WORD_START)

    def piece(self, token: int) -> str:
        """Returns the piece of one id as it is in the model: U+2581 begins a word, a byte is written as <0xE4>."""
        return self._processor.id_to_piece(token)


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer that is not here, as code files state it: enough to read their text rows, not to encode words."""

    digest: str | None = None  # None if no file states it
    cardinality: int | None = None  # None if it is not known


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer in a SentencePiece ``.model`` file. Raises `InputError` if it is unusable."""
    path = local(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a SentencePiece model file.") from None
    import sentencepiece

    try:
        # An empty file is a valid protobuf message and would only fail at the first word.
        processor = sentencepiece.SentencePieceProcessor(model_proto=content) if content else None
    except RuntimeError:
        processor = None
    if processor is None or processor.get_piece_size() <= PAD:
        raise InputError(
            f"{path} is not a usable SentencePiece model ({len(content)} bytes): give a .model file with more than"
            f" {PAD + 1} pieces."
        )
    return Tokenizer(processor, hashlib.sha256(content).hexdigest())


class Text(NamedTuple):
    """The text row of a recording."""

    row: np.ndarray | None  # int32 [T], -1 in frames whose text is not known; None if it is known in none
    notice: str | None  # warning to log behind the file's path: which words were dropped, or why none is used


def read_text(
    path: str | Path,
    seconds: float,
    num_frames: int,
    tokenizer: Tokenizer,
    frame_rate: float,
    speaks: Callable[[Word], bool] = lambda word: word.speaker == MAIN_SPEAKER,
) -> Text:
    """Returns the text row of the JSON beside a recording, made by `text_stream` of the words of `read_alignments`.

    The notice counts dropped words and words without tokens. The text is not known in spans of words without times
    (`Alignment.between`), and in no frame if all words were dropped. In place of other dropped words nothing is spoken.
    `speaks` decides whether a word belongs to the stream.

    Raises `InputError` as `read_alignments`, or if the tokenizer, being of another language, knows none of the words.
    """
    alignment = read_alignments(path, seconds)
    if alignment.words is None:
        return Text(None, alignment.notice)
    words = [word for word in alignment.words if speaks(word)]
    tokens = [tokenizer.encode(word.text) for word in words]
    if words and not any(tokens):
        raise InputError(
            f"{path}: the text tokenizer has no token for any of {len(words)} words (the first is"
            f" {words[0].text[:30]!r}): give a SentencePiece model fitted to this language, or remove the file."
        )
    dropped = {reason: [word for word in several if speaks(word)] for reason, several in alignment.dropped.items()}
    dropped["without a token"] = [word for word, ids in zip(words, tokens, strict=True) if not ids]
    notice = _notice(len(words) + sum(map(len, dropped.values())) - len(dropped["without a token"]), dropped)
    if notice is not None and not words:
        return Text(None, f"{notice}, so that the text counts as not known.")
    pairs = [*zip(words, tokens, strict=True), *((word, []) for word in alignment.between if speaks(word))]
    pairs.sort(key=lambda pair: pair[0].start)
    row = text_stream([word for word, _ in pairs], [ids for _, ids in pairs], num_frames, frame_rate)
    return Text(row, notice and f"{notice}.")


def _notice(total: int, dropped: dict[str, list[Word]]) -> str | None:
    parts = [f"{len(words)} {reason} (such as {words[0].text[:30]!r})" for reason, words in dropped.items() if words]
    count = sum(map(len, dropped.values()))
    return f"{count} of {total} words dropped, {', '.join(parts)}" if count else None


def text_stream(
    words: Sequence[Word], tokens: Sequence[Sequence[int]], num_frames: int, frame_rate: float
) -> np.ndarray:
    """Returns the text row of a stream: int32 [num_frames], one token a frame.

    As in moshi-finetune with its defaults: frame t takes the words that start before its end, (t + 1) / frame_rate
    seconds; a new word replaces the tokens that the one before has not placed yet; a word's tokens follow one a frame,
    all other frames hold PAD, and a PAD right before a word's first token becomes EPAD.

    A word without tokens makes its frames, to its end or to the next word, -1. So is a PAD right before them, which
    would be EPAD if the word were known. The words are ordered by start.
    """
    row = np.full(num_frames, PAD, np.int32)
    pending: list[int] = []
    unknown = 0.0  # a word without tokens is spoken in frames below this
    upcoming = 0
    for t in range(num_frames):
        while upcoming < len(words) and words[upcoming].start * frame_rate < t + 1:
            pending = list(tokens[upcoming])
            unknown = 0.0 if pending else words[upcoming].end * frame_rate
            upcoming += 1
        if not pending and t >= unknown:
            continue
        if t > 0 and row[t - 1] == PAD:
            row[t - 1] = EPAD if pending else ABSENT
        row[t] = pending.pop(0) if pending else ABSENT
    return row
