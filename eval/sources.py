"""Which recordings a source of audio holds, and which of them make one stream.

A source is an audio file, a folder, a manifest of moshi-finetune, or the tree of a data set:

    folder            all audio below it
    manifest          JSONL of `ttt_jax.data.manifest`
    librilight        speaker/book/chapter.flac, beside each a JSON with `book_meta` (no alignment)
    librispeech-long  split/speaker/chapter/recording.flac, transcripts beside them (not used: they carry no times)

Order is that of the manifest, else the natural order of paths: chapter_2 comes before chapter_10. What is hidden (a name
that begins with a dot) is not looked at, and links to folders are not followed, except the source itself.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from ttt_jax.data.alignments import Kind, read_beside
from ttt_jax.data.manifest import read_manifest
from ttt_jax.errors import InputError

LAYOUTS = ("auto", "folder", "manifest", "librilight", "librispeech-long")
_AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")


class Recording(NamedTuple):
    """One audio file of a source."""

    path: Path
    """As it was given."""
    group: str
    """Of the recordings that belong to one stream: a book, a speaker or a folder; for people."""
    group_key: str
    """The same, unique among all sources."""
    speaker: str | None
    """Where the layout tells it."""
    alignment: Path | None
    """The JSON beside the audio; None if there is none or the layout says that it holds none."""
    duration: float | None
    """Seconds that a manifest states."""


class Stream(NamedTuple):
    """Recordings that become one code file, one behind the other."""

    name: str
    """Relative path of the code file, without its ending: unique, of safe characters, the same in every run."""
    group: str
    speaker: str | None
    recordings: tuple[Recording, ...]


class Found(NamedTuple):
    """What sources hold."""

    recordings: list[Recording]
    """In the order of the sources; at least one."""
    problems: list[str]
    """A sentence for each part of a tree that holds nothing to use, the rest being sound."""


def find(sources: Sequence[str | Path], layout: str = "auto") -> Found:
    """Return the recordings of all sources in their order, and what is wrong beside them; what is named twice comes once.

    Args:
        sources: files and folders.
        layout: one of `LAYOUTS`, for all of them; "auto" looks at each.

    Raises:
        InputError: a source is not there, is not of the layout, holds no audio, or has a mistake in its manifest; or there
            are problems and no recordings.
    """
    found: dict[Path, Recording] = {}
    problems: dict[Path, str] = {}
    for source in sources:
        for recording in _find(Path(source).expanduser(), layout, problems):
            found.setdefault(recording.path.resolve(), recording)
    told = list(problems.values())
    if not found and told:
        raise InputError(told[0] if len(told) == 1 else f"none of {len(told)} books can be used, for one: {told[0]}")
    return Found(list(found.values()), told)


def streams(recordings: Sequence[Recording], join: bool) -> list[Stream]:
    """Return the streams that recordings become: each by itself, or (`join`) one for each group in order of appearance."""
    if not join:
        return [Stream(name_of(r), r.group, r.speaker, (r,)) for r in recordings]
    groups: dict[str, list[Recording]] = {}
    for recording in recordings:
        groups.setdefault(recording.group_key, []).append(recording)
    return [_joined(key, members) for key, members in groups.items()]


def name_of(recording: Recording) -> str:
    """The relative path of a recording's own code file, without its ending: the same whichever source names it."""
    path = recording.path.resolve()
    return _name((*path.parts[1:][-3:-1], path.stem), str(path))


def _name(parts: Iterable[str], key: str) -> str:
    """`parts` in safe characters, at most 60 of each; the digest of `key` tells apart what would look the same."""
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).lstrip(".")[:60] or "_" for part in parts]
    return f"{'/'.join(safe)}-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _joined(key: str, members: list[Recording]) -> Stream:
    group, speakers = members[0].group, {member.speaker for member in members}
    return Stream(_name(Path(group).parts, key), group, speakers.pop() if len(speakers) == 1 else None, tuple(members))


