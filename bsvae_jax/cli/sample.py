"""`bsvae sample`: images from a trained run."""

from pathlib import Path
from typing import Annotated

import tyro

from bsvae_jax.cli.options import Merged, Prior, Run
from bsvae_jax.errors import UserError

OTHER_FILES = (
    ".npy",
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    ".jpg",
    ".jpeg",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".pdf",
    ".svg",
    ".pt",
)
"""Suffixes by which a file is meant, and not a folder."""


def sample(
    run: Merged[Run],
    count: int = 100,
    out: Path | None = None,
    seed: int = 0,
    prior: Prior = "model",
    labels: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--label",))] = (),
    overwrite: bool = False,
) -> None:
    """Draw images from a trained run: z from the prior, then the decoder's mean, as 8-bit images; float32 for other data.

    An interrupted command continues where it stopped when it is given again.

    Args:
      run: A trained run.
      count: Number of images.
      out: A .npz file (array images, uint8 [N, H, W, C]; of other data float32 [N, ...]), a .png file (one grid), or a folder
        (one PNG per image); WORKDIR/samples.npz if not given.
      seed: Seed of the samples; the first ones do not depend on count.
      prior: The one that the model was trained with, or the one that bsvae fit-prior fitted afterwards.
      labels: Classes of a conditional run, 0 1 2 say, which the images take in turn; all its classes if not given. In a .png
        each row is a class, a .npz has the array labels.
      overwrite: Replace what is already at out.
    """
    from bsvae_jax._io.terminal import ProgressBar
    from bsvae_jax.evaluation import sampling
    from bsvae_jax.evaluation.plots import image_grid, save

    if count < 1:
        raise UserError(f"--count must be >= 1, got {count}.")
    if count < len(labels):
        raise UserError(f"--count {count} is less than one image for each of the {len(labels)} classes of --labels.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie in 0 ... 2**32 - 1, got {seed}.")
    out = run.workdir / "samples.npz" if out is None else out
    suffix = out.suffix.lower()
    if suffix in OTHER_FILES and not out.is_dir():
        raise UserError(f"--out must end in .npz or .png, or name a folder of PNG files; got {out}.")
    if suffix in (".npz", ".png") and out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it.")
    run.load_classes()
    restored = run.restore(prior)
    if suffix != ".npz":
        sampling.check_png(restored)
    classes, present = sampling.classes_in_turn(restored, labels), 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".png":
            images = sampling.sample_prior(restored, count, seed, labels) / 255.0
            title = f"{count} samples of the {'fitted ' if prior == 'fitted' else ''}prior"
            if len(classes):
                images, columns = sampling.rows_by_class(images, len(classes))
                save(image_grid(images, f"{title}, each row of one class", columns, [str(one) for one in classes]), out)
            else:
                save(image_grid(images, title), out)
        else:
            write = sampling.write_npz if suffix == ".npz" else sampling.write_folder
            with ProgressBar(count, 0, enabled=count > sampling.BATCH) as bar:
                present = write(restored, out, count, seed, overwrite, bar.update, labels)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    before = f", {present} of them there already" if present else ""
    print(f"{count} images {restored.image_shape}{before}: {out}")
