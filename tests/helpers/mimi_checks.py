"""Checks of Mimi against what PyTorch `moshi` made of the fixture; they need no torch.

`mimi.trace.safetensors`: audio, then latents after each part, codes and audio, whole and frame by frame; its codes are
nearly all the same. `mimi.codes.safetensors` (`make_fixtures.py`): codebooks among the latents, and what they give. The
window is 10 latents of 40, so that streams differ from wholes.

Each check ends in one assertion, which `codec/test_mimi_traps.py` sees fail on broken copies of the library.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from tests.helpers import mimi_files
from tests.helpers.drawing import quick_jit
from tests.helpers.places import FIXTURES
from ttt_jax.codec.mimi import file, layers, model
from ttt_jax.codec.mimi.config import MimiConfig, Use
from ttt_jax.convert import mimi

ATOL = 1e-6
"""Latents reach 0.33, audio 0.43; float32 rounds both to 4e-8. What is seen is below 3e-7."""
ROWS, FRAMES, THINNED = 2, 20, 16
TRACE = load_file(FIXTURES / "mimi.trace.safetensors")
AUDIO = TRACE["wav"][:, 0]
LATENTS = TRACE["latent"].swapaxes(1, 2)
CODES = load_file(FIXTURES / "mimi.codes.safetensors")
EXACT, REFERENCE = Use(), Use(window="reference")


class Case(NamedTuple):
    """The fixture in our layout."""

    cfg: MimiConfig
    params: dict[str, np.ndarray]


def load(near: bool) -> Case:
    """Kyutai's file by way of our converter and our file; with the codebooks that are `near` its latents, or not."""
    w = mimi_files.weights()
    if near:
        w |= {name: array for name, array in CODES.items() if name in w}
    with tempfile.TemporaryDirectory() as folder:
        mimi(mimi_files.write(Path(folder) / "source", w), Path(folder) / "ours.safetensors")
        found = file.read(Path(folder) / "ours.safetensors")
    return Case(found.cfg, found.params)


sound = cache(load)
"""`load` once, before the library is broken; for checks of anything but reading."""


