"""The curves of a sweep as arrays: readings of its members, Shannon's bound, the plane of beta and sigma^2, linear theory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bsvae_jax import theory
from bsvae_jax.config import Linear, Prior, StandardNormal
from bsvae_jax.objective import Capacity, Constant, Optimal, quantization_variance
from bsvae_jax.sweeps.plots import Curve
from bsvae_jax.sweeps.results import (
    Family,
    MemberResult,
    SweepResults,
    best_setting,
    collapse_constants,
    families,
    mean_and_deviation,
)


def deviation(values: np.ndarray) -> float:
    """Standard deviation over members, 0 of one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def as_curve(label: str, points: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str] = (), panel: str = "") -> Curve:
    """A curve through the means over seeds of (x values, y values)."""
    x, y = (np.array([float(pair[axis].mean()) for pair in points]) for axis in (0, 1))
    x_deviation, y_deviation = (np.array([deviation(pair[axis]) for pair in points]) for axis in (0, 1))
    return Curve(label, x, y, x_deviation, y_deviation, tuple(names), panel=panel)


def member_values(members: Sequence[MemberResult], quantity: str, split: str) -> np.ndarray:
    """A quantity of each member."""
    return np.array([member.value(quantity, split) for member in members])


def beta_names(betas: Sequence[float]) -> list[str]:
    """Labels of the points of a curve; the figure leaves out those for which it has no room."""
    return [f"β={beta:g}" for beta in betas]


def prior_panels(found: Sequence[Family]) -> dict[Prior, str]:
    """The priors of these families, each with the name of its panel; one alone needs none."""
    priors = dict.fromkeys(family.prior for family in found)
    return {prior: f"prior: {prior.label}" if len(priors) > 1 else "" for prior in priors}


def against_rate(family: Family, quantity: str, split: str, panel: str) -> Curve:
    """A quantity of a family against its rate; where there is a panel, that names the prior."""
    points = [(member_values(own, "rate", split), member_values(own, quantity, split)) for own in family.members]
    curve = as_curve(family.model if panel else family.label, points, beta_names(family.betas.tolist()), panel)
    return _told(curve, "β", points_of(family))


def _told(curve: Curve, name: str, cells: Sequence[tuple[float, list[MemberResult]]]) -> Curve:
    """The curve with the value of each point, called `name`, as its hint, and the collapsed ones marked."""
    hints, gone = [f"{name} = {value:g}" for value, _ in cells], [collapsed(own) for _, own in cells]
    return curve._replace(hints=hints, collapsed=gone)


def collapsed(members: Sequence[MemberResult]) -> bool:
    """Whether no seed of a setting has an active latent."""
    return all("posterior collapse" in member.findings for member in members)


def readings(results: SweepResults, split: str) -> list[Curve]:
    """Distortion against rate: the four readings of the paper, and every other model's own.

    A constant variance v with weight beta trains SSE + b * KL with b = 2 v beta, which says nothing of sigma^2. Read with
    sigma^2 = 1/2 its distortion is `D/2 log(pi) + S`, with sigma^2 = b/2 `D/2 log(pi b) + S/b`, with the optimal sigma^2 of
    each image the closed form, where `S = SSE + D v0`: all are of images with the noise of their quantization. BS-VAE is read
    as trained. Several priors have a panel each, one after the other; schedules and learning rates have curves of their own.
    """
    found = families(results)
    pixels = math.prod(results.info.image_shape)
    floor = quantization_variance(results.info.bin_width)
    curves = []
    for prior, panel in prior_panels(found).items():
        own = [family for family in found if family.prior == prior]
        read_as_trained = [family for family in own if not isinstance(family.decoder_variance, Constant)]
        curves += [against_rate(family, "distortion", split, panel) for family in read_as_trained]
        for rest in dict.fromkeys(family.rest for family in own):  # each schedule and learning rate has readings of its own
            alike = [family for family in own if family.rest == rest]
            constants = collapse_constants(alike)
            half, by_beta, optimal = [], [], []
            for b, members in constants.items():
                rates, errors = member_values(members, "rate", split), pixels * (member_values(members, "mse", split) + floor)
                optimal.append((rates, member_values(members, "profile_distortion", split)))
                half.append((rates, 0.5 * pixels * math.log(math.pi) + errors))
                # With a capacity, b is the weight of what the rate is beyond it.
                if b > 0 and not isinstance(alike[0].beta_schedule, Capacity):
                    by_beta.append((rates, 0.5 * pixels * math.log(math.pi * b) + errors / b))
            for reading, points in (("optimal σ² per image", optimal), ("σ² = 1/2", half), ("σ² = β/2", by_beta)):
                if points:
                    curve = as_curve(f"β-VAE read with {reading}{rest}", points, panel=panel)
                    curves.append(_told(curve, "2σ²β", list(constants.items())[-len(points) :]))
    return curves


