"""How the data sets of the library are read: the digits, MNIST's idx files, arrays, folders and TFDS sets."""

import contextlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsvae_jax._io.files import DAMAGE, printable, read_arrays
from bsvae_jax._io.terminal import log
from bsvae_jax.data.cache import Recipe
from bsvae_jax.data.decoding import CorruptImageError, Header, Preprocessing
from bsvae_jax.data.holdout import VALIDATION_SEED, contents_of, hold_out
from bsvae_jax.data.idx import read_pair
from bsvae_jax.data.image_files import Encoded, EncodedImages, find_images
from bsvae_jax.data.image_set import SPLITS, ImageSet, check_images, distinct_values, on_grid
from bsvae_jax.data.iterables import Conversion
from bsvae_jax.data.memory_map import read_memory_map
from bsvae_jax.errors import UserError, nearest

_UNREADABLE: tuple[type[Exception], ...] = (IndexError, *DAMAGE)

DIGITS_TEST = 297
"""Held-out digits, the last of scikit-learn's 1,797: the file is ordered by writer, so they are no random share."""


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


_PART = r"(?:(?P<train>train|training)|(?P<test>test|testing|eval|evaluation)|(?P<val>val|valid|validation))"
_X, _Y = "(?:x|images?|imgs?|data)", "(?:y|labels?|targets?|classes)"
_IMAGES = re.compile(f"(?:{_X}_?)?{_PART}(?:_?{_X})?")
_LABELS = re.compile(f"{_Y}_?{_PART}|{_PART.replace('?P<', '?P<of_')}_?{_Y}")
_BARE = {"train": ("images", "imgs", "x", "data", "arr_0"), "train labels": ("labels", "label", "y", "targets", "target")}
"""Names of the only images and labels of a file."""


def _roles(names: list[str], own_validation: bool) -> dict[str, str]:
    """Which arrays of an `.npz` are what, by their names: 'train', 'test', 'validation', 'train labels', ...

    Those for validation take the place of a missing 'test', or are left out, unless `own_validation` asks for them.
    """
    roles: dict[str, str] = {}
    plain = {name: name.casefold().replace("-", "_") for name in names}
    for name in sorted(names, key=lambda name: plain[name] not in ("train", "test", "val")):  # these first
        for pattern, of in ((_IMAGES, ""), (_LABELS, " labels")):
            if match := pattern.fullmatch(plain[name]):
                kind = next(kind for kind, text in match.groupdict().items() if text)
                roles.setdefault(kind.removeprefix("of_") + of, name)
    if "train" not in roles:
        for role, bare in _BARE.items():
            named = {text: name for name, text in plain.items()}
            if match_name := next((named[text] for text in bare if text in named), None):
                roles[role] = match_name
    if own_validation:
        return {role.replace("val", "validation"): name for role, name in roles.items()}
    if "test" not in roles and "val" in roles:
        roles.pop("test labels", None)
        roles |= {role.replace("val", "test"): name for role, name in roles.items() if role.startswith("val")}
    return {role: name for role, name in roles.items() if not role.startswith("val")}


