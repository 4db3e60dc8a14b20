from . import config, data, distributed, evaluation, models, objective, sweeps, theory, training
from ._io.files import read_metrics
from .config import Config, Optimizer, load_config
from .data import Dataset, prepare
from .distributed.preemption import Interrupted
from .errors import BsvaeError, DivergenceError, UserError
from .evaluation.evaluate import Fid, evaluate
from .evaluation.trained import Restored
from .models import VAE, Network, Prior, StandardNormal
from .objective import (
    PAPER_FLOOR,
    QUANTIZATION_VARIANCE,
    BetaSchedule,
    Capacity,
    Constant,
    ConstantBeta,
    Cyclical,
    DecoderVariance,
    ElboTerms,
    FreeBits,
    Learned,
    LinearWarmup,
    Optimal,
    Predicted,
    TargetRate,
    bits_per_dimension,
    elbo_terms,
    gaussian_nll,
    kl_gaussians,
    kl_per_latent,
    kl_to_standard_normal,
    mean_objective,
    mean_over_devices,
    optimal_gaussian_nll,
    optimal_variance,
    quantization_variance,
)
from .sweeps.comparison import compare_runs
from .sweeps.fit_sweep import SweepResult, fit_sweep
from .sweeps.grid import Sweep
from .sweeps.report import write_report
from .sweeps.results import read_results
from .sweeps.runs import list_runs
from .training.callbacks import Callback, CallbackError, EarlyStopping, WandbTracker
from .training.export import export_safetensors, export_stablehlo
from .training.failed_step import FailedStep, failed_step
from .training.fit import FitResult, fit
from .training.fit_prior import fit_prior
from .training.fitted_prior import FittedPrior
from .training.hub import export_hub
from .training.import_torch import Imported, import_torch
from .training.restore import restore
from .training.step import TrainState, train_step

__version__: str

__all__ = [
    "PAPER_FLOOR",
    "QUANTIZATION_VARIANCE",
    "VAE",
    "BetaSchedule",
    "BsvaeError",
    "Callback",
    "CallbackError",
    "Capacity",
    "Config",
    "Constant",
    "ConstantBeta",
    "Cyclical",
    "Dataset",
    "DecoderVariance",
    "DivergenceError",
    "EarlyStopping",
    "ElboTerms",
    "FailedStep",
    "Fid",
    "FitResult",
    "FittedPrior",
    "FreeBits",
    "Imported",
    "Interrupted",
    "Learned",
    "LinearWarmup",
    "Network",
    "Optimal",
    "Optimizer",
    "Predicted",
    "Prior",
    "Restored",
    "StandardNormal",
    "Sweep",
    "SweepResult",
    "TargetRate",
    "TrainState",
    "UserError",
    "WandbTracker",
    "bits_per_dimension",
    "compare_runs",
    "config",
    "data",
    "distributed",
    "elbo_terms",
    "evaluate",
    "evaluation",
    "export_hub",
    "export_safetensors",
    "export_stablehlo",
    "failed_step",
    "fit",
    "fit_prior",
    "fit_sweep",
    "gaussian_nll",
    "import_torch",
    "kl_gaussians",
    "kl_per_latent",
    "kl_to_standard_normal",
    "list_runs",
    "load_config",
    "mean_objective",
    "mean_over_devices",
    "models",
    "objective",
    "optimal_gaussian_nll",
    "optimal_variance",
    "prepare",
    "quantization_variance",
    "read_metrics",
    "read_results",
    "restore",
    "sweeps",
    "theory",
    "train_step",
    "training",
    "write_report",
]
