"""Times a wav frame in to a wav frame out, as a server answers: ``python -m bench.speech``.

Mimi at full size (float32) and the language model with three TTT layers on random weights, Kyutai's sampling, full
attention windows: from samples in NumPy to samples and tokens in NumPy, of all rows at once, frame after frame. Beside
it stand the time to read all weights and states once at the bandwidth that a copy reaches here, memory by session, what
joins and forks take, and the path of PyTorch's server (package ``moshi``, where it is installed). Each program runs in
a process of its own.

    python -m bench.speech                                    # small: as in bench.stream, float32
    python -m bench.speech --shape 7b --rows 1 8 16 32        # the 7B in bfloat16: a GPU of 140 GB
    python -m bench.speech --long 45000                       # an hour of one talk: time and memory by tenths
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import figures, stream

if TYPE_CHECKING:
    from ttt_jax.serve.speech import RowSettings, Speech, State

TTT = {"small": "5-7", "7b": "29,30,31"}
WARM_UP = 20
COPIES = 10


def main() -> None:
    """Prints a line for each result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["small", "7b"], default="small")
    parser.add_argument("--rows", type=int, nargs="*", default=[1])
    parser.add_argument("--frames", type=int, default=200, help="timed of each program")
    parser.add_argument("--plain", type=int, nargs="*", default=[1, 32], help="rows also timed without measurement")
    parser.add_argument("--no-torch", action="store_true", help="leave out PyTorch's server")
    parser.add_argument("--long", type=int, help="only stream this many frames of one talk, 300 or more")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.long is not None and args.long < 300:
        parser.error(f"--long {args.long} has no ten parts to compare: give 300 or more")
    if args.child:
        child(**json.loads(args.child))
        return
    of_all = {"shape": args.shape, "frames": args.frames}
    cells = [{"who": "ours", "rows": rows, "plain": rows in args.plain, **of_all} for rows in args.rows]
    if args.long is not None:
        cells = [{"who": "long", "shape": args.shape, "frames": args.long}]
    elif not args.no_torch and importlib.util.find_spec("moshi"):
        cells.append({"who": "torch", **of_all})
    elif not args.no_torch:
        print("PyTorch moshi is not installed here (docs/parity.md says how to install it)", flush=True)
    failed = [cell for cell in cells if start(cell)]
    if failed:
        sys.exit(f"{len(failed)} of {len(cells)} programs failed, the first {failed[0]}; their messages stand above")


