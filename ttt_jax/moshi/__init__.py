"""Moshi's language model (Défossez et al. 2024, arXiv 2410.00037) with TTT layers.

- `delays.py`: undelayed frames to the delayed grid that the model reads and predicts
- `attention.py`: sliding-window attention over a KV cache and the frames of the call
- `blocks.py`: a layer of the temporal transformer: attention, TTT, feed-forward
- `depth.py`: the transformer over the codebooks of a frame
- `model.py`: parameters, state and the one ``forward``
- `generate.py`: sampling frame by frame
- `loss.py`: cross-entropy on the delayed grid
"""
