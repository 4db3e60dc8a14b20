"""The weights of a run for others to read: what `bsvae export` does."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from bsvae_jax import config as configs
from bsvae_jax._io.files import as_path, write_atomically
from bsvae_jax.errors import UserError
from bsvae_jax.models.pytorch import flatten
from bsvae_jax.training.restore import restore


def export_safetensors(
    workdir: str | Path,
    out: str | Path,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
) -> Path:
    """Write parameters and batch statistics of a run as a `.safetensors` file.

    The parameters are those that `evaluate` uses, the averaged ones where the run kept them. All arrays are float32, in Flax's
    axis order (dense kernels [in, out], convolutions [height, width, in, out]), and named by their path:
    `params.encoder.hidden.kernel`, `batch_stats.encoder.hidden_norm.mean`. The metadata, all text, hold

    * `format`: `flax`;
    * `config`: JSON, as in the run's `config.json`;
    * `image_shape` (of one example, [H, W, C] of images), `levels` (gray levels of the data) and `step`: JSON too;
    * `calibrated_variance`: the optimal variance of the training set, images in [0, 1]; only where the run has recorded it.

    `flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(file), sep=".")` gives the variables of `model.apply`.

    Args:
      workdir: of `fit`, `import_torch`, or a member of a sweep.
      out: a file name that ends in `.safetensors`.
      checkpoint: as for `restore`.
      overwrite: replace what is already at `out`.

    Returns:
      The file.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> config = bv.Config(network=configs.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, f"{folder}/run", progress=False)
    ...     file = export_safetensors(f"{folder}/run", f"{folder}/run.safetensors")
    ...     safetensors.numpy.load_file(file)["params.encoder.posterior.kernel"].shape  # [in, mean and log-variance]
    (8, 4)

    Raises:
      UserError: as `restore`; another suffix, a file that exists, or a place that cannot be written.
    """
    out = as_path(out, "out")
    if out.suffix != ".safetensors":
        raise UserError(f"The file must be called NAME.safetensors, got {out}.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it.")
    run = restore(workdir, checkpoint)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(run.variables).items()}
    metadata = {
        "format": "flax",
        "config": json.dumps(configs.to_dict(run.config)),
        "image_shape": json.dumps(run.image_shape),
        "levels": json.dumps(run.levels),
        "step": json.dumps(run.step),
    }
    if run.calibration is not None:
        metadata["calibrated_variance"] = json.dumps(run.calibration.variance)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, safetensors.numpy.save(arrays, metadata))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    return out
