"""Free bits: nats of each group of latents that cost nothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsvae_jax.errors import UserError, check_count, check_number
from bsvae_jax.objective.elbo import ElboTerms, kl_per_latent
from bsvae_jax.objective.gaussian import mean_over_devices


@dataclass(frozen=True)
class FreeBits:
    """`sum_j max(nats, mean over the batch of KL(q(z_j|x) || p(z_j)))` takes the place of the rate in the objective of training
    ("free bits" of Kingma et al. 2016, arXiv 1606.04934); j are groups of latents. A row of training has the objective that is
    minimized; rates everywhere, and the objectives of held-out rows and reports, are those without free nats.

    >>> FreeBits(0.5, group=4).least(latent_size=16)
    2.0

    Raises:
      UserError: `nats` is not a finite number >= 0, or `group` not a whole number >= 1.
    """

    nats: float = 0.0
    """Nats of each group that cost nothing, their lambda; 0: none are free."""
    group: int = 1
    """Latents in a group, neighbors in z: 1 is each latent, `latent_size` is the whole rate. Of a latent map, whose channels
    come last, as many as it has channels are one position."""

    def __post_init__(self) -> None:
        check_number("free_bits.nats", self.nats, low=0.0)
        check_count("free_bits.group", self.group)

    def least(self, latent_size: int) -> float:
        """Nats of all groups together that cost nothing."""
        return self.nats * latent_size / self.group

    def check(self, latent_size: int, splits: bool) -> None:
        """Raise a UserError where groups do not divide the latents, or are smaller than all of them though the rate is not the
        sum of what each carries; `splits` says whether it is."""
        if not self.nats:
            return
        if latent_size % self.group:
            raise UserError(f"free_bits.group {self.group} does not divide the {latent_size} latents into groups.")
        if not splits and self.group != latent_size:
            raise UserError(
                "The rate under a prior other than StandardNormal does not fall into latents; free_bits.group "
                f"{latent_size}, all of them, has a rate."
            )

    def penalized(
        self,
        terms: ElboTerms,
        mean: Float[Array, "batch latent"],
        log_variance: Float[Array, "batch latent"],
        axis_name: str | None = None,
    ) -> ElboTerms:
        """The terms of an objective in which these nats are free: `rate`, [B], has the mean and the gradient of the sum above.

        Args:
          terms: of the batch.
          mean: of q(z|x), [B, L].
          log_variance: of q(z|x), [B, L].
          axis_name: device axis over which the mean over the batch is taken.

        >>> rates = jnp.array([[0.1, 4.0], [0.3, 2.0]])  # of two latents: 0.2 and 3 nats in the mean
        >>> terms = ElboTerms(jnp.zeros(2), rates.sum(1), jnp.zeros(2), jnp.ones(()))
        >>> print(FreeBits(0.5).penalized(terms, jnp.sqrt(2 * rates), jnp.zeros((2, 2))).rate)
        [4.5 2.5]
        """
        if not self.nats:
            return terms
        batch, latents = mean.shape
        whole = self.group == latents  # the rate itself, of any prior
        rates = terms.rate[:, None] if whole else kl_per_latent(mean, log_variance).reshape(batch, -1, self.group).sum(2)
        means = mean_over_devices(jnp.mean(jax.lax.stop_gradient(rates), axis=0, keepdims=True), axis_name)
        return terms._replace(rate=jnp.sum(jnp.where(means > self.nats, rates, self.nats), axis=1))
