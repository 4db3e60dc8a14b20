"""Archives of image files, `.zip` and `.tar`: their members are read, never unpacked over other files."""

import bz2
import contextlib
import gzip
import lzma
import re
import stat
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from bsvae_jax._io.disk import MARGIN, free_bytes, mebibytes
from bsvae_jax._io.files import DAMAGE, cache_folder
from bsvae_jax._io.terminal import log
from bsvae_jax.errors import UserError

DAMAGED_TAR: tuple[type[Exception], ...] = (tarfile.TarError, *DAMAGE)
"""What the standard library has been seen to raise on damaged tar archives."""


@runtime_checkable
class Archive(Protocol):
    """The part of `zipfile.ZipFile` that is used of an archive. Read from several threads at once."""

    def infolist(self) -> Sequence[Any]:
        """Of every member `filename`, `file_size` and `CRC`."""

    def getinfo(self, name: str) -> Any:
        """The member of this name, the last one where there are several."""

    def read(self, name: str) -> bytes:
        """Its content."""


def member_path(filename: str) -> PurePosixPath:
    """The name of a member; some archives of Windows have backslashes."""
    return PurePosixPath(filename.replace("\\", "/"))


def _check_name(path: Path, filename: str) -> None:
    if not filename:
        raise UserError(f"{path} has a member without a name: it is damaged; download it again, or unpack it.")
    name = member_path(filename)
    if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:/", str(name)):
        raise UserError(f"{path} has a member {filename!r}, which leads out of it; it is not read.")


def _link(path: Path, filename: str) -> UserError:
    return UserError(f"{path} has a symbolic link, {filename!r}; it is not read. Unpack it, and give the folder.")


def open_archive(path: Path) -> Archive:
    """A zip or tar archive whose members all stay inside.

    Raises:
      UserError: neither, a damaged one, or one with a name that leads out of it, a symbolic link or a member that Python
        cannot unpack.
    """
    with path.open("rb") as file:
        start = file.read(264)
    if start[:4] != b"PK\x03\x04" and (start[257:262] == b"ustar" or _compression(start) or _is_tar(path)):
        return Tar(path)
    return open_zip(path)


# --- Zip --------------------------------------------------------------------------------------------------------------

_PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, getattr(zipfile, "ZIP_ZSTANDARD", 0)}


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip archive whose members all stay inside.

    Raises:
      UserError: not a zip archive, a damaged one, or one with a name that leads out of it, a symbolic link or a member that
        Python cannot unpack.
    """
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        if path.suffix.lower() == ".npy":
            raise UserError(f"{path} is a file of arrays; give it as --data arrays --data.path {path}.") from error
        raise UserError(f"{path} is not a zip archive that can be read ({error}); download it again, or unpack it.") from error
    if path.suffix.lower() == ".npz":
        raise UserError(f"{path} is a file of arrays; give it as --data arrays --data.path {path}.")
    for member in archive.infolist():
        _check_name(path, member.filename)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise _link(path, member.filename)
        if member.flag_bits & 1 or member.compress_type not in _PACKED:
            why = "is encrypted" if member.flag_bits & 1 else f"is packed by method {member.compress_type}, which Python lacks"
            raise UserError(f"{path} has a member {member.filename!r} that {why}. Unpack it, and give the folder.")
    return archive


# --- Tar --------------------------------------------------------------------------------------------------------------

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""What reads compressed files, by how they begin."""


def _compression(start: bytes) -> Any:
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def _is_tar(path: Path) -> bool:
    """Whether it is a tar archive of before 1988, which does not say so where it begins."""
    try:
        return tarfile.is_tarfile(path)
    except DAMAGED_TAR:
        return False


class Member(NamedTuple):
    """A file of a tar archive, named as `zipfile.ZipInfo` names these."""

    filename: str
    file_size: int
    CRC: int


class Tar:
    """A tar archive, compressed or not, all of whose members stay inside; it is read through once as it is opened.

    A compressed one is decompressed beside the prepared images, to a file without a name that vanishes with the process: no
    member of it could be found without that.

    Raises:
      UserError: a damaged archive, one with a name that leads out of it, a symbolic link or a file stored in part, or no room.
    """

    def __init__(self, path: Path):
        """Reads the archive."""
        self._path, self._lock = path, threading.Lock()
        self._files: dict[str, tuple[Member, tarfile.TarInfo]] = {}
        with self._damage_named():
            with path.open("rb") as file:
                opener = _compression(file.read(8))
            self._file = path.open("rb") if opener is None else _temporary_file()
            weakref.finalize(self, self._file.close)
            if opener is not None:
                _decompress(path, opener, self._file)
            self._archive = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
            end = 0
            for entry in self._archive:
                stored = entry.size if entry.isreg() else 0
                end = max(end, entry.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                _check_name(path, entry.name)
                if entry.issym():
                    raise _link(path, entry.name)
                if entry.issparse():
                    raise UserError(f"{path} has a member {entry.name!r} stored in part. Unpack it, and give the folder.")
                if entry.isfile() or entry.islnk():  # a hard link is another name of a file before it
                    content = self._content(entry)
                    self._files[entry.name] = Member(entry.name, len(content), zlib.crc32(content)), entry
            self._check_end(end)

    def _check_end(self, end: int) -> None:
        """Tell an archive that ends from one whose next header is damaged, at which `tarfile` stops without a word."""
        self._file.seek(end)
        block = self._file.read(tarfile.BLOCKSIZE)
        if not block:
            log.warning(f"{self._path} has no mark at its end: images may be missing if its download was cut off.")
        elif block != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header of a member at byte {end:,}")

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except DAMAGED_TAR as error:
            raise UserError(
                f"{self._path} is not a tar archive that can be read ({error}); download it again, or unpack it."
            ) from error

    def _content(self, entry: tarfile.TarInfo) -> bytes:
        file = self._archive.extractfile(entry)
        assert file is not None  # of a file, or of a link to one
        content = file.read()
        if entry.isreg() and len(content) != entry.size:
            raise tarfile.ReadError(f"{entry.name} is cut off")
        return content

    def infolist(self) -> list[Member]:
        """Every file."""
        return [member for member, _ in self._files.values()]

    def getinfo(self, name: str) -> Member:
        """The file of this name, the last one where there are several."""
        return self._files[name][0]

    def read(self, name: str) -> bytes:
        """Its content; an OSError where it has changed since the archive was opened."""
        member, entry = self._files[name]
        with self._lock:
            content = self._content(entry)
        if zlib.crc32(content) != member.CRC:
            raise OSError("the archive has changed")
        return content


def _temporary_file() -> IO[bytes]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); set BSVAE_CACHE to another folder.") from error


def _decompress(path: Path, opener: Any, target: IO[bytes]) -> None:
    with opener(path) as source:
        while block := source.read(2**24):
            if (free := free_bytes(cache_folder())) < len(block) + MARGIN:
                raise UserError(
                    f"{path} is decompressed in {cache_folder()}, whose disk has {mebibytes(free)} free: too few. Free some "
                    "space, set BSVAE_CACHE to a folder on another disk, or unpack it and give the folder."
                )
            target.write(block)
    target.seek(0)
