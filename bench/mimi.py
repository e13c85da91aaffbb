"""Times Mimi at full size with random weights: ``python -m bench.mimi``.

Frames are encoded and decoded one by one, by ours and by the PyTorch package ``moshi`` (where it is installed; with its
CUDA graphs on a GPU), in turns and in one process: samples and codes on the host after each, and queued, when nobody
waits for a result before the last. Beside them stands the time to read all weights and states once at the bandwidth
that a copy reaches here, and the time of all operations at the rate that a large product reaches, both in float32.
Then a long recording is encoded and decoded, and bfloat16 is compared with float32: the share of codes of real speech
that differ.

    python -m bench.mimi                                  # 1 row, a minute of audio
    python -m bench.mimi --rows 1 8 32 --seconds 3600     # on a GPU
    python -m bench.mimi --dtypes float32 bfloat16        # all figures for both
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

WARM_UP = 5


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--frames", type=int, default=50, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5, help="in which the programs take turns")
    parser.add_argument("--seconds", type=float, default=60, help="of the long recording")
    parser.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the same GPU
    os.environ.setdefault("NO_TORCH_COMPILE", "1")

    from bench import figures
    from ttt_jax.codec.mimi import model
    from ttt_jax.codec.mimi.codec import MimiCodec
    from ttt_jax.codec.mimi.config import MimiConfig, Use

    params = model.init_params(MimiConfig(), 0)
    ours = {kind: MimiCodec(params, MimiConfig(), Use(dtype=kind), "random", kind) for kind in ("float32", "bfloat16")}
    bandwidth, rate = figures.copy_bandwidth(), product_rate()
    print(f"{figures.device()}; copies {bandwidth / 1e9:.0f} GB/s, float32 products {rate / 1e12:.2f} TFLOP/s")
    with_torch = importlib.util.find_spec("moshi") is not None
    print(torch_device() if with_torch else "PyTorch moshi is not installed here (docs/parity.md says how to)")
    for rows in args.rows:
        count = WARM_UP + args.frames
        for step, inputs in (("encode", some_audio(rows, count)), ("decode", some_codes(rows, count))):
            programs = {f"ours {kind}": frames(ours[kind], step, inputs) for kind in args.dtypes}
            if with_torch:
                programs["torch"] = torch_frames(step, inputs)
            times = take_turns(programs, args.rounds)
            what = f"{step} a frame, {rows:2d} rows "
            for who, (waited, queued) in times.items():
                ratio = [
                    np.median(a) / np.median(b) for a, b in zip(times.get("torch", ()), (waited, queued), strict=False)
                ]
                than = f"; PyTorch takes {ratio[0]:.1f} and {ratio[1]:.1f} times as long" if ratio else ""
                print(f"{what} {who:14s} {text(waited)} ms on the host, queued {text(queued)} ms{than}", flush=True)
            nbytes, operations = floor(ours["float32"], step, rows)
            floors = f"bytes {nbytes / bandwidth * 1e3:.2f} ms, operations {operations / rate * 1e3:.2f} ms"
            print(f"{what} floors         {floors}", flush=True)
    for kind in args.dtypes:
        for step in ("encode", "decode"):
            run = functools.partial(getattr(ours[kind], step), long_input(step, args.seconds, ours[kind]))
            run()  # compiles
            spent = figures.seconds(run, 3)
            speed = args.seconds / np.median(spent)
            print(f"{step} {args.seconds:g} s, {kind}: {text(spent)} s, {speed:.0f} times real time", flush=True)
    compare_codes(ours)


def product_rate() -> float:
    """Operations per second of a large float32 product in true float32."""
    import jax
    import jax.numpy as jnp

    from bench import figures

    with jax.default_matmul_precision("highest"):
        return figures.product_rate(jnp.float32)


def some_audio(rows: int, count: int) -> list[np.ndarray]:
    """Frames of noise, float32 [rows, 1920]."""
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal((rows, 1920), np.float32) for _ in range(count)]


def some_codes(rows: int, count: int) -> list[np.ndarray]:
    """Frames of random codes, int32 [rows, 8, 1]."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2048, (rows, 8, 1), np.int32) for _ in range(count)]


