"""Opening a run that `fit` wrote: its model, variables and config, ready to use."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from bsvae_jax._io.files import as_path, digest, read_json, sha256_of
from bsvae_jax._io.terminal import log
from bsvae_jax.config import Config, load_module
from bsvae_jax.data import ImageSet
from bsvae_jax.distributed.hardware import check_platform
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.models.pytorch import flatten, unflatten
from bsvae_jax.training.checkpoints import Checkpoints
from bsvae_jax.training.evaluated import read_calibration
from bsvae_jax.training.fitted_prior import FILE, read_fitted
from bsvae_jax.training.identity import identities, identity
from bsvae_jax.training.start import Source, Start, take
from bsvae_jax.training.state import build_model, create_state
from bsvae_jax.training.step import PRIOR
from bsvae_jax.training.switches import check_switches
from bsvae_jax.training.workdir import read_info

WEIGHTS = "model.safetensors"
"""In the place of the checkpoints, in a folder that `export_hub` wrote."""


def restore(
    workdir: str | Path,
    checkpoint: Literal["latest", "best"] = "latest",
    prior: Literal["model", "fitted"] = "model",
    config: str | Path | Config | None = None,
) -> Restored:
    """Open a run.

    Args:
      workdir: the folder given to `fit` or `bsvae train`; or one of `export_hub`, which has one checkpoint.
      checkpoint: 'latest' (the end of training), or 'best' (least objective of the images for validation, or of those for
        testing where there are none, whose numbers are then slightly optimistic; of the beta at which a schedule arrives, or
        what `BetaSchedule.ranking` has in its place). A damaged latest one is reported on stderr, and the one before is used.
      prior: 'model' (as it was trained), or 'fitted': the density that `fit_prior` fitted to this checkpoint takes its place,
        in `model.prior` and among the variables; the run's `config` still says how the model was trained.
      config: where the classes are that the run was trained with and the library does not have: the Python file that defines
        them, or a `Config` made of them. A run folder never imports code by itself. Not needed once they are imported.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, folder, progress=False)
    ...     restore(folder, "best").step  # 1,500 images in batches of 500
    3

    Raises:
      UserError: another `checkpoint` or `prior`, not a run, no checkpoint yet, none that is the best, or none that loads; no
        fitted prior, or one of other parameters.
    """
    check_platform()
    folder = as_path(workdir, "workdir")
    if prior not in ("model", "fitted"):
        raise UserError(f"prior must be 'model' or 'fitted', got {prior!r}.")
    if checkpoint not in ("latest", "best"):
        raise UserError(f"checkpoint must be 'latest' or 'best', got {checkpoint!r}.")
    if config is not None and not isinstance(config, Config):
        load_module(as_path(config, "config"))
    info = read_info(folder, config if isinstance(config, Config) else None)
    exported = not (folder / "checkpoints").is_dir() and (folder / WEIGHTS).is_file()
    if not exported and not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} has no checkpoint yet; train it with bsvae train.")
    check_switches(folder, info.switches)
    model = build_model(info.config, info.image_shape, info.bin_width)
    target = jax.eval_shape(lambda: create_state(info.config, model, 1).arrays())
    multiplier = 1.0
    if exported:
        step, variables, multiplier = _read_exported(folder, {name: target[name] for name in ("params", "batch_stats")})
    else:
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_one_device()), target)
        run_id, *earlier = identities(folder)
        with Checkpoints(folder / "checkpoints", True, {"run": run_id}, earlier) as checkpoints:
            best = checkpoints.best_step() if checkpoint == "best" else None
            if checkpoint == "best" and best is None:
                raise UserError(
                    f"{folder} has no best checkpoint: none was evaluated on held-out images, or none has a rate that the "
                    "schedule of beta asks for. Choose the latest one."
                )
            step, arrays = checkpoints.restore(target, best, log.warning)
        variables = {"params": arrays["ema_params"] or arrays["params"], "batch_stats": arrays["batch_stats"]}
        multiplier = float(arrays.get("multiplier", 1.0))
    calibration = read_calibration(folder)
    if calibration is not None and calibration.step != step:
        calibration = None
    data = (info.image_shape, info.levels, calibration, info.holds_images)
    run = Restored(model, variables, info.config, step, *data, multiplier)
    return run if prior == "model" else _with_fitted_prior(folder, run, checkpoint)


def _read_exported(folder: Path, like: dict[str, Any]) -> tuple[int, dict[str, Any], float]:
    """Step, variables in the structure of `like`, and the multiplier of beta, of a folder that `export_hub` wrote.

    Raises:
      UserError: the weights are not those that its config.json names.
    """
    path, again = folder / WEIGHTS, "fetch or export the folder again"
    with read_json(folder / "config.json", again) as values:
        own = values["exported"]
        step, sha256, multiplier = int(own["step"]), str(own["sha256"]), float(own["multiplier"])
    if sha256_of(path) != sha256:
        raise UserError(f"{path} is damaged, or not of the config.json beside it; {again}.")
    arrays = unflatten({name: jnp.asarray(array) for name, array in safetensors.numpy.load_file(path).items()})
    return step, {name: arrays.get(name, {}) for name in like}, multiplier


def _with_fitted_prior(folder: Path, run: Restored, checkpoint: str) -> Restored:
    fitted = read_fitted(folder)
    again = f"bsvae fit-prior {folder}" + (f" --checkpoint {checkpoint}" if checkpoint != "latest" else "")
    if fitted is None:
        raise UserError(f"{folder} has no fitted prior; {again} fits one.")
    if fitted.latent_size != run.config.latent_size:
        raise UserError(
            f"{folder / FILE} is of {fitted.latent_size} latents, this model has {run.config.latent_size}: it was fitted to "
            f"another run. {again} --overwrite fits one to this."
        )
    if fitted.checkpoint != digest(run.variables):
        raise UserError(
            f"{folder / FILE} was fitted to other parameters (of step {fitted.step}) than those of the {checkpoint} checkpoint "
            f"(step {run.step}). {again} --overwrite fits one to these."
        )
    params = {**run.variables["params"], PRIOR: fitted.parameters}
    return run._replace(
        model=run.model.clone(prior=dataclasses.replace(fitted.prior, latent_size=fitted.latent_size)),
        variables={**run.variables, "params": params},
    )


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def read_source(start_from: str | Path, workdir: Path, config: Config) -> Source:
    """The run that another, of `config` in `workdir`, is to begin from, at its latest checkpoint.

    Raises:
      UserError: as `restore`, or it is the workdir itself.
    """
    folder = as_path(start_from, "start_from")
    if folder.resolve() == workdir.resolve():
        raise UserError(
            f"--start-from {folder} is the --workdir itself. Leave it out to continue that run, or choose another --workdir."
        )
    run = restore(folder, config=config)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(run.variables).items()}
    record = {"workdir": str(folder.resolve()), "run": identity(folder), "step": run.step, "sha256": digest(run.variables)}
    return Source(f"{folder} (step {run.step})", arrays, record)


def start_with(source: Source, config: Config, images: ImageSet) -> Start:
    """What a run of `config` on `images` begins with from another; raises a UserError where nothing fits."""
    model = build_model(config, images.image_shape, images.bin_width)
    own = flatten(jax.eval_shape(lambda: create_state(config, model, 1).variables()))
    return take({name: leaf.shape for name, leaf in own.items()}, source)
