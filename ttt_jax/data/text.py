"""Text tokens: a SentencePiece model and the text row of a stream.

Moshi's ids: EPAD (0) on the frame before a word's first token, PAD (3) where no text is due. A SentencePiece model
trained with unk_id=0, bos_id=1, eos_id=2, pad_id=3 leaves both free. Any other model works too, but where a word's own
tokens fall on 0 or 3 they could not be told from EPAD and PAD, so `Tokenizer.encode` drops them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ttt_jax.data.manifest import MAIN_SPEAKER, Word
from ttt_jax.errors import InputError
from ttt_jax.paths import local

EPAD = 0
PAD = 3


class Tokenizer:
    """A SentencePiece model as words to ids and back; made by `load_tokenizer`.

    Attributes:
        cardinality: number of ids; they run from 0 to cardinality - 1.
        digest: SHA-256 of the model file, hexadecimal.
    """

    def __init__(self, processor, digest: str):
        self._processor = processor
        self.cardinality: int = processor.get_piece_size()
        self.digest = digest
        self._silent = {EPAD, PAD, processor.bos_id(), processor.eos_id()}

    def encode(self, word: str) -> list[int]:
        """Return the ids of one word, without begin or end marks; characters the model does not know give none."""
        return [token for token in self._processor.encode(word.strip()) if token not in (EPAD, PAD)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a row of ids; EPAD, PAD, begin and end marks and absent (negative) ids are skipped."""
        return self._processor.decode([int(i) for i in ids if i >= 0 and int(i) not in self._silent])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in a SentencePiece ``.model`` file.

    Raises:
        InputError: the file is missing, is not a SentencePiece model, or has no room for the four special ids.
    """
    path = local(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a SentencePiece model file.") from None
    import sentencepiece

    try:
        # An empty file is a valid (empty) protobuf message and would only fail at the first word.
        processor = sentencepiece.SentencePieceProcessor(model_proto=content) if content else None
    except RuntimeError:
        processor = None
    if processor is None or processor.get_piece_size() <= PAD:
        raise InputError(
            f"{path} is not a usable SentencePiece model ({len(content)} bytes): give a .model file with more than"
            f" {PAD + 1} pieces."
        )
    return Tokenizer(processor, hashlib.sha256(content).hexdigest())


def text_stream(words: Sequence[Word], num_frames: int, tokenizer: Tokenizer, frame_rate: float) -> np.ndarray:
    """Return the text row of a stream: int32 [num_frames], one token a frame.

    As in moshi-finetune with its defaults: frame t takes the words that start before its end, (t + 1) / frame_rate
    seconds; a new word replaces the tokens that the one before has not placed yet; a word's tokens follow one a frame,
    all other frames hold PAD, and a PAD right before a word's first token becomes EPAD. Only words of `MAIN_SPEAKER`
    are used.

    Args:
        words: ordered by start.
        num_frames: length of the row.
        tokenizer: gives the ids.
        frame_rate: frames per second.

    Raises:
        InputError: the tokenizer knows none of the words (its language or script is another).
    """
    spoken = [word for word in words if word.speaker == MAIN_SPEAKER and word.text]
    tokens = [tokenizer.encode(word.text) for word in spoken]
    if spoken and not any(tokens):
        raise InputError(
            f"the text tokenizer has no token for any of {len(spoken)} words (the first is {spoken[0].text!r}):"
            " give a SentencePiece model fitted to this language."
        )
    row = np.full(num_frames, PAD, np.int32)
    pending: list[int] = []
    upcoming = 0
    for t in range(num_frames):
        while upcoming < len(spoken) and spoken[upcoming].start * frame_rate < t + 1:
            pending = list(tokens[upcoming])
            upcoming += 1
        if pending:
            if t > 0 and row[t - 1] == PAD:
                row[t - 1] = EPAD
            row[t] = pending.pop(0)
    return row
