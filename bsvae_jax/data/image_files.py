"""Image files as a source has them, still encoded: a folder, a zip archive. Found and ordered, not decoded."""

import dataclasses
import hashlib
import os
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

from bsvae_jax._io.files import DAMAGE
from bsvae_jax.data.decoding import CorruptImageError
from bsvae_jax.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken for images, in small or capital letters."""

TEST_FOLDERS = ("test", "validation", "valid", "val")
"""Names of a folder of held-out images beside `train`; the first that is there is taken."""


class Encoded(NamedTuple):
    """One image file."""

    name: str
    content: bytes
    label: int | np.ndarray | None
    """Class, or attributes [A]; None where the source has neither."""


class EncodedImages(Protocol):
    """The images of one split, in an order that never changes. Read from several threads at once."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, start: int, stop: int) -> list[Encoded | CorruptImageError]:
        """Images `start ... stop - 1`; an error in place of one that cannot be read."""


@dataclass(frozen=True)
class Files:
    """Images that are files of a folder, or members of a zip archive."""

    root: Path
    names: Sequence[str]
    """Relative to the root."""
    labels: Sequence[int] | None
    archive: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def read(self, start: int, stop: int) -> list[Encoded | CorruptImageError]:
        """Images `start ... stop - 1`; an error in place of one that cannot be read."""
        return [self._read(index) for index in range(start, stop)]

    def _read(self, index: int) -> Encoded | CorruptImageError:
        name = self.names[index]
        try:
            content = (self.root / name).read_bytes() if self.archive is None else self.archive.read(name)
        except DAMAGE as error:
            return CorruptImageError(f"{self.root / name} cannot be read ({error}).")
        return Encoded(str(self.root / name), content, None if self.labels is None else self.labels[index])

    def take(self, indices: Sequence[int]) -> "Files":
        """These images only."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return dataclasses.replace(self, names=[self.names[i] for i in indices], labels=labels)


class Found(NamedTuple):
    """The images of a folder or zip archive."""

    train: Files
    test: Files | None
    """None where no folder says what is held out."""
    classes: tuple[str, ...]
    """Their folders, if the images lie in several; else empty."""
    stamp: str
    """Hash of names, sizes and times of change (of a zip: checksums): another where the images are others."""


def find_images(path: Path) -> Found:
    """Look through a folder, or a `.zip`, for image files.

    Raises:
      UserError: neither, an empty or damaged one, a name or symbolic link that leads out of it, or splits that are not both
        there.
    """
    if path.is_dir():
        entries, archive = _walk(path), None
    elif path.is_file():
        entries, archive = _members(path)
    else:
        raise UserError(f"There is no folder or file {str(path)!r}; data.path must name a folder, or a .zip, of images.")
    names = sorted(name for name in entries if PurePosixPath(name).suffix.lower() in SUFFIXES)
    if not names:
        others = f"; it holds {len(entries)} other files, {sorted(entries)[0]!r} first" if entries else ""
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}){others}.")
    stamp = hashlib.sha256("\n".join(f"{name} {entries[name]}" for name in names).encode()).hexdigest()
    names, prefix = _without_common_folder(names)
    splits = {name.split("/")[0] for name in names if "/" in name}
    test_folder = next((folder for folder in TEST_FOLDERS if folder in splits), None)
    train_names, test_names = names, []
    if "train" in splits and test_folder is not None:
        train_names = [name for name in names if name.startswith("train/")]
        test_names = [name for name in names if name.startswith(f"{test_folder}/")]
    elif "train" in splits and len(splits) > 1:
        raise UserError(f"{path} has a folder 'train' beside {', '.join(sorted(splits - {'train'}))}, but no 'test'.")
    depth = 1 if test_names else 0
    classes = sorted({_folder(name, depth) for name in (*train_names, *test_names)})
    labelled = len(classes) > 1 and "" not in classes
    numbers = {name: number for number, name in enumerate(classes)}

    def files(chosen: list[str]) -> Files:
        labels = [numbers[_folder(name, depth)] for name in chosen] if labelled else None
        return Files(path, [prefix + name for name in chosen], labels, archive)

    return Found(files(train_names), files(test_names) if test_names else None, tuple(classes) if labelled else (), stamp)


def _folder(name: str, depth: int) -> str:
    """The folder at a depth of a name; '' where the file itself is there."""
    parts = name.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _without_common_folder(names: list[str]) -> tuple[list[str], str]:
    """The names without the folders that they all share, as archives tend to have, and those."""
    shared = os.path.commonpath([os.path.dirname(name) for name in names])
    prefix = f"{shared}/" if shared else ""
    return [name.removeprefix(prefix) for name in names], prefix


def _walk(root: Path) -> dict[str, str]:
    """Size and time of change of every file below, by its name relative to the root; hidden ones are left out."""
    found: dict[str, str] = {}
    inside = root.resolve()

    def look(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                raise UserError(
                    f"{entry.path} is a symbolic link out of the folder, to {Path(entry.path).resolve()}; "
                    "copy the images, or give that folder."
                )
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                look(entry.path, f"{prefix}{entry.name}/")
            elif not entry.is_dir():  # what a link to a folder inside leads to is seen where it is
                status = entry.stat()
                found[prefix + entry.name] = f"{status.st_size} {status.st_mtime_ns}"

    try:
        look(str(root), "")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    return found


def _members(path: Path) -> tuple[dict[str, str], zipfile.ZipFile]:
    """Size and checksum of every file of a zip archive, by its name; and the open archive."""
    archive = open_zip(path)
    found = {}
    for member in archive.infolist():
        hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(member.filename).parts)
        if not member.is_dir() and not hidden:
            found[member.filename] = f"{member.file_size} {member.CRC:08x}"
    return found, archive


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip archive whose members all stay inside; they are read, never unpacked.

    Raises:
      UserError: not a zip archive, a damaged one, or one with a name that leads out of it or a symbolic link.
    """
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise UserError(f"{path} is not a zip archive that can be read ({error}); download it again, or unpack it.") from error
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in member.filename.split("/")[0]:
            raise UserError(f"{path} has a member {member.filename!r}, which leads out of it; it is not read.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path} has a symbolic link, {member.filename!r}; it is not read.")
    return archive
