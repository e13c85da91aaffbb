"""The commands of benchmarks of pairs, one module each, and what they share."""
