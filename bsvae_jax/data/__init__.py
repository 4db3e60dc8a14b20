"""Images: where they come from, how they are ordered, and how they are changed on the device."""

from bsvae_jax.data.augmentation import augment
from bsvae_jax.data.datasets import load, shape_of
from bsvae_jax.data.image_set import DataShape, ImageSet, check_images
from bsvae_jax.data.shuffle import ShuffledOrder

__all__ = ["DataShape", "ImageSet", "ShuffledOrder", "augment", "check_images", "load", "shape_of"]
