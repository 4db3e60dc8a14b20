"""The folder of one run: what it holds, who may write to it, and what is shown while it is written.

config.json        the config and its changes, the data it met, versions of the libraries, switches of JAX; of imported weights,
                   the file; of weights that were taken from another run, which and from where
start.npz          those weights
metrics.jsonl      a row per line, training and test terms in nats per example
tensorboard/       the same as TensorBoard events
checkpoints/       Orbax, the latest two and the best
calibration.npz    optimal variance of the training set (at the end)
per_image.npz      calibrated ELBO of each test image (at the end)
evaluation.json    every reported number of all splits (at the end, or by `bsvae evaluate`)
evaluation_best.json  the same of the best checkpoint (by `bsvae evaluate --checkpoint best`)
failure.json       why training stopped, where it did; failure.npz has the state and the batch of that step
prior.npz          a density fitted to the latents (by `bsvae fit-prior`)
prior_training/    checkpoints of one that is being trained (flow matching), until it is
stopped.json       where a callback ended training before the last step, and why; without it, the same call trains on
figures/           written by the command line
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bsvae_jax import config as configs
from bsvae_jax._io.disk import MARGIN, check_room, free_bytes, mebibytes, tree_bytes
from bsvae_jax._io.files import (
    digest_of,
    is_used,
    read_json,
    read_metrics,
    take_folder,
    write_arrays,
    write_atomically,
    write_json,
)
from bsvae_jax._io.terminal import log
from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet
from bsvae_jax.data.datasets import with_absolute_paths
from bsvae_jax.data.image_set import bin_width_of, is_image
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import Report
from bsvae_jax.evaluation.scores import Calibration
from bsvae_jax.training.changes import AGAIN, Change, check_change, describe_change, read_changes, with_change
from bsvae_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, SaveError, check_place, saved_steps
from bsvae_jax.training.evaluated import forget_later, write_evaluation
from bsvae_jax.training.identity import EDITED, identities, identity, read_run_arrays, write_run_arrays
from bsvae_jax.training.metrics_log import incomplete_epochs
from bsvae_jax.training.start import FILE as STARTED
from bsvae_jax.training.start import Start, begin_with
from bsvae_jax.training.stopped import Stopped, read_stopped
from bsvae_jax.training.switches import check_switches, switches

FORMAT = 1
"""Version of the layout of a run folder."""

State = TypeVar("State")


class RunInfo(NamedTuple):
    """What `config.json` says."""

    config: Config
    image_shape: tuple[int, ...]
    levels: int
    fingerprint: str
    """Of the images trained on, `ImageSet.fingerprint`."""
    holds_images: bool = True
    """Whether they are images in [0, 1], `ImageSet.holds_images`."""
    switches: Mapping[str, Any] = MappingProxyType({})
    """The `SWITCHES` under which the run began; empty where they were not recorded."""
    started_from: Mapping[str, Any] | None = None
    """Where its weights are from (`Start.record`), if not from its seed."""
    changes: tuple[Change, ...] = ()
    """Of its config while it was trained, oldest first."""
    train: int | None = None
    """Size of the training set, where it was recorded."""
    imported: Mapping[str, Any] | None = None
    """The file that its weights are from, if they were imported."""
    exported: bool = False
    """Whether `export_hub` wrote it: it has weights, and no checkpoints."""

    @property
    def bin_width(self) -> float:
        """Width of a gray level after scaling to [0, 1]."""
        return bin_width_of(self.levels)

    def provenance(self) -> list[str]:
        """What config and seed do not say of the run: where its weights are from, and what was changed on the way."""
        began = []
        if (source := self.started_from) is not None:
            began = [f"It began with the weights of {source['workdir']} (step {source['step']})."]
        if self.imported is not None:
            began = [f"It began with the weights of {self.imported['file']} ({self.imported['kind']})."]
        return began + [f"It went on after step {change.step} with {'; '.join(change.changed)}." for change in self.changes]


def shape_and_levels(data: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Shape of an example and number of gray levels, as `config.json` and `sweep.json` have them; else a ValueError."""
    shape, levels = data["image_shape"], data["levels"]
    if not (
        isinstance(shape, list)
        and shape
        and all(type(n) is int and n > 0 for n in shape)
        and type(levels) is int
        and levels > 1
    ):
        raise ValueError(f"there are no data of shape {shape} and {levels} levels")
    return tuple(shape), levels


