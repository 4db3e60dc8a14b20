"""Frechet and kernel distances between two sets of feature vectors, whatever made them. NumPy in float64.

FID (Heusel et al. 2017): the Frechet distance between the Gaussians with the two sets' means and covariances,
`|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`; biased upwards for few samples. KID (Binkowski et al. 2018): the squared
maximum mean discrepancy under the kernel `(x . y / d + 1)^3`, unbiased for any number.
"""

from typing import NamedTuple

import numpy as np

from bsvae_jax.errors import UserError

BLOCKS = 10
"""Parts of the samples whose independent estimates give the standard error of the KID."""


class Moments(NamedTuple):
    """Number, mean and sum of centered products of feature vectors, float64; made by `add`, in any number of parts."""

    size: int
    """Number of vectors."""
    mean: np.ndarray
    """[d]"""
    scatter: np.ndarray
    """`sum (x - mean)(x - mean)^T`, [d, d]"""

    @property
    def covariance(self) -> np.ndarray:
        """With n - 1, [d, d]."""
        return self.scatter / (self.size - 1)


def no_moments(features: int) -> Moments:
    """Of no vectors of this length yet."""
    return Moments(0, np.zeros(features), np.zeros((features, features)))


def add(moments: Moments, features: np.ndarray) -> Moments:
    """The moments with more vectors [n, d] (Chan et al. 1979: no cancellation, whatever the parts).

    Raises:
      UserError: values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise UserError("Features have values that are not finite: the images or the weights hold NaN or infinity.")
    count, mean = len(features), features.mean(axis=0)
    centered = features - mean
    total = moments.size + count
    difference = mean - moments.mean
    between = np.outer(difference, difference) * (moments.size * count / total)
    scatter = moments.scatter + centered.T @ centered + between
    return Moments(total, moments.mean + difference * (count / total), scatter)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """`R` [d, d] with `R R^T` = covariance; eigenvalues within rounding of zero are zero, lest their square roots count."""
    values, vectors = np.linalg.eigh(covariance)
    threshold = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors * np.sqrt(np.where(values > threshold, values, 0.0))


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """`|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`, for symmetric positive semidefinite covariances of any rank.

    With `S = R R^T` from symmetric eigendecompositions, `tr (S1 S2)^(1/2)` is the sum of the singular values of `R1^T R2`.

    Raises:
      UserError: shapes differ, or values are not finite.
    """
    size = len(mean1)
    arrays = [np.asarray(array, np.float64) for array in (mean1, covariance1, mean2, covariance2)]
    if [array.shape for array in arrays] != [(size,), (size, size)] * 2:
        raise UserError(f"Means [d] and covariances [d, d] of one d are wanted, got {[array.shape for array in arrays]}.")
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError("Means and covariances must be finite; a covariance needs at least two samples.")
    mean1, covariance1, mean2, covariance2 = arrays
    overlap = np.linalg.svd(_square_root(covariance1).T @ _square_root(covariance2), compute_uv=False).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2) - 2 * overlap)


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of x [n, d] and y [m, d] under `(x . y / d + 1)^3`; may be negative.

    `mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)` (Gretton et al. 2012, eq. 3).

    Raises:
      UserError: fewer than two samples on a side.
    """
    if min(len(x), len(y)) < 2:
        raise UserError(f"The kernel distance needs at least two samples on each side, got {len(x)} and {len(y)}.")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def apart(a: np.ndarray) -> float:
        values = kernel(a, a)
        return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

    return float(apart(x) + apart(y) - 2 * kernel(x, y).mean())


class KernelDistance(NamedTuple):
    """An unbiased estimate and its standard error."""

    value: float
    standard_error: float


def kernel_distance(x: np.ndarray, y: np.ndarray, seed: int = 0) -> KernelDistance:
    """KID of features x [n, d] and y [m, d]: the mean over disjoint blocks of both, with its standard error.

    Each set is shuffled (by `seed`) and cut into up to `BLOCKS` blocks of at least two; the blocks' unbiased estimates are
    independent, so their spread gives an honest standard error (overlapping subsets, as often used, understate it).

    Raises:
      UserError: fewer than four samples on a side.
    """
    blocks = min(BLOCKS, len(x) // 2, len(y) // 2)
    if blocks < 2:
        raise UserError(f"KID with a standard error needs at least four samples on each side, got {len(x)} and {len(y)}.")
    generator = np.random.default_rng(seed)
    parts = [np.array_split(generator.permutation(len(features)), blocks) for features in (x, y)]
    values = [squared_mmd(x[one], y[other]) for one, other in zip(*parts, strict=True)]
    return KernelDistance(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks)))
