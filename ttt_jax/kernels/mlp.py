"""The forward pass of the MLP chain on a Hopper GPU.

A warpgroup holds the displacement of its 64 hidden units in registers, W1 and W2, as accumulators in float32, for the
whole call. Products read the base and a float16 copy of the displacement in shared memory. A step goes

1. z1 = W1 k + b1 and GELU, each warpgroup for its hidden units;
2. its part of z2 = W2^T x2, sent to all blocks of the cluster;
3. LayerNorm, the inner loss's gradient and n2: every block for all slots, so that n2 need not be sent;
4. p = W2 n2 and n1, and the steps n1 k^T and x2 n2^T added to the displacement.

Tokens are the columns of all arrays. `_s` marks shared memory, `_out` results. Tiles are copied out while the step goes
on; a warpgroup waits for its own copies before it writes a tile again.
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
from ttt_jax.kernels.inner_loss import descend
from ttt_jax.kernels.tiles import (
    COL,
    F16,
    F32,
    ROW,
    TILE,
    Ref,
    gelu_and_slope,
    load,
    plus,
    product,
    rows,
    shared,
    store,
    transposed,
)


def kernel(s: Shape, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the chain.

    Args:
      args: k, target, rate, closes; the base's w1, b1, w2, b2; scale, bias; `Start.total`; `Start.read`.

    Returns:
      x2, n1, n2 [N, G, X, U, C]; w1, b1, w2 and b2 at the groups' starts and after the call, b2 in parts [...,
      warpgroups, D]; with `s.save` (w2 at the starts is then left out) w2 of all mini-batches, z1, p, zn, rstd.
    """
    n, d, hidden, groups = s.lanes, s.width, s.hidden, s.groups
    full, half = (lambda *shape, t=t: jax.ShapeDtypeStruct(shape, t) for t in (F32, F16))
    of_hidden = half(n, groups, hidden, s.group, C)
    out = [of_hidden, of_hidden, half(n, groups, d, s.group, C), half(n, groups, hidden, d), full(n, groups, hidden)]
    out += [half(n, 1 if s.save else groups, hidden, d), full(n, groups, s.warpgroups, d)]
    out += [full(n, hidden, d), full(n, hidden), full(n, hidden, d), full(n, s.warpgroups, d)]
    tiles = [shared(2, C, d), *(shared(s.units, d) for _ in range(4)), shared(s.units, C), shared(s.units, C)]
    tiles += [shared(d, C), shared(NC, d, C, dtype=F32), plgpu.SMEM((s.warpgroups, d), F32)]
    tiles += [plgpu.SMEM((s.warpgroups, 6 * 4 * s.own_slots), F32)]
    if s.save:
        out += [half(n, s.batches, hidden, d), of_hidden, of_hidden, full(n, s.steps, d, C), full(n, s.steps, C)]
        tiles += [shared(s.units, C), shared(s.units, C), shared(d, C, dtype=F32)]
    barriers = [
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        MAIL,
        plgpu.Barrier(num_arrivals=s.warpgroups, num_barriers=2),
    ]
    return launch(_body, s, out, [*tiles, *barriers], *args)


