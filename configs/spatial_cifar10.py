"""BS-VAE on CIFAR-10 with the autoencoder of latent diffusion: a latent map of 8 x 8 positions and 4 channels.

    bsvae train configs/spatial_cifar10.py
    bsvae sweep configs/spatial_cifar10.py

For larger images one more stage halves them once more: CelebA at 64 x 64 has the same latent map with

    bsvae train configs/spatial_cifar10.py --data.name celeb_a --data.manual-dir FOLDER --data.crop 148 --data.size 64 \\
        --network.widths 64 128 256 256

Hardware and time: an accelerator; this network has not been measured yet. A small one of its kind was trained at 64 x 64 on 2
CPU cores, 9,000 of the 10,000 validation images of Tiny ImageNet, three epochs in 15 minutes beside other jobs (`--data folder
--data.path FOLDER --data.size 64 --data.channels 3 --network.widths 8 16 32 32 --network.blocks 1 --network.groups 4
--batch-size 32 --epochs 3 --optimizer.learning-rate 2e-3 --optimizer.warmup-steps 0 --optimizer.ema-decay 0.99 --precision
bfloat16 --rematerialize`): on the other 1,000, calibrated ELBO 7,152 +- 99 nats (7.155 bits/dim), rate 435.5, MSE 0.0170,
all 256 latents active. Reconstructions have the forms and no fine detail; samples of N(0, I) are textures, for the 8 x 8
positions are drawn independently: that is what a second stage is for (latent_flow.py).

Computed: at 64 x 64 with four stages, as above, 128 images a step, bfloat16 and `--rematerialize`, eight TPU v5e chips
take at least 6.9 ms a step (18,500 images/s, 45% of their peak, bound by memory) and 2.4 GiB each: `bsvae compile
configs/spatial_cifar10.py --topology v5e:2x4 --image-shape 64 64 3 --images 162770 --network.widths 64 128 256 256 --precision
bfloat16 --rematerialize`, four minutes on one busy core.

The sweep asks whether beta and sigma^2 stay apart in a larger architecture: with a constant variance only their product counts,
with the optimal one beta alone moves along the curve. Measured with a small network of this kind on the first 2,048 training
and 512 test images for 10 epochs (`--data arrays --network.widths 8 16 32 --network.blocks 1 --network.groups 4 --epochs 10
--batch-size 32 --augmentation.no-flip --optimizer.learning-rate 2e-3 --optimizer.warmup-steps 0 --optimizer.ema-decay 0.99
--optimizer.gradient-clip None`; 9 models, 47 minutes on one CPU core beside other jobs), on the test images:

    variance          beta   beta sigma^2   rate [nats]   PSNR [dB]   profile ELBO   calibrated ELBO [nats]
    constant 0.05     0.02   0.001          723           19.99       1987           1747
    constant 0.05     0.2    0.01           279.0         19.81       2368           2144
    constant 0.5      0.02   0.01           278.7         19.82       2373           2149
    constant 0.05     2      0.1            77.09         18.33       2047           1884
    constant 0.5      0.2    0.1            77.10         18.33       2048           1885
    constant 0.5      2      1              12.3          15.23       1015           888
    optimal           0.02   0.00018        1114          21.44       2109           1785
    optimal           0.2    0.0018         630           21.20       2509           2207
    optimal           2      0.023          175           20.02       2547           2307

Rows of one product beta sigma^2 agree to 0.3% in every column, though sigma^2 differs tenfold. These 640 steps are far from
convergence: reconstructions are blurred and have hardly any color yet, so the lead of the optimal variance at equal rate may
be one of speed. One seed.
"""

from bsvae_jax import Sweep
from bsvae_jax.config import TFDS, Augmentation, Config, Optimizer, Spatial
from bsvae_jax.objective import Constant, Optimal


def get_config() -> Config:
    """The experiment."""
    return Config(
        data=TFDS(name="cifar10"),
        augmentation=Augmentation(flip=True),
        network=Spatial(widths=(64, 128, 256), blocks=2),
        latent_size=8 * 8 * 4,
        decoder_variance=Optimal(over="example"),
        beta=1.0,
        optimizer=Optimizer(
            learning_rate=3e-4, weight_decay=1e-5, schedule="cosine", warmup_steps=1000, gradient_clip=1.0, ema_decay=0.9999
        ),
        epochs=100,
        batch_size=128,
        evaluate_every=5,
    )


def get_sweep() -> Sweep:
    """Pairs of a beta and a constant variance with the same product, and the optimal variance at every beta."""
    return Sweep(beta=(0.02, 0.2, 2.0), decoder_variance=(Optimal(), Constant(0.5), Constant(0.05)), seeds=1)
