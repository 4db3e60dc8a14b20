"""Opening a run that `fit` wrote: its model, variables and config, ready to use."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from bsvae_jax.checkpoint import Checkpoints
from bsvae_jax.config import Config
from bsvae_jax.errors import UserError
from bsvae_jax.files import as_path
from bsvae_jax.model import VAE
from bsvae_jax.objective import quantization_variance
from bsvae_jax.rundir import read_calibration, read_info, warn
from bsvae_jax.scoring import Calibration
from bsvae_jax.training import build_model, create_state


class Restored(NamedTuple):
    """A trained model: `model.apply(variables, x, key)`.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = restore(bv.fit(config, folder, progress=False).workdir)
    >>> run.model.apply(run.variables, jax.random.key(0), 5, method="sample").shape
    (5, 8, 8, 1)
    """

    model: VAE
    variables: dict[str, Any]
    """`{"params": ..., "batch_stats": ...}`; the averaged parameters where the run kept them."""
    config: Config
    step: int
    """Steps that the run had taken."""
    image_shape: tuple[int, int, int]
    """(H, W, C)"""
    levels: int
    """Grey levels of the data."""
    calibration: Calibration | None
    """Optimal variance of the training set for these very parameters, or None if the run has not recorded it."""

    @property
    def floor(self) -> float:
        """v0 of the data, squared intensity."""
        return quantization_variance(1.0 / (self.levels - 1))


def restore(workdir: str | Path, checkpoint: Literal["latest", "best"] = "latest") -> Restored:
    """Open a run.

    Args:
      workdir: the folder given to `fit` or `bsvae train`.
      checkpoint: 'latest' (the end of training), or 'best' (least held-out objective: chosen on the test split, so its test
        numbers are slightly optimistic). A damaged latest one is reported on stderr, and the one before is used.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, folder, progress=False)
    ...     restore(folder, "best").step  # 1,500 images in batches of 500
    3

    Raises:
      UserError: another `checkpoint`, not a run, no checkpoint yet, or none that loads.
    """
    folder = as_path(workdir, "workdir")
    if checkpoint not in ("latest", "best"):
        raise UserError(f"checkpoint must be 'latest' or 'best', got {checkpoint!r}.")
    info = read_info(folder)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} has no checkpoint yet; train it with bsvae train.")
    model = build_model(info.config, info.image_shape, 1.0 / (info.levels - 1))
    target = jax.eval_shape(lambda: create_state(info.config, model, 1).arrays())
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_one_device()), target)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        step, arrays = checkpoints.restore(target, checkpoints.best_step() if checkpoint == "best" else None, warn)
    params = arrays["ema_params"] or arrays["params"]
    calibration = read_calibration(folder)
    if calibration is not None and calibration.step != step:
        calibration = None
    variables = {"params": params, "batch_stats": arrays["batch_stats"]}
    return Restored(model, variables, info.config, step, info.image_shape, info.levels, calibration)


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
