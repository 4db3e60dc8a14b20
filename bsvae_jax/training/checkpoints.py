"""Checkpoints: the latest and the best training state of a run, saved and restored through Orbax.

A checkpoint holds plain arrays only, so it restores onto any number of devices: the caller gives the target shapes.
"""

import contextlib
import gc
import glob
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bsvae_jax._io.files import digest, printable
from bsvae_jax.errors import UserError

Warn = Callable[[str], None]

FORMAT = 1
"""Version of what a checkpoint holds."""
_OF_PENDING_TASKS = ("never retrieved", "destroyed but it is pending", "Event loop is closed")
"""What asyncio logs of tasks that nobody waits for any more."""


class DamagedCheckpointError(UserError):
    """The checkpoint asked for does not load; it was moved aside."""


class NewerCheckpointError(UserError):
    """The checkpoint was written by a newer version, which may have meant something else by it."""


class LostCheckpointError(UserError):
    """The first checkpoint was saved without an error and does not load again: none that is saved there can be trusted."""


class OtherArraysError(UserError):
    """The checkpoint is sound, and of another run or step, or of other names, shapes or types than asked for."""


class SaveError(UserError):
    """A checkpoint could not be written; those before it are still there, and another may be saved later."""


def check_place(folder: Path, remedy: str = "rename it") -> None:
    """Raise a UserError if checkpoints cannot be kept under `folder`.

    TensorStore takes a backslash in a path for a slash, and names that are not UTF-8 for no text.
    """
    place = str(folder.resolve())
    if (plain := printable(place)) != place:
        raise UserError(f"{plain} has a name that is not UTF-8, where checkpoints cannot be kept; {remedy}.")
    if "\\" in place:
        astray = Path(place.replace("\\", "/"))
        lost = f" Arrays that were saved there before lie in {astray}." if astray.is_dir() else ""
        raise UserError(f"{folder} has a backslash in its path ({place}), where checkpoints cannot be kept; {remedy}.{lost}")


def saved_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint under `folder`, oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.steps()


@contextlib.contextmanager
def _event_loop_unheard() -> Iterator[None]:
    """Of a checkpoint that does not load, Orbax asks for the first error only; what else it had begun complains at length.

    Tasks and coroutines do when they are collected: collect them within the block. What TensorStore's threads say of an event
    loop that is closed reaches no logger; only the command line leaves it unsaid.
    """
    log = logging.getLogger("asyncio")
    others = lambda record: not any(said in record.getMessage() for said in _OF_PENDING_TASKS)  # noqa: E731 - one for every block
    log.addFilter(others)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
            yield
    finally:
        log.removeFilter(others)


@contextlib.contextmanager
def _orbax_unheard() -> Iterator[None]:
    """Orbax logs every step, and errors that it raises too; what others log through absl is heard."""
    log, place = logging.getLogger("absl"), str(Path(ocp.__file__).parent)
    others = lambda record: not record.pathname.startswith(place)  # noqa: E731 - an object of its own for every block
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)


def _unreadable(folder: Path) -> str | None:
    """Which file under `folder` the system does not give, and why; None where it gives all that are there."""

    def refuse(error: OSError) -> None:
        raise error

    name = str(folder)
    try:
        for parent, _, names in os.walk(folder, onerror=refuse):
            for name in (os.path.join(parent, own) for own in names):
                with contextlib.suppress(FileNotFoundError), open(name, "rb") as file:
                    while file.read(2**24):
                        pass
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{error.filename or name} cannot be read ({error.strerror})"
    return None


def _blank(array: Any) -> np.ndarray:
    """What Orbax reads into an array on the host of this shape and type; takes no memory."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _one_process() -> ocp.options.MultiprocessingOptions:
    """For the process that asks alone: of several processes one saves, and the others need not take part."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )


class Checkpoints:
    """The checkpoints under `folder`, one per step; keeps the latest two and the one of the least objective.

    Two, so that a damaged newest one leaves another. Saving is asynchronous; `wait` (or the end of the `with` block) makes it
    final. Orbax writes to a temporary folder and renames it, so a kill never leaves a half-written step. A digest of the arrays
    is saved with them and compared when they are restored: a flipped bit is a damaged checkpoint, not another result.
    """

    def __init__(
        self,
        folder: Path,
        read_only: bool = False,
        description: dict[str, Any] | None = None,
        earlier: Collection[str] = (),
    ):
        """`folder` is made if absent, unless `read_only`; `description` (plain JSON values) travels with every checkpoint.

        Of its entries, `run` is compared when a checkpoint is restored, which may have one of the `earlier` ones in its place.
        """
        self._description, self._earlier = description or {}, earlier
        self._saving: int | None = None
        self._trusted = False
        check_place(folder)
        self._folder, self._read_only = folder.resolve(), read_only
        damaged = self._damaged_metrics()
        if damaged and not read_only:
            self._set_aside(damaged)
        with contextlib.ExitStack() as unheard:
            unheard.enter_context(_orbax_unheard())
            try:
                self._manager = self._open_beside_a_writer() if read_only else self._open()
            except PermissionError as error:
                raise UserError(f"{error.filename or self._folder} cannot be opened ({error.strerror}).") from error
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                named = f" of step {', '.join(map(str, damaged))}" if damaged else ""
                raise UserError(
                    f"{self._folder} does not open: the metrics{named} are damaged ({type(error).__name__}: {error}). Repeat "
                    "the command that trained it: it moves that step aside and continues from another."
                ) from error
            self._unheard = unheard.pop_all()

    def _open_beside_a_writer(self) -> ocp.CheckpointManager:
        """A run that goes on meanwhile may delete an old step while it is being read: looked at again, it is not there."""
        for _ in range(4):
            with contextlib.suppress(FileNotFoundError):
                return self._open()
            time.sleep(0.25)
        return self._open()

    def _open(self) -> ocp.CheckpointManager:
        best = BestN(get_metric_fn=lambda metrics: -metrics["objective"], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["objective"],  # Orbax writes metrics only where this is set
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
            create=False,  # with several processes Orbax does not
            read_only=self._read_only,
            multiprocessing_options=_one_process(),
        )
        if not self._read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Orbax would delete what a kill left in a thread, which complains where the program ends before it.
            for left in self._folder.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(left)
        # Orbax looks for the files to merge into one by a pattern, the unescaped path: where that is one, a file per array.
        one_file = glob.escape(str(self._folder)) == str(self._folder)
        handler = ocp.StandardCheckpointHandler(use_ocdbt=one_file, multiprocessing_options=_one_process())
        return ocp.CheckpointManager(epath.Path(self._folder), options=options, item_handlers=handler)

    def __enter__(self) -> "Checkpoints":
        """Nothing to open."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish pending writes; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._unheard.close()

    def steps(self) -> list[int]:
        """Steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the least held-out objective, None when none was evaluated."""
        step = self._manager.best_step()
        return None if step is None or math.isinf(self._manager.metrics(step)["objective"]) else step

    def save(self, step: int, state: Any, objective: float | None) -> None:
        """Save a pytree of arrays; `objective` (held-out, nats; None: not evaluated) ranks it.

        The first one is read back before this returns, so that a place where nothing loads again is known at once.

        Raises:
          SaveError: the disk did not take it, or the one before it (see `wait`).
          LostCheckpointError: the first one does not load.
        """
        self.wait()
        if jax.process_count() > 1:  # every process has all of it: this one saves its own copies
            state = jax.device_get(state)
        metadata = {"format": FORMAT, "sha256": digest(state), "step": step, **self._description}
        metrics = {"objective": math.inf if objective is None else objective}  # Orbax wants one
        self._saving = step
        with self._as_save_errors():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, custom_metadata=metadata)
        if not self._trusted:
            self.wait()
            self._check_loads(step, state, metadata["sha256"])
            self._trusted = True

    def wait(self) -> None:
        """Block until everything saved is on disk.

        Raises:
          SaveError: it cannot be; what was written of it is deleted, and saving may be tried again.
        """
        with self._as_save_errors():
            self._manager.wait_until_finished()
        self._saving = None

    @contextlib.contextmanager
    def _as_save_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # the system's word for a full disk, and TensorStore's
            step, self._saving = self._saving, None
            # A manager that has failed keeps its error for the next save, and its unfinished files on the disk.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:200] or type(error).__name__
            reason = "No space left on device" if "No space left" in str(error) else reason
            raise SaveError(f"The checkpoint of step {step} could not be written to {self._folder} ({reason}).") from error

    def _check_loads(self, step: int, state: Any, sha256: str) -> None:
        with _event_loop_unheard():
            try:
                restored = self._manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_blank, state)))
                reason = "" if digest(restored) == sha256 else "its arrays are not those that were saved"
            except Exception as error:  # whatever it is: training on would be for nothing
                reason = _first_line(error)
                gc.collect()
        if reason:
            rescue = self._unmerged(step) or "Choose another --workdir"
            raise LostCheckpointError(
                f"{self.path(step)} was saved and does not load again ({reason}). Nothing saved there can be trusted, so this "
                f"stops here. {rescue}."
            )

    def _unmerged(self, step: int) -> str | None:
        """How to rescue a checkpoint whose arrays lie in the folder of the process that wrote them, None where they do not.

        Orbax leaves them there, and says nothing, where the path is a pattern that does not match itself.
        """
        place = self.path(step) / "default"
        parts = sorted(place.glob("ocdbt.process_*/manifest.ocdbt"))
        if (place / "manifest.ocdbt").exists() or len(parts) != 1:
            return None
        move = f"mv {shlex.quote(str(parts[0].parent))}/* {shlex.quote(str(place))}"
        return f"Its arrays are there but were not put together; to do it: {move}"

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self._folder / str(step)

    def restore(self, target: Any, step: int | None = None, warn: Warn = lambda message: None) -> tuple[int, Any]:
        """The state saved at `step`, or the newest that loads.

        Args:
          target: pytree of arrays or `ShapeDtypeStruct` with the shapes, types and shardings to restore to.
          step: None: the newest; one that does not load is reported through `warn`, and the one before is used. Unless
            opened `read_only`, what does not load is moved to `damaged_checkpoints` beside the folder, so that training can
            save that step again. Only content that is missing or is not what was saved is damage.

        Returns:
          `(step, state)`.

        Raises:
          DamagedCheckpointError: the `step` asked for does not load; unless `read_only`, it was moved aside as well.
          NewerCheckpointError: a version that is not known wrote it.
          UserError: nothing is saved, no checkpoint loads, or one that may be sound does not: the system does not give its
            files or memory, or it has other arrays than `target`. Nothing is moved then, and none before it is used.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        if not candidates:
            raise UserError(f"There is no checkpoint in {self._folder}.")
        target = jax.tree.map(ocp.tree.to_shape_dtype_struct, target)
        failures = []
        for candidate in candidates:
            cause = None
            with _event_loop_unheard():
                try:
                    state = self._restore(candidate, target)
                    if not self._read_only:
                        self._move_aside(candidates[: candidates.index(candidate)])
                    return candidate, state
                except NewerCheckpointError:
                    raise
                except Exception as error:  # a damaged file surfaces as any of Orbax's, TensorStore's or JSON's errors
                    failures.append(f"{self.path(candidate)} does not load ({_first_line(error)})")
                    cause = self._no_damage(candidate, error)
                gc.collect()  # the error as well is gone by now, and holds nothing
            if cause is not None:
                raise UserError(f"{self.path(candidate)} does not load ({cause}). It may be sound, so nothing was changed.")
            if candidate != candidates[-1] and self.path(candidate).is_dir():
                warn(f"{failures[-1]}; using the checkpoint before it.")
        if step is not None and not self._read_only and self.path(step).is_dir():
            self._move_aside(candidates)
            raise DamagedCheckpointError(f"{failures[0]}; it was moved to {self._folder.parent / 'damaged_checkpoints'}.")
        if step is None and self._read_only:
            self._manager.reload()
            if self.steps()[::-1] != candidates:  # a run goes on meanwhile, and has saved later steps and deleted these
                return self.restore(target, None, warn)
        raise UserError(f"No checkpoint loads: {'; '.join(failures)}. Move the folder away to start again.")

    def _restore(self, step: int, target: Any) -> Any:
        metadata = self._manager.metadata(step).custom_metadata or {}
        if metadata.get("format", FORMAT) > FORMAT:
            raise NewerCheckpointError(
                f"{self.path(step)} was written by a newer bsvae_jax (format {metadata['format']}, this one knows {FORMAT})."
            )
        if metadata.get("step", step) != step:
            raise OtherArraysError(f"it was saved as step {metadata['step']}, and its folder was renamed since")
        own = self._description.get("run")
        if own is not None and metadata.get("run", own) not in (own, *self._earlier):
            raise OtherArraysError("it is of another run than the config.json of this folder")
        # As it was saved and on the host first: only there can be told what has changed from what is of another shape.
        tree = self._manager.item_metadata(step).tree
        saved, wanted = ocp.tree.to_flat_dict(tree), ocp.tree.to_flat_dict(target)
        same = saved.keys() == wanted.keys()
        like = jax.tree.map(_blank, ocp.tree.from_flat_dict(saved, target=target) if same else tree)
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        if not same:
            names = sorted(".".join(name) for name in saved.keys() ^ wanted.keys())
            raise OtherArraysError(f"these arrays are in the checkpoint or in the state, not in both: {', '.join(names[:5])}")
        if metadata.get("sha256") != digest(arrays):
            raise ValueError("its arrays are not those that were saved")
        for name, array in wanted.items():
            if (saved[name].shape, saved[name].dtype) != (array.shape, array.dtype):
                described = [f"{own.dtype} of shape {tuple(own.shape)}" for own in (saved[name], array)]
                made = "; it was made under another JAX_DEFAULT_PRNG_IMPL" if name == ("key",) else ""
                raise OtherArraysError(f"its {'.'.join(name)} is {described[0]}, and {described[1]} is expected{made}")

        def placed(array: np.ndarray, like: Any) -> Any:
            sharding = getattr(like, "sharding", None)  # arrays on the host have none, and stay there
            return array if sharding is None else jax.device_put(array, sharding)

        return jax.tree.map(placed, arrays, target)

    def _no_damage(self, step: int, error: Exception) -> str | None:
        """What but damage keeps a checkpoint from loading, None where its content is missing or has changed."""
        if isinstance(error, OtherArraysError):
            return str(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "there is too little memory to read it"
        if (refused := _unreadable(self.path(step))) is not None:
            return refused
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return f"the system says {error.strerror or error}"
        return self._unmerged(step)

    def _damaged_metrics(self) -> list[int]:
        """Steps whose metrics do not read; Orbax opens no folder that has one."""
        damaged = []
        for path in self._folder.glob("[0-9]*/metrics/metrics"):
            if not path.parts[-3].isdigit():  # being written, or left by a kill; Orbax takes no notice
                continue
            try:
                valid = isinstance(json.loads(path.read_bytes())["objective"], float | int)
            except (ValueError, TypeError, KeyError, RecursionError, FileNotFoundError):
                valid = False
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); nothing was changed.") from error
            if not valid:
                damaged.append(int(path.parts[-3]))
        return damaged

    def _move_aside(self, steps: list[int]) -> None:
        self._set_aside(steps)
        if steps:
            self._manager.reload()

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            damaged = self._folder.parent / "damaged_checkpoints"
            damaged.mkdir(exist_ok=True)
            number = next(n for n in itertools.count() if not (damaged / f"{step}_{n}").exists())
            self.path(step).rename(damaged / f"{step}_{number}")
