"""Image files as a source has them, still encoded: a folder, an archive. Found and ordered, not decoded."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from bsvae_jax._io.files import printable
from bsvae_jax.data.archives import DAMAGED_TAR, Archive, member_path, open_archive
from bsvae_jax.data.decoding import CorruptImageError
from bsvae_jax.data.image_set import SPLITS
from bsvae_jax.errors import UserError

SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".cur", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe"),
    *(".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".rgb"),
    *(".rgba", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm"),
)
"""Of the files that are taken for images, in small or capital letters: what Pillow decodes by itself."""

_SPLIT = re.compile(
    r"(?:(?P<train>train|training)|(?P<test>test|testing|eval|evaluation)|(?P<val>val|valid|validation))"
    r"(?P<more>[\s_.-]?(?:set|data|images?|imgs|split))?[\s_.-]?\d*",
    re.IGNORECASE,
)
"""Names of folders that are splits: Train, testing, validation_set, train2017."""

_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
"""What parts the words of a name: trainA, DIV2K_train_HR."""

RULES = 2
"""Version of how the images of a folder are divided, labeled and decoded: what was prepared by others is prepared again."""

_NO_DATA = {
    "__macosx",
    "@eadir",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "#snapshot",
    "lost+found",
    "system volume information",
}
"""Folders that systems and network disks add, in small letters; they hold thumbnails, or deleted files."""


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
    """Images that are files of a folder, or members of an archive."""

    root: Path
    names: Sequence[str]
    """Relative to the root."""
    labels: Sequence[int] | None
    archive: Archive | None = None

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
        except DAMAGED_TAR as error:
            return CorruptImageError(f"{self.root / name} cannot be read ({error}).")
        return Encoded(str(self.root / name), content, None if self.labels is None else self.labels[index])

    def contents(self) -> list[Hashable]:
        """What tells files apart: equal where their contents are. Most are told apart by their size and a few bytes."""
        if self.archive is not None:
            members = map(self.archive.getinfo, self.names)
            return [(member.file_size, member.CRC) for member in members]
        paths = [self.root / name for name in self.names]
        glances = list(map(_glance, paths))
        often = collections.Counter(glances)
        return [
            glance if often[glance] == 1 else (glance, hashlib.sha256(path.read_bytes()).digest())
            for path, glance in zip(paths, glances, strict=True)
        ]

    def take(self, indices: Sequence[int]) -> "Files":
        """These images only."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return dataclasses.replace(self, names=[self.names[i] for i in indices], labels=labels)


