"""A convolutional autoencoder whose latent is a map: the kind that latent diffusion is trained on (Rombach et al. 2022).

Stages of residual blocks with GroupNorm and SiLU; between two stages the image is halved, and doubled again on the way back.
Self-attention over all positions of the coarsest map. The posterior of an image is a map [h, w, c]; to the rest of the package
it is a vector of `L = h * w * c` latents in row-major order, so every evaluation takes it as it is.

No statistic is shared between examples, so nothing is averaged over devices. Matrix products and activations run in
`dtype`; parameters, the statistics of GroupNorm and the softmax of attention are float32, and outputs are returned in at least
float32. Every residual branch ends in a layer that starts at zero: a fresh block is the identity.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.errors import UserError, check_count, check_flag, check_widths
from bsvae_jax.models._subpixel import Convolution
from bsvae_jax.models.layers import ZEROS, Labels, add_class, as_float32, dense, exact, stage_size
from bsvae_jax.models.network import Network, check_images, output_shape

Images = Float[Array, "batch height width channels"]
FeatureMaps = Float[Array, "batch map_height map_width features"]
Changed = Float[Array, "batch new_height new_width new_features"]
"""Feature maps of another size than those that came."""
Latents = Float[Array, "batch latent"]


@dataclass(frozen=True)
class Spatial(Network):
    """A convolutional autoencoder whose latents are a map, as latent diffusion uses; `latent_size` counts all its numbers."""

    widths: tuple[int, ...] = (64, 128, 256)
    """Channels per stage; between two stages the image is halved (rounded up), so the map is 4 times smaller with three."""
    blocks: int = 2
    """Residual blocks per stage, of the encoder and of the decoder."""
    attention: bool = True
    """Self-attention over all positions of the coarsest map."""
    groups: int = 32
    """Groups of GroupNorm; must divide every width."""

    def __post_init__(self) -> None:
        check_widths("network.widths", self.widths)
        check_count("network.blocks", self.blocks)
        check_flag("network.attention", self.attention)
        check_count("network.groups", self.groups)
        if any(width % self.groups for width in self.widths):
            widths = ", ".join(map(str, self.widths))
            common = math.gcd(*self.widths)
            raise UserError(
                f"network.groups must divide every width ({widths}), got {self.groups}; {common} and its divisors do."
            )

    convolutional: ClassVar[bool] = True
    has_latent_map: ClassVar[bool] = True

    def check(self, latent_size: int, data_shape: tuple[int, ...]) -> None:
        """Raise a UserError unless the data are images whose coarsest map the latents divide into."""
        height, width, _ = check_images(self, data_shape)
        latent_map(self, latent_size, height, width)

    def positions(self, latent_size: int, data_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the latent map."""
        return latent_map(self, latent_size, *data_shape[:2])[:2]

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
        """Convolutions with GroupNorm and attention; nothing is averaged over devices."""
        shared = (self, dtype, rematerialize, classes)
        encoder = SpatialEncoder(*shared, latent_size=latent_size)
        return encoder, SpatialDecoder(*shared, output_shape=output_shape(data_shape, outputs))


def latent_map(network: Spatial, latent_size: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape (h, w, c) of the latent map of images of `height` x `width` pixels.

    >>> latent_map(Spatial(widths=(32, 64, 64)), 256, 32, 32)
    (8, 8, 4)
    >>> latent_map(Spatial(widths=(32, 64, 64)), 100, 32, 32)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: latent_size 100 does not divide into the 8 x 8 positions of the coarsest map ...

    Raises:
      UserError: `latent_size` is not a multiple of the positions of the coarsest map; names the nearest that are.
    """
    rows, columns = (stage_size(side, len(network.widths) - 1) for side in (height, width))
    channels, left = divmod(latent_size, rows * columns)
    if left:
        nearby = [count * rows * columns for count in (channels, channels + 1) if count]
        raise UserError(
            f"latent_size {latent_size} does not divide into the {rows} x {columns} positions of the coarsest map "
            f"(images {height} x {width}, {len(network.widths)} stages); {' or '.join(map(str, nearby))} would."
        )
    return rows, columns, channels


def _group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """Statistics over positions and the channels of a group of one example (Wu & He 2018); the two-pass variance."""
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """`x + conv3x3(silu(norm(conv3x3(silu(norm(x))))))`; the shortcut is a conv1x1 where the number of channels changes."""

    features: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMaps) -> Changed:
        """Feature maps [B, h, w, C] to [B, h, w, features]."""
        y = nn.silu(_group_norm(self.groups, self.dtype, "norm1")(x))
        y = Convolution(self.features, 3, 1, self.dtype, name="conv1")(y)
        y = nn.silu(_group_norm(self.groups, self.dtype, "norm2")(y))
        y = Convolution(self.features, 3, 1, self.dtype, ZEROS, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Convolution(self.features, 1, 1, self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Self-attention with one head over all positions of a map, added to it: `x + out(softmax(q k^T / sqrt(C)) v)`.

    q, k and v are affine in `norm(x)` (Vaswani et al. 2017, equation 1).
    """

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMaps) -> FeatureMaps:
        """Feature maps [B, h, w, C] to the same shape."""
        batch, _, _, features = x.shape
        precision = exact(self.dtype)
        y = _group_norm(self.groups, self.dtype, "norm")(x).reshape(batch, -1, features)
        query, key, value = (dense(features, self.dtype, name=name)(y) for name in ("query", "key", "value"))
        scores = as_float32(jnp.einsum("bqc,bkc->bqk", query, key, precision=precision)) / features**0.5
        weights = nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, value, precision=precision)
        return x + dense(features, self.dtype, name="out", start=ZEROS)(mixed).reshape(x.shape)


