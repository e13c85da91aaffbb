"""The data of a run: its sources, codec and tokenizer, and their fit to a model."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.places import CORPUS
from ttt_jax.codec import CodecInfo, load_codec
from ttt_jax.config import MoshiConfig
from ttt_jax.data import codes as codefiles
from ttt_jax.data import corpus as corpora
from ttt_jax.data.text import TokenizerInfo, load_tokenizer
from ttt_jax.errors import InputError


def write_codes(folder, codes, made_by, name="a", **metadata):
    """A code file as somebody else may write it, and its line of a manifest."""
    metadata = {"frame_rate": "12.5", "codec": made_by} | metadata
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({"codes": codes}, path, metadata={key: value for key, value in metadata.items() if value is not None})
    return json.dumps({"path": path.name, "duration": codes.shape[1] / 12.5, "speaker": f"speaker of {name}"})


def write_manifest(folder, *lines, name="manifest.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def codes_of(rows=16, frames=20, seed=0):
    return np.random.default_rng(seed).integers(0, 64, (rows, frames), dtype=np.int16)


def prepared(folder, *files, **metadata):
    """A folder of code files with a manifest, one of each array."""
    lines = [
        write_codes(folder, codes, metadata.get("codec", MADE_BY), str(i), **metadata) for i, codes in enumerate(files)
    ]
    write_manifest(folder, *lines)
    return folder


EMBEDDED_DESCRIPTION = {
    "codec": {"name": "melkmeans-8x64", "digest": "ae66c5be10645ee4dea7a6ee2c27662a77061f9ac182bec93d531cf860feacdf"},
    "tokenizer": {"digest": "75d8fe2c18433f45f287b4297fb87fa5914f162e2ddda2e9000f109252443470", "pieces": 512},
}
PARTS = {  # files, frames, digest
    "train": (20, 16197, "5912cc85a42a299553b84262facdd9a278c1c76f1c2a34d3b513acec6d9906a6"),
    "heldout": (6, 5898, "dfeed32081601da9131061483402f33ed220a62394e37d1958a93ac1cc0d37cf"),
}
EMBEDDED_DESCRIPTION |= {k: dict(zip(("files", "frames", "digest"), v, strict=True)) for k, v in PARTS.items()}
MADE_BY = "c" * 64
FILES = corpora.CorpusConfig(codec="files")


def load(cfg, *cards):
    return corpora.load(cfg, *corpora.load_coders(cfg, *cards))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded corpus, encoded."""
    return load(corpora.CorpusConfig(cache=str(tmp_path_factory.mktemp("cache"))))


@pytest.mark.integration
def test_the_embedded_corpus_is_what_stored_runs_were_trained_on(embedded):
    # evaluating a stored run compares these; computed by the version before recordings were read when needed
    assert embedded.describe() == EMBEDDED_DESCRIPTION
    assert embedded.validation is embedded.heldout
    (source,) = embedded.train
    assert (source.weight, len(source.recordings)) == (1.0, EMBEDDED_DESCRIPTION["train"]["files"])
    assert [one.name for one in embedded.heldout][-1].startswith("en_librivox")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 1)]),
        ("a.jsonl:3", [("a.jsonl", 3)]),
        ("a.jsonl:3,b.jsonl:0.25", [("a.jsonl", 3), ("b.jsonl", 0.25)]),
        ("a.jsonl,b.jsonl:2e2", [("a.jsonl", 1), ("b.jsonl", 200)]),
        ("gone.jsonl", [("gone.jsonl", 1)]),
        ("gone.jsonl:2,a.jsonl", [("gone.jsonl", 2), ("a.jsonl", 1)]),
        ("odd:7", [("odd:7", 1)]),
        ("a.jsonl, b.jsonl", [("a.jsonl", 1), ("b.jsonl", 1)]),
        (" a.jsonl : 3 ,\tb.jsonl:0.25 ", [("a.jsonl", 3), ("b.jsonl", 0.25)]),
        ("gone.jsonl :2, a.jsonl", [("gone.jsonl", 2), ("a.jsonl", 1)]),
        (" blank, b.jsonl", [(" blank", 1), ("b.jsonl", 1)]),
        (" blank:2,a.jsonl", [(" blank", 2), ("a.jsonl", 1)]),
        ("odd:7:2,a.jsonl", [("odd:7", 2), ("a.jsonl", 1)]),
        ("odd,more:1.jsonl", [("odd,more:1.jsonl", 1)]),
        ("a.jsonl,odd,more:1.jsonl:5,b.jsonl", [("a.jsonl", 1), ("odd,more:1.jsonl", 5), ("b.jsonl", 1)]),
    ],
)
def test_sources_are_paths_with_weights(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "odd:7", "odd,more:1.jsonl", " blank"):
        (tmp_path / name).touch()
    assert corpora.parse_sources(text) == expected
    resolved = corpora.CorpusConfig(train=text).resolved()
    monkeypatch.chdir("/")
    absolute = [(str(tmp_path / name), weight) for name, weight in expected]
    assert corpora.parse_sources(resolved.train) == ([(absolute[0][0], 1)] if len(absolute) == 1 else absolute)


