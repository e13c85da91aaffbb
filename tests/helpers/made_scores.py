"""Made-up scores of streamed files with known means, slopes and distances, as `eval.streaming.measure` reads them."""

import numpy as np

from eval.results.schema import CheckpointInfo, FileInfo, scores_path
from eval.streaming import results as stream_results
from eval.streaming import scores
from eval.streaming.results import Setting
from eval.streaming.summary import summarise

Q = 3
STREAMS = ("text", "codebook 1", "codebook 2", "codebook 3")
DELAYS = (0, 1, 2, 2)
"""Frames at the start of a file in which a stream is not scored."""
LAYERS = (1, 4)
ARMS = {
    "persist": "memory kept from the first frame to the last",
    "reset": "memory cleared at every reset",
    "frozen": "fast weights held at their learned start",
    "off": "gates closed",
    "permuted": "memory of another file in place of its own",
}
SETTING = Setting(
    STREAMS,
    ARMS,
    reset_every=40,
    window=25,
    text="own transcripts",
    about={"codec": {"name": "made", "digest": "d0"}, "voice": "left"},
)
CHECKPOINT = CheckpointInfo("tiny", contexts=(60,), ttt_layers=LAYERS, about={"step": 7})
FILES = [
    FileInfo("a", "a", 200, "a.npz", (50,), "d1"),
    FileInfo("b", "b", 110, "b.npz"),
    FileInfo("c", "c", 160, "c.npz"),
    FileInfo("d", "d", 30, "d.npz"),
]

LEVEL = {"persist": 3.0, "reset": 3.01, "frozen": 3.04, "off": 3.05, "permuted": 3.03}
"""Nats of the first stream's token at the start of a file of no peculiarity; each further stream has 0.25 less."""
SLOPE = {"persist": -2.0, "reset": -1.0, "frozen": 0.0, "off": 0.0, "permuted": -0.5}
"""Change of the nats per 1,000 frames."""
KL = {"persist": 0.2, "reset": 0.15, "frozen": 0.05, "permuted": 0.12}


def scored(frames: int) -> np.ndarray:
    """[S, T]: whether a stream's token counts."""
    return np.arange(frames) >= np.array(DELAYS)[:, None]


def make(
    frames: int,
    seed: int,
    arms=tuple(ARMS),
    layers=LAYERS,
    text: bool = True,
    unigram: bool = True,
    shift: float = 0.0,
    noise: float = 0.3,
) -> scores.FileScores:
    """One file of `frames` frames; `shift` is added to the losses of all arms; `noise` is shared by arms, and a little
    is their own."""
    rng = np.random.default_rng(seed)
    there = scored(frames)
    there[0] &= text
    shared = rng.normal(0, 0.1) + rng.normal(0, noise, (len(STREAMS), frames)) - 0.25 * np.arange(len(STREAMS))[:, None]
    position = np.arange(frames) / 1000

    def keep(values):
        return np.where(there, values, np.nan).astype(np.float32)

    def arm(name):
        own = rng.normal(0, noise / 30) + rng.normal(0, noise / 10, shared.shape)
        nats = LEVEL[name] + shift + SLOPE[name] * position + shared + own
        rank = rng.integers(0, 4, shared.shape)
        against = None
        if name != "off" and "off" in arms:
            kl = KL[name] * rng.uniform(0.5, 1.5, shared.shape)
            against = scores.Against(keep(kl), keep(rng.uniform(size=shared.shape) < KL[name]))
        return scores.ArmScores(
            keep(nats), keep(nats + 0.1), keep(rank), against, inner(name, frames, len(layers), rng) if layers else None
        )

    return scores.FileScores(
        np.where(there, rng.integers(0, 9, shared.shape), -1).astype(np.int32),
        {name: arm(name) for name in arms},
        keep(3.5 + shared) if unigram else None,
    )


def inner(name: str, frames: int, layers: int, rng) -> scores.Inner:
    """Inner losses whose gain saturates under persist, starts anew at resets under reset and is 0 under frozen."""
    age = np.arange(frames, dtype=float)
    if name == "reset":
        age %= SETTING.reset_every
    depth = 1 + np.arange(layers)[:, None]
    base = 0.6 * depth + rng.normal(0, 0.05, (layers, frames))
    gain = 0 if name == "frozen" else 0.1 * depth * (1 - np.exp(-age / 30)) * rng.uniform(0.8, 1.2)
    moved = np.broadcast_to(0 if name == "frozen" else 0.4 * (1 - np.exp(-age / 40)) / depth, base.shape)
    step = 0 if name == "frozen" else 0.02 * depth
    rate = np.full(base.shape, 0 if name == "frozen" else 0.01) * depth
    return scores.Inner(*(x.astype(np.float32) for x in (base, base - gain, base - gain - step, moved, rate)))


def write(folder, checkpoint=CHECKPOINT, files=FILES, **options) -> list[scores.FileScores]:
    """Scores of `files` under `checkpoint` in a result folder; those scores."""
    made = []
    for seed, file in enumerate(files):
        made.append(make(file.frames, seed, layers=checkpoint.ttt_layers, **options))
        path = scores_path(folder, checkpoint.name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path, made[-1])
    return made


def write_results(folder, checkpoints, files=FILES, skipped=(), setting=SETTING):
    """Writes results.json for the scores in `folder`; returns the results."""
    results = summarise(setting, checkpoints, files, list(skipped), folder)
    stream_results.write(folder, results, {})
    return results


def stream(params, files, cfg, arms, *, measured=False, on_frames=lambda count: None, seed=0, **_):
    """In place of `eval.streaming.runner.stream`: random scores of the tokens that are there, inner losses if
    `measured`."""
    rng, found = np.random.default_rng(seed), []
    for file in files:
        tokens = np.where(file[: 1 + cfg.dep_q] >= 0, file[: 1 + cfg.dep_q], -1).astype(np.int32)

        def draw(tokens=tokens):
            return np.where(tokens >= 0, rng.uniform(1, 4, tokens.shape), np.nan).astype(np.float32)

        def arm(name, tokens=tokens, draw=draw):
            against = scores.Against(draw(), draw()) if "off" in arms and name != "off" else None
            own = inner("persist", tokens.shape[1], len(cfg.ttt_layers), rng) if measured else None
            return scores.ArmScores(draw(), draw(), draw().round(), against, own)

        found.append(scores.FileScores(tokens, {name: arm(name) for name in arms}))
        on_frames(file.shape[1])
    return found
