"""Flow matching as a prior: a learned velocity carries N(0, I) to the latents (Lipman et al. 2023)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax.errors import UserError, check_count
from bsvae_jax.models.priors.flow_matching import Velocity, integrate, log_density
from bsvae_jax.models.priors.prior import Latents, Prior, PriorModule
from bsvae_jax.models.priors.transformer import VelocityNetwork
from bsvae_jax.random import make_key

EXACT_LATENTS = 32
"""Up to so many, the density of flow matching takes every derivative; beyond, it is estimated with `PROBES` probes."""
PROBES = 1


@dataclass(frozen=True)
class FlowMatching(Prior):
    """A velocity field that carries N(0, I) to the latents (Lipman et al. 2023); fitted after training, by `bsvae fit-prior`.

    A transformer with a token per position of the latent map; latents that are no map are one position.
    """

    rows: int = 1
    """Of the latent map."""
    columns: int = 1
    """Of the latent map."""
    width: int = 128
    """Of the transformer."""
    depth: int = 4
    """Blocks of the transformer."""
    heads: int = 4
    """Of its attention; must divide the width."""
    steps: int = 50
    """Steps of Heun's method from noise to latents, and back for a density."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "width", "depth", "heads", "steps"):
            check_count(f"prior.{name}", getattr(self, name))
        if self.width % (2 * self.heads):
            raise UserError(f"prior.width must be a multiple of twice prior.heads ({2 * self.heads}), got {self.width}.")

    @property
    def name(self) -> str:
        """`flow_matching`."""
        return "flow_matching"

    def build(
        self, latent_size: int, encoder: nn.Module | None = None, data_shape: tuple[int, ...] | None = None
    ) -> PriorModule:
        """A velocity field."""
        if latent_size % (self.rows * self.columns):
            raise UserError(f"{latent_size} latents do not divide into the {self.rows} x {self.columns} positions of the map.")
        return FlowMatchingModule(latent_size, self)


class FlowMatchingModule(PriorModule):
    """N(0, I) carried along a learned velocity, then scaled and shifted per channel of the latent map."""

    settings: FlowMatching

    def setup(self) -> None:
        """The parameters; called by Flax."""
        channels = (self.latent_size // (self.settings.rows * self.settings.columns),)
        self.origin = self.param("origin", nn.initializers.zeros, channels, jnp.float32)
        self.log_scale = self.param("log_scale", nn.initializers.zeros, channels, jnp.float32)
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
            keys = jax.vmap(lambda number: jax.random.fold_in(make_key(0), number))(bits)
            signs = lambda key: jax.random.rademacher(key, (PROBES, self.latent_size), jnp.float32)  # noqa: E731
            probes = jnp.swapaxes(jax.vmap(signs)(keys), 0, 1)
        return log_density(self._field(), standard, self.settings.steps, probes=probes) - jnp.sum(scale)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L]."""
        noise = jax.random.normal(key, (count, self.latent_size), jnp.float32)
        standard = integrate(self._field(), noise, self.settings.steps)
        return standard * jnp.exp(self._per_latent(self.log_scale)) + self._per_latent(self.origin)
