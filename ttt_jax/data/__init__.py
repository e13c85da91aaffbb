"""Recordings, transcripts and alignments on disk to frames of 17 streams.

ttt_jax.data.audio.reader        sound files at any rate to float32 samples
ttt_jax.data.manifest     moshi-finetune's manifests
ttt_jax.data.alignments   the JSON beside a recording: its words, or something else
ttt_jax.data.text         SentencePiece tokens and the text row
ttt_jax.data.codes        files of codes, with what they were made of
ttt_jax.data.frames       a manifest's entry to int32 [17, T], cached on disk
"""
