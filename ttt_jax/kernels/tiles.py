"""Small pieces of the Pallas Mosaic GPU kernels: tiles in shared memory, products, broadcasts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F16, F32 = jnp.float16, jnp.float32
TILE = plgpu.Layout.WGMMA
DIMENSION = mgpu.utils.gpu.Dimension.x
ROW, COL = TILE.reduce(1), TILE.reduce(0)


def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


TRANSFORMS = {size: (plgpu.TilingTransform((8, 32 // size)), plgpu.SwizzleTransform(32)) for size in (2, 4)}


def half_tile(shape, dtype=F16):
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS[jnp.dtype(dtype).itemsize])


def product(shape, *pairs):
    def scoped(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    # Without the barrier LLVM may read the accumulator before the wait for it; ptxas then waits after every single product.
    return lax.optimization_barrier(pl.run_scoped(scoped, plgpu.ACC(shape, F32)))


def plus(init, *pairs):
    def scoped(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)

    return lax.optimization_barrier(pl.run_state(scoped)(plgpu.ACC.init(init)))


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if not hasattr(ref, "transpose") else ref.transpose((1, 0))


def rows(x, n):
    return lax.broadcast_in_dim(x, (x.shape[0], n), (0,))


def cols(x, m):
    return lax.broadcast_in_dim(x, (m, x.shape[0]), (1,))


def tanh(u):
    r = lax.rsqrt(1.0 + jnp.exp(2.0 * u))  # a root is one instruction, a division is twenty
    return 1.0 - 2.0 * (r * r)


def gelu_and_slope(x):
    c, a = 0.7978845608028654, 0.044715
    h = tanh(c * x * (1.0 + a * x * x))
    return 0.5 * x * (1.0 + h), 0.5 * (1.0 + h) + 0.5 * x * (1.0 - h * h) * c * (1.0 + 3.0 * a * x * x)


def store(ref, value):
    """Stores an array to global memory. jax 0.12 refuses transfers of less than whole cache lines unless told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def gelu_slope_bend(x):
    """GELU, its first and its second derivative."""
    c, a = 0.7978845608028654, 0.044715
    h = tanh(c * x * (1.0 + a * x * x))
    du, v = c * (1.0 + 3.0 * a * x * x), 1.0 - h * h
    return 0.5 * x * (1.0 + h), 0.5 * (1.0 + h) + 0.5 * x * v * du, v * (du + 0.5 * x * (6.0 * a * c * x - 2.0 * h * du * du))


def _int(value: int):
    return mgpu.c(value, mgpu.utils.ir.IntegerType.get_signless(32))


def _lane_and_warp():
    """Index of the thread in its warp and of the warp in its warpgroup."""
    thread, arith = mgpu.utils.thread_idx(), mgpu.utils.arith
    return arith.remui(thread, _int(32)), arith.remui(arith.divui(thread, _int(32)), _int(4))


