"""What a configuration means and what it refuses, in one sentence that names the field."""

import dataclasses

import pytest

from ttt_jax.config import (
    MODEL_PRESETS,
    DepthConfig,
    LoRAConfig,
    MoshiConfig,
    TTTConfig,
    default_base_lr,
    model_preset,
    parse_layers,
)
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

TINY = MODEL_PRESETS["tiny"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("29,30,31", (29, 30, 31)),
        ("25-30", (25, 26, 27, 28, 29, 30)),
        ("-1", (31,)),
        ("-32", (0,)),
        ("middle", (16,)),
        ("all", tuple(range(32))),
        ("none", ()),
        (" 3 , 1,1-2", (1, 2, 3)),
        ("0,-1", (0, 31)),
    ],
)
def test_layer_names(text, layers):
    assert parse_layers(text, 32) == layers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("32", "names layer 32, but the model has layers 0 to 31"),
        ("-33", "names layer -1, but the model has layers 0 to 31"),
        ("30-40", "names layer 40"),
        ("5-3", "has the empty range 5-3"),
        ("last", 'ttt.layers="last" cannot be read'),
        ("", 'ttt.layers="" cannot be read'),
        ("1,,2", "cannot be read"),
        ("1.5", "cannot be read"),
    ],
)
def test_impossible_layers_are_refused(text, words):
    with pytest.raises(InputError) as error:
        parse_layers(text, 32)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TTTConfig(mini_batch=0), "ttt.mini_batch=0"),
        (lambda: TTTConfig(remat_group=0), "ttt.remat_group=0"),
        (lambda: TTTConfig(hidden=(4, 0)), "ttt.hidden=(4, 0)"),
        (lambda: TTTConfig(base_lr=-0.1), "ttt.base_lr=-0.1"),
        (lambda: TTTConfig(base_lr=float("nan")), "ttt.base_lr=nan"),
        (lambda: TTTConfig(mini_batch=1.5), "ttt.mini_batch is 1.5, but must be of type int"),
        (lambda: TTTConfig(hidden=(2.5,)), "ttt.hidden is 2.5, but must be of type int"),
        (lambda: TTTConfig(hidden=4), "ttt.hidden is 4, but must be a list"),
        (lambda: TTTConfig(impl="cuda"), "ttt.impl is 'cuda', but must be 'auto' or 'xla' or 'pallas'"),
        (lambda: TTTConfig(rope="no"), "ttt.rope is 'no', but must be of type bool"),
        (lambda: TTTConfig(base_lr=True), "ttt.base_lr is True, but must be of type float"),
        (lambda: TTTConfig(layers=(1, 2)), "ttt.layers is (1, 2), but must be of type str"),
        (lambda: TTTConfig(horizon=float("inf")), "ttt.horizon=inf is no number of frames"),
        (lambda: dataclasses.replace(TINY, layer_context=((0, 8.5),)), "model.layer_context is 8.5"),
        (lambda: dataclasses.replace(TINY, layer_context=((0,),)), "is (0,), but must be a list of 2"),
        (lambda: dataclasses.replace(TINY, delays=None), "model.delays is None"),
        (lambda: dataclasses.replace(TINY, ttt=None), "model.ttt is None"),
        (lambda: dataclasses.replace(TINY, max_period=0.001), "model.max_period=0.001"),
        (lambda: dataclasses.replace(TINY, num_heads=64), "heads of width 2"),
        (lambda: TTTConfig(gate_init=float("inf")), "ttt.gate_init=inf"),
        (lambda: TTTConfig(horizon=8.0), "ttt.horizon=8.0 is shorter than the mini-batch of 16"),
        (lambda: TTTConfig(horizon=float("nan")), "ttt.horizon=nan"),
        (lambda: TTTConfig(max_displacement=0.0), "ttt.max_displacement=0.0"),
        (lambda: TTTConfig(rope=True, mini_batch=1), "ttt.rope=True has no effect with ttt.mini_batch=1"),
        (lambda: dataclasses.replace(TINY, dtype="float16"), "model.dtype is 'float16', but must be 'float32' or"),
        (lambda: dataclasses.replace(TINY, layer_context=((1, 8), (1, 9))), "gives a layer two windows"),
        (lambda: DepthConfig(dim=0), "depth.dim=0"),
        (lambda: LoRAConfig(rank=-1), "lora.rank=-1"),
        (lambda: LoRAConfig(maps=("wings",)), "'wings', but must be 'attention' or 'ffn' or 'depth' or 'heads'"),
        (lambda: LoRAConfig(maps="ffn"), "lora.maps is 'ffn', but must be a list"),
        (lambda: LoRAConfig(maps=("ffn", "ffn")), "lora.maps=('ffn', 'ffn') names a part of the model twice"),
        (lambda: LoRAConfig(rank=2, maps=()), "lora.maps=() leaves no map for adapters of rank 2"),
        (lambda: DepthConfig(dim=10, num_heads=3), "depth.num_heads=3"),
        (lambda: dataclasses.replace(TINY, num_layers=0), "model.num_layers=0"),
        (lambda: dataclasses.replace(TINY, context=0), "model.context=0"),
        (lambda: dataclasses.replace(TINY, dim=130), "model.dim=130"),
        (lambda: dataclasses.replace(TINY, dim=12), "odd head width 3"),
        (lambda: dataclasses.replace(TINY, dep_q=17), "model.dep_q=17"),
        (lambda: dataclasses.replace(TINY, n_q=8), "model.delays="),
        (lambda: dataclasses.replace(TINY, delays=(0,) + 16 * (-1,)), "model.delays="),
        (lambda: dataclasses.replace(TINY, delays=(1,) + 16 * (1,)), "model.delays[0]=1"),
        (lambda: dataclasses.replace(TINY, layer_context=((3, 10),)), "model.layer_context=(3, 10)"),
        (lambda: dataclasses.replace(TINY, layer_context=((0, 0),)), "model.layer_context=(0, 0)"),
        (lambda: dataclasses.replace(TINY, attention_sink=-1), "model.attention_sink=-1 does not fit"),
        (lambda: dataclasses.replace(TINY, attention_sink=64), "below the shortest attention window of 64"),
        (lambda: dataclasses.replace(TINY, attention_sink=9, layer_context=((1, 9),)), "attention window of 9"),
        (lambda: dataclasses.replace(TINY, ttt=TTTConfig(layers="3")), "names layer 3, but the model has layers 0"),
    ],
)
def test_refused_settings_name_field_and_value(build, words):
    with pytest.raises(InputError) as error:
        build()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_of_a_part():
    lora = LoRAConfig(rank=3, scaling=0.5, maps=["heads", "ffn"])
    assert lora.of("ffn") == lora
    assert [lora.of(part).rank for part in ("attention", "ffn", "depth", "heads")] == [0, 3, 0, 3]
    assert not lora.is_everywhere
    assert LoRAConfig(rank=1).is_everywhere
    assert not LoRAConfig(rank=0).is_everywhere
    assert LoRAConfig(rank=0, maps=()).of("ffn").rank == 0


