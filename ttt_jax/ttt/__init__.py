"""The TTT layer (Sun et al. 2024, arXiv 2407.04620): a recurrent layer whose hidden state is the weights of a small
network.

- `network.py`: the inner network, its gradient, reading through steps: plain functions on arrays
- `state.py`: the state, and how a mini-batch closes
- `loop.py`: the inner loop over a call of several frames, by `inner.py` or `fused`
- `inner.py`: the scan over mini-batches
- `one_frame.py`: calls of one frame
- `fused`: the scan with its sequential part as a kernel (`ttt_jax.kernels`)
- `measure.py`: what fast weights know of each frame
- `laws.py`: the layer's laws, tried on this very machine by the doctor
- `layer.py`: the layer's parameters and the map from hidden vectors to inner queries, keys, targets and rates
"""
