"""Negative log-likelihoods, optimal decoder variance, KL divergence and the ELBO: pure functions of arrays.

Conventions, settled once for the whole package:

* `x` and `mean` have the same shape `[B, ...]`; the trailing axes are one example's D pixels (usually `[B, H, W, C]`).
* Every value is in **nats per example**, shape `[B]`: summed over pixels, never averaged over them.
* The one-half and the 2 pi are always kept, so a distortion is a true negative log density.
* `floor` is v0, the variance of the uniform noise that turns quantised data into continuous data: `step**2 / 12`
  (`quantization_variance`). Where it enters, the distortion is the exact expectation over that noise,
  `E_u ||x + u - mean||^2 = SSE + D v0`; it bounds every learned variance model from below.
* Inputs of less than 32 bits are promoted to float32 before anything is squared, summed or logged.

All functions work under `jit`, `grad`, `hessian` and `vmap`, and in float64 under `jax_enable_x64`; `beta` and variances
may be traced. With `axis_name`, `x` is one device's share of a global batch (equal shares), and every average that
defines a shared variance is taken over all devices *before* the logarithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsvae_jax.errors import UserError, check_kind, nearest

LOG_2PI = float(np.log(2.0 * np.pi))

Shared = Literal["example", "batch", "pixel"]
"""Which entries share one optimal variance: the pixels of one example, the global batch, or one pixel over the batch."""

Tree = TypeVar("Tree")


def _check_positive(what: str, value: Any, allow_zero: bool = False) -> None:
    """Reject a wrong number; an array of JAX may be traced, so it cannot be looked at and passes."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        if not np.all(np.isfinite(value) & ((value >= 0) if allow_zero else (value > 0))):
            raise UserError(f"{what} must be finite and {'>= 0' if allow_zero else '> 0'} everywhere; the array holds others.")
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise UserError(f"{what} must be a number, got {value!r}.")
    if not np.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        bound = "a finite number >= 0" if allow_zero else "a finite number > 0"
        raise UserError(f"{what} must be {bound}, got {value}.")


def quantization_variance(step: float) -> float:
    """Variance `step**2 / 12`, squared intensity, of uniform dequantisation noise for data in [0, 1] of grid spacing `step`.

    >>> f"{quantization_variance(1 / 255):.3e}"
    '1.282e-06'

    Raises:
      UserError: `step` is a number that is not finite and > 0.
    """
    _check_positive("step", step)
    return step**2 / 12.0


QUANTIZATION_VARIANCE = quantization_variance(1.0 / 255.0)
"""v0 of 8-bit images, 1/(12 * 255^2) = 1.28e-6: the default floor of every variance."""

PAPER_FLOOR = 1e-5 / (2.0 * np.pi)
"""v0 that equals the 1e-5 which the code of Kim & Lee (2024) adds inside the logarithm, log(2 pi MSE + 1e-5)."""


def mean_over_devices(tree: Tree, axis_name: str | None) -> Tree:
    """Mean of every leaf over the named device axis; the identity when there is none."""
    if axis_name is None:
        return tree
    try:
        return jax.lax.pmean(tree, axis_name)
    except NameError as error:
        raise UserError(
            f"There is no device axis {axis_name!r} here: axis_name is for functions inside jax.pmap or jax.shard_map over an "
            "axis of that name; leave it out elsewhere."
        ) from error


# --- Decoder-variance models ------------------------------------------------------------------------------------------


def _check_floor(what: str, value: Any) -> None:
    if value is not None:
        _check_positive(what, value, allow_zero=True)


def _check_shared(over: str) -> None:
    if over in ("example", "batch", "pixel"):
        return
    over = str(over)
    if "pixel" in over and "example" in over:
        raise UserError(
            "A variance per pixel and per example is unbounded below (each residual gets its own variance, which may go "
            "to zero); share it over 'example', 'batch' or 'pixel'."
        )
    known = ("example", "batch", "pixel")
    raise UserError(f"over must be one of {', '.join(map(repr, known))}, got {over!r}{nearest(over, known)}.")


