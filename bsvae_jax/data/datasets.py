"""The kinds of data sets that a config can hold. Derive `Dataset` for one of your own.

Every data set ends in an `ImageSet`: examples of one shape, channels last, uint8 wherever the source is quantized, with the
number of gray levels that says how they map to [0, 1].
"""

import abc
import dataclasses
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bsvae_jax._io.terminal import messages_shown
from bsvae_jax.data.holdout import hold_out_validation
from bsvae_jax.data.image_set import DataShape, ImageSet
from bsvae_jax.errors import UserError, as_number, check_count, check_kind, check_number, check_path, shown
from bsvae_jax.objective import Kind, check_kind_of
from bsvae_jax.objective.kind import plain

if TYPE_CHECKING:
    from bsvae_jax.data.recipe import Recipe

PUBLISHED = {
    "mnist": ((28, 28, 1), 60_000, 10_000, 0),
    "fashion_mnist": ((28, 28, 1), 60_000, 10_000, 0),
    "cifar10": ((32, 32, 3), 50_000, 10_000, 0),
    "celeb_a": ((218, 178, 3), 162_770, 19_962, 19_867),
}
"""Image shape, training, test and own validation images of TFDS sets whose default splits are those."""
TENTH = 0.1
"""Of the training images of a published set, held out where nothing else is said: no choice is made on its test images."""


@dataclass(frozen=True)
class Dataset(Kind, abc.ABC):
    """Base of all data sets: a frozen dataclass whose `load` gives training and test examples.

    >>> @dataclass(frozen=True)
    ... class Waves(Dataset):
    ...     "Sequences of 64 steps and 3 channels."
    ...
    ...     count: int = 100
    ...
    ...     def load(self):
    ...         phases = np.random.default_rng(0).random((self.count, 1, 3))
    ...         waves = np.sin(np.arange(64)[None, :, None] / 5 + 6.28 * phases).astype(np.float32)
    ...         return ImageSet("waves", waves[10:], waves[:10])
    >>> load(Waves()).image_shape
    (64, 3)
    """

    validation: float | Literal["own"] | None = dataclasses.field(default=None, kw_only=True)
    """Share of the training images that is held out, by which the best checkpoint, early stopping and the best beta are chosen;
    own: the set's own images for it, of a folder, an array or a TFDS split named validation; None: they are chosen on the test
    images. A share is copied, with the rest, into memory. What `load` of a class of your own returns for validation is used."""

    @abc.abstractmethod
    def load(self) -> ImageSet:
        """The examples. (Those of the library also take `progress`: whether to show a bar while they prepare.)

        Raises:
          UserError: they cannot be read.
        """

    def shape(self) -> DataShape:
        """Sizes of the examples; override it where they are known without reading them."""
        return self.load().shape

    @property
    def locations(self) -> tuple[str, ...]:
        """The fields that say where the files lie, which is no part of an experiment; override it for other names."""
        known = ("path", "folder", "data_dir", "manual_dir")
        return tuple(field.name for field in dataclasses.fields(self) if field.init and field.name in known)


@dataclass(frozen=True)
class Digits(Dataset):
    """The 1,797 real handwritten 8x8 digits (17 gray levels) that scikit-learn carries: no download.

    >>> load(Digits()).sizes()
    '1,350 training, 150 validation and 297 test images (8, 8, 1)'
    """

    validation: float | Literal["own"] | None = dataclasses.field(default=TENTH, kw_only=True)

    def load(self, progress: bool = True) -> ImageSet:
        """The last 297 of scikit-learn's digits, which are ordered by writer, are held out: harder than a random share."""
        from bsvae_jax.data import sources

        return sources.read_digits()


@dataclass(frozen=True)
class MNIST(Dataset):
    """MNIST from its four canonical idx files, gzipped or not, in a folder.

    >>> MNIST().folder
    'data/mnist'
    """

    validation: float | Literal["own"] | None = dataclasses.field(default=TENTH, kw_only=True)
    folder: str = "data/mnist"
    """Holds train-images-idx3-ubyte[.gz], train-labels-..., t10k-images-... and t10k-labels-..."""

    def __post_init__(self) -> None:
        check_path(self, "folder")

    def load(self, progress: bool = True) -> ImageSet:
        """Read the four files."""
        from bsvae_jax.data import sources

        return sources.read_mnist(Path(self.folder))


