"""The linear network: the model that `theory` solves exactly, for data of any shape."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.models.layers import Labels, Latents, PosteriorParameters, add_class, as_float32, dense
from bsvae_jax.models.network import Network, output_shape

Data = Float[Array, "batch *shape"]


@dataclass(frozen=True)
class Linear(Network):
    """Linear encoder (one posterior variance per latent) and linear decoder: the model that `theory` solves exactly."""

    def build(
        self,
        latent_size: int,
        data_shape: tuple[int, ...],
        outputs: int = 1,
        axis_name: str | None = None,
        dtype: Any = jnp.float32,
        rematerialize: bool = False,
        classes: int | None = None,
    ) -> tuple[nn.Module, nn.Module]:
        """A linear encoder and a linear decoder, for data of any shape."""
        frame = LatentFrame(latent_size)
        shared = (frame, dtype, classes)
        return LinearEncoder(latent_size, *shared), LinearDecoder(output_shape(data_shape, outputs), *shared)


class LatentFrame(nn.Module):
    """Origin and scale of each latent of a linear model, shared by its encoder and decoder: `z = scale (u + origin)`.

    The encoder applies the map and the decoder undoes it, so the distortion does not see it: the rate alone decides. With
    parameters of its own it is learned in hundreds of steps. Left to the weights, whose gradients are noise of the distortion
    but for a part of order beta, it takes 10^5 steps and more at small beta.
    """

    latent_size: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "1 latent"], Float[Array, "1 latent"]]:
        """Origin and logarithm of the scale, [1, L] each."""
        shape = (self.latent_size,)
        origin = self.param("origin", nn.initializers.zeros, shape, jnp.float32)
        return origin[None], self.param("log_scale", nn.initializers.zeros, shape, jnp.float32)[None]


class LinearEncoder(nn.Module):
    """Posterior mean `scale (W x + origin)` and one log-variance per latent, the same for every x.

    With classes, `W x` has a vector of the class of x added: theory then holds of the covariance within the classes.
    """

    latent_size: int
    frame: LatentFrame
    dtype: Any = jnp.float32
    classes: int | None = None

    @nn.compact
    def __call__(self, x: Data, train: bool = False, labels: Labels | None = None) -> PosteriorParameters:
        """Data [B, ...] to mean and log-variance, [B, L]."""
        flat = x.reshape(x.shape[0], -1)
        origin, log_scale = self.frame()
        projected = as_float32(dense(self.latent_size, self.dtype, use_bias=False, name="mean")(flat))
        projected = add_class(projected, labels, self.classes, deviation=0.0)
        # In units of sqrt(D), because weights are of size 1 / sqrt(D), log-variances of size 1, and Adam moves both by as much.
        log_variance = self.param("log_variance", nn.initializers.zeros, (self.latent_size,), jnp.float32)
        own = math.sqrt(flat.shape[1]) * log_variance[None]
        mean = jnp.exp(log_scale) * (projected + origin)
        return mean, jnp.broadcast_to(own + 2.0 * log_scale, mean.shape)


class LinearDecoder(nn.Module):
    """Mean `W (z / scale - origin) + b`, and with classes a vector of the class more."""

    output_shape: tuple[int, ...]
    frame: LatentFrame
    dtype: Any = jnp.float32
    classes: int | None = None

    @nn.compact
    def __call__(self, z: Latents, train: bool = False, labels: Labels | None = None) -> Data:
        """Latents [B, L] to data [B, *output_shape]."""
        origin, log_scale = self.frame()
        x = dense(math.prod(self.output_shape), self.dtype, name="mean")(z * jnp.exp(-log_scale) - origin)
        return add_class(as_float32(x), labels, self.classes, deviation=0.0).reshape(z.shape[0], *self.output_shape)