def _find(source: Path, layout: str, problems: dict[Path, str]) -> list[Recording]:
    """The recordings of a source; to `problems` come sentences by the folder they are about."""
    if not source.exists():
        raise InputError(f"{source} does not exist: give an audio file, a folder of audio or a manifest (.jsonl).")
    if layout == "manifest" or (layout == "auto" and source.is_file() and source.suffix == ".jsonl"):
        return _of_manifest(source)
    if layout != "auto" and not source.is_dir():
        raise InputError(
            f"{source} is a file, but layout {layout} is one of folders: give a folder or leave --layout out."
        )
    if source.is_file():
        return [_in_folder(source)]
    if layout == "auto":
        layout = _layout(source)
    if layout == "librilight":
        return _of_librilight(source, problems)
    recordings = [_in_speech_long(p) if layout == "librispeech-long" else _in_folder(p) for p in _audio(source)]
    if not recordings:
        raise InputError(f"{source} holds no audio ({', '.join(_AUDIO)}): give a folder with recordings.")
    return recordings


def _layout(folder: Path) -> str:
    """The layout of a folder, judged by its first flac."""
    path = next((p for p in _audio(folder) if p.suffix.lower() == ".flac"), None)
    if path is None:
        return "folder"
    if _is_book(path.with_suffix(".json")):
        return "librilight"
    chapter, speaker = path.resolve().parts[-2:-4:-1]
    if chapter.isdigit() and speaker.isdigit() and any(path.parent.glob("*.txt")):
        return "librispeech-long"
    return "folder"


def _is_book(path: Path) -> bool:
    try:
        return read_beside(path)[0] is Kind.BOOK
    except InputError:  # there is none, or it is damaged, which is told where its words are read
        return False


def _of_manifest(manifest: Path) -> list[Recording]:
    return [
        Recording(
            entry.path,
            _group(entry.path.parent, 1),
            f"{manifest.resolve()} {entry.path.parent.resolve()}",
            entry.speaker,
            entry.alignment,
            entry.duration,
        )
        for entry in read_manifest(manifest)
    ]


def _of_librilight(root: Path, problems: dict[Path, str]) -> list[Recording]:
    recordings = []
    for folder, subfolders, files in _walk(root):
        chapters = [folder / name for name in files if name.lower().endswith(".flac")]
        if not chapters and not subfolders:
            problems[folder.resolve()] = (
                f"{folder} is a book without chapters (it holds no flac): complete the download, remove the folder or"
                " give --layout folder."
            )
        group = _group(folder, 2)
        speaker = Path(group).parts[0]
        recordings += [Recording(p, group, str(folder.resolve()), speaker, None, None) for p in chapters]
    return sorted(recordings, key=lambda r: _natural(r.path.relative_to(root)))


def _in_speech_long(path: Path) -> Recording:
    speaker = path.resolve().parent.parent
    return Recording(path, _group(speaker, 2), str(speaker), speaker.name, None, None)


def _in_folder(path: Path) -> Recording:
    beside = path.with_suffix(".json")
    alignment = beside if beside.is_file() else None
    return Recording(path, _group(path.parent, 1), str(path.parent.resolve()), None, alignment, None)


def _group(folder: Path, depth: int) -> str:
    return "/".join(folder.resolve().parts[1:][-depth:]) or "root"


def _audio(root: Path) -> list[Path]:
    paths = [folder / name for folder, _, files in _walk(root) for name in files if Path(name).suffix.lower() in _AUDIO]
    return sorted(paths, key=lambda path: _natural(path.relative_to(root)))


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder with the names of its subfolders and files, hidden ones left out."""
    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), subfolders, [name for name in files if not name.startswith(".")]


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): give a folder that can.") from None


def _natural(path: Path) -> tuple[tuple[tuple[str | int, ...], str], ...]:
    """A key by which paths sort part by part, numbers in them as numbers."""
    return tuple((_numbers(part), part) for part in path.parts)


def _numbers(text: str) -> tuple[str | int, ...]:
    pieces = re.split(r"([0-9]+)", text.casefold())
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))
