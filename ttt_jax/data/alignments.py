"""The JSON beside a recording: its kind, and the words that lie in the audio. docs/data/manifest.md has the rules."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.data.manifest import TOLERANCE
from ttt_jax.errors import InputError

MAIN_SPEAKER, OTHER_SPEAKER = "SPEAKER_MAIN", "SPEAKER_OTHER"
"""Labels of Moshi's and of the user's stream."""


class Kind(enum.Enum):
    """Kinds of JSON beside a recording."""

    ALIGNMENTS = "alignments"
    BOOK = "LibriLight's book data"
    OTHER_WORDS = "words in another form"
    METADATA = "metadata"


@dataclass(frozen=True)
class Word:
    """A spoken word: text, start and end in seconds (NaN if missing), label of the speaker (None if missing)."""

    text: str
    start: float
    end: float
    speaker: str | None


class Alignment(NamedTuple):
    """The words of a recording."""

    words: tuple[Word, ...] | None  # that lie in the audio, ordered by start; None if the text is not known
    dropped: dict[str, list[Word]]  # the other words by their fault, in the file's order
    notice: str | None = None  # warning to log behind the file's path: why its words are not used
    between: tuple[Word, ...] = ()
    """Spans in which words without times were spoken, each as its first word. A span reaches from the end of the word
    before (or the beginning of the audio) to the start of the word behind (or the end), both of the same speaker."""


def read_beside(path: str | Path) -> tuple[Kind, Any]:
    """Returns the kind of the JSON beside a recording, and its content.

    Whisper's output ("segments", "words") and a bare list of rows hold words in a form that is not read. Any other JSON
    without the key "alignments" is metadata. Raises `InputError` if the file cannot be read or is not JSON.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): bring it back or remove it.") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, encoding, or number of too many digits
        raise InputError(f"{path} is not JSON ({error}): write the alignments again or remove it.") from None
    if isinstance(content, dict):
        if "alignments" in content:
            return Kind.ALIGNMENTS, content
        if "book_meta" in content:
            return Kind.BOOK, content
        if any(isinstance(content.get(key), list) for key in ("segments", "words", "word_segments", "alignment")):
            return Kind.OTHER_WORDS, content
    elif isinstance(content, list) and content and isinstance(content[0], list):
        return Kind.OTHER_WORDS, content
    return Kind.METADATA, content


def read_alignments(path: str | Path, seconds: float) -> Alignment:
    """Returns the words in the JSON beside a recording of so many seconds.

    docs/data/manifest.md lists the words that are dropped, and when the text is not known. Raises `InputError` as
    `read_beside`, for another structure, or if more than half of the words with times lie outside the audio or end
    before they begin.
    """
    path = Path(path)
    kind, content = read_beside(path)
    if kind is Kind.OTHER_WORDS:
        expected = '{"alignments": [[word, [start, end], speaker], ...]}'
        return Alignment(
            None, {}, f"holds words that are not read: write them as {expected}, or the text is not known."
        )
    if kind is not Kind.ALIGNMENTS:
        return Alignment(None, {})
    rows = content["alignments"]
    if not isinstance(rows, list):
        raise InputError(
            f'{path} has {_short(rows)} under "alignments", expected a list [[word, [start, end], speaker], ...]:'
            " write the alignments again or remove the file."
        )
    words = [word for index, row in enumerate(rows) if (word := _parse_word(path, index, row)).text]
    placed: list[Word] = []
    dropped: dict[str, list[Word]] = {}
    for word in words:
        wrong = _misplaced(word, seconds)
        (placed if wrong is None else dropped.setdefault(wrong, [])).append(word)
    _check_times(path, seconds, len(words) - len(dropped.get(_NO_TIMES, [])), dropped)
    labels = {word.speaker for word in words}
    if labels and MAIN_SPEAKER not in labels and labels != {OTHER_SPEAKER}:
        return Alignment(None, {}, _no_main_speaker(words))
    return Alignment(tuple(sorted(placed, key=lambda word: word.start)), dropped, between=_between(words, seconds))


_NO_TIMES, _NO_DURATION = "without times", "without duration"
_OUTSIDE, _REVERSED = "outside the audio", "with the end before the start"


def _misplaced(word: Word, seconds: float) -> str | None:
    """Returns the fault of a word's times, or None."""
    if math.isnan(word.start) or math.isnan(word.end):
        return _NO_TIMES
    if min(word.start, word.end) < 0 or max(word.start, word.end) > seconds + TOLERANCE:
        return _OUTSIDE
    if word.end < word.start:
        return _REVERSED
    return _NO_DURATION if word.end == word.start else None


def _between(words: Sequence[Word], seconds: float) -> tuple[Word, ...]:
    """Returns `Alignment.between`."""
    spans = []
    for speaker in dict.fromkeys(word.speaker for word in words):
        lost, end = None, 0.0
        for word in [*(word for word in words if word.speaker == speaker), Word("", seconds, math.inf, speaker)]:
            wrong = None if word.text == "" else _misplaced(word, seconds)
            if wrong == _NO_TIMES:
                lost = lost or word
            elif wrong is None:
                if lost is not None and end < word.start:
                    spans.append(Word(lost.text, end, word.start, speaker))
                lost, end = None, word.end
    return tuple(spans)


def _check_times(path: Path, seconds: float, timed: int, dropped: dict[str, list[Word]]) -> None:
    wrong = [*dropped.get(_OUTSIDE, []), *dropped.get(_REVERSED, [])]
    if 2 * len(wrong) > timed:
        first = wrong[0]
        raise InputError(
            f"{path} does not match its audio of {seconds:.2f} s: {len(wrong)} of {timed} words lie outside it or end"
            f" before they start (such as {_short(first.text)} from {first.start:g} to {first.end:g}), so align the"
            " recording again, [start, end] in seconds, or remove the file."
        )


def _no_main_speaker(words: Sequence[Word]) -> str:
    labels = list(dict.fromkeys("no label" if word.speaker is None else repr(word.speaker[:30]) for word in words))
    named = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    return (
        f"of {len(words)} words none is of {MAIN_SPEAKER} (but of {named}), so that the text counts as not known: give"
        f" the words of Moshi's stream the label {MAIN_SPEAKER} and all others {OTHER_SPEAKER}."
    )


def _parse_word(path: Path, index: int, row: object) -> Word:
    if isinstance(row, list) and len(row) == 3:
        text, times, speaker = row
        times = [None, None] if times is None or times == [] else times
        if (
            isinstance(text, str)
            and isinstance(times, list)
            and len(times) == 2
            and all(type(time) in (float, int, type(None)) for time in times)
            and type(speaker) in (str, int, type(None))
        ):
            return Word(_plain(text), *map(_seconds, times), None if speaker is None else _plain(str(speaker)))
    raise InputError(
        f"{path}, alignments[{index}] is {_short(row)}, expected [word, [start, end], speaker]: write the alignments"
        " again or remove the file."
    )


def _plain(text: str) -> str:
    """Returns the text without blanks around it and without lone surrogates, which JSON may hold."""
    return text.encode("utf-8", "ignore").decode().strip()


def _seconds(value: float | None) -> float:
    try:
        return math.nan if value is None or not math.isfinite(value) else float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