def long_input(step: str, seconds: float, codec: Any) -> np.ndarray:
    """Noise float32 [samples], or random codes int32 [8, T] of as many."""
    rng, samples = np.random.default_rng(0), round(seconds * codec.sample_rate)
    if step == "encode":
        return 0.1 * rng.standard_normal(samples, np.float32)
    return rng.integers(0, codec.cardinality, (codec.num_codebooks, -(-samples // codec.frame_size)), np.int32)


Round = tuple[list[float], list[float]]
"""Milliseconds of each frame with its result on the host, and of a frame among queued ones."""


def frames(codec: Any, step: str, inputs: list[np.ndarray]) -> Iterator[Round]:
    """Times one stream of ours, round after round."""
    import jax

    from ttt_jax.codec.mimi import model
    from ttt_jax.codec.mimi.codec import compiled

    run = codec.encode_step if step == "encode" else codec.decode_step
    program = compiled(model.encode if step == "encode" else model.decode, codec.device)
    state = (codec.init_encoder if step == "encode" else codec.init_decoder)(len(inputs[0]))
    mask = jax.numpy.ones((len(inputs[0]), 1), bool)
    on_device = [jax.numpy.asarray(given) for given in inputs[WARM_UP:]]
    for given in inputs[:WARM_UP]:
        _, state = run(given, state)
    while True:
        times = []
        for given in inputs[WARM_UP:]:
            began = time.perf_counter()
            _, state = run(given, state)
            times.append((time.perf_counter() - began) * 1e3)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for given in on_device:
            _, state = program(codec.params, given, mask, state, codec.cfg, codec.use)
        jax.block_until_ready(state)
        yield times, [(time.perf_counter() - began) * 1e3 / len(on_device)]


def torch_device() -> str:
    """PyTorch's device and version."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} threads"
    return f"{name}, torch {torch.__version__}"


def torch_frames(step: str, inputs: list[np.ndarray]) -> Iterator[Round]:
    """As `frames`, for a stream of PyTorch's, whose convolutions and products are float32 too."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    mimi, device = torch_mimi()
    mimi.streaming_forever(len(inputs[0]))

    def run(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mimi.encode(given[:, None]) if step == "encode" else mimi.decode(given.long())

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    on_device = [torch.from_numpy(given).to(device) for given in inputs[WARM_UP:]]
    for given in inputs[:WARM_UP]:
        run(torch.from_numpy(given).to(device))
    while True:
        times = []
        for given in inputs[WARM_UP:]:
            began = time.perf_counter()
            run(torch.from_numpy(given).to(device)).cpu().numpy()
            times.append((time.perf_counter() - began) * 1e3)
        wait()
        began = time.perf_counter()
        for given in on_device:
            run(given)
        wait()
        yield times, [(time.perf_counter() - began) * 1e3 / len(on_device)]


def torch_mimi() -> tuple[Any, str]:
    """PyTorch's Mimi with 8 codebooks and random weights, and the device that it is on: a GPU if there is one."""
    import torch
    from moshi.models import loaders

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mimi = loaders.get_mimi(None, device=device).eval()
    mimi.set_num_codebooks(8)
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        for layer in part.vq.layers:
            layer._codebook.embedding_sum.normal_()
            layer._codebook.cluster_usage.fill_(1)
            layer._codebook._initialized.fill_(1)
    return mimi, device


def take_turns(programs: dict[str, Iterator[Round]], rounds: int) -> dict[str, Round]:
    """Times of all rounds of each program, which take turns so that all meet the same machine."""
    times: dict[str, Round] = {who: ([], []) for who in programs}
    for _ in range(rounds):
        for who, program in programs.items():
            for all_rounds, one in zip(times[who], next(program), strict=True):
                all_rounds += one
    return times


def floor(codec: Any, step: str, rows: int) -> tuple[float, float]:
    """Bytes of weights and state that a frame must read or write, and its operations."""
    import jax

    from ttt_jax.codec.mimi import model

    mask = np.ones((rows, 1), bool)
    if step == "encode":
        run, state, given = model.encode, codec.init_encoder(rows), some_audio(rows, 1)[0]
        parts = ("encoder", "downsample", "quantizer")
    else:
        run, state, given = model.decode, codec.init_decoder(rows), some_codes(rows, 1)[0]
        parts = ("decoder", "upsample")  # of the codebooks it reads single entries
    read = sum(x.nbytes for name, x in codec.params.items() if name.startswith(parts)) + sum(
        x.nbytes for x in jax.tree.leaves(state)
    )
    program = jax.jit(run, static_argnames=("cfg", "use"))
    with jax.default_device(jax.devices("cpu")[0]):  # XLA counts no operations for a GPU
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (codec.params, given, mask, state))
        lowered = program.lower(*shapes, codec.cfg, codec.use)
    return read, lowered.cost_analysis()["flops"]


def compare_codes(codecs: dict[str, Any]) -> None:
    """Prints the share of codes that bfloat16 changes, by codebook, on a recording of the embedded corpus."""
    from ttt_jax.data.audio.reader import read_audio
    from ttt_jax.data.corpus import EMBEDDED

    path = sorted((EMBEDDED / "voices").glob("*/heldout-*.ogg"))[0]
    codec = codecs["float32"]
    speech = read_audio(path, codec.sample_rate)[0, : 512 * codec.frame_size]
    exact, rounded = (codecs[kind].encode(speech) for kind in ("float32", "bfloat16"))
    shares = " ".join(f"{share:.3f}" for share in (exact != rounded).mean(1))
    print(f"codes of 41 s of speech that bfloat16 changes, by codebook (random weights): {shares}")
    print(f"the same without an error in the codebooks before it: {first_changes(exact, rounded)}")


def first_changes(exact: np.ndarray, rounded: np.ndarray) -> str:
    """Share of changed codes by codebook, among frames in which no earlier acoustic codebook has changed: after a
    change all later codebooks quantise something else."""
    changed = exact != rounded
    shares = [changed[0].mean()]
    for i in range(1, len(changed)):
        clean = ~changed[1:i].any(0)
        shares.append(changed[i, clean].mean() if clean.any() else float("nan"))
    return " ".join(f"{share:.3f}" for share in shares)


def text(times: list[float]) -> str:
    """Median and the tenth and ninetieth percentile."""
    median, low, high = (float(np.percentile(times, p)) for p in (50, 10, 90))
    return f"{median:7.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
