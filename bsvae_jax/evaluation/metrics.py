"""What the scores of a split amount to: every reported number with its unit, standard error and meaning.

Two likelihoods are reported and never to be compared with each other:

* *profile*: the decoder variance is optimal for each example, `sigma^2*(x)`; what Kim & Lee (2024) table. Not a density.
* *calibrated*: the variance is frozen at the optimum of the training set, so `exp(-value)` is a density of the dequantized
  image (bits/dim follow), and models can be compared.

Every number is averaged over the posterior samples of each image; evaluation at the posterior mean would not be an ELBO. Of
each sample the profile likelihood has its own optimal variance, as in training. A standard error is that of the mean over
images, and the noise of their posterior samples is in it.
"""

from typing import Any, NamedTuple

import numpy as np

from bsvae_jax._io.terminal import aligned
from bsvae_jax.data import ImageSet
from bsvae_jax.data.image_set import no_images
from bsvae_jax.evaluation.scores import Calibration, SplitScores, distortion_at, optimal_variance_of_split
from bsvae_jax.objective import BetaSchedule, ConstantBeta, bits_per_dimension

ACTIVE_THRESHOLD = 0.01
"""A latent is active if the variance of its posterior mean over the data exceeds this (Burda et al. 2016). Their prior has
variance 1; the scale of latents under a learned prior is free, so there the variance is taken as a share of its total."""


class Quantity(NamedTuple):
    """One reported number."""

    value: float
    standard_error: float | None
    """Of the mean over examples: how images differ, and their posterior samples; of KID over blocks of images, as its
    meaning says; None where there is none."""
    unit: str
    meaning: str

    def cell(self) -> str:
        """`8.5123 ± 0.042`, for a table."""
        return f"{self.value:.5g}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2g}")


Report = dict[str, dict[str, Quantity]]
"""`{split: {name: Quantity}}`"""


def mean_quantity(values: np.ndarray, unit: str, meaning: str) -> Quantity:
    """The mean of values [N] of each example, or [S, N] of each of S samples of it, and its standard error over examples."""
    values = values.reshape(-1, values.shape[-1]).mean(axis=0)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Quantity(float(values.mean()), error, unit, meaning)


def calibrated_elbo(scores: SplitScores, calibration: Calibration) -> np.ndarray:
    """Lower bound of log p(x) at the calibrated variance, nats, [S, N]."""
    return -distortion_at(scores, calibration.variance, calibration.floor) - scores.rate


def sampling_error(values: np.ndarray) -> float:
    """Standard error that S > 1 posterior samples of each image leave in the mean of values [S, N]."""
    return float(np.sqrt(values.var(axis=0, ddof=1).mean() / values.size))


def active_latents(scores: SplitScores) -> int:
    """Number of latents whose posterior mean varies over the data by more than `ACTIVE_THRESHOLD`."""
    scale = 1.0 if scores.aggregate_variance is None else scores.aggregate_variance
    return int(np.sum(scores.posterior_mean.var(axis=0) > ACTIVE_THRESHOLD * scale))


def summarize(
    scores: SplitScores,
    beta: float,
    calibration: Calibration,
    images: bool = True,
    schedule: BetaSchedule | None = None,
) -> dict[str, Quantity]:
    """All quantities of one split.

    Args:
      scores: of the split, from `score_split` with this calibration.
      beta: weight of the rate in the model's objective; times the multiplier, where its schedule has one.
      calibration: of the training set, for the same parameters.
      images: whether the examples are images in [0, 1], of whose peak the PSNR speaks.
      schedule: of beta; the objective alone depends on it. None: constant.
    """
    schedule = ConstantBeta() if schedule is None else schedule
    rate, floor = scores.rate, calibration.floor
    mse = scores.squared_error / scores.pixels
    profile = distortion_at(scores, optimal_variance_of_split(scores, "example", floor), floor)
    calibrated = distortion_at(scores, calibration.variance, floor)
    shape, step = scores.pixel_squared_error.shape, float(np.sqrt(12 * floor))
    # sum_d 1/2 [log(2 pi v_d) + (SE_d + v0) / v_d]
    pixel_variance = calibration.variance_per_pixel
    per_pixel = 0.5 * (np.sum(np.log(2 * np.pi * pixel_variance) + floor / pixel_variance) + scores.scaled_error)
    elbo = calibrated_elbo(scores, calibration)
    weight, offset = schedule.at_end(beta, float(rate.mean()))
    own = {
        name: mean_quantity(values, "nats", meaning)
        for name, values, meaning in (
            ("objective", scores.model_distortion + weight * (rate - offset), schedule.meaning),
            ("distortion", scores.model_distortion, "-log p(x|z) under the model's decoder variance"),
        )
    }
    if np.ptp(scores.model_distortion) == 0:  # one variance per pixel or channel: only the mean over the split is known
        own = {name: quantity._replace(standard_error=None) for name, quantity in own.items()}
    bits = bits_per_dimension(-elbo, shape, step)
    psnr = -10 * np.log10(np.maximum(mse, 1e-12))
    peak = {"psnr": mean_quantity(psnr, "dB", "peak signal-to-noise ratio, mean over images")} if images else {}
    share = "" if scores.aggregate_variance is None else " of the latent's own"
    final = Quantity(beta, None, "", "weight of the rate that training came to, which the objective has")
    return {
        **own,
        **({"final_beta": final} if schedule.has_multiplier else {}),
        "rate": mean_quantity(rate, "nats", "KL(q(z|x) || p(z))"),
        "profile_distortion": mean_quantity(profile, "nats", "with sigma^2*(x) of each example; not a density"),
        "profile_elbo": mean_quantity(-profile - rate, "nats", "the paper's likelihood; not a density"),
        "calibrated_distortion": mean_quantity(calibrated, "nats", "variance frozen at the training set's optimum"),
        "calibrated_elbo": mean_quantity(elbo, "nats", "lower bound of log p(x), a density"),
        "calibrated_bits_per_dimension": mean_quantity(np.asarray(bits), "bits/dim", "upper bound, from calibrated_elbo"),
        "calibrated_elbo_per_pixel_variance": mean_quantity(
            -per_pixel - rate, "nats", "the same with one frozen variance per pixel"
        ),
        "posterior_samples": Quantity(len(rate), None, "per image", "samples of q(z|x) that these numbers are averaged over"),
        **(
            {"sampling_error": Quantity(sampling_error(elbo), None, "nats", "what these samples leave in calibrated_elbo")}
            if len(rate) > 1
            else {}
        ),
        "mse": mean_quantity(mse, "intensity^2", "squared error per pixel"),
        **peak,
        "variance": Quantity(scores.model_variance, None, "intensity^2", "the model's decoder variance, averaged"),
        "calibrated_variance": Quantity(calibration.variance, None, "intensity^2", "optimum of the training set"),
        "active_units": Quantity(
            float(active_latents(scores)), None, "latents", f"variance of the posterior mean > 0.01{share}"
        ),
    }


