"""Images from any iterable: a generator larger than memory, another library's loader, a list.

They are written once into a folder (`memory_map`). A configuration reads it by `Arrays(path=FOLDER)`, on the command line
`--data arrays --data.path FOLDER`.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from bsvae_jax._io.files import as_path, is_used, take_folder
from bsvae_jax._io.terminal import ProgressBar, messages_shown
from bsvae_jax.data.decoding import CHANNELS, flattened
from bsvae_jax.data.image_set import SPLITS, ImageSet, check_images
from bsvae_jax.data.memory_map import Files, write_manifest
from bsvae_jax.errors import UserError, check_count, check_flag, check_number, shown

_IMAGE_KEYS, _LABEL_KEYS = ("image", "images", "img", "pixel_values", "x"), ("label", "labels", "target", "y")
"""Names of images and of classes in the dictionaries that loaders give."""


def prepare(
    images: Iterable[Any],
    folder: str | Path,
    *,
    test: Iterable[Any] | None = None,
    validation: Iterable[Any] | float | None = None,
    holdout: float = 0.1,
    holdout_seed: int = 0,
    batched: bool = False,
    levels: int | None = None,
    scale: tuple[float, float] | None = None,
    count: int | None = None,
    progress: bool = True,
) -> ImageSet:
    """Write images from any iterable into a folder, as memory maps; they are never all in memory.

    Each item is an image [H, W] or [H, W, C] (an array, or what becomes one: a PIL image, a tensor of PyTorch, an array of
    JAX), or a pair of image and class, or a dictionary with `image` and `label`. If it is interrupted, the same call continues:
    what was written is compared with the images given anew. Values are stored as uint8 up to 256 levels, else as float32 in
    [0, 1].

    Args:
      images: for training; without `test`, a share of them is held out.
      folder: where they are written; new, empty, or of the same call before.
      test: images that are held out.
      validation: images on which choices are made, or a share of `images`; read by `Arrays(folder, validation="own")`.
      holdout: share of `images` held out for testing where `test` is None. An image is drawn by its content, so that its copies
        are on the same side.
      holdout_seed: of that draw.
      batched: whether each item is a batch, [N, H, W] or [N, H, W, C], with classes [N], as loaders give them.
      levels: number of gray levels, on which bits per dimension depend: 256 of uint8 and 65,536 of uint16, unless it is given;
        integers are 0 ... levels - 1. Floats need it: 256 of images that had 8 bits, 65,536 of 16.
      scale: the values that become 0 and 1; floats are in [0, 1] without it.
      count: of `images`, which are read no further; to their end if it is not given.
      progress: show a bar.

    Returns:
      The images written, as memory maps.

    >>> import tempfile
    >>> generator = (np.full((8, 8), value, np.uint16) for value in range(0, 65536, 1024))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = prepare(generator, folder, holdout=0.25, progress=False)
    >>> written.levels, written.train.dtype, len(written.train) + len(written.test)
    (65536, dtype('float32'), 64)

    Raises:
      UserError: images of several shapes or depths, not in range, or without channels last; an iterable that ends before
        `count`, or its own `len`, raises, or gives other images than in the call that is continued; no room; a folder of
        something else. What was written until then stays; a finished set to which nothing was added stays finished.
    """
    folder = as_path(folder, "folder")
    check_flag("batched", batched)
    check_count("holdout_seed", holdout_seed, low=0)
    if count is not None:
        check_count("count", count)
    convert = Conversion(levels, scale)
    given, shares = {"train": images, "test": test, "validation": validation}, {}
    for split, share in (("test", holdout if test is None else None), ("validation", validation)):
        if share is not None and not isinstance(share, Iterable):
            check_number("holdout" if split == "test" else split, share, low=0.0, high=0.9, open_low=True)
            shares[split] = float(share)
    sources = {split: _iterable(source, split) for split, source in given.items() if source is not None and split not in shares}
    splits = [split for split in SPLITS if split in sources or split in shares]
    there = {path.stem.removesuffix("_labels") for path in folder.glob("*.npy")}
    if there - set(splits) or (is_used(folder) and not there):
        raise UserError(f"{folder} is not empty, and holds something else than images of this call; choose another folder.")
    with messages_shown(progress), take_folder(folder, "writing images", "folder"), contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(Files(folder, split)) for split in splits}
        for split, source in sources.items():
            for rows, labels in _taken(source, split, folder, convert, batched, count if split == "train" else None, progress):
                where = _drawn(rows, shares, holdout_seed) if split == "train" else np.full(len(rows), split)
                for part in np.unique(where).tolist():
                    chosen = where == part
                    files[part].append(rows[chosen], None if labels is None else labels[chosen])
        for split, file in files.items():
            file.check_whole()
            if not file.images.rows:
                raise UserError(
                    f"{folder}: no image was drawn for {split}; give a larger share, another holdout_seed, or a {split} set."
                )
    with messages_shown(progress):
        return write_manifest(folder, convert.levels, own_validation=validation is not None)


def _iterable(source: Any, name: str) -> Iterable[Any]:
    if isinstance(source, str | bytes | Mapping) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise UserError(f"{name} must be an iterable of images, got a value of type {type(source).__name__}.")
    return source if isinstance(source, Iterable) else map(source.__getitem__, range(len(source)))  # a Dataset of PyTorch


def _drawn(rows: np.ndarray, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """The split of each image, by a hash of its values: 'train', or one of `shares`."""
    found = []
    for row in rows:
        hashed = hashlib.blake2b(row.tobytes(), digest_size=8, key=str(seed).encode()).digest()
        draw = int.from_bytes(hashed, "big") / 2**64
        split = "train"
        for name, share in shares.items():
            if 0.0 <= draw < share:
                split = name
            draw -= share
        found.append(split)
    return np.array(found)


# --- What is given ----------------------------------------------------------------------------------------------------


def _taken(
    source: Iterable[Any], split: str, folder: Path, convert: "Conversion", batched: bool, count: int | None, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Images [N, H, W, C] as they are stored, and classes [N] if they have them, to the end of the iterable or to `count`."""
    items = None
    with contextlib.suppress(TypeError):  # PyTorch's loaders of endless sets have a `len` that raises
        items = len(source)  # type: ignore[arg-type]
    given = done = 0
    stays = f"What was written before it stays in {folder}; the same call, with all images from the first on, continues."
    labeled: bool | None = None
    with ProgressBar(count or (None if batched else items), 0, progress) as bar:
        bar.describe(f"writing {split}")
        ahead = iter(source)
        while count is None or done < count:
            what = f"{'batch' if batched else 'image'} {given} of {split}"
            try:
                item = next(ahead, _END)
            except Exception as error:
                raise UserError(f"{what} could not be had ({type(error).__name__}: {error}). {stays}") from error
            if item is _END:
                break
            image, label = _parts(item, batched, what)
            if image.dtype.kind not in "buif":
                raise UserError(f"{what} is no array of numbers, but of type {image.dtype}.")
            if image.ndim not in ((3, 4) if batched else (2, 3)):
                wanted = "a batch is [N, H, W] or [N, H, W, C]" if batched else "an image is [H, W] or [H, W, C]"
                raise UserError(f"{what} has shape {image.shape}: {wanted}; batched=True is for batches.")
            rows = convert(image if batched else image[None], what)
            rows = rows if count is None else rows[: count - done]
            labels = None if label is None else _classes(label if batched else label[None], what)[: len(rows)]
            if labeled not in (None, label is not None) or (labels is not None and len(labels) != len(rows)):
                raise UserError(f"{what} has {0 if labels is None else len(labels)} classes for {len(rows)} images. {stays}")
            labeled = label is not None
            yield rows, labels
            given, done = given + 1, done + len(rows)
            bar.update(len(rows))
    if not done:
        raise UserError(f"{split} gave no images.")
    if count is not None and done < count:
        raise UserError(f"{split} ended after {done:,} images, of {count:,}. {stays}")
    if count is None and items is not None and given < items:
        raise UserError(f"{split} ended after {given:,} items, of the {items:,} that its len says. {stays}")


