"""`python -m eval stream`: files through checkpoints, scored frame by frame."""
