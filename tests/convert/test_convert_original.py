"""TTT layers of the original convert, and compute what they computed there, but for its defects."""

import contextlib
import dataclasses
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers import original_files as theirs
from tests.helpers.comparing import same
from tests.helpers.converting import nightly
from tests.helpers.reference_original import LOOK_AHEAD, TWICE, layer
from tests.helpers.small_ttt import TOL, call
from ttt_jax.checkpoints import weights
from ttt_jax.config import TTTConfig
from ttt_jax.convert import export, from_original, kyutai
from ttt_jax.convert.state_dict import open_state_dict
from ttt_jax.errors import InputError
from ttt_jax.ttt.layer import init_state

D, HEADS, BATCHES = 16, 2, 3
KINDS = {
    "linear": ("TTTLinear", (), 4),
    "mlp": ("TTTMLP", (), 4),
    "mlp, frame by frame": ("TTTMLP", (), 1),
    "three maps": ("TTTMLPMultiLayer", (16, 8), 4),
    "four maps, no multiples": ("TTTMLPMultiLayer", (12, 20, 7), 2),
}


@cache
def parameters(kind, seed=7):
    """Of one layer of the original."""
    name, inner, _ = KINDS[kind]
    return theirs.layer(theirs.layer_shapes(D, HEADS, inner, name), seed)


def mini_batch(kind):
    return KINDS[kind][2]


def hidden_vectors(kind):
    return np.random.default_rng(3).normal(size=(1, BATCHES * mini_batch(kind), D))


@pytest.fixture
def converted(tmp_path):
    """A function from the original's parameters of a layer to ours in float64, with their configuration."""

    @cache
    def configuration(kind):
        tensors = theirs.consolidated(theirs.CONFIG, {1: parameters(kind)})
        folder = theirs.write(tmp_path / "whole", tensors, [1], mini_batch_size=mini_batch(kind))
        return dataclasses.replace(kyutai(folder, tmp_path / "ours", dry_run=True).cfg, dtype="float64")

    def convert(p, kind):
        save_file(theirs.own({1: p}), tmp_path / "layer.safetensors")
        with contextlib.ExitStack() as opened:
            state_dict = open_state_dict(tmp_path / "layer.safetensors", lambda name: None, opened, [])
            made = from_original.parameters(from_original.split(state_dict)[1], configuration(kind))(1)
        return {name: values.astype(np.float64) for name, values in made.items()}, configuration(kind)

    return convert


def run(ours, cfg, x):
    """Outputs [T, d] of our layer and its fast weights by map, [H, I, O] and [H, O]."""
    out, state = call(ours, x, np.ones(x.shape[:2], bool), init_state(cfg, len(x)), cfg=cfg)
    fast = [
        (ours[f"inner_w{n}"] + np.asarray(w[0]), ours[f"inner_b{n}"] + np.asarray(b[0]))
        for n, (w, b) in enumerate(state.displacement)
    ]
    return np.asarray(out[0]), fast


def same_weights(ours, fast):
    """Largest difference of our fast weights from the original's after its last mini-batch; what is filled up must have
    stayed 0."""
    worst = 0.0
    for h, maps in enumerate(fast[-1]):
        for (w, b), (w_ours, b_ours) in zip(maps, ours, strict=True):
            i, o = w.shape
            worst = max(worst, abs(w_ours[h, :i, :o] - w).max(), abs(b_ours[h, :o] - b[0]).max())
            for filled in (w_ours[h, i:], w_ours[h, :, o:], b_ours[h, o:]):
                assert not filled.any()
    return worst


