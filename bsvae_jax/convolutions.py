"""Convolutions as pure functions of arrays, in the forms in which they are fastest: the one place that decides.

A transposed convolution of stride 2 makes the even and odd rows and columns of its output, its four *phases*, by small
convolutions of the input (sub-pixel convolution): no zeros are inserted and multiplied, as `lhs_dilation` does. Whatever treats
all pixels alike (BatchNorm, activations) can work on the phases, and so can a convolution of stride 1: between the last such
layer and the image, the largest maps of the network are never interleaved, which would move more bytes than computing them.

Phases are laid side by side along the batch axis, `[4 * B, h, w, C]`: even rows and columns; even rows, odd columns; odd rows,
even columns; both odd. Convolutions that XLA has are left to it on every backend: on CPU as on TPU, slices and matrix products
written by hand moved more bytes and were slower.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsvae_jax.layers import exact

Maps = Float[Array, "batch height width channels"]
Phases = Float[Array, "four_batch height width channels"]
Kernel = Float[Array, "rows columns channels features"]
Result = Float[Array, "batch result_height result_width features"]
Padding = tuple[tuple[int, int], tuple[int, int]]

_NONE, _AFTER, _AROUND = (0, 0), (0, 1), (1, 1)


def convolve(x: Maps, kernel: Kernel, padding: Padding) -> Result:
    """Convolution of stride 1 of maps [B, h, w, C] with a kernel [rows, columns, C, F]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=exact(x.dtype)
    )


def transposed_phases(x: Maps, kernel: Kernel) -> Float[Array, "four_batch height width features"]:
    """The phases of a transposed convolution of stride 2: maps [B, h, w, C] to those of [B, 2h, 2w, F], [4B, h, w, F].

    `out[2 m + k - 1] += x[m] @ kernel[k]` along both axes; the kernel is [3, 3, C, F].
    """
    # Along one axis, out[2m] = x[m] k[1] and out[2m + 1] = x[m] k[2] + x[m + 1] k[0].
    even, odd = (slice(1, 2), _NONE), (slice(2, None, -2), _AFTER)
    parts = [convolve(x, kernel[rows, columns], (down, right)) for rows, down in (even, odd) for columns, right in (even, odd)]
    return jnp.concatenate(parts)


def join_phases(phases: Phases, size: tuple[int, int]) -> Float[Array, "batch result_height result_width channels"]:
    """The map whose phases these are, [4B, h, w, C] to [B, *size, C], cut to `size` at the bottom and right."""
    _, height, width, features = phases.shape
    grid = phases.reshape(2, 2, -1, height, width, features).transpose(2, 3, 0, 4, 1, 5)
    return grid.reshape(-1, 2 * height, 2 * width, features)[:, : size[0], : size[1]]


def _phase_weights() -> np.ndarray:
    """1 where row `k` of a 3-row kernel leads from phase `source` of map row `m + offset - 1` to phase `target` of row `m`.

    Indexed [offset, source, target, k]: in rows of the joined map, `2 (m + offset - 1) + source = 2 m + target + k - 1`.
    """
    offset, source, target, k = np.ogrid[0:3, 0:2, 0:2, 0:3]
    return (2 * (offset - 1) + source == target + k - 1).astype(np.float32)


def convolve_phases(phases: Phases, kernel: Kernel) -> Result:
    """`convolve(joined map, kernel, ((1, 1), (1, 1)))` from the phases of the map, joined: [4B, h, w, C] to [B, 2h, 2w, F].

    The kernel is [3, 3, C, F]. Each phase of the result is a sum of 3x3 convolutions of the phases of the map, whose weights
    are those of the kernel, most of them zero: four times the products, in a layer that has few (an image has few channels).
    """
    features, precision = kernel.shape[-1], exact(kernel.dtype)
    weights = jnp.asarray(_phase_weights(), kernel.dtype)
    wide = jnp.einsum("ursk,vpqj,kjcf->rpuvcsqf", weights, weights, kernel, precision=precision)
    wide = wide.reshape(4, 3, 3, kernel.shape[2], 4 * features)
    around = (_AROUND, _AROUND)
    out = sum(convolve(phase, wide[i], around) for i, phase in enumerate(jnp.split(phases, 4)))
    batch, height, width, _ = out.shape  # type: ignore[union-attr]
    grid = out.reshape(batch, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)  # type: ignore[union-attr]
    return grid.reshape(batch, 2 * height, 2 * width, features)
