"""Holds the default run to what the project promises of it: `python .ci/check_run.py RUN`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def main(run: Path) -> None:
    """Exits with a message at the first promise that RUN breaks."""
    results = json.loads((run / "eval" / "results.json").read_text())
    (evaluated,) = results["checkpoints"]
    model = evaluated["info"]["about"]["config"]["model"]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    cards = {"text": model["text_card"]}
    for name, loss in first["streams"].items():
        expected = math.log(cards.get(name, model["card"])) + first["half_variance"][name]
        expect(abs(loss / expected - 1) < 0.05, f"initial loss of {name} is {loss:.3f}, expected {expected:.3f}")
    gain = evaluated["against_unigram"]
    for name, least in {"text": 0.3, "codebook 1": 0.3, "codebook 2": 0.1}.items():
        expect(
            gain[name]["mean"] >= least, f"{name} beats the unigram model by {gain[name]['mean']:.3f} nats, not {least}"
        )
    for name, value in gain.items():
        expect(value["mean"] > -0.02, f"{name} is {-value['mean']:.3f} nats worse than the unigram model")
    equal = gain["equal"]
    expect(equal["low"] > 0, f"the mean over codebooks is not clearly better than the unigram model: {equal}")
    cost = results["cost"]
    expect(cost["seconds"] <= 300, f"the run took {cost['seconds']:.0f} s, more than 300")
    expect(cost["peak_gigabytes"] <= 4, f"the run took {cost['peak_gigabytes']:.1f} GB of memory, more than 4")
    for name in ("eval/memory.png", "eval/figure5.png", "eval/frames", "loss.png", "config.json", "checkpoints"):
        expect((run / name).exists(), f"{run / name} is missing")
    print(f"the run in {run} keeps its promises: {cost['seconds']:.0f} s, {cost['peak_gigabytes']:.1f} GB")


def expect(condition: bool, problem: str) -> None:
    """Ends with `problem` unless `condition` holds."""
    if not condition:
        sys.exit(f"broken promise: {problem}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