def start(cell: dict[str, Any]) -> int:
    """Runs `child` in a process, whose end frees the device's memory; returns its exit status."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    return subprocess.run([sys.executable, "-m", "bench.speech", "--child", json.dumps(cell)], env=env).returncode


def child(who: str, shape: str, frames: int, **ours: Any) -> None:
    """One program."""
    if who == "torch":
        torch_server(shape, frames)
        return
    speech = random_speech(shape)
    print(f"{shape}, {figures.device()}", flush=True)
    if who == "long":
        one_talk(speech, frames)
    else:
        many_talks(speech, frames, **ours)


def random_speech(shape: str) -> Speech:
    """The language model of a shape and Mimi at full size, random weights."""
    import jax

    from ttt_jax.codec.mimi import model
    from ttt_jax.codec.mimi.codec import MimiCodec
    from ttt_jax.codec.mimi.config import MimiConfig, Use
    from ttt_jax.serve.speech import Speech

    cfg = stream.configuration(shape, TTT[shape])
    codec = MimiCodec(model.init_params(MimiConfig(), 0), MimiConfig(), Use(), "random", "random")
    speech = Speech(figures.random_params(cfg), cfg, codec)
    jax.block_until_ready((speech.params, codec.params))
    return speech


def many_talks(speech: Speech, frames: int, rows: int, plain: bool) -> None:
    """Prints times and memory of `rows` talks; `plain`: also without log-probabilities and inner losses."""
    weights = bytes_of((stream.read_bytes(speech.params), speech.codec.params))
    before, bandwidth = (figures.in_use(), figures.peak()), figures.copy_bandwidth()
    state, sound = full_window(speech, range(rows)), noise(speech, rows)

    def say(text: str) -> None:
        print(f"{rows:2d} rows: {text}", flush=True)

    say(f"every byte of weights and state once {(weights + bytes_of(state)) / bandwidth * 1e3:.2f} ms")
    found, state = speech_step(speech, state, sound, frames, measured=True)
    say(f"Speech.step, measured {found}")
    say(memory(state, weights, *before))
    if plain:
        found, state = speech_step(speech, state, sound, frames, measured=False)
        say(f"Speech.step, plain    {found}")
    for what, times in between_steps(speech, state).items():  # and frees the state: two would not fit a GPU
        say(f"{what:21s} {quantiles(times)}")
    say(f"Talks.step, measured  {talks_step(speech, rows, sound, frames)}")


def speech_step(speech: Speech, state: State, sound: np.ndarray, frames: int, measured: bool) -> tuple[str, State]:
    """Times of `Speech.step` of all rows, and the state after them."""
    rows = sound.shape[1]
    settings, everyone, spoken = kyutai_settings(rows), np.ones(rows, bool), None

    def step(i: int) -> None:
        nonlocal state, spoken
        spoken, state = speech.step(sound[i % len(sound)], everyone, everyone, state, settings, measured)

    found = timed(step, frames)
    if (spoken.moshi < 0).any() or not np.isfinite(spoken.audio).all():
        sys.exit(f"some of {rows} rows gave no tokens, or samples that are not finite")
    return found, state


def full_window(speech: Speech, seeds: Any) -> State:
    """A state whose windows, the language model's and Mimi's, are full. What they hold does not change the time."""
    import jax.numpy as jnp

    def moved(state: Any, position: int) -> Any:
        return state._replace(position=jnp.full_like(state.position, position))

    state, cfg, mimi = speech.init_state(seeds), speech.cfg, speech.codec.cfg
    encoder, decoder = (moved(part, mimi.context + 5 * mimi.stride) for part in (state.encoder, state.decoder))
    return state._replace(encoder=encoder, model=moved(state.model, cfg.context + 5), decoder=decoder)


def kyutai_settings(rows: int) -> RowSettings:
    """Kyutai's sampling and a memory as trained, in all rows."""
    import jax.numpy as jnp

    from ttt_jax.moshi.generate import RowSampling, Sampling
    from ttt_jax.serve.speech import RowSettings
    from ttt_jax.ttt.layer import Control

    sampling = RowSampling(*(jnp.full((rows,), value, jnp.asarray(value).dtype) for value in Sampling()))
    return RowSettings(sampling, Control(jnp.ones((rows,), bool), jnp.full((rows,), jnp.nan, jnp.float32)))


def noise(speech: Speech, rows: int) -> np.ndarray:
    """64 frames of samples, float32 [64, rows, S]."""
    rng = np.random.default_rng(0)
    return 0.1 * rng.standard_normal((64, rows, speech.codec.frame_size), np.float32)


def timed(step: Callable[[int], Any], frames: int) -> str:
    """Quantiles of the milliseconds of a step, after the first, which compiles, and some more."""
    (first,) = milliseconds(step, 1)
    milliseconds(step, WARM_UP)
    return f"{quantiles(milliseconds(step, frames))}; first call {first / 1e3:.1f} s"


