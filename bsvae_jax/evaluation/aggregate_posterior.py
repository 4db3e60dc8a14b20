"""Where the bits go: the rate split by the aggregate posterior q(z) = mean over the images of q(z|x).

    rate = I(x; z) + KL(q(z) || p(z))                                     Hoffman & Johnson (2016): "ELBO surgery"
    KL(q(z) || p(z)) = total correlation + sum_l KL(q(z_l) || p(z_l))     Chen et al. (2018), for a factorized prior

I is the index-code mutual information: what z says about which image it came from, at most log N. The second term is the
mismatch of prior and aggregate posterior. q(z) is evaluated as what it is, the mixture of all N posteriors of the set, at
samples of it; so nothing is biased but the estimates of its own sampling noise, and no minibatch estimator (minibatch-weighted
or -stratified sampling of Chen et al., whose bias grows with the rate) is needed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsvae_jax.objective import LOG_2PI

QUERIES = 2000
"""Samples at which the densities are evaluated, at most."""
ENTRIES = 2**23
"""Numbers of one device call, about; bounds the memory."""
RISE = 0.1
"""Nats by which I(x; z) may grow from half the images to all of them, and count as known."""


class AggregatePosterior(NamedTuple):
    """Log densities, nats, at Q samples z of the aggregate posterior; float64."""

    log_posterior: np.ndarray
    """`log q(z|x)` of the image it was drawn for, [Q]."""
    log_aggregate: np.ndarray
    """`log q(z)`, [Q]."""
    log_marginals: np.ndarray
    """`log q(z_l)` of each latent, [Q, L]."""
    log_prior: np.ndarray
    """`log p(z)`, [Q]."""
    log_prior_marginals: np.ndarray | None
    """`log p(z_l)`, [Q, L]; None where the prior does not factorize."""


@functools.partial(jax.jit, static_argnames="chunk")
def _log_densities(
    z: Float[Array, "queries latent"],
    mean: Float[Array, "images latent"],
    log_variance: Float[Array, "images latent"],
    chunk: int,
) -> tuple[Float[Array, " queries"], Float[Array, "queries latent"]]:
    """`log sum_j q(z|x_j)` and the same of each latent, chunks of queries one after the other."""
    precision = jnp.exp(-log_variance)

    def one(z: Float[Array, "chunk latent"]) -> Any:
        # Differences, not an expanded square: narrow posteriors would lose all digits.
        squares = jnp.square(z[:, None] - mean[None]) * precision[None]  # [chunk, N, L]
        each = -0.5 * (LOG_2PI + log_variance[None] + squares)
        return jax.nn.logsumexp(jnp.sum(each, axis=-1), axis=1), jax.nn.logsumexp(each, axis=1)

    queries = len(z)
    joint, marginal = jax.lax.map(one, jnp.resize(z, (-(-queries // chunk) * chunk, z.shape[1])).reshape(-1, chunk, z.shape[1]))
    return joint.reshape(-1)[:queries], marginal.reshape(-1, z.shape[1])[:queries]


def aggregate_posterior(
    z: np.ndarray, mean: np.ndarray, log_variance: np.ndarray, log_prior: np.ndarray, factorized_normal_prior: bool
) -> AggregatePosterior:
    """Evaluate the aggregate posterior of N images at their own samples.

    Args:
      z: one sample of each q(z|x), [N, L]; evenly spaced ones are used where they are more than `QUERIES`.
      mean: of every q(z|x), [N, L].
      log_variance: the same.
      log_prior: `log p(z)` at every z, nats, [N].
      factorized_normal_prior: whether p(z) = N(0, I), whose marginals are known.
    """
    count, latents = mean.shape
    chosen = np.unique(np.linspace(0, count - 1, min(QUERIES, count)).astype(int))
    z, own_mean, own_log_variance = z[chosen], mean[chosen], log_variance[chosen]
    chunk = max(1, min(len(z), ENTRIES // (count * latents)))
    arrays = (np.asarray(array, np.float32) for array in (z, mean, log_variance))
    joint, marginal = (np.asarray(part, np.float64) - np.log(count) for part in _log_densities(*arrays, chunk=chunk))
    z, own_mean, own_log_variance = (np.asarray(array, np.float64) for array in (z, own_mean, own_log_variance))
    own = -0.5 * (LOG_2PI + own_log_variance + (z - own_mean) ** 2 * np.exp(-own_log_variance))
    prior_marginals = -0.5 * (LOG_2PI + z**2) if factorized_normal_prior else None
    return AggregatePosterior(own.sum(axis=1), joint, marginal, np.asarray(log_prior, np.float64)[chosen], prior_marginals)


class RateSplit(NamedTuple):
    """The parts of the rate, nats, at each of the Q samples; their means are the parts, their spread the standard errors."""

    mutual_information: np.ndarray
    """`log q(z|x) - log q(z)`, [Q]; the mean is I(x; z)."""
    aggregate_kl: np.ndarray
    """`log q(z) - log p(z)`, [Q]; the mean is KL(q(z) || p(z))."""
    total_correlation: np.ndarray | None
    """`log q(z) - sum_l log q(z_l)`, [Q]; None where the prior does not factorize."""
    dimension_kl: np.ndarray | None
    """`log q(z_l) - log p(z_l)`, [Q, L]; the mean is KL(q(z_l) || p(z_l))."""


def split_rate(densities: AggregatePosterior) -> RateSplit:
    """The parts of the rate from the densities."""
    marginals = densities.log_prior_marginals
    return RateSplit(
        densities.log_posterior - densities.log_aggregate,
        densities.log_aggregate - densities.log_prior,
        None if marginals is None else densities.log_aggregate - densities.log_marginals.sum(axis=1),
        None if marginals is None else densities.log_marginals - marginals,
    )


def rate_and_half_information(
    z: np.ndarray, mean: np.ndarray, log_variance: np.ndarray, log_prior: np.ndarray, factorized_normal_prior: bool
) -> tuple[RateSplit, float]:
    """The parts of the rate of N images, and I(x; z) of every other image alone, nats; arguments as for `aggregate_posterior`.

    Narrow posteriors that hardly overlap are no picture of q(z): I(x; z) then rises with N, at last as log N does.
    """
    whole, half = (
        split_rate(aggregate_posterior(z[every], mean[every], log_variance[every], log_prior[every], factorized_normal_prior))
        for every in (slice(None), slice(None, None, 2))
    )
    return whole, float(half.mutual_information.mean())
