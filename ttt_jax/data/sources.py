"""The recordings of a source of audio, and the streams that they make.

docs/data/prepare.md describes sources and layouts, the order of recordings, links, and what is left out.
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
_FEW = 3  # most problems of a kind that are listed one by one
_JUDGED = 100  # files of a folder that decide its layout; bounds the reading of a large one


class Recording(NamedTuple):
    """One audio file of a source."""

    path: Path  # as given by the user
    group: str  # name of a book, speaker, folder, or speaker in a folder; joining makes one stream of a group
    group_key: str  # unique among all sources
    speaker: str | None = None  # None if the layout does not state it
    alignment: Path | None = None  # the JSON beside the audio; None if the layout has no alignments
    duration: float | None = None  # seconds that a manifest states


class Stream(NamedTuple):
    """Recordings that become one code file, one behind the other."""

    name: str  # relative path of the code file, without ending: unique, of safe characters, the same in every run
    group: str
    speaker: str | None
    recordings: tuple[Recording, ...]
    gap: Path | None = None  # a recording of the stream that is left out; then the stream is left out too


class Contents(NamedTuple):
    """The recordings of some sources."""

    recordings: list[Recording]  # in the order of the sources; at least one
    problems: list[str]  # sentences on the recordings that are left out
    skipped: int  # number of recordings, and of books without any, that are left out
    gaps: dict[str, Path]  # the first recording of a group that is left out, by `Recording.group_key`


def find(sources: Sequence[str | Path], layout: Layout = "auto") -> Contents:
    """Returns the recordings of all sources, each once, and the problems of those left out. Raises `InputError`."""
    recordings: dict[Path, Recording] = {}
    problems: dict[Path, _Problem] = {}
    for source in sources:
        for recording in _find(local(source), layout, problems):
            recordings.setdefault(place(recording.path), recording)
    if not recordings:
        first, count = next(iter(problems.values())).sentence, len(problems)
        raise InputError(
            first if count == 1 else f"none of {count:,} recordings or books can be used, for one: {first}"
        )
    gaps: dict[str, Path] = {}
    for path, problem in problems.items():
        if problem.group_key is not None:
            gaps.setdefault(problem.group_key, path)
    return Contents(list(recordings.values()), _sentences(problems.values()), len(problems), gaps)


class _Problem(NamedTuple):
    """A file or folder that is left out."""

    sentence: str
    kind: str  # plural noun for problems that one sentence can stand for
    group_key: str | None = None  # of the stream that lacks this recording


def _sentences(problems: Iterable[_Problem]) -> list[str]:
    """Returns a sentence for each kind of problem, or for each problem of a kind that has few."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem.sentence)
    lines = []
    for kind, sentences in kinds.items():
        if len(sentences) <= _FEW:
            lines += sentences
        else:
            lines.append(f"{sentences[0].removesuffix('.')}; the same holds for {len(sentences) - 1:,} more {kind}.")
    return lines


def streams(contents: Contents, join: bool) -> list[Stream]:
    """Returns a stream for each recording, or with `join` one for each group in order of appearance."""
    if not join:
        return [Stream(name_of(r), r.group, r.speaker, (r,)) for r in contents.recordings]
    groups: dict[str, list[Recording]] = {}
    for recording in contents.recordings:
        groups.setdefault(recording.group_key, []).append(recording)
    joined = []
    for key, members in groups.items():
        group = members[0].group
        # A chapter given by itself has no speaker; in its tree it has one.
        speaker = next((member.speaker for member in members if member.speaker is not None), None)
        joined.append(Stream(_name(Path(group).parts, key), group, speaker, tuple(members), contents.gaps.get(key)))
    return joined


def name_of(recording: Recording) -> str:
    """Returns the relative path of a recording's code file, without ending: the same whichever source names it."""
    path = absolute(recording.path)
    return _name((*path.parts[1:][-3:-1], path.stem), str(place(path)))


