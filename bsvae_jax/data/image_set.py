"""What every data source ends in: training and test images as arrays, with what their values mean."""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsvae_jax import theory
from bsvae_jax.errors import UserError, check_count, check_kind

SPLITS = ("train", "test", "validation")
"""In this order; the last is not always there."""
SPLIT_NAMES = {"train": "training set", "test": "test set", "validation": "validation set"}
"""What people call them."""

ROUNDING = 1e-6
"""By how much floats may leave [0, 1]; they are clipped."""

SPECTRUM_LIMIT = 4096
"""Largest number of pixels times channels whose covariance is decomposed: 4,096 take a minute, ten times as many a day."""


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether one example is an image, [height, width, channels]: what needs the two axes of an image asks here.

    >>> [is_image(shape) for shape in ((28, 28, 1), (64, 3), (10,), (8, 16, 16, 1))]
    [True, False, False, False]
    """
    return len(shape) == 3


def no_images(shape: tuple[int, ...]) -> str:
    """What examples are that are no images in [0, 1], for a message: `of shape (64, 3)`."""
    return f"of shape {shape}" + (", not all in [0, 1]" if is_image(shape) else "")


def bin_width_of(levels: int) -> float:
    """Width of one of `levels` gray levels after scaling to [0, 1], both ends included.

    >>> bin_width_of(17)
    0.0625
    """
    return 1.0 / (levels - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """Examples as stored, with what a model needs to take them, from the data set to the model: a pytree, on host or devices.

    >>> examples = Examples(np.array([0, 4, 16], np.uint8), levels=17)
    >>> examples.inputs()[0].tolist(), examples.bin_width
    ([0.0, 0.25, 1.0], 0.0625)
    """

    images: Any
    """[..., *image_shape], uint8 or float32."""
    labels: Any = None
    """Of a conditional model the class of each, [...], int32."""
    levels: int = field(default=256, metadata={"static": True})
    """Gray levels of stored uint8 images; a constant of compiled programs."""

    @property
    def bin_width(self) -> float:
        """Width of a gray level after scaling to [0, 1]."""
        return bin_width_of(self.levels)

    def inputs(self) -> tuple[Float[Array, "..."], Any]:
        """What a model takes: the images by `to_unit_interval`, and their labels."""
        return to_unit_interval(self.images, self.levels), self.labels


class DataShape(NamedTuple):
    """What is known of a set of images without reading it.

    >>> shape = DataShape((28, 28, 1), 256, np.uint8, train=60_000, test=10_000)
    >>> shape.nbytes
    54880000
    """

    image_shape: tuple[int, ...]
    """Of one example: (H, W, C) of images."""
    levels: int
    """Gray levels of stored uint8 images."""
    dtype: Any
    """As stored."""
    train: int
    """Training images."""
    test: int
    """Held-out images."""
    validation: int = 0
    """Images for validation."""

    @property
    def bin_width(self) -> float:
        """Width of a gray level after scaling to [0, 1]."""
        return bin_width_of(self.levels)

    @property
    def image_bytes(self) -> int:
        """One image, as stored."""
        return math.prod(self.image_shape) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """All splits, as stored."""
        return (self.train + self.test + self.validation) * self.image_bytes


@dataclass(frozen=True)
class ImageSet:
    """Training and test images, and where choices are not to be made on the test images, those for validation.

    >>> blank = np.zeros((5, 8, 8, 1), np.uint8)
    >>> images = ImageSet("blank", train=blank, test=blank[:1], levels=17)
    >>> images.image_shape, images.bin_width, len(images.train)
    ((8, 8, 1), 0.0625, 5)

    Raises:
      UserError: an array of another shape or type, an empty one, or fewer than two levels.
    """

    name: str
    train: np.ndarray
    """Images [N, H, W, C], or examples of another shape: uint8, values 0 ... levels - 1, or float32; may be a memory map."""
    test: np.ndarray
    """Held-out images of the same kind."""
    levels: int = 256
    """Number of gray levels of the source."""
    train_labels: np.ndarray | None = None
    """Where the source has them: classes, [N] integers, or A attributes, [N, A] booleans."""
    test_labels: np.ndarray | None = None
    """The same of the test images; -1: none."""
    label_names: tuple[str, ...] = ()
    """Names of the classes or of the attributes, where the source has them."""
    known_fingerprint: str | None = None
    """The value of `fingerprint()`, where it is known already."""
    validation: np.ndarray | None = None
    """Held-out images on which the best checkpoint and the best beta are chosen; None: they are chosen on the test images."""
    validation_labels: np.ndarray | None = None
    """The same of the images for validation; -1: none."""

    def __post_init__(self) -> None:
        for name in self.splits:
            images = getattr(self, name)
            check_kind(name, images, np.ndarray, "data.check_images makes one of your own images")
            if images.ndim < 2 or 0 in images.shape:
                raise UserError(
                    f"{name} must hold examples [N, ...], images [N, H, W, C] say, at least one, got shape {images.shape}."
                )
            if images.dtype not in (np.uint8, np.float32):
                raise UserError(
                    f"{name} must be uint8 or float32 (images: in [0, 1]), got {images.dtype}; see data.check_images."
                )
            if images.shape[1:] != self.train.shape[1:] or images.dtype != self.train.dtype:
                one, other = (f"{of.dtype} of shape {of.shape[1:]}" for of in (self.train, images))
                raise UserError(f"train and {name} must be images of one kind, got {one} and {other}.")
        check_count("levels", self.levels, low=2)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits: train, test, and validation where there is one."""
        return SPLITS[:2] if self.validation is None else SPLITS

    @property
    def choosing_split(self) -> str:
        """The split on which choices are made: validation, or test where there is none."""
        return self.splits[-1]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one example: (H, W, C) of images, (T, C) of sequences, (D,) of vectors."""
        return self.train.shape[1:]

    @property
    def shape(self) -> DataShape:
        """Sizes and kind of the images."""
        validation = 0 if self.validation is None else len(self.validation)
        return DataShape(self.image_shape, self.levels, self.train.dtype, len(self.train), len(self.test), validation)

    def examples(self, split: str, classes: int | None = None, count: int | None = None) -> Examples:
        """The examples of a split, or the first `count` of them; with `classes`, the class of each as well.

        >>> blank = np.zeros((3, 8, 8, 1), np.uint8)
        >>> labels = np.array([0, 1, 1])
        >>> images = ImageSet("blank", blank, blank, train_labels=labels, test_labels=labels)
        >>> images.examples("train", classes=2, count=2).labels
        array([0, 1], dtype=int32)

        Raises:
          UserError: with `classes`: the split has no labels, not one class for each example, or one out of range.
        """
        images, labels = getattr(self, split)[:count], getattr(self, f"{split}_labels")
        if classes is None:
            return Examples(images, levels=self.levels)
        what = f"classes {classes} makes the model conditional, but {self.name}"
        if labels is None:
            raise UserError(f"{what} has no labels of its {split} images; leave classes out, or choose data with labels.")
        labels = np.asarray(labels)
        if labels.shape != (len(getattr(self, split)),) or labels.dtype.kind not in "iub":
            raise UserError(
                f"{what} has {labels.dtype} labels of shape {labels.shape} for its {len(getattr(self, split))} {split} images; "
                "one class for each, a whole number, is needed."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise UserError(f"{what} has {int((labels < 0).sum())} {split} images that are of no class of the training images.")
        if high >= classes:
            raise UserError(f"{what} has labels up to {high} among its {split} images; classes {high + 1} takes them.")
        return Examples(images, labels[:count].astype(np.int32), self.levels)

    def sizes(self) -> str:
        """How many images there are, and of which shape, for messages: 60,000 training and 10,000 test images (28, 28, 1)."""
        kept = "" if self.validation is None else f", {len(self.validation):,} validation"
        return f"{len(self.train):,} training{kept} and {len(self.test):,} test images {self.image_shape}"

    def fingerprint(self, classes: int | None = None) -> str:
        """Hash of the images of all splits: their values, shapes and type; with `classes`, also of the class of each."""
        if classes is None:
            return self._fingerprint
        digest = hashlib.blake2b(self._fingerprint.encode(), digest_size=16)
        for split in self.splits:
            digest.update(self.examples(split, classes).labels.data)
        return digest.hexdigest()

    @functools.cached_property
    def _fingerprint(self) -> str:  # computed once: every member of a sweep records it
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for images in self._images():
            digest.update(f"{images.shape} {images.dtype} {self.levels};".encode())
            for block in _blocks(images):
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    @property
    def bin_width(self) -> float:
        """Width of a gray level after scaling to [0, 1]: 1/255 for 8 bits, 1/16 for the 17-level digits."""
        return bin_width_of(self.levels)

    @property
    def scale(self) -> float:
        """Factor from stored values to [0, 1]: the bin width for integers, 1 for floats."""
        return self.bin_width if self.train.dtype == np.uint8 else 1.0

    @functools.cached_property
    def holds_images(self) -> bool:
        """Whether the examples are images [H, W, C] in [0, 1], which PSNR, SSIM, FID and 8-bit files suppose."""
        if not is_image(self.image_shape) or self.train.dtype == np.uint8:
            return is_image(self.image_shape)
        return all(block.min() >= 0 and block.max() <= 1 for split in self._images() for block in _blocks(split))

    def _images(self) -> list[np.ndarray]:
        return [getattr(self, split) for split in self.splits]

    def as_shown(self, values: np.ndarray) -> np.ndarray:
        """Values [..., *image_shape] as figures take them, black and white at 0 and 1.

        Pictures of data beyond that are scaled by the range of the test split. Vectors and sequences are drawn as lines, by
        their own values.
        """
        if len(self.image_shape) < 3 or self.holds_images or self.train.dtype == np.uint8:
            return values
        low, high = float(self.test.min()), float(self.test.max())
        return (values - low) / max(high - low, 1e-30)

    @functools.cached_property
    def covariance_eigenvalues(self) -> np.ndarray | None:
        """Of the training images in [0, 1], largest first, float64; None for images of more than `SPECTRUM_LIMIT` pixels."""
        if math.prod(self.image_shape) > SPECTRUM_LIMIT:
            return None
        return theory.covariance_eigenvalues(self.train) * self.scale**2

    def spectrum(self, classes: int | None = None) -> np.ndarray | None:
        """`covariance_eigenvalues`; with `classes`, of the images around the mean of their class: what z has left to say."""
        return self.covariance_eigenvalues if classes is None else self._within_classes

    @functools.cached_property
    def _within_classes(self) -> np.ndarray | None:
        if math.prod(self.image_shape) > SPECTRUM_LIMIT:
            return None
        return theory.covariance_eigenvalues(self.train, self.train_labels) * self.scale**2

    @functools.cached_property
    def mean_image(self) -> np.ndarray:
        """Mean of the training images in [0, 1], [H, W, C], float64."""
        total = sum(block.sum(axis=0, dtype=np.float64) for block in _blocks(self.train))
        return total * (self.scale / len(self.train))

    @functools.cached_property
    def test_variance(self) -> float:
        """Variance of the test images in [0, 1] around their mean, averaged over pixels."""
        mean = self.test.mean(axis=0, dtype=np.float64)
        total = sum(float(np.square(block - mean).sum()) for block in _blocks(self.test))
        return total / self.test.size * self.scale**2


def _blocks(images: np.ndarray) -> Iterator[np.ndarray]:
    """The images in parts of some megabytes, so that a memory map is not read into memory as a whole."""
    count = max(1, 2**24 // max(images[0].nbytes, 1))
    return (images[start : start + count] for start in range(0, len(images), count))


def to_unit_interval(images: Array | np.ndarray, levels: int) -> Float[Array, "..."]:
    """Stored images to float32 in [0, 1]: uint8 values are divided by `levels - 1`, floats pass. Runs on the device.

    >>> to_unit_interval(jnp.array([0, 4, 16], jnp.uint8), levels=17).tolist()
    [0.0, 0.25, 1.0]
    """
    values = jnp.asarray(images).astype(jnp.float32)
    return values if jnp.issubdtype(images.dtype, jnp.floating) else values / (levels - 1)


def check_images(images: Any, what: str) -> np.ndarray:
    """Images of one's own as `[N, H, W, C]`, uint8 (0 ... 255) or float32 (in [0, 1]).

    Args:
      images: an array of any kind, `[N, H, W]` or `[N, H, W, C]`; floats of any precision.
      what: they are, for the error.

    >>> checked = check_images(np.ones((5, 8, 8)), "my images")
    >>> checked.shape, checked.dtype
    ((5, 8, 8, 1), dtype('float32'))
    >>> check_images(np.full((5, 8, 8), 255.0), "x")
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: x must lie in [0, 1], got values from 255 to 255; divide 8-bit values by 255, n levels by n - 1.

    Raises:
      UserError: a rank other than [N, H, W] or [N, H, W, C], channels that are not last, no images, a dtype other than uint8 or
        float, or floats that are NaN or outside [0, 1] by more than rounding.
    """
    try:
        images = np.asarray(images)
    except (ValueError, TypeError) as error:  # of lists of several lengths, or of keys
        raise UserError(f"{what} must be one array, [N, H, W] or [N, H, W, C]: {error}.") from error
    if images.ndim == 3:
        if min(images.shape[:2]) > 4 >= images.shape[2] > 0:
            raise UserError(
                f"{what} would be {len(images)} images of height {images.shape[1]} and width {images.shape[2]}; add an axis: "
                "the first, [None], if it is one image, the last, [..., None], if it is not."
            )
        images = images[..., None]
    if images.ndim != 4:
        raise UserError(f"{what} must have shape [N, H, W] or [N, H, W, C], got {images.shape}.")
    if 0 in images.shape:
        raise UserError(f"{what} is empty: its shape is {images.shape}.")
    _, height, width, channels = images.shape
    if (channels > 4 >= min(height, width)) or (channels == 4 == width and height < 4):
        axis = 2 if width <= 4 < height else 1
        order = (0, 2, 3, 1) if axis == 1 else (0, 1, 3, 2)
        raise UserError(
            f"{what} would be images of height {height} and width {width} with {channels} channels, shape {images.shape}; "
            f"channels must be last: give images.transpose{order}."
        )
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"{what} must be uint8 (0 ... 255) or floating point in [0, 1], got dtype {images.dtype}; divide wider integers by "
            "the largest value that they can have (65535 of 16 bits)."
        )
    if not np.all(np.isfinite(images)):
        raise UserError(f"{what} holds NaN or infinite values in {np.sum(~np.isfinite(images).all(axis=(1, 2, 3)))} images.")
    low, high = float(images.min()), float(images.max())
    if low < -ROUNDING or high > 1.0 + ROUNDING:
        if low >= 0.0:
            remedy = "divide 8-bit values by 255, n levels by n - 1"
        else:
            remedy = "take (x + 1) / 2 of values in [-1, 1]" if max(-low, high) <= 1.0 + ROUNDING else "shift and scale them"
        raise UserError(f"{what} must lie in [0, 1], got values from {low:.7g} to {high:.7g}; {remedy}.")
    images = np.ascontiguousarray(images, np.float32)
    return np.clip(images, 0.0, 1.0) if low < 0.0 or high > 1.0 else images


def distinct_values(images: np.ndarray, limit: int) -> np.ndarray:
    """The values that images take, in order; some, more than `limit`, where there are more."""
    found = np.empty(0, images.dtype)
    for block in _blocks(images):
        found = np.union1d(found, block)
        if len(found) > limit:
            break
    return found


def on_grid(images: np.ndarray, levels: int, precision: float) -> bool:
    """Whether floats are multiples of 1 / (levels - 1), but for their rounding, to a relative `precision`."""
    tolerance = max(1e-3, precision * (levels - 1) / 2)
    # Scaled in double precision, so that only the images' own rounding counts.
    scaled = (np.multiply(block, levels - 1, dtype=np.float64) for block in _blocks(images))
    return tolerance < 0.2 and all(float(np.abs(block - np.rint(block)).max()) <= tolerance for block in scaled)