def test_a_weight_that_is_none_and_an_empty_path_are_refused():
    for weight in ("0", "-1", "nan", "inf", "x", "", "1e-9"):
        with pytest.raises(InputError, match=rf"neither exists nor ends in a weight .*\('{weight}'\).*PATH:WEIGHT"):
            corpora.parse_sources(f"a:{weight},b")
    for text in ("", "a,", ",a", "a,,b", ":3", " ", "a, ", "a, :3"):
        with pytest.raises(InputError, match="names an empty path"):
            corpora.parse_sources(text)


def test_sources_manifests_and_folders_are_opened_with_their_weights(tmp_path):
    one, two = prepared(tmp_path / "one", codes_of(17)), prepared(tmp_path / "two", codes_of(), codes_of(frames=9))
    heldout, validation = prepared(tmp_path / "h", codes_of(seed=1)), prepared(tmp_path / "v", codes_of(seed=2))
    parts = {"train": f"{one}:3,{two}/manifest.jsonl", "heldout": str(heldout)}
    cfg = dataclasses.replace(FILES, **parts, validation=str(validation / "manifest.jsonl"))
    corpus = load(cfg, 64, 300)
    assert [source[:2] for source in corpus.train] == [(str(one), 3), (f"{two}/manifest.jsonl", 1)]
    assert [r.name for r in corpus.recordings] == ["one/0", "two/0", "two/1"]
    assert [r.speaker for r in corpus.recordings] == ["speaker of 0", "speaker of 0", "speaker of 1"]
    np.testing.assert_array_equal(corpus.train[0].recordings[0].read(), codes_of(17))
    np.testing.assert_array_equal(corpus.validation[0].read()[1:], codes_of(seed=2))
    np.testing.assert_array_equal(corpus.heldout[0].read()[1:], codes_of(seed=1))
    described = corpus.describe()
    assert described == json.loads(json.dumps(described))
    assert {key: described["train"][key] for key in ("files", "frames")} == {"files": 3, "frames": 49}
    assert [part["weight"] for part in described["train"]["sources"]] == [3, 1]
    assert described["validation"]["frames"] == 20
    assert described["codec"] == {"name": f"codec {MADE_BY[:12]}", "digest": MADE_BY}


def test_absent_files_are_left_out_by_part_and_of_the_description(tmp_path):
    names = {"train": "one", "more": "two", "heldout": "h", "validation": "v"}
    folders = {part: prepared(tmp_path / name, codes_of(), codes_of(seed=1)) for part, name in names.items()}
    parts = {part: str(folders[part]) for part in ("heldout", "validation")}
    cfg = dataclasses.replace(FILES, train=f"{folders['train']}:3, {folders['more']}:1", **parts)
    whole = load(cfg, 64, 300)
    assert whole.absent == {"train": [], "heldout": [], "validation": []}
    for part in ("more", "heldout"):
        (folders[part] / "1.safetensors").rename(folders[part] / "away")
    some = load(cfg, 64, 300)
    assert {part: [one.path for one in gone] for part, gone in some.absent.items()} == {
        "train": [folders["more"] / "1.safetensors"],
        "heldout": [folders["heldout"] / "1.safetensors"],
        "validation": [],
    }
    assert [r.name for r in some.recordings] == ["one/0", "one/1", "two/0"]
    for part, same in (("train", False), ("heldout", False), ("validation", True)):
        assert (some.describe()[part] == whole.describe()[part]) == same
    # what is described is what is there: a manifest that never named them describes the same
    for part in ("more", "heldout"):
        manifest = folders[part] / "manifest.jsonl"
        manifest.write_text(manifest.read_text().split("\n")[0])
    assert load(cfg, 64, 300).describe() == some.describe()


