"""Gaussian mixtures as priors: of free components, and of posteriors at learned inputs (VampPrior)."""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax.errors import UserError, check_choice, check_count
from bsvae_jax.models.layers import HIGHEST
from bsvae_jax.models.priors.prior import Latents, LogDensity, Prior, PriorModule
from bsvae_jax.objective import LOG_2PI


@dataclass(frozen=True)
class Mixture(Prior):
    """Gaussian mixture with learned weights, means and covariances."""

    components: int = 10
    """Number of Gaussians."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of each Gaussian; full has L (L + 1) / 2 numbers each."""

    def __post_init__(self) -> None:
        check_count("prior.components", self.components)
        check_choice("prior.covariance", self.covariance, ("diagonal", "full"))

    @property
    def name(self) -> str:
        """`mixture-10`, `mixture-10-full`."""
        return f"mixture-{self.components}" + ("" if self.covariance == "diagonal" else f"-{self.covariance}")

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"mixture of {self.components}" + (", full covariance" if self.covariance == "full" else "")

    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """Diagonal or full covariances."""
        kind = MixtureModule if self.covariance == "diagonal" else FullMixtureModule
        return kind(latent_size, self.components)


@dataclass(frozen=True)
class VampPrior(Prior):
    """Even mixture of the encoder's posteriors at learned images (Tomczak & Welling 2018), which begin as training images."""

    pseudo_inputs: int = 100
    """Number of learned images; the paper has 500 on MNIST."""

    def __post_init__(self) -> None:
        check_count("prior.pseudo_inputs", self.pseudo_inputs)

    @property
    def name(self) -> str:
        """`vamp-100`."""
        return f"vamp-{self.pseudo_inputs}"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"VampPrior of {self.pseudo_inputs}"

    def check(self, training_images: int) -> None:
        """Raise a UserError if there are more pseudo-inputs than training images, of which they begin as copies."""
        if self.pseudo_inputs > training_images:
            raise UserError(
                f"prior.pseudo_inputs {self.pseudo_inputs} exceeds the {training_images} training images, of which the "
                "pseudo-inputs begin as copies; choose fewer."
            )

    def initial_parameters(self, training_images: np.ndarray, seed: int) -> dict[str, Any] | None:
        """Training images chosen by the seed."""
        chosen = np.random.default_rng(seed).choice(len(training_images), self.pseudo_inputs, replace=False)
        return {"pseudo_inputs": training_images[np.sort(chosen)]}

    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """Needs the encoder and the shape of the data."""
        assert encoder is not None, "its components are posteriors"
        if data_shape is None:
            raise UserError("VampPrior needs the shape of one example; give VAE(..., data_shape=(28, 28, 1)), say.")
        return VampPriorModule(latent_size, encoder, data_shape, self.pseudo_inputs)


class Components(NamedTuple):
    """K Gaussians with diagonal covariances."""

    mean: Float[Array, "components latent"]
    log_variance: Float[Array, "components latent"]
    log_weight: Float[Array, " components"]


def mixture_log_prob(z: Latents, components: Components) -> Float[Array, " batch"]:
    """`log sum_k w_k N(z; mean_k, exp(log_variance_k))`, nats, [B]."""
    mean, log_variance = components.mean[None], components.log_variance[None]
    # Differences, not an expanded square: narrow components would lose all digits.
    squares = jnp.square(z[:, None] - mean) * jnp.exp(-log_variance)  # [B, K, L]
    each = -0.5 * jnp.sum(LOG_2PI + log_variance + squares, axis=-1)
    return jax.nn.logsumexp(each + components.log_weight[None], axis=1)


def mixture_sample(key: Key[Array, ""], components: Components, count: int) -> Float[Array, "count latent"]:
    """`count` samples of the mixture, [count, L]."""
    which_key, noise_key = jax.random.split(key)
    which = jax.random.categorical(which_key, components.log_weight.astype(jnp.float32), shape=(count,))
    noise = jax.random.normal(noise_key, (count, components.mean.shape[1]), jnp.float32)
    return components.mean[which] + jnp.exp(0.5 * components.log_variance[which]) * noise


