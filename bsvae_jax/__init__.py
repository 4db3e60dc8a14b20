"""Gaussian VAEs in JAX with their decoder variance treated properly: the reference implementation of Beta-Sigma VAE.

    import bsvae_jax as bv

The loss is made of pure functions of arrays (`gaussian_nll`, `optimal_gaussian_nll`, `kl_to_standard_normal`,
`elbo_terms`, `mean_objective`); `VAE` is the Flax model; `theory` holds what is known exactly; `fit`, `fit_sweep`,
`restore` and `evaluate` are what the command line calls. Importing the package touches no device, and loads nothing: a public
name is imported when it is first used. `__init__.pyi` says where each of them is from.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
