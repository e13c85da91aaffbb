"""Faults of a new implementation of Mimi: each is put into a copy of this library, and a check must fail on it.

The traps are those of docs/parity/traps.md. The checks lie in `helpers/mimi_checks.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import mimi_checks
from tests.helpers.broken import Flaw, broken, edited
from tests.helpers.mimi_checks import (
    audio_is_pytorchs,
    audio_of_a_stream_is_pytorchs,
    codes_are_pytorchs,
    codes_of_a_stream_are_pytorchs,
    converted_weights_give_pytorchs_codes_and_audio,
    latents_are_pytorchs,
    paused_and_reset_rows_are_pytorchs,
    single_frames_are_pytorchs,
    single_frames_can_give_pytorchs_whole,
)
from ttt_jax.codec.mimi import layers, model
from ttt_jax.convert import mimi_names
from ttt_jax.nn import rotary

PARTS = (layers, model)
NORMED = "return w.reshape(inputs, out, 2, kernel // 2)[:, :, ::-1].transpose(3, 1, 2, 0)"
LOSSY = 'use.window == "reference")'
SCORES = "(product(x, codebook) - half_norms)"

TRAPS = {
    # 13
    "codebooks in bfloat16": Flaw(
        codes_are_pytorchs,
        PARTS,
        {SCORES: "(product(x, codebook.astype(jnp.bfloat16)) - half_norms)"},
    ),
    "nearest by angle": Flaw(codes_are_pytorchs, PARTS, {SCORES: "product(x, codebook)"}),
    "zeros before the first latent": Flaw(
        latents_are_pytorchs, (model,), {"jnp.where(begins, x[:, :1], past": "jnp.where(begins, 0, past"}
    ),
    "every call begins with its own latent": Flaw(
        single_frames_are_pytorchs,
        (model,),
        {"begins = (state.position == 0)[:, None, None]": "begins = jnp.ones((rows, 1, 1), bool)"},
    ),
    "every convolution begins with its first input": Flaw(
        latents_are_pytorchs,
        (model,),
        {
            "layer(params, name, x, past[name], advance, *args)": (
                "layer(params, name, x, 0 * past[name] + x[:, :1], advance, *args)"
            )
        },
    ),
    "bias of both inputs of a transposed convolution": Flaw(
        audio_is_pytorchs,
        PARTS,
        {
            "y = product(y, w.reshape(ratio * out, -1)).reshape(len(x), -1, out)": (
                'y = product(y, w.reshape(ratio * out, -1)).reshape(len(x), -1, out) + params[f"{name}/b"]'
            )
        },
    ),
    "halves of a transposed kernel the other way round": Flaw(
        converted_weights_give_pytorchs_codes_and_audio, (mimi_names,), {NORMED: NORMED.replace("[:, :, ::-1]", "")}
    ),
    "a transposed kernel backwards": Flaw(
        converted_weights_give_pytorchs_codes_and_audio,
        (mimi_names,),
        {NORMED: NORMED.replace("[:, :, ::-1]", "[:, :, ::-1, ::-1]")},
    ),
    "one upsampling kernel for all channels": Flaw(
        audio_is_pytorchs, PARTS, {'w = params["upsample/w"]': 'w = params["upsample/w"][:, :, :1]'}
    ),
    "acoustic codebooks quantise what the semantic one leaves": Flaw(
        codes_are_pytorchs,
        PARTS,
        {
            "        rest = product(latents.astype": (
                '        if part == "acoustic":\n'
                '            entry = params["quantizer/semantic/codebooks"][0][codes[0]]\n'
                '            latents = latents - product(entry, params["quantizer/semantic/output"])\n'
                "        rest = product(latents.astype"
            )
        },
    ),
    "every codebook quantises the latent": Flaw(
        codes_are_pytorchs, PARTS, {"rest = rest - codebook[codes[-1]]": "pass"}
    ),
    "semantic entries are left out of the audio": Flaw(
        audio_is_pytorchs, PARTS, {"total = total + product(": "total = product("}
    ),
    "sums of entries for entries": Flaw(
        converted_weights_give_pytorchs_codes_and_audio,
        (mimi_names,),
        {"weight(stem + SUM) / np.maximum(weight(stem + USAGE), EPSILON)[:, None]": "weight(stem + SUM)"},
    ),
    "halves rotated, not pairs": Flaw(
        latents_are_pytorchs,
        (rotary, *PARTS),
        {
            "even, odd = pairs[..., 0], pairs[..., 1]": "even, odd = jnp.split(x.astype(wide), 2, -1)",
            "jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)": (
                "jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)"
            ),
        },
    ),
    "positions wrap": Flaw(
        latents_are_pytorchs, PARTS, {"where.query, max_period)": "where.query % cache.shape[1], max_period)"}
    ),
    "approximate GELU": Flaw(latents_are_pytorchs, PARTS, {"approximate=False": "approximate=True"}),
    "no layer scale": Flaw(latents_are_pytorchs, PARTS, {'params[f"{layer}/scale1"] * h': "h"}),
    "eps of 1e-6": Flaw(latents_are_pytorchs, PARTS, {"_NORM_EPS = 1e-5": "_NORM_EPS = 1e-6"}),
    "RMSNorm": Flaw(latents_are_pytorchs, PARTS, {"    y = y - y.mean(-1, keepdims=True)\n": ""}),
    # 14
    "the ring of a stream in the exact window": Flaw(latents_are_pytorchs, (model,), {LOSSY: "True)"}),
    "no lost key in codes of a stream": Flaw(codes_of_a_stream_are_pytorchs, (model,), {LOSSY: "False)"}),
    "no lost key in audio of a stream": Flaw(audio_of_a_stream_is_pytorchs, (model,), {LOSSY: "False)"}),
    "the last latent of a frame loses the key": Flaw(
        codes_of_a_stream_are_pytorchs, PARTS, {"(stride - 1 - query % stride if": "(query % stride if"}
    ),
    "a ring of the window alone": Flaw(
        single_frames_can_give_pytorchs_whole, PARTS, {"return context + stride": "return context"}
    ),
    "window one latent longer": Flaw(
        latents_are_pytorchs, PARTS, {"(distance < jnp.broadcast_to": "(distance <= jnp.broadcast_to"}
    ),
    "a row that pauses moves on": Flaw(
        paused_and_reset_rows_are_pytorchs,
        (model,),
        {
            "return _back(x, mask), State(_pack(after, sizes), caches, state.position + advance.count * cfg.stride)": (
                "return _back(x, mask), State(_pack(after, sizes), caches, state.position + cfg.stride)"
            )
        },
    ),
    "a row that is reset keeps its position": Flaw(
        paused_and_reset_rows_are_pytorchs,
        (model,),
        {"x.ndim - 1)), 0, x), state)": "x.ndim - 1)), 0, x), state)._replace(position=state.position)"},
    ),
}
CHECKS = {check.__name__: check for check in [trap.check for trap in TRAPS.values()]}
OF_MORE_PROGRAMS = (
    codes_of_a_stream_are_pytorchs,
    audio_of_a_stream_is_pytorchs,
    single_frames_can_give_pytorchs_whole,
)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=name, marks=[pytest.mark.slow] * (check in OF_MORE_PROGRAMS))
        for name, check in CHECKS.items()
    ],
)
def test_library_is_sound(check):
    check()


def test_codes_of_the_fixture_are_various():
    codes = mimi_checks.CODES["codes"]
    assert all(len(np.unique(codes[:, q])) >= 7 for q in range(8))
    assert (codes != mimi_checks.CODES["codes_stream"]).any(1).sum() >= 5, "the window should change frames"


def test_a_recording_is_filled_up_on_the_right():
    audio, expected = mimi_checks.AUDIO.copy(), mimi_checks.TRACE["codes_odd_len"]
    audio[:, 2 * 1920 + 777 :] = 0
    _, codes = mimi_checks.encode(mimi_checks.sound(near=False), mimi_checks.EXACT, audio)
    np.testing.assert_array_equal(codes[:, :, :3], expected)


DEFAULT = {"acoustic codebooks quantise what the semantic one leaves", "zeros before the first latent"}
"""One for each part; as are those of `mimi_names`, which compile nothing. Every other broken copy compiles anew."""
traps = [
    pytest.param(trap, marks=[pytest.mark.slow] * (name not in DEFAULT and mimi_names not in trap.modules), id=name)
    for name, trap in TRAPS.items()
]


def test_every_trap_edits_what_is_there():
    assert all(edited(trap) for trap in TRAPS.values())


@pytest.mark.parametrize("trap", traps)
def test_broken_copy_is_caught(trap):
    with broken(trap), pytest.raises(AssertionError) as caught:
        trap.check()
    assert caught.traceback[-1].name == trap.check.__name__, "the assertion should be the check's own"
