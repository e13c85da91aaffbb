"""The original's TTT layer in NumPy, float64, in its own parallel form, with its defects; each can be mended by name.

Written from its equations (github.com/AlufRon/claude-web, moshi_ttt_try/moshi-finetune, `moshi_ttt/models/ssm/`).
"""

from __future__ import annotations

import numpy as np

LOOK_AHEAD = "frames read the steps of later ones"
TWICE = "networks of three maps and more read their update twice"
TARGET_EPS = "1e-5 is added to the target's deviation instead of 1e-10 to its variance"
CONSTANTS = "the slope of GELU has constants of 8 digits"
DEFECTS = frozenset({LOOK_AHEAD, TWICE, TARGET_EPS, CONSTANTS})


def gelu(x):
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x, defects):
    """Its derivative."""
    c, c3 = (0.79788456, 0.1070322243) if CONSTANTS in defects else np.sqrt(2 / np.pi) * np.array([1, 3 * 0.044715])
    tau = np.tanh(c * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - tau * tau) * (c + c3 * x * x) + 0.5 * (1 + tau)


def layer_norm(z, gamma, beta):
    """LayerNorm, biased variance."""
    return gamma * (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-8) + beta


def inner_gradient(z, t, gamma, beta):
    """Gradient of 0.5 |LN(z) - t|^2 in z."""
    spread = np.sqrt(z.var(-1, keepdims=True) + 1e-8)
    unit = (z - z.mean(-1, keepdims=True)) / spread
    delta = (gamma * unit + beta - t) * gamma
    return (delta - delta.mean(-1, keepdims=True) - unit * (delta * unit).mean(-1, keepdims=True)) / spread


def mini_batch(maps, q, k, t, e, gamma, beta, defects):
    """Outputs [C, D] of one head's mini-batch and its weights after it.

    Args:
      maps: weights [I, O] and biases [1, O]; q, k, t: [C, D]; e: rates [C], divided by C.
    """
    inputs, outputs = [k], []
    for n, (w, b) in enumerate(maps):
        outputs.append(inputs[n] @ w + b)
        inputs.append(gelu(outputs[n]))
    grads = [inner_gradient(outputs[-1], t, gamma, beta)]
    for (w, _), z in zip(maps[:0:-1], outputs[-2::-1], strict=True):
        grads.insert(0, (grads[0] @ w.T) * gelu_slope(z, defects))
    after = [
        (w - (e[:, None] * x).T @ g, b - (e[:, None] * g).sum(0, keepdims=True))
        for (w, b), x, g in zip(maps, inputs, grads, strict=False)
    ]
    rates = np.tile(e, (len(e), 1))
    if LOOK_AHEAD not in defects:
        rates = np.tril(rates)
    start = after if len(maps) > 2 and TWICE in defects else maps
    x = q
    for n, ((w, b), x_k, g) in enumerate(zip(start, inputs, grads, strict=False)):
        x = gelu(x) if n else x
        x = x @ w - (rates * (x @ x_k.T)) @ g + b - rates @ g
    return q + layer_norm(x, gamma, beta), after


def layer(p, x, heads, base_lr, size, defects=DEFECTS):
    """The layer over one row's x [T, d], T a multiple of the mini-batch `size`, from its learned weights.

    Returns:
      Outputs [T, d], and by mini-batch and head the fast weights after it.
    """
    p = {name.removeprefix("ttt_layer.ttt."): np.asarray(values, np.float64) for name, values in p.items()}
    frames, d = x.shape
    width = d // heads
    q, k, v = ((x @ p[f"w{one}.weight"].T + p[f"w{one}.bias"]).reshape(frames, heads, width) for one in "qkv")
    q, k = (y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12) for y in (q, k))
    r = v - k
    r = r - r.mean(-1, keepdims=True)
    variance = r.var(-1, ddof=1, keepdims=True)
    r = r / (np.sqrt(variance) + 1e-5 if TARGET_EPS in defects else np.sqrt(variance + 1e-10))
    target = p["ttt_norm_weight"] * r + p["ttt_norm_bias"]
    logits = np.einsum("tc,hdc->th", x, p["learnable_ttt_lr_weight"]) + p["learnable_ttt_lr_bias"][:, 0]
    eta = base_lr / (1 + np.exp(-logits)) / width / size
    if "W1" in p:
        names = [(f"W{n}", f"b{n}") for n in (1, 2) if f"W{n}" in p]
    else:
        names = [(f"weights.{n}", f"biases.{n}") for n in range(sum("weights." in name for name in p))]
    z, fast = np.empty((frames, heads, width)), []
    state = [[(p[w][h], p[b][h]) for w, b in names] for h in range(heads)]
    for at in range(0, frames, size):
        now = slice(at, at + size)
        for h in range(heads):
            gamma, beta = p["ttt_norm_weight"][h], p["ttt_norm_bias"][h]
            z[now, h], state[h] = mini_batch(
                state[h], q[now, h], k[now, h], target[now, h], eta[now, h], gamma, beta, defects
            )
        fast.append(list(state))
    gate = np.tanh(np.clip(p["forward_ssm_gating.gating_alpha"], -3, 3))
    return x + gate * z.reshape(frames, d), fast
