"""What a sweep says of itself: `sweep.json`."""

import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsvae_jax import config as configs
from bsvae_jax._io.files import read_json
from bsvae_jax.config import Config
from bsvae_jax.data.image_set import bin_width_of
from bsvae_jax.errors import UserError
from bsvae_jax.training.identity import EDITED
from bsvae_jax.training.workdir import shape_and_levels

FORMAT = 1
"""Version of the layout of a sweep's folder."""


class Call(NamedTuple):
    """A call that added members to a sweep, for people to read."""

    date: str
    command: str
    devices: str
    versions: str

    @classmethod
    def now(cls, devices: str) -> "Call":
        """The one of this process."""
        command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
        versions = f"bsvae_jax {version('bsvae_jax')}, JAX {version('jax')}"
        return cls(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", command, devices, versions)


class SweepInfo(NamedTuple):
    """What `sweep.json` says."""

    config: Config
    """The base config."""
    data_name: str
    fingerprint: str
    image_shape: tuple[int, ...]
    levels: int
    eigenvalues: np.ndarray | None
    """Of the covariance of the training images in [0, 1], largest first; None for large images."""
    members: list[str]
    """Names of all members ever asked for."""
    calls: tuple[Call, ...] = ()
    """Of the oldest versions none were noted."""
    started_from: Mapping[str, Any] | None = None
    """The run with whose weights all members began (`Source.record`), if not with weights drawn from their seeds."""

    @property
    def bin_width(self) -> float:
        """Width of a gray level after scaling to [0, 1]."""
        return bin_width_of(self.levels)


def read_sweep(folder: Path) -> SweepInfo:
    """Read `sweep.json`.

    Raises:
      UserError: not a sweep, a damaged file, or one of a newer version.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a sweep: it has no sweep.json. Give the folder that `bsvae sweep` wrote.")
    with read_json(path, EDITED) as values:
        if values["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer bsvae_jax (format {values['format']}, this one knows {FORMAT}).")
        config, data = configs.from_dict(values["config"]), values["data"]
        shape, levels = shape_and_levels(data)
        spectrum = data["covariance_eigenvalues"]
        eigenvalues = None if spectrum is None else np.asarray(spectrum, np.float64)
        members = [str(name) for name in values["members"]]
        calls = tuple(Call(*(str(call[name]) for name in Call._fields)) for call in values.get("calls", ()))
        return SweepInfo(
            config,
            str(data["name"]),
            str(data["fingerprint"]),
            shape,
            levels,
            eigenvalues,
            members,
            calls,
            values.get("started_from"),
        )
