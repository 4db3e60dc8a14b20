"""BS-VAE on MNIST as Kim & Lee (2024) trained it.

PLACEHOLDER
"""

from bsvae_jax.config import MNIST, Augmentation, Config, Optimizer, Residual
from bsvae_jax.objective import PAPER_FLOOR, Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=MNIST(folder="data/mnist"),
        augmentation=Augmentation(rotation_degrees=10.0, crop_scale=(0.9, 1.0), crop_ratio=(0.9, 1.1)),
        network=Residual(widths=(32, 64, 128)),
        latent_size=32,
        decoder_variance=Optimal(over="example", floor=PAPER_FLOOR),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine_restarts", cycles=2),
        epochs=50,
        batch_size=512,
    )
