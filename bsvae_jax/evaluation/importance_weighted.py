"""The importance-weighted bound of the log-likelihood (Burda et al. 2016), with any number of samples in bounded memory.

    log p(x) >= E log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x),   z_k ~ q(z|x)

It is the ELBO at K = 1, rises with K and tends to log p(x). Only a density has one: the decoder variance is the model's own
where that does not depend on x, or frozen (`Density`). Samples are taken in chunks whose weights are summed as they come, in
float32 and in the log domain; each has its own key, by image and number, so the chunks, batches and devices do not matter.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, padded_batches, parallelize
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.scores import evaluation_batch
from bsvae_jax.models.priors import gaussian_log_prob
from bsvae_jax.models.vae import VAE
from bsvae_jax.objective import gaussian_nll
from bsvae_jax.random import example_keys, uniform_per_example

MOST_SAMPLES = 5000
CHUNK = 64
"""Samples of one image in a device call, at most."""
DECODED_AT_ONCE = 1024
"""Images decoded in a device call, per device, fewer of large ones: what bounds the memory."""


class Density(NamedTuple):
    """A decoder density of which the bound is taken."""

    frozen: bool
    """With one frozen decoder variance; else with the model's own, which must not depend on x."""
    dequantized: bool
    """Of `x + u`, one `u ~ U(-step/2, step/2)` per pixel, instead of the grid point x."""


def has_own_density(model: VAE) -> bool:
    """Whether the model's own decoder variance gives a density of x: it does not with an optimal variance."""
    return model.decoder_variance.is_density


class ImportanceScores(NamedTuple):
    """Importance-weighted bounds of N images; float64."""

    log_likelihood: np.ndarray
    """With all K samples, nats, [densities, N]."""
    curve: np.ndarray
    """Averaged over the images, with 1 ... K samples, nats, [densities, K]."""
    effective_samples: np.ndarray
    """`(sum w)^2 / sum w^2` of the K weights, 1 ... K, [densities, N]; near 1, the bound still depends on luck."""


class _Sums(NamedTuple):
    """Logarithms of the weights' sum and of their squares' sum, so far."""

    weights: Float[Array, "densities batch"]
    squares: Float[Array, "densities batch"]


def _encode(variables: Any, stored: Examples, *, model: VAE) -> Any:
    x, labels = stored.inputs()
    posterior: Any = model.apply(variables, x, labels=labels, method="encode")
    return tuple(posterior)


def _add_samples(
    variables: Any,
    stored: Examples,
    indices: Int[Array, " batch"],
    counted: Float[Array, " batch"],
    posterior: Any,
    key: Key[Array, ""],
    sums: _Sums,
    frozen_variance: Float[Array, ""],
    start: Int[Array, ""],
    samples: Int[Array, ""],
    *,
    model: VAE,
    densities: tuple[Density, ...],
    chunk: int,
) -> tuple[_Sums, Float[Array, "densities chunk"]]:
    """Samples `start ... start + chunk` of each image, those beyond `samples` without weight."""
    mean, log_variance = posterior
    keys = example_keys(key, indices)
    numbers = start + jnp.arange(chunk)

    def noise_of(own: Key[Array, ""]) -> Array:  # [chunk, L]
        # 0 is the key of the dequantization noise
        return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(own, number + 1), mean.shape[1:], jnp.float32))(
            numbers
        )

    noise = jnp.swapaxes(jax.vmap(noise_of)(keys), 0, 1)  # [chunk, B, L]
    z = (mean[None] + jnp.exp(0.5 * log_variance)[None] * noise).reshape(-1, mean.shape[-1])  # [chunk * B, L]
    repeated = [jnp.broadcast_to(part, noise.shape).reshape(z.shape) for part in posterior]
    log_prior: Any = model.apply(variables, z, method="log_prior")
    log_ratio = log_prior - gaussian_log_prob(z, *repeated)
    x, labels = stored.inputs()
    own = None if labels is None else jnp.tile(labels, chunk)
    decoded: Any = model.apply(variables, z, labels=own, method="decode")
    uniform = uniform_per_example(keys, 0, x.shape[1:])

    def log_weights(density: Density) -> Array:
        target = x + stored.bin_width * uniform if density.dequantized else x
        target = jnp.broadcast_to(target, (chunk, *x.shape)).reshape(decoded.mean.shape)
        if density.frozen:
            nll = gaussian_nll(target, decoded.mean, frozen_variance)
        else:
            nll = model.decoder_variance.nll(jnp.square(target - decoded.mean), decoded.log_variance)
        return (log_ratio - nll).reshape(chunk, len(x))

    weights = jnp.stack([log_weights(density) for density in densities])  # [densities, chunk, B]
    weights = jnp.where((numbers < samples)[None, :, None], weights, -jnp.inf)
    running = jax.lax.cumlogsumexp(jnp.concatenate([sums.weights[:, None], weights], axis=1), axis=1)[:, 1:]
    bounds = running - jnp.log(numbers + 1.0)[None, :, None]
    curve = jax.lax.psum(jnp.sum(bounds * counted[None, None], axis=-1), DATA_AXIS)
    squares = jnp.logaddexp(sums.squares, jax.nn.logsumexp(2 * weights, axis=1))
    return _Sums(running[:, -1], squares), curve


