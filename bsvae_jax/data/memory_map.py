"""A data set as memory maps that grow while they are written: what `prepare` leaves, and `Arrays` reads.

FOLDER/train.npy           [N, H, W, C], uint8, or float32 in [0, 1]; also test.npy, and validation.npy where it is asked for
FOLDER/train_labels.npy    [N] classes, where the images have them; the same of the others
FOLDER/manifest.json       levels, hashes; written last: without it the set is not finished
"""

import contextlib
import os
from pathlib import Path
from typing import IO

import numpy as np

from bsvae_jax._io.disk import MARGIN, free_bytes, mebibytes
from bsvae_jax._io.files import printable, read_json, sha256_of, write_json
from bsvae_jax._io.terminal import log
from bsvae_jax.data.cache import undamaged
from bsvae_jax.data.image_set import ImageSet
from bsvae_jax.errors import UserError

FORMAT = 1
"""Version of the layout of the folder."""

BLOCK = 2**24
"""Bytes after which the file says what was written, and the room left on its disk is looked at."""


class Growing:
    """A `.npy` file to which rows are appended; those that are there from a call before are compared with the new ones."""

    def __init__(self, path: Path):
        """Opens what is there; the file is made with its first row."""
        self.path, self.rows = path, 0
        self._before = np.empty(0)
        with contextlib.suppress(OSError, ValueError, EOFError):  # none, or torn as it was begun
            self._before = np.load(path, mmap_mode="r")
        self._file: IO[bytes] | None = None
        self._unsettled = 0

    def append(self, rows: np.ndarray) -> None:
        """Write rows [N, ...].

        Raises:
          UserError: a call before has written others, or the disk is full.
        """
        known = self._before[self.rows : self.rows + len(rows)]
        if len(known) and not (known.dtype == rows.dtype and np.array_equal(known, rows[: len(known)])):
            raise self._others(f"other rows of a call before, from row {self.rows} on, than are given now")
        try:
            if self._file is None:
                self._file = self.path.open("r+b" if len(self._before) else "w+b")
                self._layout = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False}
                self._each = rows.shape[1:]
                self._write_header()
                self._file.seek(len(self._before) * rows[0].nbytes, os.SEEK_CUR)
                self._file.truncate()  # a kill may leave rows that the header does not count
            if self.rows <= len(self._before) < self.rows + len(rows):  # the first that are new: the set is whole no more
                (self.path.parent / "manifest.json").unlink(missing_ok=True)
            self._file.write(np.ascontiguousarray(rows[len(known) :]).data)
            self.rows += len(rows)
            self._unsettled += rows.nbytes
            if self._unsettled > BLOCK:
                self._settle()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); what was written before stays.") from error

    def _others(self, what: str) -> UserError:
        return UserError(
            f"{self.path} holds {what}. A call continues with the same images; choose another folder, or delete this one."
        )

    def _write_header(self) -> None:
        """Say how many rows there are; as NumPy writes it, a header has room for any number of them."""
        assert self._file is not None
        self._file.seek(0)
        shape = (max(self.rows, len(self._before)), *self._each)
        np.lib.format.write_array_header_1_0(self._file, self._layout | {"shape": shape})

    def _settle(self) -> None:
        assert self._file is not None
        self._write_header()
        self._file.flush()
        self._file.seek(0, os.SEEK_END)
        self._unsettled = 0
        if (free := free_bytes(self.path.parent)) < BLOCK + MARGIN:
            raise UserError(
                f"The disk of {self.path.parent} has {mebibytes(free)} free after {self.rows:,} images. Free some space and "
                "repeat the call: it continues."
            )

    def close(self) -> None:
        """Leave an array of the rows that were written."""
        if self._file is not None:
            with self._file:
                self._write_header()

    def check_whole(self) -> None:
        """Raise a UserError if fewer rows were given than a call before has written."""
        if self.rows < len(self._before):
            raise self._others(f"{len(self._before):,} rows of a call before, and {self.rows:,} are given now")


class Files:
    """The arrays of one split."""

    def __init__(self, folder: Path, split: str):
        """Opens what is there."""
        self.images, self._labels = Growing(folder / f"{split}.npy"), Growing(folder / f"{split}_labels.npy")

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self.images.close()
        self._labels.close()

    def append(self, rows: np.ndarray, labels: np.ndarray | None) -> None:
        """Write images, and their classes."""
        self.images.append(rows)
        if labels is not None:
            self._labels.append(labels)

    def check_whole(self) -> None:
        """As of a growing file."""
        self.images.check_whole()
        self._labels.check_whole()


def _open(folder: Path, name: str, levels: int, own_validation: bool, fingerprint: str | None = None) -> ImageSet:
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    return ImageSet(
        name,
        arrays["train"],
        arrays["test"],
        levels,
        arrays.get("train_labels"),
        arrays.get("test_labels"),
        known_fingerprint=fingerprint,
        validation=arrays["validation"] if own_validation else None,
        validation_labels=arrays.get("validation_labels") if own_validation else None,
    )


def write_manifest(folder: Path, levels: int, own_validation: bool) -> ImageSet:
    """Say that the arrays of the folder are whole; its images, which need no check now, as of `read_memory_map`."""
    name = folder.resolve().name
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.glob("*.npy"))}
    wanted = [False, True][: 1 + ("validation.npy" in files)]
    fingerprints = [_open(folder, name, levels, own).fingerprint() for own in wanted]
    values = {"format": FORMAT, "name": name, "levels": levels, "files": files, "fingerprints": fingerprints}
    write_json(folder / "manifest.json", values)
    return _told(folder, _open(folder, name, levels, own_validation, fingerprints[own_validation]))


def read_memory_map(folder: Path, own_validation: bool = False, levels: int | None = None, progress: bool = True) -> ImageSet:
    """The images that `prepare` wrote into a folder, mapped into memory.

    Args:
      folder: of them.
      own_validation: whether those for validation are asked for.
      levels: that they must have, if given.
      progress: show a bar while a large set is checked.

    Raises:
      UserError: there are none, they are not finished, or damaged, or have other levels.
    """
    path, remedy = folder / "manifest.json", "write the images again, by the same call of bsvae_jax.prepare"
    if not path.is_file():
        raise UserError(f"{folder} holds no images that bsvae_jax.prepare has finished; {remedy}.")
    with read_json(path, remedy) as values:
        if values["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer bsvae_jax (format {values['format']}).")
        own = own_validation and "validation.npy" in values["files"]
        same = {path.name for path in folder.glob("*.npy")} == set(values["files"])
        if not same or not undamaged(folder, values["files"], progress):
            raise UserError(f"{folder} is damaged: its files are not those that were written; {remedy}.")
        if levels not in (None, values["levels"]):
            raise UserError(f"{folder} has {values['levels']:,} levels; leave out data.levels, which is {levels}.")
        return _told(folder, _open(folder, values["name"], values["levels"], own, values["fingerprints"][own]))


def _told(folder: Path, images: ImageSet) -> ImageSet:
    log.info(f"{printable(folder.name)}: {images.sizes()}, {images.levels:,} levels.")
    return images
