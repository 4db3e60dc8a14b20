"""Linear VAE on MNIST with one optimal variance for all: the model whose optimum is known exactly.

PLACEHOLDER
"""

from bsvae_jax.config import MNIST, Config, Linear, Optimizer
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=MNIST(folder="data/mnist"),
        network=Linear(),
        latent_size=8,
        decoder_variance=Optimal(over="batch"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=5e-3, weight_decay=0.0, schedule="cosine"),
        epochs=600,
        batch_size=1000,
        evaluate_every=100,
    )
