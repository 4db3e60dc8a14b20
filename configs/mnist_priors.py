"""Priors beyond the standard normal on MNIST, at equal architecture and epochs: a small dense BS-VAE.

    bsvae sweep configs/mnist_priors.py

Four priors at three beta, the members of each prior as one compiled program. `bsvae evaluate runs/mnist_priors-sweep` adds
I(x; z) and KL(q(z) || p(z)), what a prior leaves of the mismatch, to the table; `bsvae fit-prior` of a member fits a prior
afterwards.

Hardware and time: 14 minutes on two CPU cores beside other jobs. Expect on the test set (with `--data.validation None`, seed 0;
standard error over images 2 nats) the calibrated ELBO in nats and, in brackets, the rate, KL(q(z) || p(z)), an upper estimate,
both in nats, and FID by a LeNet (`bsvae evaluate runs/mnist_priors-sweep --split test --fid 10000 --fid-network
lenet`, 4 minutes; it differs a little between machines, as the LeNet does):

                       beta 0.3                   beta 1                     beta 3
    standard normal    476.9 (58.2, 49.1; 332)    489.0 (46.5, 37.3; 298)    482.1 (35.0, 25.8; 256)
    mixture of 50      481.5 (52.8, 43.7; 174)    488.3 (41.9, 32.9; 157)    481.6 (31.5, 22.3; 144)
    VampPrior of 100   480.2 (52.6, 43.6;  83)    483.3 (40.3, 31.1; 102)    472.6 (29.7, 20.5; 102)
    flow, 8 layers     484.6 (47.3, 38.1; 111)    487.9 (37.1, 28.0; 111)    476.2 (27.5, 18.3; 113)
    standard normal, then `bsvae fit-prior --kind mixture --components 50` of that member:
                       487.5 (47.7, 38.6;  77)    497.8 (37.8, 28.6;  74)    489.0 (28.2, 19.0;  76)

`notebooks/priors.ipynb` says what follows from it, and does the same on the digits.
"""

from bsvae_jax import Sweep
from bsvae_jax.config import MLP, TFDS, Config, Flow, Mixture, Optimizer, StandardNormal, VampPrior
from bsvae_jax.objective import Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=TFDS(name="mnist"),
        network=MLP(hidden=(256, 256)),
        latent_size=16,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine", ema_decay=0.999),
        epochs=20,
        batch_size=500,
        evaluate_every=10,
    )


def get_sweep() -> Sweep:
    """Priors by beta."""
    return Sweep(
        beta=(0.3, 1.0, 3.0),
        decoder_variance=(Optimal(),),
        seeds=1,
        prior=(StandardNormal(), Mixture(50), VampPrior(100), Flow()),
    )
