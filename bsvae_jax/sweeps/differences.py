"""Differences between two models on the same images: more certain than the number of either."""

from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A mean difference, in the unit of what differs."""

    mean: float
    standard_error: float
    """Over images and, where there are several, seeds."""


def paired_difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Mean of `one - other`, values [R, N] of N images under R seeds, the same in both, and its standard error.

    Images and seeds are samples both. With the mean squares of a two-way layout the error is the root of
    `(MS_images + max(MS_seeds - MS_rest, 0)) / (R N)` (Searle et al. 1992, Variance Components); of one seed, that over images.

    >>> paired_difference(np.array([[3.0, 4.0, 5.0, 4.0]]), np.array([[1.0, 2.0, 3.0, 2.0]]))
    Difference(mean=2.0, standard_error=0.0)
    """
    difference = one - other
    seeds, images = difference.shape
    mean = difference.mean()
    of_images, of_seeds = difference.mean(axis=0) - mean, difference.mean(axis=1, keepdims=True) - mean
    variance = seeds * np.sum(of_images**2) / (images - 1)
    if seeds > 1:
        of_rest = np.sum((difference - mean - of_images - of_seeds) ** 2) / ((images - 1) * (seeds - 1))
        variance += max(images * np.sum(of_seeds**2) / (seeds - 1) - of_rest, 0.0)
    return Difference(float(mean), float(np.sqrt(variance / difference.size)))
