"""Checks of the model against what PyTorch `moshi` made of the fixtures (`make_fixtures.py`); they need no torch.

Each check ends in one assertion, which `moshi/test_parity_traps.py` sees fail on broken copies of the library.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.helpers.drawing import quick_jit
from tests.helpers.places import FIXTURES
from ttt_jax.checkpoints import weights
from ttt_jax.convert import from_kyutai, to_kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import attention, generate, loss, model
from ttt_jax.nn import rotary

ATOL = 1e-4
GREEDY = generate.Sampling(temperature=0, text_temperature=0)
MIXED = (5, 1, 5, 5, 1, 5, 1, 1)


class Case(NamedTuple):
    """A fixture in our layout."""

    cfg: model.MoshiConfig
    params: dict
    trace: dict[str, np.ndarray]


def converted(source: Path, **options) -> weights.Weights:
    """Kyutai's file by way of our converter and our files."""
    with tempfile.TemporaryDirectory() as folder:
        from_kyutai.kyutai(source, Path(folder) / "ours", **options)
        return weights.load(Path(folder) / "ours")


def load(name: str, **options) -> Case:
    found = converted(FIXTURES / name, **options)
    return Case(found.cfg, found.params, load_file(FIXTURES / name / "trace.safetensors"))


sound = cache(load)
"""`load` once, before the library is broken; for checks of anything but reading."""


def teacher_forced(case: Case, codes: np.ndarray, parts: tuple[int, ...]) -> model.Outputs:
    """Outputs of teacher-forced calls of these lengths, time on axis 1."""
    forward, rows = quick_jit(model.forward, static_argnames="cfg"), len(codes)
    state, outputs = model.init_state(case.cfg, rows), []
    for stop, part in zip(np.cumsum(parts), parts, strict=True):
        frames, mask = jnp.asarray(codes[:, :, stop - part : stop]), jnp.ones((rows, part), bool)
        out, state = forward(case.params, frames, mask, state, cfg=case.cfg)
        outputs.append(out._replace(targets=out.targets.swapaxes(1, 2), target_mask=out.target_mask.swapaxes(1, 2)))
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)


def furthest(got: model.Outputs, trace: dict[str, np.ndarray], prefix: str = "") -> float:
    """Largest difference of the logits, text and audio, from the trace; NaN counts as infinite."""
    pairs = [(getattr(got, which), trace[prefix + which]) for which in ("text_logits", "audio_logits")]
    return max(np.nan_to_num(np.abs(a - b), nan=np.inf).max() for a, b in pairs)


def stream(case: Case, user: np.ndarray, forced: np.ndarray | None = None, sampling=GREEDY) -> np.ndarray:
    """Tokens of each call; every frame of `user` is handed in once."""
    rows, _, calls = user.shape
    if forced is None:
        forced = np.full((rows, 1 + case.cfg.dep_q, calls), generate.FREE, np.int32)
    run = quick_jit(generate.generate, static_argnames=("cfg", "sampling", "first_frame"))
    options = {"cfg": case.cfg, "sampling": sampling, "forced": jnp.asarray(forced), "first_frame": "once"}
    state = model.init_state(case.cfg, rows)
    return np.asarray(run(case.params, jnp.asarray(user), jnp.ones((rows, calls), bool), state, **options)[0])


# Checks


def teacher_forced_logits_are_pytorchs():
    case = sound("hibiki")
    assert furthest(teacher_forced(case, case.trace["codes"], (24,)), case.trace) < ATOL


def any_calls_give_pytorchs_logits():
    """Calls of five frames and of one, over three windows."""
    case = sound("hibiki")
    assert furthest(teacher_forced(case, case.trace["codes"], MIXED), case.trace) < ATOL


def teacher_forced_logits_are_pytorchs_where_all_codebooks_are_moshis():
    case = sound("all_moshi")
    assert furthest(teacher_forced(case, case.trace["codes"], (24,)), case.trace) < ATOL


def converted_weights_give_pytorchs_logits():
    """Read anew."""
    case = load("hibiki")
    assert furthest(teacher_forced(case, case.trace["codes"], (24,)), case.trace) < ATOL


