"""The adjoint of the MLP chain on a Hopper GPU, from the last step to the first.

A warpgroup holds the adjoints of the displacement of its hidden units in registers, float32. As in the forward pass the
cluster meets once a step, to sum the adjoint of n2 over hidden units. What the updates pass back reads float16 copies
of the adjoints as they are after the mini-batch: u1, u2. What the weights pass on goes into the adjoints themselves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.chain import NC, C
from ttt_jax.kernels.cluster import (
    MAIL,
    R,
    Shape,
    await_mail,
    launch,
    meet,
    open_mail,
    place,
    send,
    store_own_slots,
    summing,
)
from ttt_jax.kernels.inner_loss import Known, recede
from ttt_jax.kernels.tiles import (
    COL,
    F16,
    F32,
    ROW,
    TILE,
    Ref,
    gelu_slope_bend,
    load,
    plus,
    product,
    rows,
    shared,
    store,
    transposed,
)


def kernel(s: Shape, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the adjoint.

    Args:
      args: k, rate, closes, the base's w2, scale; n2, then w2, z1, p, zn, rstd of `Saved`; g0, m1, m2, dx2, dn1, dn2,
        dat, dend of `Given`. Factors are [N, G, X, U, C].

    Returns:
      u1, dz1, dp, dz2, de, drate, and w1, b1, w2, b2 of `dstart`, b2 in parts [N, warpgroups, D].
    """
    n, d, hidden, wgs = s.lanes, s.width, s.hidden, s.warpgroups
    full, half = (lambda *shape, t=t: jax.ShapeDtypeStruct(shape, t) for t in (F32, F16))
    of_hidden = half(n, s.groups, hidden, s.group, C)
    out = [half(n, s.groups, hidden, d), of_hidden, of_hidden, half(n, s.groups, d, s.group, C)]
    out += [full(n, s.steps, d, C), full(n, s.steps, C)]
    out += [full(n, hidden, d), full(n, hidden), full(n, hidden, d), full(n, wgs, d)]
    tiles = [shared(2, C, d), shared(2, d, C), *(shared(2, s.units, C) for _ in range(4))]
    tiles += [*(shared(s.units, d) for _ in range(4)), *(shared(s.units, C) for _ in range(2)), shared(d, C)]
    tiles += [shared(NC, d, C, dtype=F32), plgpu.SMEM((wgs, d), F32), plgpu.SMEM((wgs, 8 * 4 * s.own_slots), F32)]
    barriers = [
        plgpu.Barrier(num_arrivals=6, num_barriers=2),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=2),
        MAIL,
        plgpu.Barrier(num_arrivals=wgs, num_barriers=4),
    ]
    return launch(_body, s, out, [*tiles, *barriers], *args)


