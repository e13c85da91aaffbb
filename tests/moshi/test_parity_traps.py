"""Faults of a new implementation of Moshi: each is put into a copy of this library, and a check must fail on it.

The traps are those of docs/parity.md. The checks lie in `helpers/pytorch_checks.py`.
"""

from __future__ import annotations

import pytest

from tests.helpers.broken import Flaw, broken, edited
from tests.helpers.pytorch_checks import (
    adapters_give_pytorchs_logits,
    all_logits_and_gradients_are_finite,
    any_calls_give_pytorchs_logits,
    bfloat16_is_as_exact_as_pytorchs,
    converted_weights_give_pytorchs_logits,
    default_sampling_is_pytorchs,
    draws_are_pytorchs,
    export_gives_back_the_file,
    extra_heads_are_pytorchs,
    forced_tokens_are_heard_as_in_pytorch,
    greedy_stream_is_pytorchs,
    greedy_stream_is_pytorchs_where_all_codebooks_are_moshis,
    hidden_widths_are_the_tensors,
    masks_are_pytorchs,
    merged_adapters_give_pytorchs_logits,
    names_of_a_state_dict_are_read,
    paused_and_reset_rows_are_pytorchs,
    rotations_are_float32,
    softmax_is_float32,
    teacher_forced_logits_are_pytorchs,
    teacher_forced_logits_are_pytorchs_where_all_codebooks_are_moshis,
    text_has_a_temperature_of_its_own,
)
from ttt_jax.checkpoints import weights
from ttt_jax.convert import from_kyutai, kyutai_config, lora, state_dict, to_kyutai
from ttt_jax.moshi import attention, blocks, delays, depth, embed, generate, model
from ttt_jax.nn import linear, norms, rotary

TEMPORAL = (blocks, model, generate)
DEPTH = (depth, model, generate)
EVERYWHERE = (blocks, depth, model, generate)