def column_sums(scratch, *arrays):
    """Sums over the rows of several [D, n] arrays, n at most 16, for which the four warps meet once.

    Pallas sums one array at a time, in a buffer that all warpgroups share, so that two of them may not sum at once.

    Args:
      scratch: float32 in shared memory, 4 n entries an array, that no other warpgroup and no other sum of the step uses.
    """
    (d, n), count = arrays[0].shape, len(arrays)
    out = tuple(plgpu.ShapeDtypeStruct((n,), F32, layout=COL) for _ in arrays)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(TILE,) * count), return_type=out)
    def sums(_, scratch, *parts):
        utils, vector, arith = mgpu.utils, mgpu.utils.vector, mgpu.utils.arith
        index = lambda value: arith.index_cast(utils.ir.IndexType.get(), value)  # noqa: E731
        lane, warp = _lane_and_warp()
        layout = parts[0].layout.reduce((0,))
        shape, pair = layout.registers_shape((n,)), parts[0].registers.flat[0].type
        # A thread holds pairs of columns 2 (lane % 4) of every tile of 8; lanes that differ in lane / 4 hold other rows.
        column = arith.muli(arith.remui(lane, _int(4)), _int(2))
        first = arith.cmpi(arith.CmpIPredicate.ult, lane, _int(4))
        place = lambda part, tile, warp: index(  # noqa: E731
            arith.addi(arith.addi(arith.muli(warp, _int(count * n)), _int(part * n + tile * 8)), column)
        )
        for part, array in enumerate(parts):
            registers = np.moveaxis(array.registers, 1, 0).reshape(n // 8, -1)
            for tile, of_tile in enumerate(registers):
                total = functools.reduce(arith.addf, of_tile)
                for stride in (4, 8, 16):
                    total = arith.addf(total, utils.shfl_bfly(total, stride))
                with utils.ir.InsertionPoint(utils.scf.IfOp(first).then_block):
                    vector.store(total, scratch, [place(part, tile, warp)])
                    utils.scf.yield_([])
        utils.warpgroup_barrier()
        results = []
        for part in range(count):
            registers = np.empty(shape, object)
            for tile in range(n // 8):
                each = [vector.load(pair, scratch, [place(part, tile, _int(other))]) for other in range(4)]
                registers.reshape(-1)[tile] = arith.addf(arith.addf(each[0], each[1]), arith.addf(each[2], each[3]))
            results.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return tuple(results)

    return sums(scratch, *arrays)


def store_half_columns(value, ref, half) -> None:
    """Stores [D, 8] as float16 to the first or the last 8 columns of a `half_tile` [D, 16], which slices cannot reach."""

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(TRANSFORMS[2]), TILE))
    def store(_, value, ref, half):
        utils, arith = mgpu.utils, mgpu.utils.arith
        lane, warp = _lane_and_warp()
        # Rows of 32 bytes; their halves change places in the last four of eight rows.
        chunk = arith.xori(half.registers.item(), arith.divui(lane, _int(16)))
        offset = arith.muli(arith.divui(lane, _int(4)), _int(32))
        for term, size in ((warp, 512), (chunk, 16), (arith.remui(lane, _int(4)), 4)):
            offset = arith.addi(offset, arith.muli(term, _int(size)))
        pointer = utils.memref_ptr(ref)
        for row, pair in enumerate(value.registers.reshape(-1)):  # rows of a thread: 8 apart, then 64
            byte = (row // 2) * 2048 + (row % 2) * 256
            word = utils.bitcast(pair, utils.ir.IntegerType.get_signless(32))
            utils.inline_ptx(
                "{ .reg .u32 a; add.u32 a, $0, $1; st.shared.b32 [a], $2; }",
                pointer,
                arith.addi(offset, _int(byte)),
                word,
                has_side_effects=True,
            )

    store(value.astype(F16), ref, half)


# Pallas' own `async_store_smem` has every thread of a warpgroup arrive at the barrier of the other block, each behind a fence
# of the whole device. Here the receiver alone arrives, at a barrier in plain shared memory (`MAIL`), and announces the bytes.
MAIL = plgpu.SMEM((2,), jnp.int32)


class _Pointer(NamedTuple):
    """What `store_tiled_async` wants of a barrier."""

    pointer: object

    def get_ptr(self):
        return self.pointer


def open_mail(mail) -> None:
    """Initialises a barrier; the cluster must meet before the first `send`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(_, mail):
        first = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.BLOCK)
        mgpu.utils.inline_ptx("mbarrier.init.shared::cta.b64 [$0], 1;", mgpu.utils.memref_ptr(mail), predicate=first, has_side_effects=True)
        mgpu.utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)

    init(mail)


def send(value, ref, mail, blocks: int) -> None:
    """Stores an array to the same place of shared memory of all blocks of the cluster; `mail` there counts its bytes."""
    transforms = TRANSFORMS[jnp.dtype(value.dtype).itemsize]

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(transforms), plgpu.RefType()))
    def store(_, value, ref, mail):
        for block in range(blocks):
            index = mgpu.c(block, mgpu.utils.ir.IndexType.get())
            barrier = _Pointer(mgpu.utils.memref_ptr(mail))
            value.store_tiled_async(ref, barrier, DIMENSION, index, 32, optimized=False, tiling_rank=2)

    store(value, ref, mail)


def await_mail(mail, size: int, phase) -> None:
    """Announces `size` bytes and waits for them; by all warpgroups. `phase`: int32, 0 and 1 in turn."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def wait(_, mail, phase):
        pointer, nvvm = mgpu.utils.memref_ptr(mail), mgpu.utils.nvvm
        first = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.BLOCK)
        mgpu.utils.inline_ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", pointer, _int(size), predicate=first, has_side_effects=True)
        nvvm.mbarrier_try_wait_parity(pointer, phase.registers.item(), _int(10000000))

    wait(mail, phase)
