"""BS-VAE on CelebA, 64x64, as Kim & Lee (2024) trained it.

    bsvae train configs/celeba_paper.py --data.manual-dir FOLDER

The folder holds CelebA as published: `img_align_celeba.zip` (or the folder unpacked from it), `list_eval_partition.txt` and
`list_attr_celeba.txt`, which its hosting hands out to people only. They are prepared at the first use, without TensorFlow:
the center 148 x 148 of each aligned image, resized to 64 x 64. The paper flips at random before it crops; the order makes no
difference. See configs/mnist_paper.py for where the evaluation differs from the paper's code.

Hardware and time: an accelerator with 3 GB for the resident images; not measured yet. On 2 CPU cores it trains 64 images/s (58
to 70), float32, batch 32, 34% of their peak, 5.8 GiB with the images, and 0.60 times as fast as PyTorch 2.13 (channels-last)
in the same run: `bsvae bench configs/celeba_paper.py --noise --repeats 1 --seconds 5 --batch-size 32 --against torch`.
"""

from bsvae_jax.config import TFDS, Augmentation, Config, Optimizer, Residual
from bsvae_jax.objective import PAPER_FLOOR, Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=TFDS(name="celeb_a", crop=148, size=64, validation="own"),
        augmentation=Augmentation(flip=True),
        network=Residual(widths=(32, 64, 128, 256)),
        latent_size=64,
        decoder_variance=Optimal(over="example", floor=PAPER_FLOOR),
        beta=1.0,
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-5, schedule="cosine_restarts", cycles=2),
        epochs=50,
        batch_size=512,
    )
