"""Times Mimi at full size with random weights: ``python -m bench.mimi``.

Frames are encoded and decoded one by one, samples and codes on the host after each, by ours and by the PyTorch package
``moshi`` (where it is installed; with its CUDA graphs on a GPU), in turns and in one process. Beside them stands the
time to read all weights and states once at the bandwidth that a copy reaches here, and the time of all operations at
the rate that a large product reaches, both in float32. Then a long recording is encoded and decoded, and bfloat16 is
compared with float32: time, and the share of codes of real speech that differ.

    python -m bench.mimi                                  # 1 row, a minute of audio
    python -m bench.mimi --rows 1 8 32 --seconds 3600     # on a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
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
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the same GPU
    os.environ.setdefault("NO_TORCH_COMPILE", "1")

    from bench import figures
    from ttt_jax.codec.mimi import model
    from ttt_jax.codec.mimi.codec import MimiCodec
    from ttt_jax.codec.mimi.config import MimiConfig, Use

    cfg = MimiConfig()
    params = model.init_params(cfg, 0)
    ours = {kind: MimiCodec(params, cfg, Use(dtype=kind), "random", kind) for kind in ("float32", "bfloat16")}
    bandwidth, rate = figures.copy_bandwidth(), product_rate()
    print(f"{figures.device()}; copies {bandwidth / 1e9:.0f} GB/s, float32 products {rate / 1e12:.2f} TFLOP/s")
    with_torch = importlib.util.find_spec("moshi") is not None
    print(torch_device() if with_torch else "PyTorch moshi is not installed here (docs/parity.md says how to)")
    for rows in args.rows:
        audio, codes = some_audio(rows, WARM_UP + args.frames), some_codes(rows, WARM_UP + args.frames)
        for step, inputs in (("encode", audio), ("decode", codes)):
            programs = {f"ours {kind}": frames(codec, step, inputs) for kind, codec in ours.items()}
            if with_torch:
                programs["torch"] = torch_frames(step, inputs)
            times = take_turns(programs, args.rounds)
            floors = floor(ours["float32"], step, rows, bandwidth, rate)
            for who, ms in times.items():
                print(f"{step} a frame, {rows:2d} rows  {who:14s} {text(ms)} ms")
            print(f"{step} a frame, {rows:2d} rows  floors         bytes {floors[0]:.2f} ms, operations {floors[1]:.2f} ms")
            if with_torch:
                ratio = np.median(times["torch"]) / np.median(times["ours float32"])
                print(f"{step} a frame, {rows:2d} rows  ours takes 1/{ratio:.1f} of PyTorch's time", flush=True)
    samples = round(args.seconds * cfg.sample_rate)
    audio = 0.1 * np.random.default_rng(0).standard_normal(samples, np.float32)
    for kind, codec in ours.items():
        for step in ("encode", "decode"):
            given = audio if step == "encode" else codes_of(samples, codec)
            run = getattr(codec, step)
            run(given)  # compiles
            spent = figures.seconds(lambda run=run, given=given: run(given), 3)
            print(f"{step} {args.seconds:g} s, {kind:9s} {text(spent)} s, {args.seconds / np.median(spent):.0f} x real time")
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


def codes_of(samples: int, codec: Any) -> np.ndarray:
    """Random codes of as many samples, int32 [8, T]."""
    frames = -(-samples // codec.frame_size)
    return np.random.default_rng(0).integers(0, codec.cardinality, (codec.num_codebooks, frames), np.int32)


def frames(codec: Any, step: str, inputs: list[np.ndarray]) -> Iterator[list[float]]:
    """Milliseconds of each frame, round after round, in one stream of ours."""
    run = codec.encode_step if step == "encode" else codec.decode_step
    state = (codec.init_encoder if step == "encode" else codec.init_decoder)(len(inputs[0]))
    for given in inputs[:WARM_UP]:
        _, state = run(given, state)
    while True:
        times = []
        for given in inputs[WARM_UP:]:
            began = time.perf_counter()
            _, state = run(given, state)
            times.append((time.perf_counter() - began) * 1e3)
        yield times


def torch_device() -> str:
    """PyTorch's device and version."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} threads"
    return f"{name}, torch {torch.__version__}"


def torch_frames(step: str, inputs: list[np.ndarray]) -> Iterator[list[float]]:
    """As `frames`, in a stream of PyTorch's, whose convolutions and products are float32 too."""
    import torch
    from moshi.models import loaders

    torch.set_num_threads(os.cpu_count())
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mimi = loaders.get_mimi(None, device=device).eval()
    mimi.set_num_codebooks(8)
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        for layer in part.vq.layers:
            layer._codebook.embedding_sum.normal_()
            layer._codebook.cluster_usage.fill_(1)
            layer._codebook._initialized.fill_(1)
    mimi.streaming_forever(len(inputs[0]))

    def run(given: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(given).to(device)
        with torch.no_grad():
            return (mimi.encode(given[:, None]) if step == "encode" else mimi.decode(given.long())).cpu().numpy()

    for given in inputs[:WARM_UP]:
        run(given)
    while True:
        times = []
        for given in inputs[WARM_UP:]:
            began = time.perf_counter()
            run(given)
            times.append((time.perf_counter() - began) * 1e3)
        yield times


def take_turns(programs: dict[str, Iterator[list[float]]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of all frames of each program, which take turns so that all meet the same machine."""
    times: dict[str, list[float]] = {who: [] for who in programs}
    for _ in range(rounds):
        for who, program in programs.items():
            times[who] += next(program)
    return times


def floor(codec: Any, step: str, rows: int, bandwidth: float, rate: float) -> tuple[float, float]:
    """Milliseconds of a frame by bytes of weights and state, and by operations."""
    import jax

    from ttt_jax.codec.mimi import model

    mask = np.ones((rows, 1), bool)
    if step == "encode":
        run, state, given = model.encode, codec.init_encoder(rows), some_audio(rows, 1)[0]
        parts = ("encoder", "downsample", "quantizer")
    else:
        run, state, given = model.decode, codec.init_decoder(rows), some_codes(rows, 1)[0]
        parts = ("decoder", "upsample")  # of the codebooks it reads single rows
    wanted = {name: p for name, p in codec.params.items() if name.startswith(parts)}
    nbytes = sum(x.nbytes for x in jax.tree.leaves(wanted)) + 2 * sum(x.nbytes for x in jax.tree.leaves(state))
    lowered = jax.jit(run, static_argnames=("cfg", "use")).lower(
        codec.params, given, mask, state, cfg=codec.cfg, use=dataclasses.replace(codec.use)
    )
    return nbytes / bandwidth * 1e3, (lowered.cost_analysis() or lowered.compile().cost_analysis())["flops"] / rate * 1e3


def compare_codes(codecs: dict[str, Any]) -> None:
    """Prints the share of codes that bfloat16 changes, by codebook, on a recording of the embedded corpus."""
    from ttt_jax.data.audio.reader import read_audio
    from ttt_jax.data.corpus import EMBEDDED

    path = sorted((EMBEDDED / "voices").glob("*/heldout-*.ogg"))[0]
    codec = codecs["float32"]
    speech = read_audio(path, codec.sample_rate)[0, : 60 * codec.sample_rate]
    exact, rounded = (codecs[kind].encode(speech) for kind in ("float32", "bfloat16"))
    shares = " ".join(f"{share:.3f}" for share in (exact != rounded).mean(1))
    print(f"codes of a minute of speech that bfloat16 changes, by codebook (random weights): {shares}")
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
