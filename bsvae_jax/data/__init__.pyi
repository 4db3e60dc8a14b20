from .augmentation import Augmentation, augment
from .datasets import MNIST, TFDS, Arrays, Dataset, Digits, Folder, load, shape_of
from .image_set import DataShape, ImageSet, check_images, to_unit_interval
from .iterables import prepare
from .shuffle import ShuffledOrder

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
    "prepare",
    "shape_of",
    "to_unit_interval",
]