class MixtureModule(PriorModule):
    """Gaussian mixture with learned weights, means and diagonal covariances.

    Before training the means are spread like N(0, I/2) and every variance is 1/2: together about N(0, I).
    """

    components: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        shape = (self.components, self.latent_size)
        self.logits = self.param("logits", nn.initializers.zeros, (self.components,), jnp.float32)
        self.mean = self.param("mean", nn.initializers.normal(math.sqrt(0.5)), shape, jnp.float32)
        self.log_variance = self.param("log_variance", nn.initializers.constant(math.log(0.5)), shape, jnp.float32)

    def parts(self) -> Components:
        """The Gaussians."""
        return Components(self.mean, self.log_variance, jax.nn.log_softmax(self.logits))

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log sum_k w_k N(z; mean_k, exp(log_variance_k))`, nats, [B]."""
        return mixture_log_prob(z, self.parts())

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return mixture_sample(key, self.parts(), count)


class FullMixtureModule(PriorModule):
    """Gaussian mixture whose covariances are full: `(z - mean_k) F_k` is N(0, I) for an upper triangular factor `F_k`.

    `F_k F_k^T` is the precision; its diagonal is kept as a logarithm. Begins as `Mixture` does.
    """

    components: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        shape = (self.components, self.latent_size)
        self.logits = self.param("logits", nn.initializers.zeros, (self.components,), jnp.float32)
        self.mean = self.param("mean", nn.initializers.normal(math.sqrt(0.5)), shape, jnp.float32)
        self.log_diagonal = self.param("log_diagonal", nn.initializers.constant(-0.5 * math.log(0.5)), shape, jnp.float32)
        self.upper = self.param("upper", nn.initializers.zeros, (*shape, self.latent_size), jnp.float32)

    def factors(self) -> Float[Array, "components latent latent"]:
        """`F_k`; of `upper`, what lies above the diagonal counts."""
        diagonal = jnp.eye(self.latent_size)[None] * jnp.exp(self.log_diagonal)[:, None]
        return jnp.triu(self.upper, 1) + diagonal

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log sum_k w_k N(z; mean_k, (F_k F_k^T)^-1)`, nats, [B]."""
        whitened = jnp.einsum("bkl,klm->bkm", z[:, None] - self.mean[None], self.factors(), precision=HIGHEST)
        each = jnp.sum(self.log_diagonal[None] - 0.5 * (LOG_2PI + jnp.square(whitened)), axis=-1)
        return jax.nn.logsumexp(each + jax.nn.log_softmax(self.logits)[None], axis=1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        which_key, noise_key = jax.random.split(key)
        which = jax.random.categorical(which_key, self.logits, shape=(count,))
        noise = jax.random.normal(noise_key, (count, self.latent_size), jnp.float32)
        solve = functools.partial(jax.scipy.linalg.solve_triangular, trans=1)
        return self.mean[which] + jax.vmap(solve)(self.factors()[which], noise)


class VampPriorModule(PriorModule):
    """`p(z) = 1/K sum_k q(z|u_k)` of K learned images u_k (Tomczak & Welling 2018, eq. 9).

    The encoder is the model's own, and learns from both of its roles. At the pseudo-inputs its BatchNorm uses the running
    statistics from before the batch, in training too: so they do not disturb the statistics of the data, p(z) does not depend
    on the other images of the batch, and training and evaluation speak of one density. Pseudo-inputs are not held to [0, 1].
    """

    encoder: nn.Module
    data_shape: tuple[int, ...]
    count: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        # A run puts training images in their place (`training.create_state`).
        initial = lambda key, shape: 0.5 + 0.05 * jax.random.normal(key, shape, jnp.float32)  # noqa: E731
        self.pseudo_inputs = self.param("pseudo_inputs", initial, (self.count, *self.data_shape))

    def parts(self) -> Components:
        """The posteriors at the pseudo-inputs, with even weights."""
        mean, log_variance = self.encoder(self.pseudo_inputs, False)
        return Components(mean, log_variance, jnp.full(self.count, -math.log(self.count)))

    def density(self) -> LogDensity:
        """`log p(z)` for the encoder as it stands now: to be called before a batch is encoded in training."""
        return functools.partial(mixture_log_prob, components=self.parts())

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log 1/K sum_k q(z|u_k)`, nats, [B]."""
        return self.density()(z)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return mixture_sample(key, self.parts(), count)
