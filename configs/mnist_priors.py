"""Priors beyond the standard normal on MNIST, at equal architecture and epochs: a small dense BS-VAE.

    bsvae sweep configs/mnist_priors.py

Four priors, the members of each as one compiled program. `bsvae evaluate runs/mnist_priors-sweep` adds KL(q(z) || p(z)), what a
prior leaves of the mismatch, to the table; `bsvae fit-prior` of a member fits a prior afterwards.
"""

from bsvae_jax.config import MLP, TFDS, Config, Flow, Mixture, Optimizer, StandardNormal, VampPrior
from bsvae_jax.grid import Sweep
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
        beta=(1.0,),
        decoder_variance=(Optimal(),),
        seeds=1,
        prior=(StandardNormal(), Mixture(50), VampPrior(100), Flow()),
    )
