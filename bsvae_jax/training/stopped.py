"""Why training ended before its last step: `stopped.json`, where a callback asked for it, and `failure.json`."""

from pathlib import Path
from typing import NamedTuple

from bsvae_jax._io.files import read_json


class Stopped(NamedTuple):
    """What `stopped.json` says."""

    step: int
    """The last one taken."""
    reason: str


def read_stopped(folder: Path) -> Stopped | None:
    """Where and why a callback ended training before the last step; None where none did.

    Raises:
      UserError: a damaged file.
    """
    path = folder / "stopped.json"
    if not path.is_file():
        return None
    with read_json(path, "delete it, and training goes on") as values:
        return Stopped(int(values["step"]), str(values["reason"]))


def final_step(folder: Path, total: int) -> int:
    """The step at which the run ends: its last of `total`, or that at which a callback stopped it."""
    stopped = read_stopped(folder)
    return total if stopped is None else stopped.step


def read_failure(folder: Path) -> str | None:
    """Why training stopped in this folder, None where it did not.

    Raises:
      UserError: a damaged file.
    """
    path = folder / "failure.json"
    if not path.is_file():
        return None
    with read_json(path, "delete it") as values:
        return str(values["error"])
