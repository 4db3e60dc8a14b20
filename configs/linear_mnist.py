"""Linear VAE on MNIST with one optimal variance for all: the model whose optimum is known exactly.

    bsvae train configs/linear_mnist.py --data.folder FOLDER_OF_THE_FOUR_FILES --beta 10 --workdir runs/linear10

`bsvae_jax.theory.linear_optimum` of the covariance eigenvalues of the 60,000 images says where training must end.

HARDWARE_AND_NUMBERS
"""

import numpy as np

from bsvae_jax.config import MNIST, Config, Linear, Optimizer
from bsvae_jax.grid import Sweep
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=MNIST(folder="data/mnist"),
        network=Linear(),
        latent_size=8,
        decoder_variance=Optimal(over="batch"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=2e-2, weight_decay=0.0, schedule="cosine"),
        epochs=100,
        batch_size=1000,
        evaluate_every=50,
    )


def get_sweep() -> Sweep:
    """20 betas across the whole rate-distortion curve, collapse included."""
    return Sweep(
        beta=tuple(float(f"{beta:.4g}") for beta in np.geomspace(0.01, 100, 20)),
        decoder_variance=(Optimal(over="batch"),),
        seeds=1,
    )
