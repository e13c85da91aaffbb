"""`python -m eval compare`: does memory help? Conditions on the same files, with statistics and a verdict."""
