"""Priors p(z) behind one interface: `log_prob`, `sample` and the `rate` of a posterior.

A prior is a Flax module, so that it may have parameters trained jointly with the model. The default rate is the unbiased
one-sample Monte Carlo estimate; a prior that knows the KL divergence in closed form overrides it.

Latents are [B, L], values nats. Everything is float32, whatever the precision of the networks.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax import config
from bsvae_jax.models.flow_matching import Velocity, integrate, log_density
from bsvae_jax.models.layers import HIGHEST, ZEROS, dense
from bsvae_jax.models.velocity import VelocityNetwork
from bsvae_jax.objective.elbo import LOG_2PI, kl_to_standard_normal

Latents = Float[Array, "batch latent"]
LogDensity = Callable[[Latents], Float[Array, " batch"]]

MOST_LOG_SCALE = 2.0
"""A coupling layer stretches a latent by a factor between exp(-2) and exp(2): its inverse cannot lose the digits."""

EXACT_LATENTS = 32
"""Up to so many, the density of flow matching takes every derivative; beyond, it is estimated with `PROBES` probes."""
PROBES = 1


def gaussian_log_prob(z: Latents, mean: Latents, log_variance: Latents) -> Float[Array, " batch"]:
    """`log N(z; mean, exp(log_variance))`, nats per example, [B]."""
    standardised = jnp.square(z - mean) * jnp.exp(-log_variance)
    return -0.5 * jnp.sum(LOG_2PI + log_variance + standardised, axis=-1)


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
    which = jax.random.categorical(which_key, components.log_weight, shape=(count,))
    noise = jax.random.normal(noise_key, (count, components.mean.shape[1]))
    return components.mean[which] + jnp.exp(0.5 * components.log_variance[which]) * noise


class Prior(nn.Module):
    """Base class: p(z) over `latent_size` variables."""

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
        return gaussian_log_prob(z, mean, log_variance) - (density or self.density())(z)


class StandardNormal(Prior):
    """N(0, I), with the rate in closed form."""

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`-1/2 sum (log 2 pi + z^2)`, nats, [B]."""
        return -0.5 * jnp.sum(LOG_2PI + jnp.square(z), axis=-1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return jax.random.normal(key, (count, self.latent_size))

    def rate(
        self, mean: Latents, log_variance: Latents, z: Latents, density: LogDensity | None = None
    ) -> Float[Array, " batch"]:
        """The exact KL divergence, nats, [B]; `z` is not used."""
        return kl_to_standard_normal(mean, log_variance)


# --- Mixtures ---------------------------------------------------------------------------------------------------------


class Mixture(Prior):
    """Gaussian mixture with learned weights, means and diagonal covariances.

    Before training the means are spread like N(0, I/2) and every variance is 1/2: together about N(0, I).
    """

    components: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        shape = (self.components, self.latent_size)
        self.logits = self.param("logits", nn.initializers.zeros, (self.components,))
        self.mean = self.param("mean", nn.initializers.normal(math.sqrt(0.5)), shape)
        self.log_variance = self.param("log_variance", nn.initializers.constant(math.log(0.5)), shape)

    def parts(self) -> Components:
        """The Gaussians."""
        return Components(self.mean, self.log_variance, jax.nn.log_softmax(self.logits))

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log sum_k w_k N(z; mean_k, exp(log_variance_k))`, nats, [B]."""
        return mixture_log_prob(z, self.parts())

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return mixture_sample(key, self.parts(), count)


class FullMixture(Prior):
    """Gaussian mixture whose covariances are full: `(z - mean_k) F_k` is N(0, I) for an upper triangular factor `F_k`.

    `F_k F_k^T` is the precision; its diagonal is kept as a logarithm. Begins as `Mixture` does.
    """

    components: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        shape = (self.components, self.latent_size)
        self.logits = self.param("logits", nn.initializers.zeros, (self.components,))
        self.mean = self.param("mean", nn.initializers.normal(math.sqrt(0.5)), shape)
        self.log_diagonal = self.param("log_diagonal", nn.initializers.constant(-0.5 * math.log(0.5)), shape)
        self.upper = self.param("upper", nn.initializers.zeros, (*shape, self.latent_size))

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
        noise = jax.random.normal(noise_key, (count, self.latent_size))
        solve = functools.partial(jax.scipy.linalg.solve_triangular, trans=1)
        return self.mean[which] + jax.vmap(solve)(self.factors()[which], noise)


class VampPrior(Prior):
    """`p(z) = 1/K sum_k q(z|u_k)` of K learned images u_k (Tomczak & Welling 2018, eq. 9).

    The encoder is the model's own, and learns from both of its roles. At the pseudo-inputs its BatchNorm uses the running
    statistics from before the batch, in training too: so they do not disturb the statistics of the data, p(z) does not depend
    on the other images of the batch, and training and evaluation speak of one density. Pseudo-inputs are not held to [0, 1].
    """

    encoder: nn.Module
    image_shape: tuple[int, int, int]
    count: int

    def setup(self) -> None:
        """The parameters; called by Flax."""
        # A run puts training images in their place (`training.create_state`).
        initial = lambda key, shape: 0.5 + 0.05 * jax.random.normal(key, shape)  # noqa: E731
        self.pseudo_inputs = self.param("pseudo_inputs", initial, (self.count, *self.image_shape))

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


# --- Flow -------------------------------------------------------------------------------------------------------------


class Coupling(nn.Module):
    """Shift and log-scale of the latents that a coupling layer changes, from those that it keeps."""

    width: int

    @nn.compact
    def __call__(self, kept: Latents, changed: Float[Array, "1 latent"]) -> tuple[Latents, Latents]:
        """`kept` is 0 where `changed` is 1; both results are 0 where it is 0, [B, L] each."""
        hidden = kept
        for _ in range(2):
            hidden = nn.silu(dense(self.width)(hidden))
        # Zeros: a layer begins as the identity.
        outputs = dense(2 * kept.shape[1], name="outputs", start=ZEROS)(hidden)
        shift, raw = jnp.split(outputs, 2, axis=-1)
        return shift * changed, MOST_LOG_SCALE * jnp.tanh(raw / MOST_LOG_SCALE) * changed


class Flow(Prior):
    """N(0, I) seen through affine coupling layers (real NVP, Dinh et al. 2017) and a scale and origin of each latent.

    A layer changes half of the latents, `u exp(s) + t` with s and t of the other half; halves take turns, every second latent
    first, then the first and second halves.
    """

    layers: int
    width: int

    def setup(self) -> None:
        """The parts; called by Flax."""
        self.origin = self.param("origin", nn.initializers.zeros, (self.latent_size,))
        self.log_scale = self.param("log_scale", nn.initializers.zeros, (self.latent_size,))
        self.couplings = [Coupling(self.width) for _ in range(self.layers)]

    def _changed(self, layer: int) -> Float[Array, "1 latent"]:
        positions = jnp.arange(self.latent_size)
        first = positions % 2 == 0 if layer % 4 < 2 else positions < (self.latent_size + 1) // 2
        return (first == (layer % 2 == 0)).astype(jnp.float32)[None]

    def to_noise(self, z: Latents) -> tuple[Latents, Float[Array, " batch"]]:
        """The `u` that z is made of, [B, L], and `log |det du/dz|`, nats, [B]."""
        u = (z - self.origin[None]) * jnp.exp(-self.log_scale)[None]
        log_determinant = jnp.full(len(z), -jnp.sum(self.log_scale))
        for layer, coupling in enumerate(self.couplings):
            changed = self._changed(layer)
            shift, log_scale = coupling(u * (1.0 - changed), changed)
            u = u * jnp.exp(log_scale) + shift
            log_determinant = log_determinant + jnp.sum(log_scale, axis=-1)
        return u, log_determinant

    def from_noise(self, u: Latents) -> Latents:
        """The inverse of `to_noise`, [B, L]."""
        for layer in reversed(range(self.layers)):
            changed = self._changed(layer)
            shift, log_scale = self.couplings[layer](u * (1.0 - changed), changed)
            u = (u - shift) * jnp.exp(-log_scale)
        return u * jnp.exp(self.log_scale)[None] + self.origin[None]

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log N(u; 0, I) + log |det du/dz|`, nats, [B]."""
        u, log_determinant = self.to_noise(z)
        return log_determinant - 0.5 * jnp.sum(LOG_2PI + jnp.square(u), axis=-1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        return self.from_noise(jax.random.normal(key, (count, self.latent_size)))


# --- Flow matching ----------------------------------------------------------------------------------------------------


class FlowMatching(Prior):
    """N(0, I) carried along a learned velocity, then scaled and shifted per channel of the latent map."""

    settings: config.FlowMatching

    def setup(self) -> None:
        """The parameters; called by Flax."""
        channels = (self.latent_size // (self.settings.rows * self.settings.columns),)
        self.origin = self.param("origin", nn.initializers.zeros, channels)
        self.log_scale = self.param("log_scale", nn.initializers.zeros, channels)
        # As plain arrays, so that the velocity is a pure function, which is what derivatives and loops are taken of.
        network, latents = VelocityNetwork(self.settings, parent=None), jnp.zeros((1, self.latent_size))
        self.velocity = self.param("velocity", lambda key: network.init(key, latents, jnp.zeros(1))["params"])

    def _field(self) -> Velocity:
        network, params = VelocityNetwork(self.settings, parent=None), self.velocity

        def velocity(x: Latents, time: Float[Array, " batch"]) -> Latents:
            field: Latents = network.apply({"params": params}, x, time)  # type: ignore[assignment]
            return field

        return velocity

    def _per_latent(self, values: Float[Array | np.ndarray, " channels"]) -> Float[Array, "1 latent"]:
        return jnp.tile(jnp.asarray(values), self.settings.rows * self.settings.columns)[None]

    def log_prob(self, z: Latents) -> Float[Array, " batch"]:
        """`log p(z)`, nats, [B]: exact up to the steps for `EXACT_LATENTS` and fewer, else an unbiased estimate.

        An example's probes are decided by its first latent: the same on any number of devices, and apart from one another's.
        """
        scale = self._per_latent(self.log_scale)
        standard = (z - self._per_latent(self.origin)) * jnp.exp(-scale)
        probes = None
        if self.latent_size > EXACT_LATENTS:
            bits = jax.lax.bitcast_convert_type(z[:, 0].astype(jnp.float32), jnp.uint32)
            keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(bits)
            signs = lambda key: jax.random.rademacher(key, (PROBES, self.latent_size), jnp.float32)  # noqa: E731
            probes = jnp.swapaxes(jax.vmap(signs)(keys), 0, 1)
        return log_density(self._field(), standard, self.settings.steps, probes=probes) - jnp.sum(scale)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        noise = jax.random.normal(key, (count, self.latent_size))
        standard = integrate(self._field(), noise, self.settings.steps)
        return standard * jnp.exp(self._per_latent(self.log_scale)) + self._per_latent(self.origin)


def build(
    prior: config.Prior,
    latent_size: int,
    encoder: nn.Module | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Prior:
    """The Flax module of a prior config; `VampPrior` needs the encoder and the shape (H, W, C) of its images."""
    match prior:
        case config.StandardNormal():
            return StandardNormal(latent_size)
        case config.Mixture(components, "diagonal"):
            return Mixture(latent_size, components)
        case config.Mixture(components):
            return FullMixture(latent_size, components)
        case config.VampPrior(pseudo_inputs):
            assert encoder is not None, "its components are posteriors"
            assert image_shape is not None, "of images"
            return VampPrior(latent_size, encoder, image_shape, pseudo_inputs)
        case config.Flow(layers, width):
            return Flow(latent_size, layers, width)
        case config.FlowMatching():
            return FlowMatching(latent_size, prior)
