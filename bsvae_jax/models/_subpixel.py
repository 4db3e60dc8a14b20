"""Convolutions as pure functions of arrays, in the forms in which they are fastest: the one place that decides, by platform.

On a CPU a transposed convolution of stride 2 makes the even and odd rows and columns of its output, its four *phases*, by small
convolutions of the input (sub-pixel convolution): no zeros are inserted and multiplied, as `lhs_dilation` does. Whatever treats
all pixels alike (BatchNorm, activations) can work on the phases, and so can a convolution of stride 1: between the last such
layer and the image, the largest maps of the network are never interleaved, which would move more bytes than computing them.
Phases are laid side by side along the batch axis, `[4 * B, h, w, C]`: even rows and columns; even rows, odd columns; odd rows,
even columns; both odd.

On a GPU cuDNN has transposed convolutions of its own, which XLA finds in `lhs_dilation`; phases would cost copies there. A TPU
takes `lhs_dilation` as it is, too: its arithmetic has time to spare, and moving phases takes a share of a step's bytes.
Convolutions of stride 1 and 2 are left to XLA on every platform: on CPU as on TPU, slices and matrix products written by hand
moved more bytes and were slower.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.models.layers import LECUN, Bias, Initialization, add_bias, as_float32, exact

Maps = Float[Array, "batch height width channels"]
Phases = Float[Array, "four_batch height width channels"]
Unordered = Float[Array, "batch pixels channels"]
"""All pixels of maps, in an order that the platform chooses, and mixed over the batch."""
Kernel = Float[Array, "rows columns channels features"]
Result = Float[Array, "batch result_height result_width features"]
Padding = tuple[tuple[int, int], tuple[int, int]]

_NONE, _AFTER, _AROUND = (0, 0), (0, 1), (1, 1)


def convolve(x: Maps, kernel: Kernel, padding: Padding, stride: int = 1) -> Result:
    """Convolution of maps [B, h, w, C] with a kernel [rows, columns, C, F]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=exact(x.dtype)
    )


class Convolution(nn.Module):
    """`kernel_size` x `kernel_size` convolution padded by `kernel_size // 2`, as PyTorch pads (Flax's SAME does not)."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32
    start: Initialization = LECUN

    def __call__(self, x: Maps) -> Result:
        """Maps [B, h, w, C] to [B, ceil(h / stride), ceil(w / stride), features]."""
        return add_bias(*self.apart(x))

    @nn.compact
    def apart(self, x: Maps) -> tuple[Result, Bias]:
        """The result without the bias, and the bias, for a `BatchNorm`."""
        side = (self.kernel_size // 2, self.kernel_size // 2)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.start.kernel, shape, jnp.float32)
        bias = self.param("bias", self.start.bias(math.prod(shape[:3])), (self.features,), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return convolve(x, kernel, (side, side), self.stride), bias


def convolve_transposed(x: Maps, kernel: Kernel, size: tuple[int, int]) -> Result:
    """Transposed convolution of stride 2: maps [B, h, w, C] to [B, *size, F], each side of which is 2h - 1 or 2h.

    `out[2 m + k - 1] += x[m] @ kernel[k]` along both axes; the kernel is [3, 3, C, F].
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cuda=lambda x, kernel: convolve_dilated(x, kernel, size),
        tpu=lambda x, kernel: convolve_with_zeros(x, kernel, size),
        default=lambda x, kernel: join_phases(transposed_phases(x, kernel), size),
    )


def convolve_transposed_unordered(x: Maps, kernel: Kernel) -> Float[Array, "batch pixels features"]:
    """`convolve_transposed` to [B, 2h, 2w, F], as [B, 4hw, F], the pixels in the order that costs the platform least.

    What follows has to treat all pixels of the batch alike, until `convolve_unordered`. No platform copies anything to give its
    result that shape: a TPU lays the batch out innermost, and keeps it apart.
    """
    batch, height, width, _ = x.shape
    size = (2 * height, 2 * width)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cuda=lambda x, kernel: convolve_dilated(x, kernel, size).reshape(batch, 4 * height * width, -1),
        tpu=lambda x, kernel: convolve_with_zeros(x, kernel, size).reshape(batch, 4 * height * width, -1),
        default=lambda x, kernel: transposed_phases(x, kernel).reshape(batch, 4 * height * width, -1),
    )