def _body(s: Shape, *refs: Ref) -> None:
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, rate_ref, closes_ref, base_w2, scale_ref = take(5)
    n2_ref, w2_ref, z1_ref, p_ref, zn_ref, rstd_ref = take(6)
    g0_ref, m1_ref, m2_ref, dx2_ref, dn1_ref, dn2_ref = take(6)
    dat_w1, dat_b1, dat_w2, dat_b2, dend_w1, dend_b1, dend_w2, dend_b2 = take(8)
    u1_out, dz1_out, dp_out, dz2_out, de_out, drate_out, out_w1, out_b1, out_w2, out_b2 = take(10)
    k_s, n2_s, z1_s, p_s, dx2_s, dn1_s = take(6)  # two of each: fetched ahead
    base2_s, d2_s, u1_s, u2_s, x2_s, dp_s, dz2_s, parts_s, ub2_s, sums_s = take(10)
    dz1_s = x2_s  # which no product reads any more by then
    in_barrier, start_barrier, w2_barrier, at_barrier, mail, warpgroups, cluster = take(7)

    at = place(s)
    n, block, wg, d = at.n, at.block, at.wg, s.width
    h = lax.rem(n, scale_ref.shape[0])
    units, ours, own = at.of_head, at.of_block, at.own
    sums = summing(sums_s, wg, s.own_slots)

    def fetch(i: jax.Array, slot: jax.Array) -> None:
        g, u = lax.div(i, s.group), lax.rem(i, s.group)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[n, i], k_s.at[slot], in_barrier.at[slot])
            plgpu.copy_gmem_to_smem(n2_ref.at[n, g, :, u], n2_s.at[slot], in_barrier.at[slot])
            for ref, to in ((z1_ref, z1_s), (p_ref, p_s), (dx2_ref, dx2_s), (dn1_ref, dn1_s)):
                plgpu.copy_gmem_to_smem(ref.at[n, g, at.all_of_block, u], to.at[slot], in_barrier.at[slot])

    def fetch_weights(i: jax.Array) -> None:
        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(w2_ref.at[n, lax.div(i, s.per_batch), at.all_of_block], d2_s, w2_barrier)

    fetch(s.steps - 1, 0)
    fetch_weights(s.steps - 1)

    @pl.when(wg == 0)
    def _():
        plgpu.copy_gmem_to_smem(base_w2.at[lax.rem(n, base_w2.shape[0]), at.all_of_block], base2_s, start_barrier)

    dw1, dw2 = load(dend_w1.at[n, units], TILE), load(dend_w2.at[n, units], TILE)
    db1 = load(dend_b1.at[n, units], ROW)

    # Each warpgroup sums what its own slots pass to the second bias.
    here = jnp.where(wg == 0, 1.0, 0.0).astype(F32)
    db2 = load(dend_b2.at[n], ROW) * here
    open_mail(mail)
    plgpu.barrier_wait(start_barrier)
    plgpu.barrier_arrive(cluster)

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
            u1_s.at[ours][...] = dw1.astype(F16)
            u2_s.at[ours][...] = dw2.astype(F16)
            ub2_s.at[wg][...] = db2

        if s.per_batch == 1:
            enter()
            ub1 = db1
        else:
            pl.when(first_read)(enter)
            ub1 = db1 * entered + ub1 * (1.0 - entered)
        plgpu.barrier_wait(in_barrier.at[slot])
        k, n2 = k_s.at[slot], n2_s.at[slot]
        p = load(p_s.at[slot, ours], TILE).astype(F32)
        x2, slope, bend = gelu_slope_bend(load(z1_s.at[slot, ours], TILE).astype(F32))
        x2 = x2.astype(F16)
        bend = bend * p
        x2_s.at[ours][...] = x2
        meet(warpgroups.at[0], s.warpgroups)
        pl.when(t == 0)(lambda: plgpu.copy_smem_to_gmem(u1_s.at[ours], u1_out.at[n, g, units]))

        # Both warpgroups are in this step: what they read in the step before may be overwritten.
        @pl.when(i > 0)
        def _():
            fetch(i - 1, 1 - slot)

        # What the updates pass back: they read the adjoint of the weights after them.
        dn1 = load(dn1_s.at[slot, ours], TILE).astype(F32)
        dn1 += (product((R, C), (u1_s.at[ours], transposed(k))) + rows(ub1, C)) * closes
        dp = dn1 * slope
        dp_s.at[ours][...] = dp.astype(F16)
        bend = bend * dn1
        dx2 = load(dx2_s.at[slot, ours], TILE).astype(F32)
        dx2 += product((R, C), (u2_s.at[ours], n2)) * closes
        part = product((R, C), (transposed(u2_s.at[:, ours]), x2_s)) * closes
        if s.per_batch == 1:
            plgpu.barrier_wait(w2_barrier)
        else:
            pl.when(first_read)(lambda: plgpu.barrier_wait(w2_barrier))
        meet(warpgroups.at[1], s.warpgroups)
        part = plus(part, (transposed(base2_s.at[:, ours]), dp_s), (transposed(d2_s.at[:, ours]), dp_s))
        plgpu.barrier_wait(cluster)
        send(part, parts_s.at[block, ours], mail)
        plgpu.copy_smem_to_gmem(dp_s.at[ours], dp_out.at[n, g, units, u])
        dw2 = plus(dw2, (dp.astype(F16), transposed(n2)))

        # Through the inner loss's gradient and the LayerNorm, as in the forward pass.
        rate, rstd = load(rate_ref.at[n, i, own], COL), load(rstd_ref.at[n, i, own], COL)
        m1, m2 = load(m1_ref.at[n, i, own], COL), load(m2_ref.at[n, i, own], COL)
        zn, g0 = load(zn_ref.at[n, i, :, own], TILE), load(g0_ref.at[n, i, :, own], TILE)
        dn2 = load(dn2_ref.at[n, i, :, own], TILE)
        scale = load(scale_ref.at[h], ROW)
        known = Known(zn, g0, rows(scale * scale, s.own_slots), rate, rstd, m1, m2)
        ahead = known.ahead(sums)
        ub2 = load(ub2_s.at[0], ROW)
        for other in range(1, s.warpgroups):
            ub2 += load(ub2_s.at[other], ROW)
        dn2 += rows(ub2 * closes, s.own_slots)
        await_mail(mail, NC * d * C * 4, lax.rem(done, 2))
        for other in range(NC):
            dn2 += load(parts_s.at[other, :, own], TILE)

        def put(de: jax.Array, drate: jax.Array) -> None:
            @pl.when(block == 0)
            def _():
                store(de_out.at[n, i, :, own], de)
                store(drate_out.at[n, i, own], drate)

        dz2 = recede(dn2, known, ahead, sums, put)
        store_own_slots(dz2, dz2_s, at)
        db2 = db2 + jnp.sum(dz2, 1)

        meet(warpgroups.at[2], s.warpgroups)
        plgpu.barrier_arrive(cluster)

        @pl.when((block == 0) & (wg == 0))
        def _():
            plgpu.copy_smem_to_gmem(dz2_s, dz2_out.at[n, g, :, u])

        dx2 = plus(dx2, (base2_s.at[ours], dz2_s), (d2_s.at[ours], dz2_s))
        dz1 = dx2 * slope + bend
        dz1h = dz1.astype(F16)
        dz1_s.at[ours][...] = dz1h
        db1 = db1 + jnp.sum(dz1, 1)
        dw2 = plus(dw2, (x2, transposed(dz2_s)))
        dw1 = plus(dw1, (dz1h, k))
        meet(warpgroups.at[3], s.warpgroups)
        plgpu.copy_smem_to_gmem(dz1_s.at[ours], dz1_out.at[n, g, units, u])
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
            plgpu.copy_gmem_to_smem(dat_w1.at[n, g, at.all_of_block], u1_s, at_barrier)
            plgpu.copy_gmem_to_smem(dat_w2.at[n, g, at.all_of_block], u2_s, at_barrier)

        plgpu.barrier_wait(at_barrier)
        dw1 = dw1 + load(u1_s.at[ours], TILE).astype(F32)
        dw2 = dw2 + load(u2_s.at[ours], TILE).astype(F32)
        db1, db2 = db1 + load(dat_b1.at[n, g, units], ROW), db2 + load(dat_b2.at[n, g], ROW) * here
        return dw1, dw2, db1, ub1, db2

    dw1, dw2, db1, _, db2 = lax.fori_loop(0, s.groups, group, (dw1, dw2, db1, db1, db2))
    out_w1[n, units] = dw1
    out_w2[n, units] = dw2
    out_b1[n, units] = db1

    @pl.when(block == 0)
    def _():
        out_b2[n, wg] = db2

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_wait(cluster)
