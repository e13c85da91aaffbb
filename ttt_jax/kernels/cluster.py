"""The cluster of thread blocks that runs a head, and what Pallas does not offer for it.

A head's hidden units are spread over a cluster of four blocks, and over one or two warpgroups in each. Sums over hidden
units travel through the blocks' shared memory. The functions marked as inlined are written one level below Pallas, in
Mosaic GPU; `tests/kernels/test_lowering.py` lowers them on both ends of the range of JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels.chain import NC, C
from ttt_jax.kernels.tiles import COL, F16, F32, TILE, TRANSFORMS, Ref

R = 64
"""Hidden units of a warpgroup: the least height of a product."""


class Shape(NamedTuple):
    """Sizes and settings of a kernel; letters as in `kernels.chain`."""

    lanes: int
    """N, rows times heads."""
    width: int
    """D, 64 or 128."""
    steps: int
    """S."""
    per_batch: int
    """P."""
    group: int
    """U."""
    keep: float
    """What remains of the displacement after a mini-batch."""
    save: bool
    """Whether the forward pass writes what the adjoint needs."""

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block."""
        return self.width // R

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        return R * self.warpgroups

    @property
    def hidden(self) -> int:
        """K."""
        return NC * self.units

    @property
    def groups(self) -> int:
        """G."""
        return self.steps // self.group

    @property
    def batches(self) -> int:
        """M."""
        return self.steps // self.per_batch

    @property
    def own_slots(self) -> int:
        """Slots of a step whose LayerNorm a warpgroup computes."""
        return C // self.warpgroups


class Place(NamedTuple):
    """Where a warpgroup stands."""

    n: jax.Array
    """Row and head."""
    block: jax.Array
    """In the cluster."""
    wg: jax.Array
    """Warpgroup in the block."""
    of_head: pl.Slice
    """The warpgroup's hidden units among all."""
    of_block: pl.Slice
    """Those among the block's. As a slice of the width: the outputs that the warpgroup computes."""
    all_of_block: pl.Slice
    """The block's hidden units among all."""
    own: pl.Slice
    """Slots of a step whose LayerNorm the warpgroup computes."""


def place(s: Shape) -> Place:
    """The place of the running warpgroup."""
    n, block, wg = lax.axis_index("head"), lax.axis_index("block"), lax.axis_index("wg")
    of_head, of_block = pl.ds(block * s.units + wg * R, R), pl.ds(wg * R, R)
    return Place(n, block, wg, of_head, of_block, pl.ds(block * s.units, s.units), pl.ds(wg * s.own_slots, s.own_slots))


def meet(barrier: Ref, warpgroups: int) -> None:
    """Waits for all warpgroups of the block, and makes what they have written to shared memory readable for products
    and copies."""
    plgpu.commit_smem()
    if warpgroups > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def launch(body, shape: Shape, out_type: list, scratch_types: list, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Runs `body(shape, *refs)` with a cluster for each head; its last reference is to the cluster's barrier."""
    barrier = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=shape.warpgroups)
    return plgpu.kernel(
        functools.partial(body, shape),
        out_type=tuple(out_type),
        scratch_types=[*scratch_types, barrier],
        grid=(shape.lanes,),
        grid_names=("head",),
        cluster=(NC,),
        cluster_names=("block",),
        num_threads=shape.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*args)


# Inlined


def _int(value: int):
    return mgpu.c(value, mgpu.utils.ir.IntegerType.get_signless(32))


def _lane_and_warp():
    """Index of the thread in its warp and of the warp in its warpgroup."""
    thread, arith = mgpu.utils.thread_idx(), mgpu.utils.arith
    return arith.remui(thread, _int(32)), arith.remui(arith.divui(thread, _int(32)), _int(4))


