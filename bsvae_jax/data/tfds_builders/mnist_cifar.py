"""MNIST, Fashion-MNIST and CIFAR-10."""

import functools
import io
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from bsvae_jax._io.downloads import Download
from bsvae_jax.data import idx
from bsvae_jax.data.tfds_builders.base import Examples, ImageBuilder, tar_members
from bsvae_jax.errors import UserError

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def _png(pixels: np.ndarray) -> io.BytesIO:
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, format="png", compress_level=1)
    content.seek(0)
    return content


class Mnist(ImageBuilder):
    """The MNIST handwritten digits (LeCun et al. 1998), 28x28 gray."""

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
    """Fashion-MNIST (Xiao et al. 2017), 28x28 gray pictures of clothes."""

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
    """CIFAR-10 (Krizhevsky 2009), 32x32 color photographs of ten kinds of things."""

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
        for content in tar_members(path, names):
            # A record is a label and the three color planes.
            if len(content) % 3073:
                raise UserError(f"{path} is damaged: a batch has {len(content)} bytes, which is no multiple of 3,073.")
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            for record in records:
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield number, {"image": _png(pixels), "label": int(record[0])}
                number += 1
