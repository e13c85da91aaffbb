"""The adjoint of the linear chain on a Hopper GPU, from the last step to the first.

As in the forward pass a head has one warpgroup; it holds the adjoint of the displacement in registers, float32. What
the updates pass back reads u, a float16 copy of the adjoint as it is after the mini-batch. Weights are not read:
through one map they pass gradients to the keys alone (`ttt.fused.groups.key_gradient`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.chain import C
from ttt_jax.kernels.cluster import Shape, summing
from ttt_jax.kernels.inner_loss import Known, recede
from ttt_jax.kernels.linear import launch
from ttt_jax.kernels.tiles import COL, F16, F32, ROW, TILE, Ref, load, plus, product, rows, shared, store, transposed


def kernel(s: Shape, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the adjoint.

    Args:
      args: k, rate, closes, scale; zn, rstd of `Saved`; g0, m1, m2, dn, then w, b of dat and dend of `Given`.

    Returns:
      u, dz [N, G, D, U, C], de, drate, and w, b of `dstart`.
    """
    n, d = s.lanes, s.width
    full, half = (lambda *shape, t=t: jax.ShapeDtypeStruct(shape, t) for t in (F32, F16))
    out = [half(n, s.groups, d, d), half(n, s.groups, d, s.group, C), full(n, s.steps, d, C), full(n, s.steps, C)]
    out += [full(n, d, d), full(n, d)]
    tiles = [shared(2, C, d), *(shared(2, d, C, dtype=F32) for _ in range(3)), shared(d, d), shared(d, C)]
    tiles += [plgpu.SMEM((1, 8 * 4 * C), F32), plgpu.Barrier(num_arrivals=4, num_barriers=2)]
    return launch(_body, s, out, tiles, *args)


def _body(s: Shape, *refs: Ref) -> None:
    it = iter(refs)
    take = lambda n: [next(it) for _ in range(n)]  # noqa: E731
    k_ref, rate_ref, closes_ref, scale_ref, zn_ref, rstd_ref, g0_ref, m1_ref, m2_ref, dn_ref = take(10)
    dat_w, dat_b, dend_w, dend_b = take(4)
    u_out, dz_out, de_out, drate_out, out_w, out_b = take(6)
    k_s, zn_s, g0_s, dn_s = take(4)  # two of each: fetched ahead
    u_s, dz_s, sums_s, in_barrier = take(4)

    n, d = lax.axis_index("head"), s.width
    sums = summing(sums_s, 0, C)

    def fetch(i: jax.Array, slot: jax.Array) -> None:
        for ref, to in ((k_ref, k_s), (zn_ref, zn_s), (g0_ref, g0_s), (dn_ref, dn_s)):
            plgpu.copy_gmem_to_smem(ref.at[n, i], to.at[slot], in_barrier.at[slot])

    fetch(s.steps - 1, 0)
    scale = load(scale_ref.at[lax.rem(n, scale_ref.shape[0])], ROW)

    def step(t, g, carry):
        """Step `t` of a group, from its end."""
        w, b, ub = carry
        u = s.group - 1 - t
        i = g * s.group + u
        slot = lax.rem(s.steps - 1 - i, 2)
        closes = closes_ref[n, i]
        first_read = lax.rem(i, s.per_batch) == s.per_batch - 1  # the mini-batch is entered, from its end
        entered = 1.0 if s.per_batch == 1 else first_read.astype(F32)
        kept = 1.0 + (s.keep - 1.0) * closes * entered
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        w, b = w * kept, b * kept

        def enter():
            u_s[...] = w.astype(F16)

        enter() if s.per_batch == 1 else pl.when(first_read)(enter)
        ub = b if s.per_batch == 1 else b * entered + ub * (1.0 - entered)
        plgpu.commit_smem()  # all warps are in this step: what they read in the step before may be overwritten
        pl.when(i > 0)(lambda: fetch(i - 1, 1 - slot))
        pl.when(t == 0)(lambda: plgpu.copy_smem_to_gmem(u_s, u_out.at[n, g]))

        of_token = (load(ref.at[n, i], COL) for ref in (rate_ref, rstd_ref, m1_ref, m2_ref))
        plgpu.barrier_wait(in_barrier.at[slot])
        k, square = k_s.at[slot], rows(scale * scale, C)
        known = Known(load(zn_s.at[slot], TILE), load(g0_s.at[slot], TILE), square, *of_token)
        dn = load(dn_s.at[slot], TILE) + (product((d, C), (u_s, transposed(k))) + rows(ub, C)) * closes

        def put(de: jax.Array, drate: jax.Array) -> None:
            store(de_out.at[n, i], de)
            store(drate_out.at[n, i], drate)

        dz = recede(dn, known, known.ahead(sums), sums, put)
        dz_s[...] = dz.astype(F16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dz_s, dz_out.at[n, g, :, u])
        return plus(w, (dz.astype(F16), k)), b + jnp.sum(dz, 1), ub

    def group(j, carry):
        g = s.groups - 1 - j
        w, b, ub = lax.fori_loop(0, s.group, lambda t, carry: step(t, g, carry), carry)
        return w + load(dat_w.at[n, g], TILE).astype(F32), b + load(dat_b.at[n, g], ROW), ub

    w, b = load(dend_w.at[n], TILE), load(dend_b.at[n], ROW)
    w, b, _ = lax.fori_loop(0, s.groups, group, (w, b, b))
    out_w[n] = w
    out_b[n] = b
    plgpu.wait_smem_to_gmem(0)