def _glance(path: Path) -> tuple[int, bytes]:
    """The size of a file, and what stands in its middle; of one that cannot be read, nothing: decoding says so."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        return size, file.read(64)
    return 0, os.fsencode(path)


class Found(NamedTuple):
    """The images of a folder or archive."""

    splits: dict[str, Files]
    """train, test where a folder says what is held out, and validation where it is there and asked for."""
    classes: tuple[str, ...]
    """Their folders, if the images lie in several; else empty."""
    stamp: str
    """Hash of names, sizes and times of change (of an archive: checksums): another where the images are others."""
    division: str
    """A sentence: which images are trained on, which are held out, and what was left out."""


def find_images(path: Path, own_validation: bool = False) -> Found:
    """Look through a folder, or an archive (`.zip`, `.tar`, `.tar.gz` and the like), for image files.

    Folders `train` and `test` are splits, by any usual name and in letters of any case, wherever they lie; without a test
    folder one of validation images takes its place, unless `own_validation` asks for it. Folders of the training images are
    their classes.

    Raises:
      UserError: neither, an empty or damaged one, a name that leads out of an archive, or folders of which some look like
        splits that are not both there.
    """
    archive, links, members = None, dict[str, str](), dict[str, str]()
    if path.is_dir():
        entries, links = _walk(path)
    elif path.is_file():
        entries, archive, members = _members(path)
    else:
        raise UserError(f"There is no folder or file {str(path)!r}; data.path must name a folder, .zip or .tar of images.")
    names = sorted(name for name in entries if _suffix(name) in SUFFIXES)
    if not names:
        others = f"; it holds {len(entries)} other files, {sorted(entries)[0]!r} first" if entries else ""
        raise UserError(f"{path} holds no images (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp){others}.")
    lines = "\n".join([str(RULES), *(f"{name} {entries[name]}" for name in names)])
    stamp = hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()  # names need not be UTF-8
    divided, left_out = _divide(names, path, own_validation)
    if links and (again := _seen_twice([name for split in divided.values() for name in split], links, path.resolve())):
        left_out.append(f"{_count(len(again))} to which links lead again ({min(again)!r} first)")
        divided = {split: {name: rest for name, rest in of.items() if name not in again} for split, of in divided.items()}
        if not all(divided.values()):
            raise UserError(f"{path} has links by which training images and test images are the same; give others for testing.")
    train, held_out = divided["train"], {split: names for split, names in divided.items() if split != "train"}
    notes = []
    shared = _shared(train.values())
    folders = _folders(train.values(), len(shared))
    counts = collections.Counter(folders)
    stray = counts.pop("", 0)
    labeled = len(counts) > 1 and stray <= max(1, counts.total() // 10)
    if labeled and stray:  # as torchvision's ImageFolder does with all
        left_out.append(f"{_count(stray)} beside the class folders ({list(train)[folders.index('')]!r} first)")
        train = {name: rest for (name, rest), folder in zip(train.items(), folders, strict=True) if folder}
        folders = [folder for folder in folders if folder]
    elif len(counts) > 1 and not labeled:
        notes.append(f"no classes, since {_count(stray)} lie in no class folder")
    classes = sorted(counts) if labeled else []
    looks = [folder for folder in classes if _kind(folder)]
    if len(set(map(_kind, looks))) > 1:
        raise UserError(
            f"{path} has class folders that look like splits: {_listed(looks)}. Name the folders of splits train and test, and "
            "rename those that are classes."
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[folder] for folder in folders] if labeled else None
    held_out_labels: dict[str, list[int]] = {}
    for split, chosen in held_out.items() if labeled else ():
        own = _shared(chosen.values())
        first = len(_shared([own, shared]))  # all images may share the folder of their class, but not one of all classes
        depths = [_folders(chosen.values(), depth) for depth in range(first, len(own) + 1)]
        found = next((folders for folders in depths if not numbers.keys().isdisjoint(folders)), depths[0])
        held_out_labels[split] = [numbers.get(folder, -1) for folder in found]
        if without := held_out_labels[split].count(-1):
            count = "all" if without == len(chosen) else f"{without:,}"
            notes.append(f"{count} {split} images lie in no class folder of training")

    def files(chosen: Iterable[str], labels: list[int] | None) -> Files:
        return Files(path, [members.get(name, name) for name in chosen], labels, archive)

    kinds = collections.Counter(_suffix(name) or "without suffix" for name in entries if _suffix(name) not in SUFFIXES)
    if kinds:
        shown = [f"{count:,} {suffix!a}".replace("'", "") for suffix, count in kinds.most_common(5)]
        left_out.append(f"other files ({', '.join(shown)}{', ...' if len(kinds) > 5 else ''})")
    said = [f"{_count(len(train))}{' for training' if held_out else ''}{_within(train)}"]
    for split in SPLITS:
        if split in held_out:
            purpose = "testing" if split == "test" else split
            said.append(f"{_count(len(held_out[split]))} for {purpose}{_within(held_out[split])}")
    if "test" not in held_out:
        said.append("of which a share is held out at random")
    said += notes
    division = f"{printable(path.name)}: {', '.join(said)}{'; left out: ' if left_out else ''}{', '.join(left_out)}."
    label_names = tuple(map(printable, classes))
    splits = {"train": files(train, labels)}
    splits |= {split: files(held_out[split], held_out_labels.get(split)) for split in SPLITS if split in held_out}
    return Found(splits, label_names, stamp, division)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _count(number: int) -> str:
    return f"{number:,} image{'' if number == 1 else 's'}"


def _listed(names: Iterable[str]) -> str:
    """Quoted, at most three of them; names that are not UTF-8 can be printed so."""
    shown = sorted(names)
    return ", ".join(map(repr, shown[:3])) + (", ..." if len(shown) > 3 else "")


@functools.cache
def _kind(folder: str) -> str:
    """Which split the name of a folder means: 'train', 'test' or 'val'; '' for other names."""
    match = _SPLIT.fullmatch(folder)
    return "" if match is None else next(kind for kind in ("train", "test", "val") if match[kind])


def _within(split: Iterable[str]) -> str:
    """Where the images of a split lie, if its folder has a name: " in 'Train'"."""
    folders = {next((folder for folder in name.split("/")[:-1] if _kind(folder)), "") for name in split} - {""}
    return f" in {_listed(folders)}" if folders else ""


def _divide(names: list[str], path: Path, own_validation: bool) -> tuple[dict[str, dict[str, tuple[str, ...]]], list[str]]:
    """The names of the training images and of the held-out ones, each with its folders but that of the split; what is left out.

    Raises:
      UserError: some folders look like splits, and do not say which images are which.
    """
    splits: dict[str, dict[str, tuple[str, ...]]] = collections.defaultdict(dict)
    spellings: dict[tuple[str, ...], set[str]] = collections.defaultdict(set)
    for name in names:
        folders = tuple(name.split("/")[:-1])
        depth = next((depth for depth, folder in enumerate(folders) if _kind(folder)), len(folders))
        kind = _kind(folders[depth]) if depth < len(folders) else ""
        splits[kind][name] = (*folders[:depth], *folders[depth + 1 :])
        if kind:
            spellings[(*folders[:depth], kind)].add(folders[depth])
    beside = splits.pop("", {})
    remedy = "Name the folders of splits train and test, and move or rename the others."
    if len(splits) == 1 and not beside:  # a folder 'train' and nothing else: no split
        return {"train": next(iter(splits.values()))}, []
    if not splits:
        words = {folder for name in names for folder in name.split("/")[:-1]}
        first = [_WORDS.split(name.split("/")[-1])[0] for name in names]
        looks = {folder: {_kind(word) for word in _WORDS.split(folder)} - {""} for folder in words}
        if len({frozenset(kinds) for kinds in looks.values() if kinds}) > 1 or (
            all(map(_kind, first)) and len(set(map(_kind, first))) > 1
        ):
            which = sorted(folder for folder, kinds in looks.items() if kinds) or [names[0], names[-1]]
            raise UserError(f"{path} has names that look like splits: {_listed(which)}. {remedy}")
        return {"train": beside}, []
    if "train" not in splits or len(splits) == 1:
        kind = "train" if "train" in splits else min(splits)
        found = {folder for place, folders in spellings.items() if place[-1] == kind for folder in folders}
        others = {name.split("/")[0] for name in beside} or set(splits) - {kind}
        shown = ", ".join(map(printable, sorted(others)[:3]))
        lacks = "test" if "train" in splits else "train"
        raise UserError(f"{path} has a folder {_listed(found)} beside {shown}, but no '{lacks}'. {remedy}")
    left_out = []
    held_out = "test" if "test" in splits else "val"
    if own_validation and "val" in splits:
        used = {"train": "train", "test": "test", "val": "validation"}
    else:
        used = {"train": "train", held_out: "test"}
    if "val" in splits and "val" not in used:
        left_out.append(f"{_count(len(splits['val']))}{_within(splits['val'])}, apart from those for testing")
    for place, several in spellings.items():
        if len(several) > 1 and place[-1] in used:
            raise UserError(f"{path} has several folders of one split, {_listed(several)}; keep one of them, or make them one.")
    if beside:
        left_out.append(f"{_count(len(beside))} beside those folders ({min(beside)!r} first)")
    return {role: splits[kind] for kind, role in used.items() if kind in splits}, left_out


def _shared(rests: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The first folders, which all images share."""
    ends = zip(min(rests), max(rests), strict=False)
    return tuple(folder for folder, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))