class _Stages(nn.Module):
    """What encoder and decoder share."""

    network: Spatial
    dtype: Any = jnp.float32
    rematerialize: bool = False
    classes: int | None = None

    def block(self, features: int, name: str) -> nn.Module:
        """A residual block; rematerialized, its activations are computed again for the gradient instead of kept."""
        kind = nn.remat(ResidualBlock) if self.rematerialize else ResidualBlock
        return kind(features, self.network.groups, self.dtype, name=name)

    def middle(self, x: FeatureMaps) -> FeatureMaps:
        """The coarsest map: a block, attention where the network has it, a block."""
        x = self.block(self.network.widths[-1], "middle_block0")(x)
        if self.network.attention:
            x = Attention(self.network.groups, self.dtype, name="attention")(x)
        return self.block(self.network.widths[-1], "middle_block1")(x)

    def last(self, x: FeatureMaps, features: int, name: str) -> Changed:
        """`conv3x3(silu(norm(x)))` in float32."""
        x = nn.silu(_group_norm(self.network.groups, self.dtype, "norm")(x))
        return as_float32(Convolution(features, 3, 1, self.dtype, name=name)(x))


class SpatialEncoder(_Stages):
    """A conv3x3 to the first width; stages of blocks, a conv3x3 of stride 2 between them; the middle; 2c maps.

    The class is added to every position of the first conv3x3, here and in the decoder.
    """

    latent_size: int = 0

    @nn.compact
    def __call__(self, x: Images, train: bool = False, labels: Labels | None = None) -> tuple[Latents, Latents]:
        """Images [B, H, W, C] to mean and log-variance, each a map [h, w, c] in row-major order: [B, L]."""
        batch, height, width, _ = x.shape
        channels = latent_map(self.network, self.latent_size, height, width)[2]
        x = Convolution(self.network.widths[0], 3, 1, self.dtype, name="image")(x)
        x = add_class(x, labels, self.classes)
        for stage, features in enumerate(self.network.widths):
            if stage:
                x = Convolution(self.network.widths[stage - 1], 3, 2, self.dtype, name=f"stage{stage}_halved")(x)
            for block in range(self.network.blocks):
                x = self.block(features, f"stage{stage}_block{block}")(x)
        x = self.last(self.middle(x), 2 * channels, "posterior")
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return mean.reshape(batch, -1), log_variance.reshape(batch, -1)


class SpatialDecoder(_Stages):
    """The encoder backwards: the middle; stages of blocks, each but the last followed by nearest doubling and a conv3x3."""

    output_shape: tuple[int, ...] = (0, 0, 0)

    @nn.compact
    def __call__(self, z: Latents, train: bool = False, labels: Labels | None = None) -> Images:
        """Latents [B, L], a map [h, w, c] in row-major order each, to images [B, *output_shape]."""
        height, width, image_channels = self.output_shape
        widths = self.network.widths
        x = z.reshape(z.shape[0], *latent_map(self.network, z.shape[1], height, width))
        x = add_class(Convolution(widths[-1], 3, 1, self.dtype, name="latent")(x), labels, self.classes)
        x = self.middle(x)
        for stage in reversed(range(len(widths))):
            for block in range(self.network.blocks):
                x = self.block(widths[stage], f"stage{stage}_block{block}")(x)
            if stage:
                x = doubled(x, (stage_size(height, stage - 1), stage_size(width, stage - 1)))
                x = Convolution(widths[stage], 3, 1, self.dtype, name=f"stage{stage}_doubled")(x)
        return self.last(x, image_channels, "image")


def doubled(x: FeatureMaps, size: tuple[int, int]) -> Changed:
    """Every position as a 2 x 2 square of itself, [B, h, w, C] to [B, *size, C]; an odd size cuts the last row or column.

    >>> doubled(jnp.arange(2.0).reshape(1, 1, 2, 1), (2, 3))[0, ..., 0]
    Array([[0., 0., 1.],
           [0., 0., 1.]], dtype=float32)
    """
    batch, height, width, features = x.shape
    squares = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, features))
    return squares.reshape(batch, 2 * height, 2 * width, features)[:, : size[0], : size[1]]
