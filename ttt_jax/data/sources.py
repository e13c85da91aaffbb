"""Which recordings a source of audio holds, and which of them make one stream.

A source is an audio file, a folder, a manifest of moshi-finetune, or the tree of a data set:

    folder            all audio below it
    manifest          JSONL of `ttt_jax.data.manifest`
    librilight        speaker/book/chapter.flac, beside each a JSON with `book_meta` (no alignment)
    librispeech-long  split/speaker/chapter/recording.flac, transcripts beside them (not used: they carry no times)

Order is that of the manifest, else the natural order of paths: chapter_2 comes before chapter_10. What is hidden (a name
that begins with a dot) is not looked at.

Links are followed and keep their own names: speaker, book and chapter are the folders of the path by which a recording is
reached, whatever its content is called elsewhere, as in trees of git-annex and in Hugging Face's cache. Two links to one
content are two recordings. A folder that several paths reach comes once, by a path without links where there is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from ttt_jax.data.alignments import Kind, read_beside
from ttt_jax.data.audio import formats
from ttt_jax.data.manifest import Absent, Entry, is_manifest, read_manifest
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import absolute, beside, local, missing, place, portable

Layout = Literal["auto", "folder", "manifest", "librilight", "librispeech-long"]
_FEW = 3  # problems of a kind that are told one by one
_JUDGED = 100  # files of a folder by which a layout is judged; bounds what is read of a large one


class Recording(NamedTuple):
    """One audio file of a source."""

    path: Path
    """As it was given."""
    group: str
    """Of the recordings that belong to one stream: a book, a speaker, a folder or a speaker in a folder; for people."""
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
    gap: Path | None = None
    """A recording of it that is left out, so that the stream has to be."""


class Found(NamedTuple):
    """What sources hold."""

    recordings: list[Recording]
    """In the order of the sources; at least one."""
    problems: list[str]
    """Sentences on what is left out, the rest being sound."""
    skipped: int
    """How many recordings and books without any they are about."""
    gaps: dict[str, Path]
    """By `Recording.group_key` the first recording that is left out of the group."""


def find(sources: Sequence[str | Path], layout: str = "auto") -> Found:
    """Return the recordings of all sources in their order, and what is left out; what is named twice comes once.

    Args:
        sources: files and folders.
        layout: one of `LAYOUTS`, for all of them; "auto" looks at each.

    Raises:
        InputError: a source is not there, is not of the layout, holds no audio, or has a mistake in its manifest; or all
            that they hold is left out.
    """
    found: dict[Path, Recording] = {}
    problems: dict[Path, _Problem] = {}
    for source in sources:
        for recording in _find(local(source), layout, problems):
            found.setdefault(place(recording.path), recording)
    if not found:
        first, count = next(iter(problems.values())).sentence, len(problems)
        raise InputError(
            first if count == 1 else f"none of {count:,} recordings or books can be used, for one: {first}"
        )
    gaps: dict[str, Path] = {}
    for path, problem in problems.items():
        if problem.group_key is not None:
            gaps.setdefault(problem.group_key, path)
    return Found(list(found.values()), _told(problems.values()), len(problems), gaps)


class _Problem(NamedTuple):
    """Something that is left out."""

    sentence: str
    like: str
    """What it has in common with others of which it can stand for all."""
    group_key: str | None
    """Of the stream that it would be part of if it could be used; None: of none."""


def _told(problems: Iterable[_Problem]) -> list[str]:
    """A sentence for each kind of problem, or for each problem of a kind that has few."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.like, []).append(problem.sentence)
    told = []
    for like, sentences in kinds.items():
        if len(sentences) <= _FEW:
            told += sentences
        else:
            told.append(f"{sentences[0].removesuffix('.')}; the same holds for {len(sentences) - 1:,} more {like}.")
    return told


def streams(found: Found, join: bool) -> list[Stream]:
    """Return the streams that recordings become: each by itself, or (`join`) one for each group in order of appearance."""
    if not join:
        return [Stream(name_of(r), r.group, r.speaker, (r,)) for r in found.recordings]
    groups: dict[str, list[Recording]] = {}
    for recording in found.recordings:
        groups.setdefault(recording.group_key, []).append(recording)
    return [_joined(key, members, found.gaps.get(key)) for key, members in groups.items()]


