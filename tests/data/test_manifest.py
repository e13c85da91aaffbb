"""Manifests: what is read, and what is refused with file and line named."""

import gzip
import json
import unicodedata

import pytest

from ttt_jax.data.manifest import Entry, check_duration, is_manifest, read_manifest
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
    absolute = json.dumps({"path": str(folder / "a.wav"), "duration": 1})
    path = write(folder, GOOD, "", '{"path": "sub/b.flac", "duration": 61, "voice": "x"}', absolute)
    assert read_manifest(path).entries == [
        Entry(folder / "a.wav", 2.5, None),
        Entry(folder / "sub/b.flac", 61.0, folder / "sub/b.json"),
        Entry(folder / "a.wav", 1.0, None),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"path": "a.wav", "duration": 2.5', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"path": "a.wav"}', 'has no "duration"'),
        ('{"duration": 2.5}', 'has no "path"'),
        ('{"path": 7, "duration": 2.5}', '"path": 7'),
        ('{"path": "", "duration": 2.5}', "\"path\": ''"),
        *((f'{{"path": "a.wav", "duration": {n}}}', '"duration": ') for n in (0, -3, '"2"', "true", "NaN", 10**400)),
        (f'{{"path": "a.wav", "duration": 1{"0" * 5000}}}', "is not JSON"),
        *((f'{{"path": "{name}.wav", "duration": 1}}', '"path": ') for name in ("a\\u0000", "\\ud800")),
        *((f'{GOOD[:-1]}, "speaker": {speaker}}}', '"speaker": ') for speaker in ("true", "1.5", '["x"]')),
        (GOOD + "\u2028" + GOOD, "is not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(folder, line, complaint):
    with pytest.raises(InputError) as error:
        read_manifest(write(folder, GOOD, line))
    assert f"{folder / 'train.jsonl'} line 2" in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(folder, character, end):
    name = f"a{character}b.wav"
    (folder / name).touch()
    # JSON escapes what is below a blank; the others stand in the file as they are
    lines = [json.dumps({"path": name, "duration": 1, "speaker": character}, ensure_ascii=False), "", GOOD]
    path = folder / "m.jsonl"
    path.write_bytes("".join(line + end for line in lines).encode("utf-8-sig"))
    assert read_manifest(path).entries == [
        Entry(folder / name, 1.0, None, character),
        Entry(folder / "a.wav", 2.5, None),
    ]


@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.jsonl"])  # some tools pack or unpack and keep the name
def test_a_manifest_may_be_gzip(folder, name):
    plain = read_manifest(write(folder, GOOD, GOOD))
    (folder / name).write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    assert read_manifest(folder / name) == plain
    (folder / "plain.jsonl.gz").write_bytes((folder / "train.jsonl").read_bytes())
    assert read_manifest(folder / "plain.jsonl.gz") == plain


@pytest.mark.parametrize("damage", ["cut", "bits", "block", "checksum", "rest"])
def test_damaged_gzip_is_refused(folder, damage):
    content = gzip.compress(f"{GOOD}\n".encode() * 50)
    changed = {
        "cut": content[:-12],
        "bits": content[:15] + bytes([content[15] ^ 255]) + content[16:],
        "block": content[:10] + b"\x07" + content[11:],  # a kind of block that there is not
        "checksum": content[:-8] + bytes(8),
        "rest": content + b"more",
    }
    (folder / "m.jsonl.gz").write_bytes(changed[damage])
    with pytest.raises(InputError, match=r"m\.jsonl\.gz is cut off or damaged gzip"):
        read_manifest(folder / "m.jsonl.gz")


@pytest.mark.parametrize(
    ("speaker", "expected"), [("7", "7"), (7, "7"), (0, "0"), (-1, "-1"), (None, None), ("", None)]
)
def test_a_speaker_is_a_name_or_a_whole_number(folder, speaker, expected):
    line = json.dumps({"path": "a.wav", "duration": 1, "speaker": speaker})
    assert read_manifest(write(folder, line)).entries[0].speaker == expected


ABSENT = [
    ("gone.wav", "is not there: paths are relative to the manifest's folder."),
    ("no/folder/a.wav", "is not there: paths are relative"),
    ("a.wav/b.wav", "is not there: paths are relative"),
    ("~/a.wav", "is not there: ~ stands for no folder in a manifest, write the whole path."),
    ("sub\\b.flac", "is not there: write / between folders."),
    ("sub", "is no file: give a file or leave it out."),
    ("link.wav", "is a link to what is not here: fetch it, for example by git annex get or huggingface-cli download."),
    ("x" * 300, "cannot be read (File name too long): mend that or leave it out."),
]


@pytest.mark.parametrize(("name", "reason"), ABSENT)
def test_an_absent_file_is_left_out_with_a_sentence_that_names_the_line(folder, name, reason):
    (folder / "link.wav").symlink_to("../blobs/0123")
    line = json.dumps({"path": name, "duration": 1})
    entries, absent = read_manifest(write(folder, GOOD, line, GOOD))
    assert [entry.path for entry in entries] == [folder / "a.wav"] * 2
    (one,) = absent
    assert one.path == folder / name
    assert one.reason.startswith(f"{folder / 'train.jsonl'} line 2 names {folder / name}, which {reason}")
    with pytest.raises(InputError) as error:  # a single one
        read_manifest(write(folder, line))
    assert str(error.value) == one.reason.replace("line 2", "line 1")


def test_a_manifest_of_a_wrong_folder_is_one_sentence(folder):
    lines = [json.dumps({"path": f"other/{index}.wav", "duration": 1}) for index in range(3000)]
    with pytest.raises(InputError) as error:
        read_manifest(write(folder, *lines))
    assert str(error.value) == (
        f"none of the 3,000 recordings is there: {folder / 'train.jsonl'} line 1 names {folder / 'other/0.wav'}, which"
        " is not there: paths are relative to the manifest's folder."
    )


def test_words_that_are_a_link_to_nothing_make_their_recording_absent(folder):
    (folder / "a.json").symlink_to("../blobs/0123")
    entries, absent = read_manifest(write(folder, GOOD, '{"path": "sub/b.flac", "duration": 1}'))
    assert [entry.path.name for entry in entries] == ["b.flac"]
    assert "a.wav, whose a.json is a link to what is not here: fetch it" in absent[0].reason


@pytest.mark.parametrize("in_manifest", ["NFC", "NFD"])
@pytest.mark.parametrize(("in_folder", "in_file"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD"), ("NFC", "NFC")])
def test_names_are_found_in_either_unicode_form(tmp_path, in_manifest, in_folder, in_file):
    folder = tmp_path / unicodedata.normalize(in_folder, "\u00e9t\u00e9")
    folder.mkdir()
    audio = folder / unicodedata.normalize(in_file, "\u00c5sa\u0304.wav")
    words = folder / unicodedata.normalize(in_manifest, "\u00c5sa\u0304.json")
    for path in (audio, words):
        path.touch()
    name = unicodedata.normalize(in_manifest, "\u00e9t\u00e9/\u00c5sa\u0304.wav")
    (entry,) = read_manifest(write(tmp_path, json.dumps({"path": name, "duration": 1}))).entries
    assert (entry.path, entry.alignment) == (audio, words)


def test_the_exact_name_goes_before_its_other_form(tmp_path):
    forms = ["\u00e9.wav", "e\u0301.wav"]
    for form in forms:
        (tmp_path / form).touch()
    lines = [json.dumps({"path": form, "duration": 1}) for form in forms]
    assert [entry.path.name for entry in read_manifest(write(tmp_path, *lines)).entries] == forms


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n  \n", "is empty"), (None, "does not exist"), (b"\xff\xfe\x00\x81", "not UTF-8")],
)
def test_an_unusable_manifest_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"m\.jsonl {'is ' * message.startswith('not')}{message}"):
        read_manifest(tmp_path / "m.jsonl")


def test_duration_must_be_that_of_the_audio(tmp_path):
    entry = Entry(tmp_path / "a.wav", 10.0, None)
    check_duration(entry, 10.4)
    check_duration(entry, 9.6)
    for seconds in (10.6, 9.4, 0.0):
        with pytest.raises(InputError, match=r"a\.wav lasts .* but its manifest says 10\.00 s"):
            check_duration(entry, seconds)


@pytest.mark.parametrize("name", ["m.ndjson", "m.json", "m.txt", "m", "m.ndjson.gz", "m.JSONL", "m.list"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_json_lines_under_any_name_are_a_manifest(folder, name, start):
    content = f"{start}{GOOD}\n".encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert is_manifest(folder / name)
    assert len(read_manifest(folder / name).entries) == 1


@pytest.mark.parametrize("name", ["m.txt", "m.csv", "m.json", "caf\u00e9"])
@pytest.mark.parametrize("content", ["a.wav\nb.wav\n", "path,duration\r\na,1", '[{"path": "a"}]', "\u00e9" * 3000])
def test_other_text_is_refused_as_a_manifest_not_as_audio(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    assert is_manifest(folder / name)
    with pytest.raises(InputError, match="manifest must be one JSON object|is not a JSON object"):
        read_manifest(folder / name)


NO_TEXT = {"a.wav": b"{}", "a.m4a": b"text", "a.safetensors": b"text", "a.bin": b"RIFF\x00\x01", "a": b""}
NO_TEXT |= {"a.raw2": b"\xff\xfb\x90", "a.gz": b"\x1f\x8b\x08damaged"}


def test_sound_and_what_is_no_text_are_no_manifest(folder):
    for name, content in NO_TEXT.items():
        (folder / name).write_bytes(content)
        assert not is_manifest(folder / name), name
    assert not is_manifest(folder / "gone")
    assert not is_manifest(folder)


ONE_LINE = ('{"path": "a.wav",\r\t"duration":\r1}\r\n', '\r{"path": "a.wav", "duration": 1}\r')


@pytest.mark.parametrize("line", ONE_LINE)
def test_a_carriage_return_alone_is_a_blank(folder, line):
    (folder / "m.jsonl").write_bytes(line.encode())
    assert len(read_manifest(folder / "m.jsonl").entries) == 1