@dataclass(frozen=True)
class Constant:
    """One fixed variance: the conventional beta-VAE. Distortion `D/2 log(2 pi v) + SSE / (2 v)`, nats.

    >>> import jax.numpy as jnp
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> print(elbo_terms(x, mean, jnp.zeros(1), Constant(0.5)).distortion)  # log(pi) + 1
    [2.1447299]

    Raises:
      UserError: the variance is not a finite number > 0.
    """

    variance: Any = 0.5
    """sigma^2 > 0, in squared units of the [0, 1] intensity; 0.5 is the paper's SSE + beta*KL up to a constant."""

    def __post_init__(self) -> None:
        _check_positive("Constant.variance", self.variance)
        if isinstance(self.variance, int):  # a float, so that the command line takes floats for it
            object.__setattr__(self, "variance", float(self.variance))


@dataclass(frozen=True)
class Optimal:
    """The closed-form optimal variance `v* = MSE + v0` (Kim & Lee 2024): BS-VAE.

    Distortion `D/2 (log(2 pi v*) + 1)`, nats, once averaged over what shares v*; see `optimal_gaussian_nll`.

    >>> import jax.numpy as jnp
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # MSE = 1/2
    >>> terms = elbo_terms(x, mean, jnp.zeros(1), Optimal(floor=0.0))
    >>> print(terms.variance, terms.distortion)  # v* = 1/2, log(pi) + 1
    [[0.5]] [2.1447299]

    Raises:
      UserError: `over` is unknown or asks for a variance per pixel and example, or `floor` is not a finite number >= 0.
    """

    over: Shared = "example"
    """What shares one variance: 'example' (BS-VAE, sigma^2*(x)), 'batch' (Rybkin et al. 2021) or 'pixel'."""
    floor: float | None = None
    """v0 in squared intensity; None: the quantisation variance of the data (8 bits where no data set says otherwise)."""

    def __post_init__(self) -> None:
        _check_shared(self.over)
        _check_floor("Optimal.floor", self.floor)


@dataclass(frozen=True)
class Learned:
    """One trained log-variance for all pixels and examples (sigma-VAE, Rybkin et al. 2021).

    Distortion `D/2 log(2 pi v) + (SSE + D v0) / (2 v)`, nats.

    >>> import jax.numpy as jnp
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> log_variance = jnp.log(0.5)  # the model's parameter
    >>> print(elbo_terms(x, mean, jnp.zeros(1), Learned(floor=0.0), log_variance=log_variance).distortion)  # log(pi) + 1
    [2.1447299]

    Raises:
      UserError: `initial_variance` is not a finite number > 0, or `floor` none >= 0.
    """

    initial_variance: float = 1.0
    """Where training starts, squared intensity, > 0."""
    floor: float | None = None
    """v0, as in `Optimal`; with it the variance converges to the batch-optimal `MSE + v0`."""

    def __post_init__(self) -> None:
        _check_positive("Learned.initial_variance", self.initial_variance)
        _check_floor("Learned.floor", self.floor)


@dataclass(frozen=True)
class Predicted:
    """The decoder returns a log-variance per pixel besides the mean; v0 > 0 keeps its likelihood bounded.

    Distortion `sum_pixels 1/2 [log(2 pi v) + ((x - mean)^2 + v0) / v]`, nats.

    >>> import jax.numpy as jnp
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> log_variance = jnp.log(jnp.full((1, 2), 0.5))  # of the decoder, in the shape of x
    >>> terms = elbo_terms(x, mean, jnp.zeros(1), Predicted(floor=0.25), log_variance=log_variance)
    >>> print(terms.distortion)  # log(pi) + SSE + 2 v0
    [2.6447299]

    Raises:
      UserError: `floor` is not a finite number > 0.
    """

    floor: float | None = None
    """v0, as in `Optimal`."""

    def __post_init__(self) -> None:
        if self.floor is not None:
            _check_positive("Predicted.floor", self.floor)


DecoderVariance = Constant | Optimal | Learned | Predicted


def floor_of(decoder_variance: DecoderVariance) -> float:
    """v0 of a decoder-variance model: 0 for `Constant` (a plain Gaussian density), 8-bit where it is left at None."""
    if isinstance(decoder_variance, Constant):
        return 0.0
    return QUANTIZATION_VARIANCE if decoder_variance.floor is None else decoder_variance.floor


# --- Gaussian negative log-likelihoods --------------------------------------------------------------------------------


def _as_float(what: str, values: Any) -> Array:
    """Values as an array of a floating type. (8-bit images that nobody divided by 255 would give numbers, and wrong ones.)"""
    check_kind(what, values, (jax.Array, np.ndarray, np.number, float, list, tuple), "give an array of floats")
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is no array of numbers: {str(error).splitlines()[0]}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{what} must be floating point (images in [0, 1]), got {array.dtype}; divide 8-bit values by 255.")
    return array