def furthest(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference; NaN counts as infinite."""
    return np.nan_to_num(np.abs(np.asarray(got) - expected), nan=np.inf).max()


@cache
def _program(encode_latents, encode):
    """Latents and codes, as one program."""

    def run(*args, cfg, use):
        return encode_latents(*args, cfg, use)[0], encode(*args, cfg, use)[0]

    return quick_jit(run, static_argnames=("cfg", "use"))


def encode(case: Case, use: Use, audio: np.ndarray = AUDIO) -> tuple[np.ndarray, np.ndarray]:
    """Latents and codes of whole recordings."""
    params, mask = model.prepare(case.params, case.cfg, use), np.ones((ROWS, FRAMES), bool)
    state = model.init_encoder(case.cfg, use, ROWS)
    run = _program(model.encode_latents, model.encode)
    return jax.device_get(run(params, audio, mask, state, cfg=case.cfg, use=use))


def decode(case: Case, use: Use, codes: np.ndarray) -> np.ndarray:
    """Audio of whole streams of codes."""
    params, mask = model.prepare(case.params, case.cfg, use), np.ones((ROWS, FRAMES), bool)
    state = model.init_decoder(case.cfg, use, ROWS)
    run = quick_jit(model.decode, static_argnames=("cfg", "use"))
    return np.asarray(run(params, codes.astype(np.int32), mask, state, cfg=case.cfg, use=use)[0])


def encode_stream(case: Case, use: Use, mask=None, reset=None) -> tuple[np.ndarray, np.ndarray]:
    """As `encode`, frame by frame; rows pause where `mask` is False and begin anew before a frame that `reset` marks,
    both bool [B, n]."""
    params, frames = model.prepare(case.params, case.cfg, use), np.split(AUDIO, FRAMES, 1)
    state = model.init_encoder(case.cfg, use, ROWS)
    latents = _stream(model.encode_latents, params, frames, state, case.cfg, use, mask, reset)
    codes = quick_jit(layers.quantise, static_argnames="num_codebooks")(
        params, latents, num_codebooks=use.num_codebooks
    )
    return latents, np.asarray(codes)


def decode_stream(case: Case, use: Use, codes: np.ndarray, mask=None, reset=None) -> np.ndarray:
    """As `encode_stream`: audio."""
    params, frames = model.prepare(case.params, case.cfg, use), np.split(codes.astype(np.int32), FRAMES, 2)
    state = model.init_decoder(case.cfg, use, ROWS)
    return _stream(model.decode, params, frames, state, case.cfg, use, mask, reset)


def _stream(step, params, frames, state, cfg, use, mask, reset) -> np.ndarray:
    mask = np.ones((ROWS, FRAMES), bool) if mask is None else mask
    step, anew, parts = quick_jit(step, static_argnames=("cfg", "use")), quick_jit(model.reset), []
    for i, frame in enumerate(frames):
        if reset is not None:
            state = anew(state, reset[:, i])
        part, state = step(params, frame, mask[:, i : i + 1], state, cfg=cfg, use=use)
        parts.append(part)
    return np.concatenate(jax.device_get(parts), 1)


# Checks


def latents_are_pytorchs():
    assert furthest(encode(sound(near=False), EXACT)[0], LATENTS) < ATOL


def codes_are_pytorchs():
    assert (encode(sound(near=True), EXACT)[1] == CODES["codes"]).all()


def audio_is_pytorchs():
    assert furthest(decode(sound(near=False), EXACT, TRACE["codes"]), TRACE["out"][:, 0]) < ATOL


def converted_weights_give_pytorchs_codes_and_audio():
    """Read anew."""
    case = load(near=True)
    same = (encode(case, EXACT)[1] == CODES["codes"]).all()
    audio = decode(case, EXACT, CODES["codes"])
    assert same and furthest(audio[:, ::THINNED], CODES["out"]) < ATOL  # noqa: PT018  one assertion


def codes_of_a_stream_are_pytorchs():
    """All frames in one call, as PyTorch has them of a stream of single frames."""
    latents, codes = encode(sound(near=True), REFERENCE)
    assert furthest(latents, CODES["latents_stream"]) < ATOL and (codes == CODES["codes_stream"]).all()  # noqa: PT018


def audio_of_a_stream_is_pytorchs():
    """As `codes_of_a_stream_are_pytorchs`."""
    audio = decode(sound(near=False), REFERENCE, TRACE["codes"])
    assert furthest(audio, TRACE["out_stream"][:, 0]) < ATOL


def single_frames_are_pytorchs():
    """Of a stream: the codes and the audio."""
    case = sound(near=True)
    latents, codes = encode_stream(case, REFERENCE)
    audio = decode_stream(case, REFERENCE, CODES["codes"])
    far = max(furthest(latents, CODES["latents_stream"]), furthest(audio[:, ::THINNED], CODES["out_stream"]))
    assert far < ATOL and (codes == CODES["codes_stream"]).all()  # noqa: PT018


def single_frames_can_give_pytorchs_whole():
    """With the exact window."""
    case = sound(near=True)
    latents, codes = encode_stream(case, EXACT)
    audio = decode_stream(case, EXACT, CODES["codes"])
    far = max(furthest(latents, LATENTS), furthest(audio[:, ::THINNED], CODES["out"]))
    assert far < ATOL and (codes == CODES["codes"]).all()  # noqa: PT018


def paused_and_reset_rows_are_pytorchs():
    """What a paused row gives means nothing there."""
    case, (mask, reset) = sound(near=True), (CODES["mask"], CODES["reset"])
    latents, codes = encode_stream(case, REFERENCE, mask, reset)
    audio = decode_stream(case, REFERENCE, CODES["codes"], mask, reset)
    there = np.repeat(mask, case.cfg.frame_size // THINNED, 1)
    pairs = [(latents, CODES["latents_paused"], mask), (audio[:, ::THINNED], CODES["out_paused"], there)]
    far = max(furthest(got[where], expected[where]) for got, expected, where in pairs)
    same = codes.swapaxes(1, 2)[mask] == CODES["codes_paused"].swapaxes(1, 2)[mask]
    assert far < ATOL and same.all()  # noqa: PT018
