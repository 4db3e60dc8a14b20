"""The kind `Prior` and its modules' base: `log_prob`, `sample` and the `rate` of a posterior. Derive both for your own.

A prior is a Flax module, so that it may have parameters trained jointly with the model. The default rate is the unbiased
one-sample Monte Carlo estimate; a prior that knows the KL divergence in closed form overrides it.

Latents are [B, L], values nats. Everything is float32, whatever the precision of the networks.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax.errors import UserError, check_count
from bsvae_jax.objective import LOG_2PI, Kind, kl_to_standard_normal

if TYPE_CHECKING:
    import numpy as np

Latents = Float[Array, "batch latent"]
LogDensity = Callable[[Latents], Float[Array, " batch"]]


def gaussian_log_prob(z: Latents, mean: Latents, log_variance: Latents) -> Float[Array, " batch"]:
    """`log N(z; mean, exp(log_variance))`, nats per example, [B]."""
    standardized = jnp.square(z - mean) * jnp.exp(-log_variance)
    return -0.5 * jnp.sum(LOG_2PI + log_variance + standardized, axis=-1)


class PriorModule(nn.Module):
    """Base of the modules: p(z) over `latent_size` variables."""

    latent_size: int

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log p(z)`, nats, [B]."""
        raise NotImplementedError

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples of p(z), [count, L]."""
        raise NotImplementedError

    def density(self) -> LogDensity:
        """`log_prob` as it stands now: what it needs beside z is computed here, once."""
        return self.log_prob

    def rate(
        self, mean: Latents, log_variance: Latents, z: Latents, density: LogDensity | None = None
    ) -> Float[Array, " batch"]:
        """`KL(q(z|x) || p(z))` of q = N(mean, exp(log_variance)) given one sample z of it, nats, [B].

        Here the unbiased one-sample estimate `log q(z|x) - log p(z)`. `density`: of this prior, where the caller has it.
        """
        log_prior = checked_density(self, (density or self.density())(z), z)
        return gaussian_log_prob(z, mean, log_variance) - log_prior


def checked_density(prior: PriorModule, values: Float[Array, " batch"], z: Latents) -> Float[Array, " batch"]:
    """`log p(z)`, as it is; raises a UserError where it is not one value for each latent vector."""
    if jnp.shape(values) != z.shape[:1]:
        raise UserError(
            f"log_prob of {type(prior).__name__} must return a value in nats for each latent vector, shape {z.shape[:1]}, got "
            f"{jnp.shape(values)}; sum over the latents, not over the batch."
        )
    return values


@dataclass(frozen=True)
class Prior(Kind, abc.ABC):
    """Base of all priors: a frozen dataclass whose `build` makes a `PriorModule`.

    >>> class Wide(PriorModule):
    ...     "N(0, 4 I)."
    ...
    ...     def log_prob(self, z):
    ...         return gaussian_log_prob(z, jnp.zeros_like(z), jnp.full_like(z, jnp.log(4.0)))
    ...
    ...     def sample(self, key, count):
    ...         return 2.0 * jax.random.normal(key, (count, self.latent_size))
    >>> @dataclass(frozen=True)
    ... class WidePrior(Prior):
    ...     def build(self, latent_size, encoder=None, data_shape=None):
    ...         return Wide(latent_size)
    """

    latent_size: int | None = field(default=None, kw_only=True, repr=False, metadata={"of": "VAE"})
    """L, for a `VAE` of your own modules; a config has its own `latent_size`."""

    @abc.abstractmethod
    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """The module.

        Args:
          latent_size: L.
          encoder: the model's own, `(x, train) -> (mean, log_variance)`, for priors made of posteriors.
          data_shape: of one example.
        """

    def check(self, training_images: int) -> None:
        """Raise a UserError where this prior does not fit a training set of so many examples; by default it fits any."""

    def initial_parameters(self, training_images: "np.ndarray", seed: int) -> dict[str, Any] | None:
        """Training images, as stored, that parameters start from, by the parameter's name; None: the module's own start.

        Args:
          training_images: as stored, [N, ...].
          seed: of the run.
        """
        return None


class StandardNormalModule(PriorModule):
    """N(0, I), with the rate in closed form."""

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`-1/2 sum (log 2 pi + z^2)`, nats, [B]."""
        return -0.5 * jnp.sum(LOG_2PI + jnp.square(z), axis=-1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return jax.random.normal(key, (count, self.latent_size), jnp.float32)

    def rate(
        self, mean: Latents, log_variance: Latents, z: Latents, density: LogDensity | None = None
    ) -> Float[Array, " batch"]:
        """The exact KL divergence, nats, [B]; `z` is not used."""
        return kl_to_standard_normal(mean, log_variance)


@dataclass(frozen=True)
class StandardNormal(Prior):
    """p(z) = N(0, I); the rate is in closed form.

    >>> StandardNormal(16).build(16).latent_size
    16
    """

    latent_size: int | None = field(default=None, repr=False, metadata={"of": "VAE"})
    """L, for a `VAE` of your own modules; a config has its own `latent_size`."""

    def __post_init__(self) -> None:
        if self.latent_size is not None:
            check_count("prior.latent_size", self.latent_size)

    @property
    def name(self) -> str:
        """`standard_normal`."""
        return "standard_normal"

    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """N(0, I)."""
        return StandardNormalModule(latent_size)