def _name(parts: Iterable[str], key: str) -> str:
    """Returns `parts` in safe characters, at most 60 of each; the digest of `key` makes the name unique."""
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).lstrip(".")[:60] or "_" for part in parts]
    return f"{'/'.join(safe)}-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _find(source: Path, layout: str, problems: dict[Path, _Problem]) -> list[Recording]:
    """Returns the recordings of a source; adds those that are left out to `problems`, by `place`."""
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
    for path, alignment in ((recording.path, recording.alignment) for recording in recordings):
        if alignment is not None and (problem := missing(alignment)) is not None:
            left[path] = f"{path} has {alignment.name} beside it, which {': '.join(problem)}."
    read = {path.with_suffix("") for path in sounds}
    for path, sentence in left.items():
        # No gap in a stream: a possible link to a folder, and a file with a converted copy (the same stem) beside it.
        is_gap = path.suffix and (formats.is_read(path) or path.with_suffix("") not in read)
        kind = f"{path.suffix.lower()} files below {source}" if path.suffix else f"links below {source}"
        problems[place(path)] = _Problem(sentence, kind, make(path).group_key if is_gap else None)
    books = [folder.path for folder in folders if folder.is_empty and layout == "librilight"]
    for book in books:
        problems[place(absolute(book))] = _Problem(
            f"{book} is a book without chapters (it holds no audio): complete the download, remove the folder or give"
            " --layout folder.",
            f"folders below {source}",
        )
    if not files and not books:
        raise InputError(f"{source} holds no audio ({', '.join(formats.READ)}): give a folder with recordings.")
    return [recording for recording in recordings if recording.path not in left]


def _layout(paths: Iterable[Path]) -> str:
    """Returns the layout of a folder with the audio `paths`: that of the first flac that shows one."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        if path.suffix.lower() == ".flac":
            folders.setdefault(path.parent, []).append(path)
    for folder, flacs in folders.items():
        if any(_is_book(path.with_suffix(".json")) for path in flacs[:_JUDGED]):
            return "librilight"
        chapter = absolute(folder)
        if chapter.name.isdigit() and chapter.parent.name.isdigit() and any(folder.glob("*.txt")):
            return "librispeech-long"
    return "folder"


def _is_book(path: Path) -> bool:
    try:
        return read_beside(path)[0] is Kind.BOOK
    except InputError:  # it is missing or damaged
        return False


def _of_manifest(manifest: Path, problems: dict[Path, _Problem]) -> list[Recording]:
    entries, absent = read_manifest(manifest)

    def key(line: Entry | Absent) -> str:
        speaker = "" if line.speaker is None else f" {json.dumps(line.speaker)}"  # in ASCII
        return f"{place(absolute(manifest))} {os.path.realpath(line.path.parent)}{speaker}"

    problems |= {place(line.path): _Problem(line.reason, f"lines of {manifest}", key(line)) for line in absent}
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
    return Recording(path, group, os.path.realpath(path.parent), Path(group).parts[0])


def _in_speech_long(path: Path) -> Recording:
    speaker = absolute(path).parent.parent
    return Recording(path, _group(speaker, 2), os.path.realpath(speaker), portable(speaker.name))


def _in_folder(path: Path) -> Recording:
    return Recording(path, _group(path.parent, 1), os.path.realpath(path.parent), alignment=beside(path, ".json"))


def _group(folder: Path, depth: int) -> str:
    return portable("/".join(absolute(folder).parts[1:][-depth:])) or "root"


def _unusable(path: Path) -> str | None:
    """Returns a sentence on a file, or possible link to a folder of audio, that cannot be used; None if it can."""
    if formats.is_other(path):
        return f"{path} is in a format that is not read: {formats.advice(path)}."
    problem = missing(path)
    return None if problem is None else f"{path} {': '.join(problem)}."


class _Folder(NamedTuple):
    """A folder of a tree."""

    path: Path
    files: list[Path]  # audio, and broken links that may lead to folders of audio
    is_empty: bool  # whether it holds neither such files nor folders


def _walk(root: Path) -> Iterator[_Folder]:
    """Yields each folder at and below `root` that is not hidden.

    Links to folders are followed last, unless the folder was reached before or holds `root`.
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
    """Returns whether a file is audio by its name, or a broken link that may lead to a folder of audio."""
    if formats.is_read(path) or formats.is_other(path):
        return True
    if path.suffix or not path.is_symlink() or path.exists():
        return False
    return not {"annex", "objects"} <= set(Path(os.readlink(path)).parts)  # git-annex links to files only


def _node(folder: str | Path) -> tuple[int, int]:
    """Returns a folder's identity, the same by whichever path it is reached."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): give a folder that can.") from None


def _natural(path: Path) -> list[tuple[list[str | int], str]]:
    """Returns a key that sorts paths part by part, numbers in them as numbers, in any Unicode form."""
    key = []
    for part in path.parts:
        pieces = re.split(r"([0-9]+)", unicodedata.normalize("NFC", portable(part)).casefold())
        key.append(([int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], part))
    return key
