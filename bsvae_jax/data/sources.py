"""Image sources: the embedded digits, MNIST's idx files, arrays of one's own and prepared TFDS sets.

Every source ends in an `ImageSet`: NHWC images, uint8 wherever the source is quantised, with the number of grey levels that
says how they map to [0, 1].
"""

import functools
import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from bsvae_jax import config, theory
from bsvae_jax.errors import UserError, nearest
from bsvae_jax.files import read_arrays

DIGITS_TEST = 297
"""Held-out digits, the last of scikit-learn's 1,797 (their own order, which mixes the writers)."""

SPECTRUM_LIMIT = 4096
"""Largest number of pixels times channels whose covariance is decomposed: 4,096 take a minute, ten times as many a day."""


@dataclass(frozen=True)
class ImageSet:
    """Training and test images."""

    name: str
    train: np.ndarray
    """[N, H, W, C], uint8 with values 0 ... levels - 1, or float32 in [0, 1]."""
    test: np.ndarray
    """Held-out images of the same kind."""
    levels: int = 256
    """Number of grey levels of the source."""
    train_labels: np.ndarray | None = None
    """[N] integers, where the source has them."""
    test_labels: np.ndarray | None = None
    """[N] integers, where the source has them."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)"""
        height, width, channels = self.train.shape[1:]
        return height, width, channels

    def fingerprint(self) -> str:
        """Hash of the training and test images: their values, shapes and type."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:  # computed once: every member of a sweep records it
        digest = hashlib.blake2b(digest_size=16)
        for images in (self.train, self.test):
            digest.update(f"{images.shape} {images.dtype} {self.levels};".encode())
            digest.update(np.ascontiguousarray(images).data)
        return digest.hexdigest()

    @property
    def step(self) -> float:
        """Quantisation step after scaling to [0, 1]: 1/255 for 8 bits, 1/16 for the 17-level digits."""
        return 1.0 / (self.levels - 1)

    @property
    def scale(self) -> float:
        """Factor from stored values to [0, 1]: the step for integers, 1 for floats."""
        return self.step if self.train.dtype == np.uint8 else 1.0

    @functools.cached_property
    def covariance_eigenvalues(self) -> np.ndarray | None:
        """Of the training images in [0, 1], largest first, float64; None for images of more than `SPECTRUM_LIMIT` pixels."""
        if math.prod(self.image_shape) > SPECTRUM_LIMIT:
            return None
        return theory.covariance_eigenvalues(self.train.astype(np.float32) * self.scale)

    @functools.cached_property
    def test_variance(self) -> float:
        """Variance of the test images in [0, 1] around their mean, averaged over pixels."""
        return float(self.test.astype(np.float32).var(axis=0, dtype=np.float64).mean() * self.scale**2)


def to_unit_interval(images: Array, levels: int) -> Float[Array, "..."]:
    """Stored images to float32 in [0, 1]: uint8 values are divided by `levels - 1`, floats pass. Runs on the device."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    return images.astype(jnp.float32) / (levels - 1)


def check_images(images: Any, what: str) -> np.ndarray:
    """Images of one's own as `[N, H, W, C]`, uint8 or float32.

    Raises:
      UserError: a rank other than [N, H, W] or [N, H, W, C], no images, a dtype other than uint8 or float, or floats that are
        NaN or outside [0, 1].
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UserError(f"{what} must have shape [N, H, W] or [N, H, W, C], got {images.shape}.")
    if 0 in images.shape:
        raise UserError(f"{what} is empty: its shape is {images.shape}.")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what} must be uint8 (0 ... 255) or floating point in [0, 1], got dtype {images.dtype}.")
    if not np.all(np.isfinite(images)):
        raise UserError(f"{what} holds NaN or infinite values in {np.sum(~np.isfinite(images).all(axis=(1, 2, 3)))} images.")
    low, high = float(images.min()), float(images.max())
    if low < 0.0 or high > 1.0:
        raise UserError(f"{what} must lie in [0, 1], got values from {low:g} to {high:g}; divide 8-bit values by 255.")
    return np.ascontiguousarray(images, np.float32)


def load(source: config.DataSource) -> ImageSet:
    """The images of a data config.

    Raises:
      UserError: a file is missing, truncated or not what it should be; a set is not prepared; images of a wrong kind.
    """
    match source:
        case config.Digits():
            return _digits()
        case config.MNIST(folder):
            return _mnist(Path(folder))
        case config.Arrays(path, holdout, seed):
            return _arrays(Path(path), holdout, seed)
        case config.TFDS():
            return _tfds(source)


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits  # loads SciPy, which nothing else needs at import

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    split = len(images) - DIGITS_TEST
    return ImageSet("digits", images[:split], images[split:], 17, labels[:split], labels[split:])


# --- idx files --------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an idx file, gzipped or not (the format of the MNIST files: magic 0 0 8 rank, big-endian sizes).

    Raises:
      UserError: not an idx file of unsigned bytes, damaged compression, or fewer or more bytes than its header promises.
    """
    try:
        with path.open("rb") as probe:
            gzipped = probe.read(2) == b"\x1f\x8b"
        stream: BinaryIO
        with gzip.open(path) if gzipped else path.open("rb") as stream:  # type: ignore[assignment]
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); it is truncated or damaged. Download it again.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4]!r}.")
    rank = content[3]
    header = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    expected = header + math.prod(shape)
    if len(content) < header or len(content) != expected:
        raise UserError(f"{path} is truncated or damaged: {len(content)} bytes, but its header promises {expected}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _mnist(folder: Path) -> ImageSet:
    def read(name: str, rank: int) -> np.ndarray:
        paths = [folder / f"{name}-ubyte{suffix}" for suffix in (".gz", "")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} lacks {paths[0].name}; MNIST needs its four canonical files there (--data.folder names the folder)."
            )
        array = read_idx(path)
        if array.ndim != rank or array.size == 0:
            raise UserError(f"{path} must hold a non-empty array of rank {rank}, got shape {array.shape}.")
        return array

    splits = []
    for split in ("train", "t10k"):
        images, labels = read(f"{split}-images-idx3", 3), read(f"{split}-labels-idx1", 1)
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} {split} images but {len(labels)} labels.")
        splits.append((images[..., None], labels.astype(np.int64)))
    (train, train_labels), (test, test_labels) = splits
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{folder}: training images are {train.shape[1:]}, test images {test.shape[1:]}.")
    return ImageSet("mnist", train, test, 256, train_labels, test_labels)


