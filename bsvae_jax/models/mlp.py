"""A fully connected encoder and decoder, for data of any shape."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.errors import check_widths
from bsvae_jax.models.layers import Labels, Latents, PosteriorParameters, add_class, as_float32, dense, split_posterior
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
        classes: int | None = None,
    ) -> tuple[nn.Module, nn.Module]:
        """Dense layers, for data of any shape."""
        shared = (self.hidden, dtype, classes)
        return MLPEncoder(latent_size, *shared), MLPDecoder(output_shape(data_shape, outputs), *shared)


class MLPEncoder(nn.Module):
    """Dense layers with SiLU, the class added in the first of them; then mean and log-variance."""

    latent_size: int
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32
    classes: int | None = None

    @nn.compact
    def __call__(self, x: Data, train: bool = False, labels: Labels | None = None) -> PosteriorParameters:
        """Data [B, ...] to mean and log-variance, [B, L]."""
        hidden = x.reshape(x.shape[0], -1)
        for layer, width in enumerate(self.hidden):
            hidden = dense(width, self.dtype)(hidden)
            hidden = nn.silu(hidden if layer else add_class(hidden, labels, self.classes))
        return split_posterior(dense(2 * self.latent_size, self.dtype, name="posterior")(hidden))


class MLPDecoder(nn.Module):
    """Dense layers with SiLU in the encoder's reverse order, the class added in the first of them; then the image."""

    output_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    dtype: Any = jnp.float32
    classes: int | None = None

    @nn.compact
    def __call__(self, z: Latents, train: bool = False, labels: Labels | None = None) -> Data:
        """Latents [B, L] to data [B, *output_shape]."""
        hidden = z
        for layer, width in enumerate(reversed(self.hidden)):
            hidden = dense(width, self.dtype)(hidden)
            hidden = nn.silu(hidden if layer else add_class(hidden, labels, self.classes))
        x = dense(math.prod(self.output_shape), self.dtype, name="mean")(hidden)
        return as_float32(x).reshape(z.shape[0], *self.output_shape)
