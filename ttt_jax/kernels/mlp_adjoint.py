"""The adjoint of the fused chain of the two-layer MLP on a Hopper GPU, in Pallas Mosaic GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.mlp import PARTS, C, R, Shape
from ttt_jax.kernels.tiles import (
    COL,
    MAIL,
    F16,
    F32,
    ROW,
    TILE,
    cols,
    column_sums,
    gelu_slope_bend,
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


def _backward_body(s: Shape, *refs):
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, rate_ref, closes_ref, w2b_ref, scale_ref = take(5)
    n2_ref, w2m_ref, z1_ref, p_ref, zn_ref, rstd_ref = take(6)
    g0_ref, m1_ref, m2_ref, dx2_ref, dn1_ref, dn2_ref = take(6)
    dat_w1, dat_b1, dat_w2, dat_b2, dend_w1, dend_b1, dend_w2, dend_b2 = take(8)
    u1_out, dz1_out, dp_out, dz2_out, de_out, drate_out, out_w1, out_b1, out_w2, out_b2 = take(10)
    k_s, n2_s, z1_s, p_s, dx2_s, dn1_s = take(6)  # two of each: fetched ahead
    w2b_s, d2_s, u1_s, u2_s, x2_s, dp_s, dz2_s, recv, ub2_s, scratch = take(10)
    dz1_s = x2_s  # which no product reads any more by then
    in_bar, start_bar, w2_bar, at_bar, mail, wg_bar, c_bar = take(7)

    n, cta, wg = lax.axis_index("head"), lax.axis_index("cta"), lax.axis_index("wg")
    h = lax.rem(n, scale_ref.shape[0])
    mine = pl.ds(cta * s.units + wg * R, R)
    half = pl.ds(wg * R, R)
    block = pl.ds(cta * s.units, s.units)
    d, own_slots = s.width, C // s.warpgroups
    own = pl.ds(wg * own_slots, own_slots)

    def buffer(first, count):
        return scratch.at[wg, pl.ds(4 * own_slots * first, 4 * own_slots * count)]

    def place(i):
        return lax.div(i, s.group), lax.rem(i, s.group)

    def fetch(i, slot):
        g, u = place(i)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[n, i], k_s.at[slot], in_bar.at[slot])
            plgpu.copy_gmem_to_smem(n2_ref.at[n, g, :, u], n2_s.at[slot], in_bar.at[slot])
            for ref, to in ((z1_ref, z1_s), (p_ref, p_s), (dx2_ref, dx2_s), (dn1_ref, dn1_s)):
                plgpu.copy_gmem_to_smem(ref.at[n, g, block, u], to.at[slot], in_bar.at[slot])

    def fetch_weights(i):
        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(w2m_ref.at[n, lax.div(i, s.per_batch), block], d2_s, w2_bar)

    def meet(i):
        plgpu.commit_smem()
        if s.warpgroups > 1:
            plgpu.barrier_arrive(wg_bar.at[i])
            plgpu.barrier_wait(wg_bar.at[i])

    fetch(s.steps - 1, 0)
    fetch_weights(s.steps - 1)

    @pl.when(wg == 0)
    def _():
        plgpu.copy_gmem_to_smem(w2b_ref.at[lax.rem(n, w2b_ref.shape[0]), block], w2b_s, start_bar)

    dw1, dw2 = load(dend_w1.at[n, mine], TILE), load(dend_w2.at[n, mine], TILE)
    db1 = load(dend_b1.at[n, mine], ROW)

    # Each warpgroup sums what its own slots pass to the second bias.
    here = jnp.where(wg == 0, 1.0, 0.0).astype(F32)
    db2 = load(dend_b2.at[n], ROW) * here
    open_mail(mail)
    plgpu.barrier_wait(start_bar)
    plgpu.barrier_arrive(c_bar)

    def step(t, g, carry):
        """Step `t` of a group, from its end."""
        dw1, dw2, db1, ub1, db2 = carry
        u = s.group - 1 - t
        i = g * s.group + u
        done = s.steps - 1 - i
        slot = lax.rem(done, 2)
        closes = closes_ref[n, i]
        first_read = lax.rem(i, s.per_batch) == s.per_batch - 1  # the mini-batch is entered, from its end
        entered = 1.0 if s.per_batch == 1 else first_read.astype(F32)
        kept = 1.0 + (s.keep - 1.0) * closes * entered
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dw1, dw2, db1, db2 = dw1 * kept, dw2 * kept, db1 * kept, db2 * kept

        def enter():
            u1_s.at[half][...] = dw1.astype(F16)
            u2_s.at[half][...] = dw2.astype(F16)
            ub2_s.at[wg][...] = db2

        if s.per_batch == 1:
            enter()
            ub1 = db1
        else:
            pl.when(first_read)(enter)
            ub1 = db1 * entered + ub1 * (1.0 - entered)
        plgpu.barrier_wait(in_bar.at[slot])
        k, n2 = k_s.at[slot], n2_s.at[slot]
        p = load(p_s.at[slot, half], TILE).astype(F32)
        x2, slope, bend = gelu_slope_bend(load(z1_s.at[slot, half], TILE).astype(F32))
        x2 = x2.astype(F16)
        bend = bend * p
        x2_s.at[half][...] = x2
        meet(0)
        pl.when(t == 0)(lambda: plgpu.copy_smem_to_gmem(u1_s.at[half], u1_out.at[n, g, mine]))

        # The other warpgroup has left the step before: what that read may be written.
        @pl.when(i > 0)
        def _():
            fetch(i - 1, 1 - slot)

        # What the updates pass back: they read the adjoint of the weights after them.
        dn1 = load(dn1_s.at[slot, half], TILE).astype(F32)
        dn1 += (product((R, C), (u1_s.at[half], transposed(k))) + rows(ub1, C)) * closes
        dp = dn1 * slope
        dp_s.at[half][...] = dp.astype(F16)
        bend = bend * dn1
        dx2 = load(dx2_s.at[slot, half], TILE).astype(F32)
        dx2 += product((R, C), (u2_s.at[half], n2)) * closes
        part = product((R, C), (transposed(u2_s.at[:, half]), x2_s)) * closes
        if s.per_batch == 1:
            plgpu.barrier_wait(w2_bar)
        else:
            pl.when(first_read)(lambda: plgpu.barrier_wait(w2_bar))
        meet(1)
        part = plus(part, (transposed(w2b_s.at[:, half]), dp_s), (transposed(d2_s.at[:, half]), dp_s))
        plgpu.barrier_wait(c_bar)
        send(part, recv.at[cta, half], mail, PARTS)
        # Meanwhile:
        plgpu.copy_smem_to_gmem(dp_s.at[half], dp_out.at[n, g, mine, u])
        dw2 = plus(dw2, (dp.astype(F16), transposed(n2)))

        # Through the inner loss's gradient and the LayerNorm, as in the forward pass.
        rate, rstd = load(rate_ref.at[n, i, own], COL), load(rstd_ref.at[n, i, own], COL)
        m1, m2 = load(m1_ref.at[n, i, own], COL), load(m2_ref.at[n, i, own], COL)
        zn, g0 = load(zn_ref.at[n, i, :, own], TILE), load(g0_ref.at[n, i, :, own], TILE)
        dn2 = load(dn2_ref.at[n, i, :, own], TILE)
        scale = load(scale_ref.at[h], ROW)
        square, over = rows(scale * scale, own_slots), 1 / d
        of_square, sq_zn, sq_zn2 = column_sums(buffer(0, 3), square, square * zn, square * zn * zn)
        ub2 = load(ub2_s.at[0], ROW)
        for part in range(1, s.warpgroups):
            ub2 += load(ub2_s.at[part], ROW)
        dn2 += rows(ub2 * closes, own_slots)
        await_mail(mail, PARTS * d * C * 4, lax.rem(done, 2))
        for j in range(PARTS):
            dn2 += load(recv.at[j, :, own], TILE)
        # All sums that the rest needs, in one meeting of the warps.
        dg, of_v, v_zn, v_sq, v_sq_zn = column_sums(buffer(3, 5), dn2 * g0, dn2, dn2 * zn, dn2 * square, dn2 * square * zn)
        factor = -rate * rstd
        of_v, v_zn, v_sq, v_sq_zn = factor * of_v, factor * v_zn, factor * v_sq, factor * v_sq_zn
        v, mu, middle = dn2 * cols(factor, d), v_zn * over, of_v * over
        de = v - cols(middle, d) - zn * cols(mu, d)

        @pl.when(cta == 0)
        def _():
            store(de_out.at[n, i, :, own], de)
            store(drate_out.at[n, i, own], -dg * rstd)

        dzn = square * de - v * cols(m2, d) - (g0 + cols(m1, d) + zn * cols(m2, d)) * cols(mu, d)
        shift = (v_sq - middle * of_square - mu * sq_zn - m2 * of_v) * over - mu * m1
        turn = (v_sq_zn - middle * sq_zn - mu * sq_zn2 - m2 * v_zn - rate * dg * rstd) * over - mu * m2
        dz2 = (dzn - cols(shift, d) - zn * cols(turn, d)) * cols(rstd, d)
        if s.warpgroups == 1:
            dz2_s[...] = dz2.astype(F16)
        else:
            store_half_columns(dz2, dz2_s, wg)
        db2 = db2 + jnp.sum(dz2, 1)

        meet(2)
        plgpu.barrier_arrive(c_bar)

        @pl.when((cta == 0) & (wg == 0))
        def _():
            plgpu.copy_smem_to_gmem(dz2_s, dz2_out.at[n, g, :, u])

        dx2 = plus(dx2, (w2b_s.at[half], dz2_s), (d2_s.at[half], dz2_s))
        dz1 = dx2 * slope + bend
        dz1h = dz1.astype(F16)
        dz1_s.at[half][...] = dz1h
        db1 = db1 + jnp.sum(dz1, 1)
        dw2 = plus(dw2, (x2, transposed(dz2_s)))
        dw1 = plus(dw1, (dz1h, k))
        meet(3)
        plgpu.copy_smem_to_gmem(dz1_s.at[half], dz1_out.at[n, g, mine, u])
        more = (i > 0) if s.per_batch == 1 else (i > 0) & (lax.rem(i, s.per_batch) == 0)
        pl.when(more)(lambda: fetch_weights(i - 1))
        return dw1, dw2, db1, ub1, db2

    def group(j, carry):
        g = s.groups - 1 - j
        dw1, dw2, db1, ub1, db2 = lax.fori_loop(0, s.group, lambda t, carry: step(t, g, carry), carry)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        # The adjoint of the weights at the start of the group, by way of the tiles of u, which no one reads now.
        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(dat_w1.at[n, g, block], u1_s, at_bar)
            plgpu.copy_gmem_to_smem(dat_w2.at[n, g, block], u2_s, at_bar)

        plgpu.barrier_wait(at_bar)
        dw1 = dw1 + load(u1_s.at[half], TILE).astype(F32)
        dw2 = dw2 + load(u2_s.at[half], TILE).astype(F32)
        db1, db2 = db1 + load(dat_b1.at[n, g, mine], ROW), db2 + load(dat_b2.at[n, g], ROW) * here
        return dw1, dw2, db1, ub1, db2

    dw1, dw2, db1, _, db2 = lax.fori_loop(0, s.groups, group, (dw1, dw2, db1, db1, db2))
    out_w1[n, mine] = dw1
    out_w2[n, mine] = dw2
    out_b1[n, mine] = db1

    pl.when(cta == 0)(lambda: out_b2.at[n, wg].__setitem__(..., db2))

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_wait(c_bar)


def kernel(s: Shape, *args):
    n, d, hidden, wgs = s.heads, s.width, PARTS * s.units, s.warpgroups
    full = lambda *shape: jax.ShapeDtypeStruct(shape, F32)  # noqa: E731
    half = lambda *shape: jax.ShapeDtypeStruct(shape, F16)  # noqa: E731
    factor = half(n, s.groups, hidden, s.group, C)
    out = [half(n, s.groups, hidden, d), factor, factor, half(n, s.groups, d, s.group, C)]
    out += [full(n, s.steps, d, C), full(n, s.steps, C)]
    out += [full(n, hidden, d), full(n, hidden), full(n, hidden, d), full(n, wgs, d)]
    tile = lambda *shape, dtype=F16: half_tile(shape, dtype)  # noqa: E731
    scratch = [tile(2, C, d), tile(2, d, C), *(tile(2, s.units, C) for _ in range(4))]
    scratch += [*(tile(s.units, d) for _ in range(4)), *(tile(s.units, C) for _ in range(2)), tile(d, C)]
    scratch += [tile(PARTS, d, C, dtype=F32), plgpu.SMEM((wgs, d), F32), plgpu.SMEM((wgs, 8 * 4 * C // wgs), F32)]
    scratch += [
        plgpu.Barrier(num_arrivals=6, num_barriers=2),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=2),
        MAIL,
        plgpu.Barrier(num_arrivals=wgs, num_barriers=4),
        plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=wgs),
    ]
    return plgpu.kernel(
        functools.partial(_backward_body, s),
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