# --- Arrays of one's own ----------------------------------------------------------------------------------------------


def _arrays(path: Path, holdout: float, seed: int) -> ImageSet:
    if not path.is_file():
        raise UserError(f"There is no file {str(path)!r}; data.path must name a .npz or .npy of images.")
    named = read_arrays(path, "data.path must name a .npz or .npy of images")
    if "" in named:
        named = {"train": named[""]}
    names = {key: next((n for n in (key, f"x_{key}", f"{key}_images") if n in named), None) for key in ("train", "test")}
    if names["train"] is None:
        found = ", ".join(named) or "nothing"
        raise UserError(f"{path} needs an array 'train' (and may have 'test'); it holds {found}{nearest('train', named)}.")
    train = check_images(named[names["train"]], f"{names['train']!r} in {path}")
    if names["test"] is None:
        order = np.random.default_rng(seed).permutation(len(train))
        held_out = max(1, round(holdout * len(train)))
        if held_out >= len(train):
            raise UserError(f"{path} holds {len(train)} images: too few to keep {held_out} for testing.")
        train, test = train[np.sort(order[held_out:])], train[np.sort(order[:held_out])]
    else:
        test = check_images(named[names["test"]], f"{names['test']!r} in {path}")
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise UserError(
            f"{path}: training images {train.shape[1:]} {train.dtype} and test images {test.shape[1:]} {test.dtype} differ."
        )
    return ImageSet(path.stem, train, test)


# --- TFDS -------------------------------------------------------------------------------------------------------------


def _first_line(error: Exception, limit: int = 200) -> str:
    line = str(error).strip().split("\n")[0]
    return line if len(line) <= limit else line[:limit] + " ..."


def _tfds(source: config.TFDS) -> ImageSet:
    import tensorflow_datasets as tfds  # slow to import, and needed by nothing else

    try:
        builder = tfds.builder(source.name, data_dir=source.data_dir)
    except Exception as error:  # TFDS raises many kinds; each means that no such set is there
        folder = source.data_dir or "its default folder"
        raise UserError(f"TFDS has no set {source.name!r} in {folder}: {_first_line(error)}") from error
    features = builder.info.features or {}
    if "image" not in features:
        raise UserError(f"TFDS set {source.name!r} has no feature 'image'; its features are {', '.join(features) or 'none'}.")
    with_labels = "label" in features and np.issubdtype(features["label"].np_dtype, np.integer) and not features["label"].shape
    splits = [_tfds_split(builder, source.name, split, with_labels) for split in (source.train_split, source.test_split)]
    (train, train_labels), (test, test_labels) = splits
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"TFDS set {source.name!r}: training images are {train.shape[1:]}, test images {test.shape[1:]}.")
    return ImageSet(source.name, train, test, 256, train_labels, test_labels)


def _tfds_split(builder: Any, name: str, split: str, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    if split.partition("[")[0] not in builder.info.splits:
        found = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"TFDS set {name!r} has no prepared split {split!r} in {builder.data_dir} (prepared: {found}). Prepare it as "
            "array_record: tfds.builder(name, file_format='array_record').download_and_prepare()."
        )
    try:
        examples = builder.as_data_source(split=split)
        if len(examples) == 0:
            raise UserError(f"Split {split!r} of TFDS set {name!r} is empty.")
        first = np.asarray(examples[0]["image"])
        images = np.empty((len(examples), *first.shape), first.dtype)
        labels = np.zeros(len(examples), np.int64) if with_labels else None
        for index, example in enumerate(tqdm(examples, desc=f"reading {name} {split}", unit="image", leave=False)):
            image = np.asarray(example["image"])
            if image.shape != first.shape:
                raise UserError(f"TFDS set {name!r}: image {index} has shape {image.shape}, the first {first.shape}.")
            images[index] = image
            if labels is not None:
                labels[index] = example["label"]
    except NotImplementedError as error:
        raise UserError(
            f"TFDS set {name!r} was not prepared as array_record, which reading without TensorFlow needs: {_first_line(error)}"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Split {split!r} of TFDS set {name!r} does not load; prepare it again: {_first_line(error)}"
        ) from error
    return check_images(images, f"{name} {split}"), labels
