"""Conversions refuse unsupported models by name, and tensors and configurations that do not fit."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import kyutai_files as files
from tests.helpers.converting import change_config, nightly, refused
from ttt_jax.config import TTTConfig
from ttt_jax.convert import export, kyutai
from ttt_jax.errors import InputError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantize": True}, "8-bit weights (quantize=True)"),
        ({"cross_attention": True}, "cross-attention (cross_attention=True)"),
        ({"conditioners": {"description": {"type": "lut"}}}, "conditioners (conditioners=['description'])"),
        ({"conditioners": True}, "conditioners (conditioners=True)"),
        ({"fuser": {"sum": ["description"]}}, "a fuser of conditions (fuser={'sum': ['description']})"),
        ({"dep_q": 0}, "no depth transformer (dep_q=0)"),
        ({"demux_second_stream": True}, "a second text stream in the same tokens (demux_second_stream=True)"),
        ({"norm": "layer_norm"}, "another norm than rms_norm_f32 (norm='layer_norm')"),
        ({"norm": ...}, "another norm than rms_norm_f32 (norm='layer_norm')"),
        ({"positional_embedding": "sin_rope"}, "other positions than rope (positional_embedding='sin_rope')"),
        ({"depformer_pos_emb": "sin"}, "positions in the depth transformer (depformer_pos_emb='sin')"),
        ({"gating": "gelu"}, "another gating than silu (gating='gelu')"),
        ({"depformer_gating": "none"}, "in the depth transformer (depformer_gating='none')"),
        ({"layer_scale": 0.01}, "layer scales (layer_scale=0.01)"),
        ({"depformer_layer_scale": 0.01}, "layer scales in the depth transformer (depformer_layer_scale=0.01)"),
        ({"norm_emb": True}, "norms of embeddings (norm_emb=True)"),
        ({"bias_proj": True}, "biases of the heads (bias_proj=True)"),
        ({"depformer_norm": "rms_norm_f32"}, "(depformer_norm='rms_norm_f32')"),
        ({"depformer_multi_linear": False}, "one depth input for all codebooks (depformer_multi_linear=False)"),
        ({"depformer_weights_per_step": ...}, "all codebooks (depformer_weights_per_step="),
        ({"text_card_out": 5}, "another number of text tokens in the output (text_card_out=5)"),
        ({"kv_repeat": 2}, "shared keys and values (kv_repeat=2)"),
        ({"causal": False}, "attention to what comes later (causal=False)"),
        ({"context": None}, "attention without a window (context=None)"),
        ({"fuser": ["sum"]}, "a fuser of conditions (fuser=['sum'])"),
        ({"depformer_dim_feedforward": [33, 36]}, "different widths (depformer_dim_feedforward=[33, 36])"),
        ({"wings": 2, "tail": 1}, "unknown keys (tail, wings)"),
        ({"quantize": True, "norm": "layer_norm"}, "8-bit weights (quantize=True); another norm"),
        ({"causal": "x"}, "(causal='x')"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(source, changes, words):
    change_config(source, **changes)
    refused(source, "not supported yet", words, str(source / "config.json"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("transformer.layers.0.gating.linear_in.weight_scb", "8-bit weights"),
        ("transformer.layers.1.cross_attention.in_proj_weight", "cross-attention"),
        ("condition_provider.conditioners.x.embed.weight", "conditioners"),
        ("text_emb.out1.weight", "second text stream"),
        ("depformer_norms.0.alpha", "depformer_norm"),
        ("transformer.layers.0.layer_scale_1.scale", "layer_scale"),
        ("out_norm.bias", "another norm than rms_norm_f32"),
        ("text_linear.bias", "bias_proj"),
        ("emb.0.norm.weight", "norm_emb"),
        ("depformer.slices.0.emb.weight", "MLX"),
    ],
)
def test_what_only_the_tensors_give_away_is_refused_by_name(tmp_path, key, words):
    c = files.config()
    source = files.write(tmp_path / "source", c, files.weights(c) | {key: np.zeros((2, 2), np.float32)})
    refused(source, "not supported yet", words, key, "model.safetensors")


def test_weights_without_a_depth_transformer_are_refused_by_name(tmp_path):
    c = files.config()
    w = {name: array for name, array in files.weights(c).items() if not name.startswith(("depformer", "linears"))}
    refused(files.write(tmp_path / "source", c, w), "no depth transformer")


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    c = files.config()
    w = files.weights(c)
    del w["emb.2.weight"], w["linears.1.weight"]
    w["emb.9.weight"] = w["emb.0.weight"]
    w["wings.weight"] = np.zeros(3, np.float32)
    w["text_linear.weight"] = w["text_linear.weight"][1:]
    w["out_norm.alpha"] = w["out_norm.alpha"].astype(np.float16)
    refused(
        files.write(tmp_path / "source", c, w),
        "lacks emb.2.weight, linears.1.weight",
        "has emb.9.weight, wings.weight, which the model does not have",
        "has text_linear.weight of shape [8, 16] instead of [9, 16]",
        "has out_norm.alpha as F16 where the others are F32",
        "model.safetensors does not fit",
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "name",
    nightly("emb.3.weight", "transformer.layers.1.norm2.alpha", "depformer.layers.0.gating.1.linear_in.weight"),
)
def test_a_missing_and_a_left_over_tensor(tmp_path, name, fused):
    c = files.config()
    w = files.fuse(files.weights(c)) if fused else files.weights(c)
    source = files.write(tmp_path / "source", c, {k: v for k, v in w.items() if k != name})
    refused(source, f"lacks {name}")
    source = files.write(tmp_path / "source", c, w | {f"{name}.more": w[name]})
    refused(source, f"has {name}.more, which the model does not have")


def test_a_map_in_both_layouts_at_once(tmp_path):
    w = files.weights(files.config())
    both = w | {"transformer.layers.0.self_attn.in_proj_weight": w["transformer.layers.0.self_attn.in_projs.0.weight"]}
    source = files.write(tmp_path / "source", files.config(), both)
    refused(source, "transformer.layers.0.self_attn.in_projs.0.weight, which")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 32}, "has text_emb.weight of shape [10, 16] instead of [10, 32]"),
        ({"dep_q": 3}, "lacks depformer_in.2.weight, depformer_emb.1.weight"),
        ({"num_layers": 3}, "lacks transformer.layers.2."),
        ({"card": 7}, "has emb.{0-3}.weight of shape [7, 16] instead of [8, 16]"),
        ({"extra_heads_num_heads": 1}, "lacks extra_heads.0.weight"),
        ({"depformer_low_rank_embeddings": 5}, "lacks depformer_text_emb.low_rank.weight, depformer_emb.0.low_rank."),
        ({"depformer_weights_per_step_schedule": [0, 0]}, "depformer_in.1.weight, which the model does not have"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(source, changes, words):
    change_config(source, **changes)
    refused(source, "model.safetensors does not fit", str(source / "config.json"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, "is no multiple of model.num_heads=3"),
        ({"delays": [0, 1]}, "is no list of 5 delays"),
        ({"dim": "16"}, "dim is '16'"),
        ({"num_heads": ...}, "has no num_heads"),
        ({"depformer_weights_per_step_schedule": [0, 2]}, "leaves out a weight set"),
        ({"dep_q": 5}, "exceeds model.n_q=4"),
        ({"depformer_dim_feedforward": "33"}, "depformer_dim_feedforward is '33'"),
        ({"tokenizer_name": 3}, "tokenizer_name is 3"),
        ({"hidden_scale": float("nan")}, "hidden_scale is nan"),
        ({"hidden_scale": float("inf")}, "hidden_scale is inf"),
        ({"depformer_dim_feedforward": 0}, "depformer_dim_feedforward is 0"),
        ({"depformer_dim_feedforward": [-3, -3]}, "depformer_dim_feedforward is [-3, -3]"),
        ({"depformer_multi_linear": 1}, "depformer_multi_linear is 1"),
        ({"lora": "yes"}, "lora is 'yes'"),
        ({"lm_gen_config": [1]}, "lm_gen_config is [1]"),
        ({"num_layers": 10**30}, "has 1000000000000000000000000000000 layers, as it holds only"),
        ({"depformer_num_layers": 10**9}, "has 1000000000 layers in the depth transformer, as it holds only"),
        ({"extra_heads_num_heads": 10**9}, "has 1000000000 extra heads, as it holds only"),
    ],
)
def test_a_configuration_that_no_model_can_have(source, changes, words):
    change_config(source, **changes)
    refused(source, str(source / "config.json"), words)


def test_integers_are_no_weights(tmp_path):
    c = files.config()
    w = {name: array.astype(np.int8) for name, array in files.weights(c).items()}
    refused(files.write(tmp_path / "source", c, w), "has weights of type I8 instead of BF16, F16, F32")


def test_adapters_that_do_not_fit(tmp_path):
    c = files.config(lora=True, lora_rank=3)
    w, a = files.weights(c), files.lora(c, 3)
    source = files.write(tmp_path / "source", c, w)
    refused(source, "names no adapters that could be merged: give --lora FILE", merge_lora=True)
    save_file(a, tmp_path / "a.safetensors")
    change_config(source, lora_rank=4)
    refused(source, "lora_rank 4", "have rank 3", lora=tmp_path / "a.safetensors")
    change_config(source, lora_rank=3)
    b = {name: array for name, array in a.items() if "linears.0" not in name}
    save_file(b | {"wings.lora_A.weight": a["linears.0.lora_A.weight"]}, tmp_path / "b.safetensors")
    refused(
        source,
        "b.safetensors does not fit the model",
        "lacks linears.0.lora_A.weight, linears.0.lora_B.weight",
        "has wings.lora_A.weight",
        lora=tmp_path / "b.safetensors",
    )
    save_file(a | {"wings.weight": np.zeros(3, np.float32)}, tmp_path / "c.safetensors")
    refused(source, "wings.weight", lora=tmp_path / "c.safetensors")
    save_file(w, tmp_path / "d.safetensors")
    refused(source, "holds no adapters", lora=tmp_path / "d.safetensors")
    refused(source, "e.safetensors is not a file", lora=tmp_path / "e.safetensors")
    change_config(source, lora=False)
    refused(source, "names no adapters that could be merged", merge_lora=True)


@pytest.mark.parametrize("scaling", [float("nan"), 1e39, float("-inf")])
def test_a_scaling_of_adapters_that_is_no_number_is_refused(tmp_path, scaling):
    c = files.config(lora=True, lora_scaling=scaling)
    source = files.write(tmp_path / "source", c, files.weights(c), lora=files.lora(c, 3))
    for merge in (False, True):
        refused(source, f"{source / 'config.json'}: lora_scaling is {scaling}", merge_lora=merge)


@pytest.mark.parametrize(("kind", "scaling"), nightly(("F16", 1e9), ("F32", 3e38), ("BF16", 3e38), default=2))
def test_merged_weights_beyond_the_range_of_their_type(tmp_path, kind, scaling):
    c = files.config(lora=True, lora_scaling=scaling)
    a = {key: np.full_like(array, 50.0) for key, array in files.lora(c, 3).items()}
    source = files.write(tmp_path / "source", c, files.weights(c, kind), lora=a)
    path = source / "lora.safetensors"
    refused(source, f"with {path} merged holds a number beyond the range of", "leave out --merge-lora", merge_lora=True)


def test_a_table_of_the_lora_file_beyond_the_range_of_the_weights_type(tmp_path):
    c = files.config(lora=True)
    a = files.lora(c, 3) | {"text_emb.weight": np.full_like(files.weights(c)["text_emb.weight"], 1e30)}
    source = files.write(tmp_path / "source", c, files.weights(c, "F16"), lora=a)
    refused(source, f"{source / 'lora.safetensors'}: text_emb.weight holds a number beyond the range of float16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_lr": float("nan")}, "ttt.base_lr=nan"),
        ({"layers": "9"}, 'ttt.layers="9"'),
        ({"mini_batch": 0}, "mini_batch=0"),
        ({"wings": 1}, "wings"),
    ],
)
def test_settings_of_exported_ttt_layers_that_cannot_be(source, changes, words):
    path = source / "ttt_config.json"
    path.write_text(json.dumps({"format": 1, "ttt": {"layers": "1"} | changes}))
    assert refused(source, words).startswith(str(path))


def test_a_file_without_config_must_be_the_7b_or_come_with_one(tmp_path):
    c = files.config()
    folder = files.write(tmp_path / "bare", None, files.weights(c))
    refused(folder / "model.safetensors", "no config.json beside it and does not fit the 7B", "give --config FILE")
    (tmp_path / "mine.json").write_text(json.dumps(c))
    assert kyutai(folder / "model.safetensors", tmp_path / "ours", config=tmp_path / "mine.json").cfg.dim == 16


def test_a_file_of_the_7bs_shape_needs_no_config(tmp_path):
    at, entries = 0, {}
    for name, shape in files.shapes(files.SEVEN_B).items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    assert len(entries) == 439
    head = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)  # a hole: takes no place
    plan = kyutai(tmp_path / "model.safetensors", tmp_path / "ours", dry_run=True)
    assert (plan.cfg.dim, plan.cfg.hidden, plan.cfg.depth.hidden) == (4096, 11264, 2816)
    assert any("the tensors are those of the 7B" in note for note in plan.notes)
    assert plan.nbytes == 2 * 7_687_729_152


def test_ttt_layers_that_cannot_be(source):
    refused(source, "names layer 2, but the model has layers 0 to 1", ttt=TTTConfig(layers="2"))


def test_export_refuses_folders_that_are_no_checkpoints_and_models_that_kyutai_cannot_express(source, tmp_path):
    for folder, words in (
        (tmp_path / "nowhere", "is not a folder of weights"),
        (source, "does not describe converted weights"),
    ):
        with pytest.raises(InputError, match=words):
            export(folder, tmp_path / "back")
    kyutai(source, tmp_path / "ours")
    with pytest.raises(InputError, match="has no adapters that could be merged"):
        export(tmp_path / "ours", tmp_path / "back", merge_lora=True)
    info = json.loads((tmp_path / "ours" / "config.json").read_text())
    for field, value, words in (
        ("layer_context", [[1, 4]], r"model.layer_context=\(\(1, 4\),\) .* Kyutai's layout cannot express"),
        ("attention_sink", 2, r"model.attention_sink=2 .* Kyutai's layout cannot express"),
    ):
        changed = {**info, "model": {**info["model"], field: value}}
        (tmp_path / "ours" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
