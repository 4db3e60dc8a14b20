"""The step that was not finite: the state before it and its batch, kept in the run's folder and ready to run again."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bsvae_jax._io.files import as_path, sense_of
from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet
from bsvae_jax.data.prefetch import gather
from bsvae_jax.errors import UserError
from bsvae_jax.random import wrap_key
from bsvae_jax.training.identity import read_run_arrays
from bsvae_jax.training.state import build_hyperparameters, build_model, create_state
from bsvae_jax.training.step import TrainState, data_order, prepare_batch, train_step
from bsvae_jax.training.workdir import RunDirectory, read_info


class FailedStep(NamedTuple):
    """The arguments of `train_step` at the step that was not finite.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP, Optimizer
    >>> hot = Optimizer(learning_rate=1e30)
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1, optimizer=hot)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     try:
    ...         _ = bv.fit(config, folder, progress=False)
    ...     except bv.DivergenceError as error:
    ...         print(str(error)[:21], bv.failed_step(folder).images.shape)
    Step 2 is not finite: (500, 8, 8, 1)
    """

    state: TrainState
    """Before the step."""
    images: Array
    """[B, H, W, C] in [0, 1], as augmented."""
    key: Array
    """For the posterior samples."""
    beta: Array
    """Weight of the rate, []."""
    variance: dict[str, Array]
    """Numbers of the decoder variance by name, [] each: `variance` of `Constant`; empty for the other kinds."""
    schedule: dict[str, Array] | None = None
    """Numbers of the schedule of beta, in the same way: `nats` of `TargetRate`."""
    labels: Array | None = None
    """[B], of a conditional model."""


def failing_step(config: Config, images: ImageSet, total: int, step: int, run: RunDirectory) -> dict[str, np.ndarray]:
    """Repeat training from the last checkpoint up to the step before `step`, on one device; what `failed_step` reads.

    Args:
      config: of the run.
      images: its data.
      total: steps of the whole run.
      step: that was not finite, counted from 1.
      run: its open folder.
    """
    model = build_model(config, images.image_shape, images.bin_width)
    state = run.state_before(create_state(config, model, total, images=images), step)
    order = data_order(state, images, config.batch_size)
    hyperparameters = build_hyperparameters(config)
    batch_of = jax.jit(prepare_batch, static_argnames="augmentation")
    take = jax.jit(train_step)
    train = images.examples("train", config.classes)
    while True:
        (indices,) = order(int(state.step), 1)
        stored = jax.tree.map(functools.partial(gather, indices=np.asarray(indices)), train)
        batch, labels, key = batch_of(state, stored, augmentation=config.augmentation)
        if int(state.step) >= step - 1:
            break
        state, _ = take(state, batch, key, *hyperparameters, labels=labels)
    arrays = {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.arrays())}
    arrays |= {"images": batch, "key": jax.random.key_data(key), "total": np.int64(total)}
    arrays |= {} if labels is None else {"labels": labels}
    return {name: np.asarray(array) for name, array in arrays.items()}


def failed_step(workdir: str | Path) -> FailedStep:
    """The step at which the run in `workdir` stopped being finite: `train_step(*failed_step(workdir))` runs it again.

    >>> failed_step("no_run")  # `FailedStep` shows one that has failed
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: no_run is not a run: it has no config.json. Give the folder that `bsvae train` wrote.

    Raises:
      UserError: not a run, one of which no step failed (a held-out objective that is not finite keeps none), or a damaged file.
    """
    folder = as_path(workdir, "workdir")
    info = read_info(folder)
    path = folder / "failure.npz"
    if not path.is_file():
        raise UserError(f"{folder} has no failure.npz: no step of this run was found not to be finite.")
    remedy = "train again to get it back"
    arrays = read_run_arrays(path, remedy)
    model = build_model(info.config, info.image_shape, info.bin_width)
    with sense_of(path, remedy):
        state = create_state(info.config, model, int(arrays["total"]))
        restored: Mapping[str, Any] = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(arrays[f"state{jax.tree_util.keystr(path)}"]), state.arrays()
        )
        key = wrap_key(jnp.asarray(arrays["key"]))
        images, labels = jnp.asarray(arrays["images"]), jnp.asarray(arrays["labels"]) if "labels" in arrays else None
        return FailedStep(state.with_arrays(restored), images, key, *build_hyperparameters(info.config), labels)
