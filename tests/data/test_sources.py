"""The recordings of a tree: formats, links, manifests, layouts, and what is left out."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.helpers.recordings import lines_of, run
from tests.helpers.trees import found, link, put, reported
from ttt_jax.data import sources
from ttt_jax.errors import InputError
from ttt_jax.utils import command


@pytest.mark.parametrize("ending", [".m4a", ".SPH", ".Caf"])
def test_a_format_that_is_not_read_is_named_and_counted_with_what_converts_it(tmp_path, sounds, capsys, ending):
    put(tmp_path / "in" / "a.wav", sounds[0])
    put(tmp_path / "in" / "sub" / f"my talk{ending}")
    put(tmp_path / "in" / "notes.txt")
    assert run(tmp_path / "in", "--out", tmp_path / "out") == command.PARTIAL
    skipped, out = reported(capsys)
    assert skipped == [
        f"skipped: {tmp_path}/in/sub/my talk{ending} is in a format that is not read: convert it first, for example by"
        f" ffmpeg -i 'my talk{ending}' 'my talk.flac'."
    ]
    assert "1 code file of 1 recording" in out
    assert "; 1 recording skipped" in out


def test_of_thousands_in_a_format_the_first_is_named_and_the_rest_counted(tmp_path):
    for name in ("a.wav", "0.caf", "1.caf", *(f"calls/{index}.m4a" for index in range(1204))):
        put(tmp_path / name)
    some = sources.find([tmp_path / "calls", tmp_path])
    assert some.skipped == 1206  # each once, although two sources hold some
    assert [problem[len(str(tmp_path)) + 1 :][:8] for problem in some.problems] == ["calls/0.", "0.caf is", "1.caf is"]
    assert some.problems[0].endswith(f" 0.flac; the same holds for 1,203 more .m4a files below {tmp_path}.")


def test_a_folder_with_other_formats_only_is_one_error(tmp_path):
    put(tmp_path / "a.m4a")
    with pytest.raises(InputError, match=rf"^{tmp_path}/a\.m4a is in a format that is not read: convert it first"):
        sources.find([tmp_path])
    put(tmp_path / "b.sph")
    message = r"^none of 2 recordings or books can be used, for one: .*a\.m4a is in a format"
    with pytest.raises(InputError, match=message):
        sources.find([tmp_path])


def snapshot(root, contents):
    """A Hugging Face cache: names in snapshots/REV are links to contents in blobs, named by their digests."""
    folder = root / "snapshots" / "0a1b"
    for number, (name, content) in enumerate(contents.items()):
        blob = put(root / "blobs" / f"{number:064x}", content)
        link(folder / name, os.path.relpath(blob, (folder / name).parent))
    return folder


def test_a_cache_of_links_keeps_speakers_words_and_names(tmp_path, sounds):
    words = json.dumps({"alignments": []}).encode()
    files = [f"{speaker}/7/{speaker}{name}" for speaker in ("1089", "1188") for name in ("-1.flac", "-2.flac", ".txt")]
    root = snapshot(tmp_path / "hf", {f"split/{name}": sounds[0] for name in files})
    streams = sources.streams(sources.find([root / "split"]), True)
    expected = [(f"split/{speaker}", speaker, 2) for speaker in ("1089", "1188")]
    assert [(s.group, s.speaker, len(s.recordings)) for s in streams] == expected
    assert [re.sub("-[0-9a-f]{8}$", "", s.name) for s in streams] == ["split/1089", "split/1188"]
    # words beside, each stream's own folder, and one content under two names
    both = snapshot(tmp_path / "two", {"x/talk.wav": sounds[0], "x/talk.json": words, "y/talk.wav": sounds[0]})
    (both / "y" / "talk.wav").unlink()
    (both / "y" / "talk.wav").symlink_to(os.readlink(both / "x" / "talk.wav"))
    x, y = sources.find([both]).recordings
    assert (x.group, x.alignment, y.group, y.alignment) == ("x", both / "x" / "talk.json", "y", None)
    assert x.group_key != y.group_key
    assert sources.name_of(x) != sources.name_of(y)
    assert sources.name_of(x).startswith("0a1b/x/talk-")


def test_one_file_through_two_links_to_its_folder_is_one(tmp_path, monkeypatch):
    path = put(tmp_path / "real" / "2024" / "talks" / "a.wav")
    link(tmp_path / "data", "real")
    monkeypatch.chdir(tmp_path)
    some = sources.find(["data/2024/talks/a.wav", path, "real", "data/2024/../2024"]).recordings
    assert [r.path.as_posix() for r in some] == ["data/2024/talks/a.wav"]
    # the same code file, whichever path names it
    assert len({sources.name_of(sources.find([way]).recordings[0]) for way in ("data", "real", path)}) == 1


def test_links_to_folders_are_followed_by_their_own_names(tmp_path):
    for speaker in ("7f", "3c"):
        put(tmp_path / "store" / speaker / "1" / "a.flac")
    for name, target in (("1089", "7f"), ("1188", "3c")):
        link(tmp_path / "tree" / name, tmp_path / "store" / target)
    put(tmp_path / "tree" / "1088" / "1" / "b.flac")
    for folder in ("1088", "1089", "1188"):
        (tmp_path / "tree" / folder / "1" / "t.trans.txt").touch()
    assert found(tmp_path / "tree") == ["1088/1/b.flac", "1089/1/a.flac", "1188/1/a.flac"]
    some = sources.find([tmp_path / "tree"]).recordings
    assert [(r.group, r.speaker) for r in some] == [(f"tree/{name}", name) for name in ("1088", "1089", "1188")]


@pytest.mark.parametrize("target", ["..", ".", "../tree/a", "a", "../.."])
def test_a_folder_that_links_lead_to_again_comes_once_by_its_own_path(tmp_path, target):
    put(tmp_path / "tree" / "b" / "x.wav")
    put(tmp_path / "tree" / "a" / "y.wav")
    put(tmp_path / "beside.wav")
    link(tmp_path / "tree" / "0", target)  # before a and b by its name
    link(tmp_path / "tree" / "b" / "again", "../a")
    assert found(tmp_path / "tree") == ["a/y.wav", "b/x.wav"]


def test_links_that_lead_to_each_other_end(tmp_path):
    for name in "abc":
        put(tmp_path / "out" / name / f"{name}.wav")
        for other in "abc":
            link(tmp_path / "out" / name / f"to-{other}", f"../{other}")
    link(tmp_path / "tree" / "in", "../out/a")
    assert sorted(Path(path).name for path in found(tmp_path / "tree")) == ["a.wav", "b.wav", "c.wav"]


ANNEX = ".git/annex/objects/X/Y/MD5E-s1--0.flac/MD5E-s1--0.flac"


@pytest.mark.parametrize(
    ("name", "target", "counts"),
    [
        ("sub/b.flac", f"../{ANNEX}", True),
        ("b.wav", "../../blobs/0123", True),
        ("c.wav", "c.wav", True),  # to itself
        ("1188", "/nowhere/1188", True),  # a speaker's folder
        ("LICENSE", ANNEX.replace(".flac", ""), False),
        ("notes.txt", "gone.txt", False),
    ],
)
def test_a_link_to_what_is_not_here_is_named_and_counted(tmp_path, sounds, capsys, name, target, counts):
    put(tmp_path / "in" / "a.wav", sounds[0])
    link(tmp_path / "in" / name, target)
    assert run(tmp_path / "in", "--out", tmp_path / "out") == (command.PARTIAL if counts else 0)
    skipped, out = reported(capsys)
    assert len(skipped) == counts
    assert f"; {'1 recording' if counts else '0 recordings'} skipped" in out
    if counts and target != name:
        assert skipped == [
            f"skipped: {tmp_path}/in/{name} is a link to what is not here: fetch it, for example by git annex get or"
            " huggingface-cli download."
        ]


def test_a_tree_that_was_not_fetched_is_one_error(tmp_path):
    for index in range(5):
        link(tmp_path / f"{index}.flac", ANNEX)
    with pytest.raises(InputError, match=r"^none of 5 recordings.*/0\.flac is a link to what is not here: fetch it"):
        sources.find([tmp_path])
    with pytest.raises(InputError, match=r"/0\.flac is a link to what is not here: fetch it"):
        sources.find([tmp_path / "0.flac"])


def test_words_that_were_not_fetched_and_what_is_no_file_leave_a_recording_out(tmp_path, sounds):
    for name in "ab":
        put(tmp_path / f"{name}.wav", sounds[0])
    link(tmp_path / "a.json", ANNEX)
    os.mkfifo(tmp_path / "c.wav")  # it is not waited for
    some = sources.find([tmp_path])
    assert [r.path.name for r in some.recordings] == ["b.wav"]
    assert some.problems[0] == f"{tmp_path}/c.wav is no file: give a file or leave it out."
    assert "a.wav has a.json beside it, which is a link to what is not here: fetch it" in some.problems[1]


def test_absent_files_of_a_manifest_are_reported_briefly_counted_and_leave_gaps(tmp_path, sounds, capsys):
    put(tmp_path / "x" / "a.wav", sounds[0])
    put(tmp_path / "y" / "b.wav", sounds[1])
    rows = ["x/a.wav", "y/b.wav", *(f"y/gone{index}.wav" for index in range(2000))]
    text = "".join(json.dumps({"path": row, "duration": 1.0}) + "\n" for row in rows)
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert run(tmp_path / "m.jsonl.gz", "--out", tmp_path / "out") == command.PARTIAL
    skipped, out = reported(capsys)
    (line,) = skipped
    assert line.startswith(f"skipped: {tmp_path}/m.jsonl.gz line 3 names {tmp_path}/y/gone0.wav, which is not there")
    assert line.endswith(f"; the same holds for 1,999 more lines of {tmp_path}/m.jsonl.gz.")
    assert "2 code files of 2 recordings" in out
    assert "; 2000 recordings skipped" in out
    assert run(tmp_path / "m.jsonl.gz", "--out", tmp_path / "joined", "--join") == command.PARTIAL
    assert [line["group"] for line in lines_of(tmp_path / "joined")] == ["x"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x1c"])
def test_prepare_reads_again_what_it_wrote(tmp_path, sounds, capsys, character):
    put(tmp_path / f"a{character}b" / f"c{character}.wav", sounds[0])
    for count in (0, 1):
        assert run(tmp_path / f"a{character}b", "--out", tmp_path / "out") == 0
        assert f"{count} encoded before" in capsys.readouterr().out
    (line,) = lines_of(tmp_path / "out")
    assert line["group"] == f"a{character}b"


@pytest.mark.parametrize(
    ("speakers", "streams"),
    [
        (["anna", "ben"], {"x/anna": 1, "x/ben": 1}),
        (["anna", "ben", "anna", None], {"x/anna": 2, "x/ben": 1, "x": 1}),
        ([7, "7"], {"x/7": 2}),
        (["a/b", "a b", "\ud800"], {"x/a/b": 1, "x/a b": 1, "x/\ud800": 1}),
    ],
)
def test_each_speaker_of_a_folder_in_a_manifest_is_a_stream(tmp_path, sounds, speakers, streams):
    rows = []
    for index, speaker in enumerate(speakers):
        put(tmp_path / "x" / f"{index}.wav", sounds[0])
        rows.append({"path": f"x/{index}.wav", "duration": 1.0, **({} if speaker is None else {"speaker": speaker})})
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert run(tmp_path / "m.jsonl", "--out", tmp_path / "out", "--join") == 0
    lines = lines_of(tmp_path / "out")
    assert {line["group"]: len(line["sources"]) for line in lines} == streams
    assert {line.get("speaker") for line in lines} == {speaker and str(speaker) for speaker in speakers}
    # a file that is not there leaves a gap in the first one's stream alone
    gone = json.dumps(rows[0] | {"path": "x/gone.wav"})
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + gone)
    left = sources.streams(sources.find([tmp_path / "m.jsonl"]), True)
    assert [stream.gap and stream.gap.name for stream in left] == ["gone.wav", *[None] * (len(streams) - 1)]


def test_a_chapter_named_beside_its_tree_does_not_cost_its_book_the_speaker(tmp_path):
    put(tmp_path / "9" / "a" / "1.flac")
    put(tmp_path / "9" / "a" / "2.flac")
    put(tmp_path / "9" / "a" / "2.json", b'{"book_meta": {}}')
    some = sources.find([tmp_path / "9" / "a" / "1.flac", tmp_path])
    assert [(stream.speaker, len(stream.recordings)) for stream in sources.streams(some, True)] == [("9", 2)]


BOOK = b'{"book_meta": {"id": 7}}'


@pytest.mark.parametrize(
    ("files", "speaker", "group"),
    [
        *(
            ({f"1/a/1.{e}": first, f"{rest}.flac": b"", f"{rest}.json": BOOK}, "1", "1/a")
            for e, first in (("txt", b""), ("json", b"{"), ("json", b'{"snr": 1}'), ("json", b'{"alignments": []}'))
            for rest in ("1/a/2", "2/b/1")
        ),
        ({"84/1/1.wav": b"", "84/2/x.flac": b"", "84/2/84-2.trans.txt": b""}, "84", "84"),
        ({"84/1/1.wav": b"", "85/1/x.flac": b"", "85/1/85-1-0.txt": b""}, "84", "84"),
    ],
)
def test_one_chapter_without_its_json_or_transcript_does_not_hide_a_data_set(tmp_path, files, speaker, group):
    first = next(iter(files)).rsplit("/", 1)[0]
    put(tmp_path / first / "1.flac")
    for name, content in files.items():
        put(tmp_path / name, content)
    one = sources.find([tmp_path]).recordings[0]
    assert one.speaker == speaker
    assert one.group.endswith(group)


def test_a_large_tree_is_judged_without_reading_all_its_json(tmp_path, monkeypatch):
    for index in range(40):
        put(tmp_path / "1" / "a" / f"{index}.flac")
        put(tmp_path / "1" / "a" / f"{index}.json", b"{}" if index < 2 else BOOK)
    real, read = sources.read_beside, []
    monkeypatch.setattr(sources, "read_beside", lambda path: read.append(path) or real(path))
    assert sources.find([tmp_path]).recordings[0].speaker == "1"
    assert len(read) == 3


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("4.flac", "a link to what", "is left out, so 3 other recordings cannot be joined"),
        ("4.m4a", "in a format", "is left out, so 3 other recordings cannot be joined"),
        ("4.wav", "is not audio", "is not audio"),
        ("1.m4a", "in a format", None),  # what 1.wav was converted from
    ],
)
def test_of_a_stream_with_a_gap_all_recordings_are_counted_and_the_reason_is_reported_once(
    tmp_path, sounds, capsys, name, reason, detail
):
    for number in (1, 2, 3):
        put(tmp_path / "in" / "a" / f"{number}.wav", sounds[0])
    put(tmp_path / "in" / "b" / "1.wav", sounds[0])
    path = tmp_path / "in" / "a" / name
    link(path, "nowhere") if name == "4.flac" else put(path)
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--join") == command.PARTIAL
    lines, out = reported(capsys)
    assert sum(reason in line for line in lines) == 1
    streams = [line for line in lines if line.startswith("skipped the stream")]
    if detail is None:
        assert not streams
        assert "2 code files of 4 recordings," in out
    else:
        (line,) = streams
        assert line.startswith(f"skipped the stream a: {path} {detail}")
        assert "1 code file of 1 recording," in out
        assert "; 4 recordings skipped" in out


@pytest.mark.parametrize("join", [True, False])
def test_a_mislabelled_file_that_was_converted_is_named_as_what_to_remove(tmp_path, sounds, capsys, join):
    put(tmp_path / "in" / "1.wav", sounds[0])
    put(tmp_path / "in" / "2.wav", b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(40))
    soundfile.write(tmp_path / "in" / "2.flac", np.zeros(16000), 16000)
    args = (tmp_path / "in", "--out", tmp_path / "out", *(["--join"] if join else []))
    assert run(*args) == (command.BAD_INPUT if join else command.PARTIAL)
    line = reported(capsys)[0][0]
    assert line.endswith("; 2.flac stands beside it: if that was made from it, remove 2.wav.") == join
    (tmp_path / "in" / "2.wav").unlink()
    assert run(*args) == 0
