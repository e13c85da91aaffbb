"""What of a Mimi is refused, in one sentence, with nothing left behind; and damage of our file."""

import functools

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from tests.helpers import converting, kyutai_files, mimi_files
from tests.helpers.converting import nightly
from tests.helpers.damage import attempt
from ttt_jax.codec.mimi import file
from ttt_jax.convert import export, kyutai, mimi
from ttt_jax.errors import InputError

FIRST, SECOND = (book + "_codebook." for book in mimi_files.CODEBOOKS[:2])
CONV = "encoder.model.3.conv.conv.weight"


refused = functools.partial(converting.refused, out="ours.safetensors", call=mimi)


@pytest.fixture
def source(tmp_path):
    """A sound source."""
    return mimi_files.write(tmp_path / "source")


def test_a_language_model_is_no_mimi_and_a_mimi_no_language_model(tmp_path):
    c = kyutai_files.config()
    folder = kyutai_files.write(tmp_path / "kyutai", c, kyutai_files.weights(c), codec=mimi_files.weights())
    refused(folder / "model.safetensors", "model.safetensors is no Mimi, as none of its", "give Kyutai's file")
    words = "codec.safetensors is a Mimi, the audio codec: convert it by `python -m ttt_jax.convert mimi SOURCE OUT`"
    refused(folder / "codec.safetensors", words, out="ours", call=kyutai)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seanet.n_residual_layers", 3, "seanet.n_residual_layers=3 instead of 1"),
        ("seanet.norm", "layer_norm", "seanet.norm='layer_norm'"),
        ("seanet.pad_mode", "reflect", "seanet.pad_mode='reflect' instead of 'constant'"),
        ("seanet.pad_mode", ..., "seanet.pad_mode='reflect'"),
        ("seanet.activation", "ReLU", "seanet.activation='ReLU'"),
        ("seanet.activation_params", {"alpha": 0.5}, "seanet.activation_params"),
        ("seanet.causal", False, "seanet.causal=False"),
        ("seanet.true_skip", False, "seanet.true_skip=False"),
        ("seanet.channels", 2, "seanet.channels=2"),
        ("seanet.lstm", 2, "unknown keys (seanet.lstm)"),
        ("channels", 2, "channels=2 instead of 1"),
        ("resample_method", "conv", "unknown keys (resample_method)"),
        ("transformer.gating", "silu", "transformer.gating='silu'"),
        ("transformer.positional_embedding", "sin", "transformer.positional_embedding='sin'"),
        ("transformer.causal", False, "transformer.causal=False"),
        ("transformer.conv_layout", False, "transformer.conv_layout=False"),
        ("transformer.norm", "rms_norm_f32", "transformer.norm='rms_norm_f32'"),
        ("transformer.layer_scale", None, "transformer.layer_scale=None"),
        ("transformer.kv_repeat", 2, "transformer.kv_repeat=2"),
        ("transformer.cross_attention", True, "transformer.cross_attention=True"),
        ("transformer.input_dimension", 16, "transformer.input_dimension=16 instead of 32"),
        ("transformer.output_dimensions", [16], "transformer.output_dimensions=[16] instead of [32]"),
        ("transformer.d_model", 16, "transformer.d_model=16 instead of 32"),
        ("transformer.context", None, "transformer.context is None"),
        ("transformer.num_layers", ..., "has no transformer.num_layers"),
        ("quantizer.n_q_semantic", 2, "quantizer.n_q_semantic=2 instead of 1"),
        ("quantizer.input_dimension", None, "quantizer.input_dimension=None instead of 32"),
        ("quantizer.n_q", 1, "describes no model that can be"),
        ("quantizer", 3, "quantizer is 3"),
        ("seanet", ..., "has no seanet"),
        ("frame_rate", 25, "frame_rate is 25, but must divide the 25 latents"),
        ("frame_rate", 10, "frame_rate is 10, but must divide the 25 latents"),
        ("frame_rate", float("nan"), "frame_rate is nan"),
        ("frame_rate", 0, "frame_rate is 0"),
        ("sample_rate", "fast", "sample_rate is 'fast'"),
        ("seanet.ratios", [8, 0], "describes no model that can be"),
        ("seanet.n_filters", 3, "describes no model that can be"),
        ("seanet.n_filters", 10**400, "filters must be 2147483647 or less"),
        ("transformer.num_layers", 10**9, "which has 1000000000 layers or codebooks, as it holds only"),
        ("transformer.num_heads", 5, "describes no model that can be"),
    ],
)
def test_what_of_kyutais_configuration_is_refused(tmp_path, key, value, words):
    source = mimi_files.write(tmp_path / "source", c=mimi_files.config(**{key: value}))
    refused(source, "codec.json", words)


