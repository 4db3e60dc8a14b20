"""CelebA: aligned faces with 40 attributes (Liu et al. 2015)."""

import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bsvae_jax._io.downloads import Download
from bsvae_jax._io.files import cache_folder
from bsvae_jax.data.archives import open_zip
from bsvae_jax.data.decoding import CorruptImageError
from bsvae_jax.data.image_files import Files, find_images
from bsvae_jax.data.tfds_builders.base import Examples, ImageBuilder
from bsvae_jax.errors import UserError

_CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


class CelebA(ImageBuilder):
    """CelebA (Liu et al. 2015): 202,599 aligned faces, 218x178 color, with 40 attributes.

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
            found: Files = find_images(unpacked).splits["train"]
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
