"""Gaussian VAEs in JAX with their decoder variance treated properly: the reference implementation of Beta-Sigma VAE.

    import bsvae_jax as bv

The loss is made of pure functions of arrays (`gaussian_nll`, `optimal_gaussian_nll`, `kl_to_standard_normal`,
`elbo_terms`, `mean_objective`); `VAE` is the Flax model; `theory` holds what is known exactly; `fit`, `fit_sweep`,
`restore` and `evaluate` are what the command line calls. Importing the package touches no device.
"""

from bsvae_jax import data, theory
from bsvae_jax.config import Config, load_config
from bsvae_jax.distributed.preemption import Interrupted
from bsvae_jax.errors import BsvaeError, DivergenceError, UserError
from bsvae_jax.evaluation.evaluate import Fid, evaluate
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.models.vae import VAE
from bsvae_jax.objective import (
    PAPER_FLOOR,
    QUANTIZATION_VARIANCE,
    Constant,
    ElboTerms,
    Learned,
    Optimal,
    Predicted,
    bits_per_dimension,
    elbo_terms,
    gaussian_nll,
    kl_gaussians,
    kl_per_latent,
    kl_to_standard_normal,
    mean_objective,
    optimal_gaussian_nll,
    optimal_variance,
    quantization_variance,
)
from bsvae_jax.sweeps.fit_sweep import SweepResult, fit_sweep
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.training.callbacks import Callback, CallbackError, EarlyStopping, WandbTracker
from bsvae_jax.training.export import export_safetensors
from bsvae_jax.training.failed_step import FailedStep, failed_step
from bsvae_jax.training.fit import FitResult, fit
from bsvae_jax.training.fit_prior import fit_prior
from bsvae_jax.training.fitted_prior import FittedPrior
from bsvae_jax.training.import_torch import Imported, import_torch
from bsvae_jax.training.restore import restore
from bsvae_jax.training.step import TrainState, train_step

__version__ = "0.1.0"

__all__ = [
    "PAPER_FLOOR",
    "QUANTIZATION_VARIANCE",
    "VAE",
    "BsvaeError",
    "Callback",
    "CallbackError",
    "Config",
    "Constant",
    "DivergenceError",
    "EarlyStopping",
    "ElboTerms",
    "FailedStep",
    "Fid",
    "FitResult",
    "FittedPrior",
    "Imported",
    "Interrupted",
    "Learned",
    "Optimal",
    "Predicted",
    "Restored",
    "Sweep",
    "SweepResult",
    "TrainState",
    "UserError",
    "WandbTracker",
    "bits_per_dimension",
    "data",
    "elbo_terms",
    "evaluate",
    "export_safetensors",
    "failed_step",
    "fit",
    "fit_prior",
    "fit_sweep",
    "gaussian_nll",
    "import_torch",
    "kl_gaussians",
    "kl_per_latent",
    "kl_to_standard_normal",
    "load_config",
    "mean_objective",
    "optimal_gaussian_nll",
    "optimal_variance",
    "quantization_variance",
    "restore",
    "theory",
    "train_step",
]
