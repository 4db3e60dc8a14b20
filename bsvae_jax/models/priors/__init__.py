"""Priors p(z) of the latents: kinds that a config can hold, and the Flax modules they build.

Begin with `prior`, which has the base of both and the standard normal. `mixtures`, `flow` and `flow_prior` have the others;
`flow_matching` has the mathematics of the last, `transformer` its network. A new prior is a `Prior` and its `PriorModule`
(`log_prob`, `sample`, and `rate` if it has a closed form) in a file here, with a name in `CHOICES` of `config`.

The parameters of a prior are trained with the model. The rate is in closed form for the standard normal and otherwise one
sample of `log q(z|x) - log p(z)`, which is unbiased. Pseudo-inputs of a VampPrior pass the encoder with BatchNorm's running
statistics, so that they do not disturb those of the data; weight decay spares a prior. What is defined for N(0, I) alone (the
split of the rate into latents, dimension-wise KL, total correlation, spherical interpolation) is left out of evaluations, or
says what it is instead. `fit_prior` fits a density when training is over; `notebooks/priors.ipynb` compares both.
"""

from bsvae_jax.models.priors.flow import Flow
from bsvae_jax.models.priors.flow_prior import FlowMatching
from bsvae_jax.models.priors.mixtures import Mixture, VampPrior
from bsvae_jax.models.priors.prior import Prior, PriorModule, StandardNormal, checked_density, gaussian_log_prob

__all__ = [
    "Flow",
    "FlowMatching",
    "Mixture",
    "Prior",
    "PriorModule",
    "StandardNormal",
    "VampPrior",
    "checked_density",
    "gaussian_log_prob",
]
