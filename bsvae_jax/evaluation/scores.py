"""One pass of a model over a split of images: the per-example numbers from which every evaluation is computed.

The device returns squared errors and rates; sums and logarithms over a whole split follow on the host in float64, so the
result depends neither on the batch size nor on the number of devices, and the last partial batch counts for what it is.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from bsvae_jax.data.image_set import to_unit_interval
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, Execution, parallelize
from bsvae_jax.evaluation.run_over import run_over
from bsvae_jax.models.priors import StandardNormal
from bsvae_jax.models.vae import VAE
from bsvae_jax.objective import LOG_2PI, DecoderVariance, elbo_terms
from bsvae_jax.random import example_keys, make_key

EVALUATION_BATCH = 512
"""Images per device call, at most; of large ones fewer, see `evaluation_batch`."""
LARGE = 64 * 64 * 3
"""Values of an image beyond which fewer are evaluated in a call: so many fit wherever such an image can be trained on."""

SPLIT_SALT = {"train": 0x65760001, "test": 0x65760002, "validation": 0x65760003}
"""Folded into the config's seed for the posterior samples of a split, so that every evaluation takes the same ones; far from
0 and 1, which `split` uses for the keys of training."""


def evaluation_batch(data_shape: tuple[int, ...], most: int = EVALUATION_BATCH) -> int:
    """Examples of a shape in a device call: `most`, and of large ones as many as have the values of `most` images of 64 x 64.

    >>> [evaluation_batch((side, side, 3)) for side in (28, 64, 256, 512)]
    [512, 512, 32, 8]
    """
    return max(1, most * LARGE // max(LARGE, math.prod(data_shape)))


def split_key(seed: int, split: str) -> Key[Array, ""]:
    """The key of the posterior samples of a split (of `ImageSet.splits`) in every evaluation of a run of this seed."""
    return jax.random.fold_in(make_key(seed), SPLIT_SALT[split])


class SplitScores(NamedTuple):
    """Per-example results for N images of D pixels with L latents, one posterior sample each; float64."""

    squared_error: np.ndarray
    """`||x - mean||^2`, summed over pixels, [N]."""
    rate: np.ndarray
    """`KL(q(z|x) || p(z))`, nats, [N]."""
    pixel_squared_error: np.ndarray
    """Squared error averaged over the examples, in the shape of one, [H, W, C] of images."""
    posterior_mean: np.ndarray
    """[N, L]"""
    latent_rate: np.ndarray
    """Of each latent, nats, averaged over the examples, [L]. Under a standard normal prior `KL(q(z_l|x) || N(0, 1))`, which
    sums to the rate. The rate of another prior does not fall into latents: then `KL(q(z_l|x) || N(a, b))` with the mean and
    the variance of z_l over all examples, at least I(x; z_l)."""
    model_distortion: np.ndarray
    """Distortion under the model's own decoder variance, nats, [N]; a shared optimal variance is shared over the N images."""
    model_variance: float
    """The model's decoder variance, averaged over everything it depends on."""
    aggregate_variance: np.ndarray | None = None
    """Variance of each latent under the aggregate posterior, [L]; None under a standard normal prior, whose scale is 1."""

    @property
    def pixels(self) -> int:
        """D, pixels times channels."""
        return int(self.pixel_squared_error.size)


class Calibration(NamedTuple):
    """Optimal variance of the whole training set under a trained model, v0 included."""

    step: int
    """Step of the parameters it was measured with."""
    variance: float
    """One number for all pixels."""
    variance_per_pixel: np.ndarray
    """In the shape of one example, [H, W, C] of images."""
    floor: float
    """v0 of the data."""


class _BatchScores(NamedTuple):
    squared_error: Float[Array, " batch"]
    rate: Float[Array, " batch"]
    pixel_squared_error: Float[Array, "*pixels"]
    posterior_mean: Float[Array, "batch latent"]
    latent_rate: Float[Array, " latent"]
    latent_variance: Float[Array, " latent"]
    latent_log_variance: Float[Array, " latent"]
    distortion: Float[Array, " batch"]
    variance: Float[Array, " batch"]


def _score_batch(
    variables: Mapping[str, Any],
    stored: Array,
    indices: Int[Array, " batch"],
    weights: Float[Array, " batch"],
    key: Key[Array, ""],
    *,
    model: VAE,
    levels: int,
) -> _BatchScores:
    x = to_unit_interval(stored, levels)
    # Noise by position in the split: the same for any batch size and number of devices.
    output: Any = model.apply(variables, x, example_keys(key, indices))
    mean, log_variance = output.decoded
    terms = elbo_terms(x, mean, output.rate, model.decoder_variance, log_variance=log_variance, axis_name=DATA_AXIS)
    of_example = tuple(range(1, x.ndim))
    residual_squared = jnp.square(x - mean)
    posterior_mean, posterior_log_variance = output.posterior
    latent_rate = 0.5 * (jnp.expm1(posterior_log_variance) - posterior_log_variance + jnp.square(posterior_mean))

    def total(values: Array) -> Array:
        return jax.lax.psum(jnp.sum(values * weights.reshape(-1, *(1,) * (values.ndim - 1)), axis=0), DATA_AXIS)

    variance = jnp.broadcast_to(terms.variance, x.shape) if terms.variance.shape != x.shape[1:] else terms.variance[None]

    def gathered(share: Array) -> Array:
        """Of all devices: each process reads all of it."""
        return jax.lax.all_gather(share, DATA_AXIS, tiled=True)

    return _BatchScores(
        squared_error=gathered(jnp.sum(residual_squared, axis=of_example)),
        rate=gathered(terms.rate),
        pixel_squared_error=total(residual_squared),
        posterior_mean=gathered(posterior_mean),
        latent_rate=total(latent_rate),
        latent_variance=total(jnp.exp(posterior_log_variance)),
        latent_log_variance=total(posterior_log_variance),
        distortion=gathered(terms.distortion),
        variance=gathered(jnp.broadcast_to(jnp.mean(variance, axis=of_example), terms.rate.shape)),
    )


