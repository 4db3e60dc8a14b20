"""Priors p(z) of the latents: kinds that a config can hold, and the Flax modules they build.

Begin with `prior`, which has the base of both and the standard normal. `mixtures`, `flow` and `flow_prior` have the others;
`flow_matching` has the mathematics of the last, `transformer` its network.
"""

from bsvae_jax.models.priors.flow import Flow
from bsvae_jax.models.priors.flow_prior import FlowMatching
from bsvae_jax.models.priors.mixtures import Mixture, VampPrior
from bsvae_jax.models.priors.prior import Prior, PriorModule, StandardNormal, gaussian_log_prob

__all__ = ["Flow", "FlowMatching", "Mixture", "Prior", "PriorModule", "StandardNormal", "VampPrior", "gaussian_log_prob"]
