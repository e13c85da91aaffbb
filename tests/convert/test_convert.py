"""Kyutai's weights in and out: what arrives, in every layout, type and variant, and that it comes back bit for bit."""

import dataclasses
import functools
import json
import operator
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers.converting import info_of, nightly, same
from tests.helpers.places import FIXTURES
from ttt_jax.checkpoints import run_checkpoints, run_weights, weights
from ttt_jax.config import LoRAConfig, TTTConfig
from ttt_jax.convert import export, kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json


@pytest.fixture
def fixture_source(tmp_path):
    """The parity fixture as a source folder."""
    folder = tmp_path / "fixture"
    folder.mkdir()
    (folder / "config.json").write_bytes((FIXTURES / "moshi.config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((FIXTURES / "moshi.weights.safetensors").read_bytes())
    return folder


def shapes(tree):
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_fixture_arrives_where_the_model_wants_it(fixture_source, tmp_path):
    kyutai(fixture_source, tmp_path / "ours")
    cfg, params, info = weights.load(tmp_path / "ours", verify=True)
    w = load_file(fixture_source / "model.safetensors")
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes(params) == shapes(like)
    assert (cfg.hidden, cfg.depth.hidden, cfg.dep_q, cfg.dtype) == (176, 88, 3, "float32")
    assert cfg.delays == (0, 0, 1, 1, 0, 1, 1)

    (layers,) = params["layers"].values()
    d, e = 64, 32
    np.testing.assert_array_equal(params["audio_emb"][5], w["emb.5.weight"])
    np.testing.assert_array_equal(params["text_head"], w["text_linear.weight"])
    np.testing.assert_array_equal(params["out_norm"], w["out_norm.alpha"].ravel())
    for i in range(3):
        p = f"transformer.layers.{i}."
        np.testing.assert_array_equal(
            layers["attention"]["qkv"][i].reshape(3 * d, d), w[p + "self_attn.in_proj_weight"]
        )
        np.testing.assert_array_equal(layers["attention"]["out"][i].reshape(d, d), w[p + "self_attn.out_proj.weight"])
        np.testing.assert_array_equal(layers["ffn"]["gate_up"][i, 1], w[p + "gating.linear_in.weight"][176:])
        np.testing.assert_array_equal(layers["ffn"]["down"][i], w[p + "gating.linear_out.weight"])
        np.testing.assert_array_equal(layers["norm2"][i], w[p + "norm2.alpha"].ravel())
    depth = params["depth"]
    for k in range(3):
        np.testing.assert_array_equal(depth["input"][k], w[f"depformer_in.{k}.weight"])
        np.testing.assert_array_equal(depth["heads"][k], w[f"linears.{k}.weight"])
        rows = w["depformer.layers.1.self_attn.in_proj_weight"][k * 3 * e : (k + 1) * 3 * e]
        np.testing.assert_array_equal(depth["qkv"][3 + k].reshape(3 * e, e), rows)
        rows = w["depformer.layers.1.self_attn.out_proj.weight"][k * e : (k + 1) * e]
        np.testing.assert_array_equal(depth["out"][3 + k].reshape(e, e), rows)
        np.testing.assert_array_equal(
            depth["gate_up"][3 + k, 0], w[f"depformer.layers.1.gating.{k}.linear_in.weight"][:88]
        )
        np.testing.assert_array_equal(depth["down"][3 + k], w[f"depformer.layers.1.gating.{k}.linear_out.weight"])
    np.testing.assert_array_equal(depth["audio_emb"][1], w["depformer_emb.1.weight"])
    np.testing.assert_array_equal(depth["norm1"][1], w["depformer.layers.1.norm1.alpha"].ravel())
    assert info["source"]["dtype"] == "float32"


def test_the_fixture_comes_back(fixture_source, tmp_path):
    kyutai(fixture_source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), load_file(fixture_source / "model.safetensors"))
    old, new = (info_of(f) for f in (fixture_source, tmp_path / "back"))
    assert {key: new[key] for key in old} == old


TYPES = ("BF16", "F16", "F32")


@pytest.mark.parametrize(
    ("variant", "kind"),
    nightly(
        ("all", "BF16"), ("plain", "F16"), *((variant, kind) for variant in files.VARIANTS for kind in TYPES), default=2
    ),
)
def test_both_layouts_arrive_alike_and_come_back_bit_for_bit(tmp_path, variant, kind):
    c = files.config(**files.VARIANTS[variant])
    unfused = files.weights(c, kind)
    for name, tensors in (("unfused", unfused), ("fused", files.fuse(unfused))):
        kyutai(files.write(tmp_path / name, c, tensors), tmp_path / f"{name}-ours")
    kinds = ("unfused-ours", "fused-ours")
    one, other = (info_of(tmp_path / name) for name in kinds)
    assert one["digest"] == other["digest"]
    assert one["files"] == other["files"]
    cfg, params, _ = weights.load(tmp_path / "fused-ours")
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes(params) == shapes(like)
    assert {str(leaf.dtype) for leaf in flat(params).values()} == {np.dtype(files.TYPES[kind]).name}
    assert cfg.dtype == ("bfloat16" if kind == "BF16" else "float32")
    export(tmp_path / "unfused-ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), files.fuse(unfused))
    config = info_of(tmp_path / "back")
    assert {key: config[key] for key in c} == c


def test_what_variants_hold(tmp_path):
    c = files.config(**files.VARIANTS["all"])
    w = files.weights(c)
    kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    cfg, params, _ = weights.load(tmp_path / "ours")
    assert cfg.depth_sets == (0, 1, 1, 1)
    assert (cfg.depth.low_rank, cfg.extra_heads, cfg.extra_heads_dim) == (5, 2, 6)
    depth = params["depth"]
    assert depth["input"].shape == (2, 8, 16)
    np.testing.assert_array_equal(depth["audio_emb"][2], w["depformer_emb.2.weight"])
    np.testing.assert_array_equal(depth["audio_emb_up"][2], w["depformer_emb.2.low_rank.weight"])
    np.testing.assert_array_equal(depth["text_emb_up"], w["depformer_text_emb.low_rank.weight"])
    np.testing.assert_array_equal(params["extra_heads"][1], w["extra_heads.1.weight"])
    np.testing.assert_array_equal(depth["qkv"][1].reshape(24, 8), w["depformer.layers.0.self_attn.in_projs.1.weight"])


def test_special_numbers_keep_their_bits_and_those_that_are_not_finite_are_reported(tmp_path, caplog):
    c = files.config()
    w = files.weights(c, "BF16")
    w["text_emb.weight"].view(np.uint16)[:] = np.resize([0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x8000], (10, 16))
    kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'source' / 'model.safetensors'}: text_emb.weight holds NaN or infinite numbers"
    )
    export(tmp_path / "ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), files.fuse(w))


VALUES = (np.nan, -np.nan, np.inf, -np.inf)


@pytest.mark.parametrize(
    ("kind", "value"),
    nightly(("BF16", -np.nan), ("F16", np.inf), ("F32", -np.inf), *((k, v) for k in TYPES for v in VALUES), default=3),
)
def test_one_number_that_is_not_finite_is_found_in_every_type(tmp_path, caplog, kind, value):
    c = files.config(num_layers=1, depformer_num_layers=1)
    w = files.weights(c, kind)
    w["linears.1.weight"][-1, -1] = value
    kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'source' / 'model.safetensors'}: linears.1.weight holds NaN or infinite")


