"""`python -m eval generate`: recordings of the user in, Moshi's voice and text out."""
