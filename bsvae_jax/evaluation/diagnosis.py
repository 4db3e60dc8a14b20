"""Ailments that numbers alone do not name, such as variance collapse, posterior collapse, a dead decoder; with what helps."""

from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet
from bsvae_jax.evaluation.metrics import active_latents
from bsvae_jax.evaluation.scores import SplitScores
from bsvae_jax.models.linear import Linear
from bsvae_jax.models.priors import StandardNormal
from bsvae_jax.objective import Constant, Learned, quantization_variance

OFF_TARGET = "rate off target"
"""The finding that a schedule of beta has until the last step to prevent."""


def diagnose(scores: SplitScores, config: Config, images: ImageSet, beta: float | None = None) -> dict[str, str]:
    """What is wrong with a model, by the name of the ailment; empty for a healthy one.

    Args:
      scores: of the test set.
      config: of the run.
      images: its data.
      beta: of these parameters, where it is not that of the config.
    """
    found = {}
    beta = config.beta if beta is None else beta
    floor = quantization_variance(images.bin_width)
    if not isinstance(config.decoder_variance, Constant) and scores.model_variance < 2 * floor:
        found["variance collapse"] = (
            f"the decoder variance {scores.model_variance:.3g} is at its floor v0 = {floor:.3g}, the quantization noise: the "
            "likelihood says nothing but that the images are reconstructed exactly. Fewer latents or a larger beta help, or "
            "less constant data."
        )
    mse = float(scores.squared_error.mean() / scores.pixels)
    rate = float(scores.rate.mean())
    optimum = mse + floor
    # Wider below: the variance is that of the training set, whose error is smaller than the test set's.
    if isinstance(config.decoder_variance, Learned) and not 0.25 < scores.model_variance / optimum < 2.0:
        found["variance not converged"] = (
            f"the trained decoder variance {scores.model_variance:.3g} is far from its optimum, squared error + v0 = "
            f"{optimum:.3g}, so that latents may be idle for that reason alone. Longer training helps, or a start nearby: "
            f"Learned(initial_variance={optimum:.2g})."
        )
    elif active_latents(scores) == 0:
        found["posterior collapse"] = (
            f"no latent is active (rate {rate:.3g} nats): z says nothing about the image. A smaller beta helps"
            f"{_critical_beta(config, images, beta)}; so does longer training, where this was short."
        )
    elif rate > 1.0 and mse > 0.99 * images.test_variance:
        found["dead decoder"] = (
            f"the latents carry {rate:.3g} nats, but the reconstructions (squared error {mse:.3g} per pixel) are no better "
            "than the mean image: the decoder does not use z. A lower learning rate or gradient clipping helps."
        )
    if (missed := config.beta_schedule.finding(beta, rate)) is not None:
        found[OFF_TARGET] = missed
    return found


def _critical_beta(config: Config, images: ImageSet, beta: float) -> str:
    """Where theory puts the collapse of a linear model on these data."""
    eigenvalues = images.spectrum(config.classes)
    if eigenvalues is None or not isinstance(config.prior, StandardNormal):
        return ""
    critical = config.decoder_variance.critical_beta(eigenvalues, quantization_variance(images.bin_width))
    if critical is None:
        return ""
    linear = "this linear model" if isinstance(config.network, Linear) else "a linear model on these data"
    return f" ({linear} collapses beyond beta = {critical:.4g} in theory, this run has {beta:.4g})"
