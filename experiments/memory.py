"""Does memory help? Trains and compares the models that docs/results/memory.md reports."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from eval.__main__ import main as evaluate
from eval.compare import command as compare
from eval.inputs import dataset
from eval.tasks.dataset import Settings, make
from train import loop, setup
from train.config import PRESETS, DataConfig, LossConfig, TrainConfig
from ttt_jax.checkpoints.parameter_counts import TTT, parameter_counts
from ttt_jax.codec import KMEANS, load_codec
from ttt_jax.config import DepthConfig, check
from ttt_jax.data import corpus
from ttt_jax.utils import config_json
from ttt_jax.utils.command import parse, run
from ttt_jax.utils.paths import local

TINY = PRESETS["tiny"]
CHUNK = 128
"""Frames of a chunk. The attention of all three layers together reaches 47 of them, the codebooks' delay included."""
STEPS = 2000
SEEDS, SPEECH_SEEDS = (20, 21, 22), tuple(range(20, 29))
TASK = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, context=16),
    data=DataConfig(chunk=CHUNK, batch=32, codec=corpus.FILES, from_start=True),
    loss=LossConfig(text=0.0),
    optim=dataclasses.replace(TINY.optim, warmup_steps=100),
    steps=STEPS,
    checkpoint_every=STEPS,
)
"""The preset `tiny` with a short window, on files that begin with the facts."""
NAMES = ("recall", "speaker", "control")
SHORT = Settings("", files=24576, frames=CHUNK, every=3, seed=1)
LONG = Settings("", files=6144, frames=4 * CHUNK, every=6, seed=2)
"""Training data: half of the frames each."""
LONG_SPEAKER = dataclasses.replace(LONG, every=48)
"""Of speakers: the rarer a voice speaks, the longer it has to be remembered."""
HELDOUT = Settings("", files=128, frames=17 * CHUNK, every=131, seed=2000)
"""Test data: 16 questions or tokens, so that hardly any fact is repeated; the last comes 16 chunks after the start."""

REPLAY_STEPS = 1500
REPLAY = dataclasses.replace(
    TASK,
    model=dataclasses.replace(
        TASK.model,
        dim=64,
        num_layers=2,
        hidden=176,
        depth=DepthConfig(dim=16, num_layers=1, num_heads=1, hidden=32),
    ),
    data=dataclasses.replace(TASK.data, codec=KMEANS),
    steps=REPLAY_STEPS,
    checkpoint_every=REPLAY_STEPS,
)
"""Small enough for a CPU. The codec is that of the speech. One TTT layer: of two, the first can be a clock by which the
second finds what was said so many frames ago, which is no recall of what is heard."""
EXCERPT = 25
"""Frames of an excerpt, 2 s: no multiple of a mini-batch, so that a replay finds the TTT layers in another phase."""
FRESH = Settings("replay", files=32, frames=2700, every=2620, seed=3000)
"""Streams in which nothing comes again, for `python -m eval recall` to replay."""
GAPS = "5.12,10,20,40,80,160"
"""Seconds; 64 to 2,000 frames."""

REPORTED = Path(__file__).parents[1] / "docs" / "results" / "memory"
"""Copies of FOLDER/results without the frames and the PDF figures."""

Change = Callable[[TrainConfig], TrainConfig]


def none(cfg: TrainConfig) -> TrainConfig:
    """No TTT layer; as many parameters in a wider feed-forward."""
    model = cfg.model
    spare = parameter_counts(model)[TTT] / (3 * model.dim * model.num_layers)  # gate, up and down
    ttt = dataclasses.replace(model.ttt, layers="none")
    return dataclasses.replace(cfg, model=dataclasses.replace(model, ttt=ttt, hidden=model.hidden + round(spare)))


def reset(cfg: TrainConfig) -> TrainConfig:
    """Fast weights cleared at every chunk of training."""
    return dataclasses.replace(cfg, state="reset")


def persist(cfg: TrainConfig) -> TrainConfig:
    """Fast weights kept along each file, gradients cut between chunks."""
    return cfg


def bptt(cfg: TrainConfig) -> TrainConfig:
    """Gradients through four chunks; a quarter of the rows, so that a step has as many frames."""
    return dataclasses.replace(cfg, bptt=4, data=dataclasses.replace(cfg.data, batch=cfg.data.batch // 4))


def ttt(**fields: Any) -> Change:
    """Other TTT layers; where the inner rate is left out it follows from the rest."""

    def change(cfg: TrainConfig) -> TrainConfig:
        layers = dataclasses.replace(cfg.model.ttt, **fields)
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ttt=layers))

    return change


