"""A second pass over a split, for figures and for numbers that need a calibrated variance: residuals, SSIM, the posteriors.

Takes the same posterior sample of every image as `scoring` does, so the two passes speak of the same reconstructions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, parallelize
from bsvae_jax.evaluation.run_over import joined, run_over
from bsvae_jax.evaluation.scores import Calibration
from bsvae_jax.models.vae import VAE
from bsvae_jax.random import example_keys, uniform_per_example

LIMIT = 8.0
"""Standardized residuals beyond +-LIMIT fall into the outermost bins."""
BINS_PER_UNIT = 32
BINS = int(2 * LIMIT * BINS_PER_UNIT)
WINDOW = 11
"""Pixels of the Gaussian window of SSIM (Wang et al. 2004); smaller for smaller images."""

STANDARDIZED_BY = ("one variance", "variance per pixel", "variance per image")
"""By which standard deviation residuals are divided: calibrated on the training set, the same per pixel, sigma*(x)."""


class ImageStatistics(NamedTuple):
    """Of N images with L latents; one posterior sample each."""

    ssim: np.ndarray | None
    """Structural similarity of image and decoder mean, at most 1, [N]; None of what is no image in [0, 1]."""
    z: np.ndarray
    """[N, L]"""
    posterior_mean: np.ndarray
    """[N, L]"""
    posterior_log_variance: np.ndarray
    """[N, L]"""
    log_prior: np.ndarray
    """`log p(z)`, nats, [N]."""
    residuals: np.ndarray
    """Counts of standardized residuals of `x + u` in `BINS` equal bins over +-LIMIT, a row for each of `STANDARDIZED_BY`;
    u is dequantization noise, which the variances include."""


class _Batch(NamedTuple):
    ssim: Float[Array, " batch"] | None
    z: Float[Array, "batch latent"]
    posterior_mean: Float[Array, "batch latent"]
    posterior_log_variance: Float[Array, "batch latent"]
    log_prior: Float[Array, " batch"]
    residuals: Int[Array, "kinds bins"]


def window(height: int, width: int) -> int:
    """Pixels of the window of SSIM for images of this size: an odd number, at most `WINDOW`."""
    size = min(WINDOW, height, width)
    return size - 1 + size % 2


def structural_similarity(
    x: Float[Array, "batch height width channels"], mean: Float[Array, "batch height width channels"]
) -> Float[Array, " batch"]:
    """SSIM per image (Wang et al. 2004: Gaussian window, sigma 1.5, intensities in [0, 1]), averaged over channels, [B]."""
    return dm_pix.ssim(x, mean, max_val=1.0, filter_size=window(x.shape[1], x.shape[2]))


def _histogram(values: Array, counted: Array) -> Array:
    """Counts per bin, of the images that count."""
    bins = jnp.clip(jnp.floor((values + LIMIT) * BINS_PER_UNIT), 0, BINS - 1).astype(jnp.int32)
    weights = jnp.broadcast_to(counted.reshape(-1, *(1,) * (values.ndim - 1)), values.shape).astype(jnp.int32)
    return jnp.zeros(BINS, jnp.int32).at[bins.reshape(-1)].add(weights.reshape(-1))


def _batch(
    variables: Any,
    stored: Examples,
    indices: Int[Array, " batch"],
    counted: Float[Array, " batch"],
    key: Key[Array, ""],
    variance: Float[Array, ""],
    variance_per_pixel: Float[Array, "1 *pixels"],
    *,
    model: VAE,
    similarity: bool,
) -> _Batch:
    x, labels = stored.inputs()
    keys = example_keys(key, indices)
    output: Any = model.apply(variables, x, keys, labels=labels)
    log_prior: Any = model.apply(variables, output.z, method="log_prior")
    mean = output.decoded.mean
    residual = x + stored.bin_width * uniform_per_example(keys, 1, x.shape[1:]) - mean
    own_variance = jnp.mean(jnp.square(x - mean), axis=tuple(range(1, x.ndim)), keepdims=True) + stored.bin_width**2 / 12
    counts = [_histogram(residual / jnp.sqrt(v), counted) for v in (variance, variance_per_pixel, own_variance)]
    return _Batch(
        ssim=structural_similarity(x, mean) if similarity else None,
        z=output.z,
        posterior_mean=output.posterior.mean,
        posterior_log_variance=output.posterior.log_variance,
        log_prior=log_prior,
        residuals=jax.lax.psum(jnp.stack(counts), DATA_AXIS),
    )


@functools.cache
def _parallelized(model: VAE, similarity: bool, mesh: Mesh) -> Any:
    shares: Any = dict.fromkeys(_Batch._fields, SHARDED) | {"residuals": REPLICATED}
    if not similarity:
        shares["ssim"] = None
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    batch = functools.partial(_batch, model=model, similarity=similarity)
    return parallelize(batch, mesh, specs, _Batch(**shares))


def image_statistics(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    key: Key[Array, ""],
    calibration: Calibration,
    *,
    batch_size: int,
    similarity: bool = True,
    progress: Callable[[int], None] | None = None,
) -> ImageStatistics:
    """Pass over every image of a split once.

    Args:
      model: a VAE.
      variables: replicated over the mesh of the images.
      images: of the split.
      key: that of `score_split`.
      calibration: of the training set.
      batch_size: images per device call, rounded up to a multiple of the devices.
      similarity: whether they are images in [0, 1], of which there is an SSIM.
      progress: told the number of images done since it was told before.
    """
    count = len(images)
    compute = _parallelized(model.clone(axis_name=None), similarity, images.mesh)
    variances = (np.float32(calibration.variance), calibration.variance_per_pixel.astype(np.float32)[None])
    batches = []
    residuals = np.zeros((len(STANDARDIZED_BY), BINS), np.int64)
    for batch in run_over(images, batch_size, lambda *given: compute(variables, *given, key, *variances)):
        residuals += batch.residuals
        batches.append(batch._replace(residuals=None))
        if progress is not None:
            done = len(batches) * len(batch.z)
            progress(min(done, count) - (done - len(batch.z)))
    per_image = jax.tree.map(np.float64, joined(batches, count))
    return ImageStatistics(*per_image)._replace(residuals=residuals)


def _cumulative(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the bins, and the share of residuals below each."""
    return np.linspace(-LIMIT, LIMIT, BINS + 1), np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])


def residual_quantiles(counts: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles of standardized residuals from one row of `ImageStatistics.residuals`, linear within bins."""
    edges, below = _cumulative(counts)
    return np.interp(probabilities, below, edges)


def residual_coverage(counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Share of standardized residuals within +-width, for each width < `LIMIT`, linear within bins."""
    edges, below = _cumulative(counts)
    return np.interp(widths, edges, below) - np.interp(-widths, edges, below)