ADAPTERS = ("text_linear.lora_A.weight", "transformer.layers.1.self_attn.in_projs.0.lora_B.weight")


@pytest.mark.parametrize(
    ("key", "value", "merge"),
    nightly(
        (ADAPTERS[0], np.nan, False),
        (ADAPTERS[1], -np.inf, True),
        *((key, value, merge) for key in ADAPTERS for value in (np.nan, -np.inf) for merge in (False, True)),
        default=2,
    ),
)
def test_adapters_that_are_not_finite_are_reported_merged_or_not(tmp_path, caplog, key, value, merge):
    c = files.config(lora=True, lora_scaling=2.0)
    a = files.lora(c, 3)
    a[key][0, 0] = value
    source = files.write(tmp_path / "source", c, files.weights(c), lora=a)
    kyutai(source, tmp_path / "ours", merge_lora=merge)
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'lora.safetensors'}: {key} holds NaN or infinite numbers, which are kept")
    caplog.clear()
    export(tmp_path / "ours", tmp_path / "out")
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'ours'}: ")
    if not merge:
        caplog.clear()
        export(tmp_path / "ours", tmp_path / "merged", merge_lora=True)
        (again,) = caplog.messages
        assert again == message


@pytest.mark.parametrize("dtype", nightly("BF16", "F32"))
def test_a_base_that_is_not_finite_is_reported_when_adapters_are_merged(tmp_path, caplog, dtype):
    c = files.config(lora=True, lora_scaling=2.0)
    w = files.weights(c, dtype)
    w["linears.0.weight"][1, 1] = np.inf
    source = files.write(tmp_path / "source", c, w, lora=files.lora(c, 3))
    kyutai(source, tmp_path / "ours", merge_lora=True)
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'model.safetensors'}: linears.0.weight holds NaN")