def milliseconds(step: Callable[[int], Any], frames: int) -> list[float]:
    """Of each of `frames` steps."""
    times = []
    for i in range(frames):
        began = time.perf_counter()
        step(i)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def quantiles(times: list[float]) -> str:
    """Median, ninetieth and ninety-ninth percentile."""
    median, high, highest = np.percentile(times, [50, 90, 99])
    return f"median {median:7.2f} ms, p90 {high:.2f}, p99 {highest:.2f} ({len(times)} times)"


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, whose numbers count as they are."""
    import jax

    return sum(getattr(leaf, "nbytes", leaf) for leaf in jax.tree.leaves(tree))


def memory(state: State, weights: int, held: float, peak: float) -> str:
    """Memory of a session by shapes and in use, and the peak.

    Args:
      weights: bytes that a frame reads; held, peak: gigabytes in use with the weights alone, and the peak up to there.
    """
    rows, runs, now = len(state.model.position), state.model.layers.values(), figures.peak()
    parts = {
        "KV caches": [run.kv_cache for run in runs],
        "fast weights": [run.ttt for run in runs],
        "Mimi": (state.encoder, state.decoder),
    }
    named = ", ".join(f"{name} {bytes_of(part) / rows / 1e9:.4f}" for name, part in parts.items())
    above = f"{now - held:.2f} above the weights" if now > peak else "reached while weights were made"
    in_use = (figures.in_use() - held) / rows
    return (
        f"a session takes {bytes_of(state) / rows / 1e9:.4f} GB by shapes ({named}), {in_use:.4f} in use;"
        f" weights {held:.2f} in use, {weights / 1e9:.2f} read; peak {now:.2f}, {above}"
    )


def between_steps(speech: Speech, state: State) -> dict[str, list[float]]:
    """Times of what a server does between two steps: a new talk joins, one is taken out (to be saved), one is forked.
    The state is passed on."""
    import jax

    from ttt_jax.serve.speech import put, take

    last = len(state.model.position) - 1

    def join(i: int) -> None:
        nonlocal state
        state = jax.block_until_ready(speech.begin(state, last, i))

    def take_out(i: int) -> None:
        jax.block_until_ready(take(state, 0))

    def fork(i: int) -> None:
        nonlocal state
        state = jax.block_until_ready(put(state, last, take(state, 0)))

    times = {}
    for what, change in (("join", join), ("take", take_out), ("fork", fork)):
        change(0)  # compiles
        times[what] = milliseconds(change, COPIES)
    return times


def talks_step(speech: Speech, rows: int, sound: np.ndarray, frames: int) -> str:
    """Times of a step of `Talks`, which adds the host's work of a server."""
    from ttt_jax.serve.talks import Talk, Talks

    talks, one = Talks(speech, rows, measured=True), Talk(full_window(speech, [0]), begun=True)
    joined = [talks.join(talk=one) for _ in range(rows)]
    return timed(lambda i: talks.step(dict(zip(joined, sound[i % len(sound)], strict=True))), frames)


def one_talk(speech: Speech, frames: int) -> None:
    """Prints time and memory over a talk of `frames` frames: of its first hundred, then of the last of each tenth."""
    from ttt_jax.serve.talks import Talks

    talks, sound = Talks(speech, 1, measured=True), noise(speech, 1)
    row, tenth = talks.join(), frames // 10
    last, done = min(100, (tenth - WARM_UP) // 2), WARM_UP

    def step(i: int) -> None:
        talks.step({row: sound[i % len(sound), 0]})

    milliseconds(step, WARM_UP)
    for others in [0, tenth - WARM_UP - 2 * last, *[tenth - last] * 9]:
        milliseconds(step, others)
        times, done = milliseconds(step, last), done + others + last
        held = f"{figures.in_use():.3f} GB in use, {figures.of_process():.3f} GB of the host"
        print(f"frames {done - last} to {done}: {quantiles(times)}; {held}", flush=True)


def torch_server(shape: str, frames: int) -> None:
    """Prints times of one talk as ``moshi.server`` answers it: Mimi, ``LMGen`` and Mimi, on its defaults."""
    import torch

    gen, context = stream.torch_language_model(shape)
    from bench.mimi import torch_device, torch_mimi

    mimi, device = torch_mimi()
    frames_in = 0.1 * np.random.default_rng(0).standard_normal((64, 1920), np.float32)

    def step(i: int) -> tuple[np.ndarray, int] | None:
        codes = mimi.encode(torch.from_numpy(frames_in[i % 64]).to(device)[None, None])
        tokens = gen.step(codes)
        if tokens is None:  # of the first frames
            return None
        return mimi.decode(tokens[:, 1:]).cpu()[0, 0].numpy(), tokens[0, 0, 0].item()

    with torch.no_grad():
        mimi.streaming_forever(1)
        gen.streaming_forever(1)
        milliseconds(step, WARM_UP)
        stream.fill_window(gen.lm_model.transformer, context + 5)
        for part in (mimi.encoder_transformer, mimi.decoder_transformer):
            stream.fill_window(part, 260)  # window 250
        text = timed(step, frames)
    print(f" 1 row: PyTorch's server, no TTT {text}; {shape}, {torch_device()}", flush=True)


if __name__ == "__main__":
    main()
