"""The inner loop with its sequential part as a kernel (`ttt_jax.kernels`).

- `scan.py`: the call, with the arguments and results of `inner.inner_scan`
- `chained.py`: the kernel and what reads its weights as one function with one gradient
- `slots.py`: places of the frames of a call
- `groups.py`, `measure.py`: reading of queries, and of inner losses, in parallel over groups of mini-batches
- `fold.py`: `jax.vmap` over kernels
"""
