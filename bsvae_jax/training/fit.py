"""`fit`: one run from a config to its evaluation, in a folder.

It checks what it is given, loads the data and opens the folder; the loop is `trainer.Trainer`.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from bsvae_jax._io.files import as_path
from bsvae_jax._io.terminal import ProgressBar, log, messages_shown
from bsvae_jax.config import Config, to_dict
from bsvae_jax.data import ImageSet, load
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.hardware import check_platform, check_precision
from bsvae_jax.distributed.mesh import available_bytes, data_mesh, describe_devices
from bsvae_jax.distributed.preemption import stop_on_signals
from bsvae_jax.errors import UserError, check_kind
from bsvae_jax.evaluation.metrics import Report
from bsvae_jax.training.callbacks import Callback, Callbacks, with_own
from bsvae_jax.training.memory import check_memory
from bsvae_jax.training.program import Program
from bsvae_jax.training.restore import read_source, start_with
from bsvae_jax.training.start import check_beginning
from bsvae_jax.training.state import build_model, check_against_data, for_data
from bsvae_jax.training.step import TrainState
from bsvae_jax.training.trainer import Member, Trainer
from bsvae_jax.training.workdir import RunDirectory, read_info


class FitResult(NamedTuple):
    """A finished run.

    >>> import tempfile
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = fit(config, folder, progress=False)
    >>> int(result.state.step), result.images.name, result.report["test"]["rate"].unit
    (3, 'digits', 'nats')
    """

    state: TrainState
    """After the last step, on all the devices of the run; its model is that of `restore`, for one device."""
    images: ImageSet
    """What it was trained and evaluated on."""
    workdir: Path
    report: Report
    """`{split: {name: Quantity}}` of the training and the test set."""


def _check_agreement(config: Config) -> None:
    """Before anything is computed, every process has the same config and the same program."""
    if multihost.is_only():
        return
    if config.devices is not None:
        raise UserError("With several processes all their devices take part; leave out --devices.")
    versions = {name: version(name) for name in ("bsvae_jax", "jax", "jaxlib", "flax", "optax", "numpy")}
    multihost.check_agreement("versions of the libraries", versions, "Install the same everywhere.")
    multihost.check_agreement("config", to_dict(config), "Give every process the same command.")


def fit(
    config: Config,
    workdir: str | Path,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    start_from: str | Path | None = None,
) -> FitResult:
    """Train as the config says, in `workdir`; continue there if a run of the same config was interrupted, or is to go on.

    Writes `config.json`, `metrics.jsonl` (a row per line), TensorBoard events, checkpoints, and at the end `calibration.npz`,
    the variance of the training set, and `evaluation.json`. A finished run is not trained again.

    A run goes on with more epochs, or with another learning rate, schedule, weight decay or number of steps that may be left
    out, from its last checkpoint and with the state of its optimizer. Its learning rate is from there on that of the new
    schedule over all steps, as if that had been given from the beginning: after 50 epochs of a cosine, 100 go on at half the
    peak. `config.json` keeps what was changed and after which step. All else is another experiment, which `start_from` begins.

    Args:
      config: the experiment.
      workdir: a folder of this run alone; with several processes (`multihost.join`), that of process 0 only. If one of them
        dies, JAX ends the others within a minute: they wait for it in the middle of a step.
      progress: show a progress bar, and what is logged (`logging.getLogger("bsvae_jax")`), on standard error.
      callbacks: what else is done on the way (`Callback`); they may stop the run early.
      start_from: workdir of another run, with whose weights a new one begins (those of its latest checkpoint; the averaged
        ones where it kept them): other data, beta, variance or prior, or a network of which some layers differ. A layer is
        taken where all its arrays have the same shapes, else drawn from the seed; which are is logged and kept in
        `config.json`. Optimizer, schedule and order of the data start anew. The run keeps what it took in `start.npz`:
        continuing needs the other no more.

    >>> import tempfile
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fit(config, folder, progress=False)
    ...     sorted(path.name for path in Path(folder).glob("*.json"))
    ['config.json', 'evaluation.json']

    Raises:
      UserError: before any training: the data, devices or workdir do not fit the config, or the processes do not agree, or
        there is no run at `start_from` of which any layer fits; or at its end: the disk is full.
      DivergenceError: a loss, gradient or held-out objective is not finite; names the step, the terms and the last good
        checkpoint.
      Interrupted: SIGINT or SIGTERM; the steps in flight were finished and saved, the same call continues after them.
      CallbackError: a callback raised an error; the run was saved first, the same call continues it.
    """
    check_kind("config", config, Config, "load_config(path) reads one from a file")
    folder = as_path(workdir, "workdir")
    Callbacks(callbacks)  # checked before anything is computed
    check_platform()
    with multihost.ends_together(), messages_shown(progress and multihost.is_primary()):
        return _fit(config, folder, progress, callbacks, start_from)


def _fit(
    config: Config, folder: Path, progress: bool, callbacks: Sequence[Callback], start_from: str | Path | None
) -> FitResult:
    _check_agreement(config)
    mesh = data_mesh(config.devices, config.batch_size, config.gradient_accumulation)
    check_precision(config.precision, mesh.devices.flat[0].device_kind)
    images = load(config.data)
    config = for_data(config, images.image_shape)
    check_against_data(config, images)
    fingerprint = images.fingerprint(config.classes)
    multihost.check_agreement("images", {"fingerprint": fingerprint}, "Give every process the same data.")
    primary, program = multihost.is_primary(), Program(config, images, mesh)
    begun = (folder / "config.json").is_file()
    if not begun:  # while there is no folder yet, which would hold the config that does not fit
        check_memory(program, available_bytes(mesh))
    # What is not primary touches no file.
    other = RunDirectory(folder, config, images, primary=False)

    def open_folder() -> RunDirectory:
        if start_from is None:
            return RunDirectory(folder, config, images)
        if (folder / "config.json").is_file():  # it has what it began with
            check_beginning(folder, read_info(folder, config).started_from, start_from)
            return RunDirectory(folder, config, images)
        start = start_with(read_source(start_from, folder, config), config, images)
        opened = RunDirectory(folder, config, images, start=start)
        log.info(start.sentence)
        return opened

    directory = multihost.on_primary(open_folder, other)
    with stop_on_signals() as stop, directory as run:
        done = max(run.saved_steps(), default=0)
        if begun and done < program.total:
            check_memory(program, available_bytes(mesh))
        if primary:
            log.info(
                f"{images.name}: {images.sizes()}; "
                f"{config.epochs} epochs, {program.total} steps of {config.batch_size}; {describe_devices(mesh)}"
                + ("" if program.resident else "; images are streamed from the host")
            )
        with ProgressBar(program.total * config.batch_size, done * config.batch_size, progress and primary) as bar:
            member = Member(config, run)
            state = Trainer(program, [member], with_own(callbacks, bar), stop).train()
        # The program's model and schedule have other numbers in place of those that it takes as arrays.
        model = build_model(config, images.image_shape, images.bin_width)
        state = state.replace(model=model, beta_schedule=config.beta_schedule)
        return FitResult(state, images, run.folder, member.report or {})
