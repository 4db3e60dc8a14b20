"""Nearest training images, by Euclidean distance between pixels: the check whether samples are memories."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsvae_jax.data.image_set import to_unit_interval

CHUNK_BYTES = 2**26
"""Of the training images compared in one device call, about, as float32."""


class Neighbors(NamedTuple):
    """Of Q queries."""

    positions: np.ndarray
    """Position of the nearest training image, [Q]."""
    distance: np.ndarray
    """Root mean squared difference per pixel, in intensity, [Q]."""


@functools.partial(jax.jit, static_argnames="levels")
def _nearest(queries: Float[Array, "queries pixels"], images: Array, *, levels: int) -> Any:
    """Squared distance to, and position of, the nearest of some images; differences are taken exactly only for that one."""
    flat = to_unit_interval(images, levels).reshape(len(images), -1)
    product = jnp.matmul(queries, flat.T, precision=jax.lax.Precision.HIGHEST)
    index = jnp.argmin(jnp.sum(jnp.square(flat), axis=1)[None] - 2 * product, axis=1)
    return jnp.mean(jnp.square(queries - flat[index]), axis=1), index


def nearest_images(queries: np.ndarray, images: np.ndarray, levels: int) -> Neighbors:
    """The nearest image of a set for each query.

    Args:
      queries: [Q, H, W, C] in [0, 1].
      images: [N, H, W, C] as stored.
      levels: gray levels of stored uint8 images.
    """
    flat = jnp.asarray(queries, jnp.float32).reshape(len(queries), -1)
    chunk = max(1, CHUNK_BYTES // (4 * flat.shape[1]))
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for start in range(0, len(images), chunk):
        squared, position = jax.device_get(_nearest(flat, images[start : start + chunk], levels=levels))
        closer = squared < best
        best, index = np.where(closer, squared, best), np.where(closer, position + start, index)
    return Neighbors(index, np.sqrt(best))
