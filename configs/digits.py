"""BS-VAE on the embedded digits.

PLACEHOLDER
"""

from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=Digits(),
        network=MLP(hidden=(256, 256)),
        latent_size=16,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine", ema_decay=0.99),
        epochs=100,
        batch_size=100,
        evaluate_every=10,
    )
