"""One pass of a model over a split of images: the per-example numbers from which every evaluation is computed.

The device returns squared errors and rates; sums and logarithms over a whole split follow on the host in float64, so the
result depends neither on the batch size nor on the number of devices, and the last partial batch counts for what it is. (Of a
decoder variance of one's own that is shared over the batch, where it says so: `DecoderVariance.split_distortion`.)
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

from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, Execution, parallelize
from bsvae_jax.evaluation.run_over import run_over
from bsvae_jax.models.priors import StandardNormal
from bsvae_jax.models.vae import VAE
from bsvae_jax.objective import LOG_2PI, DecoderVariance, elbo_terms, with_fields
from bsvae_jax.random import example_keys, make_key

EVALUATION_BATCH = 512
"""Images per device call, at most; of large ones fewer, see `evaluation_batch`."""
LARGE = 64 * 64 * 3
"""Values of an image beyond which fewer are evaluated in a call: so many fit wherever such an image can be trained on."""

SAMPLES_OF_SPLIT = 10_000
"""Posterior samples over which the numbers of a split are averaged, where nobody asks for another number of each image."""

MOST_SAMPLES = 16
"""Of each image, where nobody asks for more."""

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


def samples_of_each(asked: int | None, images: int) -> int:
    """S, the posterior samples of each image in the evaluation of a split of so many `images`.

    Args:
      asked: of `Config.posterior_samples`; None: as many as make `SAMPLES_OF_SPLIT` of the split, at most `MOST_SAMPLES`. The
        noise that they leave in a mean over the split falls with their number in all.
      images: in the split.

    >>> [samples_of_each(None, images) for images in (297, 1_500, 10_000, 60_000)]
    [16, 7, 1, 1]
    """
    return min(MOST_SAMPLES, -(-SAMPLES_OF_SPLIT // images)) if asked is None else asked


class SplitScores(NamedTuple):
    """Results for each of N images of D pixels with L latents and each of S posterior samples of it; float64."""

    squared_error: np.ndarray
    """`||x - mean||^2`, summed over pixels, [S, N]."""
    rate: np.ndarray
    """`KL(q(z|x) || p(z))`, nats, [S, N]."""
    pixel_squared_error: np.ndarray
    """Squared error averaged over examples and samples, in the shape of one example, [H, W, C] of images."""
    posterior_mean: np.ndarray
    """[N, L]"""
    latent_rate: np.ndarray
    """Of each latent, nats, averaged over the examples, [L]. Under a standard normal prior `KL(q(z_l|x) || N(0, 1))`, which
    sums to the rate. The rate of another prior does not fall into latents: then `KL(q(z_l|x) || N(a, b))` with the mean and
    the variance of z_l over all examples, at least I(x; z_l)."""
    model_distortion: np.ndarray
    """Distortion under the model's own decoder variance, nats, [S, N]; a shared optimal variance is shared over all of them."""
    model_variance: float
    """The model's decoder variance, averaged over everything it depends on."""
    scaled_error: np.ndarray
    """Squared errors divided by the calibrated variance of their pixel, summed over pixels, [S, N]; by 1 before calibration."""
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


class _ExampleScores(NamedTuple):
    """Of every example of a batch."""

    squared_error: Float[Array, " batch"]
    scaled_error: Float[Array, " batch"]
    rate: Float[Array, " batch"]
    posterior_mean: Float[Array, "batch latent"]
    distortion: Float[Array, " batch"]
    variance: Float[Array, " batch"]


class _BatchTotals(NamedTuple):
    """Summed over the examples of a batch."""

    pixel_squared_error: Float[Array, "*pixels"]
    latent_rate: Float[Array, " latent"]
    latent_variance: Float[Array, " latent"]
    latent_log_variance: Float[Array, " latent"]


def _score_batch(
    variables: Mapping[str, Any],
    stored: Examples,
    indices: Int[Array, " batch"],
    weights: Float[Array, " batch"],
    key: Key[Array, ""],
    pixel_variance: Float[Array, "*pixels"],
    fields: Mapping[str, Float[Array, ""]],
    *,
    model: VAE,
) -> tuple[_ExampleScores, _BatchTotals]:
    x, labels = stored.inputs()
    # Noise by position in the split, and beyond its end for further samples: the same for any number of devices.
    output: Any = model.apply(variables, x, example_keys(key, indices), labels=labels)
    mean, log_variance = output.decoded
    decoder_variance = with_fields(model.decoder_variance, fields)
    terms = elbo_terms(x, mean, output.rate, decoder_variance, log_variance=log_variance, axis_name=DATA_AXIS)
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

    totals = _BatchTotals(
        pixel_squared_error=total(residual_squared),
        latent_rate=total(latent_rate),
        latent_variance=total(jnp.exp(posterior_log_variance)),
        latent_log_variance=total(posterior_log_variance),
    )
    examples = _ExampleScores(
        squared_error=gathered(jnp.sum(residual_squared, axis=of_example)),
        scaled_error=gathered(jnp.sum(residual_squared / pixel_variance[None], axis=of_example)),
        rate=gathered(terms.rate),
        posterior_mean=gathered(posterior_mean),
        distortion=gathered(terms.distortion),
        variance=gathered(jnp.broadcast_to(jnp.mean(variance, axis=of_example), terms.rate.shape)),
    )
    return examples, totals


@functools.cache
def _parallelized(model: VAE, mesh: Mesh, execution: Execution) -> Any:
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    score = functools.partial(_score_batch, model=model)
    return parallelize(score, mesh, specs, REPLICATED, execution=execution, shared=(1, 2, 3))


