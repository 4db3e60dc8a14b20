"""Files from the network: each has a size and a SHA-256, and is checked against them wherever it is found."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bsvae_jax._io.disk import free_bytes, mebibytes
from bsvae_jax._io.files import sha256_of
from bsvae_jax._io.terminal import ProgressBar, messages_shown
from bsvae_jax.errors import UserError


class Download(NamedTuple):
    """A published file."""

    url: str
    size: int
    """Bytes."""
    sha256: str
    file: str | None = None
    """Its name, where the address is of a page that leads to it."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.file or self.url.rpartition("/")[2]


def check(path: Path, wanted: Download, remedy: str) -> Path:
    """The path, if size and SHA-256 of its content are the published ones; a size is compared first, in no time.

    Raises:
      UserError: other content; the sentence ends with `remedy`.
    """
    size = path.stat().st_size
    if size != wanted.size:
        raise UserError(f"{path} is not the published file: it has {size:,} bytes, expected {wanted.size:,}. {remedy}")
    found = sha256_of(path)
    if found != wanted.sha256:
        raise UserError(f"{path} is not the published file: its SHA-256 is {found}, expected {wanted.sha256}. {remedy}")
    return path


def find(wanted: Download, folders: Sequence[Path], remedy: str) -> Path | None:
    """The file in the first of `folders` that has one of its name, checked; None where none has.

    Raises:
      UserError: it has other content.
    """
    path = next((folder / wanted.name for folder in folders if (folder / wanted.name).is_file()), None)
    return None if path is None else check(path, wanted, remedy)


class _OfPooch:
    """A progress bar with the methods that pooch calls; at the end it tells the whole size once more, to fill the bar."""

    def __init__(self, bar: ProgressBar, total: int):
        self._bar, self._left, self.total = bar, total, total

    def update(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        self._bar.update(count)

    def reset(self) -> None: ...

    def close(self) -> None: ...


def fetch(wanted: Download, folder: Path, remedy: str) -> Path:
    """The file in `folder`, downloaded unless it is there already; checked either way.

    Raises:
      UserError: no room, no network, or other content than the published; the sentence ends with `remedy`.
    """
    found = find(wanted, [folder], remedy)
    if found is not None:
        return found
    import pooch  # loads requests, which nothing else needs

    if (free := free_bytes(folder.absolute())) < wanted.size:
        raise UserError(f"The disk of {folder} has {mebibytes(free)} free; {wanted.name} takes {mebibytes(wanted.size)}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with messages_shown(), ProgressBar(wanted.size, 0, True, "bytes", f"downloading {wanted.name}") as bar:
            download = pooch.HTTPDownloader(progressbar=_OfPooch(bar, wanted.size), timeout=60)
            path = pooch.retrieve(wanted.url, f"sha256:{wanted.sha256}", wanted.name, folder, downloader=download)
    except ValueError as error:  # pooch's word for another hash; it has deleted the file
        raise UserError(f"The download of {wanted.url} has another SHA-256 than {wanted.sha256}. {remedy}") from error
    except OSError as error:  # requests' errors are of this kind
        raise UserError(f"{wanted.url} could not be downloaded ({error}). {remedy}") from error
    return Path(path)