def masks_are_pytorchs():
    """PyTorch's are undelayed: entry t of codebook k speaks of column t + delay."""
    case = sound("hibiki")
    got = teacher_forced(case, case.trace["codes"], (24,)).target_mask
    expected = np.zeros_like(got)
    expected[:, :, 0] = case.trace["text_mask"][:, 0]
    for k, delay in enumerate(case.cfg.delays[1 : 1 + case.cfg.dep_q]):
        expected[:, delay:, 1 + k] = case.trace["mask"][:, k, : 24 - delay]
    assert (got == expected).all()


def extra_heads_are_pytorchs():
    case = sound("hibiki")
    heads = jax.nn.softmax(model.extra_logits(case.params, case.trace["hidden"], case.cfg))
    assert np.abs(heads - case.trace["heads"]).max() < ATOL


def greedy_stream_is_pytorchs():
    case = sound("hibiki")
    assert (stream(case, case.trace["user"]) == case.trace["stream"]).all()


def greedy_stream_is_pytorchs_where_all_codebooks_are_moshis():
    case = sound("all_moshi")
    assert (stream(case, case.trace["user"]) == case.trace["stream"]).all()


def forced_tokens_are_heard_as_in_pytorch():
    case = sound("all_moshi")
    assert (stream(case, case.trace["user"], case.trace["forced"]) == case.trace["stream_forced"]).all()


def paused_and_reset_rows_are_pytorchs():
    case = sound("hibiki")
    trace, outs = case.trace, []
    step = quick_jit(generate.stream_step, static_argnames=("cfg", "sampling"))
    state = model.init_state(case.cfg, len(trace["user"]))
    for call in range(trace["user"].shape[2]):
        if trace["reset"][:, call].any():
            state = model.reset_rows(state, jnp.asarray(trace["reset"][:, call]), case.cfg)
        now = jnp.asarray(trace["user"][:, :, call]), jnp.asarray(trace["active"][:, call])
        moshi, state = step(case.params, *now, state, cfg=case.cfg, sampling=GREEDY)
        outs.append(np.asarray(moshi))
    assert (np.stack(outs, -1) == trace["stream_paused"]).all()


def draws_are_pytorchs():
    """From PyTorch's own noise: the largest p / q there is the largest log p + g here, where g = -log q."""
    trace, got = sound("hibiki").trace, []
    for name, temperature in (("hot", 1.3), ("cold", 0.5)):
        noise = -np.log(trace[f"exponential_{name}"])
        tokens = generate.sample(jnp.asarray(trace["draw_logits"]), jnp.asarray(noise), temperature)
        got.append((np.asarray(tokens) == trace[f"draw_{name}"]).all())
    assert all(got)


def default_sampling_is_pytorchs():
    assert tuple(generate.Sampling()) == tuple(sound("hibiki").trace["defaults"])


def text_has_a_temperature_of_its_own():
    """Cold text with hot audio: every row begins with the likeliest text, and not with the same codes."""
    case, rows = sound("all_moshi"), 16
    user = np.zeros((rows, 0, 1 + case.cfg.max_delay), np.int32)
    sampling = generate.Sampling(temperature=2, text_temperature=1e-4)
    first = stream(case, user, sampling=sampling)[:, :2, case.cfg.max_delay]
    assert (set(first[:, 0]), len(set(first[:, 1])) > 1) == ({case.trace["first_text"][0]}, True)


def all_logits_and_gradients_are_finite():
    """Those of what is not scored, too."""
    case = sound("all_moshi")
    codes, mask = jnp.asarray(case.trace["codes"]), jnp.ones((2, 24), bool)

    def total(params):
        out, _ = model.forward(params, codes, mask, model.init_state(case.cfg, 2), cfg=case.cfg)
        return loss.token_losses(out).sum(), (out.text_logits, out.audio_logits)

    numbers = quick_jit(jax.grad(total, has_aux=True))(case.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers))


def hidden_widths_are_the_tensors():
    """Where the configuration's rule gives others, as those of the MLX and Rust ports do."""
    with tempfile.TemporaryDirectory() as folder:
        raw = json.loads((FIXTURES / "hibiki" / "config.json").read_text())
        raw |= {"hidden_scale": 4.125, "depformer_dim_feedforward": 99}
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        try:
            cfg = converted(FIXTURES / "hibiki", config=Path(folder) / "config.json").cfg
            got = cfg.hidden, cfg.depth.hidden
        except InputError as error:
            got = error
    assert got == (84, 63)


