"""Mimi arrives from Kyutai's layout and Hugging Face's, and goes back, bit for bit."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files, mimi_files
from tests.helpers.comparing import same
from tests.helpers.converting import assert_one_sentence, change_config, info_of
from tests.helpers.in_process import command
from ttt_jax.checkpoints import weights
from ttt_jax.codec.mimi import file
from ttt_jax.codec.mimi.config import MimiConfig, Use
from ttt_jax.convert import export, kyutai, mimi
from ttt_jax.errors import InputError

CFG = MimiConfig(
    filters=4, dim=32, num_layers=2, num_heads=4, hidden=64, context=10, quantizer_dim=16, codebooks=8, cardinality=64
)
"""Sizes of the fixture."""
FIRST, LAST = mimi_files.CODEBOOKS[0] + "_codebook.", mimi_files.CODEBOOKS[7] + "_codebook."


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What the fixture's file in Kyutai's layout gives."""
    folder = tmp_path_factory.mktemp("mimi")
    mimi(mimi_files.write(folder / "source"), folder / "ours.safetensors")
    return file.read(folder / "ours.safetensors")


def arrives(source, ours, *notes, **options):
    """Converts `source` and requires the digest and every bit of `ours`, and a note for each of `notes`."""
    out = source.parent / f"{source.stem}-ours.safetensors"
    plan = mimi(source, out, **options)
    found = file.read(out)
    assert found.digest == ours.digest == plan.mimi.digest
    same(found.params, ours.params)
    assert len(plan.notes) == len(notes), plan.notes
    for note, words in zip(plan.notes, notes, strict=True):
        assert words in note


def test_what_the_file_says(ours):
    assert (ours.cfg, ours.use, ours.name) == (CFG, Use(), "mimi-8x64")
    assert ours.metadata["source"] == mimi_files.NAME
    assert ours.metadata["licence"] == "unknown"


def test_codebooks_are_sums_over_usage_in_float32(tmp_path, ours):
    w = mimi_files.weights()
    w[LAST + "cluster_usage"][3] = 1e-7  # less than moshi divides by
    mimi(mimi_files.write(tmp_path / "source", w), tmp_path / "ours.safetensors")
    books = file.read(tmp_path / "ours.safetensors").params["quantizer/acoustic/codebooks"]
    expected = w[LAST + "embedding_sum"][3] / np.float32(1e-5)
    np.testing.assert_array_equal(books[6, 3], expected)
    others = w[LAST + "embedding_sum"][:3] / w[LAST + "cluster_usage"][:3, None]
    assert others.dtype == np.float32
    np.testing.assert_array_equal(books[6, :3], others)
    first = ours.params["quantizer/semantic/codebooks"]
    assert first.shape == (1, 64, 16)
    np.testing.assert_array_equal(first[0, 5], w[FIRST + "embedding_sum"][5] / w[FIRST + "cluster_usage"][5])


def test_where_the_numbers_of_convolutions_lie(ours):
    w = mimi_files.weights()
    down = w["encoder.model.6.conv.conv.weight"]  # [out, in, kernel]
    assert ours.params["encoder/1/down/w"][11, 2, 5] == down[11, 5, 2]
    assert ours.params["encoder/1/down/b"][11] == w["encoder.model.6.conv.conv.bias"][11]
    assert ours.params["encoder/last/w"][7, 1, 60] == w["encoder.model.14.conv.conv.weight"][7, 60, 1]
    assert ours.params["decoder/3/residual/wide/w"][3, 0, 1] == w["decoder.model.12.block.3.conv.conv.weight"][3, 1, 0]
    assert ours.params["downsample/w"][30, 3, 2] == w["downsample.conv.conv.conv.weight"][30, 2, 3]
    assert ours.params["quantizer/acoustic/input"][9, 4] == w["quantizer.rvq_rest.input_proj.weight"][9, 4, 0]


