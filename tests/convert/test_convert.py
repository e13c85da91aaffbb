"""Kyutai's weights in and out: they arrive in every layout, type and variant, and come back bit for bit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers.comparing import same
from tests.helpers.converting import close, info_of, layout, nightly, shapes_of, with_adapters
from tests.helpers.places import FIXTURES
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.safetensors_reader import Piece, as_bytes, of_array
from ttt_jax.config import TTTConfig
from ttt_jax.convert import export, kyutai
from ttt_jax.convert.lora import Adapter, merged
from ttt_jax.errors import InputError
from ttt_jax.moshi import model


@pytest.fixture
def fixture_source(tmp_path):
    """The parity fixture as a source folder."""
    folder = tmp_path / "fixture"
    folder.mkdir()
    (folder / "config.json").write_bytes((FIXTURES / "moshi.config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((FIXTURES / "moshi.weights.safetensors").read_bytes())
    return folder


def test_the_fixture_arrives_where_the_model_wants_it(fixture_source, tmp_path):
    kyutai(fixture_source, tmp_path / "ours")
    cfg, params, info = weights.load(tmp_path / "ours", verify=True)
    w = load_file(fixture_source / "model.safetensors")
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes_of(params) == shapes_of(like)
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
    assert shapes_of(params) == shapes_of(like)
    assert {str(dtype) for _, dtype in layout(params).values()} == {np.dtype(files.TYPES[kind]).name}
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


def test_a_hidden_width_by_another_rule_is_taken_from_the_tensors(tmp_path):
    c = files.config(hidden_scale=4)  # 42 by PyTorch's rule, 44 by that of the other ports
    w = files.weights(files.config(hidden_scale=4.125))
    plan = kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    assert plan.cfg.hidden == 44
    assert any("hidden_scale would give hidden width 42" in note for note in plan.notes)
    export(tmp_path / "ours", tmp_path / "back")
    scale = info_of(tmp_path / "back")["hidden_scale"]
    assert 2 * int(scale * 16) // 3 == 44


@pytest.mark.parametrize(("kind", "fused"), nightly(("BF16", False), ("F32", True), ("BF16", True), ("F32", False)))
def test_adapters_merge_on_the_way_in_and_out_alike(tmp_path, kind, fused):
    c = files.config(**files.VARIANTS["all"], lora=True, lora_rank=3, lora_scaling=1.5)
    w, a = files.weights(c, kind), files.lora(c, 3, kind)
    source = files.write(tmp_path / "source", c, files.fuse(w) if fused else w, lora=a)
    wanted = files.fuse(with_adapters(w, a, 1.5))
    kyutai(source, tmp_path / "merged", merge_lora=True)
    assert weights.load(tmp_path / "merged").cfg.lora.rank == 0
    export(tmp_path / "merged", tmp_path / "back")
    close(load_file(tmp_path / "back" / "model.safetensors"), wanted)
    assert "lora" not in info_of(tmp_path / "back")

    kyutai(source, tmp_path / "apart")
    cfg, params, _ = weights.load(tmp_path / "apart")
    assert (cfg.lora.rank, cfg.lora.scaling) == (3, 1.5)
    like = jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))
    assert shapes_of(params) == shapes_of(like)
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


def test_each_block_of_a_merged_map_gets_its_rows_of_the_adapter():
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (2, 3), (5, 2)))
    down, up = (of_array(x.nbytes, lambda x=x: x) for x in (a, b))
    by_row = Piece(w.nbytes, lambda unit: (as_bytes(row) for row in w))
    piece = merged(by_row, "F32", Adapter(down, up, "F32", 2, 0.5), "F32", "a map")
    found = np.frombuffer(b"".join(map(bytes, piece.blocks(1))), np.float32).reshape(w.shape)
    np.testing.assert_allclose(found, w + 0.5 * b @ a, rtol=1e-6)
