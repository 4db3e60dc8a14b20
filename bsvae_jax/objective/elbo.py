"""The ELBO: KL divergence, the terms of the objective, and their mean. `gaussian` settles the conventions.

`beta`, variances and floors may be traced.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bsvae_jax.errors import UserError, check_kind, shown
from bsvae_jax.objective.decoder_variance import DecoderVariance
from bsvae_jax.objective.gaussian import (
    as_float,
    check_positive,
    mean_over_devices,
    observed_mean,
    residual_squares,
    sum_pixels,
)


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
    return sum_pixels(kl_per_latent(mean, log_variance))


def kl_per_latent(
    mean: Float[Array, "batch *latent"], log_variance: Float[Array, "batch *latent"]
) -> Float[Array, "batch *latent"]:
    """The terms of `kl_to_standard_normal`, nats, [B, L]: what each latent carries.

    >>> import jax.numpy as jnp
    >>> print(kl_per_latent(jnp.array([[2.0, 0.0]]), jnp.zeros((1, 2))))
    [[2. 0.]]

    Raises:
      UserError: the two shapes differ.
    """
    mean, log_variance = _of_one_shape(mean=mean, log_variance=log_variance)
    # expm1 keeps the digits that exp(lv) - 1 - lv loses near a collapsed posterior, where lv -> 0.
    return 0.5 * (jnp.expm1(log_variance) - log_variance + jnp.square(mean))


def kl_gaussians(
    mean_q: Float[Array, "batch *latent"],
    log_variance_q: Float[Array, "batch *latent"],
    mean_p: Float[Array, "batch *latent"],
    log_variance_p: Float[Array, "batch *latent"],
) -> Float[Array, " batch"]:
    """`KL(q || p)` of two Gaussians with diagonal covariances, nats per example, shape [B].

    `1/2 sum (exp(lv_q - lv_p) - 1 - (lv_q - lv_p) + (mean_q - mean_p)^2 exp(-lv_p))`: the rate of a conditional or
    hierarchical model, whose prior comes from a network.

    >>> import jax.numpy as jnp
    >>> print(kl_gaussians(jnp.array([[2.0]]), jnp.zeros((1, 1)), jnp.array([[1.0]]), jnp.zeros((1, 1))))
    [0.5]

    Raises:
      UserError: the four shapes differ.
    """
    mean_q, log_variance_q, mean_p, log_variance_p = _of_one_shape(
        mean_q=mean_q, log_variance_q=log_variance_q, mean_p=mean_p, log_variance_p=log_variance_p
    )
    # In units of p, whose deviation is exp(lv_p / 2), p is N(0, I).
    return kl_to_standard_normal((mean_q - mean_p) * jnp.exp(-0.5 * log_variance_p), log_variance_q - log_variance_p)


def _of_one_shape(**given: Any) -> list[Array]:
    """The arrays in at least float32."""
    arrays = [as_float(name, values) for name, values in given.items()]
    if len({array.shape for array in arrays}) > 1:
        shapes = [str(array.shape) for array in arrays]
        names, last = list(given), shapes.pop()
        raise UserError(f"{', '.join(names[:-1])} and {names[-1]} must have one shape, got {', '.join(shapes)} and {last}.")
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [array.astype(dtype) for array in arrays]


class ElboTerms(NamedTuple):
    """The terms of the objective, per example; `mean_objective` is the one place where they are reduced.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import Optimal
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
    """The decoder variance used, squared intensity: [] | [B, 1, 1, 1] | [H, W, C] | [C] | [B, H, W, C]."""


def elbo_terms(
    x: Float[Array, "batch *pixels"],
    mean: Float[Array, "batch *pixels"],
    rate: Float[Array, " batch"],
    decoder_variance: DecoderVariance,
    *,
    log_variance: Float[Array, "..."] | None = None,
    axis_name: str | None = None,
    mask: Bool[Array, "..."] | Bool[np.ndarray, "..."] | None = None,
) -> ElboTerms:
    """Distortion and rate per example under any decoder-variance model, nats, and the squared error that they come from.

    With a `mask` m, of the observed entries alone: `distortion = sum_pixels m 1/2 [log(2 pi v) + ((x - mean)^2 + v0) / v]`,
    `mse = SSE / D` with `SSE = sum_pixels m (x - mean)^2` and `D = sum_pixels m`, and an optimal variance is v0 and the mean
    over the observed entries that share it. Entries that are not observed may hold anything, NaN too, and have no gradient;
    an example without an observed entry has distortion 0.

    Args:
      x: images in [0, 1], [B, ...].
      mean: the decoder's mean for one sample z ~ q(z|x) per image, the shape of `x`.
      rate: `KL(q(z|x) || p(z))` in nats, from the prior, [B]; handed on as it is.
      decoder_variance: `Constant`, `Optimal`, `Learned`, `Predicted`, or one of your own.
      log_variance: the trained log-variance; a scalar for `Learned`, the shape of `x` for `Predicted`, else None.
        Values and gradients are finite in float32 for |log_variance| <= 50.
      axis_name: device axis over which a shared optimal variance is averaged.
      mask: True where an entry of `x` is observed; the shape of `x`, or one that broadcasts to it. None: everywhere.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import Constant
    >>> x, mean, rate = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2)), jnp.array([3.0])
    >>> terms = elbo_terms(x, mean, rate, Constant(0.5))
    >>> print(terms.distortion, terms.rate, terms.mse, terms.variance)  # log(pi) + 1, as given, 1/2, as given
    [2.1447299] [3.] [0.5] 0.5
    >>> print(elbo_terms(x, mean, rate, Constant(0.5), mask=jnp.array([True, False])).distortion)  # log(pi) / 2
    [0.5723649]

    Raises:
      UserError: shapes differ, `log_variance` is missing or given where the variance model has none, or `mask` is not boolean,
        does not broadcast, or is given to a variance model whose `distortion` takes none.
    """
    check_kind("decoder_variance", decoder_variance, DecoderVariance, "as in bsvae_jax.Optimal()")
    options = {}
    if mask is not None:
        options["mask"] = mask = _checked_mask(mask, as_float("x", x).shape, decoder_variance)
    residual_squared = residual_squares(x, mean, mask)
    rate, batch = as_float("rate", rate), residual_squared.shape[:1]
    if rate.shape != batch:
        raise UserError(f"rate must have a value for each image, shape {batch}, got {rate.shape}.")
    log_variance = decoder_variance.check_log_variance(log_variance, residual_squared.shape)
    variance, distortion = decoder_variance.distortion(residual_squared, log_variance, axis_name, **options)
    if jnp.shape(distortion) != batch:
        raise UserError(
            f"distortion of {type(decoder_variance).__name__} must return the variance and a value in nats for each image, "
            f"shape {batch}, got {jnp.shape(distortion)}; sum over the pixels, not over the images."
        )
    mse = observed_mean(residual_squared, mask, tuple(range(1, residual_squared.ndim)))
    return ElboTerms(distortion, rate, mse, variance)