def read_arrays_file(path: Path, holdout: float, seed: int, levels: int | None, own_validation: bool = False) -> ImageSet:
    """Arrays of a `.npz`, a `.npy`, or of what `prepare` wrote; with own images for validation, where they are asked for."""
    if any((path / name).is_file() for name in ("train.npy", "manifest.json")):
        return read_memory_map(path, own_validation, levels)
    if not path.is_file():
        raise UserError(f"There is no file {str(path)!r}; data.path must name a .npz or .npy of images.")
    remedy = "data.path must name a .npz or .npy of images"
    held: list[str] = []
    roles: dict[str, str] = {}

    def choose(names: list[str]) -> list[str]:  # others may be large, or objects
        held.extend(names)
        roles.update(_roles(names, own_validation))
        return [roles[split] for split in SPLITS if split in roles]

    arrays = read_arrays(path, remedy, choose)
    if "" in arrays:
        held, roles = [""], {"train": ""}
    if "train" not in roles:
        found = ", ".join(held) or "nothing"
        raise UserError(f"{path} needs an array 'train' (and may have 'test'); it holds {found}{nearest('train', held)}.")
    what = {split: f"{roles[split]!r} in {path}" if roles[split] else str(path) for split in SPLITS if split in roles}
    convert, images = Conversion(levels), dict[str, np.ndarray]()
    for split in what:
        array = arrays[roles[split]]
        if array.dtype.kind in "biu" and array.dtype != np.uint8:  # 16 bits, say
            images[split], levels = convert(array, what[split]), convert.levels
        else:
            images[split] = check_images(array, what[split])
    floats: list[Any] = [np.float32, *(array.dtype for array in arrays.values() if array.dtype.kind == "f")]
    precision = max(float(np.finfo(kind).eps) for kind in floats)
    train, validation = images["train"], images.get("validation")
    labels, names = _labels(path, roles, {split: len(of) for split, of in images.items()})
    notes = [f"{len(train):,} images{' ' * bool(roles['train'])}{roles['train'] and repr(roles['train'])}"]
    if "test" in images:
        test = images["test"]
        notes.append(f"{len(test):,} for testing {roles['test']!r}")
    else:
        parts = hold_out(contents_of(train), holdout, seed, printable(str(path)), "testing")
        notes.append(f"of which {len(parts[1]):,} are held out for testing")
        labels |= {split: labels["train"][part] for split, part in zip(("train", "test"), parts, strict=True) if labels}
        train, test = (train[part] for part in parts)
    if validation is not None:
        notes.append(f"{len(validation):,} for validation {roles['validation']!r}")
    for name, other in (("test", test), ("validation", train if validation is None else validation)):
        if train.shape[1:] != other.shape[1:] or train.dtype != other.dtype:
            kinds = f"training images {train.shape[1:]} {train.dtype} and {name} images {other.shape[1:]} {other.dtype}"
            raise UserError(f"{path}: {kinds} differ.")
    height, width, channels = train.shape[1:]
    levels, sentence = _levels([train, test, *([] if validation is None else [validation])], levels, path, precision)
    notes.append(f"{height} pixels high, {width} wide, {channels} channel{'s' * (channels > 1)}, {levels:,} levels")
    left_out = [repr(name) for name in held if name not in roles.values()]
    log.info(f"{printable(path.name)}: {', '.join(notes)}{'; left out: ' if left_out else ''}{', '.join(left_out)}.{sentence}")
    return ImageSet(
        printable(path.stem),
        train,
        test,
        levels,
        labels.get("train"),
        labels.get("test"),
        names,
        validation=validation,
        validation_labels=labels.get("validation"),
    )


