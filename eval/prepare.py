"""`python -m eval prepare`: any audio to code files and their manifest. Loads no jax, but for a Mimi.

The work is done in `ttt_jax.data.prepare`; here are options, progress bar and summary.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ttt_jax.data.manifest import MANIFEST
from ttt_jax.data.sources import Layout, Recording, Stream, find, streams
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, keep_compiled
from ttt_jax.utils.paths import local, printable

if TYPE_CHECKING:
    import numpy as np

    from ttt_jax.data.prepare import PreparedFolder


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn recordings into code files and their manifest.

    Interrupted? Run the same again: what is encoded stays. Exit code: 0 all is encoded; 2 nothing is, an input is to be
    mended; 3 some recordings were unusable, were named and left out; 130 interrupted. See docs/data.md.
    """

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE [SOURCE ...]")]
    """Audio files, folders of audio, or manifests (JSON Lines, as moshi-finetune)."""
    out: Annotated[str, arg(metavar="FOLDER")]
    """Folder for codes and manifest.jsonl; may hold earlier ones."""
    codec: str = "kmeans"
    """kmeans (the embedded one), a codec file, or converted weights with their Mimi; mimi:PATH takes a Mimi alone."""
    tokenizer: Annotated[str | None, arg(metavar="FILE")] = None
    """SentencePiece model for alignments; unset: that of the weights which --codec names, else the embedded one."""
    voice: Literal["moshi", "user"] = "moshi"
    """Stream of the left or only channel."""
    join: bool = False
    """Make one stream of each book, speaker or folder."""
    layout: Layout = "auto"
    """Layout of the sources; auto: seen from their files."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("there is no source: give audio files, folders of audio or manifests.")


def main(options: Options) -> int:
    """Encodes the sources; returns 0, or `PARTIAL` if some were left out. Raises `InputError` if nothing was made."""
    from ttt_jax.data.corpus import CorpusConfig, load_coders
    from ttt_jax.data.encode import Encoder
    from ttt_jax.data.prepare import PreparedFolder

    contents = find(options.sources, options.layout)
    corpus = CorpusConfig(codec=options.codec, tokenizer=options.tokenizer)
    codec, tokenizer = load_coders(corpus)
    if "jax" in sys.modules:  # which a Mimi has loaded
        keep_compiled(corpus.cache_dir / "compiled")
    folder = PreparedFolder(local(options.out), Encoder(codec, tokenizer, options.voice), options.join)
    failed: dict[str, InputError] = {}
    for problem in contents.problems:
        print(printable(f"skipped: {problem}"), file=sys.stderr)
    todo = streams(contents, options.join)
    progress = _Progress(contents.recordings)
    try:
        for stream in todo:
            try:
                folder.add(stream, lambda blocks: progress.watch(blocks, codec.sample_rate))
            except InputError as error:
                failed[stream.name] = error
                if len(contents.recordings) > 1:
                    progress.print(f"skipped{f' the stream {stream.group}' if options.join else ''}: {error}")
            progress.finish(stream, folder.speed)
    finally:  # an interrupted run leaves a manifest of what it has made
        progress.close()
        dropped = folder.close()
    for name in dropped:
        print(printable(f"left out of {folder.path / MANIFEST}: {name}, which is gone or damaged"), file=sys.stderr)
    if not folder.entries:
        if len(contents.recordings) == 1:
            raise next(iter(failed.values()))
        raise InputError(
            f"none of {len(contents.recordings)} recordings could be encoded, for the reasons above: mend them."
        )
    skipped = contents.skipped + sum(len(stream.recordings) for stream in todo if stream.name in failed)
    _summarise([stream for stream in todo if stream.name not in failed], skipped, folder)
    return PARTIAL if skipped else 0


class _Progress:
    """A bar over the seconds of audio of all recordings, with the speed of encoding."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        from tqdm import tqdm

        self._expected = {recording.path: _expected_seconds(recording.path) for recording in recordings}
        self._finished = self._current = 0.0  # seconds of finished streams, and read of the current one
        self._bar = tqdm(
            total=math.ceil(sum(self._expected.values())),
            desc="encoding",
            mininterval=0.5,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s [{elapsed}<{remaining}{postfix}]",
        )

    def watch(self, blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
        """Yields the blocks, float32 [channels, n], and counts each once it is encoded."""
        for block in blocks:
            yield block
            self._current += block.shape[1] / sample_rate
            self._show()

    def finish(self, stream: Stream, speed: float) -> None:
        """Counts a stream as finished; `speed` is in seconds of audio a second."""
        self._current = 0.0
        self._finished += sum(self._expected.pop(recording.path, 0.0) for recording in stream.recordings)
        if speed:
            self._bar.set_postfix_str(f"{speed:.0f} times real time", refresh=False)
        self._show()

    def print(self, text: str) -> None:
        self._bar.write(printable(text), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _show(self) -> None:
        self._bar.update(min(math.ceil(self._finished + self._current - 1e-6), self._bar.total) - self._bar.n)


def _expected_seconds(path: Path) -> float:
    """Returns the length in a file's header; 0 if it cannot be read, which encoding it will report."""
    import soundfile

    try:
        info = soundfile.info(os.fsencode(path))
    except (OSError, soundfile.SoundFileError):
        return 0.0
    return info.duration if info.frames < 1 << 48 else 0.0  # a streamed flac states no length


def _summarise(done: list[Stream], skipped: int, folder: PreparedFolder) -> None:
    recordings = [recording.path for stream in done for recording in stream.recordings]
    hours = sum(entry["duration"] for entry in folder.entries.values()) / 3600
    before = sum(path in folder.reused for path in recordings)
    speed = f", the others at {folder.speed:.0f} times real time" if folder.encoded else ""
    print(
        f"{_count(len(done), 'code file')} of {_count(len(recordings), 'recording')}, {hours:.2f} hours of audio;"
        f" {before} encoded before{speed}; {_count(skipped, 'recording')} skipped"
    )
    print(f"manifest: {folder.path / MANIFEST}")
    print(f"next: python -m eval stream RUN --data {folder.path}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
