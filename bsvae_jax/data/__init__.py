"""Images: where they come from, how they are ordered, and how they are changed on the device."""

from bsvae_jax.data.augmentation import augment
from bsvae_jax.data.images import DataShape, ImageSet, check_images
from bsvae_jax.data.order import ShuffledOrder
from bsvae_jax.data.sources import load, shape_of

__all__ = ["DataShape", "ImageSet", "ShuffledOrder", "augment", "check_images", "load", "shape_of"]