def _labels(path: Path, roles: dict[str, str], counts: dict[str, int]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Classes of the images of an `.npz`, by split, and their names; those of the training images are all there are.

    Takes those that are no classes out of `roles`.
    """
    wanted = {split: roles[f"{split} labels"] for split in counts if f"{split} labels" in roles}
    found = {}
    for split, name in wanted.items():
        with contextlib.suppress(UserError):  # objects
            array = read_arrays(path, "", lambda _, name=name: [name])[name]  # type: ignore[misc]
            array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
            if array.shape == (counts[split],) and array.dtype.kind in "iubUS":
                found[split] = array
    if "train" not in found:
        found.clear()
    for role in [role for role in roles if role.endswith(" labels") and role.removesuffix(" labels") not in found]:
        del roles[role]
    if not found:
        return {}, ()
    classes = np.unique(found["train"])
    numbers = {value: number for number, value in enumerate(classes.tolist())}
    labels = {split: np.array([numbers.get(value, -1) for value in array.tolist()]) for split, array in found.items()}
    return labels, () if list(numbers) == list(range(len(numbers))) else tuple(map(str, numbers))


def _levels(splits: list[np.ndarray], levels: int | None, path: Path, precision: float) -> tuple[int, str]:
    """Number of gray levels of images, and a sentence where it is guessed.

    Raises:
      UserError: values that need more levels than are given, or floats whose number of levels cannot be told.
    """
    if splits[0].dtype == np.uint8:
        high = max(int(images.max()) for images in splits)
        if levels is not None and not high < levels <= 256:
            raise UserError(
                f"{path} holds uint8 values up to {high}, which needs data.levels of {high + 1} ... 256, not {levels}."
            )
        if levels is None and high <= 16:
            return 256, f" Its values are 0 ... {high}, nearly black; --data.levels {high + 1} if there are no others."
        return levels or 256, ""
    if levels is not None:
        return levels, ""
    few = distinct_values(splits[0], 256)
    for count in (256, *range(2, 256), 1 << 10, 1 << 12, 1 << 14, 1 << 16):
        if on_grid(few, count, precision) and all(on_grid(images, count, precision) for images in splits):
            return (
                count,
                f" Its floats are multiples of 1/{count - 1}: {count:,} levels are a guess, which --data.levels sets right.",
            )
    if len(few) > 256:
        raise UserError(
            f"{path} holds floats of more than 256 values, which are multiples of no 1 / (levels - 1); bits per dimension "
            "depend on the levels: give --data.levels (in a config: data.levels), 256 for images that had 8 bits, 65536 for 16."
        )
    return 256, f" Its floats take {len(few)} values: 256 levels are a guess, which --data.levels sets right."


# --- Folders ----------------------------------------------------------------------------------------------------------


def folder_recipe(source: Any) -> Recipe:
    """What is to be decoded for a `Folder`; looks for the images, and decodes none.

    Raises:
      UserError: no such folder, or too few images in it.
    """
    path = Path(source.path)
    if not source.path:
        raise UserError("data.path must name a folder, .zip or .tar of images.")
    found = find_images(path, source.validation == "own")
    log.info(found.division)
    splits = dict(found.splits)
    division: dict[str, Any] = {"holdout": None}
    shares = []
    if "test" not in splits:
        division = {"holdout": [source.holdout, source.holdout_seed]}
        shares.append(("test", source.holdout, source.holdout_seed))
    if isinstance(source.validation, float):
        shares.append(("validation", source.validation, VALIDATION_SEED))
    contents = splits["train"].contents() if shares else []  # reads files
    for split, share, seed in shares:
        purpose = "testing" if split == "test" else split
        parts = [part.tolist() for part in hold_out(contents, share, seed, printable(str(path)), purpose)]
        splits["train"], splits[split] = [splits["train"].take(part) for part in parts]
        contents = [contents[index] for index in parts[0]]
    if source.validation is not None:
        division["validation"] = source.validation
    return Recipe(
        printable(path.resolve().stem).removesuffix(".tar"),
        {"files": found.stamp, **division},
        {split: splits[split] for split in SPLITS if split in splits},
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


def tfds_builder(source: Any) -> Any:
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


def prepare_tfds(source: Any) -> None:
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


def tfds_recipe(source: Any) -> Recipe:
    """What is to be decoded for a `TFDS` set; looks for the images, and decodes none.

    Raises:
      UserError: no such set, or a split of it is missing.
    """
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
    names = {"train": source.train_split, "test": source.test_split}
    if source.validation == "own":
        names["validation"] = "validation"
    for part, split in names.items():
        records, stamps = _records(builder, source.name, split)
        what = f"split {split!r} of TFDS set {source.name!r}"
        splits[part] = Records(what, Path(builder.data_dir), records, label, attributes)
        files |= stamps
    return Recipe(
        source.name,
        {"tfds": builder.info.full_name, "splits": list(names.values()), "files": files},
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
            f"catalog is prepared by `bsvae prepare {name}`, which needs TensorFlow: pip install 'bsvae_jax[tf]'."
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