def shannon(results: SweepResults, largest_rate: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Shannon's R(D) of the Gaussian with the training data's covariance, from rate 0 to `largest_rate`.

    Returns:
      `(rates [n] in nats, mean squared errors [n])`; None for images too large to know the spectrum.
    """
    eigenvalues = results.info.eigenvalues
    if eigenvalues is None or eigenvalues[0] <= 0:
        return None
    total = float(eigenvalues.sum())
    errors = total * np.geomspace(1.0, 1e-6, 400)
    rates = np.array([theory.gaussian_rate_distortion(eigenvalues, float(error)) for error in errors])
    kept = rates <= 1.05 * largest_rate + 1e-9
    return rates[kept], errors[kept] / len(eigenvalues)


def points_of(family: Family) -> list[tuple[float, list[MemberResult]]]:
    """The betas of a family, each with its members (seeds)."""
    return list(zip(family.betas.tolist(), family.members, strict=True))


def families_alike(results: SweepResults) -> list[Family]:
    """The families that differ in nothing but the decoder variance: those with the first prior of the sweep, standard normal if
    that is among them, its first schedule, and the learning rate of the best setting.

    There are none where training finds beta.
    """
    found = families(results)
    first = found[0].prior, found[0].beta_schedule, best_setting(results).learning_rate
    alike = [family for family in found if (family.prior, family.beta_schedule, family.learning_rate) == first]
    return [] if found[0].beta_schedule.has_multiplier else alike


def constant_grid(results: SweepResults, quantity: str) -> tuple[list[float], list[float], np.ndarray]:
    """`(betas, variances, values [variances, betas])` of the constant model, test set, means over seeds, NaN if absent."""
    found = [
        (float(family.decoder_variance.variance), family)
        for family in families_alike(results)
        if isinstance(family.decoder_variance, Constant)
    ]
    variances = [variance for variance, _ in found]
    betas = sorted({beta for _, family in found for beta in family.betas.tolist()})
    values = np.full((len(variances), len(betas)), np.nan)
    for row, (_, family) in enumerate(found):
        for beta, own in points_of(family):
            values[row, betas.index(beta)] = mean_and_deviation(own, quantity, "test")[0]
    return betas, variances, values


def largest_disagreement(betas: Sequence[float], variances: Sequence[float], values: np.ndarray) -> tuple[float, int]:
    """Among cells of equal beta * sigma^2: the largest relative difference `(max - min) / mean`, and how many groups there are.

    Cells whose group mean is below 1% of the grid's largest value are left out: a collapsed model's rate is noise.
    """
    groups: dict[float, list[float]] = {}
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            groups.setdefault(float(f"{betas[column] * variances[row]:.9g}"), []).append(float(value))
    least = 0.01 * float(np.nanmax(np.abs(values)))
    shared = [group for group in groups.values() if len(group) > 1 and abs(np.mean(group)) > least]
    return max((float(np.ptp(group) / abs(np.mean(group))) for group in shared), default=math.nan), len(shared)


class LinearComparison(NamedTuple):
    """Trained linear models with one optimal variance beside `theory.linear_optimum`, training set, means over seeds."""

    betas: np.ndarray
    active: np.ndarray
    """Latents that theory leaves active."""
    measured: dict[str, np.ndarray]
    """rate, mse, objective."""
    expected: dict[str, np.ndarray]
    """The same by theory."""


def compare_with_theory(results: SweepResults) -> LinearComparison | None:
    """Linear members with `Optimal('batch')` against the exact optimum; None where there are none."""
    info = results.info
    floor = quantization_variance(info.bin_width)
    linear = [
        family
        for family in families(results)
        if isinstance(family.decoder_variance, Optimal)
        and isinstance(family.prior, StandardNormal)
        and not isinstance(family.beta_schedule, Capacity)  # whose beta is not the weight of the rate
        and family.decoder_variance.over == "batch"
        and family.decoder_variance.floor in (None, floor)
    ]
    if info.eigenvalues is None or not isinstance(info.config.network, Linear) or not linear:
        return None
    points = [(beta, own) for beta, own in points_of(linear[0]) if beta > 0]
    optima = [theory.linear_optimum(info.eigenvalues, info.config.latent_size, beta, floor) for beta, _ in points]
    measured = {
        name: np.array([mean_and_deviation(own, name, "train")[0] for _, own in points])
        for name in ("rate", "mse", "objective")
    }
    expected = {
        "rate": np.array([optimum.rate for optimum in optima]),
        "mse": np.array([optimum.variance - floor for optimum in optima]),
        "objective": np.array([optimum.objective for optimum in optima]),
    }
    active = np.array([optimum.active for optimum in optima])
    return LinearComparison(np.array([beta for beta, _ in points]), active, measured, expected)
