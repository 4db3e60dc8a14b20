"""The calibrated ELBO of every test image, `per_image.npz`: what differences between models, image by image, are made of."""

from pathlib import Path

import numpy as np

from bsvae_jax._io.files import sense_of
from bsvae_jax.training.identity import read_run_arrays, write_run_arrays


def write_per_image(folder: Path, step: int, values: np.ndarray) -> None:
    """Record that of the parameters of `step`: nats [S, N], averaged over S posterior samples of each of N images."""
    write_run_arrays(folder / "per_image.npz", step=np.int64(step), calibrated_elbo=values.mean(axis=0))


def read_per_image(folder: Path, step: int) -> np.ndarray | None:
    """Nats, [N]; None where none was recorded of the parameters of `step`, as in runs of earlier versions.

    Raises:
      UserError: a damaged file, or one of another run.
    """
    path, remedy = folder / "per_image.npz", "delete it, and `bsvae evaluate` makes it again"
    if not path.is_file():
        return None
    values = read_run_arrays(path, remedy)
    with sense_of(path, remedy):
        return np.asarray(values["calibrated_elbo"], np.float64) if int(values["step"]) == step else None
