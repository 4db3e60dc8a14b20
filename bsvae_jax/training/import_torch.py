"""Weights from elsewhere as a run: what `bsvae import-torch` does."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bsvae_jax import config as configs
from bsvae_jax._io.disk import check_room, tree_bytes
from bsvae_jax._io.files import as_path, digest_of, is_used, sha256_of, take_folder, write_json
from bsvae_jax.config import Config
from bsvae_jax.data import load
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.errors import UserError, check_kind
from bsvae_jax.models import pytorch
from bsvae_jax.models._state_dict import read_state_dict
from bsvae_jax.training.checkpoints import Checkpoints, check_place
from bsvae_jax.training.state import build_model, check_against_data, create_state, for_data
from bsvae_jax.training.workdir import describe_run


class Imported(NamedTuple):
    """What was imported, and where it is now.

    >>> imported = Imported(Path("run"), parameters=1000, sha256="0" * 64)  # as `import_torch` returns it
    >>> f"{imported.parameters:,} parameters in {imported.workdir}"
    '1,000 parameters in run'
    """

    workdir: Path
    """The run, for `restore`, `fit` and the command line."""
    parameters: int
    """Numbers that training would change; BatchNorm's running statistics are not among them."""
    sha256: str
    """Of the file."""


def import_torch(path: str | Path, config: Config, workdir: str | Path) -> Imported:
    """Make a run of a PyTorch `state_dict` of the published network, as `fit` would leave it in `workdir`.

    It stands before its first step, and can be evaluated, sampled from and restored like any other run; `fit` with the same
    config and workdir trains on from these weights. It has no calibrated variance, since that is of a training set: `evaluate`
    scores it, and no optimizer state. `config.json` and the checkpoint say which file the weights are from, with its SHA-256.
    Posterior and reconstructions are PyTorch's to 1e-4 at the sizes of MNIST and CelebA (measured: 7e-6 of values up to 5).

    Args:
      path: a file of `torch.save(model.state_dict(), path)`; read without PyTorch, and nothing in it is run.
      config: of the network that was saved, with its decoder variance; its data decide the size of the images.
      workdir: a folder that is empty or does not exist.

    >>> from bsvae_jax.config import Residual
    >>> import_torch("missing.pt", Config(network=Residual()), "run")
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: missing.pt cannot be read (No such file or directory).

    Raises:
      UserError: before anything is written: the file holds no `state_dict`, another network's or one that is not finite; the
        data cannot be read; the workdir is in use.
    """
    path, folder = as_path(path, "path"), as_path(workdir, "workdir")
    check_kind("config", config, Config, "load_config(path) reads one from a file")
    if config.classes is not None:
        raise UserError("The published network knows no classes; leave classes out of the config.")
    arrays = read_state_dict(path)
    images = load(config.data)
    config = for_data(config, images.image_shape)
    check_against_data(config, images)
    model = build_model(config, images.image_shape, images.bin_width)
    like = jax.eval_shape(lambda: create_state(config, model, 1).variables())
    variables = pytorch.from_state_dict(arrays, like, config, images.image_shape, str(path))
    steps = steps_through(config.epochs, len(images.train), config.batch_size)
    state = create_state(config, model, steps, jax.tree.map(jnp.asarray, variables))
    _check_unused(folder)
    check_room(folder, tree_bytes(state.arrays()))
    with contextlib.closing(take_folder(folder, "working")):
        _check_unused(folder)  # again, now that no other process can change it
        sha256 = sha256_of(path)
        source = {"kind": "state_dict of PyTorch", "file": path.name, "sha256": sha256}
        values = describe_run(config, images, imported=source)
        description = {"run": digest_of(values), "config": configs.to_dict(config), "imported": source}
        with Checkpoints(folder / "checkpoints", description=description) as checkpoints:
            checkpoints.save(0, state.arrays(), None)
        # Last, because a folder is a run by its config.json: what a kill leaves before is refused by every command.
        write_json(folder / "config.json", values)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Imported(folder, parameters, sha256)


def _check_unused(folder: Path) -> None:
    check_place(folder, "choose another --workdir")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --workdir must name a folder.")
    if is_used(folder):
        raise UserError(f"{folder} is not empty; imported weights need a --workdir of their own.")