def test_several_at_once(tmp_path):
    c = mimi_files.config(**{"seanet.pad_mode": "reflect", "transformer.gating": "silu", "extra": 1})
    refused(mimi_files.write(tmp_path / "source", c=c), "seanet.pad_mode", "transformer.gating", "unknown keys (extra)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_residual_layers": 2}, "num_residual_layers=2 instead of 1"),
        ({"use_causal_conv": False}, "use_causal_conv=False"),
        ({"trim_right_ratio": 0.5}, "trim_right_ratio=0.5"),
        ({"use_conv_shortcut": True}, "use_conv_shortcut=True"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect'"),
        ({"num_semantic_quantizers": 2}, "num_semantic_quantizers=2"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 instead of 4"),
        ({"head_dim": 4}, "head_dim=4 instead of 8"),
        ({"upsample_groups": 1}, "upsample_groups=1 instead of 32"),
        ({"codebook_dim": None}, "codebook_dim=None instead of 16"),
        ({"vector_quantization_hidden_dimension": 32, "codebook_dim": 32}, "no projections of the quantizer"),
        ({"audio_channels": 2}, "audio_channels=2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"decoder_config": None}, "decoder_config=null"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"frame_rate": 25}, "frame_rate is 25"),
        ({"num_attention_heads": 0}, "must be 1 or more"),
        ({"upsampling_ratios": [8, 0]}, "describes no model that can be"),
        ({"num_hidden_layers": 10**9}, "which has 1000000000 layers or codebooks"),
    ],
)
def test_what_of_hugging_faces_configuration_is_refused(tmp_path, changes, words):
    refused(mimi_files.write_huggingface(tmp_path / "source", **changes), "config.json", words)


def without(name):
    return lambda w: {key: array for key, array in w.items() if key != name}


def changed(name, change):
    return lambda w: {**w, name: change(w[name])}


def nan(array):
    array = array.copy()
    array.flat[3] = np.nan
    return array


CHANGES = {
    "missing": (without(CONV), [f"lacks {CONV}"]),
    "left over": (
        lambda w: w | {"more.weight": np.zeros(2, np.float32)},
        ["has more.weight, which the model does not"],
    ),
    "several": (
        lambda w: without(CONV)(w) | {"more.weight": np.zeros(2, np.float32)},
        [f"lacks {CONV}", "has more.weight"],
    ),
    "another shape": (changed(CONV, lambda a: a[:, :, 1:]), [f"has {CONV} of shape [8, 4, 7] instead of [8, 4, 8]"]),
    "another type": (changed(CONV, lambda a: a.astype(np.float64)), [f"has {CONV} as F64 where the others are F32"]),
    "all of another type": (
        lambda w: {name: array.astype(np.float64) for name, array in w.items()},
        ["has weights of type F64"],
    ),
    "not finite": (changed(CONV, nan), [f"{CONV} holds NaN or infinite numbers"]),
    "a sum that is not finite": (changed(SECOND + "embedding_sum", nan), [f"{SECOND}embedding_sum holds NaN"]),
    "never trained": (changed(SECOND + "_initialized", lambda a: 0 * a), [f"{SECOND}_initialized=0 instead of 1"]),
    "half of weight norm": (
        lambda w: without(CONV)(w) | {CONV + "_v": w[CONV]},
        [f"lacks {CONV}_g"],
    ),
    "both names": (lambda w: w | {SECOND + "embed_sum": w[SECOND + "embedding_sum"]}, ["twice", "embed_sum"]),
    "too large": (
        lambda w: {
            **w,
            SECOND + "cluster_usage": 0 * w[SECOND + "cluster_usage"],
            SECOND + "embedding_sum": w[SECOND + "embedding_sum"] + np.float32(1e37),
        },
        ["has NaN or infinite numbers in quantizer/acoustic/codebooks"],
    ),
    "a norm of 0": (
        lambda w: without(CONV)(w) | {CONV + "_v": 0 * w[CONV], CONV + "_g": np.ones((8, 1, 1), np.float32)},
        ["has NaN or infinite numbers in encoder/0/down/w"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_of_kyutais_tensors_is_refused(tmp_path, name):
    change, words = CHANGES[name]
    refused(mimi_files.write(tmp_path / "source", change(mimi_files.weights())), mimi_files.NAME, *words)


def test_what_of_hugging_faces_tensors_is_refused(tmp_path):
    source = mimi_files.write_huggingface(tmp_path / "source")
    w = load_file(source / "model.safetensors")
    key, flag = "encoder_transformer.layers.1.self_attn.k_proj.weight", FIRST + "_initialized"
    save_file(without(key)(w), source / "model.safetensors")
    refused(source, f"lacks {key}")
    save_file(changed(key, nan)(w), source / "model.safetensors")
    refused(source, f"{key} holds NaN")
    untrained = mimi_files.huggingface(changed(flag, lambda a: 0 * a)(mimi_files.weights()))
    save_file(untrained, source / "model.safetensors")
    refused(source, "model.safetensors", "a codebook that was never trained")


def test_files_and_configurations_that_do_not_belong_together(tmp_path, source):
    refused(source, "num_codebooks=9 is no number of codebooks", num_codebooks=9)
    refused(source, "num_codebooks=0", num_codebooks=0)
    alone = mimi_files.write(tmp_path / "alone", c=None)
    refused(alone, "does not fit Kyutai's Mimi, as it has other sizes: give its mimi_config.json by --config")
    theirs = mimi_files.write_huggingface(tmp_path / "theirs")
    refused(source, "describes Hugging Face's MimiModel, whose names", config=theirs / "config.json")
    (theirs / "config.json").unlink()
    refused(theirs, f"has no {mimi_files.NAME}")
    refused(theirs / "model.safetensors", "has the names of Hugging Face's MimiModel, but no config.json")
    (source / "codec.json").write_text("[1]")
    refused(source, "codec.json holds no object")
    (source / "codec.json").unlink()
    refused(source, "has no codec.json: put the configuration of Mimi there")
    (source / mimi_files.NAME).unlink()
    refused(source, f"has no {mimi_files.NAME}: put Kyutai's file of Mimi there")


def test_out_must_be_a_new_file(tmp_path, source):
    refused(source, "source exists already: give a new file", out="source")
    refused(source, "ours does not end in .safetensors", out="ours")
    refused(source, "no is no folder", out="no/ours.safetensors")
    mimi(source, tmp_path / "ours.safetensors")
    refused(source, "ours.safetensors exists already")
    refused(tmp_path / "ours.safetensors", "was converted already", out="other.safetensors")
    refused(tmp_path / "ours.safetensors", "source is not empty", out="source", call=export)
    refused(tmp_path / "ours.safetensors", "leave out other options", out="back", call=export, merge_lora=True)
    refused(source / mimi_files.NAME, "has format None in its metadata", out="back", call=export)


def test_a_mimi_that_does_not_fit_stops_the_model_beside_it(tmp_path, source):
    c = kyutai_files.config(mimi_config_name="codec.json")
    kyutai_files.write(source, c, kyutai_files.weights(c))
    save_file(without(CONV)(mimi_files.weights()), source / mimi_files.NAME)
    refused(source, f"lacks {CONV}", out="ours", call=kyutai)


def test_a_mimi_that_the_hub_does_not_give_is_left_out_with_a_note(tmp_path, source, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    c = kyutai_files.config(mimi_name=f"hf://some/one/{mimi_files.NAME}")
    (source / mimi_files.NAME).unlink()
    kyutai_files.write(source, c, kyutai_files.weights(c))

    def download(*args, **options):
        raise hub.utils.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    plan = kyutai(source, tmp_path / "ours", dry_run=True)
    assert any("Mimi is left out" in note and "could not be had from the hub" in note for note in plan.notes)


# Our file


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a file of ours."""
    folder = tmp_path_factory.mktemp("sound")
    mimi(mimi_files.write(folder / "source"), folder / "ours.safetensors")
    return (folder / "ours.safetensors").read_bytes()


def unread(path, *words):
    with pytest.raises(InputError) as caught:
        file.read(path)
    message = str(caught.value)
    for text in (str(path), *words):
        assert text in message, message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("seed", nightly(*range(8)))
def test_a_flipped_bit_among_the_numbers_is_found(tmp_path, sound, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "ours.safetensors"
    start = 8 + int.from_bytes(sound[:8], "little")
    for _ in range(4):
        content = bytearray(sound)
        content[int(rng.integers(start, len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        unread(path, "is damaged, as its content has the digest")


def test_a_flipped_bit_in_the_header_gives_one_sentence_or_the_same_codes(tmp_path, sound):
    path, rng = tmp_path / "ours.safetensors", np.random.default_rng(0)
    path.write_bytes(sound)
    digest = file.read(path).digest
    for at in rng.integers(0, 8 + int.from_bytes(sound[:8], "little"), 60):
        content = bytearray(sound)
        content[int(at)] ^= 1 << int(rng.integers(7))
        path.write_bytes(content)
        found = attempt(file.read, path)
        assert found is None or found.digest == digest


def test_a_file_cut_off_empty_or_absent(tmp_path, sound):
    path = tmp_path / "ours.safetensors"
    unread(path, "is not a file")
    for length in (0, 5, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        unread(path, "is damaged or no safetensors file")
    path.write_bytes(sound + b"x")
    unread(path, "is damaged or no safetensors file")


@pytest.fixture
def rewritten(tmp_path, sound):
    """A function that writes a file of ours with other metadata (`...` removes a key) or tensors."""
    path = tmp_path / "ours.safetensors"
    path.write_bytes(sound)
    content = file.read(path)

    def write(change=lambda params: params, **metadata):
        given = {key: value for key, value in {**content.metadata, **metadata}.items() if value is not ...}
        path.write_bytes(save({name: array.copy() for name, array in change(content.params).items()}, given))
        return path

    return write, content


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "ttt_jax.mimi/2"}, "has format 'ttt_jax.mimi/2' in its metadata, expected 'ttt_jax.mimi/1'"),
        ({"format": ...}, "has format None"),
        ({"name": ..., "use": ...}, "lacks name, use in its metadata"),
        ({"config": "{"}, "config is not JSON"),
        ({"config": "[" * 99999}, "config is not JSON"),
        ({"config": "{}"}, "does not fit its configuration"),
        ({"config": '{"dim": -1}'}, "config is wrong: mimi.dim=-1 is not a size: give 1 or more"),
        ({"config": '{"num_layers": 1000000000}'}, "has 104 tensors only"),
        ({"use": '{"dtype": "int8"}'}, "use: dtype is 'int8'"),
        ({"use": '{"num_codebooks": 9}'}, "num_codebooks=9"),
        ({"use": '{"speed": 9}'}, 'the key "speed"'),
        ({"use": '{"window": "reference"}'}, "is damaged, as its content has the digest"),
        ({"digest": "0"}, "its metadata state 0"),
    ],
)
def test_metadata_that_are_refused(rewritten, metadata, words):
    write, _ = rewritten
    unread(write(**metadata), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("encoder/last/w"), "lacks encoder/last/w"),
        (lambda params: params | {"more": np.zeros(1, np.float32)}, "has more, which no Mimi has"),
        (changed("encoder/last/w", lambda a: a[1:]), "has encoder/last/w of shape [31, 3, 64] instead of [32, 3, 64]"),
        (changed("encoder/last/w", lambda a: a.astype(np.float64)), "has encoder/last/w as F64 instead of F32"),
        (changed("encoder/last/w", np.negative), "is damaged, as its content has the digest"),
    ],
)
def test_tensors_that_are_refused(rewritten, change, words):
    write, _ = rewritten
    unread(write(change), words)


def test_numbers_that_are_not_finite_are_refused_whatever_the_digest(rewritten):
    write, content = rewritten
    spoiled = changed("encoder/last/w", nan)
    digest = file._digest(spoiled(content.params), content.cfg, content.use)
    unread(write(spoiled, digest=digest), "has NaN or infinite numbers in encoder/last/w")


def test_what_is_made_is_checked(rewritten):
    _, content = rewritten
    for change in (without("encoder/last/w"), changed("encoder/last/w", nan), changed("upsample/w", np.float64)):
        with pytest.raises(InputError, match="here"):
            file.make(change(content.params), content.cfg, content.use, licence="unknown", source="here")
