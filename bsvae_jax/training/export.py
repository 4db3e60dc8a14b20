"""The weights of a run for others to read: what `bsvae export` does."""

import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from bsvae_jax import config as configs
from bsvae_jax._io.files import as_path, write_atomically
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.trained import Restored
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
    _check_free(out, overwrite)
    write_weights(restore(workdir, checkpoint), out)
    return out


def write_weights(run: Restored, out: Path) -> None:
    """Write the arrays and metadata of `export_safetensors`.

    Raises:
      UserError: a place that cannot be written.
    """
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
    _write(out, safetensors.numpy.save(arrays, metadata))


PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    workdir: str | Path,
    out: str | Path,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write encoder and decoder of a run, weights included, as StableHLO programs that JAX alone runs, on CPU, GPU and TPU.

    Both take any number of examples, in float32. After `import jax.export`,
    `jax.export.deserialize(bytearray(path.read_bytes())).call` is the function:

    * `encoder.stablehlo`: data [N, ...] (images in [0, 1]) to mean and log-variance of q(z|x), [N, L] each;
    * `decoder.stablehlo`: latents [N, L] to the mean of p(x|z), [N, ...], and, where the model has one, its log-variance.

    Those of a conditional model take labels, int32 [N], as their second argument.

    Args:
      workdir: of `fit`, `import_torch`, or a member of a sweep.
      out: a folder.
      checkpoint: as for `restore`.
      overwrite: replace what is already there.

    Returns:
      The two files.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> config = bv.Config(network=configs.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, f"{folder}/run", progress=False)
    ...     encoder, decoder = export_stablehlo(f"{folder}/run", f"{folder}/programs")
    ...     decode = jax_export.deserialize(bytearray(decoder.read_bytes())).call
    >>> decode(jnp.zeros((3, 2))).shape
    (3, 8, 8, 1)

    Raises:
      UserError: as `restore`; a file that exists, a place that cannot be written, or a network that cannot be compiled for a
        free number of examples or for all platforms.
    """
    out = as_path(out, "out")
    files = (out / "encoder.stablehlo", out / "decoder.stablehlo")
    for file in files:
        _check_free(file, overwrite)
    run = restore(workdir, checkpoint)

    def encode(x: jax.Array, *labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        posterior: Any = run.model.apply(run.variables, x, False, *labels, method="encode")
        return posterior.mean, posterior.log_variance

    def decode(z: jax.Array, *labels: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        decoded: Any = run.model.apply(run.variables, z, False, *labels, method="decode")
        return decoded.mean if decoded.log_variance is None else (decoded.mean, decoded.log_variance)

    (count,) = jax_export.symbolic_shape("count")
    labels = () if run.config.classes is None else (jax.ShapeDtypeStruct((count,), jnp.int32),)
    shapes = ((encode, run.image_shape), (decode, (run.config.latent_size,)))
    for file, (function, shape) in zip(files, shapes, strict=True):
        example = jax.ShapeDtypeStruct((count, *shape), jnp.float32)
        try:
            program = jax_export.export(jax.jit(function), platforms=PLATFORMS)(example, *labels).serialize()
        except Exception as error:  # whatever a network of the user's own does with the number of examples
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"{file.stem} of {type(run.config.network).__name__} cannot be exported for a free number of examples on "
                f"{', '.join(PLATFORMS)}: {reason}"
            ) from error
        _write(file, bytes(program))
    return files


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it.")


def _write(out: Path, content: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
