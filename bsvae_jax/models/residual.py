"""The paper's convolutional residual network.

Its encoder maps images `[B, H, W, C]` to the posterior's mean and log-variance, each `[B, L]`; its decoder maps `z [B, L]` to
an image of any channel count, with no output nonlinearity. Images are NHWC. Matrix products and activations run in
`dtype`; parameters and BatchNorm statistics are float32, and outputs are returned in at least float32.

The network (Kim & Lee 2024) has the geometry, padding, constants and initialization of the PyTorch layers it was published
with, so weights can be carried over. Flax's default initialization has three times the variance, which drives the rate to
thousands of nats in the first steps, and Adam's second moments remember that for a thousand more. One difference is left:
PyTorch updates the running variance of a BatchNorm with the *unbiased* batch variance (n / (n - 1)), Flax with the biased one;
at evaluation both use what is stored.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.errors import check_widths
from bsvae_jax.models._subpixel import (
    Convolution,
    convolve,
    convolve_transposed,
    convolve_transposed_unordered,
    convolve_unordered,
)
from bsvae_jax.models.layers import (
    PYTORCH,
    PYTORCH_TRANSPOSED,
    BatchNorm,
    Bias,
    Labels,
    Latents,
    PosteriorParameters,
    add_bias,
    add_class,
    as_float32,
    dense,
    leaky_relu,
    split_posterior,
    stage_size,
)
from bsvae_jax.models.network import Network, check_images, output_shape

COARSEST = 8
"""Largest side of the map that the dense layers take, where no widths are chosen: its positions times its channels times twice
the latents are their weights."""

Images = Float[Array, "batch height width channels"]
FeatureMaps = Float[Array, "batch map_height map_width features"]
MapsOrPixels = Float[Array, "batch *positions channels"]
"""A map of each example, or its pixels in the platform's order."""
ResultOrPixels = Float[Array, "batch *result_positions features"]


