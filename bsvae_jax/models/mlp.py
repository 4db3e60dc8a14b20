"""A fully connected encoder and decoder, for data of any shape."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.errors import check_widths
from bsvae_jax.models.layers import Latents, PosteriorParameters, as_float32, dense, split_posterior
from bsvae_jax.models.network import Network, output_shape

Data = Float[Array, "batch *shape"]


@dataclass(frozen=True)
class MLP(Network):
    """Fully connected encoder and mirrored decoder with SiLU."""

    hidden: tuple[int, ...] = (512, 256)
    """Width of each hidden layer of the encoder; the decoder mirrors them."""

    def __post_init__(self) -> None:
        check_widths("network.hidden", self.hidden)

    def build(
        self,
        latent_size: int,
        data_shape: tuple[int, ...],
        outputs: int = 1,
        axis_name: str | None = None,
        dtype: Any = jnp.float32,
        rematerialize: bool = False,
    ) -> tuple[nn.Module, nn.Module]:
        """Dense layers, for data of any shape."""
        return MLPEncoder(latent_size, self.hidden, dtype), MLPDecoder(output_shape(data_shape, outputs), self.hidden, dtype)


class MLPEncoder(nn.Module):
    """Dense layers with SiLU, then mean and log-variance."""

    latent_size: int
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Data, train: bool = False) -> PosteriorParameters:
        """Data [B, ...] to mean and log-variance, [B, L]."""
        hidden = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            hidden = nn.silu(dense(width, self.dtype)(hidden))
        return split_posterior(dense(2 * self.latent_size, self.dtype, name="posterior")(hidden))


class MLPDecoder(nn.Module):
    """Dense layers with SiLU in the encoder's reverse order, then the image."""

    output_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Latents, train: bool = False) -> Data:
        """Latents [B, L] to data [B, *output_shape]."""
        hidden = z
        for size in reversed(self.hidden):
            hidden = nn.silu(dense(size, self.dtype)(hidden))
        x = dense(math.prod(self.output_shape), self.dtype, name="mean")(hidden)
        return as_float32(x).reshape(z.shape[0], *self.output_shape)
