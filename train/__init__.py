"""``python -m train``: train a Moshi with TTT layers on speech, the layers' state carried along each file."""