def column_sums(scratch: Ref, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the rows of several [D, n] arrays, n at most 16, for which the four warps meet once.

    Pallas sums one array at a time, in a buffer that all warpgroups share, so that two of them may not sum at once.

    Args:
      scratch: 4 n numbers for each array; no other sum of the step may use it.
    """
    (_, n), count = arrays[0].shape, len(arrays)
    out = tuple(plgpu.ShapeDtypeStruct((n,), F32, layout=COL) for _ in arrays)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(TILE,) * count), return_type=out)
    def sums(_, scratch, *parts):
        utils, vector, arith = mgpu.utils, mgpu.utils.vector, mgpu.utils.arith
        index = lambda value: arith.index_cast(utils.ir.IndexType.get(), value)  # noqa: E731
        lane, warp = _lane_and_warp()
        layout = parts[0].layout.reduce((0,))
        shape, pair = layout.registers_shape((n,)), parts[0].registers.flat[0].type
        # A thread holds the columns 2 (lane % 4) and the next of a tile of 8; lanes of other lane / 4 hold other rows.
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


def summing(scratch: Ref, wg: jax.Array | int, slots: int) -> Callable[..., tuple[jax.Array, ...]]:
    """`sums(first, *arrays)`: `column_sums` of arrays [D, slots], with a buffer behind those of `first` others.

    Args:
      scratch: [warpgroups, 4 slots for each sum of a step].
      wg: the running warpgroup.
    """
    size = 4 * slots

    def sums(first: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return column_sums(scratch.at[wg, pl.ds(size * first, size * len(arrays))], *arrays)

    return sums


def store_own_slots(value: jax.Array, ref: Ref, place: Place) -> None:
    """Stores a warpgroup's slots [D, own_slots] as float16 to a `shared` tile [D, C]."""
    if place.own.size == C:
        ref[...] = value.astype(F16)
        return

    # Half of the 16 columns of a tile, which slices cannot reach.
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

    store(value.astype(F16), ref, place.wg)


# Pallas' own `async_store_smem` has every thread of a warpgroup arrive at the barrier of the other block, each behind a
# fence of the whole device. Here the receiver alone arrives, at a barrier in plain shared memory (`MAIL`), and
# announces the bytes that are to come.
MAIL = plgpu.SMEM((2,), jnp.int32)


class _Pointer(NamedTuple):
    """What `store_tiled_async` wants of a barrier."""

    pointer: object

    def get_ptr(self):
        return self.pointer


def open_mail(mail: Ref) -> None:
    """Initialises a barrier; the cluster must meet before the first `send`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(_, mail):
        utils = mgpu.utils
        first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
        pointer = utils.memref_ptr(mail)
        utils.inline_ptx("mbarrier.init.shared::cta.b64 [$0], 1;", pointer, predicate=first, has_side_effects=True)
        utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
        utils.warpgroup_barrier()

    init(mail)


def send(value: jax.Array, ref: Ref, mail: Ref) -> None:
    """Stores an array to the same place of all blocks' shared memory; `mail` there counts its bytes."""
    transforms = TRANSFORMS[jnp.dtype(value.dtype).itemsize]

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(transforms), plgpu.RefType()))
    def store(_, value, ref, mail):
        along = mgpu.utils.gpu.Dimension.x
        for block in range(NC):
            index = mgpu.c(block, mgpu.utils.ir.IndexType.get())
            barrier = _Pointer(mgpu.utils.memref_ptr(mail))
            value.store_tiled_async(ref, barrier, along, index, 32, optimized=False, tiling_rank=2)

    store(value, ref, mail)


def await_mail(mail: Ref, size: int, phase: jax.Array) -> None:
    """Announces `size` bytes and waits for them; by all warpgroups. `phase`: int32, 0 and 1 in turn."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def wait(_, mail, phase):
        utils = mgpu.utils
        pointer = utils.memref_ptr(mail)
        first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
        ptx = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
        utils.inline_ptx(ptx, pointer, _int(size), predicate=first, has_side_effects=True)
        utils.nvvm.mbarrier_try_wait_parity(pointer, phase.registers.item(), _int(10000000))

    wait(mail, phase)