def read_info(folder: Path, like: Config | None = None) -> RunInfo:
    """Read `config.json`; classes that the library does not have are those of `like`, or of modules that are loaded already.

    Raises:
      UserError: not a run folder, a damaged file, or one written by a newer version.
    """
    path = folder / "config.json"
    if (folder / "sweep.json").is_file():
        raise UserError(f"{folder} is a sweep, not a run: give one of its members, {folder}/members/NAME.")
    if not path.is_file():
        raise UserError(f"{folder} is not a run: it has no config.json. Give the folder that `bsvae train` wrote.")
    with read_json(path, EDITED) as values:
        if values["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer bsvae_jax (format {values['format']}, this one knows {FORMAT}).")
        config, data = configs.from_dict(values["config"], given=configs.kinds_of(like)), values["data"]
        shape, levels = shape_and_levels(data)
        images = bool(data.get("images", is_image(shape)))  # earlier versions did not write it
        began_under, started_from = dict(values.get("switches", {})), values.get("started_from")
        changes, train = read_changes(values), data.get("train")
        return RunInfo(
            config,
            shape,
            levels,
            str(data["fingerprint"]),
            images,
            began_under,
            started_from,
            changes,
            train,
            values.get("imported"),
            "exported" in values,
        )


def describe_run(config: Config, images: ImageSet, **also: Any) -> dict[str, Any]:
    """What `config.json` holds of a run; `also` are further entries, plain JSON values, for people to read."""
    return {
        "format": FORMAT,
        "config": configs.to_dict(replace(config, data=with_absolute_paths(config.data))),
        "data": {
            "name": images.name,
            "image_shape": images.image_shape,
            "images": images.holds_images,
            "levels": images.levels,
            **{split: len(getattr(images, split)) for split in images.splits},
            "fingerprint": images.fingerprint(config.classes),
        },
        "switches": switches(),
        "versions": {name: version(name) for name in ("bsvae_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")},
        **also,
    }


def check_same_data(folder: Path, info: RunInfo, images: ImageSet) -> None:
    """Raise a UserError if `images` are not those that the run in `folder` was trained on."""
    if (info.image_shape, info.levels) != (images.image_shape, images.levels):
        raise UserError(
            f"{folder} was trained on images {info.image_shape} with {info.levels} levels; "
            f"the data are now {images.image_shape} with {images.levels}."
        )
    if info.fingerprint != images.fingerprint(info.config.classes):
        raise UserError(
            f"{folder} was trained on other images of {images.name}: their content has changed since. Restore the data, say "
            "where they lie now (--data.path), or choose another --workdir."
        )