def name_of(recording: Recording) -> str:
    """The relative path of a recording's own code file, without its ending: the same whichever source names it."""
    path = absolute(recording.path)
    return _name((*path.parts[1:][-3:-1], path.stem), str(place(path)))


def _name(parts: Iterable[str], key: str) -> str:
    """`parts` in safe characters, at most 60 of each; the digest of `key` tells apart what would look the same."""
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).lstrip(".")[:60] or "_" for part in parts]
    return f"{'/'.join(safe)}-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _joined(key: str, members: list[Recording], gap: Path | None) -> Stream:
    # A chapter that was named by itself does not tell its speaker, the tree that it is part of does.
    group, speaker = members[0].group, next((member.speaker for member in members if member.speaker is not None), None)
    return Stream(_name(Path(group).parts, key), group, speaker, tuple(members), gap)


def _find(source: Path, layout: str, problems: dict[Path, _Problem]) -> list[Recording]:
    """The recordings of a source; what is left out comes to `problems`, by its place."""
    if not os.path.exists(source):
        if os.path.islink(source):
            raise InputError(f"{source} {': '.join(missing(source))}.")
        raise InputError(f"{source} does not exist: give an audio file, a folder of audio or a manifest (.jsonl).")
    if layout == "manifest" or (layout == "auto" and source.is_file() and is_manifest(source)):
        return _of_manifest(source, problems)
    if layout != "auto" and not source.is_dir():
        raise InputError(
            f"{source} is a file, but layout {layout} is one of folders: give a folder or leave --layout out."
        )
    if not source.is_dir():
        return [_in_folder(source)]
    folders = list(_walk(source))
    files = sorted((path for folder in folders for path in folder.files), key=lambda p: _natural(p.relative_to(source)))
    sounds = [path for path in files if formats.is_read(path)]
    if layout == "auto":
        layout = _layout(sounds)
    make = {"librilight": _in_librilight, "librispeech-long": _in_speech_long}.get(layout, _in_folder)
    left = {path: sentence for path in files if (sentence := _unusable(path)) is not None}
    recordings = [make(path) for path in sounds if path not in left]
    for one in recordings:
        if one.alignment is not None and (problem := missing(one.alignment)) is not None:
            left[one.path] = f"{one.path} has {one.alignment.name} beside it, which {': '.join(problem)}."
    read = {path.with_suffix("") for path in sounds}
    for path, sentence in left.items():
        # No stream lacks what may be a link to a folder, or what was converted: the same name is read beside it.
        is_gap = path.suffix and (formats.is_read(path) or path.with_suffix("") not in read)
        like = f"{path.suffix.lower()} files below {source}" if path.suffix else f"links below {source}"
        problems[place(path)] = _Problem(sentence, like, make(path).group_key if is_gap else None)
    books = [one.path for one in folders if one.is_empty and layout == "librilight"]
    problems |= {place(absolute(book)): _no_chapters(book, source) for book in books}
    if not files and not books:
        raise InputError(f"{source} holds no audio ({', '.join(formats.READ)}): give a folder with recordings.")
    return [recording for recording in recordings if recording.path not in left]


