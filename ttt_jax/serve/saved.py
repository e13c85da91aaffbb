"""A talk in a file: the codec's state, KV caches, fast weights, delayed tokens and random keys."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.checkpoints import stream_state
from ttt_jax.errors import InputError
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Talk

FORMAT = "ttt_jax.talk/2"
_WANTED = "a talk that was saved"


def save(path: str | Path, talk: Talk, speech: Speech, weights: str) -> None:
    """Writes `talk` to `path`, at once or not at all.

    `weights` is the digest of the language model's weights, which the fast weights belong to. Raises `InputError` if
    the file cannot be written; what was there before is left as it was.
    """
    about = {
        "format": FORMAT,
        "model": stream_state.describe(speech.cfg),
        "codec": speech.codec.digest,
        "weights": weights,
        "begun": json.dumps(talk.begun),
    }
    stream_state.write(path, talk.state, about)


def load(path: str | Path, speech: Speech, weights: str) -> Talk:
    """Returns the talk in `path`, which goes on as if it had never stopped.

    Raises `InputError` if the file is damaged, or the talk is of another model, codec or other weights.
    """
    stored = stream_state.read(path, _WANTED)
    stream_state.check_format(stored, FORMAT)
    stream_state.check_model(stored, speech.cfg)
    for name, digest in (("codec", speech.codec.digest), ("weights", weights)):
        if stored.about.get(name) != digest:
            given = str(stored.about.get(name))[:12]
            raise InputError(
                f"{path} is a talk with other {name} (digest {given}, here {digest[:12]}): give one of this checkpoint."
            )
    fresh = speech.init_state([0])
    # The state of a codec that computes on the host is of NumPy arrays, all else lies on the device.
    state = jax.tree.map(_as, fresh, stored.like(fresh))
    return Talk(state, json.loads(stored.about["begun"]))


def _as(like: object, leaf: np.ndarray) -> object:
    return leaf if isinstance(like, np.ndarray) else jnp.asarray(leaf)