def _checked_mask(mask: Any, shape: tuple[int, ...], decoder_variance: DecoderVariance) -> Array:
    """The mask in the shape of the data."""
    if not isinstance(mask, jax.Array | np.ndarray) or mask.dtype != bool:
        raise UserError(f"mask must be a boolean array, True where an entry is observed, got {getattr(mask, 'dtype', mask)!s}.")
    if "mask" not in inspect.signature(decoder_variance.distortion).parameters:
        raise UserError(
            f"distortion of {type(decoder_variance).__name__} takes no mask; give it a fourth parameter, mask=None."
        )
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError as error:
        raise UserError(f"mask of shape {mask.shape} does not broadcast to the shape {shape} of x.") from error


def mean_objective(terms: ElboTerms, beta: float | Float[Array, ""], axis_name: str | None = None) -> Float[Array, ""]:
    """`mean over the global batch of distortion + beta * rate`, nats per example, shape []: what training minimizes.

    `beta = 1` is the negative ELBO. `beta` may be traced; 0 switches the rate off. `axis_name`: of the devices
    that share the batch, equally.

    With `axis_name`, average the gradients over it as well: `jax.lax.pmean(jax.grad(loss)(params), axis_name)`. In `jax.pmap`
    and in `jax.shard_map` with `check_vma=False` each device has those of its own share. By default, `check_vma=True`, they
    are averaged already, and averaging changes nothing; without `axis_name` here they would be sums, n times too large.

    >>> import jax.numpy as jnp
    >>> distortion, rate = jnp.array([100.0, 200.0]), jnp.array([10.0, 30.0])
    >>> terms = ElboTerms(distortion, rate, mse=jnp.ones(2), variance=jnp.ones(()))
    >>> print(mean_objective(terms, beta=0.5))  # 150 + 0.5 * 20
    160.0

    Raises:
      UserError: `beta` is not a finite number >= 0.
    """
    check_kind("terms", terms, ElboTerms, "it is what elbo_terms returns")
    distortion, rate = as_float("distortion", terms.distortion), as_float("rate", terms.rate)
    if distortion.shape != rate.shape:
        shapes = f"{distortion.shape} and {rate.shape}"
        raise UserError(f"distortion and rate must have a value for each image, got shapes {shapes}.")
    check_positive("beta", beta, allow_zero=True)
    dtype = jnp.promote_types(jnp.result_type(distortion, rate), jnp.float32)
    return mean_over_devices(jnp.mean(distortion.astype(dtype) + beta * rate.astype(dtype)), axis_name)


Values = float | Float[Array, "..."] | Float[np.ndarray, "..."]


def bits_per_dimension(nll: Values, shape: Sequence[int], bin_width: float = 1.0 / 255.0) -> Values:
    """`-log2 P` per pixel of the quantized image: `nll / (D ln 2) - log2(bin_width)`, `bin_width` the grid spacing of the data.

    Takes the density as constant over a cell of the grid. Of a `nll` averaged over dequantization noise it is an upper bound
    of `-log2 P` (Theis et al. 2016, section 3.1).

    Args:
      nll: negative log density in nats per example, of data in [0, 1]; any shape, which is that of the result.
      shape: shape of one image, D = prod(shape).
      bin_width: width of a gray level after scaling to [0, 1].

    >>> round(float(bits_per_dimension(0.0, (28, 28, 1))), 3)  # density 1 on [0, 1]: a uniform distribution
    7.994

    Raises:
      UserError: a shape that is not of an image, or a bin width that is not a number > 0.
    """
    if (
        not isinstance(shape, tuple | list)
        or not shape
        or not all(type(n) is not bool and isinstance(n, int | np.integer) and n > 0 for n in shape)
    ):
        raise UserError(f"shape must be that of an image, whole numbers >= 1 as in (28, 28, 1), got {shown(shape)}.")
    check_positive("bin_width", bin_width)
    check_kind("nll", nll, (float, int, np.number, np.ndarray, jax.Array), "nats per example")
    as_float("nll", float(nll) if isinstance(nll, int | np.integer) and abs(int(nll)) < 2**1000 else nll)
    return nll / (float(np.prod(shape)) * float(np.log(2.0))) - float(np.log2(bin_width))
