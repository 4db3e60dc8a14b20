"""`bsvae runs`: what there is in a folder."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bsvae_jax.cli.document import document


def runs(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")] = Path("runs"),
    members: bool = False,
    json: bool = False,
) -> None:
    """List the runs and sweeps below a folder: their state, step of how many, settings and numbers of the test set.

    States: finished; running, a process has the folder; interrupted, the same command continues; diverged; begun, no step is
    logged yet; imported, weights of another program; exported, weights without a training; damaged. Needs no device.

    With --json: {"runs": [{"folder", "kind": "run" or "sweep", "state", "step", "total", "settings": {name: value},
    "numbers": {name: value}, "note"}]}.

    Args:
      folder: Where to look.
      members: List the members of sweeps too.
      json: Print one JSON document on standard output.
    """
    from bsvae_jax.sweeps.runs import as_text, list_runs

    with document(json) as found:
        found["runs"] = list_runs(folder, members)
        print(as_text(found["runs"], folder) if found["runs"] else f"There is no run in {folder}.")
