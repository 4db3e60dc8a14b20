"""Two stages on MNIST: an autoencoder with a latent map, then flow matching on its latents (latent diffusion, in small).

    bsvae train configs/latent_flow.py --workdir runs/latent_flow
    bsvae fit-prior runs/latent_flow --kind flow_matching
    bsvae sample runs/latent_flow --prior fitted --count 64 --out runs/latent_flow.png

The latent map has 4 x 4 positions and 4 channels. MNIST is downloaded and prepared at the first use; where there is no network,
`--data mnist --data.folder FOLDER` reads its four canonical files. Both commands may be interrupted and repeated.

Hardware and time: an accelerator for the 20 epochs and the 10,000 steps; neither has been measured yet. Expect after
`--epochs 2 --data.validation None` (measured, seed 0, 34 minutes on one CPU core beside other jobs), on the test set:

    objective          -979 nats: distortion -1131, rate 152.1
    MSE 0.0039

and of `fit-prior --kind flow_matching --steps 450 --width 64 --depth 2` (4 minutes there): log density of the latents of 200
held-out training images -65.7 nats under the fitted prior, -80.4 under N(0, I), so the rate falls by 15 nats.
Samples of N(0, I) are strokes that do not join; many of the fitted prior's are already digits, and as
many are not yet.
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