@dataclass(frozen=True)
class Arrays(Dataset):
    """Images of one's own: a `.npz` with `train` (and optionally `test`), a `.npy`, or a folder that `prepare` wrote.

    Other usual names are known (`x_train`, `train_images`, `images`, `arr_0`; labels `y_train`, `train_labels`).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/images.npz", train=np.zeros((5, 8, 8), np.uint8), test=np.zeros((2, 8, 8), np.uint8))
    ...     Arrays(f"{folder}/images.npz").load().train.shape
    (5, 8, 8, 1)
    """

    path: str = ""
    """A `.npz` or `.npy` of shape [N, H, W] or [N, H, W, C]: uint8, or floats in [0, 1]; or the folder of `prepare`."""
    holdout: float = 0.1
    """Share of the images kept for testing, at random, when the file has no `test`."""
    holdout_seed: int = 0
    """Seed of the held-out images; apart from the run's, so that runs of different seeds are tested on the same images."""
    levels: int | None = None
    """Number of gray levels, on which bits per dimension depend: uint8 values are 0 ... levels - 1, floats multiples of
    1 / (levels - 1); None: 256 of uint8, and what the values of floats show."""

    def __post_init__(self) -> None:
        check_path(self, "path")
        check_number("data.holdout", self.holdout, low=0.0, high=0.9, open_low=True)
        check_count("data.holdout_seed", self.holdout_seed, low=0)
        if self.levels is not None:
            check_count("data.levels", self.levels, low=2)

    def load(self, progress: bool = True) -> ImageSet:
        """Read the file."""
        from bsvae_jax.data import sources

        own = self.validation == "own"
        return sources.read_arrays_file(Path(self.path), self.holdout, self.holdout_seed, self.levels, own)


def _check_preprocessing(source: "TFDS | Folder") -> None:
    for name in ("crop", "size"):
        if getattr(source, name) is not None:
            check_count(f"data.{name}", getattr(source, name))
    if source.channels is not None and (not isinstance(as_number(source.channels), int) or source.channels not in (1, 3)):
        raise UserError(f"data.channels must be 1 (gray), 3 (color) or None, got {shown(source.channels)}.")


@dataclass(frozen=True)
class TFDS(Dataset):
    """A TFDS image set, read as array_record without TensorFlow.

    `mnist`, `fashion_mnist`, `cifar10`, `celeb_a` and `lsun/CATEGORY` are prepared at their first use; any other set of the
    catalog once by `bsvae prepare NAME`, which needs TensorFlow.

    >>> TFDS("celeb_a", crop=148, size=64).shape().image_shape
    (64, 64, 3)
    """

    validation: float | Literal["own"] | None = dataclasses.field(default=TENTH, kw_only=True)
    name: str = "mnist"
    """TFDS name, also `name/config:version`."""
    data_dir: str | None = None
    """TFDS data directory; None: TFDS's own default."""
    manual_dir: str | None = None
    """Folder with the published files, where they are not to be, or cannot be, downloaded."""
    train_split: str = "train"
    """Split trained on."""
    test_split: str = "test"
    """Split held out."""
    crop: int | None = None
    """Side of the square kept around the center of an image, in its own pixels; before `size`."""
    size: int | None = None
    """Images become size x size: the shorter side is resized to it, and the center kept; None: as they are."""
    channels: int | None = None
    """1: gray, 3: color; None: as they are."""

    def __post_init__(self) -> None:
        for name in ("data_dir", "manual_dir"):
            check_path(self, name, optional=True)
        for name in ("name", "train_split", "test_split"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"data.{name} must be a name, got {getattr(self, name)!r}.")
        _check_preprocessing(self)

    def recipe(self) -> "Recipe":
        """What is to be decoded."""
        from bsvae_jax.data import sources

        return sources.tfds_recipe(plain(self))

    def load(self, progress: bool = True) -> ImageSet:
        """The prepared images; they are prepared at the first use."""
        from bsvae_jax.data import cache

        return cache.load_prepared(self.recipe(), progress=progress)

    def shape(self) -> DataShape:
        """Of the sets whose sizes are known without reading them, else of the images."""
        known = PUBLISHED.get(self.name) if (self.train_split, self.test_split) == ("train", "test") else None
        own = self.validation == "own"
        if known is None or (own and not known[-1]):  # an own split that is missing is told by reading
            return self.load().shape
        (height, width, channels), train, test, validation = known
        side = self.size or self.crop
        sides = (height, width) if side is None else (side, side)
        return DataShape((*sides, self.channels or channels), 256, np.dtype(np.uint8), train, test, validation if own else 0)


@dataclass(frozen=True)
class Folder(Dataset):
    """Images of one's own: a folder or an archive (.zip, .tar, .tar.gz) of image files.

    Folders named train and test in it are those splits, by any usual name (Training, eval, test_set; validation where there is
    no test); else a share is held out. Folders of the training images are classes. Transparent images are laid on white.

    >>> Folder("photos/", size=32, channels=3).holdout
    0.1
    """

    path: str = ""
    """The folder or archive."""
    holdout: float = 0.1
    """Share of the images kept for testing, at random, where there is no folder test."""
    holdout_seed: int = 0
    """Seed of the held-out images; apart from the run's, so that runs of different seeds are tested on the same images."""
    crop: int | None = None
    """Side of the square kept around the center of an image, in its own pixels; before `size`."""
    size: int | None = None
    """Images become size x size: the shorter side is resized to it, and the center kept; None: as they are."""
    channels: int | None = None
    """1: gray, 3: color; None: as they are."""

    def __post_init__(self) -> None:
        check_path(self, "path")
        check_number("data.holdout", self.holdout, low=0.0, high=0.9, open_low=True)
        check_count("data.holdout_seed", self.holdout_seed, low=0)
        _check_preprocessing(self)

    def recipe(self) -> "Recipe":
        """What is to be decoded."""
        from bsvae_jax.data import sources

        return sources.folder_recipe(plain(self))

    def load(self, progress: bool = True) -> ImageSet:
        """The prepared images; they are prepared at the first use."""
        from bsvae_jax.data import cache

        return cache.load_prepared(self.recipe(), progress=progress)