def test_missing_fields_keep_their_defaults():
    cfg = dataclasses.replace(TINY, lora=LoRAConfig(rank=3))
    stored = config_json.to_dict(cfg)
    del stored["lora"]["maps"]
    assert config_json.from_dict(MoshiConfig, stored, "config.json") == cfg


def test_unknown_preset_gets_a_suggestion():
    with pytest.raises(InputError, match='unknown preset "smal": there are tiny, small, moshi-7b.*"small"'):
        model_preset("smal")
    with pytest.raises(InputError) as error:
        model_preset("xyz")
    assert "perhaps" not in str(error.value)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_presets_that_are_trained_from_scratch_have_their_ttt_layers_first(name):
    layers = MODEL_PRESETS[name].ttt_layers
    assert layers == tuple(range(len(layers)))  # where they learn to recall: docs/results/memory.md


def test_seven_billion_preset_has_the_shape_of_moshi():
    cfg = model_preset("moshi-7b")
    assert (cfg.dim, cfg.num_layers, cfg.num_heads, cfg.context) == (4096, 32, 32, 3000)
    assert (cfg.card, cfg.text_card) == (2048, 32000)
    assert cfg.delays == (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    assert (cfg.num_streams, cfg.dep_q, cfg.max_delay, cfg.head_dim) == (17, 8, 1, 128)


def test_runs_are_the_longest_stretches_of_equal_layers():
    cfg = dataclasses.replace(TINY, num_layers=7, ttt=TTTConfig(layers="2-4"), layer_context=((4, 9), (6, 9)))
    got = [(run.name, run.has_ttt, run.context) for run in cfg.runs]
    assert got == [
        ("layers_00_01", False, 64),
        ("layers_02_03", True, 64),
        ("layers_04_04", True, 9),
        ("layers_05_05", False, 64),
        ("layers_06_06", False, 9),
    ]


def test_configurations_are_hashable_values_also_of_lists():
    assert hash(TTTConfig(hidden=[4])) == hash(TTTConfig(hidden=(4,)))
    assert hash(dataclasses.replace(TINY)) == hash(TINY)
    assert TTTConfig(layers="0", hidden=(2, 3)) == TTTConfig(layers="0", hidden=(2, 3)) != TTTConfig(layers="0")


def test_default_rate_bounds_the_sum_of_a_mini_batch():
    assert [default_base_lr(b, 128) for b in (1, 8, 16, 64, 256)] == [1.0, 1.0, 0.5, 0.125, 0.03125]
    assert [default_base_lr(1, width) for width in (8, 16, 32, 128)] == [0.25, 0.5, 1.0, 1.0]
    assert [default_base_lr(16, 32, layers) for layers in (0, 1, 2, 4)] == [0.5, 0.5, 0.25, 0.0625]
    assert TINY.inner_lr == 0.5
    assert dataclasses.replace(TINY, ttt=TTTConfig(base_lr=0.0)).inner_lr == 0.0
