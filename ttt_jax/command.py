"""What every command shares: mistakes end in one sentence and an exit code, and a command knows what it has cost."""

from __future__ import annotations

import errno
import resource
import sys
import time
from collections.abc import Callable

from ttt_jax.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130

_started = time.perf_counter()


def cost() -> dict[str, float]:
    """Seconds since the command began and the most memory it has held, in gigabytes (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(time.perf_counter() - _started, 1), "peak_gigabytes": round(peak / 1e9, 2)}


def run(command: Callable[[], int]) -> int:
    """Exit code of `command`: its own, or 2 for something that the user can mend, or 130 if interrupted."""
    try:
        return command()
    except InputError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("ttt_jax", "train", "eval"):
            raise
        problem = (
            f"the package {error.name} is not installed: install what the commands need by pip install -e '.[all]'."
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        problem = f"no space left on the disk of {error.filename or 'the run folder'}: free some and run again."
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {problem}", file=sys.stderr)
    return BAD_INPUT
