"""Small benchmarks of synthetic speech and of the embedded voices, in the official layouts."""
