"""`python -m eval report`: one HTML page over many results."""
