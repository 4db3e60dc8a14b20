"""How the data sets of the library are read: the digits, MNIST's idx files, arrays, folders and TFDS sets."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsvae_jax._io.files import DAMAGE, read_arrays
from bsvae_jax.data.cache import Recipe
from bsvae_jax.data.datasets import TFDS, Folder
from bsvae_jax.data.decoding import CorruptImageError, Header, Preprocessing
from bsvae_jax.data.idx import read_pair
from bsvae_jax.data.image_files import Encoded, EncodedImages, find_images
from bsvae_jax.data.image_set import ImageSet, check_images
from bsvae_jax.errors import UserError, nearest

_UNREADABLE: tuple[type[Exception], ...] = (IndexError, *DAMAGE)

DIGITS_TEST = 297
"""Held-out digits, the last of scikit-learn's 1,797 (their own order, which mixes the writers)."""


def recipe(source: Folder | TFDS) -> Recipe:
    """What is to be decoded for a folder or a TFDS set; looks for the images, and decodes none.

    Raises:
      UserError: no such folder or set, or a split of it is missing.
    """
    return _folder(source) if isinstance(source, Folder) else _tfds(source)


def read_digits() -> ImageSet:
    """The embedded digits."""
    from sklearn.datasets import load_digits  # loads SciPy, which nothing else needs at import

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    split = len(images) - DIGITS_TEST
    return ImageSet("digits", images[:split], images[split:], 17, labels[:split], labels[split:])


# --- MNIST's files ----------------------------------------------------------------------------------------------------


def read_mnist(folder: Path) -> ImageSet:
    """MNIST's four files."""

    def find(name: str) -> Path:
        paths = [folder / f"{name}-ubyte{suffix}" for suffix in (".gz", "")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} lacks {paths[0].name}; MNIST needs its four canonical files there (--data.folder names the folder)."
            )
        return path

    splits = []
    for split in ("train", "t10k"):
        images, labels = read_pair(find(f"{split}-images-idx3"), find(f"{split}-labels-idx1"))
        splits.append((images[..., None], labels.astype(np.int64)))
    (train, train_labels), (test, test_labels) = splits
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{folder}: training images are {train.shape[1:]}, test images {test.shape[1:]}.")
    return ImageSet("mnist", train, test, 256, train_labels, test_labels)


# --- Arrays of one's own ----------------------------------------------------------------------------------------------


def read_arrays_file(path: Path, holdout: float, seed: int) -> ImageSet:
    """Arrays of a `.npz` or `.npy` file."""
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
        train, test = (train[part] for part in _holdout(len(train), holdout, seed, str(path)))
    else:
        test = check_images(named[names["test"]], f"{names['test']!r} in {path}")
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise UserError(
            f"{path}: training images {train.shape[1:]} {train.dtype} and test images {test.shape[1:]} {test.dtype} differ."
        )
    return ImageSet(path.stem, train, test)


# --- Folders ----------------------------------------------------------------------------------------------------------


