"""The fused chain of the two-layer MLP on a Hopper GPU: forward pass, in Pallas Mosaic GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.tiles import (
    COL,
    MAIL,
    F16,
    F32,
    ROW,
    TILE,
    cols,
    column_sums,
    gelu_and_slope,
    half_tile,
    await_mail,
    load,
    plus,
    product,
    open_mail,
    rows,
    send,
    store,
    store_half_columns,
    transposed,
)

C = 16
PARTS = 4
R = 64
EPS = 1e-8


class Shape(NamedTuple):
    heads: int
    width: int
    steps: int  # S
    per_batch: int  # P
    group: int  # U
    keep: float
    save: bool

    @property
    def warpgroups(self) -> int:
        return self.width // R

    @property
    def units(self) -> int:
        """Hidden units of a thread block."""
        return R * self.warpgroups

    @property
    def groups(self) -> int:
        return self.steps // self.group

    @property
    def batches(self) -> int:
        return self.steps // self.per_batch


def _forward_body(s: Shape, *refs):
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, target_ref, rate_ref, closes_ref = take(4)
    w1b_ref, b1b_ref, w2b_ref, b2b_ref, scale_ref, bias_ref = take(6)
    w1_ref, b1_ref, w2_ref, b2_ref, w1r_ref, b1r_ref, w2r_ref, b2r_ref = take(8)
    x2_out, n1_out, n2_out, at_w1, at_b1, at_w2, at_b2, end_w1, end_b1, end_w2, end_b2 = take(11)
    w2_out, z1_out, p_out, zn_out, rstd_out = take(5) if s.save else (None,) * 5
    k_s, d1_s, d2_s, w1b_s, w2b_s, x2_s, n1_s, n2_s, recv, b2r_s, scratch = take(11)
    z1_s, p_s, zn_s = take(3) if s.save else (None,) * 3
    start_bar, in_bar, mail, wg_bar, c_bar = take(5)

    n, cta, wg = lax.axis_index("head"), lax.axis_index("cta"), lax.axis_index("wg")
    h = lax.rem(n, w1b_ref.shape[0])
    mine = pl.ds(cta * s.units + wg * R, R)
    half = pl.ds(wg * R, R)
    block = pl.ds(cta * s.units, s.units)
    d, own_slots = s.width, C // s.warpgroups
    own = pl.ds(wg * own_slots, own_slots)

    def buffer(first, count):
        return scratch.at[wg, pl.ds(4 * own_slots * first, 4 * own_slots * count)]

    def fetch(i, slot):
        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[n, i], k_s.at[slot], in_bar.at[slot])

    def meet(i):
        plgpu.commit_smem()
        if s.warpgroups > 1:
            plgpu.barrier_arrive(wg_bar.at[i])
            plgpu.barrier_wait(wg_bar.at[i])

    @pl.when(wg == 0)
    def _():
        for ref, to in ((w1b_ref.at[h], w1b_s), (w2b_ref.at[h], w2b_s), (w1r_ref.at[n], d1_s), (w2r_ref.at[n], d2_s)):
            plgpu.copy_gmem_to_smem(ref.at[block], to, start_bar)

    fetch(0, 0)
    w1, w2 = load(w1_ref.at[n, mine], TILE), load(w2_ref.at[n, mine], TILE)
    b1, b1r = load(b1_ref.at[n, mine], ROW), load(b1r_ref.at[n, mine], ROW)
    b1b, b2b = load(b1b_ref.at[h, mine], ROW), load(b2b_ref.at[h], ROW)
    scale, bias = load(scale_ref.at[h], ROW), load(bias_ref.at[h], ROW)

    # Each warpgroup sums the steps of its own slots: the bias is the sum of their parts.
    here = jnp.where(wg == 0, 1.0, 0.0).astype(F32)
    b2 = load(b2_ref.at[n], ROW) * here
    b2r_s.at[wg][...] = load(b2r_ref.at[n], ROW) * here

    open_mail(mail)
    plgpu.barrier_wait(start_bar)
    plgpu.barrier_arrive(c_bar)

    def step(i, carry):
        w1, w2, b1, b1r, b2 = carry
        slot, g, u = lax.rem(i, 2), lax.div(i, s.group), lax.rem(i, s.group)
        closes = closes_ref[n, i]
        last = lax.rem(i, s.per_batch) == s.per_batch - 1
        now = 1.0 if s.per_batch == 1 else last.astype(F32)
        kept = 1.0 + (s.keep - 1.0) * closes * now

        if s.save:
            save_w2 = lambda: plgpu.copy_smem_to_gmem(d2_s.at[half], w2_out.at[n, lax.div(i, s.per_batch), mine])  # noqa: E731
            save_w2() if s.per_batch == 1 else pl.when(lax.rem(i, s.per_batch) == 0)(save_w2)

        @pl.when(u == 0)
        def _():
            plgpu.copy_smem_to_gmem(d1_s.at[half], at_w1.at[n, g, mine])
            if not s.save:
                plgpu.copy_smem_to_gmem(d2_s.at[half], at_w2.at[n, g, mine])
            at_b1[n, g, mine] = b1r

            @pl.when(cta == 0)
            def _():
                at_b2[n, g, wg] = load(b2r_s.at[wg], ROW)

        plgpu.barrier_wait(in_bar.at[slot])
        k = transposed(k_s.at[slot])
        z1 = product((R, C), (w1b_s.at[half], k), (d1_s.at[half], k)) + rows(b1r + b1b, C)
        x2, slope = gelu_and_slope(z1)
        x2 = x2.astype(F16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        x2_s.at[half][...] = x2
        if s.save:
            z1_s.at[half][...] = z1.astype(F16)
        meet(0)

        @pl.when(i + 1 < s.steps)
        def _():
            fetch(i + 1, 1 - slot)

        part = product((R, C), (transposed(w2b_s.at[:, half]), x2_s), (transposed(d2_s.at[:, half]), x2_s))
        plgpu.barrier_wait(c_bar)  # all blocks have read the parts of the step before
        send(part, recv.at[cta, half], mail, PARTS)
        plgpu.copy_smem_to_gmem(x2_s.at[half], x2_out.at[n, g, mine, u])
        if s.save:
            plgpu.copy_smem_to_gmem(z1_s.at[half], z1_out.at[n, g, mine, u])

        # LayerNorm and the gradient of the inner loss, by every block for all slots, by every warpgroup for its own.
        target, rate = load(target_ref.at[n, i, :, own], TILE), load(rate_ref.at[n, i, own], COL)
        square = rows(scale * scale, own_slots)
        shift = rows(scale, own_slots) * (rows(bias, own_slots) - target)  # e = square zn + shift
        (of_shift,) = column_sums(buffer(0, 1), shift)
        z = b2b
        for part in range(s.warpgroups):
            z += load(b2r_s.at[part], ROW)
        z = rows(z, own_slots)
        await_mail(mail, PARTS * d * C * 4, lax.rem(i, 2))
        for j in range(PARTS):
            z += load(recv.at[j, :, own], TILE)
        (of_z,) = column_sums(buffer(1, 1), z)
        z -= cols(of_z * (1 / d), d)
        zz, sz, szz, hz = column_sums(buffer(2, 4), z * z, square * z, square * z * z, shift * z)
        rstd = lax.rsqrt(zz * (1 / d) + EPS)
        m1 = (of_shift + rstd * sz) * (1 / d)
        m2 = rstd * (rstd * szz + hz) * (1 / d)
        z *= cols(rstd, d)
        n2 = (square * z + shift - cols(m1, d) - z * cols(m2, d)) * cols(-rate * rstd, d)
        if s.warpgroups == 1:
            n2_s[...] = n2.astype(F16)
        else:
            store_half_columns(n2, n2_s, wg)
        if s.save:
            zn_s.at[:, own][...] = z

            @pl.when(cta == 0)
            def _():
                store(rstd_out.at[n, i, own], rstd)

        b2 = (b2 + jnp.sum(n2, 1) * closes) * kept
        meet(1)
        plgpu.barrier_arrive(c_bar)
        if s.per_batch == 1:
            b2r_s.at[wg][...] = b2
        else:
            pl.when(last)(lambda: b2r_s.at[wg].__setitem__(..., b2))
        p = product((R, C), (w2b_s.at[half], n2_s), (d2_s.at[half], n2_s))
        n1 = p * slope
        n1_s.at[half][...] = n1.astype(F16)
        if s.save:
            p_s.at[half][...] = p.astype(F16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(n1_s.at[half], n1_out.at[n, g, mine, u])
        if s.save:
            plgpu.copy_smem_to_gmem(p_s.at[half], p_out.at[n, g, mine, u])

        @pl.when((cta == 0) & (wg == 0))
        def _():
            plgpu.copy_smem_to_gmem(n2_s, n2_out.at[n, g, :, u])
            if s.save:
                plgpu.copy_smem_to_gmem(zn_s, zn_out.at[n, i])

        w1 = plus(w1, ((n1 * closes).astype(F16), k_s.at[slot])) * kept
        w2 = plus(w2, ((x2.astype(F32) * closes).astype(F16), transposed(n2_s))) * kept
        b1 = (b1 + jnp.sum(n1, 1) * closes) * kept

        def refresh():
            d1_s.at[half][...] = w1.astype(F16)
            d2_s.at[half][...] = w2.astype(F16)
            plgpu.commit_smem()

        plgpu.wait_smem_to_gmem(4 if s.save else 2, wait_read_only=True)
        if s.per_batch == 1:
            refresh()
            b1r = b1
        else:
            pl.when(last)(refresh)
            b1r = b1 * now + b1r * (1.0 - now)
        return w1, w2, b1, b1r, b2

    w1, w2, b1, _, b2 = lax.fori_loop(0, s.steps, step, (w1, w2, b1, b1r, b2))
    end_w1[n, mine] = w1
    end_w2[n, mine] = w2
    end_b1[n, mine] = b1

    pl.when(cta == 0)(lambda: end_b2.at[n, wg].__setitem__(..., b2))
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_wait(c_bar)


def kernel(s: Shape, *args):
    n, d, hidden = s.heads, s.width, PARTS * s.units
    full = lambda *shape: jax.ShapeDtypeStruct(shape, F32)  # noqa: E731
    half = lambda *shape: jax.ShapeDtypeStruct(shape, F16)  # noqa: E731
    factor = half(n, s.groups, hidden, s.group, C)
    out = [factor, factor, half(n, s.groups, d, s.group, C)]
    at_w2 = half(n, 1 if s.save else s.groups, hidden, d)  # with `save` it is every U / P of the saved weights
    out += [half(n, s.groups, hidden, d), full(n, s.groups, hidden), at_w2, full(n, s.groups, s.warpgroups, d)]
    out += [full(n, hidden, d), full(n, hidden), full(n, hidden, d), full(n, s.warpgroups, d)]
    if s.save:
        out += [half(n, s.batches, hidden, d), factor, factor, full(n, s.steps, d, C), full(n, s.steps, C)]
    tile = lambda *shape, dtype=F16: half_tile(shape, dtype)  # noqa: E731
    scratch = [tile(2, C, d), *(tile(s.units, d) for _ in range(4)), tile(s.units, C), tile(s.units, C), tile(d, C)]
    scratch += [tile(PARTS, d, C, dtype=F32), plgpu.SMEM((s.warpgroups, d), F32)]
    scratch += [plgpu.SMEM((s.warpgroups, 6 * 4 * C // s.warpgroups), F32)]
    if s.save:
        scratch += [tile(s.units, C), tile(s.units, C), tile(d, C, dtype=F32)]
    wgs = s.warpgroups
    scratch += [
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        MAIL,
        plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
        plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=wgs),
    ]
    return plgpu.kernel(
        functools.partial(_forward_body, s),
        out_type=tuple(out),
        scratch_types=scratch,
        grid=(n,),
        grid_names=("head",),
        cluster=(PARTS,),
        cluster_names=("cta",),
        num_threads=wgs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*args)
