"""The fixture `tiny_run`: a run that is trained, checkpointed, exported and evaluated once each time pytest runs."""

from __future__ import annotations

import dataclasses
import shutil
import time
import traceback
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure

from tests.helpers import in_process, micro
from ttt_jax.codec import load_codec
from ttt_jax.convert import export, kyutai
from ttt_jax.utils import config_json

STEPS, CHECKPOINT_EVERY = 4, 2
TRAIN, HELDOUT = (100, 61, 45, 80), (45, 60)
"""Lengths of the files in frames."""
WAIT = 900
"""Seconds after which a worker gives up waiting for the one that makes the run."""


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """Paths of the run. Many tests read them: copy what you write into."""

    root: Path
    """Folder of all that follows."""

    @property
    def run(self) -> Path:
        """The run's folder, with checkpoints after steps 2 and 4 of 4."""
        return self.root / "run"

    @property
    def eval(self) -> Path:
        """What `eval stream` left of its held-out files; its figures are empty files."""
        return self.run / "eval"

    @property
    def train(self) -> Path:
        """The manifest of the training files."""
        return self.root / "train.jsonl"

    @property
    def heldout(self) -> Path:
        """The manifest of the held-out files."""
        return self.root / "heldout.jsonl"

    @property
    def exported(self) -> Path:
        """The final weights in Kyutai's layout."""
        return self.root / "exported"

    @property
    def weights(self) -> Path:
        """The final weights as converted weights, read back from `exported`."""
        return self.root / "weights"

    @property
    def config(self) -> Path:
        """The configuration that was given to `python -m train --from`."""
        return self.root / "asked.json"

    @property
    def output(self) -> Path:
        """What `python -m train` printed, the table of its evaluation included."""
        return self.root / "output.txt"

    def copy(self, folder: Path) -> Path:
        """A copy of the run in `folder`, to be changed."""
        return Path(shutil.copytree(self.run, folder / "run"))


def shared(base: Path) -> TinyRun:
    """The run below `base`, a folder that all workers share; the first worker makes it, the others wait."""
    root = base / "tiny_run"
    done, failed = root / "done", root / "failed"
    try:
        root.mkdir()  # fails for all workers but one
    except FileExistsError:
        end = time.monotonic() + WAIT
        while not done.exists():
            if failed.exists():
                raise RuntimeError(f"another worker could not make the run:\n{failed.read_text()}") from None
            if time.monotonic() > end:
                raise TimeoutError(f"no worker has finished {root} in {WAIT} s") from None
            time.sleep(0.1)
        return TinyRun(root)
    try:
        _make(TinyRun(root))
    except BaseException:
        failed.write_text(traceback.format_exc())
        raise
    done.touch()
    return TinyRun(root)


def _make(tiny: TinyRun) -> None:
    digest = load_codec().digest
    data = dataclasses.replace(
        micro.CONFIG.data,
        train=str(micro.write_manifest(tiny.root, "train", micro.files(TRAIN), digest)),
        heldout=str(micro.write_manifest(tiny.root, "heldout", micro.files(HELDOUT, seed=1), digest)),
        cache=str(tiny.root / "cache"),
    )
    cfg = micro.config(data=data, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, name="tiny")
    config_json.write_json(tiny.config, config_json.to_dict(cfg))
    # Drawing takes as long as training; train/test_plot.py and eval/streaming/test_plots.py look at figures.
    with mock.patch.multiple(Figure, savefig=_nothing, draw_without_rendering=_nothing):
        done = in_process.command("train", "--from", tiny.config, "--run-dir", tiny.run)
    tiny.output.write_text(done.stdout)
    assert done.returncode == 0, done.stderr
    export(tiny.run, tiny.exported)
    kyutai(tiny.exported, tiny.weights)


def _nothing(*args, **options) -> None:
    """Draws no figure."""
