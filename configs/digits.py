"""BS-VAE on the embedded digits: the first thing to run.

    bsvae train configs/digits.py

1,500 training and 297 test images of 8x8 pixels with 17 gray levels, from scikit-learn; no download.

Hardware and time: 2 CPU cores, 20-30 s with compilation. Expect, at the end of training (seed 0, the same on 1 and on 8
devices):

    calibrated ELBO   46.6 nats (training), 23.3 +- 1.9 nats (test); 3.48 bits/dim
    profile ELBO      50.1 nats (training), 33.7 +- 1.0 nats (test)
    rate              28.5 nats, all 16 latents active

The gap between training and test has two causes: 1,500 images are few for this network, and scikit-learn's digits are ordered
by writer, so that the last 297 are not exchangeable with the first 1,500; random splits give 32.0 to 34.8 calibrated nats on
the test set.

The sweep's grid is coarse. On a finer one, beta chosen on the test set, the best calibrated ELBO of BS-VAE is at beta 1.5
(25.5 +- 0.4 nats), of one optimal variance for all images also at 1.5 (26.0, paired 0.5 above BS-VAE), and of the beta-VAE
with a constant 0.5 at beta 0.03 (24.7).

Residuals have heavy tails: within two standard deviations lie 88.2% of the test set's with the one calibrated variance, 90.3%
with one per pixel; a Gaussian has 95.4%.
README's figure: `bsvae sweep configs/digits.py --beta 0.01 0.02 0.05 0.1 0.2 0.3 0.5 1 2 3 5 10 100`.
"""

from bsvae_jax import Sweep
from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.objective import Constant, Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=Digits(validation=0.1),
        network=MLP(hidden=(256, 256)),
        latent_size=16,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine", ema_decay=0.99),
        epochs=50,
        batch_size=96,
        evaluate_every=25,
    )


def get_sweep() -> Sweep:
    """BS-VAE, one optimal variance for a batch and the conventional beta-VAE, at betas that give them similar rates."""
    variances = (Optimal(), Optimal("batch"), Constant(0.5))
    return Sweep((0.3, 1.0, 2.0, 6.0), variances, seeds=3, own_beta=((Constant(0.5), (0.005, 0.02, 0.08, 0.6)),))
