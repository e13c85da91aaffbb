"""Names of files: any bytes, both Unicode forms, empty ones."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from eval.results import schema
from tests.helpers.places import ROOT
from tests.helpers.recordings import lines_of, run
from tests.helpers.trees import found, put, reported
from ttt_jax.data import sources
from ttt_jax.data.codes import read_codes
from ttt_jax.errors import InputError
from ttt_jax.utils import command, config_json, paths

NFC, NFD = "caf\u00e9", "cafe\u0301"

ODD = [
    b"\xff\xfe.wav",
    b"caf\xe9.wav",  # Latin-1
    b"two\nlines.wav",
    b'"quo\'tes".wav',
    b"a" * 251 + b".wav",
    "\u2028and\u0085.wav".encode(),
    b"\x1b[31mred.wav",
    f"{NFC}.wav".encode(),
    f"{NFD}.wav".encode(),
]
LOCALES = [{}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]


@pytest.mark.integration
def test_names_in_any_bytes_are_prepared_found_again_and_printed_in_any_locale(tmp_path, sounds):
    folder = os.fsencode(tmp_path) + b"/in/sp\xffeaker"
    for index, name in enumerate(ODD):
        put(folder + b"/" + name, sounds[index % 2])
    put(folder + b"/bad\xff\n.wav", b"no sound")
    put(folder + b"/old\xff\n.m4a")
    counts = []
    for changes in reversed(LOCALES):  # the one that knows least writes
        env = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)} | changes
        command_line = [sys.executable, "-m", "eval", "prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
        done = subprocess.run(command_line, capture_output=True, env=env, cwd=tmp_path)
        skipped = [line for line in re.split(rb"[\r\n]", done.stderr) if line.startswith(b"skipped: ")]
        assert done.returncode == command.PARTIAL, done.stderr
        names = [line.split(b" is ")[0].split(b"/")[-1] for line in skipped]
        assert names == [rb"old\udcff\n.m4a", rb"bad\udcff\n.wav"]
        counts.append(int(re.search(rb"(\d+) encoded before", done.stdout)[1]))
    assert counts == [0, len(ODD), len(ODD)]
    lines = lines_of(tmp_path / "out")
    assert {line["group"] for line in lines} == {os.fsdecode(b"sp\xffeaker")}
    assert len({line["path"] for line in lines}) == len(ODD)
    assert all(re.fullmatch(r"codes/([\w.-]+/)*[\w.-]+\.safetensors", line["path"], re.ASCII) for line in lines)
    stored = [read_codes(tmp_path / "out" / line["path"]).sources[0] for line in lines]
    assert [source._asdict() for source in stored] == [line["sources"][0] for line in lines]
    assert {source.path for source in stored} == {os.fsdecode(folder + b"/" + name) for name in ODD}


@pytest.mark.integration
@pytest.mark.parametrize("locale", [LOCALES[0], LOCALES[2]])
def test_a_manifest_may_name_any_bytes(tmp_path, sounds, locale):
    given = [name for name in ODD if len(name) < 200]
    for index, name in enumerate(given):
        put(os.fsencode(tmp_path) + b"/" + name, sounds[index % 2])
    text = "".join(json.dumps({"path": os.fsdecode(name), "duration": 1}) + "\n" for name in given)
    (tmp_path / "m.jsonl").write_text(text)
    code = "import sys; from ttt_jax.data.manifest import read_manifest as r; print([len(x) for x in r(sys.argv[1])])"
    env = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)} | locale
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.jsonl")], capture_output=True, text=True, env=env
    )
    assert done.stdout == f"[{len(given)}, 0]\n", done.stderr


def test_both_unicode_forms_are_two_files_with_their_own_words(tmp_path):
    for form in (NFC, NFD):
        put(tmp_path / f"{form}.wav")
    put(tmp_path / f"{NFC}.json", b'{"alignments": []}')
    some = {r.path.stem: r for r in sources.find([tmp_path]).recordings}
    assert {stem: r.alignment for stem, r in some.items()} == {NFC: tmp_path / f"{NFC}.json", NFD: None}
    assert sources.name_of(some[NFC]) != sources.name_of(some[NFD])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_order_is_that_of_the_names_in_either_unicode_form(tmp_path, form):
    order = ["e 1", "\u00e9 2", "\u00e9 10", "f 1", "z 1"]
    for name in order:
        put(tmp_path / unicodedata.normalize(form, f"{name}.wav"))
    stems = [Path(path).stem for path in found(tmp_path)]
    assert [unicodedata.normalize("NFC", stem) for stem in stems] == ["e 1", "f 1", "z 1", "\u00e9 2", "\u00e9 10"]


def test_printable_text_is_one_line_of_what_any_terminal_shows():
    kept = "d\u00e9 \u00a0\u200d\u0301"
    assert paths.printable(f"a\nb\u2028c\udcff\x1b[1m{kept}") == r"a\nb\u2028c\udcff\x1b[1m" + kept


def test_json_files_hold_names_in_any_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9\xff")
    config_json.write_json(tmp_path / "a.json", {"train": name})
    assert config_json.read_json(tmp_path / "a.json", "it") == {"train": name}
    assert json.loads(schema.as_json({"data": name})) == {"data": name}


@pytest.mark.parametrize("name", ["caf\u00e9", os.fsdecode(b"\xff\n"), "plain"])
def test_names_come_back_from_json(name):
    assert paths.native(json.loads(json.dumps(paths.portable(name)))) == name


EMPTY = [("", "--out", "o"), ("a.wav", "", "--out", "o"), ("a.wav", "--out", "")]
EMPTY += [("a.wav", "--out", "o", option, "") for option in ("--codec", "--tokenizer")]


@pytest.mark.parametrize("args", EMPTY)
def test_an_empty_name_is_refused(tmp_path, sounds, capsys, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.wav", sounds[0])
    assert run(*args) == command.BAD_INPUT
    (line,), _ = reported(capsys)
    assert line.startswith("error: an empty name was given")
    assert os.listdir() == ["a.wav"]


def test_a_path_may_be_the_current_folder_and_a_name_may_not_be_empty():
    assert paths.local(Path("")) == Path(".")
    with pytest.raises(InputError, match="empty name"):
        paths.local("")