def test_a_description_tells_codes_apart_and_reads_none_that_state_a_checksum(tmp_path, monkeypatch):
    def description(seed):
        codefiles.write_codes(tmp_path / "a.safetensors", codefiles.Codes(codes_of(seed=seed), 12.5, MADE_BY))
        write_manifest(tmp_path, json.dumps({"path": "a.safetensors", "duration": 1.6}))
        return load(dataclasses.replace(FILES, train=str(tmp_path))).describe()

    monkeypatch.setattr("ttt_jax.data.frames.read_codes", None)
    assert description(0) == description(0) != description(1)


def test_files_say_which_codec_and_tokenizer_they_need(tmp_path):
    folder = tmp_path / "a"
    lines = [write_codes(folder, codes_of(), MADE_BY, "0")]
    lines.append(write_codes(folder, codes_of(17), MADE_BY, "1", tokenizer="t" * 64))
    lines.append(write_codes(folder, codes_of(17), MADE_BY, "2", cardinality="64", codec_name="theirs"))
    write_manifest(folder, *lines)
    cfg = dataclasses.replace(FILES, train=str(folder))
    codec, tokenizer = corpora.load_coders(cfg, 2048, 32000)
    assert (codec.digest, codec.cardinality, codec.num_codebooks, codec.frame_rate) == (MADE_BY, 64, 8, 12.5)
    assert (tokenizer.digest, tokenizer.cardinality) == ("t" * 64, 32000)
    assert len(corpora.load(cfg, codec, tokenizer).train[0].recordings) == 3
    prepared(folder, codes_of())
    assert corpora.load_coders(cfg)[0].cardinality is None
    assert corpora.load_coders(cfg, 2048)[0].cardinality == 2048
    assert corpora.load_coders(cfg)[1].digest is None


def test_a_given_tokenizer_must_be_that_of_the_code_files(tmp_path):
    spm = CORPUS / "tokenizer" / "spm512.model"
    cfg = dataclasses.replace(FILES, train=str(tmp_path / "a"), tokenizer=str(spm))
    prepared(tmp_path / "a", codes_of(17), tokenizer=load_tokenizer(spm).digest)
    assert load(cfg).tokenizer.cardinality == 512
    prepared(tmp_path / "a", codes_of(17), tokenizer="0" * 64)
    with pytest.raises(InputError, match="states tokenizer '0000.*give data.tokenizer the one that made them"):
        load(cfg)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"made_by": "d" * 64}, r"b\.safetensors states codec 'dddd.*the codec of the data, .*, has the digest cccc"),
        ({"made_by": None}, r"b\.safetensors (does not state its codec|states codec None)"),
        ({"frame_rate": "25"}, r"b\.safetensors states frame_rate '25' .*models read 12\.5 frames"),
        ({"tokenizer": "u" * 64}, r"b\.safetensors states tokenizer 'uuuu.*the tokenizer of the data has .* tttt"),
        ({"cardinality": "32"}, r"b\.safetensors states cardinality 32 .*has 64"),
        ({"codes": codes_of(8)}, r"b\.safetensors holds 8 rows.*write both streams"),
    ],
)
@pytest.mark.parametrize("other", ["same manifest", "other source", "heldout", "validation"])
def test_files_that_do_not_go_together_are_refused(tmp_path, second, message, other):
    about = {"tokenizer": "t" * 64, "cardinality": "64"}
    lines = [write_codes(tmp_path, codes_of(17), MADE_BY, "a", **about)]
    changed = {"codes": codes_of(17), "made_by": MADE_BY} | about | second
    lines.append(write_codes(tmp_path, changed.pop("codes"), changed.pop("made_by"), "b", **changed))
    one, two = (write_manifest(tmp_path, line, name=f"{i}.jsonl") for i, line in enumerate(lines))
    both = write_manifest(tmp_path, *lines)
    places = {
        "same manifest": {"train": str(both)},
        "other source": {"train": f"{one},{two}:2"},
        "heldout": {"train": str(one), "heldout": str(two)},
        "validation": {"train": str(one), "validation": str(two)},
    }
    with pytest.raises(InputError, match=message):
        load(dataclasses.replace(FILES, **places[other]))


