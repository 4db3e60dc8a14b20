"""Gaussian negative log-likelihoods and the optimal decoder variance in closed form: pure functions of arrays.

The conventions of the package, settled here once:

* `x` and `mean` have the same shape `[B, ...]`; the trailing axes are one example's D pixels (usually `[B, H, W, C]`).
* Every value is in **nats per example**, shape `[B]`: summed over pixels, never averaged over them.
* The one-half and the 2 pi are always kept, so a distortion is a true negative log density.
* `floor` is v0, the variance of the uniform noise that turns quantized data into continuous data: `bin_width**2 / 12`
  (`quantization_variance`). Where it enters, the distortion is the exact expectation over that noise,
  `E_u ||x + u - mean||^2 = SSE + D v0`; it bounds every learned variance model from below.
* Arrays that hold NaN or infinity give NaN or infinity, without an error: their values are known on the device only.
* Inputs of less than 32 bits are promoted to float32 before anything is squared, summed or logged.

All functions work under `jit`, `grad`, `hessian` and `vmap`, and in float64 under `jax_enable_x64`; variances may be traced.
With `axis_name`, `x` is one device's share of a global batch (equal shares), and every average that defines a shared variance
is taken over all devices *before* the logarithm.
"""

import typing
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bsvae_jax.errors import UserError, check_kind, check_number, nearest, shown

LOG_2PI = float(np.log(2.0 * np.pi))


Shared = Literal["example", "batch", "pixel", "channel"]
"""Which entries share one optimal variance: the pixels of one example, the global batch, one pixel over the batch, or one
channel, the last axis, over the batch and all positions."""


Tree = TypeVar("Tree")


def check_positive(what: str, value: Any, allow_zero: bool = False, several: bool = False) -> None:
    """Reject a wrong number, and unless `several` may be given an array; values of JAX may be traced: nobody looks at them."""
    numbers = isinstance(value, jax.Array) and any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    numbers = numbers or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")
    if numbers and np.ndim(value) and not several:
        raise UserError(f"{what} must be one number, got an array of shape {np.shape(value)}; jax.vmap takes many.")
    if numbers and isinstance(value, jax.Array):
        return
    if numbers:
        if not np.all(np.isfinite(value) & ((value >= 0) if allow_zero else (value > 0))):
            raise UserError(f"{what} must be finite and {'>= 0' if allow_zero else '> 0'} everywhere; the array holds others.")
        return
    check_number(what, value, low=0.0, open_low=not allow_zero)


def quantization_variance(bin_width: float) -> float:
    """Variance `bin_width**2 / 12`, squared intensity, of uniform dequantization noise for data in [0, 1] of that grid spacing.

    >>> f"{quantization_variance(1 / 255):.3e}"
    '1.282e-06'

    Raises:
      UserError: `bin_width` is a number that is not finite and > 0.
    """
    check_positive("bin_width", bin_width)
    return bin_width**2 / 12.0


QUANTIZATION_VARIANCE = quantization_variance(1.0 / 255.0)
"""v0 of 8-bit images, 1/(12 * 255^2) = 1.28e-6: the default floor of every variance."""


PAPER_FLOOR = 1e-5 / (2.0 * np.pi)
"""v0 that equals the 1e-5 which the code of Kim & Lee (2024) adds inside the logarithm, log(2 pi MSE + 1e-5)."""


def mean_over_devices(tree: Tree, axis_name: str | None) -> Tree:
    """Mean of every leaf over the named device axis; the identity when there is none.

    >>> mean_over_devices(3.0, None)
    3.0
    >>> jax.pmap(lambda x: mean_over_devices(x, "data"), "data", devices=jax.devices()[:1])(jnp.ones(1))
    Array([1.], dtype=float32)

    Raises:
      UserError: there is no such axis here.
    """
    if axis_name is None:
        return tree
    for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):
        check_kind("axis_name", name, str, "the name of a device axis")
    try:
        return jax.lax.pmean(tree, axis_name)
    except NameError as error:
        raise UserError(
            f"There is no device axis {axis_name!r} here: axis_name is for functions inside jax.pmap or jax.shard_map over an "
            "axis of that name; leave it out elsewhere."
        ) from error


def check_floor(what: str, value: Any) -> None:
    """Raise a UserError unless a floor is None or a finite number >= 0."""
    if value is not None:
        check_positive(what, value, allow_zero=True)


def check_shared(over: str) -> None:
    """Raise a UserError unless one variance can be shared over `over`."""
    known = typing.get_args(Shared)
    if isinstance(over, str) and over in known:
        return
    if isinstance(over, str) and "pixel" in over and "example" in over:
        raise UserError(
            "A variance per pixel and per example is unbounded below (each residual gets its own variance, which may go "
            "to zero); share it over 'example', 'batch', 'pixel' or 'channel'."
        )
    raise UserError(f"over must be one of {', '.join(map(repr, known))}, got {shown(over)}{nearest(shown(over), known)}.")


