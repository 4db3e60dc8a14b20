"""Which run a file belongs to: every file that a run writes carries the digest of its `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bsvae_jax._io.files import digest_of, read_arrays, read_json, write_arrays
from bsvae_jax.errors import UserError

EDITED = "undo the change; another experiment needs a folder of its own"
"""What to do where the file that says what a run or a sweep is has changed."""


def identity(folder: Path) -> str:
    """Of the run in `folder`: the digest of what its `config.json` says of config, data, versions and switches.

    Raises:
      UserError: that file is damaged or was edited.
    """
    return identities(folder)[0]


def identities(folder: Path) -> list[str]:
    """The `identity` of a run, and those it had before its config was changed, which its older files carry; raises as that."""
    with read_json(folder / "config.json", EDITED) as values:
        own = values.get("digest") or digest_of(values)  # earlier versions did not write it
        return [str(own), *(str(change["run"]) for change in values.get("changes", ()))]


def check_run(path: Path, values: Mapping[str, Any], remedy: str) -> None:
    """Raise a UserError, which ends with `remedy`, if `values`, of the file `path` of a run, are those of another run."""
    if "run" in values and str(values["run"]) not in identities(path.parent):
        raise UserError(f"{path} is of another run than the config.json beside it; {remedy}.")


def write_run_arrays(path: Path, /, **arrays: Any) -> None:
    """Write an `.npz` that belongs to the run in whose folder it is."""
    write_arrays(path, run=np.array(identity(path.parent)), **arrays)


def read_run_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """What `write_run_arrays` wrote.

    Raises:
      UserError: a damaged file, or one of another run; the sentence ends with `remedy`.
    """
    arrays = read_arrays(path, remedy)
    check_run(path, arrays, remedy)
    arrays.pop("run", None)
    return arrays
