"""TFDS builders that need no TensorFlow, for the image sets of the paper and of those who follow it.

Each is a `tfds.core.GeneratorBasedBuilder` that writes array_record, in the order of the published files, with the names and
features of TFDS's own set; `tfds.data_source` reads them. Published files are taken from a manual directory or downloaded,
and compared with their published size and SHA-256 either way. Begin with `base`; the other files have the sets.
"""

from pathlib import Path
from typing import Any

from bsvae_jax.data.tfds_builders.base import ImageBuilder
from bsvae_jax.data.tfds_builders.celeb_a import CelebA
from bsvae_jax.data.tfds_builders.lsun import LSUN_FILES, Lsun
from bsvae_jax.data.tfds_builders.mnist_cifar import Cifar10, FashionMnist, Mnist
from bsvae_jax.errors import UserError, nearest

__all__ = ["LSUN_FILES", "CelebA", "Cifar10", "FashionMnist", "ImageBuilder", "Lsun", "Mnist", "builder_of"]


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
        if category not in LSUN_FILES:
            raise UserError(
                f"LSUN has no category {category!r}{nearest(category, LSUN_FILES)}; give lsun/CATEGORY, one of "
                f"{', '.join(LSUN_FILES)}."
            )
        options["config"] = category
    elif category:
        raise UserError(f"{base} has no config {category!r}; give {base!r} alone.")
    return BUILDERS[base](data_dir=data_dir, manual_dir=manual_dir, **options)