@pytest.mark.parametrize(
    ("ours_name", "theirs", "ratio"),
    [
        ("decoder/1/up/w", "decoder.model.5.convtr.convtr.weight", 6),
        ("upsample/w", "upsample.convtr.convtr.convtr.weight", 2),
    ],
)
def test_transposed_convolutions_add_the_input_before_and_the_present_one(ours, ours_name, theirs, ratio):
    w, theirs = ours.params[ours_name], mimi_files.weights()[theirs]  # theirs [in, out, 2 ratio]
    x = np.random.default_rng(0).normal(size=(len(theirs), 4)).astype(np.float32)
    full = np.zeros((5 * ratio, *theirs.shape[:2]))  # what each input adds to each output
    for n in range(4):
        for k in range(2 * ratio):
            full[n * ratio + k] += x[:, n, None] * theirs[:, :, k]
    before = np.pad(x, ((0, 0), (1, 0)))[:, :4]
    both = np.stack([before, x])  # [2, in, n]
    found = np.einsum("jti,tin->nji", w, both) if w.ndim == 3 else np.einsum("joti,tin->njo", w, both)
    expected = full[: 4 * ratio].reshape(4, ratio, *theirs.shape[:2])
    expected = expected[..., 0] if w.ndim == 3 else expected.sum(2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def in_memory(w):
    """As `state_dict()` names attention's maps."""
    names = {"in_proj_weight": "in_projs.0.weight", "out_proj.weight": "out_projs.0.weight"}
    for old, new in names.items():
        w = {name.replace(f"self_attn.{old}", f"self_attn.{new}"): array for name, array in w.items()}
    return w


def old_names(w):
    """As former versions of moshi name what belongs to a codebook."""
    names = {"_initialized": "inited", "cluster_usage": "cluster_size", "embedding_sum": "embed_avg"}
    found = {}
    for name, array in w.items():
        stem, _, last = name.rpartition(".")
        last = names.get(last, last)
        found[f"{stem}.{'embed_sum' if stem == FIRST[:-1] and last == 'embed_avg' else last}"] = array
    return found


LAYOUTS = {
    "a state_dict": (in_memory, []),
    "old names": (old_names, []),
    "a prefix": (lambda w: {f"mimi._orig_mod.{name}": array for name, array in w.items()}, ["start with mimi"]),
    "what training needs": (lambda w: w | {"wavlm_proj.weight": np.ones(3, np.float32)}, ["wavlm_* (1 tensors)"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_kyutais_layouts_arrive_bit_for_bit(tmp_path, ours, name):
    change, notes = LAYOUTS[name]
    arrives(mimi_files.write(tmp_path / "source", change(mimi_files.weights())), ours, *notes)


def test_hugging_faces_layout_arrives_bit_for_bit(tmp_path, ours):
    source = mimi_files.write_huggingface(tmp_path / "source")
    arrives(source, ours)
    kyutai_files.shard(source)
    out = tmp_path / "shards.safetensors"
    mimi(source, out)
    assert file.read(out).digest == ours.digest


def test_hugging_faces_configurations_of_several_versions(tmp_path, ours):
    changes = {"frame_rate": ..., "_frame_rate": None, "rope_theta": ..., "head_dim": None, "use_cache": True}
    c = mimi_files.huggingface_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **changes)
    source = mimi_files.write_huggingface(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({key: value for key, value in c.items() if value is not ...}))
    arrives(source, ours)


def test_a_file_alone_with_its_configuration(tmp_path, ours):
    (tmp_path / "mimi_config.json").write_text(json.dumps(mimi_files.CONFIG))
    source = mimi_files.write(tmp_path / "one", c=None) / mimi_files.NAME
    arrives(source, ours, config=tmp_path / "mimi_config.json")
    beside = mimi_files.write(tmp_path / "two", c=None)
    (beside / "mimi_config.json").write_text(json.dumps(mimi_files.CONFIG))
    arrives(beside, ours)


def test_weight_norm_is_folded(tmp_path, ours):
    w, rng = mimi_files.weights(), np.random.default_rng(0)
    normed = ("encoder.model.3.conv.conv.weight", "decoder.model.2.convtr.convtr.weight")
    for name in normed:
        array = w.pop(name)
        scale = rng.uniform(0.5, 2, (len(array), 1, 1)).astype(np.float32)  # of which weights do not depend
        w |= {name + "_v": array * scale, name + "_g": np.sqrt(np.square(array).sum((1, 2), keepdims=True))}
    source = mimi_files.write(tmp_path / "source", w, mimi_files.config(**{"seanet.norm": "weight_norm"}))
    plan = mimi(source, tmp_path / "ours.safetensors")
    assert plan.notes == ("weight norm of 2 convolutions is folded into their weights",)
    found = file.read(tmp_path / "ours.safetensors").params
    for name in ("encoder/0/down/w", "decoder/0/up/w"):
        np.testing.assert_allclose(found[name], ours.params[name], rtol=1e-6)
        assert not np.array_equal(found[name], 0 * found[name])
    for name in found.keys() - {"encoder/0/down/w", "decoder/0/up/w"}:
        np.testing.assert_array_equal(found[name], ours.params[name])


def test_half_precision_is_widened(tmp_path):
    w = {name: array.astype(np.float16) for name, array in mimi_files.weights().items()}
    mimi(mimi_files.write(tmp_path / "source", w), tmp_path / "ours.safetensors")
    wide = {name: array.astype(np.float32) for name, array in w.items()}
    mimi(mimi_files.write(tmp_path / "wide", wide), tmp_path / "wide.safetensors")
    assert file.read(tmp_path / "ours.safetensors").digest == file.read(tmp_path / "wide.safetensors").digest


def test_use_counts_for_the_digest(tmp_path, ours):
    source = mimi_files.write(tmp_path / "source")
    digests = {}
    for name, use in {
        "few": {"num_codebooks": 3},
        "half": {"dtype": "bfloat16"},
        "ring": {"window": "reference"},
    }.items():
        mimi(source, tmp_path / f"{name}.safetensors", **use)
        found = file.read(tmp_path / f"{name}.safetensors")
        assert found.use == Use(**use)
        digests[name] = found.digest
    assert len({ours.digest, *digests.values()}) == 4


def test_the_way_back(tmp_path, ours):
    file.write(tmp_path / "ours.safetensors", ours)
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {mimi_files.NAME, "mimi_config.json", "README.md"}
    arrives(tmp_path / "back", ours)
    w, back = mimi_files.weights(), load_file(tmp_path / "back" / mimi_files.NAME)
    assert {name: array.shape for name, array in back.items()} == {name: array.shape for name, array in w.items()}
    for name, array in back.items():
        if "_codebook" not in name:
            np.testing.assert_array_equal(array, w[name], err_msg=name)
        elif not name.endswith("embedding_sum"):
            assert (array == 1).all()
    c = json.loads((tmp_path / "back" / "mimi_config.json").read_text())
    no_effect = {"dilation_base", "disable_norm_outer_blocks"}
    assert c["seanet"] == {key: value for key, value in mimi_files.CONFIG["seanet"].items() if key not in no_effect}
    assert {**c, "seanet": 0} == {**mimi_files.CONFIG, "seanet": 0}


def test_licence_and_origin_travel(tmp_path):
    source = mimi_files.write(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    mimi(source, tmp_path / "ours.safetensors")
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    text = (tmp_path / "back" / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\n---\n")
    assert mimi_files.NAME in text
    mimi(tmp_path / "back", tmp_path / "again.safetensors")
    assert file.read(tmp_path / "again.safetensors").metadata["licence"] == "cc-by-4.0"


def test_the_command_line(tmp_path, ours, monkeypatch):
    mimi_files.write(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    run = functools.partial(command, "ttt_jax.convert")
    done = run("mimi", "source", "m.safetensors", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"digest        {ours.digest}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    options = ["--num-codebooks", "4", "--dtype", "bfloat16", "--window", "reference", "--config", "source/codec.json"]
    assert run("mimi", "source", "m.safetensors", *options).returncode == 0
    assert file.read("m.safetensors").use == Use(4, "bfloat16", "reference")
    assert run("export", "m.safetensors", "back", "--dry-run").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "m.safetensors"}
    assert run("export", "m.safetensors", "back").returncode == 0
    mimi("back", "again.safetensors")
    assert file.read("again.safetensors").digest == ours.digest
    assert_one_sentence(run("export", "m.safetensors", "other", "--dtype", "bfloat16"), "leave out other options")
    assert_one_sentence(run("mimi", "nowhere", "other.safetensors"), "nowhere is no folder or file here")


# Beside a language model


@pytest.fixture
def model(tmp_path):
    """A language model of Kyutai's with its Mimi beside it."""
    c = kyutai_files.config(mimi_name=mimi_files.NAME, mimi_config_name="codec.json")
    source = kyutai_files.write(tmp_path / "source", c, kyutai_files.weights(c))
    save_file(mimi_files.weights(), source / mimi_files.NAME)
    (source / "codec.json").write_text(json.dumps(mimi_files.CONFIG))
    return source


def test_a_models_mimi_comes_with_it_and_goes_back(model, tmp_path, ours):
    plan = kyutai(model, tmp_path / "ours")
    alone = mimi(model, tmp_path / "alone.safetensors", num_codebooks=2).mimi  # n_q is 4, for two streams
    assert f"digest {alone.digest[:16]}" in "\n".join(plan.lines())
    info = weights.load(tmp_path / "ours", verify=True).info
    assert info["codec"] == {"name": "mimi-2x64", "digest": alone.digest, "file": "mimi.safetensors"}
    codec = weights.codec(tmp_path / "ours")
    assert (codec.name, codec.digest) == (alone.name, alone.digest)
    found = file.read(codec.path)
    assert found.use == alone.use
    same(found.params, ours.params)
    export(tmp_path / "ours", tmp_path / "back")
    config = info_of(tmp_path / "back")
    assert (config["mimi_name"], config["mimi_config_name"]) == (mimi_files.NAME, "codec.json")
    kyutai(tmp_path / "back", tmp_path / "again")
    assert weights.codec(tmp_path / "again").digest == alone.digest
    again = info_of(tmp_path / "again")
    assert again["codec"] == info["codec"]
    assert again["digest"] == info["digest"]


def test_a_mimi_in_a_folder_of_its_own_goes_back_beside_the_model(model, tmp_path, ours):
    (model / "codec").mkdir()
    (model / mimi_files.NAME).rename(model / "codec" / "model.safetensors")
    (model / "codec.json").rename(model / "codec" / "mimi_config.json")
    change_config(model, mimi_name="codec/model.safetensors", mimi_config_name="codec/mimi_config.json")
    kyutai(model, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    config = info_of(tmp_path / "back")
    assert (config["mimi_name"], config["mimi_config_name"]) == (mimi_files.NAME, "mimi_config.json")
    mimi(tmp_path / "back", tmp_path / "again.safetensors")
    assert file.read(tmp_path / "again.safetensors").digest == ours.digest


def test_a_folder_whose_mimi_is_lost_or_damaged_is_refused(model, tmp_path):
    kyutai(model, tmp_path / "ours")
    path, info = tmp_path / "ours" / "mimi.safetensors", info_of(tmp_path / "ours")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="mimi.safetensors has another SHA-256"):
        weights.load(tmp_path / "ours", verify=True)
    with pytest.raises(InputError, match=r"mimi.safetensors is damaged"):
        export(tmp_path / "ours", tmp_path / "back")
    path.unlink()
    with pytest.raises(InputError, match="mimi.safetensors is missing"):
        weights.load(tmp_path / "ours")
    files = {name: about for name, about in info["files"].items() if name != "mimi.safetensors"}
    change_config(tmp_path / "ours", files=files)
    with pytest.raises(InputError, match='lists no "mimi.safetensors"'):
        weights.load(tmp_path / "ours")
    change_config(tmp_path / "ours", codec={"name": 3})
    with pytest.raises(InputError, match="codec.name is 3"):
        weights.codec(tmp_path / "ours")
    change_config(tmp_path / "ours", codec=...)
    assert weights.codec(tmp_path / "ours") is None
    weights.load(tmp_path / "ours")  # as a folder of before


def test_a_dry_run_with_mimi_writes_nothing(model, tmp_path):
    kyutai(model, tmp_path / "ours", dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_without_mimi_there_is_a_note_and_no_codec(model, tmp_path):
    (model / mimi_files.NAME).unlink()
    plan = kyutai(model, tmp_path / "ours")
    assert any(f"Mimi ({mimi_files.NAME}) was not found" in note for note in plan.notes)
    assert weights.codec(tmp_path / "ours") is None
    assert "codec" not in info_of(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back" / mimi_files.NAME).exists()
