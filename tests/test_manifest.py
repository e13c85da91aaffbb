"""Manifests and alignment files: what is read, and what is refused with file and line named."""

import json

import pytest

from ttt_jax.data.manifest import Entry, Word, check_duration, read_alignments, read_manifest
from ttt_jax.errors import InputError

GOOD = '{"path": "a.wav", "duration": 2.5}'


@pytest.fixture
def folder(tmp_path):
    """A folder with two (empty) sound files, one of them with an alignment."""
    (tmp_path / "a.wav").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.flac").touch()
    (tmp_path / "sub" / "b.json").write_text('{"alignments": []}')
    return tmp_path


def write(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_entries_come_in_order_with_paths_relative_to_the_manifest(folder):
    path = write(folder, GOOD, "", '{"path": "sub/b.flac", "duration": 61, "voice": "x"}')
    assert read_manifest(path).entries == [
        Entry(folder / "a.wav", 2.5, None),
        Entry(folder / "sub/b.flac", 61.0, folder / "sub/b.json"),
    ]


def test_absolute_paths_are_kept(folder):
    line = json.dumps({"path": str(folder / "sub" / "b.flac"), "duration": 1})
    (folder / "sub" / "m.jsonl").write_text(line)
    assert read_manifest(folder / "sub" / "m.jsonl").entries[0].path == folder / "sub" / "b.flac"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"path": "a.wav", "duration": 2.5', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"path": "a.wav"}', 'has no "duration"'),
        ('{"duration": 2.5}', 'has no "path"'),
        ('{"path": 7, "duration": 2.5}', '"path": 7'),
        ('{"path": "", "duration": 2.5}', "\"path\": ''"),
        ('{"path": "a.wav", "duration": 0}', '"duration": 0'),
        ('{"path": "a.wav", "duration": -3}', '"duration": -3'),
        ('{"path": "a.wav", "duration": "2"}', "\"duration\": '2'"),
        ('{"path": "a.wav", "duration": true}', '"duration": True'),
        ('{"path": "a.wav", "duration": NaN}', '"duration": nan'),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(folder, line, complaint):
    with pytest.raises(InputError) as error:
        read_manifest(write(folder, GOOD, line))
    assert f"{folder / 'train.jsonl'} line 2" in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("lines", [[""], ["", "  "]])
def test_an_empty_manifest_is_refused(folder, lines):
    with pytest.raises(InputError, match=r"train\.jsonl is empty"):
        read_manifest(write(folder, *lines))


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "none.jsonl")


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="not UTF-8"):
        read_manifest(tmp_path / "m.jsonl")


def test_duration_must_be_that_of_the_audio(tmp_path):
    entry = Entry(tmp_path / "a.wav", 10.0, None)
    check_duration(entry, 10.4)
    check_duration(entry, 9.6)
    for seconds in (10.6, 9.4, 0.0):
        with pytest.raises(InputError, match=r"a\.wav lasts .* but its manifest says 10\.00 s"):
            check_duration(entry, seconds)


def alignment(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_words_come_ordered_by_start(tmp_path):
    rows = [[" two", [1.0, 1.5], "SPEAKER_MAIN"], ["one", [0.25, 0.5], "other"], ["three", [1.0, 1], "SPEAKER_MAIN"]]
    assert read_alignments(alignment(tmp_path, {"alignments": rows, "more": 1}), 2.0) == [
        Word("one", 0.25, 0.5, "other"),
        Word("two", 1.0, 1.5, "SPEAKER_MAIN"),
        Word("three", 1.0, 1.0, "SPEAKER_MAIN"),
    ]


def test_times_may_pass_the_end_by_half_a_second_only(tmp_path):
    path = alignment(tmp_path, {"alignments": [["word", [1.0, 2.4], "SPEAKER_MAIN"]]})
    assert len(read_alignments(path, 2.0)) == 1
    with pytest.raises(InputError, match=r"a\.json, alignments\[0\].*does not match its audio of 1\.80 s"):
        read_alignments(path, 1.8)


@pytest.mark.parametrize("times", [[-0.1, 0.5], [0.9, 0.5], [5.0, 6.0]])
def test_times_outside_the_audio_are_refused(tmp_path, times):
    rows = [["ok", [0, 1], "SPEAKER_MAIN"], ["bad", times, "SPEAKER_MAIN"]]
    with pytest.raises(InputError, match=r"alignments\[1\].*does not match its audio"):
        read_alignments(alignment(tmp_path, {"alignments": rows}), 2.0)


@pytest.mark.parametrize(
    "row",
    [
        "word",
        7,
        None,
        ["word", [0, 1]],
        ["word", 0, 1],
        ["word", [0], "SPEAKER_MAIN"],
        ["word", ["0", "1"], "SPEAKER_MAIN"],
        ["word", [0, None], "SPEAKER_MAIN"],
        ["word", [0, float("nan")], "SPEAKER_MAIN"],
        [5, [0, 1], "SPEAKER_MAIN"],
        ["word", [0, 1], None],
        {"word": "x"},
    ],
)
def test_a_row_of_another_shape_is_refused(tmp_path, row):
    with pytest.raises(InputError, match=r"alignments\[0\] is .*expected \[word, \[start, end\], speaker\]"):
        read_alignments(alignment(tmp_path, {"alignments": [row]}), 2.0)


@pytest.mark.parametrize("content", ["[]", "{}", '{"alignments": {}}', '{"alignments": null}', "3"])
def test_a_file_without_the_list_is_refused(tmp_path, content):
    with pytest.raises(InputError, match='no list under the key "alignments"'):
        read_alignments(alignment(tmp_path, content), 2.0)


def test_broken_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        read_alignments(alignment(tmp_path, '{"alignments": [["wo'), 2.0)


def test_a_missing_alignment_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_alignments(tmp_path / "none.json", 2.0)