def score_split(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    key: Key[Array, ""],
    *,
    batch_size: int,
    samples: int = 1,
    calibration: "Calibration | None" = None,
) -> SplitScores:
    """Score every image of a split.

    Args:
      model: a VAE; its `axis_name` is not used, no batch statistics are taken.
      variables: `{"params": ..., "batch_stats": ...}`, replicated over the mesh of the images.
      images: of the split.
      key: decides the posterior samples: sample s of the image at position n of N takes `fold_in(key, s * N + n)`.
      batch_size: images per device call, rounded up to a multiple of the devices.
      samples: S, posterior samples of each image; the first are the same whatever their number.
      calibration: of the training set, for `scaled_error`.
    """
    variances = [model.decoder_variance]
    pixel_variance = pixel_variance_of(calibration, images)
    options: Any = dict(batch_size=batch_size, execution="loop", samples=samples)
    (scores,) = score_members(model, variables, images, key, pixel_variance, {}, variances, **options)
    return scores


def pixel_variance_of(calibration: "Calibration | None", images: DeviceImages) -> np.ndarray:
    """The calibrated variance of each pixel as devices take it, float32, in the shape of an example; 1 before calibration."""
    return np.ones(images.data_shape, np.float32) if calibration is None else calibration.variance_per_pixel.astype(np.float32)


def score_members(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    keys: Key[Array, "*members"],
    pixel_variances: Any,
    fields: Mapping[str, Any],
    decoder_variances: Sequence[DecoderVariance],
    *,
    batch_size: int,
    execution: Execution,
    samples: int = 1,
) -> Iterator[SplitScores]:
    """`score_split` of several models at once, whose variables are stacked along a leading axis of members.

    Args:
      model: of all members, but for the `fields` of its decoder variance.
      variables: stacked, divided over the member axis of the mesh.
      images: as for `score_split`, on a mesh of `sweep_mesh`.
      keys: one per member.
      pixel_variances: of `pixel_variance_of`, one per member.
      fields: of the decoder variance, those in which members differ, by name; one value per member.
      decoder_variances: of each member, in order; as many results are given.
      batch_size: images per device call.
      execution: 'scan' or 'vmap'; 'loop' for one model without an axis of members.
      samples: as for `score_split`.

    Yields:
      The scores of each member, in order.
    """
    score = _parallelized(model.clone(axis_name=None), images.mesh, execution)
    batches, scored = [], 0
    totals: Any = None
    for batch, sums in run_over(images, batch_size, lambda *b: score(variables, *b, keys, pixel_variances, fields), samples):
        # Every sample of an image has the same posterior: the first is enough.
        batches.append(batch if scored < len(images) else batch._replace(posterior_mean=batch.posterior_mean[..., :0, :]))
        scored += batch.rate.shape[-1]
        sums = jax.tree.map(np.float64, sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    for member, decoder_variance in enumerate(decoder_variances):
        own, sums = (batches, totals) if execution == "loop" else jax.tree.map(lambda leaf: leaf[member], (batches, totals))  # noqa: B023
        yield _split_scores(own, sums, len(images), samples, decoder_variance, isinstance(model.prior, StandardNormal))


def _split_scores(
    batches: Sequence[_ExampleScores],
    totals: Any,
    count: int,
    samples: int,
    decoder_variance: DecoderVariance,
    standard_normal: bool,
) -> SplitScores:
    """What the batches of one model say of the whole split, in float64."""

    def examples(name: str) -> np.ndarray:
        values = np.concatenate([getattr(batch, name) for batch in batches])[: samples * count]
        return values.astype(np.float64).reshape(samples, count)

    means = jax.tree.map(lambda total: np.asarray(total / (samples * count)), totals)
    scores = SplitScores(
        squared_error=examples("squared_error"),
        rate=examples("rate"),
        pixel_squared_error=means.pixel_squared_error,
        posterior_mean=np.concatenate([batch.posterior_mean for batch in batches])[:count].astype(np.float64),
        latent_rate=means.latent_rate,
        model_distortion=examples("distortion"),
        model_variance=float(examples("variance").mean()),
        scaled_error=examples("scaled_error"),
    )
    if not standard_normal:
        aggregate = scores.posterior_mean.var(axis=0) + means.latent_variance
        information = 0.5 * (np.log(aggregate) - means.latent_log_variance)
        scores = scores._replace(latent_rate=information, aggregate_variance=aggregate)
    batchwise = (scores.model_distortion.reshape(-1), scores.model_variance)
    errors = scores.squared_error.reshape(-1), scores.pixel_squared_error
    distortion, variance = decoder_variance.split_distortion(*errors, batchwise)
    return scores._replace(model_distortion=distortion.reshape(samples, count), model_variance=variance)


def optimal_variance_of_split(scores: SplitScores, over: str, floor: float) -> Any:
    """`MSE + v0` over the split: [S, N] for 'example', a number for 'batch', the shape of an example for 'pixel'."""
    if over == "pixel":
        return scores.pixel_squared_error + floor
    variance = scores.squared_error / scores.pixels + floor
    return variance if over == "example" else float(variance.mean())


def calibrate(scores: SplitScores, step: int, floor: float) -> Calibration:
    """The optimal variance of the training set from its scores."""
    per_pixel = optimal_variance_of_split(scores, "pixel", floor)
    return Calibration(step, float(per_pixel.mean()), per_pixel, floor)


def distortion_at(scores: SplitScores, variance: Any, floor: float) -> np.ndarray:
    """`D/2 log(2 pi v) + (SSE + D v0) / (2 v)` per example, nats, [S, N], for one variance or one per example ([S, N])."""
    pixels = scores.pixels
    return 0.5 * pixels * (LOG_2PI + np.log(variance)) + (scores.squared_error + pixels * floor) / (2 * variance)