@functools.cache
def _parallelized(model: VAE, levels: int, mesh: Mesh, execution: Execution) -> Any:
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED, REPLICATED)
    score = functools.partial(_score_batch, model=model, levels=levels)
    return parallelize(score, mesh, specs, REPLICATED, execution=execution, shared=(1, 2, 3))


def score_split(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    key: Key[Array, ""],
    *,
    levels: int,
    mesh: Mesh,
    batch_size: int,
) -> SplitScores:
    """Score every image of a split once, with one posterior sample each.

    Args:
      model: a VAE; its `axis_name` is not used, no batch statistics are taken.
      variables: `{"params": ..., "batch_stats": ...}`, replicated over the mesh.
      images: of the split, on the same mesh.
      key: decides the posterior samples, one key per position in the split.
      levels: gray levels of stored uint8 images.
      mesh: of `data_mesh`.
      batch_size: images per device call, rounded up to a multiple of the devices.
    """
    variances = [model.decoder_variance]
    (scores,) = score_members(
        model, variables, images, key, variances, levels=levels, mesh=mesh, batch_size=batch_size, execution="loop"
    )
    return scores


def score_members(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    keys: Key[Array, "*members"],
    decoder_variances: Sequence[DecoderVariance],
    *,
    levels: int,
    mesh: Mesh,
    batch_size: int,
    execution: Execution,
) -> Iterator[SplitScores]:
    """`score_split` of several models at once, whose variables are stacked along a leading axis of members.

    Args:
      model: of all members, but for the number in a `Constant` decoder variance.
      variables: stacked, divided over the member axis of the mesh.
      images: as for `score_split`.
      keys: one per member.
      decoder_variances: of each member, in order; as many results are given.
      levels: as for `score_split`.
      mesh: of `sweep_mesh`.
      batch_size: images per device call.
      execution: 'scan' or 'vmap'; 'loop' for one model without an axis of members.

    Yields:
      The scores of each member, in order.
    """
    batches = _score_batches(model, variables, images, keys, levels, mesh, batch_size, execution)
    for member, decoder_variance in enumerate(decoder_variances):
        own = [batch if execution == "loop" else _BatchScores(*(leaf[member] for leaf in batch)) for batch in batches]
        yield _split_scores(own, len(images), decoder_variance, isinstance(model.prior, StandardNormal))


def _score_batches(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    key: Array,
    levels: int,
    mesh: Mesh,
    batch_size: int,
    execution: Execution,
) -> list[_BatchScores]:
    """Host copies of the scores of every batch, in order; the last one is filled up with repetitions of an image."""
    score = _parallelized(model.clone(axis_name=None), levels, mesh, execution)
    return list(run_over(images, mesh, batch_size, lambda *batch: score(variables, *batch, key)))


def _split_scores(
    batches: Sequence[_BatchScores], count: int, decoder_variance: DecoderVariance, standard_normal: bool
) -> SplitScores:
    """What the batches of one model say of the whole split, in float64."""

    def examples(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches])[:count].astype(np.float64)

    def mean(name: str) -> np.ndarray:
        return np.asarray(np.sum([getattr(batch, name) for batch in batches], axis=0, dtype=np.float64) / count)

    scores = SplitScores(
        squared_error=examples("squared_error"),
        rate=examples("rate"),
        pixel_squared_error=mean("pixel_squared_error"),
        posterior_mean=examples("posterior_mean"),
        latent_rate=mean("latent_rate"),
        model_distortion=examples("distortion"),
        model_variance=float(examples("variance").mean()),
    )
    if not standard_normal:
        aggregate = scores.posterior_mean.var(axis=0) + mean("latent_variance")
        information = 0.5 * (np.log(aggregate) - mean("latent_log_variance"))
        scores = scores._replace(latent_rate=information, aggregate_variance=aggregate)
    batchwise = (scores.model_distortion, scores.model_variance)
    distortion, variance = decoder_variance.split_distortion(scores.squared_error, scores.pixel_squared_error, batchwise)
    return scores._replace(model_distortion=distortion, model_variance=variance)


def optimal_variance_of_split(scores: SplitScores, over: str, floor: float) -> Any:
    """`MSE + v0` over the split: [N] for 'example', a number for 'batch', the shape of an example for 'pixel'."""
    if over == "pixel":
        return scores.pixel_squared_error + floor
    variance = scores.squared_error / scores.pixels + floor
    return variance if over == "example" else float(variance.mean())


def calibrate(scores: SplitScores, step: int, floor: float) -> Calibration:
    """The optimal variance of the training set from its scores."""
    per_pixel = optimal_variance_of_split(scores, "pixel", floor)
    return Calibration(step, float(per_pixel.mean()), per_pixel, floor)


def distortion_at(scores: SplitScores, variance: Any, floor: float) -> np.ndarray:
    """`D/2 log(2 pi v) + (SSE + D v0) / (2 v)` per example, nats, [N], for one variance or one per example ([N])."""
    pixels = scores.pixels
    return 0.5 * pixels * (LOG_2PI + np.log(variance)) + (scores.squared_error + pixels * floor) / (2 * variance)
