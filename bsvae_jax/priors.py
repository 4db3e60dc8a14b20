"""Priors p(z) behind one interface: `log_prob`, `sample` and the `rate` of a posterior.

A prior is a Flax module, so that it may have parameters trained jointly with the model. The default rate is the unbiased
one-sample Monte Carlo estimate; a prior that knows the KL divergence in closed form overrides it.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax import config
from bsvae_jax.objective import LOG_2PI, kl_to_standard_normal

Latents = Float[Array, "batch latent"]


def gaussian_log_prob(z: Latents, mean: Latents, log_variance: Latents) -> Float[Array, " batch"]:
    """`log N(z; mean, exp(log_variance))`, nats per example, [B]."""
    standardised = jnp.square(z - mean) * jnp.exp(-log_variance)
    return -0.5 * jnp.sum(LOG_2PI + log_variance + standardised, axis=-1)


class Prior(nn.Module):
    """Base class: p(z) over `latent_size` variables."""

    latent_size: int

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log p(z)`, nats, [B]."""
        raise NotImplementedError

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples of p(z), [count, L]."""
        raise NotImplementedError

    def rate(self, mean: Latents, log_variance: Latents, z: Latents) -> Float[Array, " batch"]:
        """`KL(q(z|x) || p(z))` of q = N(mean, exp(log_variance)) given one sample z of it, nats, [B].

        Here the unbiased one-sample estimate `log q(z|x) - log p(z)`.
        """
        return gaussian_log_prob(z, mean, log_variance) - self.log_prob(z)


class StandardNormal(Prior):
    """N(0, I), with the rate in closed form."""

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`-1/2 sum (log 2 pi + z^2)`, nats, [B]."""
        return -0.5 * jnp.sum(LOG_2PI + jnp.square(z), axis=-1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return jax.random.normal(key, (count, self.latent_size))

    def rate(self, mean: Latents, log_variance: Latents, z: Latents) -> Float[Array, " batch"]:
        """The exact KL divergence, nats, [B]; `z` is not used."""
        return kl_to_standard_normal(mean, log_variance)


def build(prior: config.Prior, latent_size: int) -> Prior:
    """The Flax module of a prior config."""
    match prior:
        case config.StandardNormal():
            return StandardNormal(latent_size)
