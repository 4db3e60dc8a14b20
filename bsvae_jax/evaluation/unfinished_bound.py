"""The file from which an importance-weighted bound that was interrupted continues."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bsvae_jax._io.files import read_arrays, write_arrays
from bsvae_jax._io.terminal import log
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.importance_weighted import Partial


class UnfinishedBound:
    """How far the bound of one split has come, in a file of the workdir; without a workdir nothing is kept."""

    def __init__(self, workdir: Path | None, split: str, identity: list[Any]):
        """`identity`, of plain JSON values, tells this computation from others of the split."""
        self._path = None if workdir is None else workdir / f".bound-{split}.npz"
        self._identity = json.dumps(identity)

    def read(self) -> Partial | None:
        """What was kept for the same computation; None where there is nothing of use."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            arrays = read_arrays(self._path, "it is made again")
        except UserError as error:
            log.warning(str(error))
            return None
        expected = {"identity", *Partial._fields}
        if set(arrays) != expected or str(arrays.pop("identity")) != self._identity:
            return None
        values: dict[str, Any] = arrays | {"done": int(arrays["done"])}
        return Partial(**values)

    def write(self, partial: Partial) -> None:
        """Keep how far it has come."""
        if self._path is not None:
            write_arrays(self._path, identity=np.array(self._identity), **partial._asdict())

    def remove(self) -> None:
        """The computation has ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