def test_what_is_not_finite_has_the_name_of_its_own_file_in_other_layouts(tmp_path, caplog):
    c = files.config()
    theirs = files.huggingface(files.weights(c), c)
    keys = ["decoder.model.layers.0.self_attn.k_proj.linear.weight", "depth_decoder.lm_heads.weight"]
    for key in keys:
        theirs[key][...] = np.nan
    source = files.write(tmp_path / "hf", files.huggingface_config(c), theirs)
    kyutai(source, tmp_path / "from-hf")
    assert sorted(message.split(" holds ")[0] for message in caplog.messages) == [
        f"{source / 'model.safetensors'}: {key}" for key in keys
    ]
    caplog.clear()
    w = {f"module.{key}": array for key, array in files.weights(c).items()}
    w["module.emb.0.weight"][0, 0] = np.nan
    source = files.write(tmp_path / "wrapped", c, w)
    kyutai(source, tmp_path / "from-wrapped")
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'model.safetensors'}: module.emb.0.weight holds")


TTT = TTTConfig(layers="0,1", hidden=(), gate_init=0.25)


@pytest.fixture(scope="module")
def with_ttt(tmp_path_factory):
    """Weights ("source"), converted with TTT layers ("ours") and without ("plain"), and exported ("out"). Do not write
    there."""
    folder = tmp_path_factory.mktemp("ttt")
    c = files.config()
    kyutai(files.write(folder / "source", c, files.weights(c)), folder / "ours", ttt=TTT, seed=3)
    kyutai(folder / "source", folder / "plain")
    export(folder / "ours", folder / "out")
    return folder


@pytest.mark.parametrize(("name", "value"), nightly(("gate", np.nan), ("inner_w0", np.inf), ("out_kernel", -np.inf)))
def test_ttt_layers_that_are_not_finite_are_reported_and_kept(with_ttt, tmp_path, caplog, name, value):
    shutil.copytree(with_ttt / "out", tmp_path / "out")
    path = tmp_path / "out" / "ttt.safetensors"
    tensors = load_file(path)
    tensors[f"layer_01/{name}"].flat[0] = value
    save_file(tensors, path)
    kyutai(tmp_path / "out", tmp_path / "again")
    (message,) = caplog.messages
    assert message.startswith(f"{path}: layer_01/{name} holds NaN or infinite numbers, which are kept")
    np.testing.assert_array_equal(
        load_file(tmp_path / "again" / "ttt_01.safetensors")[name], tensors[f"layer_01/{name}"]
    )


def test_a_hidden_width_by_another_rule_is_taken_from_the_tensors(tmp_path):
    c = files.config(hidden_scale=4)  # 42 by PyTorch's rule, 44 by that of the other ports
    w = files.weights(files.config(hidden_scale=4.125))
    plan = kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    assert plan.cfg.hidden == 44
    assert any("hidden_scale would give hidden width 42" in note for note in plan.notes)
    export(tmp_path / "ours", tmp_path / "back")
    scale = info_of(tmp_path / "back")["hidden_scale"]
    assert 2 * int(scale * 16) // 3 == 44


