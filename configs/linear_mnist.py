"""Linear VAE on MNIST with one optimal variance for all: the model whose optimum is known exactly.

    bsvae train configs/linear_mnist.py --data.folder FOLDER_OF_THE_FOUR_FILES --beta 10 --workdir runs/linear10

`bsvae_jax.theory.linear_optimum` of the covariance eigenvalues of the 60,000 images says where training must end.

Hardware and time: 2 CPU cores, 4-6 minutes a run. Expect on the training set (measured, seed 0; theory in brackets):

    beta    objective [nats]          variance              rate [nats]
    0.1     -167.79  (-167.81)        0.03791 (0.03791)     26.55 (26.25)
    1       -149.81  (-149.81)        0.03826 (0.03826)     17.02 (17.01)
    10       -54.61  ( -54.59)        0.04217 (0.04217)      7.41 ( 7.41)
    100       54.32  (  54.32)        0.06725 (0.06725)      0.00 ( 0.00)   collapsed: beyond the critical beta of 76.1

`pytest -m slow -k linear_mnist` repeats the table. At small beta the latents' scale is held by `beta * rate` alone, hence the
many epochs: 200 of them at a learning rate of 3e-2 end 0.1 nats from the objective at beta = 0.1, but 4% from the rate.
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
