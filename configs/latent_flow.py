"""Two stages on MNIST: an autoencoder with a latent map, then flow matching on its latents (latent diffusion, in small).

bsvae train configs/latent_flow.py --workdir runs/latent_flow
bsvae fit-prior runs/latent_flow --kind flow_matching
bsvae sample runs/latent_flow --prior fitted --count 64 --out runs/latent_flow.png
"""

from bsvae_jax.config import TFDS, Config, Optimizer, Spatial
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The first stage."""
    return Config(
        data=TFDS(name="mnist"),
        network=Spatial(widths=(8, 16, 32, 32), blocks=1, groups=8),
        latent_size=64,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=2e-3, weight_decay=1e-5, schedule="cosine", warmup_steps=100, ema_decay=0.999),
        epochs=20,
        batch_size=128,
    )