def lora_sum(w, a, scaling):
    """W + scaling B A of every map, in float32."""
    merged = dict(w)
    for name in a:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up, down = a[f"{module}.lora_B.weight"].astype(np.float32), a[name].astype(np.float32)
            key = f"{module}.weight"
            merged[key] = (w[key].astype(np.float32) + np.float32(scaling) * up @ down).astype(w[key].dtype)
    return merged


def close(a, b):
    """Equal but for the last bit: sums in another order."""
    assert a.keys() == b.keys()
    for name in a:
        eps = ml_dtypes.finfo(a[name].dtype).eps
        x, y = a[name].astype(np.float32), b[name].astype(np.float32)
        np.testing.assert_allclose(x, y, rtol=2 * eps, atol=16 * 2**-23, err_msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_adapters_merge_on_the_way_in_and_out_alike(tmp_path, kind, fused):
    c = files.config(**files.VARIANTS["all"], lora=True, lora_rank=3, lora_scaling=1.5)
    w, a = files.weights(c, kind), files.lora(c, 3, kind)
    source = files.write(tmp_path / "source", c, files.fuse(w) if fused else w, lora=a)
    wanted = files.fuse(lora_sum(w, a, 1.5))
    kyutai(source, tmp_path / "merged", merge_lora=True)
    assert weights.load(tmp_path / "merged").cfg.lora.rank == 0
    export(tmp_path / "merged", tmp_path / "back")
    close(load_file(tmp_path / "back" / "model.safetensors"), wanted)
    assert "lora" not in info_of(tmp_path / "back")

    kyutai(source, tmp_path / "apart")
    cfg, params, _ = weights.load(tmp_path / "apart")
    assert (cfg.lora.rank, cfg.lora.scaling) == (3, 1.5)
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes(params) == shapes(like)
    np.testing.assert_array_equal(
        params["depth"]["qkv_lora_a"][3], a["depformer.layers.1.self_attn.in_projs.1.lora_A.weight"]
    )
    np.testing.assert_array_equal(
        params["depth"]["qkv_lora_b"][3].reshape(24, 3), a["depformer.layers.1.self_attn.in_projs.1.lora_B.weight"]
    )
    export(tmp_path / "apart", tmp_path / "out", merge_lora=True)
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    export(tmp_path / "apart", tmp_path / "lora")
    same(load_file(tmp_path / "lora" / "lora.safetensors"), a)
    same(load_file(tmp_path / "lora" / "model.safetensors"), files.fuse(w))
    config = info_of(tmp_path / "lora")
    assert [config[k] for k in ("lora", "lora_rank", "lora_scaling", "lora_name")] == [True, 3, 1.5, "lora.safetensors"]


def test_an_adapter_file_by_option_with_its_own_scaling_and_tables(tmp_path):
    c = files.config()
    w, a = files.weights(c), files.lora(c, 2)
    table = {"emb.1.weight": np.full((7, 16), 0.5, np.float32)}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file(a | table, tuned / "mine.safetensors")
    source = files.write(tmp_path / "source", c, w)
    plan = kyutai(source, tmp_path / "ours", lora=tuned / "mine.safetensors")
    assert plan.cfg.lora.scaling == 2
    assert any("lora_scaling" in note for note in plan.notes)
    assert any("emb.1.weight of the LoRA file" in note for note in plan.notes)
    np.testing.assert_array_equal(weights.load(tmp_path / "ours").params["audio_emb"][1], table["emb.1.weight"])
    (tuned / "config.json").write_text(json.dumps({**c, "lora": True, "lora_rank": 2, "lora_scaling": 0.5}))
    assert kyutai(source, tmp_path / "again", lora=tuned / "mine.safetensors").cfg.lora.scaling == 0.5


def test_a_config_by_option_goes_before_the_one_in_the_source(tmp_path):
    c = files.config()
    config = {**c, "lora": True, "lora_rank": 2}
    source = files.write(tmp_path / "source", config | {"lora_scaling": 3.0}, files.weights(c))
    save_file(files.lora(c, 2), source / "lora.safetensors")
    (tmp_path / "other.json").write_text(json.dumps(config | {"lora_scaling": 0.25, "lora_name": "lora.safetensors"}))
    assert kyutai(source, tmp_path / "plain").cfg.lora.scaling == 3
    assert kyutai(source, tmp_path / "given", config=tmp_path / "other.json").cfg.lora.scaling == 0.25


def test_adapters_merged_on_the_way_out_are_rounded_once(tmp_path):
    c = files.config()
    w = {name: array.astype(ml_dtypes.bfloat16) for name, array in files.weights(c).items()}
    source = files.write(tmp_path / "source", c, w)
    a = files.lora(c, 2)
    save_file(a, tmp_path / "lora.safetensors")
    kyutai(source, tmp_path / "ours", lora=tmp_path / "lora.safetensors")
    export(tmp_path / "ours", tmp_path / "back", merge_lora=True, dtype="float32")
    got = load_file(tmp_path / "back" / "model.safetensors")["text_linear.weight"]
    added = a["text_linear.lora_B.weight"] @ a["text_linear.lora_A.weight"]
    wanted = w["text_linear.weight"].astype(np.float32) + 2 * added
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_another_type_on_the_way_out(tmp_path):
    c = files.config()
    w = files.weights(c)
    kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
    same(
        load_file(tmp_path / "back" / "model.safetensors"),
        {name: array.astype(ml_dtypes.bfloat16) for name, array in files.fuse(w).items()},
    )
    w["out_norm.alpha"][:] = 1e6
    kyutai(files.write(tmp_path / "large", c, w), tmp_path / "large-ours")
    with pytest.raises(InputError, match=r"out_norm.alpha holds a number beyond the range of float16"):
        export(tmp_path / "large-ours", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_ttt_layers_are_added_and_travel_in_files_of_their_own(with_ttt, tmp_path):
    cfg, params, info = weights.load(with_ttt / "ours", verify=True)
    assert cfg.ttt == TTT
    (run,) = params["layers"].values()
    tree = run["ttt"]
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes(params) == shapes(like)
    assert {k: v.dtype for k, v in flat(params).items()} == {k: v.dtype for k, v in flat(like).items()}
    assert not tree["out_kernel"].any()
    assert not tree["out_bias"].any()
    assert (tree["gate"] == 0.25).all()
    for part in ("kernel", "bias"):  # as in fresh weights
        np.testing.assert_array_equal(tree[f"q_{part}"], tree[f"k_{part}"])
        assert (tree[f"q_{part}"] != tree[f"v_{part}"]).all()
    assert info_of(with_ttt / "plain")["digest"] == info["digest"]

    out = load_file(with_ttt / "out" / "ttt.safetensors")
    np.testing.assert_array_equal(out["layer_01/q_kernel"], tree["q_kernel"][1])
    same(load_file(with_ttt / "out" / "model.safetensors"), files.fuse(files.weights(files.config())))
    kyutai(with_ttt / "out", tmp_path / "again")
    again = info_of(tmp_path / "again")
    for name in ("ttt_00.safetensors", "ttt_01.safetensors"):
        assert again["files"][name] == info["files"][name]
    assert again["model"]["ttt"] == info_of(with_ttt / "ours")["model"]["ttt"]
    with pytest.raises(InputError, match="has TTT layers already"):
        kyutai(with_ttt / "out", tmp_path / "never", ttt=TTT)


def test_each_added_ttt_layer_has_random_numbers_of_its_own(with_ttt, tmp_path):
    first, second = (load_file(with_ttt / "ours" / f"ttt_0{i}.safetensors") for i in range(2))
    kyutai(with_ttt / "source", tmp_path / "another", ttt=TTT, seed=4)
    another = load_file(tmp_path / "another" / "ttt_00.safetensors")
    for name in ("q_kernel", "v_kernel", "rate_weight", "inner_w0"):
        assert (first[name] != second[name]).any(), name
        assert (first[name] != another[name]).any(), name


@pytest.mark.slow
def test_added_ttt_layers_have_no_effect(with_ttt):
    tokens = jax.random.randint(jax.random.key(0), (1, 5, 6), 0, 6)
    logits = []
    for name in ("plain", "ours"):
        cfg, params, _ = weights.load(with_ttt / name)
        outputs, _ = model.forward(params, tokens, np.ones((1, 6), bool), model.init_state(cfg, 1), cfg)
        logits.append(outputs)
    np.testing.assert_array_equal(logits[0].text_logits, logits[1].text_logits)
    np.testing.assert_array_equal(logits[0].audio_logits, logits[1].audio_logits)


def test_what_travels_along(tmp_path):
    c = files.config(
        tokenizer_name="pieces.model", mimi_name="codec.safetensors", lm_gen_config={"temp": 0.5}, model_type="moshi"
    )
    source = files.write(tmp_path / "source", c, files.weights(c))
    (source / "pieces.model").write_bytes(b"pieces")
    (source / "LICENSE").write_text("as you like")
    (source / "README.md").write_text('---\nlanguage: en\nlicense: "cc-by-4.0"\n---\n# A model\nlicense: other\n')
    kyutai(source, tmp_path / "ours")
    about = weights.load(tmp_path / "ours", verify=True).info["source"]
    assert about["licence"] == "cc-by-4.0"
    assert about["mimi"] == "codec.safetensors"
    assert about["lm_gen_config"] == {"temp": 0.5}
    assert about["config"] == c
    assert (tmp_path / "ours" / "pieces.model").read_bytes() == b"pieces"
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "pieces.model").read_bytes() == b"pieces"
    assert (tmp_path / "back" / "LICENSE").read_text() == "as you like"
    assert (tmp_path / "back" / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n---")
    config = info_of(tmp_path / "back")
    assert {key: config[key] for key in c} == c
    kyutai(tmp_path / "back", tmp_path / "again")
    assert weights.load(tmp_path / "again").info["source"]["licence"] == "cc-by-4.0"


def test_a_trained_run_goes_out(with_ttt, tmp_path):
    cfg, params, _ = weights.load(with_ttt / "ours")
    checkpoints = run_checkpoints.Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, params, {"x": np.zeros(1)}, {}, {"config": {"model": config_json.to_dict(cfg)}})
    checkpoints.close()
    export(tmp_path / "run", tmp_path / "out")
    for name in ("model", "ttt"):
        same(*(load_file(folder / "out" / f"{name}.safetensors") for folder in (tmp_path, with_ttt)))
    export(tmp_path / "run", tmp_path / "small", dtype="bfloat16")
    assert load_file(tmp_path / "small" / "model.safetensors")["text_emb.weight"].dtype == ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of bfloat16 weights with float32 adapters and a TTT layer ("ours"); its weights and adapters."""
    folder = tmp_path_factory.mktemp("tuned")
    c = files.config(**files.VARIANTS["all"], lora=True, lora_rank=3, lora_scaling=1.5, mimi_name="codec.safetensors")
    w, a = files.weights(c, "BF16"), files.lora(c, 3)
    source = files.write(folder / "source", c, w, lora=a)
    (source / "tokenizer_spm_32k_3.model").write_bytes(b"pieces")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    kyutai(source, folder / "ours", ttt=TTTConfig(layers="1", hidden=()))
    return folder / "ours", w, a


@pytest.fixture
def tuned(base, tmp_path, monkeypatch):
    """A function that makes runs that were fine-tuned from `base`; its weights and adapters."""
    ours, w, a = base
    cfg, params, info = weights.load(ours)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)

    def run(*maps, base=ours, trained=None):
        """The folder of a run with adapters on `maps`, whose leaves `trained` (by path) differ from its base."""
        run_cfg = dataclasses.replace(cfg, lora=LoRAConfig(3 if maps else 0, 1.5, maps))
        tree = {}
        for path in {tensor.path for tensor in weights.tensors(run_cfg)}:
            branch = functools.reduce(lambda branch, key: branch.setdefault(key, {}), path[:-1], tree)
            leaf = functools.reduce(operator.getitem, path, params)
            branch[path[-1]] = (trained or {}).get(path, leaf)
        meta = {"base": {"path": str(base), "digest": info["digest"]}}
        monkeypatch.setattr(run_weights, "load_run", lambda path: run_weights.Run(run_cfg, tree, meta))
        return folder

    return run, w, a


def test_a_fine_tuned_run_goes_out_with_the_bits_and_papers_of_its_base(tuned, base, tmp_path):
    run, w, _ = tuned
    assert export(run(), tmp_path / "out").notes == ()
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w))
    export(base[0], tmp_path / "direct", merge_lora=True)
    for name in ("config.json", "README.md", "tokenizer_spm_32k_3.model", "ttt.safetensors", "ttt_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    assert "license: cc-by-4.0" in (tmp_path / "out" / "README.md").read_text()
    assert info_of(tmp_path / "out")["mimi_name"] == "codec.safetensors"


def test_a_run_without_its_base_is_refused(tuned, tmp_path):
    run, *_ = tuned
    c = files.config()
    kyutai(files.write(tmp_path / "plain", c, files.weights(c)), tmp_path / "another")
    for name in ("nowhere", "another"):
        with pytest.raises(InputError, match=rf"{name}, the base weights of .*run, is gone or another"):
            export(run(base=tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "modules"),
    nightly(
        ("depth", r"depformer|linears"),
        ("attention", r"transformer\..*self_attn"),
        ("ffn", r"transformer\..*gating"),
        ("heads", r"text_linear|extra_heads"),
        default=2,
    ),
)
def test_adapters_on_some_maps_merge_and_leave_the_others_alone(tuned, tmp_path, part, modules):
    run, w, a = tuned
    with pytest.raises(InputError, match=rf"has adapters on {part} only, but Kyutai's .* give --merge-lora"):
        export(run(part), tmp_path / "out")
    export(run(part), tmp_path / "out", merge_lora=True)
    mine = {name: array for name, array in a.items() if re.match(modules, name)}
    wanted, plain = files.fuse(lora_sum(w, mine, 1.5)), files.fuse(w)
    got = load_file(tmp_path / "out" / "model.safetensors")
    close(got, wanted)
    others = [name for name in plain if not re.match(modules, name)]
    same({name: got[name] for name in others}, {name: plain[name] for name in others})
    assert "lora" not in info_of(tmp_path / "out")


def test_adapters_on_all_maps_of_a_run_are_kyutais_file(tuned, tmp_path):
    run, w, a = tuned
    export(run("heads", "depth", "ffn", "attention"), tmp_path / "out")
    same(load_file(tmp_path / "out" / "lora.safetensors"), a)
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w))


def test_trainable_weights_take_the_type_of_frozen_ones_unless_another_is_requested(tuned, base, tmp_path):
    run, w, _ = tuned
    path = next(t.path for t in weights.base(weights.load(base[0]).cfg) if t.name == "attention/out" and "01" in t.file)
    mine = np.random.default_rng(3).normal(size=(1, 16, 16)).astype(np.float32)
    (note,) = export(run(trained={path: mine}), tmp_path / "out").notes
    assert note == f"{'/'.join(path)} are rounded to bfloat16, the others' type; --dtype float32 keeps them"
    key = "transformer.layers.1.self_attn.out_proj.weight"
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w) | {key: mine[0].astype(ml_dtypes.bfloat16)})
    assert export(run(trained={path: mine}), tmp_path / "wide", dtype="float32").notes == ()
    wide = {name: array.astype(np.float32) for name, array in files.fuse(w).items()}
    same(load_file(tmp_path / "wide" / "model.safetensors"), wide | {key: mine[0]})


def test_dry_run_checks_all_and_writes_nothing(tmp_path):
    c = files.config()
    source = files.write(tmp_path / "source", c, files.weights(c))
    plan = kyutai(source, tmp_path / "ours", ttt=TTTConfig(layers="0,1"), dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    lines = "\n".join(plan.lines())
    assert "TTT layers    0, 1" in lines
    assert "ttt_01.safetensors" in lines
    kyutai(source, tmp_path / "ours")
    before = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in "\n".join(export(tmp_path / "ours", tmp_path / "back", dry_run=True).lines())
    assert {path.name for path in tmp_path.iterdir()} == before
