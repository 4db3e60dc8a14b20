"""BS-VAE on CelebA, 64x64, as Kim & Lee (2024) trained it.

    bsvae train configs/celeba_paper.py --data.data-dir FOLDER_OF_TFDS

Needs CelebA prepared as a TFDS set `celeb_a` of 64x64 images (the aligned images, centre crop 148, resized to 64) in
array_record form. The paper flips at random before it crops; the order makes no difference. See configs/mnist_paper.py for
where the evaluation differs from the paper's code.

Hardware and time: an accelerator with 3 GB for the resident images; not measured yet.
"""

from bsvae_jax.config import TFDS, Augmentation, Config, Optimizer, Residual
from bsvae_jax.objective import PAPER_FLOOR, Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=TFDS(name="celeb_a"),
        augmentation=Augmentation(flip=True),
        network=Residual(widths=(32, 64, 128, 256)),
        latent_size=64,
        decoder_variance=Optimal(over="example", floor=PAPER_FLOOR),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine_restarts", cycles=2),
        epochs=50,
        batch_size=512,
    )
