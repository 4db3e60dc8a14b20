"""A trained model with what it was trained on: what evaluation starts from."""

from typing import Any, NamedTuple

from bsvae_jax.config import Config
from bsvae_jax.data.image_set import bin_width_of
from bsvae_jax.evaluation.scores import Calibration
from bsvae_jax.models.vae import VAE
from bsvae_jax.objective import quantization_variance


class Restored(NamedTuple):
    """A trained model: `model.apply(variables, x, key)`.

    >>> import tempfile
    >>> import jax
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = bv.restore(bv.fit(config, folder, progress=False).workdir)
    >>> run.model.apply(run.variables, jax.random.key(0), 5, method="sample").shape
    (5, 8, 8, 1)
    """

    model: VAE
    variables: dict[str, Any]
    """`{"params": ..., "batch_stats": ...}`; the averaged parameters where the run kept them."""
    config: Config
    step: int
    """Steps that the run had taken."""
    image_shape: tuple[int, ...]
    """Of one example: (H, W, C) of images."""
    levels: int
    """Gray levels of the data."""
    calibration: Calibration | None
    """Optimal variance of the training set for these very parameters, or None if the run has not recorded it."""
    holds_images: bool = True
    """Whether the data are images [H, W, C] in [0, 1], `ImageSet.holds_images`."""
    multiplier: float = 1.0
    """Of the config's beta, to which a target rate has come by this checkpoint."""

    @property
    def beta(self) -> float:
        """Weight of the rate at this checkpoint; of a schedule, that at which it arrives."""
        return self.config.beta * self.multiplier

    @property
    def floor(self) -> float:
        """v0 of the data, squared intensity."""
        return quantization_variance(bin_width_of(self.levels))
