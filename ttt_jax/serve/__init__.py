"""Speech in, speech out: many talks as rows of one batch, and a live server for them.

ttt_jax.serve.speech     codec and language model as one step of all rows; the state is a value
ttt_jax.serve.talks      talks that join, leave, pause, fork: each a row
ttt_jax.serve.saved      a talk in a file
ttt_jax.serve.server     the live server: `ticks` steps talks, `session` is a client, `receiver` hears it

Imports no jax.
"""
