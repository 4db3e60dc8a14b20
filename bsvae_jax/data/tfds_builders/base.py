"""What the builders share: published files taken from a folder or downloaded and compared, and array_record."""

import contextlib
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from bsvae_jax._io import downloads
from bsvae_jax._io.downloads import Download
from bsvae_jax._io.files import cache_folder, locked
from bsvae_jax.data.archives import DAMAGED_TAR
from bsvae_jax.errors import UserError

Examples = Iterator[tuple[int, dict[str, Any]]]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders share: files that are checked wherever they are found, and a fixed order."""

    VERSION = tfds.core.Version("1.0.0")
    DOWNLOADS: ClassVar[dict[str, Download]] = {}
    """Published files, by what they are for."""
    FETCHED: ClassVar[bool] = True
    """Whether they can be downloaded without a person."""

    def __init_subclass__(cls, **options: Any):
        """Not registered: the names are those of TFDS's own sets, which stay what they are."""
        super().__init_subclass__(skip_registration=True, **options)

    def __init__(self, *, manual_dir: str | Path | None = None, **options: Any):
        """`manual_dir`: a folder with the published files; None: they are downloaded. Other arguments are TFDS's."""
        self._manual_dir = None if manual_dir is None else Path(manual_dir)
        super().__init__(file_format="array_record", **options)

    def prepare(self) -> None:
        """Write the array_record files, unless they are there; another process that does so is waited for.

        Raises:
          UserError: a published file is missing, or is another.
        """
        folder = Path(self.data_dir)
        lock = folder.parents[1] / f".{folder.parent.name}.lock"
        with (
            locked(lock, self.name, "give another --data-dir (in a config: data.data_dir)"),
            contextlib.redirect_stdout(sys.stderr),  # TFDS prints what it does
        ):
            self.download_and_prepare()

    def file(self, purpose: str) -> Path:
        """A published file, checked."""
        wanted = self.DOWNLOADS[purpose]
        remedy = self._remedy(wanted)
        if self._manual_dir is not None:
            found = downloads.find(wanted, [self._manual_dir], remedy)
        elif self.FETCHED:
            return downloads.fetch(wanted, cache_folder() / "downloads", remedy)
        else:
            found = downloads.find(wanted, [cache_folder() / "downloads"], remedy)
        if found is None:
            raise self._missing(wanted)
        return found

    def _missing(self, wanted: Download) -> UserError:
        where = self._manual_dir or cache_folder() / "downloads"
        return UserError(f"{where} lacks {wanted.name}. {self._remedy(wanted)}")

    def _remedy(self, wanted: Download) -> str:
        return (
            f"Put {wanted.name} ({wanted.size:,} bytes, SHA-256 {wanted.sha256}), published at {wanted.url}, into a folder and "
            "give that folder as --manual-dir (in a config: data.manual_dir)."
        )

    def _described(self, features: dict[str, Any]) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True, description=self.__doc__ or ""
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        return {split: make() for split, make in self.examples().items()}

    def _generate_examples(self) -> Any:
        raise NotImplementedError("splits bring their own examples")

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Of every split."""
        raise NotImplementedError


def tar_members(path: Path, names: list[str]) -> Iterator[bytes]:
    """Contents of the files of these names in an archive, in this order; read, never unpacked."""
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            missing = [name for name in names if name not in members]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}.")
            for name in names:
                file = archive.extractfile(members[name])
                assert file is not None  # of a file
                yield file.read()
    except UserError:
        raise
    except DAMAGED_TAR as error:
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error