WAYS: dict[str, Change] = {"persist": persist, "reset": reset, "bptt": bptt, "none": none}
"""Ways to train, by name."""
INNER: dict[str, Change] = {
    "persist": persist,  # the MLP, b = 16
    "linear-16": ttt(hidden=()),
    "linear-1": ttt(hidden=(), mini_batch=1),
    "mlp-1": ttt(mini_batch=1),
}
PLACES: dict[str, Change] = {"persist": persist, "middle": ttt(layers="1"), "last": ttt(layers="2")}
"""Of the TTT layer, which `persist` has in the first one."""


class Experiment:
    """A folder, and the runs in it."""

    def __init__(self, folder: Path, seeds: Sequence[int], steps: int | None):
        self._folder, self._seeds, self._steps = folder, tuple(seeds), steps
        self._load = setup.keep_in_memory()
        self.code = 0
        """The worst exit code of a comparison."""

    def tasks(self) -> None:
        """Four ways to train, on three tasks."""
        for way, change in WAYS.items():
            self._train(way, change(TASK), NAMES)
        for name in NAMES:
            self._compare(f"tasks-{name}", self._conditions(name), self._heldout(name))

    def inner(self) -> None:
        """Inner networks and mini-batches, on recall."""
        self._variants("inner", INNER)

    def place(self) -> None:
        """Where the TTT layer sits, on recall."""
        self._variants("place", PLACES)

    def speech(self) -> None:
        """Four ways to train, on the embedded speech."""
        for way, change in WAYS.items():
            self._train(way, change(TINY), ("speech",))
        self._compare("speech", self._conditions("speech"), None)

    def replay(self) -> None:
        """Excerpts that come again; then spoken recall, of codes and of speech."""
        self._train("persist", REPLAY, ("replay",))
        runs, fresh = self._runs("persist", "replay"), self._data("fresh", "replay", FRESH)
        conditions = [f"{arm}={runs}@{arm}" for arm in ("persist", "reset", "frozen", "off")]
        self._compare("tasks-replay", conditions, self._heldout("replay"))
        codes = ["--kind", "heard-before", "--data", str(fresh), "--gaps", GAPS]
        for name, flags in {"recall-codes": codes, "recall-speech": ["--data", str(dataset.embedded())]}.items():
            place = ["--batch", "16", "--out", str(self._out(name))]
            self.code = max(self.code, evaluate(["recall", *runs.split(","), *flags, *place]))

    def _variants(self, part: str, variants: dict[str, Change]) -> None:
        for variant, change in variants.items():
            self._train(variant, change(TASK), ("recall",))
        conditions = [f"{variant}={self._runs(variant, 'recall')}@persist" for variant in variants]
        self._compare(part, conditions, self._heldout("recall"))

    def _conditions(self, name: str) -> list[str]:
        """Returns the conditions: the first is compared with each other one."""
        persistent, cleared, unrolled = (self._runs(way, name) for way in ("persist", "reset", "bptt"))
        return [
            f"persist={persistent}@persist",
            f"reset={persistent}@reset",
            f"none={self._runs('none', name)}@off",
            f"trained-reset={cleared}@reset",
            f"trained-reset-kept={cleared}@persist",
            f"bptt={unrolled}@persist",
        ]

    def _runs(self, way: str, name: str) -> str:
        return ",".join(str(self._run(way, name, seed)) for seed in self._seeds)

    def _run(self, way: str, name: str, seed: int) -> Path:
        return self._folder / "runs" / f"{way}-{name}-{seed}"

    def _train(self, way: str, cfg: TrainConfig, names: Sequence[str]) -> None:
        """Trains all seeds on all data sets side by side, except runs that have ended."""
        if self._steps:
            cfg = dataclasses.replace(cfg, steps=self._steps, checkpoint_every=self._steps)
        places = {self._run(way, name, seed): (name, seed) for name in names for seed in self._seeds}
        cfgs = []
        for place, (name, seed) in places.items():
            if (place / "checkpoints" / str(cfg.steps)).is_dir():
                continue
            _remove_rest(place, cfg.steps)
            data = cfg.data if name == "speech" else dataclasses.replace(cfg.data, train=self._trained_on(name))
            cfgs.append(dataclasses.replace(cfg, name=place.name, run_dir=str(place), seed=seed, data=data))
        if cfgs and loop.start(cfgs, self._load, evaluate=False):
            raise KeyboardInterrupt

    def _trained_on(self, name: str) -> str:
        # A file of the long ones has as many frames as four of the short ones.
        long = LONG_SPEAKER if name == "speaker" else LONG
        short = SHORT
        if name == "replay":
            short, long = (dataclasses.replace(settings, every=EXCERPT) for settings in (short, long))
        return f"{self._data('short', name, short)}:4,{self._data('long', name, long)}:1"

    def _heldout(self, name: str) -> Path:
        settings = dataclasses.replace(HELDOUT, every=EXCERPT) if name == "replay" else HELDOUT
        return self._data("heldout", name, settings)

    def _data(self, what: str, name: str, settings: Settings) -> Path:
        folder = self._folder / "data" / f"{name}-{what}"
        if not folder.exists():
            codec = (load_codec(KMEANS).digest,) if name == "replay" else ()
            make(dataclasses.replace(settings, task=name), folder, *codec)
        return folder

    def _compare(self, name: str, conditions: Sequence[str], data: Path | None) -> None:
        out = self._out(name)
        on = ["--data", str(data), "--batch", "64"] if data is not None else []
        self.code = max(self.code, evaluate(["compare", *conditions, *on, "--out", str(out)]))

    def _out(self, name: str) -> Path:
        # Of other seeds they are other results, which do not replace these.
        usual = self._seeds in (SEEDS, SPEECH_SEEDS)
        return self._folder / "results" / (name if usual else f"{name}-seeds-{'-'.join(map(str, self._seeds))}")


