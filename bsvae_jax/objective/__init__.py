"""The loss: pure functions of arrays, in nats per example.

Begin with `elbo`, the terms of the objective and their mean; `decoder_variance` has the ways to choose sigma^2; `gaussian` has
the densities they are made of, and the conventions of the whole package. `kind` is what everything that a config can hold has
in common; `beta_schedule` and `free_bits` say how the rate is weighed. A new way to choose sigma^2 is a `DecoderVariance` in
`decoder_variance`: its distortion, what the decoder must return for it, its label; and a name in `CHOICES` of `config`.
"""

from bsvae_jax.objective.beta_schedule import (
    BetaSchedule,
    Capacity,
    ConstantBeta,
    Cyclical,
    LinearWarmup,
    TargetRate,
)
from bsvae_jax.objective.decoder_variance import Constant, DecoderVariance, Learned, Optimal, Predicted
from bsvae_jax.objective.elbo import (
    ElboTerms,
    bits_per_dimension,
    elbo_terms,
    kl_gaussians,
    kl_per_latent,
    kl_to_standard_normal,
    mean_objective,
)
from bsvae_jax.objective.free_bits import FreeBits
from bsvae_jax.objective.gaussian import (
    LOG_2PI,
    PAPER_FLOOR,
    QUANTIZATION_VARIANCE,
    gaussian_nll,
    mean_over_devices,
    optimal_gaussian_nll,
    optimal_variance,
    quantization_variance,
)
from bsvae_jax.objective.kind import Kind, check_kind_of, with_fields

__all__ = [
    "LOG_2PI",
    "PAPER_FLOOR",
    "QUANTIZATION_VARIANCE",
    "BetaSchedule",
    "Capacity",
    "Constant",
    "ConstantBeta",
    "Cyclical",
    "DecoderVariance",
    "ElboTerms",
    "FreeBits",
    "Kind",
    "Learned",
    "LinearWarmup",
    "Optimal",
    "Predicted",
    "TargetRate",
    "bits_per_dimension",
    "check_kind_of",
    "elbo_terms",
    "gaussian_nll",
    "kl_gaussians",
    "kl_per_latent",
    "kl_to_standard_normal",
    "mean_objective",
    "mean_over_devices",
    "optimal_gaussian_nll",
    "optimal_variance",
    "quantization_variance",
    "with_fields",
]
