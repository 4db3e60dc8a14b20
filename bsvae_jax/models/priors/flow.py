"""A normalizing flow as prior: affine coupling layers (real NVP, Dinh et al. 2017)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax.errors import check_count
from bsvae_jax.models.layers import ZEROS, dense
from bsvae_jax.models.priors.prior import Latents, Prior, PriorModule
from bsvae_jax.objective import LOG_2PI

MOST_LOG_SCALE = 2.0
"""A coupling layer stretches a latent by a factor between exp(-2) and exp(2): its inverse cannot lose the digits."""


@dataclass(frozen=True)
class Flow(Prior):
    """Affine coupling layers (real NVP, Dinh et al. 2017) over N(0, I); the identity before training."""

    layers: int = 8
    """Coupling layers; each changes half of the latents given the other half."""
    width: int = 64
    """Of the two hidden layers of each coupling's network."""

    def __post_init__(self) -> None:
        check_count("prior.layers", self.layers)
        check_count("prior.width", self.width)

    @property
    def name(self) -> str:
        """`flow-8x64`."""
        return f"flow-{self.layers}x{self.width}"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"flow, {self.layers} layers of {self.width}"

    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """Coupling layers."""
        return FlowModule(latent_size, self.layers, self.width)


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


class FlowModule(PriorModule):
    """N(0, I) seen through affine coupling layers (real NVP, Dinh et al. 2017) and a scale and origin of each latent.

    A layer changes half of the latents, `u exp(s) + t` with s and t of the other half; halves take turns, every second latent
    first, then the first and second halves.
    """

    layers: int
    width: int

    def setup(self) -> None:
        """The parts; called by Flax."""
        self.origin = self.param("origin", nn.initializers.zeros, (self.latent_size,), jnp.float32)
        self.log_scale = self.param("log_scale", nn.initializers.zeros, (self.latent_size,), jnp.float32)
        self.couplings = [Coupling(self.width) for _ in range(self.layers)]

    def _changed(self, layer: int) -> Float[Array, "1 latent"]:
        positions = jnp.arange(self.latent_size)
        first = positions % 2 == 0 if layer % 4 < 2 else positions < (self.latent_size + 1) // 2
        return (first == (layer % 2 == 0)).astype(jnp.float32)[None]

    def to_noise(self, z: Latents) -> tuple[Latents, Float[Array, " batch"]]:
        """The `u` that z is made of, [B, L], and `log |det du/dz|`, nats, [B]."""
        u = (z - self.origin[None]) * jnp.exp(-self.log_scale)[None]
        log_determinant = jnp.full(z.shape[0], -jnp.sum(self.log_scale))
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
        return self.from_noise(jax.random.normal(key, (count, self.latent_size), jnp.float32))