def convolve_unordered(x: Unordered, kernel: Kernel, size: tuple[int, int]) -> Result:
    """3 x 3 convolution of stride 1 with padding 1 of what `convolve_transposed_unordered` made, to [B, *size, F] in order."""
    batch, _, channels = x.shape
    height, width = (side // 2 for side in size)

    def in_order(x: Unordered, kernel: Kernel) -> Result:
        return convolve(x.reshape(batch, *size, channels), kernel, (_AROUND, _AROUND))

    return jax.lax.platform_dependent(
        x,
        kernel,
        cuda=in_order,
        tpu=in_order,
        default=lambda x, kernel: convolve_phases(x.reshape(4 * batch, height, width, channels), kernel),
    )


def convolve_with_zeros(x: Maps, kernel: Kernel, size: tuple[int, int]) -> Result:
    """`convolve_transposed` as one convolution of the maps with zeros between their rows and columns."""
    pads = [(1, side - 2 * given + 2) for side, given in zip(size, x.shape[1:3], strict=True)]
    return _insert_zeros(x, kernel, pads, exact(x.dtype))


def _insert_zeros(x: Maps, kernel: Kernel, pads: list[tuple[int, int]], precision: jax.lax.Precision) -> Result:
    return jax.lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        pads,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def convolve_dilated(x: Maps, kernel: Kernel, size: tuple[int, int]) -> Result:
    """`convolve_transposed` as one convolution of the maps with zeros between their rows and columns.

    Of an even side cuDNN would pad one end only, which it cannot: backwards XLA would copy the largest maps of the network to
    pad them. So there is a row or column more in front, and what pads the gradient is part of what computes it; the barrier
    keeps XLA from making a padded convolution of the two.
    """
    down, right = (1 - side % 2 for side in size)
    whole = _dilated(x, kernel, (size[0] + down, size[1] + right), exact(x.dtype))
    return jax.lax.optimization_barrier(whole)[:, down:, right:]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _dilated(x: Maps, kernel: Kernel, size: tuple[int, int], precision: jax.lax.Precision) -> Result:
    """`convolve_dilated` to odd sizes."""
    return _dilate_maps(x, kernel, size, precision)


@_dilated.defjvp
def _dilated_jvp(
    size: tuple[int, int], precision: jax.lax.Precision, primals: tuple[Maps, Kernel], tangents: tuple[Maps, Kernel]
) -> tuple[Result, Result]:
    (x, kernel), (x_tangent, kernel_tangent), how = primals, tangents, (size, precision)
    return _dilated(x, kernel, *how), _dilate_maps(x_tangent, kernel, *how) + _dilate_filter(x, kernel_tangent, *how)


def _dilate_maps(x: Maps, kernel: Kernel, size: tuple[int, int], precision: jax.lax.Precision) -> Result:
    pads = [(side + 3) // 2 - given for side, given in zip(size, x.shape[1:3], strict=True)]
    return _insert_zeros(x, kernel, [(pad, pad) for pad in pads], precision)


def _dilate_filter(x: Maps, kernel: Kernel, size: tuple[int, int], precision: jax.lax.Precision) -> Result:
    """`_dilate_maps` as a convolution of the kernel by the maps.

    The same numbers; but the gradient of the kernel is then that of a convolution of stride 2, for which cuDNN has one of its
    own: no zeros are written and multiplied.
    """
    pads = [(side - 5) // 2 + given for side, given in zip(size, x.shape[1:3], strict=True)]
    return jax.lax.conv_general_dilated(
        kernel,
        x[:, ::-1, ::-1],
        (1, 1),
        [(pad, pad) for pad in pads],
        rhs_dilation=(2, 2),
        dimension_numbers=("HWCN", "OHWI", "CHWN"),
        precision=precision,
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


def convolve_phases(phases: Phases, kernel: Kernel) -> Result:
    """`convolve(joined map, kernel, ((1, 1), (1, 1)))` from the phases of the map, joined: [4B, h, w, C] to [B, 2h, 2w, F].

    The kernel is [3, 3, C, F]. Made for few features F, an image's channels: each pixel is multiplied by all nine taps at once,
    and what is shifted, added and interleaved are numbers of F, not of C, a pixel (kn2row, Vasudevan et al. 2017).
    """
    four_batch, height, width, channels = phases.shape
    features = kernel.shape[-1]
    products = convolve(phases, kernel.transpose(2, 0, 1, 3).reshape(1, 1, channels, 9 * features), (_NONE, _NONE))
    # Split, not sliced: the gradient of a split puts shifted copies side by side, that of slices adds as many padded arrays.
    each = jax.lax.split(products, [four_batch // 4] * 4, axis=0)
    taps = [jax.lax.split(phase, [features] * 9, axis=3) for phase in each]
    zero = jnp.zeros((), products.dtype)

    def reaching(row: int, column: int) -> Iterator[Array]:
        """What comes to phase [row, column] through each tap: to row 2 m + row of the map from row 2 m + row + y - 1."""
        for y, x in itertools.product(range(3), range(3)):
            (down, r), (right, c) = divmod(row + y - 1, 2), divmod(column + x - 1, 2)
            shift = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
            yield as_float32(jax.lax.pad(taps[2 * r + c][3 * y + x], zero, shift))

    sums = [jnp.asarray(sum(reaching(row, column))) for row, column in itertools.product(range(2), range(2))]
    return join_phases(jnp.concatenate(sums).astype(phases.dtype), (2 * height, 2 * width))