def _holdout(count: int, share: float, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training and for testing, both in order."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, round(share * count))
    if held_out >= count:
        raise UserError(f"{what} holds {count} images: too few to keep {held_out} for testing.")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _folder(source: Folder) -> Recipe:
    path = Path(source.path)
    if not source.path:
        raise UserError("data.path must name a folder, or a .zip, of images.")
    found = find_images(path)
    if found.test is not None:
        train, test, division = found.train, found.test, None
    else:
        positions = _holdout(len(found.train), source.holdout, source.holdout_seed, str(path))
        train, test = (found.train.take(part.tolist()) for part in positions)
        division = [source.holdout, source.holdout_seed]
    return Recipe(
        path.resolve().stem,
        {"files": found.stamp, "holdout": division},
        {"train": train, "test": test},
        Preprocessing(source.crop, source.size, source.channels),
        found.classes,
    )


# --- TFDS -------------------------------------------------------------------------------------------------------------


def _first_line(error: Exception, limit: int = 200) -> str:
    line = str(error).strip().split("\n")[0]
    return line if len(line) <= limit else line[:limit] + " ..."


@dataclass(frozen=True)
class Records:
    """Encoded images of a TFDS split, as array_record."""

    name: str
    folder: Path
    """That holds its files."""
    source: Any
    label: str | None
    """The feature taken for it."""
    attributes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def read(self, start: int, stop: int) -> list[Encoded | CorruptImageError]:
        """Images `start ... stop - 1`; an error in place of one that cannot be read."""
        return [self._read(index) for index in range(start, stop)]

    def _read(self, index: int) -> Encoded | CorruptImageError:
        what = f"image {index} of {self.name}"
        try:
            example = self.source[index]
        except _UNREADABLE as error:
            return CorruptImageError(
                f"{what} cannot be read; prepare the TFDS set again, in {self.folder}: {_first_line(error)}."
            )
        label: Any = None if self.label is None else example[self.label]
        if self.attributes:
            label = np.array([label[name] for name in self.attributes], np.bool_)
        return Encoded(what, bytes(example["image"]), label)


def tfds_builder(source: TFDS) -> Any:
    """The TFDS builder of a set, prepared as array_record; one of ours is prepared now if it is not.

    Raises:
      UserError: no such set, one that only TensorFlow can prepare, or what the builder raises.
    """
    import tensorflow_datasets as tfds  # slow to import, and needed by nothing else

    from bsvae_jax.data.tfds_builders import builder_of

    own = builder_of(source.name, source.data_dir, source.manual_dir)
    if own is not None and own.info.splits:
        return own
    try:
        stock = tfds.builder(source.name, data_dir=source.data_dir)
    except Exception as error:  # TFDS raises many kinds; each means that no such set is there
        if own is None:
            folder = source.data_dir or "its default folder"
            raise UserError(f"TFDS has no set {source.name!r} in {folder}: {_first_line(error)}") from error
        stock = None
    if own is None or (stock is not None and stock.info.splits and source.manual_dir is None):
        return stock
    own.prepare()
    return builder_of(source.name, source.data_dir, source.manual_dir)  # which knows what is there now


def prepare_tfds(source: TFDS) -> None:
    """Write the array_record files of a set, unless they are there: by our builder, or by TFDS's own with TensorFlow.

    Raises:
      UserError: no such set, one that needs TensorFlow where it is not installed, or files that are missing or others.
    """
    builder = tfds_builder(source)
    if builder.info.splits:
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"Preparing TFDS's own set {source.name!r} needs TensorFlow (training does not): pip install 'bsvae_jax[tf]'."
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever the set's own code raises
        raise UserError(f"TFDS could not prepare {source.name!r}: {type(error).__name__}: {_first_line(error)}") from error


def _tfds(source: TFDS) -> Recipe:
    import tensorflow_datasets as tfds

    builder = tfds_builder(source)
    features = dict(builder.info.features or {})
    if "image" not in features:
        raise UserError(f"TFDS set {source.name!r} has no feature 'image'; its features are {', '.join(features) or 'none'}.")
    image = features["image"]
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(f"The feature 'image' of TFDS set {source.name!r} must be 8-bit images, got {image}.")
    attributes: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    label = None
    if isinstance(features.get("label"), tfds.features.ClassLabel):
        label, label_names = "label", tuple(features["label"].names)
    elif "label" in features and np.issubdtype(features["label"].np_dtype, np.integer) and not features["label"].shape:
        label = "label"
    elif isinstance(features.get("attributes"), tfds.features.FeaturesDict):
        label, attributes = "attributes", tuple(sorted(features["attributes"]))
        label_names = attributes
    height, width, channels = image.shape
    files: dict[str, list[int]] = {}
    splits: dict[str, EncodedImages] = {}
    for part, split in (("train", source.train_split), ("test", source.test_split)):
        records, stamps = _records(builder, source.name, split)
        what = f"split {split!r} of TFDS set {source.name!r}"
        splits[part] = Records(what, Path(builder.data_dir), records, label, attributes)
        files |= stamps
    return Recipe(
        source.name,
        {"tfds": builder.info.full_name, "splits": [source.train_split, source.test_split], "files": files},
        splits,
        Preprocessing(source.crop, source.size, source.channels or channels),
        label_names,
        None if None in (height, width, channels) else Header(height, width, channels),
    )


def _records(builder: Any, name: str, split: str) -> tuple[Any, dict[str, list[int]]]:
    """The records of a split, undecoded, and size and time of change of their files."""
    import tensorflow_datasets as tfds

    if split.partition("[")[0] not in builder.info.splits:
        found = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"TFDS set {name!r} has no prepared split {split!r} in {builder.data_dir} (prepared: {found}). A set of TFDS's "
            f"catalogue is prepared by `bsvae prepare {name}`, which needs TensorFlow: pip install 'bsvae_jax[tf]'."
        )
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        count = len(records)
        statuses = {path.name: path.stat() for path in map(Path, builder.info.splits[split.partition("[")[0]].filepaths)}
    except NotImplementedError as error:
        raise UserError(
            f"TFDS set {name!r} was not prepared as array_record, which reading without TensorFlow needs: {_first_line(error)}"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Split {split!r} of TFDS set {name!r} does not load; prepare it again: {_first_line(error)}"
        ) from error
    if count == 0:
        raise UserError(f"Split {split!r} of TFDS set {name!r} is empty.")
    return records, {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}