def _remove_rest(place: Path, steps: int) -> None:
    """Removes an interrupted run of `steps` steps. Raises `InputError` if it is a run of another length."""
    config = place / "config.json"
    if config.is_file():
        stored_steps = config_json.read_json(config, "the config.json of a run").get("steps")
        check(
            stored_steps == steps,
            f"{place} holds a run of {stored_steps} steps, not {steps}: give another folder, or --steps"
            f" {stored_steps}.",
        )
    shutil.rmtree(place, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Does memory help? Train and compare the models that docs/results/memory.md reports.

    Data sets go to FOLDER/data (1 GB), runs to FOLDER/runs, comparisons to FOLDER/results (those of other --seeds to
    folders that end in them). Runs that have ended are not trained again, so inner and place use those of tasks. Runs
    that differ in task and seed alone train side by side. A GPU needs minutes for each part.
    """

    part: Positional[Literal["tasks", "inner", "place", "speech", "replay"] | None] = None
    """tasks: recall, speaker, control, the MLP at b = 16, trained in four ways. inner: recall, linear and MLP, b = 1
    and 16. place: recall, the TTT layer in the first, the middle and the last layer. speech: the embedded speech,
    trained in four ways. replay: excerpts that come again, and spoken recall of them
    (docs/results/recall.md)."""
    folder: Annotated[Positional[str | None], arg(metavar="[FOLDER]")] = None
    """The same for all parts; what exists in it is used."""
    seeds: Annotated[str | None, arg(metavar="N,N,...")] = None
    """Joined by commas; unset: those of the report."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps of training; unset: those of the report."""
    again: bool = False
    """Only compute the statistics, reports and figures in docs/results/memory again, from the losses stored there."""

    def __post_init__(self) -> None:
        check(
            self.again == (self.part is None) and (self.part is None) == (self.folder is None),
            "part and folder are missing, or given together with --again: give PART FOLDER, or --again alone.",
        )
        check(
            self.seeds is None or all(seed.isdecimal() for seed in self.seeds.split(",")),
            f"--seeds {self.seeds!r} are no seeds: give whole numbers joined by commas.",
        )
        check(self.steps is None or self.steps > 0, f"--steps {self.steps} is out of range: give 1 or more.")


def main(options: Options) -> int:
    """Runs the command; returns the exit code."""
    if options.again:
        return again(REPORTED)
    log = logging.getLogger("train")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    usual = SPEECH_SEEDS if options.part == "speech" else SEEDS
    seeds = usual if options.seeds is None else [int(seed) for seed in options.seeds.split(",")]
    experiment = Experiment(local(options.folder), seeds, options.steps)
    getattr(experiment, options.part)()
    return experiment.code


def again(folder: Path) -> int:
    """Computes the comparisons in `folder` again from their losses.npz; returns the worst exit code."""
    codes = []
    for results in sorted(folder.glob("*/results.json")):
        codes.append(compare.again(results.parent, {}))
        for figure in results.parent.glob("*.pdf"):
            figure.unlink()  # the documents show PNG
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse(Options, "python -m experiments.memory", sys.argv[1:]))))