@pytest.mark.parametrize("kind", nightly("four maps, no multiples", *KINDS))
def test_layers_do_what_they_did_but_for_the_defects(kind, converted, x64):
    p, b, x = parameters(kind), mini_batch(kind), hidden_vectors(kind)
    ours, cfg = converted(p, kind)
    out, fast = run(ours, cfg, x)
    there, fast_there = layer(p, x[0], HEADS, 0.5, b, defects=frozenset())
    assert abs(out - there).max() < TOL
    assert same_weights(fast, fast_there) < TOL

    # With look-ahead: the same weights after each mini-batch and the same outputs at its last frame, others before.
    there, fast_there = layer(p, x[0], HEADS, 0.5, b, defects=frozenset({LOOK_AHEAD}))
    apart = abs(out - there).max(-1)
    assert same_weights(fast, fast_there) < TOL
    assert apart[b - 1 :: b].max() < TOL
    assert all((apart[i::b] > 1e-3).all() for i in range(b - 1))

    # Outputs of deep networks are at twice the update, but its weights are the same.
    there, fast_there = layer(p, x[0], HEADS, 0.5, b, defects=frozenset({TWICE}))
    assert same_weights(fast, fast_there) < TOL
    assert (abs(out - there).max() > 1e-3) == (len(fast) > 2)

    # The original as it is: the epsilon of its target is seen in the fifth digit, its constants in the ninth.
    there, fast_there = layer(p, x[0], HEADS, 0.5, b)
    small = 1e-3
    assert TOL < same_weights(fast, fast_there) < small
    if len(fast) < 3:
        assert abs(out - there)[b - 1 :: b].max() < small


@pytest.mark.parametrize("kind", nightly("four maps, no multiples", "mlp"))
def test_every_tensor_that_carries_over_matters(kind, converted, x64):
    p, x = parameters(kind), hidden_vectors(kind)
    before, _ = run(*converted(p, kind), x)
    names = [name for name in p if name not in from_original.UNUSED]
    assert len(names) == len(p) - 5 == 11 + 2 * (len(names) - 11) // 2
    for name in names:
        changed = p | {name: (0.9 * p[name] + 0.05).astype(np.float32)}
        out, _ = run(*converted(changed, kind), x)
        assert abs(out - before).max() > 1e-6, name
        there, _ = layer(changed, x[0], HEADS, 0.5, mini_batch(kind), defects=frozenset())
        assert abs(out - there).max() < TOL, name


def test_what_was_never_used_changes_nothing(converted):
    p = parameters("mlp")
    before, _ = converted(p, "mlp")
    after, _ = converted(p | {name: p[name] + 1 for name in from_original.UNUSED}, "mlp")
    same(before, after)


@pytest.mark.parametrize(("b", "base_lr"), nightly((16, 1.0), (1, 0.1), (64, 1e-3)))
def test_rate_is_divided_by_the_mini_batch(tmp_path, b, base_lr):
    layers = theirs.layers_of()
    tensors = theirs.consolidated(theirs.CONFIG, layers)
    folder = theirs.write(tmp_path / "theirs", tensors, layers, mini_batch_size=b, base_lr=base_lr)
    cfg = kyutai(folder, tmp_path / "ours", dry_run=True).cfg
    assert (cfg.ttt.mini_batch, cfg.inner_lr) == (b, base_lr / b)


SETTINGS = TTTConfig(
    layers="0,1", hidden=(4,), mini_batch=4, base_lr=0.125, horizon=None, pre_norm=False, post_norm=False
)


@pytest.fixture
def plain(tmp_path):
    """Kyutai's folder without TTT layers, converted."""
    source = files.write(tmp_path / "plain", files.CONFIG, files.fuse(files.weights(files.CONFIG)))
    kyutai(source, tmp_path / "plain-ours")
    return source, tmp_path / "plain-ours"


def is_plain_base(ours, plain):
    """Whether the base is bit for bit the one that converts without TTT layers."""
    return weights.load(ours, verify=True).info["digest"] == weights.load(plain).info["digest"]


