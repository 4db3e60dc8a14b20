"""LSUN: scenes of ten categories (Yu et al. 2015), from its published zip files of LMDB."""

import functools
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from bsvae_jax._io.downloads import Download
from bsvae_jax._io.files import DAMAGE, cache_folder
from bsvae_jax.data.archives import open_zip
from bsvae_jax.data.decoding import CorruptImageError
from bsvae_jax.data.image_files import find_images
from bsvae_jax.data.tfds_builders.base import Examples, ImageBuilder
from bsvae_jax.errors import UserError

_LSUN = "http://dl.yf.io/lsun/scenes/"


class LsunConfig(tfds.core.BuilderConfig):
    """A category."""


LSUN_FILES = {
    "bedroom": (
        (45922737680, "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e"),
        (4670661, "5d022e781b241c25ec2e1f1f769afcdb8091d7fd58362667aec03137b8114b12"),
    ),
    "bridge": (
        (16478644518, "2701b2d421bbc4d8a5e9b0652ff7c3b57cd6495da8e0e85c39533275b5a925a3"),
        (6176834, "83216a2974d6068c2e1d18086006e7380ff58540216f955ce87fe049b460cb0d"),
    ),
    "church_outdoor": (
        (2448463466, "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a"),
        (5957308, "34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584"),
    ),
    "classroom": (
        (3279497022, "73a8a3e318819e1cc602f229673c3f51a68f3ece61e3764ce22df6abea4d0873"),
        (5880261, "5e0e9a375d94091dfe1fa3be87d4a92f41c03f1c0b8e376acc7e05651de512d7"),
    ),
    "conference_room": (
        (4048461633, "fa0a4cf72e7acfb103392eaf33640d5508a728e971f31877b01d64e1bde6068c"),
        (5316084, "927c94df52e10b9b374748c2b83b28b5860e946b3186dfd587985e274834650f"),
    ),
    "dining_room": (
        (11592966936, "e4ee24c7c309360c3bf019123ce5bbf17434b2ba33abec2b0b07cfae715a52cb"),
        (5301030, "bd604d4b91bb5a9611d4e0b85475efd20758390d1a4eb57b53973fcbb5aa8ab6"),
    ),
    "kitchen": (
        (35791384987, "b1993cf639aece5d207a27eb9ff872bcca9dff6472d8227a052c79d40ee753c4"),
        (4867891, "329165f35ec61c4cf49f809246de300b8baad3ffcbda1ac30c27bdd32c84369a"),
    ),
    "living_room": (
        (22792405188, "bd2c52b812c80f73ce3062a221396d13a52b5cce2f813b4cdf61937651281d7a"),
        (5167755, "30a23d9a3db5414e9c97865f60ffb2ee973bfa658a23dbca7188ea514c97c9fc"),
    ),
    "restaurant": (
        (13489345463, "11a0a924b960cd0900e9b7477d684fb338bd99cc5f72db1caac592e4f497e09a"),
        (6232385, "efaa7bcb898ad6cb73b07b89fec3a9c670f4622912eea22fab3986c2cf9a1c20"),
    ),
    "tower": (
        (12010237081, "440caec74c9641cb51fd235a5970c8e4931c3af875aeb044a8bcca956e106309"),
        (5223709, "7f5257847bc01f4e40d4a1b3e24dd8fcd37063f12ca8cf31e726c2ee0b1ae104"),
    ),
}
"""Size and SHA-256 of the published training and validation archives of every category."""


class Lsun(ImageBuilder):
    """One category of LSUN (Yu et al. 2015), color photographs whose shorter side has 256 pixels.

    From the published `CATEGORY_train_lmdb.zip` and `CATEGORY_val_lmdb.zip` (or the folders unpacked from them), or from
    folders `CATEGORY_train` and `CATEGORY_val` of exported images. The bytes of the images are kept as they are (WebP as
    published).
    """

    name = "lsun"
    BUILDER_CONFIGS = [LsunConfig(name=category) for category in LSUN_FILES]
    DOWNLOADS = {
        f"{category}_{part}": Download(f"{_LSUN}{category}_{part}_lmdb.zip", *file)
        for category, files in LSUN_FILES.items()
        for part, file in zip(("train", "val"), files, strict=True)
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described({"image": tfds.features.Image(shape=(None, None, 3))})

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Train and validation."""
        return {split: functools.partial(self._of, part) for split, part in (("train", "train"), ("validation", "val"))}

    def _of(self, part: str) -> Examples:
        purpose = f"{self.builder_config.name}_{part}"
        folder = self._manual_dir
        if folder is not None and (exported := folder / purpose).is_dir():
            found = find_images(exported).splits["train"]
            for number in range(len(found)):
                (encoded,) = found.read(number, number + 1)
                if isinstance(encoded, CorruptImageError):
                    raise encoded
                yield number, {"image": io.BytesIO(encoded.content)}
            return
        unpacked = None if folder is None else folder / f"{purpose}_lmdb"
        if unpacked is None or not unpacked.is_dir():
            unpacked = self._unpack(self.file(purpose), f"{purpose}_lmdb")
        for number, content in enumerate(_lmdb_values(unpacked)):
            yield number, {"image": io.BytesIO(content)}

    @staticmethod
    def _unpack(path: Path, name: str) -> Path:
        """The one file of the archive that matters; LMDB maps it into memory, so it must lie on its own."""
        folder = cache_folder() / "downloads" / name
        if not (folder / "data.mdb").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            archive = open_zip(path)
            member = next((n for n in archive.namelist() if Path(n).name == "data.mdb"), None)
            if member is None:
                raise UserError(f"{path} holds no data.mdb; download it again.")
            temporary = folder / ".data.mdb"
            try:
                with archive.open(member) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 2**22)
            except DAMAGE as error:
                temporary.unlink(missing_ok=True)
                raise UserError(f"{path} cannot be unpacked into {folder} ({error}).") from error
            temporary.replace(folder / "data.mdb")
        return folder


def _lmdb_values(folder: Path) -> Iterator[bytes]:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LSUN's published files need the package lmdb: pip install 'bsvae_jax[lsun]'.") from error
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as environment, environment.begin() as reading:
            for _, value in reading.cursor():
                yield bytes(value)
    except lmdb.Error as error:
        raise UserError(f"{folder} is not an LMDB that can be read ({error}); unpack it again.") from error
