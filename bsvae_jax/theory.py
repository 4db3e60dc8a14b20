"""Exact results for linear-Gaussian data, in float64 NumPy: what a trained linear model must land on.

Everything is in nats per example. The data are described by the eigenvalues of their covariance (squared intensity), in any
order.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Shaped

from bsvae_jax.errors import UserError, check_number, shown

Eigenvalues = Float[np.ndarray, " dimensions"]


class LinearOptimum(NamedTuple):
    """The global optimum of a linear VAE with one optimal decoder variance for the whole data set.

    >>> optimum = linear_optimum(np.array([4.0, 1.0, 1.0]), latent_size=1, beta=1.0)
    >>> round(optimum.distortion, 4), round(optimum.objective, 4)  # 3/2 (log(2 pi) + 1), and log(4) / 2 more
    (4.2568, 4.95)
    """

    variance: float
    """Decoder variance v at the optimum, squared intensity."""
    active: int
    """k, the number of latents that carry information."""
    rate: float
    """`1/2 sum_{i<=k} log(l_i / (beta v))`, nats."""
    distortion: float
    """`D/2 (log(2 pi v) + 1)`, nats."""
    objective: float
    """`distortion + beta * rate`, nats."""


def _check_latent_size(value: Any, largest: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= largest:
        raise UserError(f"latent_size must lie in 1 ... {largest}{why}, got {shown(value)}.")


def _sorted_eigenvalues(eigenvalues: Eigenvalues) -> np.ndarray:
    try:
        values = np.asarray(eigenvalues, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"eigenvalues must be a vector of numbers: {error}.") from error
    if values.ndim != 1 or values.size == 0:
        raise UserError(f"eigenvalues must be a non-empty vector, got shape {values.shape}.")
    if not np.all(np.isfinite(values)):
        raise UserError("eigenvalues must be finite; some are NaN or infinite.")
    values = np.sort(values)[::-1]
    # An eigensolver returns a few rounding errors below zero for rank-deficient data; anything more is a wrong input.
    if values[-1] < -1e-9 * max(values[0], 0.0) or values[0] < 0:
        raise UserError(f"eigenvalues of a covariance are >= 0, got {values[-1]:.3g}.")
    return np.maximum(values, 0.0)


def linear_optimum(eigenvalues: Eigenvalues, latent_size: int, beta: float, floor: float = 0.0) -> LinearOptimum:
    """Optimum of `distortion + beta * rate` over linear encoders, linear decoders and one shared optimal variance.

    Reverse water-filling at level `s = beta v`: k = number of i <= K with l_i > s, and

        v = (sum_{i>k} l_i + D v0) / (D - k beta),   rate = 1/2 sum_{i<=k} log(l_i / s),   distortion = D/2 (log(2 pi v) + 1).

    Just one k is consistent with its own level: v solves `D v = sum_{i<=K} min(l_i, beta v) + sum_{i>K} l_i + D v0`, whose
    right side is concave in v and positive at 0, so the two sides meet once. The posterior therefore collapses
    continuously, at `critical_beta`. At beta = 1 and v0 = 0 this is probabilistic PCA (Tipping & Bishop 1999), and the
    objective is minus its log-likelihood.

    Args:
      eigenvalues: l, of the data covariance (divided by N, not N - 1), length D, any order.
      latent_size: K, between 1 and D.
      beta: weight of the rate, > 0.
      floor: v0 of the data, squared intensity, as in `bsvae_jax.objective`.

    >>> optimum = linear_optimum(np.array([4.0, 1.0, 1.0]), latent_size=1, beta=1.0)
    >>> optimum.variance, optimum.active, round(optimum.rate, 4)  # the rate is log(4) / 2
    (1.0, 1, 0.6931)

    Raises:
      UserError: arguments out of range, or data of rank <= K with `floor = 0` (the objective is unbounded below).
    """
    l = _sorted_eigenvalues(eigenvalues)
    dimensions = l.size
    _check_latent_size(latent_size, dimensions, " (the data's dimensions)")
    check_number("beta", beta, low=0.0, open_low=True)
    check_number("floor", floor, low=0.0)
    for k in range(latent_size + 1):
        if dimensions - k * beta <= 0:  # at most D / beta latents can be active
            break
        variance = (l[k:].sum() + dimensions * floor) / (dimensions - k * beta)
        if variance == 0:
            break
        # The first k whose level covers the next eigenvalue. The tolerance lets a level that rounds onto it count as covering.
        level = beta * variance
        if k == latent_size or level >= l[k] * (1 - 1e-12):
            rate = 0.5 * float(np.sum(np.log(l[:k] / level)))
            distortion = 0.5 * dimensions * float(np.log(2 * np.pi * variance) + 1.0)
            return LinearOptimum(float(variance), k, rate, distortion, distortion + beta * rate)
    raise UserError(
        f"The data have rank {np.count_nonzero(l)} <= latent_size and floor = 0: the variance goes to 0 and the objective to "
        "-infinity. Give a floor > 0, or fewer latents."
    )


def critical_beta(eigenvalues: Eigenvalues, floor: float = 0.0) -> float:
    """The least beta at which no latent is active: `l_1 / v` at `v = mean(l) + v0`, where the water level reaches l_1.

    Args:
      eigenvalues: l, of the data covariance, any order.
      floor: v0 of the data, squared intensity.

    >>> critical_beta(np.array([4.0, 1.0, 1.0]))
    2.0

    Raises:
      UserError: eigenvalues negative or not finite, a floor that is not a number >= 0, or all of them zero.
    """
    l = _sorted_eigenvalues(eigenvalues)
    check_number("floor", floor, low=0.0)
    variance = float(l.mean()) + floor
    if not variance > 0:
        raise UserError("The data have no variance: every beta leaves all latents inactive.")
    return float(l[0]) / variance


def gaussian_rate_distortion(eigenvalues: Eigenvalues, distortion: float) -> float:
    """Shannon's R(D) of a Gaussian source with these covariance eigenvalues, in nats (Cover & Thomas, thm 10.3.3).

    Args:
      eigenvalues: of the covariance, any order.
      distortion: expected squared error summed over the dimensions, > 0 (0 is allowed only for a source of zero variance).

    >>> round(gaussian_rate_distortion(np.array([1.0, 1.0]), 0.5), 4)  # 2 * 1/2 log(1 / 0.25)
    1.3863

    Raises:
      UserError: eigenvalues negative or not finite, or a distortion that is not a positive number.
    """
    l = _sorted_eigenvalues(eigenvalues)
    check_number("distortion", distortion, low=0.0, open_low=bool(l[0] != 0))  # R(D) is infinite at 0
    if distortion >= l.sum():
        return 0.0
    # sum_i min(s, l_i) is piecewise linear in the level s: k eigenvalues above s give k s + sum_{i>k} l_i.
    tail = np.concatenate([np.cumsum(l[::-1])[::-1], [0.0]])
    for k in range(1, l.size + 1):
        level = (distortion - tail[k]) / k
        if k == l.size or level >= l[k] * (1 - 1e-12):  # the first level that covers the next eigenvalue, up to rounding
            break
    return 0.5 * float(np.sum(np.log(np.maximum(l[:k] / level, 1.0))))


def probabilistic_pca_log_likelihood(eigenvalues: Eigenvalues, latent_size: int) -> tuple[float, float]:
    """Maximum-likelihood noise variance and mean log-likelihood (nats per example) of probabilistic PCA.

    Tipping & Bishop (1999), eq. 8, and their log-likelihood there (Bishop 2006, eqs. 12.46 and 12.44):
    `sigma^2 = mean_{i>K} l_i`, and
    `log p = -1/2 [D log(2 pi) + sum_{i<=K} log l_i + (D - K) log sigma^2 + D]`.

    Args:
      eigenvalues: of the sample covariance (divided by N), length D, any order.
      latent_size: K, between 1 and D - 1.

    Returns:
      `(sigma^2, log-likelihood)`.

    >>> variance, log_likelihood = probabilistic_pca_log_likelihood(np.array([4.0, 1.0, 1.0]), latent_size=1)
    >>> variance, round(log_likelihood, 4)  # -3/2 (log(2 pi) + 1) - log(4) / 2
    (1.0, -4.95)

    Raises:
      UserError: `latent_size` out of range, or data of rank <= K (the likelihood is unbounded).
    """
    l = _sorted_eigenvalues(eigenvalues)
    dimensions = l.size
    _check_latent_size(latent_size, dimensions - 1)
    variance = float(np.mean(l[latent_size:]))
    if variance == 0:
        raise UserError(f"The data have rank <= {latent_size}: the likelihood is unbounded. Use fewer latents.")
    log_determinant = float(np.sum(np.log(l[:latent_size]))) + (dimensions - latent_size) * np.log(variance)
    return variance, float(-0.5 * (dimensions * np.log(2 * np.pi) + log_determinant + dimensions))


def covariance_eigenvalues(
    data: Shaped[np.ndarray, "examples *pixels"], labels: Integer[np.ndarray, " examples"] | None = None
) -> Eigenvalues:
    """Eigenvalues, largest first, of the covariance (divided by N) of flattened data, [D]; squared units of the data, float64.

    Args:
      data: [N, ...], of any type; D is the product of the other axes.
      labels: the class of each example, [N]: the covariance is then that around the mean of the class, averaged over the
        examples, by which the optimum of a linear model is known that is told the class; None: around one mean.

    >>> data = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> print(covariance_eigenvalues(data))  # 8/4 and 2/4
    [2.  0.5]

    Raises:
      UserError: fewer than two examples, examples of no dimension, or values that are no numbers or not finite.
    """
    try:
        data = np.asarray(data)
    except (TypeError, ValueError) as error:
        raise UserError(f"data must be numbers of shape [examples, ...]: {str(error).splitlines()[0]}") from error
    if data.ndim < 2 or data.size == 0 or data.dtype.kind not in "fiub":
        raise UserError(f"data must be numbers of shape [examples, ...], got {data.dtype} of shape {data.shape}.")
    flat = data.reshape(len(data), -1)
    if len(flat) < 2:
        raise UserError(f"A covariance needs at least 2 examples, got {len(flat)}.")
    if labels is None:
        groups, means = np.zeros(len(flat), int), flat.mean(axis=0, dtype=np.float64)[None]
    else:
        if np.shape(labels) != (len(flat),):
            raise UserError(f"labels must be one class for each of {len(flat)} examples, got shape {np.shape(labels)}.")
        groups = np.unique(labels, return_inverse=True)[1]
        means = np.stack([flat[groups == group].mean(axis=0, dtype=np.float64) for group in range(groups.max() + 1)])
    covariance = np.zeros((flat.shape[1], flat.shape[1]))
    for start in range(0, len(flat), 4096):  # bounds the float64 copy
        centered = flat[start : start + 4096].astype(np.float64) - means[groups[start : start + 4096]]
        covariance += centered.T @ centered
    if not np.isfinite(covariance.trace()):
        raise UserError("data must be finite; some values are NaN or infinite.")
    return np.maximum(np.linalg.eigvalsh(covariance / len(flat))[::-1], 0.0)
