"""Hugging Face's layout arrives like Kyutai's, and its configurations and tensors are checked."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers.comparing import same
from tests.helpers.converting import arrives, info_of, nightly, refused
from ttt_jax.checkpoints import safetensors_reader
from ttt_jax.convert import export, kyutai
from ttt_jax.convert.from_huggingface import _interleaved

C = files.config()


def huggingface(folder, kind="F32", c=C, **changes):
    """The model of `plain` as transformers stores it."""
    return files.write(folder, files.huggingface_config(c, **changes), files.huggingface(files.weights(c, kind), c))


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("shards", nightly(4, 0))
def test_hugging_faces_layout_arrives_bit_for_bit(tmp_path, plain, shards):
    source = huggingface(tmp_path / "source")
    if shards:
        files.shard(source, shards)
    arrives(source, plain)
    about = info_of(tmp_path / "source-ours")["source"]
    assert about["mimi"] == "hf://kyutai/moshiko-pytorch-bf16/tokenizer-e351c8d8-checkpoint125.safetensors"
    assert about["config"] == files.huggingface_config(C)
    export(tmp_path / "source-ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), files.fuse(files.weights(C)))
    config = info_of(tmp_path / "back")
    assert {key: config[key] for key in C} == C


@pytest.mark.parametrize(
    ("kind", "changes"),
    nightly(
        ("BF16", {"n_q": 8, "dep_q": 4, "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "num_heads": 4}),
        ("F16", {"n_q": 6, "dep_q": 3, "delays": [0, 0, 1, 1, 0, 1, 1], "num_heads": 1, "depformer_num_heads": 1}),
        ("F32", {"dim": 24, "num_heads": 2, "max_period": 100000, "depformer_num_layers": 1, "num_layers": 3}),
    ),
)
def test_both_layouts_of_other_sizes_and_types_arrive_alike(tmp_path, kind, changes):
    c = files.config(**changes)
    kyutai(files.write(tmp_path / "kyutais", c, files.weights(c, kind)), tmp_path / "one")
    kyutai(huggingface(tmp_path / "theirs", kind, c), tmp_path / "other")
    one, other = (info_of(tmp_path / name) for name in ("one", "other"))
    for key in ("files", "model", "digest"):
        assert one[key] == other[key]


def test_what_hugging_face_has_beyond(tmp_path, plain):
    source = huggingface(tmp_path / "source", torch_dtype="bfloat16", rope_parameters={"rope_theta": 10000})
    w = load_file(source / "model.safetensors")
    w["audio_encoder.encoder.layers.0.conv.weight"] = np.zeros((3, 1, 7), ml_dtypes.bfloat16)
    w["audio_encoder.encoder_transformer.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    w["decoder.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(w, source / "model.safetensors")
    (source / "generation_config.json").write_text("{}")
    arrives(source, plain, "audio_encoder.* (2 tensors) is Mimi, the codec", "inv_freq (1 tensors) follows from")


def test_hugging_faces_layout_with_a_prefix_adapters_and_without_defaults(tmp_path, plain):
    w = {f"_orig_mod.{key}": array for key, array in files.huggingface(files.weights(C), C).items()}
    defaults = ("head_dim", "num_key_value_heads", "hidden_act", "architectures", "audio_vocab_size", "rope_theta")
    c = without(files.huggingface_config(C), *defaults)
    c["depth_decoder_config"] = without(c["depth_decoder_config"], "rms_norm_eps", "model_type")
    source = files.write(tmp_path / "source", c, w)
    arrives(source, plain, "start with _orig_mod., which is left out")
    a = files.lora(C, 2)
    save_file(a, tmp_path / "lora.safetensors")
    for name in (source, files.write(tmp_path / "kyutais", C, files.weights(C))):
        kyutai(name, tmp_path / f"{name.name}-merged", lora=tmp_path / "lora.safetensors", merge_lora=True)
    one, other = (info_of(tmp_path / f"{name}-merged") for name in ("source", "kyutais"))
    assert one["files"] == other["files"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 instead of 2"),
        ({"head_dim": 4}, "head_dim=4 instead of 8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' instead of 'silu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 instead of 1e-08"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True instead of False"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaled positions"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled positions"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_codebooks": 0}, "describes no model that can be"),
        ({"num_codebooks": 10**30}, "more codebooks than Mimi's 32"),
        ({"num_hidden_layers": 10**30}, "has 1000000000000000000000000000000 layers, as it holds only"),
        ({"rope_theta": "far"}, "rope_theta is 'far'"),
        ({"depth_decoder_config": 3}, "depth_decoder_config is 3"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 instead of 1.0"),
        ({"attention_bias": True}, "attention_bias=True instead of False"),
        ({"ffn_dim": 89}, "ffn_dim is 89, but must be even"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, but must be 1 or more"),
        ({"hidden_size": 0}, "hidden_size is 0, but must be 1 or more"),
    ],
)
def test_what_of_hugging_faces_configurations_is_refused(tmp_path, changes, words):
    refused(huggingface(tmp_path / "source", **changes), str(tmp_path / "source" / "config.json"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 1}, "a window in the depth transformer (depth_decoder_config.sliding_window=1)"),
        ({"rms_norm_eps": 1e-6}, "depth_decoder_config.rms_norm_eps=1e-06"),
        ({"num_hidden_layers": 2.0}, "depth_decoder_config.num_hidden_layers is 2.0"),
        ({"num_codebooks": 3}, "depth_decoder_config.num_codebooks is 3, but num_codebooks is 2"),
        ({"vocab_size": 5}, "depth_decoder_config.vocab_size is 5, but vocab_size is 9"),
        ({"audio_vocab_size": 5}, "depth_decoder_config.audio_vocab_size is 5, but audio_vocab_size is 6"),
        ({"input_size": 8}, "depth_decoder_config.input_size is 8, but hidden_size is 16"),
        ({"ffn_dim": 43}, "depth_decoder_config.ffn_dim is 43, but must be even"),
        ({"num_attention_heads": 0}, "depth_decoder_config.num_attention_heads is 0, but must be 1 or more"),
        ({"attention_bias": True}, "depth_decoder_config.attention_bias=True instead of False"),
    ],
)
def test_what_of_hugging_faces_depth_configurations_is_refused(tmp_path, changes, words):
    depth = files.huggingface_config(C)["depth_decoder_config"] | changes
    refused(huggingface(tmp_path / "source", depth_decoder_config=depth), words)


def test_hugging_faces_tensors_that_do_not_fit_are_named_as_theirs(tmp_path):
    source = huggingface(tmp_path / "source")
    w = load_file(source / "model.safetensors")
    del w["decoder.model.layers.1.self_attn.k_proj.linear.weight"]
    w["depth_decoder.lm_heads.weight"] = w["depth_decoder.lm_heads.weight"][:, 1:].copy()
    w["depth_decoder.layers.0.mlp.fc3.weight"] = np.zeros((2, 2), np.float32)
    w["decoder.lm_head.weight"] = w["decoder.lm_head.weight"].astype(np.float16)
    save_file(w, source / "model.safetensors")
    refused(
        source,
        f"model.safetensors does not fit {source / 'config.json'}",
        "lacks decoder.model.layers.1.self_attn.k_proj.linear.weight",
        "has depth_decoder.layers.0.mlp.fc3.weight, which the model does not have",
        "has depth_decoder.lm_heads.weight of shape [2, 5, 8] instead of [2, 6, 8]",
        "has decoder.lm_head.weight as F16 where the others are F32",
    )


def test_a_config_and_weights_of_two_layouts(tmp_path, source):
    theirs = huggingface(tmp_path / "theirs")
    refused(theirs, "has the names of Hugging Face's", "--config", config=source / "config.json")
    refused(source, "describes Hugging Face's MoshiForConditionalGeneration", config=theirs / "config.json")
    (theirs / "config.json").unlink()
    refused(theirs, "has the names of Hugging Face's", "--config")


@pytest.mark.parametrize("block", [1, 64, 1000])
@pytest.mark.parametrize("unit", [1, 24, 128])
def test_rows_of_heads_are_put_back_in_blocks_of_any_size(monkeypatch, block, unit):
    monkeypatch.setattr(safetensors_reader, "BLOCK", block)
    rows = np.arange(3 * 8 * 6, dtype=np.float32).reshape(24, 6)  # 3 heads of 8 rows of 24 bytes
    piece = _interleaved(safetensors_reader.of_array(rows.nbytes, lambda: rows), 3, 24)
    blocks = [bytes(view) for view in piece.blocks(unit)]
    assert all(len(one) % unit == 0 for one in blocks[:-1])
    assert len(blocks) > 1 or block > 24 * 8
    got = np.frombuffer(b"".join(blocks), np.float32).reshape(3, 4, 2, 6)
    for head in range(3):
        for pair in range(4):
            np.testing.assert_array_equal(got[head, pair], rows[head * 8 + np.array([pair, 4 + pair])])
