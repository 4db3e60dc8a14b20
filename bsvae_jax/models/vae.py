"""The VAE: an encoder and a decoder network, a prior and a decoder-variance model."""

import typing
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax import config
from bsvae_jax.errors import UserError, check_count, check_kind
from bsvae_jax.models import priors, residual
from bsvae_jax.objective import elbo
from bsvae_jax.objective.elbo import DecoderVariance, ElboTerms, Learned, Predicted
from bsvae_jax.random import check_key, example_keys, example_positions, normal_per_example

Images = Float[Array, "batch height width channels"]
Latents = Float[Array, "batch latent"]


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(log_variance)))."""

    mean: Latents
    """[B, L]"""
    log_variance: Latents
    """[B, L]"""


class Decoded(NamedTuple):
    """p(x|z): the mean and, where the network gives one, the log-variance."""

    mean: Images
    """[B, H, W, C]"""
    log_variance: Float[Array, "..."] | None
    """[] for `Learned`, [B, H, W, C] for `Predicted`, else None: the variance then does not come from z."""


class VAEOutput(NamedTuple):
    """Everything one forward pass knows."""

    posterior: Posterior
    z: Latents
    """One sample of q(z|x) per image, [B, L]."""
    decoded: Decoded
    rate: Float[Array, " batch"]
    """`KL(q(z|x) || p(z))`, nats, [B]."""


class VAE(nn.Module):
    """A Gaussian VAE. Pure: all randomness comes from the keys passed in.

    `model.apply(variables, x, key)` runs it; `method="encode"`, `"decode"`, `"sample"`, `"elbo_terms"` the parts. With
    `train=True` BatchNorm uses batch statistics (averaged over `axis_name`) and `batch_stats` must be mutable.

    >>> import jax, jax.numpy as jnp
    >>> from bsvae_jax.config import MLP
    >>> model = VAE(image_shape=(8, 8, 1), latent_size=2, network=MLP(hidden=(16,)))
    >>> x = jnp.zeros((3, 8, 8, 1))
    >>> variables = model.init(jax.random.key(0), x, jax.random.key(1))
    >>> terms = model.apply(variables, x, jax.random.key(2), method="elbo_terms")
    >>> terms.distortion.shape, terms.rate.shape
    ((3,), (3,))

    Raises:
      UserError: a field of a wrong kind, images of another shape than `image_shape`, or what is no key.
    """

    image_shape: tuple[int, int, int]
    """(H, W, C)"""
    latent_size: int
    """L"""
    network: config.Network
    decoder_variance: DecoderVariance = elbo.Optimal()
    prior: config.Prior = config.StandardNormal()
    axis_name: str | None = None
    """The axis of the devices that share a batch, inside `pmap` or `shard_map`; None on one device."""
    dtype: Any = jnp.float32
    """Type of matrix products and activations."""
    rematerialize: bool = False
    """Keep only what enters each block of a convolutional network for the backward pass, and compute the rest again."""

    def setup(self) -> None:
        """Build the parts; called by Flax."""
        self._check()
        height, width, channels = self.image_shape
        predicted = isinstance(self.decoder_variance, Predicted)
        output_shape = (height, width, 2 * channels if predicted else channels)
        self.encoder, self.decoder = residual.build(
            self.network, self.latent_size, output_shape, self.axis_name, self.dtype, self.rematerialize
        )
        self.prior_model = priors.build(self.prior, self.latent_size, self.encoder, self.image_shape)
        if isinstance(self.decoder_variance, Learned):
            initial = float(np.log(self.decoder_variance.initial_variance))
            self.log_variance = self.param("log_variance", nn.initializers.constant(initial), ())

    def _check(self) -> None:
        shape = self.image_shape
        if not isinstance(shape, tuple) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UserError(f"image_shape must be (height, width, channels), whole numbers >= 1, got {shape!r}.")
        check_count("latent_size", self.latent_size)
        fields: dict[str, Any] = {"network": config.Network, "prior": config.Prior, "decoder_variance": DecoderVariance}
        for name, kinds in fields.items():
            check_kind(name, getattr(self, name), typing.get_args(kinds) or kinds, "see bsvae_jax.config")

    def encode(self, x: Images, train: bool = False) -> Posterior:
        """Images [B, H, W, C] in [0, 1] to q(z|x)."""
        if jnp.shape(x)[1:] != self.image_shape:
            raise UserError(f"This model takes images of shape {self.image_shape}, got a batch of shape {jnp.shape(x)}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"This model takes floating-point images in [0, 1], got {x.dtype}; divide 8-bit values by 255.")
        return Posterior(*self.encoder(x, train))

    def decode(self, z: Latents, train: bool = False) -> Decoded:
        """Latents [B, L] to p(x|z)."""
        if jnp.ndim(z) != 2 or jnp.shape(z)[1] != self.latent_size:
            raise UserError(f"This model takes latents of shape [B, {self.latent_size}], got {jnp.shape(z)}.")
        mean = self.decoder(z, train)
        if isinstance(self.decoder_variance, Predicted):
            mean, log_variance = jnp.split(mean, 2, axis=-1)
            return Decoded(mean, log_variance)
        return Decoded(mean, self.log_variance if isinstance(self.decoder_variance, Learned) else None)

    def log_prior(self, z: Latents) -> Float[Array, " batch"]:
        """`log p(z)` of latents [B, L], nats, [B]."""
        return self.prior_model.log_prob(z)

    def sample_latents(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples of the prior, [count, L]."""
        check_key(key)
        check_count("count", count)
        return self.prior_model.sample(key, count)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count height width channels"]:
        """Decoder means of `count` samples of the prior, [count, H, W, C], without pixel noise."""
        return self.decode(self.sample_latents(key, count)).mean

    def __call__(self, x: Images, key: Key[Array, "*batch"], train: bool = False) -> VAEOutput:
        """One forward pass with one posterior sample per image.

        Args:
          x: images [B, H, W, C] in [0, 1]; under a device axis, this device's share of the global batch.
          key: one key, from which each example takes its own by its position in the global batch; or a key per example, [B].
          train: BatchNorm uses and updates batch statistics.
        """
        # Before the batch is encoded: in training that updates running statistics, which a VampPrior uses.
        density = self.prior_model.density()
        posterior = self.encode(x, train)
        check_key(key, len(x))
        keys = example_keys(key, example_positions(len(x), self.axis_name)) if key.ndim == 0 else key
        noise = normal_per_example(keys, posterior.mean.shape[1:])
        z = posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise.astype(posterior.mean.dtype)
        rate = self.prior_model.rate(*posterior, z, density)
        return VAEOutput(posterior, z, self.decode(z, train), rate)

    def elbo_terms(self, x: Images, key: Key[Array, "*batch"], train: bool = False) -> ElboTerms:
        """Distortion and rate per example, nats; arguments as for the forward pass."""
        output = self(x, key, train)
        return elbo.elbo_terms(
            x,
            output.decoded.mean,
            output.rate,
            self.decoder_variance,
            log_variance=output.decoded.log_variance,
            axis_name=self.axis_name,
        )
