"""What is evaluated: checkpoints, and recordings as frames of tokens."""