class RunDirectory:
    """The open folder of a run that trains; use it in a `with` block.

    Of several processes the primary one has the folder; in the others the same methods keep nothing and say nothing.
    """

    def __init__(self, folder: Path, config: Config, images: ImageSet, primary: bool = True, start: Start | None = None):
        """Opens or creates the folder; a new run begins with the weights of `start`, where they are given.

        Raises:
          UserError: it holds another config or other data, it is something else's, or it cannot be written.
        """
        self.folder, self.primary = folder, primary
        self._config, self._images = config, len(images.train)
        self._unwritten: list[str] = []
        self.unsaved = ""
        """Why the last checkpoint could not be saved; empty where it could."""
        self._said: set[str] = set()
        if primary:
            self._check_folder(config, images, start)
            self._checkpoints = self._open_checkpoints()

    def _open_checkpoints(self) -> Checkpoints:
        own, *earlier = identities(self.folder)
        description = {"run": own, "config": configs.to_dict(self._config)}
        return Checkpoints(self.folder / "checkpoints", description=description, earlier=earlier)

    def _check_folder(self, config: Config, images: ImageSet, start: Start | None) -> None:
        folder = self.folder
        check_place(folder, "choose another --workdir")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; --workdir must name a folder.")
        if is_used(folder, STARTED):
            if not (folder / "config.json").is_file():
                raise UserError(f"{folder} is not empty and not a run of bsvae; choose another --workdir.")
            info = read_info(folder)
            if info.exported:
                raise UserError(
                    f"{folder} was exported: it has no checkpoint to go on from. Choose another --workdir, with --start-from "
                    f"{folder} to begin with its weights."
                )
            if configs.changes(info.config, config):
                step = max(saved_steps(folder / "checkpoints"), default=0)
                check_change(folder, info.config, config, step, self._images)
            check_same_data(folder, info, images)
            check_switches(folder, info.switches)
        self._lock = take_folder(folder, "training")
        if not (folder / "config.json").is_file():
            values = describe_run(config, images)
            if start is not None:  # the weights first, because a folder is a run by its config.json
                check_room(folder, tree_bytes(start.arrays))
                values["started_from"] = start.record
                write_arrays(folder / STARTED, run=np.array(digest_of(values)), **start.arrays)
            write_json(folder / "config.json", values)

    def __enter__(self) -> "RunDirectory":
        """Nothing more to open."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish pending checkpoints."""
        if self.primary:
            self.settle()
            self._checkpoints.__exit__(*exception)
            self._lock.close()

    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return self._checkpoints.steps() if self.primary else []

    def state_before(self, state: State, step: int) -> State:
        """The newest checkpoint before `step` that loads, else the beginning, `state` with the weights that the run took."""
        self.settle()
        for saved in reversed([saved for saved in self._checkpoints.steps() if saved < step]):
            try:
                return state.with_arrays(self._checkpoints.restore(state.arrays(), saved)[1])  # type: ignore[attr-defined]
            except DamagedCheckpointError as error:
                log.warning(str(error))
        return self._beginning(state)

    def _beginning(self, state: State) -> State:
        """`state`, with the weights that the run took from another where it did."""
        if read_info(self.folder, self._config).started_from is None:
            return state
        arrays = read_run_arrays(self.folder / STARTED, "begin again in another --workdir")
        return begin_with(state, arrays)  # type: ignore[arg-type, return-value]

    def resume(self, state: State, at: int | None = None) -> State:
        """The checkpoint of step `at`, or the newest that loads, or the beginning of a new run; later metrics are dropped."""
        if not self.primary:
            return state
        check_room(self.folder, tree_bytes(state.arrays()), saved=len(self._checkpoints.steps()))  # type: ignore[attr-defined]
        for name in ("failure.json", "failure.npz"):
            (self.folder / name).unlink(missing_ok=True)
        metrics = self.folder / "metrics.jsonl"
        if not self._checkpoints.steps():
            if read_info(self.folder, self._config).imported is not None:
                raise UserError(
                    f"{self.folder} has no checkpoint, and with them the imported weights are gone; import them into another "
                    "--workdir."
                )
            step, state = 0, self._beginning(state)
            if metrics.is_file():
                log.info(f"{self.folder} has no checkpoint; starting from the beginning")
        else:
            step, arrays = self._checkpoints.restore(state.arrays(), at, log.warning)  # type: ignore[attr-defined]
            state = state.with_arrays(arrays)  # type: ignore[attr-defined]
            log.info(f"continuing from step {step} in {self.folder}")
        kept = [row for row in read_metrics(self.folder) if row["step"] <= step]
        if metrics.is_file():
            write_atomically(metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if incomplete := incomplete_epochs(kept, self._config, self._images, step):
            lost = f"{len(incomplete)} epochs up to step {step}, the first of epoch {incomplete[0]}"
            log.warning(f"{metrics} lacks rows of {lost}: they were lost or removed, and curves have gaps there.")
        changes = self._go_on(step)
        stopped = read_stopped(self.folder)
        if stopped is not None and (stopped.step != step or any(change.step == step for change in changes)):
            (self.folder / "stopped.json").unlink()
        return state

    def _go_on(self, step: int) -> tuple[Change, ...]:
        """Record where the run goes on after `step` with another config than it had; all that was changed so far.

        One file is replaced, and what lies beside it belongs to the run before and after.
        """
        info = read_info(self.folder, self._config)
        changed = configs.changes(info.config, self._config)
        if not changed and all(change.step <= step for change in info.changes):
            return info.changes
        if changed:
            log.info(describe_change(self.folder, info.config, self._config, step, self._images))
            forget_later(self.folder, step)
        config = configs.to_dict(configs.with_execution_of(self._config, info.config))
        path, change = self.folder / "config.json", Change(step, tuple(changed) or AGAIN, identity(self.folder))
        with read_json(path, EDITED) as values:
            write_json(path, with_change(values, config, change))
        self._checkpoints.__exit__(None, None, None)
        self._checkpoints = self._open_checkpoints()
        return (*info.changes, change)

    def stopped_step(self) -> int | None:
        """The step at which a callback stopped this run, None where none did."""
        stopped = read_stopped(self.folder) if self.primary else None
        return None if stopped is None else stopped.step

    def history(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far."""
        return read_metrics(self.folder) if self.primary else []

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; rows that a full disk refuses are kept and written with a later one."""
        if not self.primary:
            return
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            with (self.folder / "metrics.jsonl").open("ab", buffering=0) as file:
                start = file.tell()
                content = "".join(self._unwritten).encode()
                if file.write(content) != len(content):
                    file.truncate(start)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.warn_once(
                "metrics", f"{self.folder / 'metrics.jsonl'} cannot be written ({error.strerror}); trying again later."
            )
            return
        self._unwritten.clear()

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning, once for each topic."""
        if self.primary and topic not in self._said:
            self._said.add(topic)
            log.warning(message)

    def save(self, step: int, arrays: Any, objective: float | None) -> bool:
        """Save a checkpoint, ranked by its held-out objective where that is known, unless this step is saved already.

        Returns:
          False where the disk is too full: the last good checkpoint stays, a warning says so, and later calls try again. True
          where saving has begun; `settle` says whether it ended well.
        """
        self.settle()
        if step in self.saved_steps() or not self.primary:
            return True
        needed, free = tree_bytes(arrays) + MARGIN, free_bytes(self.folder)
        if free < needed:
            self._pause(f"{mebibytes(free)} are free, a checkpoint takes {mebibytes(needed)}: free some space")
            return False
        try:
            self._checkpoints.save(step, arrays, objective)
        except SaveError as error:
            self._pause(str(error))
            return False
        if self.unsaved:
            log.warning(f"{self.folder}: saving again, from step {step}.")
            self.unsaved = ""
        return True

    def settle(self) -> bool:
        """Wait until what is being saved is on the disk; False, and a warning, where it did not get there."""
        try:
            if self.primary:
                self._checkpoints.wait()
        except SaveError as error:
            self._pause(str(error))
            return False
        return True

    def _pause(self, why: str) -> None:
        paused, self.unsaved = bool(self.unsaved), why.removesuffix(".")
        if not paused:
            log.warning(f"Saving in {self.folder} is paused ({self.unsaved}); training goes on. {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        """A sentence that names the last good checkpoint."""
        if not self.primary:
            return f"Process 0 has the checkpoints, in {self.folder}."
        self.settle()
        steps = self._checkpoints.steps()
        return f"The last good checkpoint is {self._checkpoints.path(steps[-1])}." if steps else "No checkpoint was saved yet."

    def fail(self, step: int, error: str) -> None:
        """Record why training stopped."""
        self._write_json("failure.json", {"step": step, "error": error})

    def stop(self, step: int, reason: str) -> None:
        """Record that a callback ended training after `step`."""
        self._write_json("stopped.json", Stopped(step, reason)._asdict())

    def save_failure(self, arrays: dict[str, np.ndarray]) -> Path:
        """Keep what `failed_step` needs; the file."""
        return self._write_arrays("failure.npz", arrays)

    def write_calibration(self, calibration: Calibration) -> None:
        """Record the optimal variance of the training set."""
        self._write_arrays("calibration.npz", calibration._asdict())

    def write_evaluation(self, step: int, report: Report, findings: Mapping[str, str]) -> None:
        """Write `evaluation.json`, which marks the run as finished."""
        if self.primary:
            write_evaluation(self.folder, step, report, findings=findings)

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        if self.primary:
            write_json(self.folder / name, values)

    def _write_arrays(self, name: str, arrays: Mapping[str, Any]) -> Path:
        if self.primary:
            write_run_arrays(self.folder / name, **arrays)
        return self.folder / name