@functools.cache
def _parallelized(model: VAE, densities: tuple[Density, ...], chunk: int, mesh: Mesh) -> tuple[Any, Any]:
    encode = parallelize(functools.partial(_encode, model=model), mesh, (REPLICATED, SHARDED), (SHARDED, SHARDED))
    add = functools.partial(_add_samples, model=model, densities=densities, chunk=chunk)
    per_image: Any = _Sums(*[P(None, DATA_AXIS)] * 2)  # type: ignore[arg-type]
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED, (SHARDED, SHARDED), REPLICATED, per_image, *[REPLICATED] * 3)
    return encode, parallelize(add, mesh, specs, (per_image, REPLICATED), donate=(6,))


def check_samples(samples: int) -> None:
    """Raise a UserError unless the number of importance samples lies in 1 ... 5,000."""
    if not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
        raise UserError(f"The number of importance samples must lie in 1 ... {MOST_SAMPLES:,}, got {samples!r}.")


class Partial(NamedTuple):
    """How far the bound of a split has come: what `importance_weighted` may be continued from."""

    done: int
    log_likelihood: np.ndarray
    curve_sum: np.ndarray
    effective_samples: np.ndarray


def importance_weighted(
    model: VAE,
    variables: Mapping[str, Any],
    images: DeviceImages,
    key: Key[Array, ""],
    densities: Sequence[Density],
    frozen_variance: float,
    samples: int,
    *,
    count: int | None = None,
    partial: Partial | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[Partial], None] | None = None,
    keep_every: float = 30.0,
) -> ImportanceScores:
    """The bound with exactly `samples` samples per image, under each density.

    Args:
      model: a VAE whose own variance is not optimal, where a density asks for it.
      variables: replicated over the mesh of the images.
      images: of the split.
      key: decides the samples; each image takes its own by its position.
      densities: at least one; they share their samples.
      frozen_variance: of the densities that freeze one, squared intensity.
      samples: K, 1 to 5,000.
      count: of the first images; None: all.
      partial: from an interrupted call with the same arguments.
      progress: told the number of images done since it was told before.
      keep: given the state of things every `keep_every` seconds, between device calls.
      keep_every: seconds.

    Raises:
      UserError: a number of samples out of range, or the model's own variance is asked for where it is not a density.
    """
    check_samples(samples)
    if not all(density.frozen for density in densities) and not has_own_density(model):
        raise UserError("With an optimal decoder variance the model's likelihood is not a density; freeze a variance.")
    count = len(images) if count is None else min(count, len(images))
    at_once = evaluation_batch(images.data_shape, DECODED_AT_ONCE)
    chunk = min(samples, CHUNK, at_once)
    batch = (at_once // chunk) * images.mesh.shape[DATA_AXIS]
    encode, add = _parallelized(model.clone(axis_name=None), tuple(densities), chunk, images.mesh)
    state = partial or Partial(
        0, np.zeros((len(densities), 0)), np.zeros((len(densities), samples)), np.zeros((len(densities), 0))
    )
    kept = time.monotonic()
    for indices, counted in padded_batches(images.mesh, count, batch, state.done):
        stored = images.batch(indices)
        posterior = tuple(encode(variables, stored))
        sums: Any = _Sums(*(jnp.full((len(densities), len(indices)), -jnp.inf, jnp.float32) for _ in range(2)))
        curves = []
        for first in range(0, samples, chunk):
            numbers = (np.float32(frozen_variance), np.int32(first), np.int32(samples))
            sums, curve = add(variables, stored, indices, counted, posterior, key, sums, *numbers)
            curves.append(curve)
        fresh = int(counted.sum())
        state = _with_batch(state, jax.device_get(sums), jax.device_get(curves), fresh, samples)
        if progress is not None:
            progress(fresh)
        if keep is not None and time.monotonic() - kept > keep_every:
            keep(state)
            kept = time.monotonic()
    return ImportanceScores(state.log_likelihood, state.curve_sum / count, state.effective_samples)


def _with_batch(state: Partial, sums: _Sums, curves: list[np.ndarray], fresh: int, samples: int) -> Partial:
    weights, squares = (np.asarray(part, np.float64)[:, :fresh] for part in sums)
    curve = np.concatenate(curves, axis=1).astype(np.float64)[:, :samples]
    return Partial(
        state.done + fresh,
        np.concatenate([state.log_likelihood, weights - np.log(samples)], axis=1),
        state.curve_sum + curve,
        np.concatenate([state.effective_samples, np.exp(2 * weights - squares)], axis=1),
    )