def _residual_squared(x: Float[Array, "batch *pixels"], mean: Float[Array, "batch *pixels"]) -> Float[Array, "batch *pixels"]:
    x, mean = _as_float("x", x), _as_float("mean", mean)
    if x.shape != mean.shape or x.ndim < 2:
        raise UserError(
            f"x and mean must have one shape [batch, ...pixels], got {x.shape} and {mean.shape}; nothing is broadcast here."
        )
    dtype = jnp.promote_types(jnp.result_type(x, mean), jnp.float32)
    return jnp.square(x.astype(dtype) - mean.astype(dtype))


def _sum_pixels(values: Float[Array, "batch *pixels"]) -> Float[Array, " batch"]:
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _nll_from_log_variance(
    residual_squared: Float[Array, "batch *pixels"], log_variance: Array, floor: float | Array = 0.0
) -> Float[Array, " batch"]:
    """`sum_pixels 1/2 [log(2 pi v) + (r^2 + v0) / v]` in terms of log v, whose gradients overflow later than those of v."""
    shape = residual_squared.shape
    padded = (1,) * (len(shape) - log_variance.ndim) + log_variance.shape
    if len(padded) != len(shape) or any(size not in (1, full) for size, full in zip(padded, shape, strict=True)):
        raise UserError(f"A variance of shape {log_variance.shape} does not broadcast against images of shape {shape}.")
    log_variance = log_variance.reshape(padded)
    pixels, distinct = float(np.prod(shape[1:])), float(np.prod(log_variance.shape[1:]))
    # A shared variance is counted, not summed: D times one number has no rounding error.
    log_term = _sum_pixels(log_variance + LOG_2PI) * (pixels / distinct)
    precision = jnp.broadcast_to(jnp.exp(-log_variance), shape)
    return 0.5 * (log_term + _sum_pixels((residual_squared + floor) * precision))


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
    _check_positive("variance", variance)
    residual_squared = _residual_squared(x, mean)
    return _nll_from_log_variance(residual_squared, jnp.log(jnp.asarray(variance, residual_squared.dtype)))


def _optimal_variance(residual_squared: Array, over: Shared, floor: float | Array, axis_name: str | None) -> Array:
    _check_shared(over)
    _check_positive("floor", floor, allow_zero=True)
    if over == "example":
        return jnp.mean(residual_squared, axis=tuple(range(1, residual_squared.ndim)), keepdims=True) + floor
    shared = jnp.mean(residual_squared, axis=None if over == "batch" else 0)
    return mean_over_devices(shared, axis_name) + floor


