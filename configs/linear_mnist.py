"""Linear VAE on MNIST with one optimal variance for all: the model whose optimum is known exactly.

    bsvae train configs/linear_mnist.py --beta 10 --workdir runs/linear10
    bsvae sweep configs/linear_mnist.py

`bsvae_jax.theory.linear_optimum` of the covariance eigenvalues of the 60,000 images says where training must end; the report
of the sweep draws both.

Hardware and time: 2 CPU cores; the 20 models of the sweep took 25 minutes beside other jobs. Expect on the training set
(measured, seed 0; theory in brackets):

    beta      rate [nats]           objective minus theory's [nats]
    0.01      35.51  (35.47)        0.002
    0.1129    25.87  (25.77)        0.013
    1.274     16.07  (16.03)        0.072
    14.38      5.746 (5.749)        0.078
    37.93      1.044 (1.044)       -0.079
    61.58      0.114 (0.116)       -0.046
    100        0     (0)            collapsed: beyond the critical beta of 76.1

Up to beta 38 the rate is within 0.41% and the squared error within 0.1% of theory. (A difference below 0 is the noise of one
posterior sample per image.) `pytest -m slow -k linear_mnist` holds four betas to it.
"""

import numpy as np

from bsvae_jax import Sweep
from bsvae_jax.config import TFDS, Config, Linear, Optimizer
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=TFDS(name="mnist", validation=None),  # theory's optimum is of all training images, and nothing is chosen
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
