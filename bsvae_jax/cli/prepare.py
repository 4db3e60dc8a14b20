"""`bsvae prepare`: images decoded once."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from bsvae_jax.errors import UserError


def prepare(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    size: int | None = None,
    crop: int | None = None,
    channels: Literal[1, 3] | None = None,
    train_split: str = "train",
    test_split: str = "test",
    holdout: float = 0.1,
    holdout_seed: int = 0,
    validation: float | Literal["own"] | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    skip_corrupt: bool = False,
) -> None:
    """Decode a set of images once, into a memory map that training reads; bsvae train does the same by itself when needed.

    Prepared images are kept in $BSVAE_CACHE, or ~/.cache/bsvae_jax, and found again by everything that changes a pixel. An
    interrupted command continues when it is given again.

    Example: bsvae prepare celeb_a --manual-dir DOWNLOADS --crop 148 --size 64

    Args:
      source: A folder, .zip or .tar of images, or the TFDS name of a set: mnist, fashion_mnist, cifar10, celeb_a,
        lsun/CATEGORY, or any image set of TFDS's catalog, for which TensorFlow must be installed.
      size: Make all images so many pixels wide and high: the shorter side is resized to it, and the center kept.
      crop: First keep the square of so many pixels around the center.
      channels: 1 makes all images gray, 3 color.
      train_split: Split of the TFDS set to train on.
      test_split: Split of the TFDS set that is held out.
      holdout: Share of a folder's images held out, where it has no folder test.
      holdout_seed: Seed of the held-out split.
      validation: As --data.validation of the training: a share of the training images, or own for the set's own; the default of
        the data set if not given.
      data_dir: TFDS data directory; its default if not given.
      manual_dir: Folder with the published files of a set, where they cannot be downloaded.
      skip_corrupt: Leave out images that cannot be decoded, and list them.
    """
    from bsvae_jax.config import TFDS, Folder
    from bsvae_jax.data import sources
    from bsvae_jax.data.cache import load_prepared
    from bsvae_jax.data.datasets import check_validation

    chosen: Folder | TFDS
    given: dict[str, Any] = {} if validation is None else {"validation": validation}
    if Path(source).exists():
        kind = "folder"
        chosen = Folder(source, holdout, holdout_seed, crop, size, channels, **given)
    else:
        kind = "tfds"
        if re.search(r"(\.zip|\.t[a-z]{1,2}|\.tar\.\w+|/)$|^[./]", source, re.IGNORECASE):
            raise UserError(f"There is no folder or archive {source!r}.")
        chosen = TFDS(source, data_dir, manual_dir, train_split, test_split, crop, size, channels, **given)
    check_validation(chosen)
    if isinstance(chosen, TFDS):
        sources.prepare_tfds(chosen)
    recipe = chosen.recipe()
    images = load_prepared(recipe, skip_corrupt)
    print(f"{images.sizes()}: {recipe.folder()}")
    options = [
        f"--data.{field.name.replace('_', '-')} {shlex.quote(str(getattr(chosen, field.name)))}"
        for field in dataclasses.fields(chosen)
        if getattr(chosen, field.name) != field.default
    ]
    print(f"bsvae train CONFIG --data {kind} {' '.join(options)}")