@dataclass(frozen=True)
class Residual(Network):
    """The paper's convolutional residual network; any image size and channel count.

    >>> Residual().widths_for((256, 256, 3))
    (32, 64, 128, 256, 512)
    """

    widths: tuple[int, ...] | None = None
    """Channels per stage; every stage halves the image (rounded up). None: 32 64 128 up to 64 x 64 pixels, and for larger
    images as many more stages, of twice the channels but at most 512, as leave a map of at most 8 x 8. The paper: 32 64 128
    (MNIST), 32 64 128 256 (CelebA)."""

    def __post_init__(self) -> None:
        if self.widths is not None:
            check_widths("network.widths", self.widths)

    convolutional: ClassVar[bool] = True

    def widths_for(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The widths, or those that images of this size are given where none are chosen."""
        if self.widths is not None:
            return self.widths
        side, stages = max(check_images(self, data_shape)[:2]), 3
        while stage_size(side, stages) > COARSEST:
            stages += 1
        return tuple(min(32 * 2**stage, 512) for stage in range(stages))

    def for_data(self, data_shape: tuple[int, ...]) -> "Residual":
        """With its widths chosen."""
        return dataclasses.replace(self, widths=self.widths_for(data_shape))

    def check(self, latent_size: int, data_shape: tuple[int, ...]) -> None:
        """Raise a UserError unless the data are images."""
        check_images(self, data_shape)

    def build(
        self,
        latent_size: int,
        data_shape: tuple[int, ...],
        outputs: int = 1,
        axis_name: str | None = None,
        dtype: Any = jnp.float32,
        rematerialize: bool = False,
        classes: int | None = None,
    ) -> tuple[nn.Module, nn.Module]:
        """Convolutions with BatchNorm, whose statistics are averaged over `axis_name`."""
        shared = (self.widths_for(data_shape), axis_name, dtype, rematerialize, classes)
        return ResidualEncoder(latent_size, *shared), ResidualDecoder(output_shape(data_shape, outputs), *shared)


class TransposedConvolution(nn.Module):
    """3x3 transposed convolution with padding 1: PyTorch's `ConvTranspose2d(in, features, 3, stride, 1, output_padding)`.

    `out[stride * i + k - 1] += in[i] @ kernel[k]` along both image axes; the kernel is stored as `[3, 3, in, features]`.
    """

    features: int
    stride: int
    unordered: bool = False
    """Stride 2: leave the pixels in the platform's order; stride 1: they are given so. See `_subpixel`."""
    dtype: Any = jnp.float32

    def __call__(self, x: MapsOrPixels, size: tuple[int, int]) -> ResultOrPixels:
        """Maps [B, h, w, C] to [B, *size, features]."""
        return add_bias(*self.apart(x, size))

    @nn.compact
    def apart(self, x: MapsOrPixels, size: tuple[int, int]) -> tuple[ResultOrPixels, Bias]:
        """The result without the bias, and the bias, for a `BatchNorm`."""
        start, shape = PYTORCH_TRANSPOSED, (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", start.kernel, shape, jnp.float32)
        bias = self.param("bias", start.bias(9 * self.features), (self.features,), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        if self.stride == 2:
            out = convolve_transposed_unordered(x, kernel) if self.unordered else convolve_transposed(x, kernel, size)
        elif self.unordered:
            out = convolve_unordered(x, kernel[::-1, ::-1], size)
        else:
            out = convolve(x, kernel[::-1, ::-1], ((1, 1), (1, 1)))
        return out, bias


class ResidualBlock(nn.Module):
    """conv3x3-BN-LeakyReLU-conv3x3-BN plus shortcut, then LeakyReLU(0.01).

    The shortcut is the identity, or conv1x1-BN where the stride or the number of channels changes.
    """

    features: int
    stride: int = 1
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> FeatureMaps:
        """Feature maps [B, h, w, C] to [B, ceil(h / stride), ceil(w / stride), features]."""
        conv1 = Convolution(self.features, 3, self.stride, self.dtype, PYTORCH, name="conv1")
        y = BatchNorm(train, self.axis_name, self.dtype, leaky=True, name="norm1")(*conv1.apart(x))
        conv2 = Convolution(self.features, 3, 1, self.dtype, PYTORCH, name="conv2")
        y = BatchNorm(train, self.axis_name, self.dtype, name="norm2")(*conv2.apart(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = Convolution(self.features, 1, self.stride, self.dtype, PYTORCH, name="shortcut_conv")
            x = BatchNorm(train, self.axis_name, self.dtype, name="shortcut_norm")(*shortcut.apart(x))
        return leaky_relu(y + x)


def _block(rematerialize: bool) -> type[ResidualBlock]:
    """The block; or one that keeps nothing but its input for the backward pass."""
    return nn.remat(ResidualBlock, static_argnums=(2,)) if rematerialize else ResidualBlock


class ResidualEncoder(nn.Module):
    """Two residual blocks per stage, the first of stride 2; then Dense(2L)-BN-LeakyReLU-Dense(2L).

    The class is added to what the first dense layer gives.
    """

    latent_size: int
    widths: tuple[int, ...]
    axis_name: str | None = None
    dtype: Any = jnp.float32
    rematerialize: bool = False
    classes: int | None = None

    @nn.compact
    def __call__(self, x: Images, train: bool = False, labels: Labels | None = None) -> PosteriorParameters:
        """Images [B, H, W, C] to mean and log-variance, [B, L]."""
        for stage, width in enumerate(self.widths):
            for block, stride in enumerate((2, 1)):
                name = f"stage{stage}_block{block}"
                x = _block(self.rematerialize)(width, stride, self.axis_name, self.dtype, name=name)(x, train)
        first = dense(2 * self.latent_size, self.dtype, name="hidden", start=PYTORCH)
        hidden, bias = first.apart(x.reshape(x.shape[0], -1))
        hidden = add_class(hidden, labels, self.classes)
        hidden = BatchNorm(train, self.axis_name, self.dtype, leaky=True, name="hidden_norm")(hidden, bias)
        return split_posterior(dense(2 * self.latent_size, self.dtype, name="posterior", start=PYTORCH)(hidden))


def _upsample(conv: TransposedConvolution, norm: BatchNorm, x: Array, size: tuple[int, int]) -> Array:
    return norm(*conv.apart(x, size))


class ResidualDecoder(nn.Module):
    """Dense-BN-LeakyReLU to the smallest map, one residual block, then transposed conv 3x3 of stride 2-BN-LeakyReLU per stage.

    The class is added to what the dense layer gives.

    Stages take the encoder's widths in reverse, each going to the next one's width; the last keeps its own. A transposed
    convolution of stride 1 ends in the image. BatchNorm of the dense layer is per feature, before the reshape.
    """

    output_shape: tuple[int, ...]
    widths: tuple[int, ...]
    axis_name: str | None = None
    dtype: Any = jnp.float32
    rematerialize: bool = False
    classes: int | None = None

    @nn.compact
    def __call__(self, z: Latents, train: bool = False, labels: Labels | None = None) -> Images:
        """Latents [B, L] to images [B, *output_shape]."""
        height, width, channels = self.output_shape
        features, stages = self.widths[::-1], len(self.widths)
        sizes = [(stage_size(height, stage), stage_size(width, stage)) for stage in reversed(range(stages + 1))]
        x, bias = dense(math.prod(sizes[0]) * features[0], self.dtype, name="hidden", start=PYTORCH).apart(z)
        x = add_class(x, labels, self.classes)
        x = BatchNorm(train, self.axis_name, self.dtype, leaky=True, name="hidden_norm")(x, bias)
        x = x.reshape(z.shape[0], *sizes[0], features[0])
        x = _block(self.rematerialize)(features[0], 1, self.axis_name, self.dtype, name="block")(x, train)
        unordered = (height % 2, width % 2) == (0, 0)
        for stage, feature in enumerate((*features[1:], features[-1])):
            last = stage == stages - 1
            name = f"stage{stage}_conv"
            conv = TransposedConvolution(feature, 2, unordered and last, self.dtype, name=name)
            norm = BatchNorm(train, self.axis_name, self.dtype, leaky=True, name=f"stage{stage}_norm")
            run = nn.remat(_upsample, static_argnums=(3,)) if self.rematerialize else _upsample
            x = run(conv, norm, x, sizes[stage + 1])
        x = TransposedConvolution(channels, 1, unordered, self.dtype, name="image")(x, (height, width))
        return as_float32(x)