def _folders(rests: Iterable[tuple[str, ...]], depth: int) -> list[str]:
    """The folder of every image at a depth; '' where there is none."""
    return [rest[depth] if len(rest) > depth else "" for rest in rests]


def _is_data(name: str) -> bool:
    """Not hidden, and not what a system adds."""
    return not name.startswith(".") and name.lower() not in _NO_DATA


def _walk(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Size and time of change of every file below, by its name relative to the root; hidden ones are left out.

    Links are followed. The second answer is where those files really are to which one led.
    """
    found: dict[str, str] = {}
    links: dict[str, str] = {}
    inside = root.resolve()

    def look(folder: str, prefix: str, above: tuple[str, ...], linked: bool) -> None:
        with os.scandir(folder) as entries:
            listed = sorted((entry for entry in entries if _is_data(entry.name)), key=lambda entry: entry.name)
        for entry in listed:
            real = os.path.realpath(entry.path) if linked or entry.is_symlink() else os.path.join(above[-1], entry.name)
            if entry.is_dir():
                if any(Path(folder).is_relative_to(real) for folder in above):  # a circle
                    if Path(real).is_relative_to(inside):
                        continue  # nothing is there that is not seen anyway
                    raise UserError(
                        f"{entry.path} is a symbolic link to {real}, in which it lies itself; delete it, or give the folder "
                        "that has the images."
                    )
                look(entry.path, f"{prefix}{entry.name}/", (*above, real), linked or entry.is_symlink())
            elif _suffix(entry.name) in SUFFIXES or entry.is_file():
                status = entry.stat()  # an error, of an image that is a link to nowhere
                if stat.S_ISREG(status.st_mode):
                    found[prefix + entry.name] = f"{status.st_size} {status.st_mtime_ns}"
                    if linked or entry.is_symlink():
                        links[prefix + entry.name] = real

    try:
        look(str(root), "", (str(inside),), False)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    return found, links


def _seen_twice(names: list[str], links: dict[str, str], root: Path) -> set[str]:
    """Names that links give to files which are among the others."""
    seen = {os.path.join(root, name) for name in names if name not in links}
    again = set()
    for name in names:
        if name in links:
            if links[name] in seen:
                again.add(name)
            seen.add(links[name])
    return again


def _members(path: Path) -> tuple[dict[str, str], Archive, dict[str, str]]:
    """Size and checksum of every file of an archive, by its name; the open archive; and how it calls those files."""
    try:
        archive = open_archive(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    found, members = {}, {}
    for member in archive.infolist():
        name = member_path(member.filename)
        if not member.filename.endswith(("/", "\\")) and all(map(_is_data, name.parts)):
            found[str(name)] = f"{member.file_size} {member.CRC:08x}"
            members[str(name)] = member.filename
    return found, archive, members
