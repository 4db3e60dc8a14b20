"""TFDS builders that need no TensorFlow, for the image sets of the paper and of those who follow it.

Each is a `tfds.core.GeneratorBasedBuilder` that writes array_record, in the order of the published files, with the names and
features of TFDS's own set; `tfds.data_source` reads them. Published files are taken from a manual directory or downloaded,
and compared with their published size and SHA-256 either way.
"""

import contextlib
import csv
import functools
import io
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from bsvae_jax._io import downloads
from bsvae_jax._io.downloads import Download
from bsvae_jax._io.files import DAMAGE, cache_folder, locked
from bsvae_jax.data import idx
from bsvae_jax.data.decoding import CorruptImageError
from bsvae_jax.data.image_files import Files, find_images, open_zip
from bsvae_jax.errors import UserError, nearest

_UNREADABLE: tuple[type[Exception], ...] = (tarfile.TarError, *DAMAGE)

Examples = Iterator[tuple[int, dict[str, Any]]]

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_LSUN = "http://dl.yf.io/lsun/scenes/"


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


def _png(pixels: np.ndarray) -> io.BytesIO:
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, format="png", compress_level=1)
    content.seek(0)
    return content


class Mnist(ImageBuilder):
    """The MNIST handwritten digits (LeCun et al. 1998), 28x28 grey."""

    name = "mnist"
    DOWNLOADS = {
        "train-images": Download(
            f"{_MNIST}train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels": Download(
            f"{_MNIST}train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images": Download(
            f"{_MNIST}t10k-images-idx3-ubyte.gz", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels": Download(
            f"{_MNIST}t10k-labels-idx1-ubyte.gz", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    }
    CLASSES: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(28, 28, 1), encoding_format="png")
        return self._described({"image": image, "label": tfds.features.ClassLabel(names=list(self.CLASSES))})

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Train and test."""
        return {split: functools.partial(self._of, part) for split, part in (("train", "train"), ("test", "t10k"))}

    def _of(self, part: str) -> Examples:
        images, labels = idx.read_pair(self.file(f"{part}-images"), self.file(f"{part}-labels"))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield number, {"image": _png(image), "label": int(label)}


class FashionMnist(Mnist):
    """Fashion-MNIST (Xiao et al. 2017), 28x28 grey pictures of clothes."""

    name = "fashion_mnist"
    DOWNLOADS = {
        "train-images": Download(
            f"{_FASHION}train-images-idx3-ubyte.gz",
            26421880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        "train-labels": Download(
            f"{_FASHION}train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        "t10k-images": Download(
            f"{_FASHION}t10k-images-idx3-ubyte.gz", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        "t10k-labels": Download(
            f"{_FASHION}t10k-labels-idx1-ubyte.gz", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    }
    CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Cifar10(ImageBuilder):
    """CIFAR-10 (Krizhevsky 2009), 32x32 colour photographs of ten kinds of things."""

    name = "cifar10"
    DOWNLOADS = {
        "archive": Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        )
    }
    CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(32, 32, 3), encoding_format="png")
        return self._described({"image": image, "label": tfds.features.ClassLabel(names=list(self.CLASSES))})

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Train and test."""
        train = [f"data_batch_{number}.bin" for number in range(1, 6)]
        return {"train": functools.partial(self._of, train), "test": functools.partial(self._of, ["test_batch.bin"])}

    def _of(self, names: list[str]) -> Examples:
        path = self.file("archive")
        number = 0
        for content in _tar_members(path, names):
            # A record is a label and the three colour planes.
            if len(content) % 3073:
                raise UserError(f"{path} is damaged: a batch has {len(content)} bytes, which is no multiple of 3,073.")
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            for record in records:
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield number, {"image": _png(pixels), "label": int(record[0])}
                number += 1


def _tar_members(path: Path, names: list[str]) -> Iterator[bytes]:
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
    except _UNREADABLE as error:
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error


class CelebA(ImageBuilder):
    """CelebA (Liu et al. 2015): 202,599 aligned faces, 218x178 colour, with 40 attributes.

    From `img_align_celeba.zip` or the folder `img_align_celeba` unpacked from it, `list_eval_partition.txt` and
    `list_attr_celeba.txt` (or the `.csv` of both that Kaggle has; without attributes, if there is no such file).
    """

    name = "celeb_a"
    DOWNLOADS = {
        "images": Download(
            _CELEBA, 1443490838, "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74", "img_align_celeba.zip"
        ),
        "partition": Download(
            _CELEBA, 2836386, "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7", "list_eval_partition.txt"
        ),
        "attributes": Download(
            _CELEBA, 26721026, "f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0", "list_attr_celeba.txt"
        ),
    }
    FETCHED = False  # Google Drive asks a person, and often refuses one
    ATTRIBUTES = (
        *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald"),
        *("Bangs", "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair"),
        *("Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin"),
        *("Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones"),
        *("Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard"),
        *("Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
        *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings"),
        *("Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young"),
    )
    SPLITS = ("train", "validation", "test")
    """As the partition numbers them."""

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(218, 178, 3), encoding_format="jpeg")
        return self._described({"image": image, "attributes": dict.fromkeys(self.ATTRIBUTES, np.bool_)})

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Train, validation and test, as published."""
        partition = self._table("partition")
        attributes = self._table("attributes")
        if partition is None:
            raise self._missing(self.DOWNLOADS["partition"])
        files = self._images()
        missing = [name for name in partition if name not in files]
        if missing:
            raise UserError(
                f"The images lack {len(missing):,} of the {len(partition):,} in list_eval_partition, {missing[0]} first; "
                "unpack img_align_celeba.zip again."
            )
        if attributes is not None and (without := [name for name in partition if name not in attributes]):
            raise UserError(f"list_attr_celeba lacks {len(without):,} of the images, {without[0]} first; download it again.")

        def of(number: int) -> Examples:
            for index, name in enumerate(name for name, (split,) in partition.items() if int(split) == number):
                (encoded,) = files[name]()
                if isinstance(encoded, CorruptImageError):
                    raise encoded
                values = ["-1"] * len(self.ATTRIBUTES) if attributes is None else attributes[name]
                named = {attribute: value == "1" for attribute, value in zip(self.ATTRIBUTES, values, strict=True)}
                yield index, {"image": io.BytesIO(encoded.content), "attributes": named}

        return {split: functools.partial(of, number) for number, split in enumerate(self.SPLITS)}

    def _images(self) -> dict[str, Callable[[], list[Any]]]:
        """How to read every image, by the name of its file."""
        unpacked = None if self._manual_dir is None else self._manual_dir / "img_align_celeba"
        if unpacked is not None and unpacked.is_dir():
            found: Files = find_images(unpacked).train
        else:
            path = self.file("images")
            archive = open_zip(path)
            names = [member.filename for member in archive.infolist() if member.filename.endswith(".jpg")]
            found = Files(path, names, None, archive)
        return {
            Path(name.replace("\\", "/")).name: functools.partial(found.read, index, index + 1)
            for index, name in enumerate(found.names)
        }

    def _table(self, purpose: str) -> dict[str, list[str]] | None:
        """Values by the name of the image, from the published file or Kaggle's; None where there is neither."""
        wanted = self.DOWNLOADS[purpose]
        folder = self._manual_dir or cache_folder() / "downloads"
        other = (folder / wanted.name).with_suffix(".csv")
        if other.is_file():
            with other.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
        elif (folder / wanted.name).is_file():
            rows = [line.split() for line in self.file(purpose).read_text().splitlines()]
        else:
            return None
        table = {name: values for name, *values in filter(None, rows) if name.endswith(".jpg")}
        length = 1 if purpose == "partition" else len(self.ATTRIBUTES)
        wrong = next((name for name, values in table.items() if len(values) != length), None)
        if not table or wrong is not None:
            raise UserError(f"{wanted.name} in {folder} is damaged: {wrong or 'no image'} has not {length} values.")
        return table


class LsunConfig(tfds.core.BuilderConfig):
    """A category."""


_LSUN_FILES = {
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
    """One category of LSUN (Yu et al. 2015), colour photographs whose shorter side has 256 pixels.

    From the published `CATEGORY_train_lmdb.zip` and `CATEGORY_val_lmdb.zip` (or the folders unpacked from them), or from
    folders `CATEGORY_train` and `CATEGORY_val` of exported images. The bytes of the images are kept as they are (WebP as
    published).
    """

    name = "lsun"
    BUILDER_CONFIGS = [LsunConfig(name=category) for category in _LSUN_FILES]
    DOWNLOADS = {
        f"{category}_{part}": Download(f"{_LSUN}{category}_{part}_lmdb.zip", *file)
        for category, files in _LSUN_FILES.items()
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
            found = find_images(exported)
            for number in range(len(found.train)):
                (encoded,) = found.train.read(number, number + 1)
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


class ImageFolder(ImageBuilder):
    """Images of one's own as a TFDS set, read as colour; training needs none of it, since it reads folders itself."""

    name = "image_folder"

    def __init__(self, *, manual_dir: str | Path, **options: Any):
        """`manual_dir`: the folder, or .zip, of images, as `config.Folder` describes it. Other arguments are TFDS's."""
        self._found = find_images(Path(manual_dir))
        super().__init__(manual_dir=manual_dir, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
        if self._found.classes:
            features["label"] = tfds.features.ClassLabel(names=list(self._found.classes))
        return self._described(features)

    def examples(self) -> dict[str, Callable[[], Examples]]:
        """Train, and test where the folder says what is held out."""
        splits = {"train": self._found.train} | ({} if self._found.test is None else {"test": self._found.test})
        return {split: functools.partial(self._of, files) for split, files in splits.items()}

    @staticmethod
    def _of(files: Files) -> Examples:
        for number in range(len(files)):
            (encoded,) = files.read(number, number + 1)
            if isinstance(encoded, CorruptImageError):
                raise encoded
            label = {} if encoded.label is None else {"label": encoded.label}
            yield number, {"image": io.BytesIO(encoded.content), **label}


BUILDERS: dict[str, type[ImageBuilder]] = {builder.name: builder for builder in (Mnist, FashionMnist, Cifar10, CelebA, Lsun)}
"""Sets that are prepared without TensorFlow, by their TFDS names."""


def builder_of(name: str, data_dir: str | None, manual_dir: str | None) -> ImageBuilder | None:
    """Our builder of a TFDS name, `lsun/church_outdoor` say; None where there is none.

    Raises:
      UserError: an unknown category of LSUN, or a manual directory that does not exist.
    """
    base, _, category = name.partition("/")
    if base not in BUILDERS:
        return None
    if manual_dir is not None and not Path(manual_dir).is_dir():
        raise UserError(f"There is no folder {manual_dir!r}; --manual-dir must name the folder of the published files.")
    options: dict[str, Any] = {}
    if base == Lsun.name:
        if category not in _LSUN_FILES:
            raise UserError(
                f"LSUN has no category {category!r}{nearest(category, _LSUN_FILES)}; give lsun/CATEGORY, one of "
                f"{', '.join(_LSUN_FILES)}."
            )
        options["config"] = category
    elif category:
        raise UserError(f"{base} has no config {category!r}; give {base!r} alone.")
    return BUILDERS[base](data_dir=data_dir, manual_dir=manual_dir, **options)