def _body(s: Shape, *refs: Ref) -> None:
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, target_ref, rate_ref, closes_ref = take(4)
    base_w1, base_b1, base_w2, base_b2, scale_ref, bias_ref = take(6)
    total_w1, total_b1, total_w2, total_b2, read_w1, read_b1, read_w2, read_b2 = take(8)
    x2_out, n1_out, n2_out, at_w1, at_b1, at_w2, at_b2, end_w1, end_b1, end_w2, end_b2 = take(11)
    w2_out, z1_out, p_out, zn_out, rstd_out = take(5) if s.save else (None,) * 5
    k_s, d1_s, d2_s, base1_s, base2_s, x2_s, n1_s, n2_s, parts_s, b2_s, sums_s = take(11)
    z1_s, p_s, zn_s = take(3) if s.save else (None,) * 3
    start_barrier, k_barrier, mail, warpgroups, cluster = take(5)

    at = place(s)
    n, block, wg, d = at.n, at.block, at.wg, s.width
    units, ours, own = at.of_head, at.of_block, at.own
    sums = summing(sums_s, wg, s.own_slots)

    def entry(ref: Ref) -> Ref:
        """Of an array for heads, or for rows and heads."""
        return ref.at[lax.rem(n, ref.shape[0])]

    def fetch(i: jax.Array, slot: jax.Array) -> None:
        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[n, i], k_s.at[slot], k_barrier.at[slot])

    @pl.when(wg == 0)
    def _():
        weights = (entry(base_w1), base1_s), (entry(base_w2), base2_s), (read_w1.at[n], d1_s), (read_w2.at[n], d2_s)
        for ref, to in weights:
            plgpu.copy_gmem_to_smem(ref.at[at.all_of_block], to, start_barrier)

    fetch(0, 0)
    w1, w2 = load(total_w1.at[n, units], TILE), load(total_w2.at[n, units], TILE)
    b1, read1 = load(total_b1.at[n, units], ROW), load(read_b1.at[n, units], ROW)
    base1, base2 = load(entry(base_b1).at[units], ROW), load(entry(base_b2), ROW)
    scale, bias = load(entry(scale_ref), ROW), load(entry(bias_ref), ROW)
    # Each warpgroup sums the second bias over its own slots: the bias is the sum of these parts.
    here = jnp.where(wg == 0, 1.0, 0.0).astype(F32)
    b2 = load(total_b2.at[n], ROW) * here
    b2_s.at[wg][...] = load(read_b2.at[n], ROW) * here
    open_mail(mail)
    plgpu.barrier_wait(start_barrier)
    plgpu.barrier_arrive(cluster)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w1, w2, b1, read1, b2 = carry
        slot, g, u = lax.rem(i, 2), lax.div(i, s.group), lax.rem(i, s.group)
        closes = closes_ref[n, i]
        last = lax.rem(i, s.per_batch) == s.per_batch - 1
        ends = 1.0 if s.per_batch == 1 else last.astype(F32)
        kept = 1.0 + (s.keep - 1.0) * closes * ends

        if s.save:

            def save() -> None:
                plgpu.copy_smem_to_gmem(d2_s.at[ours], w2_out.at[n, lax.div(i, s.per_batch), units])

            save() if s.per_batch == 1 else pl.when(lax.rem(i, s.per_batch) == 0)(save)

        @pl.when(u == 0)
        def _():
            plgpu.copy_smem_to_gmem(d1_s.at[ours], at_w1.at[n, g, units])
            if not s.save:
                plgpu.copy_smem_to_gmem(d2_s.at[ours], at_w2.at[n, g, units])
            at_b1[n, g, units] = read1

            @pl.when(block == 0)
            def _():
                at_b2[n, g, wg] = load(b2_s.at[wg], ROW)

        plgpu.barrier_wait(k_barrier.at[slot])
        k = transposed(k_s.at[slot])
        z1 = product((R, C), (base1_s.at[ours], k), (d1_s.at[ours], k)) + rows(read1 + base1, C)
        x2, slope = gelu_and_slope(z1)
        x2 = x2.astype(F16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what left the tiles of the step before has been read
        x2_s.at[ours][...] = x2
        if s.save:
            z1_s.at[ours][...] = z1.astype(F16)
        meet(warpgroups.at[0], s.warpgroups)

        # Both warpgroups are in this step: what they read in the step before may be overwritten.
        @pl.when(i + 1 < s.steps)
        def _():
            fetch(i + 1, 1 - slot)

        part = product((R, C), (transposed(base2_s.at[:, ours]), x2_s), (transposed(d2_s.at[:, ours]), x2_s))
        plgpu.barrier_wait(cluster)  # all blocks have read the parts of the step before
        send(part, parts_s.at[block, ours], mail)
        plgpu.copy_smem_to_gmem(x2_s.at[ours], x2_out.at[n, g, units, u])
        if s.save:
            plgpu.copy_smem_to_gmem(z1_s.at[ours], z1_out.at[n, g, units, u])

        # LayerNorm and the gradient.
        target, rate = load(target_ref.at[n, i, :, own], TILE), load(rate_ref.at[n, i, own], COL)
        square = rows(scale * scale, s.own_slots)
        shift = rows(scale, s.own_slots) * (rows(bias, s.own_slots) - target)
        (of_shift,) = sums(0, shift)
        z = base2
        for other in range(s.warpgroups):
            z += load(b2_s.at[other], ROW)
        z = rows(z, s.own_slots)
        await_mail(mail, NC * d * C * 4, lax.rem(i, 2))
        for other in range(NC):
            z += load(parts_s.at[other, :, own], TILE)
        zn, rstd, n2 = descend(z, square, shift, of_shift, rate, sums)
        store_own_slots(n2, n2_s, at)
        if s.save:
            zn_s.at[:, own][...] = zn

            @pl.when(block == 0)
            def _():
                store(rstd_out.at[n, i, own], rstd)

        b2 = (b2 + jnp.sum(n2, 1) * closes) * kept
        meet(warpgroups.at[1], s.warpgroups)
        plgpu.barrier_arrive(cluster)

        def renew_bias() -> None:
            b2_s.at[wg][...] = b2

        renew_bias() if s.per_batch == 1 else pl.when(last)(renew_bias)
        p = product((R, C), (base2_s.at[ours], n2_s), (d2_s.at[ours], n2_s))
        n1 = p * slope
        n1_s.at[ours][...] = n1.astype(F16)
        if s.save:
            p_s.at[ours][...] = p.astype(F16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(n1_s.at[ours], n1_out.at[n, g, units, u])
        if s.save:
            plgpu.copy_smem_to_gmem(p_s.at[ours], p_out.at[n, g, units, u])

        @pl.when((block == 0) & (wg == 0))
        def _():
            plgpu.copy_smem_to_gmem(n2_s, n2_out.at[n, g, :, u])
            if s.save:
                plgpu.copy_smem_to_gmem(zn_s, zn_out.at[n, i])

        w1 = plus(w1, ((n1 * closes).astype(F16), k_s.at[slot])) * kept
        w2 = plus(w2, ((x2.astype(F32) * closes).astype(F16), transposed(n2_s))) * kept
        b1 = (b1 + jnp.sum(n1, 1) * closes) * kept

        def renew() -> None:
            d1_s.at[ours][...] = w1.astype(F16)
            d2_s.at[ours][...] = w2.astype(F16)
            plgpu.commit_smem()

        # All copies but the newest have been read, and the newest are of this step's slots: the weights may be renewed.
        plgpu.wait_smem_to_gmem(4 if s.save else 2, wait_read_only=True)
        if s.per_batch == 1:
            renew()
            read1 = b1
        else:
            pl.when(last)(renew)
            read1 = b1 * ends + read1 * (1.0 - ends)
        return w1, w2, b1, read1, b2

    w1, w2, b1, _, b2 = lax.fori_loop(0, s.steps, step, (w1, w2, b1, read1, b2))
    end_w1[n, units] = w1
    end_w2[n, units] = w2
    end_b1[n, units] = b1

    @pl.when(block == 0)
    def _():
        end_b2[n, wg] = b2

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_wait(cluster)  # no block leaves while others may send to it
