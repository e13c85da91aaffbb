"""The TTT layer as plain gradient descent: NumPy, float64, a loop over rows, frames and heads, every W_i formed.

Written from the specification, with no parallel form anywhere, to be what the layer under test is compared with. The
network of a head is a list of (weight [I, O], bias [O]); a state is (displacement, open_steps, count) in the layer's
own shapes: tuples of ([B, H, I, O], [B, H, O]), the two factors of every step ([B, H, b, I], [B, H, b, O]), int [B].
"""

from __future__ import annotations

import numpy as np


def gelu(x):
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    """Derivative of `gelu`."""
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def layer_norm(x, scale, bias, eps):
    """LayerNorm of one vector, biased variance."""
    return scale * (x - x.mean()) / np.sqrt(x.var() + eps) + bias


def network(weights, x):
    """f_W(x) of one vector."""
    for layer, (w, b) in enumerate(weights):
        x = (gelu(x) if layer else x) @ w + b
    return x


def inner_loss(weights, k, t, scale, bias):
    """Half the squared distance of LN(f_W(k)) from t."""
    return 0.5 * ((layer_norm(network(weights, k), scale, bias, 1e-8) - t) ** 2).sum()


def inner_gradient(weights, k, t, scale, bias):
    """Gradient of `inner_loss` by the chain rule from the output down: of every map its input and the gradient at its
    output."""
    before, x = [], k  # before: what enters each map's activation, None at the bottom
    inputs = []
    for layer, (w, b) in enumerate(weights):
        before.append(x if layer else None)
        inputs.append(gelu(x) if layer else x)
        x = inputs[-1] @ w + b
    spread = np.sqrt(x.var() + 1e-8)
    unit = (x - x.mean()) / spread
    d_unit = (scale * unit + bias - t) * scale
    # d unit_i / d x_j = (delta_ij - 1/D - unit_i unit_j / D) / spread
    d_x = (np.eye(len(x)) - 1 / len(x) - np.outer(unit, unit) / len(x)) @ d_unit / spread
    gradient = [None] * len(weights)
    for layer in reversed(range(len(weights))):
        gradient[layer] = (inputs[layer], d_x)
        if layer:
            d_x = (weights[layer][0] @ d_x) * gelu_slope(before[layer])
    return gradient


def add(a, b, factor=1.0):
    """a + factor * b, map by map."""
    return [(wa + factor * wb, ba + factor * bb) for (wa, ba), (wb, bb) in zip(a, b, strict=True)]


def outer(factors):
    """The step in weights and biases from the input and the gradient of every map."""
    return [(np.outer(x, g), g) for x, g in factors]


def frame_inputs(p, x, heads, base_lr, pre_norm, position=None):
    """q, k, t [H, D] and the rates [H] of one frame's hidden vector x [d]; rotated by `position` if there is one."""
    width = x.shape[0] // heads
    h = p["norm"] * x / np.sqrt((x**2).mean() + 1e-8) if pre_norm else x
    q, k, v = ((h @ p[f"{name}_kernel"].T + p[f"{name}_bias"]).reshape(heads, width) for name in "qkv")
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-12) for y in (q, k))
    if position is not None:
        turn = np.exp(1j * position * 10000.0 ** (-2 * np.arange(width // 2) / width))
        q, k = (((y[:, ::2] + 1j * y[:, 1::2]) * turn).view(np.float64) for y in (q, k))
    t = np.empty_like(v)
    for head in range(heads):
        r = v[head] - k[head]
        unit = (r - r.mean()) / np.sqrt(r.var(ddof=1) + 1e-10)
        t[head] = p["ln_scale"][head] * unit + p["ln_bias"][head]
    eta = [
        base_lr / (1 + np.exp(-(h @ p["rate_weight"][head] + p["rate_bias"][head]))) / width for head in range(heads)
    ]
    return q, k, t, eta


def norm(weights):
    """Euclidean norm over all maps."""
    return np.sqrt(sum((w**2).sum() + (b**2).sum() for w, b in weights))


def ttt_layer(p, x, mask, state, *, heads, base_lr, ttt):
    """The layer over x [B, T, d] with mask [B, T]: outputs (0 where masked), the state after it, and what is measured.

    `ttt` is the configuration; measured are l(W0), l(W_{t-1}), l(W_t) and |W_t - W0| / |W0|, [4, B, T, H].
    """
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    maps = len(state[0])
    out, measured = np.zeros(x.shape), np.zeros((4, *x.shape[:2], heads))
    displacement = [(np.array(w, np.float64), np.array(b, np.float64)) for w, b in state[0]]
    open_steps = tuple(tuple(np.array(part, np.float64) for part in parts) for parts in state[1])
    count = np.array(state[2])
    for row in range(x.shape[0]):
        base = [[(p[f"inner_w{n}"][h], p[f"inner_b{n}"][h]) for n in range(maps)] for h in range(heads)]
        moved = [[(w[row, h], b[row, h]) for w, b in displacement] for h in range(heads)]
        total = [[(0 * w, 0 * b) for w, b in base[h]] for h in range(heads)]
        for h in range(heads if open_steps else 0):
            for slot in range(ttt.mini_batch):
                total[h] = add(
                    total[h], outer([(x[row, h, slot], g[row, h, slot]) for x, g in zip(*open_steps, strict=True)])
                )
        for frame in np.flatnonzero(mask[row]):
            position = count[row] % ttt.mini_batch if ttt.rope else None
            q, k, t, eta = frame_inputs(p, x[row, frame], heads, base_lr, ttt.pre_norm, position)
            slot, count[row] = count[row] % ttt.mini_batch, count[row] + 1
            z = []
            for h in range(heads):
                scale, bias = p["ln_scale"][h], p["ln_bias"][h]
                start = add(base[h], moved[h])
                before = add(start, total[h], -1.0)
                gradient = inner_gradient(start, k[h], t[h], scale, bias)
                total[h] = add(total[h], outer(gradient), eta[h])
                for n in range(maps if open_steps else 0):
                    open_steps[0][n][row, h, slot], open_steps[1][n][row, h, slot] = (
                        gradient[n][0],
                        eta[h] * gradient[n][1],
                    )
                now = add(start, total[h], -1.0)
                z.append(q[h] + layer_norm(network(now, q[h]), scale, bias, 1e-8))
                losses = [inner_loss(w, k[h], t[h], scale, bias) for w in (base[h], before, now)]
                measured[:, row, frame, h] = *losses, norm(add(moved[h], total[h], -1.0)) / norm(base[h])
                if count[row] % ttt.mini_batch == 0:
                    moved[h], total[h] = add(moved[h], total[h], -1.0), add(total[h], total[h], -1.0)
                    for parts in open_steps:
                        for part in parts:
                            part[row, h] = 0
                    if ttt.horizon is not None:
                        moved[h] = add(moved[h], moved[h], np.exp(-ttt.mini_batch / ttt.horizon) - 1)
                    if ttt.max_displacement is not None:
                        limit = ttt.max_displacement * norm(base[h])
                        moved[h] = add(moved[h], moved[h], min(1.0, limit / norm(moved[h])) - 1)
            joined = np.concatenate(z)
            if ttt.post_norm:
                joined = layer_norm(joined, p["post_norm_scale"], p["post_norm_bias"], 1e-6)
            out[row, frame] = x[row, frame] + np.tanh(p["gate"]) * (joined @ p["out_kernel"].T + p["out_bias"])
        for h in range(heads):
            for n in range(maps):
                for part in (0, 1):
                    displacement[n][part][row, h] = moved[h][n][part]
    return out, (displacement, open_steps, count), measured