def _layout(paths: Iterable[Path]) -> str:
    """The layout of a folder that holds the audio `paths`, that of the first flac that tells one: of some, a JSON may be missing."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        if path.suffix.lower() == ".flac":
            folders.setdefault(path.parent, []).append(path)
    for folder, found in folders.items():
        if any(_is_book(path.with_suffix(".json")) for path in found[:_JUDGED]):
            return "librilight"
        chapter = absolute(folder)
        if chapter.name.isdigit() and chapter.parent.name.isdigit() and any(folder.glob("*.txt")):
            return "librispeech-long"
    return "folder"


def _is_book(path: Path) -> bool:
    try:
        return read_beside(path)[0] is Kind.BOOK
    except InputError:  # there is none, or it is damaged, which is told where its words are read
        return False


def _of_manifest(manifest: Path, problems: dict[Path, _Problem]) -> list[Recording]:
    entries, absent = read_manifest(manifest)

    def key(one: Entry | Absent) -> str:
        speaker = "" if one.speaker is None else f" {json.dumps(one.speaker)}"  # which has any character as ASCII
        return f"{place(absolute(manifest))} {os.path.realpath(one.path.parent)}{speaker}"

    problems |= {place(one.path): _Problem(one.reason, f"lines of {manifest}", key(one)) for one in absent}
    return [
        Recording(
            entry.path,
            "/".join([_group(entry.path.parent, 1), *([] if entry.speaker is None else [entry.speaker])]),
            key(entry),
            entry.speaker,
            entry.alignment,
            entry.duration,
        )
        for entry in entries
    ]


def _in_librilight(path: Path) -> Recording:
    group = _group(path.parent, 2)
    return Recording(path, group, os.path.realpath(path.parent), Path(group).parts[0], None, None)


def _in_speech_long(path: Path) -> Recording:
    speaker = absolute(path).parent.parent
    return Recording(path, _group(speaker, 2), os.path.realpath(speaker), portable(speaker.name), None, None)


def _in_folder(path: Path) -> Recording:
    return Recording(path, _group(path.parent, 1), os.path.realpath(path.parent), None, beside(path, ".json"), None)


def _group(folder: Path, depth: int) -> str:
    return portable("/".join(absolute(folder).parts[1:][-depth:])) or "root"


def _no_chapters(folder: Path, root: Path) -> _Problem:
    sentence = (
        f"{folder} is a book without chapters (it holds no audio): complete the download, remove the folder or"
        " give --layout folder."
    )
    return _Problem(sentence, f"folders below {root}", None)


def _unusable(path: Path) -> str | None:
    """A sentence on what sounds, or may be a link to a folder of such, and cannot be used; None if it can."""
    if formats.is_other(path):
        return f"{path} is in a format that is not read: {formats.advice(path)}."
    problem = missing(path)
    return None if problem is None else f"{path} {': '.join(problem)}."


def _is_annexed(link: Path) -> bool:
    """Whether a link is one of git-annex to a file's content, so not to a folder."""
    return {"annex", "objects"} <= set(Path(os.readlink(link)).parts)


class _Folder(NamedTuple):
    """A folder of a tree."""

    path: Path
    files: list[Path]
    """Those in it that sound, and links to nothing that may be to folders."""
    is_empty: bool
    """Whether it holds neither such files nor folders."""


def _walk(root: Path) -> Iterator[_Folder]:
    """Yield each folder at and below `root`; what is hidden is left out.

    Links to folders are followed after all others, those to folders that were reached before or hold `root` are not.
    """
    seen = {_node(folder) for folder in (*Path(os.path.realpath(root)).parents, *absolute(root).parents)}
    starts = [root]
    while starts:
        links = []
        for start in starts:
            for folder, subfolders, names in os.walk(start, onerror=_refuse):
                if (node := _node(folder)) in seen:
                    subfolders.clear()
                    continue
                seen.add(node)
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
                files = [Path(folder, name) for name in names if not name.startswith(".")]
                files = [path for path in files if _sounds(path)]
                yield _Folder(Path(folder), files, not files and not subfolders)
        starts = sorted(links, key=_natural)


def _sounds(path: Path) -> bool:
    """Whether a file is sound by its name, or a link to nothing that may be to a folder of such."""
    if formats.is_read(path) or formats.is_other(path):
        return True
    return not path.suffix and path.is_symlink() and not path.exists() and not _is_annexed(path)


def _node(folder: str | Path) -> tuple[int, int]:
    """What tells a folder from all others, by whichever path it is reached."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): give a folder that can.") from None


def _natural(path: Path) -> tuple[tuple[tuple[str | int, ...], str], ...]:
    """A key by which paths sort part by part, numbers in them as numbers, in whichever Unicode form a system wrote them."""
    return tuple((_numbers(unicodedata.normalize("NFC", portable(part))), part) for part in path.parts)


def _numbers(text: str) -> tuple[str | int, ...]:
    pieces = re.split(r"([0-9]+)", text.casefold())
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))