def names_of_a_state_dict_are_read():
    """Attention maps codebook by codebook, as modules hold them, `state_dict()` writes them and adapters name them."""
    fused = load_file(FIXTURES / "hibiki" / "model.safetensors")
    sets = {"transformer": 1, "depformer": 3}
    split = {}
    for name, tensor in fused.items():
        if "self_attn" in name:
            stem, kind = name.split("self_attn.")
            for i, part in enumerate(np.split(tensor, sets[name.split(".")[0]])):
                split[f"{stem}self_attn.{kind[:3].rstrip('_')}_projs.{i}.weight"] = np.ascontiguousarray(part)
        else:
            split[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        save_file(split, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text((FIXTURES / "hibiki" / "config.json").read_text())
        try:
            got = converted(Path(folder)).params
        except InputError:
            got = None
    expected = sound("hibiki").params
    same = got is not None and jax.tree.all(jax.tree.map(np.array_equal, got, expected))
    assert same


def adapters_give_pytorchs_logits():
    case = load("hibiki", lora=FIXTURES / "hibiki" / "lora" / "lora.safetensors")
    assert furthest(teacher_forced(case, case.trace["codes"][:, :, :8], (8,)), case.trace, "lora_") < ATOL


def merged_adapters_give_pytorchs_logits():
    case = load("hibiki", lora=FIXTURES / "hibiki" / "lora" / "lora.safetensors", merge_lora=True)
    assert furthest(teacher_forced(case, case.trace["codes"][:, :, :8], (8,)), case.trace, "lora_") < ATOL


def export_gives_back_the_file():
    """Every name, shape, type and bit."""
    expected = load_file(FIXTURES / "hibiki" / "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        from_kyutai.kyutai(FIXTURES / "hibiki", Path(folder) / "ours")
        to_kyutai.export(Path(folder) / "ours", Path(folder) / "back")
        got = load_file(Path(folder) / "back" / "model.safetensors")
    bits = lambda tensors: {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}  # noqa: E731
    assert bits(got) == bits(expected)


@cache
def halved() -> Case:
    """`hibiki` in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(FIXTURES / "hibiki" / "model.safetensors")
        rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
        save_file(rounded, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text((FIXTURES / "hibiki" / "config.json").read_text())
        found = converted(Path(folder))
    return Case(found.cfg, found.params, sound("hibiki").trace)


def half_errors() -> tuple[np.ndarray, bool]:
    """Mean distance of our bfloat16 logits from float32's over PyTorch's (text, audio), and whether ours are
    unrounded."""
    case = halved()
    got = teacher_forced(case, case.trace["half_codes"], (96,))
    pairs = [(getattr(got, which), case.trace["half_" + which]) for which in ("text_logits", "audio_logits")]
    errors = np.array([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs])
    whole = all((a != a.astype(ml_dtypes.bfloat16)).any() and a.dtype == np.float32 for a, _ in pairs)
    return errors / case.trace["half_error"], whole


def bfloat16_is_as_exact_as_pytorchs():
    """Not further from float32 than theirs, nor much nearer; and logits are float32."""
    ratios, whole = half_errors()
    assert whole and ratios.min() > 0.7 and ratios.max() < 1  # noqa: PT018  one assertion a check


def half(name: str) -> jax.Array:
    return jnp.asarray(sound("hibiki").trace[f"half_{name}"], jnp.bfloat16)


def rotations_are_float32():
    """At positions from 2900; a step of bfloat16 between the two is rounding, or the way the frequency is computed."""
    got = rotary.rotate(half("q"), jnp.arange(2900, 2964)[None], 10_000).astype(np.float32)
    expected = half("turned").astype(np.float32)
    assert (np.abs(got - expected) <= 2.0**-7 * np.abs(expected) + 1e-2).all()


def softmax_is_float32():
    """With scores up to a hundred, whose bfloat16 steps are up to a half: error over PyTorch's error, from float64."""
    q, k, v = half("q"), half("k"), half("v")
    kv_cache = attention.init_kv_cache(1, 64, 2, 8, q.dtype)
    where = attention.positions(jnp.zeros(1, jnp.int32), jnp.ones((1, 64), bool), 64)
    got = quick_jit(attention.attend)(q, k, v, kv_cache, where)
    q, k, v, theirs, got = (np.asarray(x, np.float64) for x in (q, k, v, half("attended"), got))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8)
    weights = np.where(np.tril(np.ones((64, 64), bool)), np.exp(scores - scores.max(-1, keepdims=True)), 0)
    exact = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    assert np.abs(got - exact).mean() < 1.5 * np.abs(theirs - exact).mean()
