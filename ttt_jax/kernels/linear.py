"""The forward pass of the linear chain on a Hopper GPU.

A head has a thread block of one warpgroup, which holds the displacement in registers, as an accumulator in float32, for
the whole call. Products read the base and a float16 copy of the displacement in shared memory. Tokens are the columns
of all arrays. `_s` marks shared memory, `_out` results.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.chain import C
from ttt_jax.kernels.cluster import Shape, summing
from ttt_jax.kernels.inner_loss import descend
from ttt_jax.kernels.tiles import COL, F16, F32, ROW, TILE, Ref, load, plus, product, rows, shared, store, transposed


def launch(body, shape: Shape, out_type: list, scratch_types: list, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs `body(shape, *refs)` with a thread block of one warpgroup for each head."""
    return plgpu.kernel(
        functools.partial(body, shape),
        out_type=tuple(out_type),
        scratch_types=scratch_types,
        grid=(shape.lanes,),
        grid_names=("head",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*args)


def kernel(s: Shape, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the chain.

    Args:
      args: k, target, rate, closes; the base's w, b; scale, bias; w, b of `Start.total` and of `Start.read`.

    Returns:
      n [N, G, D, U, C]; w and b at the groups' starts and after the call; with `s.save` zn, rstd.
    """
    n, d, groups = s.lanes, s.width, s.groups
    full, half = (lambda *shape, t=t: jax.ShapeDtypeStruct(shape, t) for t in (F32, F16))
    out = [half(n, groups, d, s.group, C), half(n, groups, d, d), full(n, groups, d), full(n, d, d), full(n, d)]
    tiles = [shared(2, C, d), shared(2, d, C, dtype=F32), shared(d, d), shared(d, d), shared(d, C)]
    tiles += [plgpu.SMEM((1, 6 * 4 * C), F32)]
    if s.save:
        out += [full(n, s.steps, d, C), full(n, s.steps, C)]
        tiles += [shared(d, C, dtype=F32)]
    barriers = [plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2, num_barriers=2)]
    return launch(_body, s, out, [*tiles, *barriers], *args)


def _body(s: Shape, *refs: Ref) -> None:
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, target_ref, rate_ref, closes_ref, base_w, base_b, scale_ref, bias_ref = take(8)
    total_w, total_b, read_w, read_b = take(4)
    n_out, at_w, at_b, end_w, end_b = take(5)
    zn_out, rstd_out = take(2) if s.save else (None,) * 2
    k_s, target_s, base_s, d_s, n_s, sums_s = take(6)  # two of keys and targets: fetched ahead
    (zn_s,) = take(1) if s.save else (None,)
    start_barrier, in_barrier = take(2)

    n, d = lax.axis_index("head"), s.width
    sums = summing(sums_s, 0, C)

    def entry(ref: Ref) -> Ref:
        """Of an array for heads, or for rows and heads."""
        return ref.at[lax.rem(n, ref.shape[0])]

    def fetch(i: jax.Array, slot: jax.Array) -> None:
        plgpu.copy_gmem_to_smem(k_ref.at[n, i], k_s.at[slot], in_barrier.at[slot])
        plgpu.copy_gmem_to_smem(target_ref.at[n, i], target_s.at[slot], in_barrier.at[slot])

    plgpu.copy_gmem_to_smem(entry(base_w), base_s, start_barrier)
    plgpu.copy_gmem_to_smem(read_w.at[n], d_s, start_barrier)
    fetch(0, 0)
    w, b, read = load(total_w.at[n], TILE), load(total_b.at[n], ROW), load(read_b.at[n], ROW)
    base, scale, bias = (load(entry(ref), ROW) for ref in (base_b, scale_ref, bias_ref))
    plgpu.barrier_wait(start_barrier)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, b, read = carry
        slot, g, u = lax.rem(i, 2), lax.div(i, s.group), lax.rem(i, s.group)
        closes = closes_ref[n, i]
        last = lax.rem(i, s.per_batch) == s.per_batch - 1
        ends = 1.0 if s.per_batch == 1 else last.astype(F32)
        kept = 1.0 + (s.keep - 1.0) * closes * ends

        @pl.when(u == 0)
        def _():
            plgpu.copy_smem_to_gmem(d_s, at_w.at[n, g])
            at_b[n, g] = read

        rate = load(rate_ref.at[n, i], COL)
        pl.when(i + 1 < s.steps)(lambda: fetch(i + 1, 1 - slot))
        plgpu.barrier_wait(in_barrier.at[slot])
        square, shift = rows(scale * scale, C), rows(scale, C) * (rows(bias, C) - load(target_s.at[slot], TILE))
        (of_shift,) = sums(0, shift)
        k = transposed(k_s.at[slot])
        z = product((d, C), (base_s, k), (d_s, k)) + rows(read + base, C)
        zn, rstd, taken = descend(z, square, shift, of_shift, rate, sums)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what leaves the tiles has been read
        n_s[...] = taken.astype(F16)
        if s.save:
            zn_s[...] = zn
            store(rstd_out.at[n, i], rstd)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(n_s, n_out.at[n, g, :, u])
        if s.save:
            plgpu.copy_smem_to_gmem(zn_s, zn_out.at[n, i])

        taken *= closes
        w = plus(w, (taken.astype(F16), k_s.at[slot])) * kept
        b = (b + jnp.sum(taken, 1)) * kept

        def renew() -> None:
            d_s[...] = w.astype(F16)

        renew() if s.per_batch == 1 else pl.when(last)(renew)
        read = b if s.per_batch == 1 else b * ends + read * (1.0 - ends)
        plgpu.commit_smem()  # all warps have read this step's keys and targets, too: they may be overwritten
        return w, b, read

    w, b, _ = lax.fori_loop(0, s.steps, step, (w, b, read))
    end_w[n] = w
    end_b[n] = b
    plgpu.wait_smem_to_gmem(0)
