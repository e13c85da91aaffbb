"""The TTT layer (Sun et al. 2024, arXiv 2407.04620): a recurrent layer whose hidden state is the weights of a small network.

- `inner.py`: the inner network, its gradient, the scan over mini-batches: plain functions on arrays
- `laws.py`: the layer's laws, tried on this very machine by the doctor
- `layer.py`: the layer's parameters and the map from hidden vectors to inner queries, keys, targets and rates
"""
