"""Mimi beside PyTorch `moshi` itself, on random weights handed over in Kyutai's own file: whole and streamed, past the
window.

Needs torch and the PyPI package `moshi`; without them nothing runs here, and `codec/test_mimi_traps.py` compares with
what they made of the fixture. ``python -m pytest -m parity`` runs these alone.
"""

# ruff: noqa: E402  what needs torch is imported where it is there

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity with PyTorch needs torch")
pytest.importorskip("moshi", reason="parity with PyTorch needs the PyPI package moshi", exc_type=ImportError)

import jax

from tests.helpers import near_ties, torch_mimi
from tests.helpers.places import CORPUS
from ttt_jax.codec.mimi import file, model
from ttt_jax.codec.mimi.config import MimiConfig, Use
from ttt_jax.convert import mimi
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.utils.xla import known_options

pytestmark = pytest.mark.parity

ATOL = 1e-4
"""Of the latents and the audio, which have the size of 1."""
ROWS = 2
SECONDS = 13
"""Of Kyutai's shape: 325 latents, of which a query sees 250."""

AS_USERS_DO = known_options(
    {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_use_fusion_emitters": True,
    }
)
"""Kyutai's shape computes for minutes in programs that compile quickly, as other tests have them."""
compiled = partial(jax.jit, static_argnames=("cfg", "use"), compiler_options=AS_USERS_DO)
decode = compiled(model.decode)
reset = jax.jit(model.reset)


@compiled
def encode(*args, cfg, use):
    """Latents and codes, and the state after them."""
    latents, _ = model.encode_latents(*args, cfg, use)
    codes, state = model.encode(*args, cfg, use)
    return (latents, codes), state


class Pair(NamedTuple):
    theirs: torch_mimi.MimiModel
    params: dict[str, np.ndarray]
    cfg: MimiConfig
    audio: np.ndarray
    """[ROWS, n * S]."""


def speech(cfg: MimiConfig) -> np.ndarray:
    """Another voice in each row; a small model hears as many frames at its own rate as pass its window four times."""
    frames = int(SECONDS * 12.5) if cfg == MimiConfig() else 24
    paths = sorted((CORPUS / "voices").glob("*/heldout-*.ogg"))[:ROWS]
    rows = [read_audio(path, 24000)[0, 24000 : 24000 + frames * cfg.frame_size] for path in paths]
    return np.stack([row / np.abs(row).max() for row in rows])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """By name of a shape: the two models and the audio that they hear."""

    @cache
    def make(name: str) -> Pair:
        config = {"other": torch_mimi.OTHER, "kyutai": torch_mimi.KYUTAIS}[name]
        seanet, stride = config["seanet"], 3 if name == "other" else 2
        cfg = MimiConfig() if name == "kyutai" else MimiConfig(ratios=tuple(seanet["ratios"]), stride=stride)
        audio, folder = speech(cfg), tmp_path_factory.mktemp(name)
        theirs = torch_mimi.random_model(config, audio)
        source = torch_mimi.write(folder / "source", theirs, config)
        mimi(source, folder / "ours.safetensors", num_codebooks=config["quantizer"]["n_q"])
        found = file.read(folder / "ours.safetensors")
        return Pair(theirs, found.params, found.cfg, audio)

    return make


shapes = pytest.mark.parametrize("name", ["other", "kyutai"])