TRAPS = {
    # 1
    "halves rotated, not pairs": Flaw(
        teacher_forced_logits_are_pytorchs,
        (rotary, *TEMPORAL),
        {
            "even, odd = pairs[..., 0], pairs[..., 1]": "even, odd = jnp.split(x.astype(wide), 2, -1)",
            "jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)": (
                "jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)"
            ),
        },
    ),
    "positions wrap": Flaw(
        teacher_forced_logits_are_pytorchs, TEMPORAL, {"rotate(y, position, ": "rotate(y, position % cfg.context, "}
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
    "eps of 1e-5": Flaw(teacher_forced_logits_are_pytorchs, (norms, *EVERYWHERE), {"RMS_EPS = 1e-8": "RMS_EPS = 1e-5"}),
    "no gain": Flaw(teacher_forced_logits_are_pytorchs, (norms, *EVERYWHERE), {"scale.astype(wide)": "1"}),
    "gain of 1 + alpha": Flaw(
        teacher_forced_logits_are_pytorchs, (norms, *EVERYWHERE), {"scale.astype(wide)": "(1 + scale.astype(wide))"}
    ),
    # 3
    "value before gate": Flaw(
        teacher_forced_logits_are_pytorchs,
        TEMPORAL,
        {"jax.nn.silu(h[..., 0, :]) * h[..., 1, :]": "jax.nn.silu(h[..., 1, :]) * h[..., 0, :]"},
    ),
    "value before gate in the depth transformer": Flaw(
        teacher_forced_logits_are_pytorchs,
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
            "            if path[-1] == 'qkv' and tensor.lead:\n"
            "                a = a.reshape(3, a.shape[0], *a.shape[2:]).swapaxes(0, 1)\n"
            "            stacked[tensor.index] = a"
        },
    ),
    "schedule for heads": Flaw(
        teacher_forced_logits_are_pytorchs,
        DEPTH,
        {'each(x, kernel(params, "heads"), wide=True)': 'each(x, of_codebooks(kernel(params, "heads")), wide=True)'},
    ),
    "schedule for tables": Flaw(
        teacher_forced_logits_are_pytorchs,
        DEPTH,
        {'lookup(params["audio_emb"], ': 'lookup(params["audio_emb"][jnp.array(cfg.depth_sets[:-1])], '},
    ),
    "last set for all later codebooks": Flaw(
        teacher_forced_logits_are_pytorchs,
        DEPTH,
        {"kernel.at(jnp.array(cfg.depth_sets))": "kernel.at(jnp.minimum(jnp.arange(q), max(cfg.depth_sets)))"},
    ),
    # 5
    "depth transformer reads before the norm": Flaw(
        teacher_forced_logits_are_pytorchs,
        (model, generate),
        {
            'return rms_norm(x, params["out_norm"]), state': "return x, state",
            "    return text_logits(params, hidden, cfg), audio": (
                '    return text_logits(params, rms_norm(hidden, params["out_norm"]), cfg), audio'
            ),
        },
    ),
    # 6
    "last codebooks are Moshi's": Flaw(
        teacher_forced_logits_are_pytorchs,
        (model, generate),
        {
            "targets = grid.targets[..., : 1 + cfg.dep_q].swapaxes(1, 2)": (
                "moshi = jnp.concatenate([grid.targets[..., :1], grid.targets[..., -cfg.dep_q :]], -1)\n"
                "    targets = moshi.swapaxes(1, 2)"
            )
        },
    ),
    # 7
    "initial tokens in the first column only": Flaw(
        teacher_forced_logits_are_pytorchs,
        (delays, model, generate),
        {
            "    return jnp.broadcast_to(tokens, (batch, cfg.num_streams, cfg.max_delay + 1))": (
                "    history = jnp.broadcast_to(tokens, (batch, cfg.num_streams, cfg.max_delay + 1))\n"
                "    return history.at[..., :-1].set(ABSENT)"
            )
        },
    ),
    "first frame heard": Flaw(
        greedy_stream_is_pytorchs,
        (generate,),
        {"active & (position > 0)[:, None]": "active & (position >= 0)[:, None]"},
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
        teacher_forced_logits_are_pytorchs,
        (embed, depth, model, generate),
        {"jnp.where((tokens < 0)[..., None], 0, rows.astype(dtype))": "rows.astype(dtype)"},
    ),
    "-1 is the initial token": Flaw(
        teacher_forced_logits_are_pytorchs,
        (embed, depth, model, generate),
        {
            "jnp.maximum(tokens, 0)]": "jnp.where(tokens < 0, tables.shape[1] - 1, tokens)]",
            "jnp.where((tokens < 0)[..., None], 0, rows.astype(dtype))": "rows.astype(dtype)",
        },
    ),
    "streams begin with -1": Flaw(
        teacher_forced_logits_are_pytorchs,
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
            "    token, pushed = put(pushed, 0, logits, token)\n": "    _, pushed = put(pushed, 0, logits, token)\n"
            "    token = tokens[:, 0, 0]\n"
        },
    ),
    "codebooks read the sample, not the forced token": Flaw(
        forced_tokens_are_heard_as_in_pytorch,
        (generate,),
        {
            "token, pushed = put(pushed, 1 + codebook, logits,": "_, pushed = put(pushed, 1 + codebook, logits,",
        },
    ),
    # 10
    "temperature divides the noise": Flaw(
        draws_are_pytorchs, (generate,), {"(values / temperature + noise)": "((values + noise) / temperature)"}
    ),
    "temperature of text for audio": Flaw(
        text_has_a_temperature_of_its_own,
        (generate,),
        {
            "text_noise, by_row.text_temperature,": "text_noise, by_row.temperature,",
            "of_codebook, by_row.temperature,": "of_codebook, by_row.text_temperature,",
        },
    ),
    "defaults of the Rust port": Flaw(
        default_sampling_is_pytorchs, (generate,), {"text_top_k: int = 25": "text_top_k: int = 250"}
    ),
    # 11
    "cache written before it is read": Flaw(
        any_calls_give_pytorchs_logits,
        (attention, *TEMPORAL),
        {
            "    distance = query": (
                "    in_cache &= (stored + context)[:, None] > query[:, -1:, None]\n    distance = query"
            ),
        },
    ),
    "window one frame longer": Flaw(
        teacher_forced_logits_are_pytorchs,
        (attention, *TEMPORAL),
        {"(distance >= 0) & (distance < window)": "(distance >= 0) & (distance <= window)"},
    ),
    # 12
    "NaN where nothing is scored": Flaw(
        all_logits_and_gradients_are_finite,
        (model, generate),
        {
            "audio.reshape(rows, length, cfg.dep_q, cfg.card)": (
                "jnp.where((grid_tokens[:, 1:] < cfg.card)[..., None], audio, jnp.nan)"
                ".reshape(rows, length, cfg.dep_q, cfg.card)"
            )
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
        {"y + scaling * product(": "y + product("},
    ),
    "adapters merged without their factor": Flaw(
        merged_adapters_give_pytorchs_logits,
        (lora, from_kyutai, to_kyutai),
        {"up *= np.float32(adapter.scaling)": "pass"},
    ),
    # 16
    "depformer_context is a window": Flaw(
        teacher_forced_logits_are_pytorchs,
        DEPTH,
        {
            "jnp.tril(jnp.ones((q, q), bool))": (
                "jnp.tril(jnp.ones((q, q), bool)) & ~jnp.tril(jnp.ones((q, q), bool), -2)"
            ),
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
            "return jnp.where(view.seen[:, None], s, NEGATIVE)": (
                "return jnp.where(view.seen[:, None], s, NEGATIVE).astype(q.dtype)"
            )
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
    teacher_forced_logits_are_pytorchs_where_all_codebooks_are_moshis,
    extra_heads_are_pytorchs,
    greedy_stream_is_pytorchs_where_all_codebooks_are_moshis,
    paused_and_reset_rows_are_pytorchs,
    export_gives_back_the_file,
)
"""Checks that no trap above needs."""
CHECKS = {check.__name__: check for check in [*(trap.check for trap in TRAPS.values()), *OF_OTHERS]}


OF_SLOW_PROGRAMS = (
    all_logits_and_gradients_are_finite,
    bfloat16_is_as_exact_as_pytorchs,
    merged_adapters_give_pytorchs_logits,
    paused_and_reset_rows_are_pytorchs,
)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=name, marks=[pytest.mark.slow] * (check in OF_SLOW_PROGRAMS))
        for name, check in CHECKS.items()
    ],
)
def test_library_is_sound(check):
    check()


DEFAULT = {
    "rotations in bfloat16",
    "value before gate",
    "eps of 1e-5",
    "depformer_context is a window",
    "hidden width by rule",
    "q, k, v before codebooks",
    "-1 is scored",
    "streams begin with -1",
    "temperature divides the noise",
    "softmax in bfloat16",
    "-1 is code 0",
    "released names only",
    "adapters without their factor",
    "adapters merged without their factor",
}
"""One for each module that traps edit; the others are slow, since every broken copy compiles anew."""
traps = [pytest.param(trap, marks=[pytest.mark.slow] * (name not in DEFAULT), id=name) for name, trap in TRAPS.items()]


def test_every_trap_edits_what_is_there():
    assert all(edited(trap) for trap in TRAPS.values())
    assert {TRAPS[name].modules[0] for name in DEFAULT} == {trap.modules[0] for trap in TRAPS.values()}


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # where a fault widens the residual
@pytest.mark.parametrize("trap", traps)
def test_broken_copy_is_caught(trap):
    with broken(trap), pytest.raises(AssertionError) as caught:
        trap.check()
    assert caught.traceback[-1].name == trap.check.__name__, "the assertion should be the check's own"
