"""Data sets: where examples come from, how they are ordered, and how they are changed on the device.

Begin with `datasets`, the kinds that a config can hold, and `image_set`, what each of them ends in. `sources` reads them,
`cache` decodes image files once into a memory map (`image_files`, `decoding`, `tfds_builders`); `shuffle` orders, `prefetch`
brings to the devices, `augmentation` changes at random.
"""

from bsvae_jax.data.augmentation import Augmentation, augment
from bsvae_jax.data.datasets import MNIST, TFDS, Arrays, Dataset, Digits, Folder, load, shape_of
from bsvae_jax.data.image_set import DataShape, ImageSet, check_images, to_unit_interval
from bsvae_jax.data.shuffle import ShuffledOrder

__all__ = [
    "MNIST",
    "TFDS",
    "Arrays",
    "Augmentation",
    "DataShape",
    "Dataset",
    "Digits",
    "Folder",
    "ImageSet",
    "ShuffledOrder",
    "augment",
    "check_images",
    "load",
    "shape_of",
    "to_unit_interval",
]
