"""The networks: encoders, decoders, priors, and the VAE made of them.

Begin with `vae`, which ties an encoder, a decoder, a prior and a decoder variance together, and `network`, the kind to derive
for an encoder and decoder of your own. `linear`, `mlp`, `residual` and `latent_map` have one of each, `priors` the densities
of the latents; `layers` is what all of them share; `pytorch` carries published weights over. A new network is a `Network`
beside its encoder and decoder, in a file here, with a name in `CHOICES` of `config`.
"""

from bsvae_jax.models.latent_map import Spatial
from bsvae_jax.models.linear import Linear
from bsvae_jax.models.mlp import MLP
from bsvae_jax.models.network import Network, build_modules, output_shape
from bsvae_jax.models.priors import Flow, FlowMatching, Mixture, Prior, PriorModule, StandardNormal, VampPrior
from bsvae_jax.models.residual import Residual
from bsvae_jax.models.vae import VAE, build_vae

__all__ = [
    "MLP",
    "VAE",
    "Flow",
    "FlowMatching",
    "Linear",
    "Mixture",
    "Network",
    "Prior",
    "PriorModule",
    "Residual",
    "Spatial",
    "StandardNormal",
    "VampPrior",
    "build_modules",
    "build_vae",
    "output_shape",
]