def optimal_variance(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    over: Shared = "example",
    floor: float | Float[Array, ""] = QUANTIZATION_VARIANCE,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    """`v* = MSE + v0`, the decoder variance that maximises the Gaussian likelihood (Kim & Lee 2024, eq. for sigma^2*).

    Args:
      over: 'example': mean over the pixels of each example, shape `[B, 1, 1, 1]` (one 1 per trailing axis of `x`).
        'batch': mean over pixels and the global batch, shape `[]`. 'pixel': mean over the global batch, shape `[H, W, C]`.
      floor: v0 >= 0, squared intensity. With 0, perfectly reconstructed data has variance 0 and infinite likelihood.
      axis_name: the device axis over which 'batch' and 'pixel' are averaged as well.

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
    return _optimal_variance(_residual_squared(x, mean), over, floor, axis_name)


def optimal_gaussian_nll(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    over: Shared = "example",
    floor: float | Float[Array, ""] = QUANTIZATION_VARIANCE,
    axis_name: str | None = None,
) -> Float[Array, " batch"]:
    """Distortion at the optimal variance `v*` of `optimal_variance`, nats per example, shape [B].

    Per example `D/2 log(2 pi v*) + (SSE + D v0) / (2 v*)` (for 'pixel' the same per pixel, summed). Its mean over the set
    that shares `v*` is the closed form `D/2 (log(2 pi v*) + 1)`; for 'example' every entry is. Gradients flow through `v*`;
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
    residual_squared = _residual_squared(x, mean)
    variance = _optimal_variance(residual_squared, over, floor, axis_name)
    if over == "example":  # SSE + D v0 = D v*, exactly
        pixels = float(np.prod(residual_squared.shape[1:]))
        return 0.5 * pixels * (_sum_pixels(jnp.log(variance)) + LOG_2PI + 1.0)
    return _nll_from_log_variance(residual_squared, jnp.log(variance), floor)


# --- KL divergence and the ELBO ---------------------------------------------------------------------------------------


def kl_to_standard_normal(
    mean: Float[Array, "batch *latent"], log_variance: Float[Array, "batch *latent"]
) -> Float[Array, " batch"]:
    """`KL(N(mean, exp(log_variance)) || N(0, I)) = 1/2 sum (exp(lv) - 1 - lv + mean^2)`, nats per example, shape [B].

    Kingma & Welling (2014), appendix B.

    >>> import jax.numpy as jnp
    >>> print(kl_to_standard_normal(jnp.array([[2.0]]), jnp.array([[0.0]])))
    [2.]

    Raises:
      UserError: the two shapes differ.
    """
    mean, log_variance = _as_float("mean", mean), _as_float("log_variance", log_variance)
    if mean.shape != log_variance.shape:
        raise UserError(f"mean and log_variance must have one shape, got {mean.shape} and {log_variance.shape}.")
    dtype = jnp.promote_types(jnp.result_type(mean, log_variance), jnp.float32)
    mean, log_variance = mean.astype(dtype), log_variance.astype(dtype)
    # expm1 keeps the digits that exp(lv) - 1 - lv loses near a collapsed posterior, where lv -> 0.
    return 0.5 * _sum_pixels(jnp.expm1(log_variance) - log_variance + jnp.square(mean))


class ElboTerms(NamedTuple):
    """The terms of the objective, per example; `mean_objective` is the one place where they are reduced.

    >>> import jax.numpy as jnp
    >>> terms = elbo_terms(jnp.ones((3, 4)), jnp.zeros((3, 4)), jnp.zeros(3), Optimal())
    >>> terms.distortion.shape, terms.rate.shape, terms.mse.shape, terms.variance.shape
    ((3,), (3,), (3,), (3, 1))
    """

    distortion: Float[Array, " batch"]
    """`-log p(x|z)` under the decoder-variance model, nats. [B]"""
    rate: Float[Array, " batch"]
    """`KL(q(z|x) || p(z))`, nats; closed form or one-sample Monte Carlo. [B]"""
    mse: Float[Array, " batch"]
    """Squared error averaged over the pixels, squared intensity. [B]"""
    variance: Float[Array, "..."]
    """The decoder variance used, squared intensity: [] | [B, 1, 1, 1] | [H, W, C] | [B, H, W, C]."""


def elbo_terms(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    rate: Float[Array, " batch"],
    decoder_variance: DecoderVariance,
    *,
    log_variance: Float[Array, "..."] | None = None,
    axis_name: str | None = None,
) -> ElboTerms:
    """Distortion and rate per example under any decoder-variance model, nats, and the squared error that they come from.

    Args:
      x: images in [0, 1], [B, ...].
      mean: the decoder's mean for one sample z ~ q(z|x) per image, the shape of `x`.
      rate: `KL(q(z|x) || p(z))` in nats, from the prior, [B]; handed on as it is.
      decoder_variance: `Constant`, `Optimal`, `Learned` or `Predicted`.
      log_variance: the trained log-variance; a scalar for `Learned`, the shape of `x` for `Predicted`, else None.
        Values and gradients are finite in float32 for |log_variance| <= 50.
      axis_name: device axis over which a shared optimal variance is averaged.

    >>> import jax.numpy as jnp
    >>> x, mean, rate = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2)), jnp.array([3.0])
    >>> terms = elbo_terms(x, mean, rate, Constant(0.5))
    >>> print(terms.distortion, terms.rate, terms.mse, terms.variance)  # log(pi) + 1, as given, 1/2, as given
    [2.1447299] [3.] [0.5] 0.5

    Raises:
      UserError: shapes differ, or `log_variance` is missing or given where the variance model has none.
    """
    check_kind("decoder_variance", decoder_variance, (Constant, Optimal, Learned, Predicted), "as in bsvae_jax.Optimal()")
    residual_squared = _residual_squared(x, mean)
    rate = _as_float("rate", rate)
    if rate.shape != residual_squared.shape[:1]:
        raise UserError(f"rate must have a value for each image, shape {residual_squared.shape[:1]}, got {rate.shape}.")
    trained = isinstance(decoder_variance, Learned | Predicted)
    if trained != (log_variance is not None):
        name = type(decoder_variance).__name__
        raise UserError(f"{name} {'needs' if trained else 'takes no'} log_variance, and got {'none' if trained else 'one'}.")
    if isinstance(decoder_variance, Optimal):
        floor = floor_of(decoder_variance)
        variance = _optimal_variance(residual_squared, decoder_variance.over, floor, axis_name)
        distortion = optimal_gaussian_nll(x, mean, decoder_variance.over, floor, axis_name)
    elif isinstance(decoder_variance, Constant):
        variance = jnp.asarray(decoder_variance.variance, residual_squared.dtype)
        distortion = gaussian_nll(x, mean, decoder_variance.variance)
    else:
        expected = residual_squared.shape if isinstance(decoder_variance, Predicted) else ()
        log_variance = _as_float("log_variance", log_variance).astype(residual_squared.dtype)
        if log_variance.shape != expected:
            name = type(decoder_variance).__name__
            raise UserError(f"log_variance of {name} must have shape {expected}, got {log_variance.shape}.")
        variance = jnp.exp(log_variance)
        distortion = _nll_from_log_variance(residual_squared, log_variance, floor_of(decoder_variance))
    mse = jnp.mean(residual_squared, axis=tuple(range(1, residual_squared.ndim)))
    return ElboTerms(distortion, rate, mse, variance)


def mean_objective(terms: ElboTerms, beta: float | Float[Array, ""], axis_name: str | None = None) -> Float[Array, ""]:
    """`mean over the global batch of distortion + beta * rate`, nats per example, shape []: what training minimises.

    `beta = 1` is the negative ELBO. `beta` may be traced; 0 switches the rate off. `axis_name`: of the devices
    that share the batch, equally.

    >>> import jax.numpy as jnp
    >>> distortion, rate = jnp.array([100.0, 200.0]), jnp.array([10.0, 30.0])
    >>> terms = ElboTerms(distortion, rate, mse=jnp.ones(2), variance=jnp.ones(()))
    >>> print(mean_objective(terms, beta=0.5))  # 150 + 0.5 * 20
    160.0

    Raises:
      UserError: `beta` is not a finite number >= 0.
    """
    check_kind("terms", terms, ElboTerms, "it is what elbo_terms returns")
    if jnp.shape(terms.distortion) != jnp.shape(terms.rate):
        shapes = f"{jnp.shape(terms.distortion)} and {jnp.shape(terms.rate)}"
        raise UserError(f"distortion and rate must have a value for each image, got shapes {shapes}.")
    _check_positive("beta", beta, allow_zero=True)
    if np.ndim(beta):
        raise UserError(f"beta must be one number, got an array of shape {np.shape(beta)}; jax.vmap takes many.")
    return mean_over_devices(jnp.mean(terms.distortion + beta * terms.rate), axis_name)


Values = float | Float[Array, "..."] | Float[np.ndarray, "..."]


def bits_per_dimension(nll: Values, shape: Sequence[int], step: float = 1.0 / 255.0) -> Values:
    """`-log2 P` per pixel of the quantised image: `nll / (D ln 2) - log2(step)`, where `step` is the data's grid spacing.

    Takes the density as constant over a cell of the grid. Of a `nll` averaged over dequantisation noise it is an upper bound
    of `-log2 P` (Theis et al. 2016, section 3.1).

    Args:
      nll: negative log density in nats per example, of data in [0, 1]; any shape, which is that of the result.
      shape: shape of one image, D = prod(shape).
      step: quantisation step after scaling to [0, 1].

    >>> round(float(bits_per_dimension(0.0, (28, 28, 1))), 3)  # density 1 on [0, 1]: a uniform distribution
    7.994

    Raises:
      UserError: a shape that is not of an image, or a step that is not a number > 0.
    """
    if not isinstance(shape, Sequence) or not shape or not all(isinstance(n, int | np.integer) and n > 0 for n in shape):
        raise UserError(f"shape must be that of an image, whole numbers >= 1 as in (28, 28, 1), got {shape!r}.")
    _check_positive("step", step)
    check_kind("nll", nll, (float, int, np.number, np.ndarray, jax.Array), "nats per example")
    return nll / (float(np.prod(shape)) * float(np.log(2.0))) - float(np.log2(step))