@pytest.mark.parametrize("type", nightly(*files.TYPES))
def test_all_weights_convert(tmp_path, type):
    layers, c = theirs.layers_of(type=type), theirs.CONFIG | {"moshi_name": "model.safetensors"}
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(c, layers, type), layers, c)
    plan = kyutai(folder, tmp_path / "ours")
    cfg, params, info = weights.load(tmp_path / "ours", verify=True)
    assert cfg.ttt == plan.cfg.ttt == SETTINGS
    plain = files.write(tmp_path / "plain", files.CONFIG, files.weights(files.CONFIG, type))
    kyutai(plain, tmp_path / "plain-ours")
    assert is_plain_base(tmp_path / "ours", tmp_path / "plain-ours")
    (run_of_both,) = params["layers"].values()
    for n, p in layers.items():
        got = {name: np.asarray(values[n]) for name, values in run_of_both["ttt"].items()}
        assert {values.dtype for values in got.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(got["k_kernel"], p["ttt_layer.ttt.wk.weight"].astype(np.float32))
        np.testing.assert_array_equal(got["v_bias"], p["ttt_layer.ttt.wv.bias"].astype(np.float32))
        np.testing.assert_array_equal(got["gate"], p["forward_ssm_gating.gating_alpha"].astype(np.float32).clip(-3, 3))
    assert info["source"]["file"] == "consolidated.safetensors"
    assert not any("full fine-tune" in note for note in plan.notes)


def test_names_with_a_prefix_and_layers_of_another_type_convert(tmp_path):
    layers = theirs.layers_of(numbers=(1,))
    tensors = theirs.wrapped(files.weights(theirs.CONFIG, "BF16"), layers) | theirs.own(layers)
    plain = theirs.write(tmp_path / "theirs", tensors, layers)
    prefixed = theirs.write(tmp_path / "prefixed", {f"module.{name}": one for name, one in tensors.items()}, layers)
    a, b = (kyutai(folder, tmp_path / f"{folder.name}-ours") for folder in (plain, prefixed))
    assert (a.cfg, a.dtype) == (b.cfg, "BF16")
    for name in weights.load(a.out, verify=True).info["files"]:
        assert (a.out / name).read_bytes() == (b.out / name).read_bytes()


def test_what_does_not_carry_over_is_listed(tmp_path):
    layers = theirs.layers_of("TTTMLPMultiLayer", (12, 16))
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(theirs.CONFIG, layers), layers, ttt_layer_context=5)
    notes = kyutai(folder, tmp_path / "ours", dry_run=True).notes
    text = " | ".join(notes)
    block = "transformer.layers.{0-1}.seq_modeling_block."
    for name in from_original.UNUSED:
        assert block + name in text
    for words in (
        "base_lr 0.5 at 4 frames a mini-batch is 0.125 here",
        "a frame no longer reads the steps of later frames",
        "counts it twice in networks of 3 maps",
        block + "ttt_layer.ttt.weights.{0-2}",
        block + "ttt_layer.ttt.biases.{0-2}",
        "do not decay",
        "the original pads it",
        "inner widths 12,16 are padded with units of 0 to multiples of the head width 8",
        "5 in layer 0, 5 in layer 1",
    ):
        assert words in text, words
    assert not (tmp_path / "ours").exists()
    tensors = theirs.consolidated(theirs.CONFIG, theirs.layers_of())
    frame_by_frame = theirs.write(tmp_path / "one", tensors, layers, mini_batch_size=1)
    text = " | ".join(kyutai(frame_by_frame, tmp_path / "ours", dry_run=True).notes)
    for words in ("later frames", "twice", "padded with"):
        assert words not in text


def test_windows_of_attention_carry_over(tmp_path):
    layers = theirs.layers_of(numbers=(1,))
    tensors = theirs.consolidated(theirs.CONFIG, layers)
    for inside, outside, expected in ((5, None, ((1, 5),)), (None, 3, ((0, 3),)), (8, 4, ((0, 4),))):
        windows = {"ttt_layer_context": inside, "non_ttt_layer_context": outside}
        folder = theirs.write(tmp_path / "theirs", tensors, layers, **windows)
        assert kyutai(folder, tmp_path / "ours", dry_run=True).cfg.layer_context == expected


