"""What goes wrong when Moshi is written anew, each pinned by a check that is seen to fail on a copy with the fault.

The traps are those of docs/parity.md. Checks compare with what PyTorch `moshi` made of the fixtures (`make_fixtures.py`), so
they need no torch; each ends in its one assertion.
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
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.broken import Flaw, broken, edited
from tests.helpers.drawing import quick_jit
from tests.helpers.places import FIXTURES
from ttt_jax.checkpoints import weights
from ttt_jax.convert import from_kyutai, kyutai_config, lora, state_dict, to_kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import attention, blocks, delays, depth, embed, generate, loss, model
from ttt_jax.nn import linear, norms, rotary

ATOL = 1e-4
GREEDY = generate.Sampling(temperature=0, text_temperature=0)
MIXED = (5, 1, 5, 5, 1, 5, 1, 1)


class Case(NamedTuple):
    """A fixture in our layout."""

    cfg: model.MoshiConfig
    params: dict
    trace: dict[str, np.ndarray]


def converted(source: Path, **options) -> weights.Weights:
    """By way of a folder of ours."""
    with tempfile.TemporaryDirectory() as folder:
        from_kyutai.kyutai(source, Path(folder) / "ours", **options)
        return weights.load(Path(folder) / "ours")


def load(name: str, **options) -> Case:
    found = converted(FIXTURES / name, **options)
    return Case(found.cfg, found.params, load_file(FIXTURES / name / "trace.safetensors"))


sound = cache(load)
"""Fixtures as the library reads them when it is whole; for checks of what is not reading."""


def teach(case: Case, codes: np.ndarray, parts: tuple[int, ...]) -> model.Outputs:
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


def taught_logits_are_pytorchs():
    case = sound("hibiki")
    assert furthest(teach(case, case.trace["codes"], (24,)), case.trace) < ATOL


def any_calls_give_pytorchs_logits():
    """Calls of five frames and of one, over three windows."""
    case = sound("hibiki")
    assert furthest(teach(case, case.trace["codes"], MIXED), case.trace) < ATOL


def taught_logits_are_pytorchs_where_all_codebooks_are_own():
    case = sound("all_own")
    assert furthest(teach(case, case.trace["codes"], (24,)), case.trace) < ATOL


def converted_weights_give_pytorchs_logits():
    """Read anew."""
    case = load("hibiki")
    assert furthest(teach(case, case.trace["codes"], (24,)), case.trace) < ATOL


def masks_are_pytorchs():
    """PyTorch's are undelayed: entry t of codebook k speaks of column t + delay."""
    case = sound("hibiki")
    got = teach(case, case.trace["codes"], (24,)).target_mask
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


def greedy_stream_is_pytorchs_where_all_codebooks_are_own():
    case = sound("all_own")
    assert (stream(case, case.trace["user"]) == case.trace["stream"]).all()


def forced_tokens_are_heard_as_in_pytorch():
    case = sound("all_own")
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
        own, state = step(case.params, *now, state, cfg=case.cfg, sampling=GREEDY)
        outs.append(np.asarray(own))
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
    case, rows = sound("all_own"), 16
    user = np.zeros((rows, 0, 1 + case.cfg.max_delay), np.int32)
    sampling = generate.Sampling(temperature=2, text_temperature=1e-4)
    first = stream(case, user, sampling=sampling)[:, :2, case.cfg.max_delay]
    assert set(first[:, 0]) == {case.trace["first_text"][0]} and len(set(first[:, 1])) > 1  # noqa: PT018  one assertion a check


def all_logits_and_gradients_are_finite():
    """Those of what is not scored, too."""
    case = sound("all_own")
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
    assert got is not None and jax.tree.all(jax.tree.map(np.array_equal, got, expected))  # noqa: PT018  one assertion a check


def adapters_give_pytorchs_logits():
    case = load("hibiki", lora=FIXTURES / "hibiki" / "lora" / "lora.safetensors")
    assert furthest(teach(case, case.trace["codes"][:, :, :8], (8,)), case.trace, "lora_") < ATOL


def merged_adapters_give_pytorchs_logits():
    case = load("hibiki", lora=FIXTURES / "hibiki" / "lora" / "lora.safetensors", merge_lora=True)
    assert furthest(teach(case, case.trace["codes"][:, :, :8], (8,)), case.trace, "lora_") < ATOL


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
    """Mean distance of our bfloat16 logits from float32's over PyTorch's (text, audio), and whether ours are unrounded."""
    case = halved()
    got = teach(case, case.trace["half_codes"], (96,))
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