def is_close(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Requires `ATOL`, and says what is seen (`pytest -s`)."""
    print(f"{what}: differs by {np.abs(got - expected).max():.1e} of {np.abs(expected).max():.2g}")
    np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def codes_agree(pair: Pair, theirs: torch_mimi.Trace, codes: np.ndarray) -> None:
    print(near_ties.assert_equal_but_for_ties(pair.params, theirs.latents, theirs.codes, codes))


def encoded(pair: Pair, window: str, parts: tuple[int, ...], mask=None, anew=None) -> torch_mimi.Trace:
    """What we make of the audio in calls of these lengths."""
    size = pair.cfg.frame_size
    frames = pair.audio.reshape(ROWS, -1, size)
    run = _ours(pair, window, frames, parts, model.init_encoder, mask, anew)
    latents, codes = zip(*run(encode), strict=True)
    return torch_mimi.Trace(np.concatenate(latents, 1), np.concatenate(codes, 2))


def decoded(pair: Pair, window: str, codes: np.ndarray, parts: tuple[int, ...], mask=None, anew=None) -> np.ndarray:
    run = _ours(pair, window, codes.swapaxes(1, 2), parts, model.init_decoder, mask, anew)
    return np.concatenate(run(decode), 1)


def _ours(pair, window, frames, parts, init, mask, anew):
    use = Use(pair.cfg.codebooks, window=window)
    params = model.prepare(pair.params, pair.cfg, use)
    mask = np.ones(frames.shape[:2], bool) if mask is None else mask

    def run(step) -> list:
        state, results = init(pair.cfg, use, ROWS), []
        for stop, part in zip(np.cumsum(parts), parts, strict=True):
            call = slice(stop - part, stop)
            if anew is not None:
                state = reset(state, anew[:, call.start])
            block = frames[:, call]
            block = block.reshape(ROWS, -1) if step is not decode else block.swapaxes(1, 2).astype(np.int32)
            result, state = step(params, block, mask[:, call], state, cfg=pair.cfg, use=use)
            results.append(jax.device_get(result))
        return results

    return run


def frames_of(pair: Pair) -> int:
    return pair.audio.shape[1] // pair.cfg.frame_size


@shapes
def test_codes_are_various(pair, name):
    """Else their equality would say little."""
    pair = pair(name)
    codes = torch_mimi.encode(pair.theirs, pair.audio).codes
    counts = np.array([len(np.unique(codes[:, q])) for q in range(pair.cfg.codebooks)])
    print(name, counts)
    assert (counts >= 0.15 * min(codes[:, 0].size, pair.cfg.cardinality)).all()


@shapes
def test_whole_recordings_equal_pytorch(pair, name):
    pair = pair(name)
    theirs = torch_mimi.encode(pair.theirs, pair.audio)
    ours = encoded(pair, "exact", (frames_of(pair),))
    is_close(ours.latents, theirs.latents, f"{name} latents")
    codes_agree(pair, theirs, ours.codes)
    audio = decoded(pair, "exact", theirs.codes, (frames_of(pair),))
    is_close(audio, torch_mimi.decode(pair.theirs, theirs.codes), f"{name} audio")


@shapes
def test_streams_of_single_frames_equal_pytorch(pair, name):
    """One row without a break, past the window; others pause, begin late and are reset. What a paused row gives means
    nothing."""
    pair = pair(name)
    rng, shape = np.random.default_rng(0), (ROWS, frames_of(pair))
    mask, anew = rng.random(shape) < 0.8, np.zeros(shape, bool)
    mask[0], mask[1, 0] = True, False
    anew[1, shape[1] // 3] = anew[1, shape[1] - 2] = True
    mask[anew] = True
    theirs, parts = torch_mimi.encode_stream(pair.theirs, pair.audio, mask, anew), (1,) * shape[1]
    ours = encoded(pair, "reference", parts, mask, anew)
    is_close(ours.latents[mask], theirs.latents[mask], f"{name} latents streamed")
    held = torch_mimi.Trace(theirs.latents, np.where(mask[:, None], theirs.codes, 0))
    codes_agree(pair, held, np.where(mask[:, None], ours.codes, 0))
    audio = decoded(pair, "reference", theirs.codes, parts, mask, anew)
    there = np.repeat(mask, pair.cfg.frame_size, 1)
    expected = torch_mimi.decode_stream(pair.theirs, theirs.codes, mask, anew)
    is_close(audio[there], expected[there], f"{name} audio streamed")
    whole = torch_mimi.encode(pair.theirs, pair.audio).latents
    assert np.abs(whole[0] - theirs.latents[0]).max() > 10 * ATOL, "the stream should have lost keys"


def test_calls_of_many_frames_can_give_what_pytorchs_stream_gives(pair):
    pair = pair("other")
    theirs, frames = torch_mimi.encode_stream(pair.theirs, pair.audio), frames_of(pair)
    said = torch_mimi.decode_stream(pair.theirs, theirs.codes)
    for parts in ((frames,), (frames // 2,) * 2):
        ours = encoded(pair, "reference", parts)
        is_close(ours.latents, theirs.latents, "latents of a stream in long calls")
        codes_agree(pair, theirs, ours.codes)
        is_close(decoded(pair, "reference", theirs.codes, parts), said, "audio of a stream in long calls")


def test_fewer_codebooks_are_the_first_ones_of_pytorch(pair):
    pair = pair("other")
    frames = frames_of(pair)
    theirs = torch_mimi.encode(pair.theirs, pair.audio)
    for count in (1, 3, 5):
        pair.theirs.set_num_codebooks(count)
        fewer = torch_mimi.encode(pair.theirs, pair.audio).codes
        expected = torch_mimi.decode(pair.theirs, fewer)
        use = Use(count)
        params, mask = model.prepare(pair.params, pair.cfg, use), np.ones((ROWS, frames), bool)
        (_, codes), _ = encode(params, pair.audio, mask, model.init_encoder(pair.cfg, use, ROWS), cfg=pair.cfg, use=use)
        np.testing.assert_array_equal(fewer, theirs.codes[:, :count])
        near_ties.assert_equal_but_for_ties(pair.params, theirs.latents, fewer, np.asarray(codes))
        state = model.init_decoder(pair.cfg, use, ROWS)
        audio, _ = decode(params, fewer.astype(np.int32), mask, state, cfg=pair.cfg, use=use)
        is_close(np.asarray(audio), expected, f"audio of {count} codebooks")