_OF_THE_PRIOR = (
    *("rate", "profile_elbo", "calibrated_elbo", "calibrated_bits_per_dimension", "calibrated_elbo_per_pixel_variance"),
    *("aggregate_kl", "effective_samples", "fid", "kid", "lenet_fid", "lenet_kid"),
)
_BOUNDS = ("importance_weighted_bound", "own_importance_weighted_bound", "fid_", "kid_")


def beside(before: Report, after: Report, fitted: str) -> Report:
    """What a fitted prior changes, under names that begin with `fitted_`, each below the number of the model's own prior.

    Args:
      before: of `evaluate` on a run as it was trained.
      after: of the same with its fitted prior.
      fitted: what it is, for the meaning of the numbers.
    """
    report: Report = {}
    for split, quantities in before.items():
        report[split] = {}
        for name, quantity in quantities.items():
            report[split][name] = quantity
            other = after[split].get(name)
            if other is not None and (name in _OF_THE_PRIOR or name.startswith(_BOUNDS)):
                report[split][f"fitted_{name}"] = other._replace(meaning=f"with the fitted prior, {fitted}")
    return report


CONDITIONAL = "Conditional on the class y: these are likelihoods of p(x|y), which no p(x) is to be compared with."
"""What has to be known of the numbers of a model with classes."""


def left_out(images: ImageSet) -> str | None:
    """A sentence that says which numbers an evaluation of these data has not, and why; None where it has them all."""
    if images.holds_images:
        return None
    return (
        "PSNR and SSIM are left out: they compare images [H, W, C] in [0, 1], and the examples of "
        f"{images.name} are {no_images(images.image_shape)}."
    )


def as_json(report: Report) -> dict[str, Any]:
    """A report as plain JSON values."""
    return {split: {name: q._asdict() for name, q in quantities.items()} for split, quantities in report.items()}


def from_json(values: dict[str, Any]) -> Report:
    """The inverse of `as_json`; a TypeError where there is another value than it writes."""
    return {split: {name: _quantity(**q) for name, q in quantities.items()} for split, quantities in values.items()}


def _quantity(value: Any, standard_error: Any, unit: Any, meaning: Any) -> Quantity:
    """What a file says of a quantity; a TypeError where it is no number, unit and meaning."""
    numbers = (value, 0.0 if standard_error is None else standard_error)
    if not all(type(number) in (int, float) for number in numbers) or not all(
        isinstance(text, str) for text in (unit, meaning)
    ):
        raise TypeError(f"{value!r} +- {standard_error!r} {unit!r} ({meaning!r}) is no quantity")
    return Quantity(value, standard_error, unit, meaning)


def as_table(report: Report) -> str:
    """A report as text: a line per quantity, a column per split, standard errors and units.

    Where the meaning differs between splits, as by the number of images, it is that of the split which is named in it.
    """
    rows = [["± standard error over images", *report, "unit", "meaning"]]
    for name in dict.fromkeys(name for quantities in report.values() for name in quantities):
        found = [quantities.get(name) for quantities in report.values()]
        split, first = next((split, own) for split, own in zip(report, found, strict=True) if own is not None)
        meaning = (
            first.meaning if all(own is None or own.meaning == first.meaning for own in found) else f"{split}: {first.meaning}"
        )
        rows.append([name, *("" if own is None else own.cell() for own in found), first.unit, meaning])
    return aligned(rows)