TEMPORAL = (blocks, model, generate)
DEPTH = (depth, model, generate)
EVERYWHERE = (blocks, depth, model, generate)

TRAPS = {
    # 1
    "halves rotated, not pairs": Flaw(
        taught_logits_are_pytorchs,
        (rotary, *TEMPORAL),
        {
            "even, odd = pairs[..., 0], pairs[..., 1]": "even, odd = jnp.split(x.astype(wide), 2, -1)",
            "jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)": (
                "jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)"
            ),
        },
    ),
    "positions wrap": Flaw(
        taught_logits_are_pytorchs, TEMPORAL, {"rotate(y, position, ": "rotate(y, position % cfg.context, "}
    ),
    "keys cached before they are rotated": Flaw(
        any_calls_give_pytorchs_logits,
        TEMPORAL,
        {
            "        q, k = (rotate(": "        raw = k\n        q, k = (rotate(",
            "read, kept = attend(q, k, v)\n": "read, kept = attend(q, k, v)\n"
            "        kept = (raw, v) if x.shape[1] > 1 else kept\n",
        },
    ),
    # 2
    "eps of 1e-5": Flaw(taught_logits_are_pytorchs, (norms, *EVERYWHERE), {"RMS_EPS = 1e-8": "RMS_EPS = 1e-5"}),
    "no gain": Flaw(taught_logits_are_pytorchs, (norms, *EVERYWHERE), {"scale.astype(wide)": "1"}),
    "gain of 1 + alpha": Flaw(
        taught_logits_are_pytorchs, (norms, *EVERYWHERE), {"scale.astype(wide)": "(1 + scale.astype(wide))"}
    ),
    # 3
    "value before gate": Flaw(
        taught_logits_are_pytorchs,
        TEMPORAL,
        {"jax.nn.silu(h[..., 0, :]) * h[..., 1, :]": "jax.nn.silu(h[..., 1, :]) * h[..., 0, :]"},
    ),
    "value before gate in the depth transformer": Flaw(
        taught_logits_are_pytorchs,
        DEPTH,
        {"jax.nn.silu(y[:, :, 0]) * y[:, :, 1]": "jax.nn.silu(y[:, :, 1]) * y[:, :, 0]"},
    ),
    "hidden width by rule": Flaw(
        hidden_widths_are_the_tensors,
        (kyutai_config, from_kyutai),
        {
            '_width(shapes, r"transformer': 'None and _width(shapes, r"transformer',
            '_width(shapes, r"depformer': 'None and _width(shapes, r"depformer',
        },
    ),
    # 4
    "q, k, v before codebooks": Flaw(
        converted_weights_give_pytorchs_logits,
        (weights,),
        {
            "stacked[tensor.index] = folder.array(tensor)": "a = folder.array(tensor)\n"
            "            if name == 'qkv' and tensor.lead:\n"
            "                a = a.reshape(3, a.shape[0], *a.shape[2:]).swapaxes(0, 1)\n"
            "            stacked[tensor.index] = a"
        },
    ),
    "schedule for heads": Flaw(
        taught_logits_are_pytorchs,
        DEPTH,
        {'each(x, kernel(params, "heads"), wide=True)': 'each(x, of_codebooks(kernel(params, "heads")), wide=True)'},
    ),
    "schedule for tables": Flaw(
        taught_logits_are_pytorchs,
        DEPTH,
        {'lookup(params["audio_emb"], ': 'lookup(params["audio_emb"][jnp.array(cfg.depth_sets[:-1])], '},
    ),
    "last set for all later codebooks": Flaw(
        taught_logits_are_pytorchs,
        DEPTH,
        {"kernel.at(jnp.array(cfg.depth_sets))": "kernel.at(jnp.minimum(jnp.arange(q), max(cfg.depth_sets)))"},
    ),
    # 5
    "depth transformer reads before the norm": Flaw(
        taught_logits_are_pytorchs,
        (model, generate),
        {
            'return rms_norm(x, params["out_norm"]), state': "return x, state",
            "    return text_logits(params, hidden, cfg), audio": (
                '    return text_logits(params, rms_norm(hidden, params["out_norm"]), cfg), audio'
            ),
        },
    ),
    # 6
    "last codebooks are own": Flaw(
        taught_logits_are_pytorchs,
        (model, generate),
        {
            "targets = grid.targets[..., : 1 + cfg.dep_q].swapaxes(1, 2)": (
                "own = jnp.concatenate([grid.targets[..., :1], grid.targets[..., -cfg.dep_q :]], -1)\n"
                "    targets = own.swapaxes(1, 2)"
            )
        },
    ),
    # 7
    "initial tokens in the first column only": Flaw(
        taught_logits_are_pytorchs,
        (delays, model, generate),
        {
            "    return jnp.broadcast_to(tokens, (batch, cfg.num_streams, cfg.max_delay + 1))": (
                "    history = jnp.broadcast_to(tokens, (batch, cfg.num_streams, cfg.max_delay + 1))\n"
                "    return history.at[..., :-1].set(ABSENT)"
            )
        },
    ),
    "first frame heard": Flaw(
        greedy_stream_is_pytorchs, (generate,), {"rows & (position > 0)[:, None]": "rows & (position >= 0)[:, None]"}
    ),
    "frames heard a call later": Flaw(
        greedy_stream_is_pytorchs,
        (generate,),
        {"tokens = jnp.stack([history[:, k": "tokens = jnp.stack([state.history[:, k"},
    ),
    "output does not wait for the last codebook": Flaw(
        greedy_stream_is_pytorchs, (generate,), {"newest_slot - cfg.max_delay], ABSENT": "newest_slot], ABSENT"}
    ),
    "targets before a stream begins": Flaw(
        masks_are_pytorchs,
        (model, generate),
        {"(targets >= 0) & (targets < cards)": "(targets >= 0) & (targets <= cards)"},
    ),
    # 8
    "-1 is code 0": Flaw(
        taught_logits_are_pytorchs,
        (embed, depth, model, generate),
        {"jnp.where((tokens < 0)[..., None], 0, rows.astype(dtype))": "rows.astype(dtype)"},
    ),
    "-1 is the initial token": Flaw(
        taught_logits_are_pytorchs,
        (embed, depth, model, generate),
        {
            "jnp.maximum(tokens, 0)]": "jnp.where(tokens < 0, tables.shape[1] - 1, tokens)]",
            "jnp.where((tokens < 0)[..., None], 0, rows.astype(dtype))": "rows.astype(dtype)",
        },
    ),
    "streams begin with -1": Flaw(
        taught_logits_are_pytorchs,
        (delays, model, generate),
        {"[cfg.text_card] + cfg.n_q * [cfg.card]": "[ABSENT] + cfg.n_q * [ABSENT]"},
    ),
    "-2 is a token": Flaw(greedy_stream_is_pytorchs, (generate,), {"(held != FREE)": "(held != ABSENT)"}),
    "-1 is scored": Flaw(masks_are_pytorchs, (model, generate), {"(targets >= 0) & ": ""}),
    # 9
    "codebook 1 reads the text before": Flaw(
        greedy_stream_is_pytorchs,
        (generate,),
        {
            "    token, pushed = put(pushed, 0, token)\n": "    _, pushed = put(pushed, 0, token)\n"
            "    token = tokens[:, 0, 0]\n"
        },
    ),
    "codebooks read the sample, not the forced token": Flaw(
        forced_tokens_are_heard_as_in_pytorch,
        (generate,),
        {"token, pushed = put(pushed, 1 + codebook, token)": "_, pushed = put(pushed, 1 + codebook, token)"},
    ),
    # 10
    "temperature divides the noise": Flaw(
        draws_are_pytorchs, (generate,), {"values / temperature + noise": "(values + noise) / temperature"}
    ),
    "temperature of text for audio": Flaw(
        text_has_a_temperature_of_its_own,
        (generate,),
        {
            "text_noise, sampling.text_temperature)": "text_noise, sampling.temperature)",
            "noise[:, codebook], sampling.temperature)": "noise[:, codebook], sampling.text_temperature)",
        },
    ),
    "defaults of the Rust port": Flaw(
        default_sampling_is_pytorchs, (generate,), {"text_top_k: int = 25": "text_top_k: int = 250"}
    ),
    # 11
    "ring written before it is read": Flaw(
        any_calls_give_pytorchs_logits,
        (attention, *TEMPORAL),
        {
            "    distance = query": "    in_ring &= (held + context)[:, None] > query[:, -1:, None]\n    distance = query",
        },
    ),
    "window one frame longer": Flaw(
        taught_logits_are_pytorchs,
        (attention, *TEMPORAL),
        {"(distance >= 0) & (distance < context)": "(distance >= 0) & (distance <= context)"},
    ),
    # 12
    "NaN where nothing is scored": Flaw(
        all_logits_and_gradients_are_finite,
        (model, generate),
        {
            "audio.reshape(rows, length, cfg.dep_q, cfg.card)": "jnp.where((own[:, 1:] < cfg.card)[..., None], audio, jnp.nan)"
            ".reshape(rows, length, cfg.dep_q, cfg.card)"
        },
    ),
    # 15
    "released names only": Flaw(
        names_of_a_state_dict_are_read,
        (state_dict, from_kyutai),
        {"if names.fused and not unfused else names.parts": "if names.fused else names.parts"},
    ),
    "adapters without their factor": Flaw(
        adapters_give_pytorchs_logits,
        (linear, *EVERYWHERE),
        {"y + scaling * _product(": "y + _product("},
    ),
    "adapters merged without their factor": Flaw(
        merged_adapters_give_pytorchs_logits,
        (lora, from_kyutai, to_kyutai),
        {"up *= np.float32(adapter.scaling)": "pass"},
    ),
    # 16
    "depformer_context is a window": Flaw(
        taught_logits_are_pytorchs,
        DEPTH,
        {
            "jnp.tril(jnp.ones((q, q), bool))": "jnp.tril(jnp.ones((q, q), bool)) & ~jnp.tril(jnp.ones((q, q), bool), -2)",
        },
    ),
    # 20
    "rotations in bfloat16": Flaw(
        rotations_are_float32,
        (rotary,),
        {"wide = jnp.promote_types(x.dtype, jnp.float32)": "wide = x.dtype"},
    ),
    "norms in bfloat16": Flaw(
        bfloat16_is_as_exact_as_pytorchs,
        (norms, *EVERYWHERE),
        {"wide = jnp.promote_types(x.dtype, jnp.float32)": "wide = x.dtype"},
    ),
    "softmax in bfloat16": Flaw(
        softmax_is_float32,
        (attention,),
        {
            "return jnp.where(seen[:, None], s, NEGATIVE)": "return jnp.where(seen[:, None], s, NEGATIVE).astype(q.dtype)"
        },
    ),
    "residual in float32": Flaw(
        bfloat16_is_as_exact_as_pytorchs,
        (model, generate),
        {
            'by_rows(text.sum(2) + lookup(params["audio_emb"]': (
                'by_rows(text.sum(2).astype(jnp.float32) + lookup(params["audio_emb"]'
            )
        },
    ),
    "logits in bfloat16": Flaw(
        bfloat16_is_as_exact_as_pytorchs,
        (linear, *EVERYWHERE),
        {"out_type = sums if wide else x.dtype": "out_type = x.dtype"},
    ),
}
OF_OTHERS = (
    taught_logits_are_pytorchs_where_all_codebooks_are_own,
    extra_heads_are_pytorchs,
    greedy_stream_is_pytorchs_where_all_codebooks_are_own,
    paused_and_reset_rows_are_pytorchs,
    export_gives_back_the_file,
)
"""Checks that no trap above needs."""
CHECKS = {check.__name__: check for check in [*(trap.check for trap in TRAPS.values()), *OF_OTHERS]}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_library_is_sound(check):
    check()


SLOW = {
    "gain of 1 + alpha",
    "no gain",
    "value before gate in the depth transformer",
    "schedule for heads",
    "last codebooks are own",
    "initial tokens in the first column only",
    "output does not wait for the last codebook",
    "streams begin with -1",
    "codebook 1 reads the text before",
    "temperature of text for audio",
    "softmax in bfloat16",
    "residual in float32",
    "last set for all later codebooks",
    "schedule for tables",
    "frames heard a call later",
    "targets before a stream begins",
    "-1 is the initial token",
    "-2 is a token",
    "window one frame longer",
    "adapters merged without their factor",
}
"""Whose neighbours are near enough for every run."""
traps = [pytest.param(trap, marks=[pytest.mark.slow] * (name in SLOW), id=name) for name, trap in TRAPS.items()]


def test_every_trap_edits_what_is_there():
    for trap in TRAPS.values():  # most of them are set in slow runs only
        assert edited(trap)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # where a fault widens the residual
@pytest.mark.parametrize("trap", traps)
def test_broken_copy_is_caught(trap):
    with broken(trap), pytest.raises(AssertionError) as caught:
        trap.check()
    assert caught.traceback[-1].name == trap.check.__name__, "the assertion should be the check's own"
