"""`python -m eval check-state`: whether the fast weights of a checkpoint persist from frame to frame."""
