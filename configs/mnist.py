"""BS-VAE on MNIST.

PLACEHOLDER
"""

from bsvae_jax.config import MNIST, Config, Optimizer, Residual
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=MNIST(folder="data/mnist"),
        network=Residual(widths=(32, 64, 128)),
        latent_size=32,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine", ema_decay=0.999),
        epochs=50,
        batch_size=128,
    )
