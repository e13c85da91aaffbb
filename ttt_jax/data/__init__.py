"""Recordings, transcripts and alignments on disk to frames of 17 streams.

ttt_jax.data.audio        sound files at any rate to float32 samples
ttt_jax.data.manifest     moshi-finetune's manifests
ttt_jax.data.alignments   the JSON beside a recording and its words
ttt_jax.data.text         SentencePiece tokens and the text row
ttt_jax.data.encode       a recording to codes and text: the one way for training, prepare and evaluation
ttt_jax.data.codes        files of codes
ttt_jax.data.frames       a manifest's entry to int32 [17, T], cached on disk
ttt_jax.data.corpus       the data of a run; its codec and tokenizer, and their fit to a model
ttt_jax.data.sources      recordings in files, folders, manifests and trees of data sets
ttt_jax.data.prepare      a folder of code files and its manifest
ttt_jax.data.unigram      the memory-less baseline
"""