def as_float(what: str, values: Any) -> Array:
    """Values as an array of a floating type. (8-bit images that nobody divided by 255 would give numbers, and wrong ones.)"""
    check_kind(what, values, (jax.Array, np.ndarray, np.number, float, list, tuple), "give an array of floats")
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what} is no array of numbers: {str(error).splitlines()[0]}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:  # those of 8 bits do not promote
        raise UserError(
            f"{what} must be floating point of >= 16 bits (images in [0, 1]), got {array.dtype}; divide 8-bit values by 255."
        )
    return array


def residual_squares(
    x: Float[Array, "batch *pixels"], mean: Float[Array, "batch *pixels"], mask: Bool[Array, "batch *pixels"] | None = None
) -> Float[Array, "batch *pixels"]:
    """`(x - mean)^2` in at least float32, the shape of `x`; 0 where the mask is False."""
    x, mean = as_float("x", x), as_float("mean", mean)
    if x.shape != mean.shape or x.ndim < 2:
        raise UserError(
            f"x and mean must have one shape [batch, ...pixels], got {x.shape} and {mean.shape}; nothing is broadcast here."
        )
    dtype = jnp.promote_types(jnp.result_type(x, mean), jnp.float32)
    if mask is not None:  # before the difference, so that gradients are 0 and not NaN where x or mean is
        x, mean = jnp.where(mask, x, 0.0), jnp.where(mask, mean, 0.0)
    return jnp.square(x.astype(dtype) - mean.astype(dtype))