_END = object()


def _parts(item: Any, batched: bool, what: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Image, or batch, and class, or classes, of an item."""
    label = None
    if isinstance(item, Mapping):
        image = next((item[name] for name in _IMAGE_KEYS if name in item), None)
        label = next((item[name] for name in _LABEL_KEYS if name in item), None)
        if image is None:
            raise UserError(f"{what} has no {_IMAGE_KEYS[0]!r}, but {', '.join(map(repr, item))}; give the images alone.")
    elif isinstance(item, tuple | list) and len(item) in (1, 2) and _is_image(item[0], batched):
        image, label = (*item, None)[:2]
    else:
        image = item
    try:
        return _array(image), None if label is None else np.asarray(label)
    except (ValueError, TypeError, RuntimeError) as error:  # of lists of several lengths; of tensors elsewhere
        raise UserError(f"{what} is no array: {error}.") from error


def _is_pil(image: Any) -> bool:
    return isinstance(image, PIL.Image.Image)


def _are_pil(images: Any) -> bool:
    return isinstance(images, tuple | list) and bool(images) and _is_pil(images[0])


def _is_image(item: Any, batched: bool) -> bool:
    """Whether it is an array, or an image of Pillow, or a batch of these."""
    return hasattr(item, "__array__") or (_are_pil(item) if batched else _is_pil(item))


def _array(image: Any) -> np.ndarray:
    """An image of Pillow, or several, on white, without palette; or whatever becomes an array."""
    if _are_pil(image):
        return np.stack([_array(one) for one in image])
    if _is_pil(image) and image.mode in CHANNELS:
        return np.asarray(flattened(image, CHANNELS[image.mode])[0])
    return np.asarray(image)


def _classes(labels: np.ndarray, what: str) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise UserError(f"{what} has classes of shape {labels.shape[1:]} and type {labels.dtype}; classes are whole numbers.")
    return labels.astype(np.int64)


class Conversion:
    """How images are stored: uint8, or float32 in [0, 1]; all of one shape and depth."""

    def __init__(self, levels: int | None, scale: tuple[float, float] | None = None):
        """For images of so many gray levels, or of a scale; as `prepare`."""
        if levels is not None:
            check_count("levels", levels, low=2)
        if scale is not None:
            if not isinstance(scale, tuple | list) or len(scale) != 2:
                raise UserError(f"scale must be two numbers, the values that become 0 and 1, got {shown(scale)}.")
            for end in scale:
                check_number("scale", end, low=-np.inf)
            if not scale[0] < scale[1]:
                raise UserError(f"scale must be two numbers, the lower one first, got {shown(scale)}.")
        self._given, self._scale = levels, scale
        self._depth, self._shape = "", tuple[int, ...]()
        self.levels = 256

    def __call__(self, images: np.ndarray, what: str) -> np.ndarray:
        """Images [N, H, W] or [N, H, W, C] as they are stored."""
        kinds = {"b": "1 bit", "f": "floats", "u": f"{8 * images.itemsize} bits", "i": f"signed {8 * images.itemsize} bits"}
        depth = kinds[images.dtype.kind]
        if not self._depth:
            self._depth, self.levels = depth, self._levels(depth, what)
        if depth != self._depth:
            raise UserError(f"{what} has {depth}, those before it {self._depth}; give all images in one depth.")
        stored = self._stored(images, what)
        self._shape = self._shape or stored.shape[1:]
        if stored.shape[1:] != self._shape:
            raise UserError(f"{what} has shape {stored.shape[1:]}, those before it {self._shape}; make all images alike.")
        return stored

    def _levels(self, depth: str, what: str) -> int:
        known = {} if self._scale else {"1 bit": 2, "8 bits": 256, "16 bits": 65536}
        if self._given is None and depth not in known:
            raise UserError(
                f"{what} has {depth}; bits per dimension depend on the number of gray levels: give levels=256 for images that "
                "had 8 bits, 65536 for 16."
            )
        return self._given or known[depth]

    def _stored(self, images: np.ndarray, what: str) -> np.ndarray:
        if self._scale is None and images.dtype.kind == "f":
            return check_images(images, what)
        low, high = (0, self.levels - 1) if self._scale is None else self._scale
        least, most = (images.min(), images.max()) if images.size else (low, high)
        if not low <= least <= most <= high:
            where = f"{self.levels:,} levels, 0 ... {high}" if self._scale is None else f"the scale, {low:g} ... {high:g}"
            raise UserError(f"{what} has values from {least:g} to {most:g}, beyond {where}.")
        if self._scale is None and self.levels <= 256:
            return check_images(images.astype(np.uint8), what)
        return check_images((images.astype(np.float64) - low) / (high - low), what)
