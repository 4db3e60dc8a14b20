"""What a trained model is worth: ELBO terms, profile and calibrated likelihood, reconstruction error, active units.

Two likelihoods are reported and never to be compared with each other:

* *profile*: the decoder variance is optimal for each example, `sigma^2*(x)`; what Kim & Lee (2024) table. Not a density.
* *calibrated*: the variance is frozen at the optimum of the training set, so `exp(-value)` is a density of the dequantised
  image (bits/dim follow), and models can be compared.

Every number uses one posterior sample per image; evaluation at the posterior mean would not be an ELBO.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bsvae_jax.data import ImageSet
from bsvae_jax.errors import UserError, nearest
from bsvae_jax.loading import Restored
from bsvae_jax.objective import bits_per_dimension
from bsvae_jax.parallel import data_mesh, replicate
from bsvae_jax.scoring import (
    EVALUATION_BATCH,
    Calibration,
    SplitScores,
    calibrate,
    distortion_at,
    optimal_variance_of_split,
    score_split,
    split_key,
)

ACTIVE_THRESHOLD = 0.01
"""A latent is active if the variance of its posterior mean over the data exceeds this (Burda et al. 2016)."""


class Quantity(NamedTuple):
    """One reported number."""

    value: float
    standard_error: float | None
    """Of the mean over examples (sampling of images); None where that does not apply."""
    unit: str
    meaning: str


def _mean(values: np.ndarray, unit: str, meaning: str) -> Quantity:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Quantity(float(values.mean()), error, unit, meaning)


def summarize(scores: SplitScores, beta: float, calibration: Calibration) -> dict[str, Quantity]:
    """All quantities of one split.

    Args:
      scores: of the split, from `score_split`.
      beta: weight of the rate in the model's objective.
      calibration: of the training set, for the same parameters.
    """
    rate, floor = scores.rate, calibration.floor
    mse = scores.squared_error / scores.pixels
    profile = distortion_at(scores, optimal_variance_of_split(scores, "example", floor), floor)
    calibrated = distortion_at(scores, calibration.variance, floor)
    shape, step = scores.pixel_squared_error.shape, float(np.sqrt(12 * floor))
    # Per pixel, the mean over examples is all that is needed: sum_d 1/2 [log(2 pi v_d) + (SE_d + v0) / v_d].
    pixel_variance = calibration.variance_per_pixel
    per_pixel = 0.5 * np.sum(np.log(2 * np.pi * pixel_variance) + (scores.pixel_squared_error + floor) / pixel_variance)
    active = int(np.sum(scores.posterior_mean.var(axis=0) > ACTIVE_THRESHOLD))
    own = {
        name: _mean(values, "nats", meaning)
        for name, values, meaning in (
            ("objective", scores.model_distortion + beta * rate, "distortion + beta * rate, the model's own"),
            ("distortion", scores.model_distortion, "-log p(x|z) under the model's decoder variance"),
        )
    }
    if np.ptp(scores.model_distortion) == 0:  # one variance per pixel: only the mean over the split is known
        own = {name: quantity._replace(standard_error=None) for name, quantity in own.items()}
    bits = bits_per_dimension(calibrated + rate, shape, step)
    return {
        **own,
        "rate": _mean(rate, "nats", "KL(q(z|x) || p(z))"),
        "profile_distortion": _mean(profile, "nats", "with sigma^2*(x) of each example; not a density"),
        "profile_elbo": _mean(-profile - rate, "nats", "the paper's likelihood; not a density"),
        "calibrated_distortion": _mean(calibrated, "nats", "variance frozen at the training set's optimum"),
        "calibrated_elbo": _mean(-calibrated - rate, "nats", "lower bound of log p(x), a density"),
        "calibrated_bits_per_dimension": _mean(np.asarray(bits), "bits/dim", "upper bound, from calibrated_elbo"),
        "calibrated_elbo_per_pixel_variance": Quantity(
            float(-per_pixel - rate.mean()), None, "nats", "the same with one frozen variance per pixel"
        ),
        "mse": _mean(mse, "intensity^2", "squared error per pixel"),
        "psnr": _mean(-10 * np.log10(np.maximum(mse, 1e-12)), "dB", "peak signal-to-noise ratio, mean over images"),
        "variance": Quantity(scores.model_variance, None, "intensity^2", "the model's decoder variance, averaged"),
        "calibrated_variance": Quantity(calibration.variance, None, "intensity^2", "optimum of the training set"),
        "active_units": Quantity(float(active), None, "latents", "variance of the posterior mean > 0.01"),
    }


def as_json(report: dict[str, dict[str, Quantity]]) -> dict[str, Any]:
    """A report `{split: {name: Quantity}}` as plain JSON values."""
    return {split: {name: q._asdict() for name, q in quantities.items()} for split, quantities in report.items()}


def as_table(report: dict[str, dict[str, Quantity]]) -> str:
    """A report as text: a line per quantity, a column per split, standard errors and units."""

    def cell(quantity: Quantity) -> str:
        error = "" if quantity.standard_error is None else f" ± {quantity.standard_error:.2g}"
        return f"{quantity.value:.5g}{error}"

    splits = list(report)
    names = list(next(iter(report.values())))
    rows = [["", *splits, "unit", "meaning"]]
    for name in names:
        first = report[splits[0]][name]
        rows.append([name, *(cell(report[split][name]) for split in splits), first.unit, first.meaning])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def evaluate(run: Restored, images: ImageSet, splits: Sequence[str] = ("train", "test")) -> dict[str, dict[str, Quantity]]:
    """Evaluate a restored run on splits of its data, over all devices.

    Args:
      run: from `restore`.
      images: the data of its config, from `data.load`.
      splits: 'train', 'test' or both, in the order to report.

    Returns:
      `{split: {name: Quantity}}`. The training set is scored as well if the run has not recorded its calibration.

    Raises:
      UserError: an unknown split, or images of another shape than the model's.
    """
    for split in splits:
        if split not in ("train", "test"):
            raise UserError(f"There is no split {split!r}{nearest(split, ('train', 'test'))}; the splits are train and test.")
    if images.image_shape != run.image_shape:
        raise UserError(f"The model takes images of shape {run.image_shape}, the data have {images.image_shape}.")
    mesh = data_mesh()
    variables = replicate(run.variables, mesh)

    def score(split: str) -> SplitScores:
        # The same posterior samples as `fit` takes, so that its last row is repeated here.
        key = split_key(run.config.seed, split)
        stored = replicate(getattr(images, split), mesh)
        return score_split(run.model, variables, stored, key, levels=images.levels, mesh=mesh, batch_size=EVALUATION_BATCH)

    scores = {split: score(split) for split in splits}
    calibration = run.calibration
    if calibration is None:
        calibration = calibrate(scores.get("train") or score("train"), run.step, run.floor)
    return {split: summarize(scores[split], run.config.beta, calibration) for split in splits}
