"""Random changes of training images, on the device, each image by its own key.

Rotation and random resized crop are composed into one affine map and sampled once, bilinearly, with half-pixel centers and
zeros outside. (torchvision resamples twice, and rotates with nearest-neighbor interpolation by default.)
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bsvae_jax.errors import UserError, check_flag, check_kind, check_number
from bsvae_jax.random import check_key

Image = Float[Array, "height width channels"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image [H, W, C], on the device. Evaluation data is never augmented.

    >>> Augmentation(flip=True, crop_scale=(0.8, 1.0)) == Augmentation()  # that asks for no change
    False

    Raises:
      UserError: a field of a wrong kind or out of range.
    """

    rotation_degrees: float = 0.0
    """Rotation uniform in +- this many degrees."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: range of the cropped share of the area."""
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: range of its width-to-height ratio over that of the image (log-uniform)."""
    flip: bool = False
    """Mirror left-right with probability one half."""

    def __post_init__(self) -> None:
        check_number("augmentation.rotation_degrees", self.rotation_degrees, low=0.0, high=180.0)
        for name in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, name)
            if not isinstance(bounds, tuple) or len(bounds) != 2:
                raise UserError(f"augmentation.{name} must be a pair (low, high), got {bounds!r}.")
            low, high = bounds
            check_number(f"augmentation.{name}", low, low=0.0, open_low=True)
            check_number(f"augmentation.{name}", high, low=low, high=1.0 if name == "crop_scale" else math.inf)
        check_flag("augmentation.flip", self.flip)


def augment(
    images: Float[Array, "batch height width channels"], keys: Key[Array, " batch"], config: Augmentation
) -> Float[Array, "batch height width channels"]:
    """Images [B, H, W, C] in [0, 1] changed at random; the identity where the config asks for nothing.

    Args:
      images: float; what comes back has their shape and range.
      keys: one for each image, [B].
      config: what may change.

    >>> ramps = jnp.tile(jnp.array([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1), (100, 1, 1, 1))  # 100 images of 1 x 3 pixels
    >>> changed = augment(ramps, jax.random.split(jax.random.key(0), 100), Augmentation(flip=True))
    >>> sorted(set(changed[:, 0, 0, 0].tolist()))  # some are mirrored
    [0.0, 1.0]

    Raises:
      UserError: images or keys of another shape or type, or something else than an `Augmentation`.
    """
    check_kind("config", config, Augmentation)
    if not isinstance(images, jax.Array) or images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        given = f"{images.dtype} of shape {images.shape}" if hasattr(images, "shape") else repr(images)
        raise UserError(f"images must be floats of JAX in [0, 1], shape [B, H, W, C], got {given}.")
    check_key(keys, len(images))
    if keys.ndim == 0:
        raise UserError(f"keys must be one for each of the {len(images)} images; jax.random.split makes them.")
    if config == Augmentation():
        return images
    return jax.vmap(lambda image, key: _augment_one(image, key, config))(images, keys)


def _augment_one(image: Image, key: Key[Array, ""], config: Augmentation) -> Image:
    affine_key, flip_key = jax.random.split(key)
    if config.rotation_degrees or config.crop_scale != (1.0, 1.0) or config.crop_ratio != (1.0, 1.0):
        image = _rotate_and_crop(image, affine_key, config)
    if config.flip:
        image = jnp.where(jax.random.bernoulli(flip_key, jnp.float32(0.5)), image[:, ::-1], image)
    return image


def _rotate_and_crop(image: Image, key: Key[Array, ""], config: Augmentation) -> Image:
    height, width, _ = image.shape
    angle_key, scale_key, ratio_key, row_key, column_key = jax.random.split(key, 5)
    limit = jnp.deg2rad(config.rotation_degrees)
    angle = jax.random.uniform(angle_key, dtype=jnp.float32, minval=-limit, maxval=limit)
    scale = jax.random.uniform(scale_key, dtype=jnp.float32, minval=config.crop_scale[0], maxval=config.crop_scale[1])
    low, high = (jnp.log(jnp.asarray(bound)) for bound in config.crop_ratio)
    ratio = jnp.exp(jax.random.uniform(ratio_key, dtype=jnp.float32, minval=low, maxval=high))
    # Height and width of the crop as shares of the image's, at most all of it.
    crop_height, crop_width = jnp.minimum(jnp.sqrt(scale / ratio), 1.0), jnp.minimum(jnp.sqrt(scale * ratio), 1.0)
    top = jax.random.uniform(row_key, dtype=jnp.float32) * (1.0 - crop_height) * height
    left = jax.random.uniform(column_key, dtype=jnp.float32) * (1.0 - crop_width) * width
    rows, columns = jnp.meshgrid(*(jnp.arange(size, dtype=jnp.float32) + 0.5 for size in (height, width)), indexing="ij")
    # Output pixel -> pixel of the rotated image (crop) -> pixel of the source (rotation about the center).
    rows, columns = top + crop_height * rows - height / 2, left + crop_width * columns - width / 2
    source_rows = jnp.cos(angle) * rows - jnp.sin(angle) * columns + height / 2 - 0.5
    source_columns = jnp.sin(angle) * rows + jnp.cos(angle) * columns + width / 2 - 0.5
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, [source_rows, source_columns], order=1, mode="constant"),
        in_axes=-1,
        out_axes=-1,
    )(image)
