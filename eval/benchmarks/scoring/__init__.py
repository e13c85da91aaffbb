"""From recordings to scores: encoded once, scored by every checkpoint, kept on disk as they come."""