def test_audio_is_refused_where_the_codec_is_that_of_code_files(tmp_path):
    manifest = write_manifest(tmp_path, '{"path": "a.wav", "duration": 1.0}', name="m.jsonl")
    (tmp_path / "a.wav").touch()
    folder = prepared(tmp_path / "codes", codes_of())
    for train in (str(manifest), f"{folder},{manifest}", None):  # None: the embedded corpus
        with pytest.raises(InputError, match=r"\.(wav|ogg) is audio, but data\.codec='files'"):
            load(dataclasses.replace(FILES, train=train))


def test_a_folder_without_a_manifest_an_empty_and_a_missing_one_are_refused(tmp_path):
    good = prepared(tmp_path / "good", codes_of())
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, message in (
        (tmp_path, "is a folder without manifest.jsonl"),
        (tmp_path / "empty.jsonl", "empty.jsonl is empty"),
        (tmp_path / "gone.jsonl", "gone.jsonl does not exist"),
    ):
        for field in ("train", "heldout", "validation"):
            with pytest.raises(InputError, match=message):
                load(dataclasses.replace(FILES, **({"train": str(good)} | {field: str(path)})))


def test_resolving_leaves_names_that_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "mine.codec").touch()
    cfg = dataclasses.replace(FILES, heldout="h", validation="v.jsonl", cache="c")
    found = cfg.resolved()
    assert (found.codec, found.heldout, found.validation) == ("files", str(tmp_path / "h"), str(tmp_path / "v.jsonl"))
    assert (found.train, found.tokenizer, found.cache) == (None, None, str(tmp_path / "c"))
    assert corpora.CorpusConfig(codec="mine.codec").resolved().codec == str(tmp_path / "mine.codec")


def test_a_run_on_code_files_reads_others_without_its_own(tmp_path):
    folder = prepared(tmp_path / "a", codes_of(17), tokenizer="t" * 64)
    cfg = dataclasses.replace(FILES, train=str(folder))
    meta = json.loads(json.dumps(load(cfg, 64, 300).describe()))
    (folder / "manifest.jsonl").unlink()
    codec, tokenizer = corpora.load_coders(cfg, 64, 300, meta)
    assert (codec.name, codec.digest, codec.cardinality) == (meta["codec"]["name"], MADE_BY, 64)
    assert (tokenizer.digest, tokenizer.cardinality) == ("t" * 64, 300)
    assert corpora.load_coders(corpora.CorpusConfig(), 64, 512, {})[0].digest == load_codec().digest


MODEL = MoshiConfig(n_q=16, dep_q=8, card=32, text_card=100, delays=(0,) * 17)
CODEC, TEXT = CodecInfo("theirs", "a" * 64, 64), TokenizerInfo("b" * 64, 512)


def test_a_model_takes_the_cardinalities_of_codec_and_tokenizer():
    fitted = corpora.fit_model(MODEL, CODEC, TEXT)
    assert fitted == dataclasses.replace(MODEL, card=64, text_card=512)
    assert corpora.fit_model(MODEL, CodecInfo("theirs", "a" * 64), TokenizerInfo()) == MODEL
    assert corpora.fit_model(fitted, CODEC, TEXT, "run", {"name": "theirs", "digest": "a" * 64}) == fitted


@pytest.mark.parametrize(
    ("changes", "weights", "codec", "message"),
    [
        ({"n_q": 8, "dep_q": 4}, None, None, "n_q=8 and model.dep_q=4 do not fit the codec theirs: give 16 and 8"),
        ({"text_card": 512}, "run", None, "run has 32 codes and 512 text pieces, but .* theirs has 64 and .* 512"),
        ({"card": 64}, "run", None, "run has 64 codes and 100 text pieces, but .* and the tokenizer 512"),
        ({"card": 64, "text_card": 512}, "run", "c" * 64, "run was trained with the codec mine .* theirs .digest aaaa"),
    ],
)
def test_a_model_that_does_not_fit_codec_and_tokenizer_is_refused(changes, weights, codec, message):
    delays = (0,) * (1 + changes.get("n_q", 16))
    model = dataclasses.replace(MODEL, **changes, delays=delays)
    trained_with = None if codec is None else {"name": "mine", "digest": codec}
    with pytest.raises(InputError, match=message):
        corpora.fit_model(model, CODEC, TEXT, weights, trained_with)