def moved(source: Dataset, path: str | Path) -> Dataset:
    """The same data, whose files lie at `path` now.

    >>> moved(MNIST(), "elsewhere")
    MNIST(validation=0.1, folder='elsewhere')

    Raises:
      UserError: data without files.
    """
    if not source.locations:
        raise UserError(f"The data of the kind {type(source).__name__} are read from no file; leave out --data.path.")
    place: dict[str, Any] = {source.locations[0]: os.fspath(path)}
    return dataclasses.replace(source, **place)


def with_absolute_paths(source: Dataset) -> Dataset:
    """The same data, found from any working directory."""
    paths = {name: getattr(source, name) for name in source.locations}
    local: dict[str, Any] = {
        name: os.path.abspath(path) for name, path in paths.items() if isinstance(path, str) and path and "://" not in path
    }
    return dataclasses.replace(source, **local) if local else source


def load(source: Dataset, progress: bool = True) -> ImageSet:
    """The images of a data config; those of a folder or of TFDS are prepared at the first use (see `prepared`).

    Args:
      source: of the config.
      progress: show a bar while images are prepared.

    >>> images = load(Digits())
    >>> images.train.shape, images.test.shape, images.levels
    ((1350, 8, 8, 1), (297, 8, 8, 1), 17)

    Raises:
      UserError: a file is missing, truncated or not what it should be; a set cannot be prepared; images of a wrong kind.
    """
    check_kind_of("source", source, Dataset)
    check_validation(source)
    source = plain(source)
    loads: Any = source.load
    with messages_shown(progress):
        images = loads(progress) if "progress" in inspect.signature(loads).parameters else loads()
    check_kind(f"what load of {type(source).__name__} returns", images, ImageSet, "bsvae_jax.data.ImageSet(name, train, test)")
    prepared = isinstance(source, TFDS | Folder)  # which is when they hold out a share
    if isinstance(source.validation, float) and images.validation is not None and not prepared:
        raise UserError(
            f"load of {type(source).__name__} gives {len(images.validation)} images for validation, and data.validation "
            f"{source.validation:g} asks for a share of the training images; leave one of them out."
        )
    if source.validation is None or images.validation is not None:
        return images
    if source.validation == "own":
        raise UserError(
            f"{images.name} has no images of its own for validation, which data.validation 'own' asks for; give a share of the "
            "training images in its place, such as 0.1."
        )
    return hold_out_validation(images, source.validation)


def check_validation(source: Dataset) -> None:
    """Raise a UserError unless `validation` of a data set is a share, 'own' or None."""
    share = as_number(source.validation)
    if share is None or share == "own" or (isinstance(share, float) and 0.0 < share <= 0.9):
        return
    raise UserError(
        "data.validation must be a share of the training images above 0 and up to 0.9, 'own' for those that the set has, or "
        f"None for none; got {shown(share)}."
    )


def shape_of(source: Dataset, image_shape: tuple[int, ...] | None = None, images: int | None = None) -> DataShape:
    """Sizes of the images of a data config; they are only read where their size is not known.

    Args:
      source: of the config.
      image_shape: (H, W, C) of 8-bit images, in place of the source's own.
      images: of them for training, 60,000 if not given.

    >>> shape_of(TFDS("celeb_a", crop=148, size=64)).image_shape
    (64, 64, 3)

    Raises:
      UserError: sizes that are no images, or data that must be read and cannot be.
    """
    check_kind_of("source", source, Dataset)
    if image_shape is not None:
        if not image_shape or min(image_shape) < 1 or (images is not None and images < 1):
            raise UserError(
                f"An image shape is height, width and channels, each >= 1, of at least one image; got {image_shape}, {images}."
            )
        return DataShape(image_shape, 256, np.dtype(np.uint8), 60_000 if images is None else images, 0)
    if images is not None:
        raise UserError("A number of images is for an image shape; give --image-shape HEIGHT WIDTH CHANNELS as well.")
    source = plain(source)
    shape = source.shape()
    if isinstance(source.validation, float) and not shape.validation:
        held_out = max(1, round(source.validation * shape.train))
        return shape._replace(train=shape.train - held_out, validation=held_out)
    return shape