def sum_pixels(values: Float[Array, "batch *pixels"]) -> Float[Array, " batch"]:
    """Sum over all but the first axis, [B]."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def observed_mean(
    values: Array, mask: Array | None, axis: int | tuple[int, ...] | None, axis_name: str | None = None, keepdims: bool = False
) -> Array:
    """Mean over `axis`, and over the devices, of the entries where the mask is True (None: of all); 0 where there are none."""
    if mask is None:
        return mean_over_devices(jnp.mean(values, axis, keepdims=keepdims), axis_name)
    sums = jnp.sum(jnp.where(mask, values, 0.0), axis, keepdims=keepdims), jnp.sum(mask, axis, values.dtype, keepdims=keepdims)
    total, count = mean_over_devices(sums, axis_name)
    return total / jnp.where(count > 0, count, 1.0)


def nll_from_log_variance(
    residual_squared: Float[Array, "batch *pixels"],
    log_variance: Array,
    floor: float | Array = 0.0,
    mask: Bool[Array, "batch *pixels"] | None = None,
) -> Float[Array, " batch"]:
    """`sum_pixels 1/2 [log(2 pi v) + (r^2 + v0) / v]` in terms of log v, whose gradients overflow later than those of v.

    With a `mask`, the sum over the pixels where it is True.
    """
    shape = residual_squared.shape
    padded = (1,) * (len(shape) - log_variance.ndim) + log_variance.shape
    if len(padded) != len(shape) or any(size not in (1, full) for size, full in zip(padded, shape, strict=True)):
        raise UserError(f"A variance of shape {log_variance.shape} does not broadcast against images of shape {shape}.")
    log_variance = log_variance.reshape(padded)
    if mask is not None:
        log_variance = jnp.where(mask, log_variance, 0.0)  # before the exponential, for gradients as of x and mean
        terms = log_variance + LOG_2PI + (residual_squared + floor) * jnp.exp(-log_variance)
        return 0.5 * sum_pixels(jnp.where(mask, terms, 0.0))
    pixels, distinct = float(np.prod(shape[1:])), float(np.prod(log_variance.shape[1:]))
    # A shared variance is counted, not summed: D times one number has no rounding error.
    log_term = sum_pixels(log_variance + LOG_2PI) * (pixels / distinct)
    precision = jnp.broadcast_to(jnp.exp(-log_variance), shape)
    return 0.5 * (log_term + sum_pixels((residual_squared + floor) * precision))


def gaussian_nll(
    x: Float[Array, "batch *pixels"], mean: Float[Array, "batch *pixels"], variance: float | Float[Array, "..."]
) -> Float[Array, " batch"]:
    """`-log N(x; mean, diag(variance)) = sum_pixels 1/2 [log(2 pi v) + (x - mean)^2 / v]`, nats per example, shape [B].

    `variance` (> 0, squared intensity) broadcasts against `x`: a scalar, `[B, 1, 1, 1]`, `[H, W, C]` or the full shape. For a
    scalar this is `D/2 log(2 pi v) + SSE / (2 v)`.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0]])
    >>> print(gaussian_nll(x, jnp.zeros_like(x), 0.5))  # log(pi) + 1
    [2.1447299]

    Raises:
      UserError: `x` and `mean` differ in shape, `variance` does not broadcast against `x`, or is a number <= 0 or NaN.
    """
    check_positive("variance", variance, several=True)
    residual_squared = residual_squares(x, mean)
    return nll_from_log_variance(residual_squared, jnp.log(jnp.asarray(variance, residual_squared.dtype)))


def optimal_variance_of(
    residual_squared: Array, over: Shared, floor: float | Array, axis_name: str | None, mask: Array | None = None
) -> Array:
    """`optimal_variance` of squared residuals, or of those where the mask is True."""
    check_shared(over)
    check_positive("floor", floor, allow_zero=True)
    axes = tuple(range(residual_squared.ndim))
    if over == "example":
        return observed_mean(residual_squared, mask, axes[1:], keepdims=True) + floor
    axis = {"batch": axes, "pixel": axes[:1], "channel": axes[:-1]}[over]
    return observed_mean(residual_squared, mask, axis, axis_name) + floor


def optimal_variance(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    over: Shared = "example",
    floor: float | Float[Array, ""] = QUANTIZATION_VARIANCE,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    """`v* = MSE + v0`, the decoder variance that maximizes the Gaussian likelihood (Kim & Lee 2024, eq. for sigma^2*).

    Args:
      over: 'example': mean over the pixels of each example, shape `[B, 1, 1, 1]` (one 1 per trailing axis of `x`).
        'batch': mean over pixels and the global batch, shape `[]`. 'pixel': mean over the global batch, shape `[H, W, C]`.
        'channel': mean over the global batch and all positions, shape `[C]`, the last axis of `x`.
      floor: v0 >= 0, squared intensity. With 0, perfectly reconstructed data has variance 0 and infinite likelihood.
      axis_name: the device axis over which all but 'example' are averaged as well.

    >>> import jax.numpy as jnp
    >>> x, mean = jnp.array([[0.0, 1.0], [0.0, 3.0]]), jnp.zeros((2, 2))
    >>> print(optimal_variance(x, mean, floor=0.0).ravel())  # 1/2 and 9/2
    [0.5 4.5]
    >>> print(optimal_variance(x, mean, "batch", floor=0.0), optimal_variance(x, mean, "pixel", floor=0.0))
    2.5 [0. 5.]

    Raises:
      UserError: `x` and `mean` differ in shape, `over` is unknown or asks for a variance per pixel and example, or `floor` is
        negative or NaN.
    """
    return optimal_variance_of(residual_squares(x, mean), over, floor, axis_name)


def optimal_gaussian_nll(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    over: Shared = "example",
    floor: float | Float[Array, ""] = QUANTIZATION_VARIANCE,
    axis_name: str | None = None,
) -> Float[Array, " batch"]:
    """Distortion at the optimal variance `v*` of `optimal_variance`, nats per example, shape [B].

    Per example `D/2 log(2 pi v*) + (SSE + D v0) / (2 v*)` (for 'pixel' and 'channel' the sum of each one's). Its mean over the
    set that shares `v*` is the closed form `D/2 (log(2 pi v*) + 1)`; for 'example' every entry is. Gradients flow through `v*`;
    by the envelope theorem they equal those with `v*` held constant, once averaged over the set that shares it.

    With 'example' the variance depends on x, so `exp(-value)` is a *profile* likelihood and not a density. ('example':
    Kim & Lee 2024; 'batch': Rybkin et al. 2021.)

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0]])
    >>> print(optimal_gaussian_nll(x, jnp.zeros_like(x), floor=0.0))  # log(2 pi v*) + 1 at v* = 1/2: log(pi) + 1
    [2.1447299]

    Raises:
      UserError: as `optimal_variance`.
    """
    residual_squared = residual_squares(x, mean)
    variance = optimal_variance_of(residual_squared, over, floor, axis_name)
    return distortion_at_optimum(residual_squared, variance, over, floor)


def distortion_at_optimum(
    residual_squared: Array, variance: Array, over: Shared, floor: float | Array, mask: Array | None = None
) -> Array:
    """Distortion, nats, [B], at the `variance` of `optimal_variance_of`."""
    if over == "example":  # SSE + D v0 = D v*, exactly
        pixels: Any = float(np.prod(residual_squared.shape[1:]))
        if mask is not None:
            pixels = sum_pixels(mask.astype(variance.dtype))
            variance = jnp.where(pixels.reshape(variance.shape) > 0, variance, 1.0)  # of an example with nothing observed
        return 0.5 * pixels * (sum_pixels(jnp.log(variance)) + LOG_2PI + 1.0)
    return nll_from_log_variance(residual_squared, jnp.log(variance), floor, mask)
