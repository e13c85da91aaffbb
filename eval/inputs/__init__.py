"""What is evaluated: recordings as frames of tokens."""