def test_what_was_trained_goes_on_its_base(tmp_path, plain):
    source, plain_ours = plain
    layers = theirs.layers_of()
    ckpt = theirs.write(tmp_path / "ckpt", theirs.own(layers), layers, name="lora")
    kyutai(source, tmp_path / "ours", lora=ckpt / "lora.safetensors")
    found = weights.load(tmp_path / "ours")
    assert (found.cfg.ttt, found.cfg.lora.rank, found.info["source"]["lora"]) == (SETTINGS, 0, "lora.safetensors")
    assert is_plain_base(tmp_path / "ours", plain_ours)

    # Base and checkpoint in one folder need no flag, whatever its config.json says of adapters.
    together = theirs.write(tmp_path / "both", theirs.own(layers), layers, name="lora")
    save_file(load_file(source / "model.safetensors"), together / "model.safetensors")
    kyutai(together, tmp_path / "ours-too")
    assert weights.load(tmp_path / "ours-too").cfg == found.cfg
    for name in ("ttt_00.safetensors", "ttt_01.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "ours-too" / name).read_bytes()


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_beside_ttt_layers_convert(tmp_path, plain, merge):
    source, _ = plain
    layers, c = theirs.layers_of(numbers=(1,)), theirs.CONFIG | {"lora": True, "lora_scaling": 0.5}
    adapters = files.lora(c, 3)
    trained = theirs.wrapped(adapters, [1], copies=False) | theirs.own(layers)
    ckpt = theirs.write(tmp_path / "ckpt", trained, layers, c, name="lora")
    kyutai(source, tmp_path / "ours", lora=ckpt / "lora.safetensors", merge_lora=merge)
    found = weights.load(tmp_path / "ours", verify=True)
    assert found.cfg.ttt_layers == (1,)
    only = files.write(tmp_path / "only", c, {}, adapters=adapters)
    (only / "model.safetensors").unlink()
    given = {"config": only / "config.json", "lora": only / "adapters.safetensors", "merge_lora": merge}
    kyutai(source, tmp_path / "without", **given)
    without = weights.load(tmp_path / "without").info
    files_of_base = [name for name in without["files"] if not name.startswith("ttt")]
    assert found.cfg.lora.rank == (0 if merge else 3)
    for name in files_of_base:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["weight", "frozen_W.weight"])
def test_attention_that_was_trained_replaces_the_base_s(tmp_path, plain, name):
    source, _ = plain
    layers, at = theirs.layers_of(numbers=(1,)), "transformer.layers.1."
    new = np.random.default_rng(0).normal(size=(3 * D, D)).astype(np.float32)
    trained = {f"{at}original_layer.self_attn.in_projs.0.{name}": new}
    ckpt = theirs.write(tmp_path / "ckpt", trained | theirs.own(layers), layers, name="lora")
    plan = kyutai(source, tmp_path / "ours", lora=ckpt / "lora.safetensors")
    assert any(f"{at}self_attn.in_proj_weight of the LoRA file replace" in note for note in plan.notes)
    params = weights.load(tmp_path / "ours").params["layers"]["layers_01_01"]
    np.testing.assert_array_equal(params["attention"]["qkv"][0].reshape(3 * D, D), new)


def test_adapters_merged_by_the_original_are_not_looked_for(tmp_path):
    layers, c = theirs.layers_of(), theirs.CONFIG | {"lora": True}
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(c, layers), layers, c)
    plan = kyutai(folder, tmp_path / "ours")
    assert any("the weights are complete" in note for note in plan.notes)
    assert weights.load(tmp_path / "ours").cfg.lora.rank == 0
    with pytest.raises(InputError, match="names no adapters that could be merged"):
        kyutai(folder, tmp_path / "merged", merge_lora=True)


def test_converted_layers_go_out_and_come_back(tmp_path):
    layers = theirs.layers_of("TTTLinear")
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(theirs.CONFIG, layers), layers)
    kyutai(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out")
    kyutai(tmp_path / "out", tmp_path / "again")
    a, b = weights.load(tmp_path / "ours"), weights.load(tmp_path / "again")
    assert a.cfg == b.cfg
    assert (a.cfg.ttt.hidden, a.cfg.ttt.post_norm) == ((), False)
    same(a.params, b.params)
