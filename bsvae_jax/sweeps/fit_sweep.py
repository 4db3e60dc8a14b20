"""Sweeps: many members, trained a stack at a time, each in a folder that is a run like any other.

sweep.json         the base config, the run that members began from, the data and the spectrum of its covariance; when, by which
                   command and on what it was begun
members/NAME/      a run (see `training.workdir`) of one decoder variance, beta and seed, and its pictures.npz

A stack is only a way of computing: how members are grouped may change from one call to the next, and any member may be
continued by `bsvae train` instead.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
from jax.sharding import Mesh

from bsvae_jax import config as configs
from bsvae_jax._io.files import as_path, is_used, take_folder, write_json
from bsvae_jax._io.terminal import ProgressBar, log, messages_shown
from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet, load
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.hardware import check_platform, check_precision
from bsvae_jax.distributed.mesh import Execution, available_bytes, data_mesh, describe_devices, sweep_mesh
from bsvae_jax.distributed.preemption import Stop, stop_on_signals
from bsvae_jax.errors import DivergenceError, UserError, check_count, check_kind
from bsvae_jax.evaluation.scores import SplitScores
from bsvae_jax.random import make_key
from bsvae_jax.sweeps.execution import choose_execution
from bsvae_jax.sweeps.gallery import PICTURES, draw_members, write_pictures
from bsvae_jax.sweeps.grid import GridMember, Sweep, base_config
from bsvae_jax.sweeps.info import FORMAT, Call, SweepInfo, read_sweep
from bsvae_jax.training.callbacks import Callback, Callbacks, with_own
from bsvae_jax.training.changes import check_change
from bsvae_jax.training.checkpoints import DamagedCheckpointError, check_place, saved_steps
from bsvae_jax.training.evaluated import evaluation_at
from bsvae_jax.training.program import Program, program_config
from bsvae_jax.training.restore import read_source, start_with
from bsvae_jax.training.start import Source, Start, check_beginning
from bsvae_jax.training.state import check_against_data, for_data
from bsvae_jax.training.step import TrainState
from bsvae_jax.training.stopped import final_step, read_failure, read_stopped
from bsvae_jax.training.trainer import Member, Trainer
from bsvae_jax.training.workdir import RunDirectory, check_same_data, read_info


class SweepResult(NamedTuple):
    """What a sweep has come to.

    >>> result = SweepResult(Path("sweep"), finished=["optimal_beta1_seed0"], failed={})  # as `fit_sweep` returns it
    >>> [(result.folder / "members" / name).as_posix() for name in result.finished]  # each is a run, for `restore`
    ['sweep/members/optimal_beta1_seed0']
    """

    folder: Path
    """The workdir; each member is a run in `members/NAME`."""
    finished: list[str]
    """Names of the members that reached their last step, now or before."""
    failed: dict[str, str]
    """Why the others did not."""


def fit_sweep(
    config: Config,
    grid: Sweep,
    workdir: str | Path,
    execution: Execution | None = None,
    members_at_once: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    start_from: str | Path | None = None,
) -> SweepResult:
    """Train every member of a grid, members that differ only in numbers in one compiled program.

    Interrupted, the same call continues; a larger grid trains only what is new, and with more epochs all members go on (`fit`
    says what their learning rate does then). A member that diverges is recorded and left out, the others go on.

    Args:
      config: the base; the grid says what varies.
      grid: betas, decoder variances, seeds and learning rates.
      workdir: a folder of this sweep alone.
      execution: how members share a program; None: as `choose_execution` says.
      members_at_once: members in one stack; None: as many as fit into memory.
      progress: show a progress bar, and what is logged (`logging.getLogger("bsvae_jax")`), on standard error.
      callbacks: what else is done on the way (`Callback`), for every member; they may stop members early.
      start_from: workdir of a run with whose weights all members begin, as for `fit`. Members that are added later begin with
        them too, so that it is needed until the last has begun, and must not have been trained on.

    >>> import tempfile
    >>> config = Config(network=configs.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> grid = Sweep(beta=(0.1, 1.0), decoder_variance=(configs.Optimal(),), seeds=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit_sweep(config, grid, folder, execution="loop", progress=False).finished
    ['optimal_beta0.1_seed0', 'optimal_beta1_seed0']

    Raises:
      UserError: before any training: grid, data, devices, memory, workdir or `start_from` do not fit; or the disk is full at a
        member's end.
      Interrupted: SIGINT or SIGTERM; the steps in flight were finished and saved, the same call continues after them.
      CallbackError: a callback raised an error; the members in training were saved first, the same call continues them.
    """
    check_kind("config", config, Config, "load_config(path) reads one from a file")
    check_kind("grid", grid, Sweep)
    Callbacks(callbacks)  # checked before anything is computed
    folder = as_path(workdir, "workdir")
    if execution is not None and execution not in get_args(Execution):
        raise UserError(f"execution must be one of {', '.join(get_args(Execution))}, got {execution!r}.")
    grid.members(config)  # checked before anything is loaded
    check_platform()
    if not multihost.is_only():
        raise UserError(
            "A sweep is trained by one process on all its devices; give each machine a part of the members instead."
        )
    devices = data_mesh(config.devices)
    check_precision(config.precision, devices.devices.flat[0].device_kind)
    platform = devices.devices.flat[0].platform
    given, execution = execution, choose_execution(config, platform) if execution is None else execution
    if members_at_once is not None:
        check_count("members_at_once", members_at_once)
    if members_at_once not in (None, 1) and execution == "loop":
        raise UserError("Execution 'loop' trains one member at a time; leave out --members-at-once, or choose scan or vmap.")
    data_mesh(config.devices, config.batch_size if execution == "loop" else None)
    images = load(config.data)
    if given is None:
        execution = choose_execution(config, platform, math.prod(images.image_shape[:-1]))
    config = for_data(config, images.image_shape)
    members = grid.members(config)
    for member in members:
        check_against_data(member.config, images)
    directory = _SweepDirectory(folder, config, images, members, describe_devices(devices), start_from)
    todo = [member for member in members if not directory.is_done(member)]
    programs: dict[Config, list[GridMember]] = {}
    for member in todo:
        programs.setdefault(program_config(member.config), []).append(member)
    starts = {program: directory.start(program) for program in programs}
    stacks = {program: _stack(program, images, execution, len(own), members_at_once) for program, own in programs.items()}
    with stop_on_signals() as stop, directory, messages_shown(progress):
        log.info(
            f"{len(members) - len(todo)} of {len(members)} members done; "
            f"{images.name}: {images.sizes()}; "
            f"{describe_devices(devices)}; members executed by {execution}"
        )
        for sentence in dict.fromkeys(start.sentence for start in starts.values() if start is not None):
            log.info(sentence)
        total = steps_through(config.epochs, len(images.train), config.batch_size) * config.batch_size
        done = sum(max(directory.saved_steps(member), default=0) for member in todo) * config.batch_size
        with ProgressBar(total * len(todo), done, progress) as bar:
            every = with_own(callbacks, bar)
            for program, own in programs.items():
                _train_all(directory, program, images, execution, own, stacks[program], starts[program], bar, every, stop)
        finished = [member.name for member in members if directory.is_finished(member)]
        failed = {member.name: error for member in members if (error := directory.failure(member)) is not None}
        return SweepResult(folder, finished, failed)


def _mesh(config: Config, members: int) -> Mesh:
    return sweep_mesh(config.devices, members, config.batch_size, config.gradient_accumulation)


def _stack(
    config: Config, images: ImageSet, execution: Execution, members: int, at_once: int | None
) -> tuple[int, dict[int, Any]]:
    """As many members as fit into memory, at most `at_once`, spread evenly over the turns; the programs compiled to see that.

    Raises:
      UserError: fewer fit than were asked for, or not one does.
    """
    if execution == "loop":
        return 1, {}
    compiled = {}

    @functools.cache
    def needed(size: int) -> int:
        program = Program(config, images, _mesh(config, size), execution, size)
        needed_bytes = program.needed_bytes(size)
        compiled[size] = program.compiled
        return needed_bytes

    def plan(size: int) -> tuple[int, int]:
        """Size of the turns, made even, and the memory that the largest and the last of them need."""
        turns = -(-members // size)
        size = -(-members // turns)
        return size, max(needed(size), needed(members - size * (turns - 1)))

    def available(size: int) -> int:
        """Memory of each device that so many members use: fewer CPU devices have a larger share each."""
        return available_bytes(_mesh(config, size))

    size, bytes_needed = wanted, wanted_bytes = plan(members if at_once is None else min(members, at_once))
    while bytes_needed > available(size) and size > 1:  # the compiler has the last word on each guess
        size, bytes_needed = plan(max(1, min(size - 1, int(size * available(size) / bytes_needed))))
    if bytes_needed > available(size):
        raise UserError(
            f"Not one member fits into the memory of a device: it needs {bytes_needed / 2**20:,.1f} MiB of "
            f"{available(size) / 2**20:,.1f} MiB. Use a smaller batch_size or network."
        )
    if at_once is not None and size < wanted:
        raise UserError(
            f"{wanted} members at once do not fit into the memory of a device, {size} do: they need "
            f"{wanted_bytes / 2**20:,.1f} MiB of {available(wanted) / 2**20:,.1f} MiB. Give --members-at-once {size}, or leave "
            "it out."
        )
    return size, compiled


def _train_all(
    directory: "_SweepDirectory",
    config: Config,
    images: ImageSet,
    execution: Execution,
    members: Sequence[GridMember],
    stack: tuple[int, dict[int, Any]],
    start: Start | None,
    bar: ProgressBar,
    callbacks: Sequence[Callback],
    stop: Stop,
) -> None:
    """All members of one program, a stack at a time."""
    size, compiled = stack
    waiting, program, compiled_for = list(members), None, 0
    while waiting:
        at, turn = _next_turn(directory, waiting, size)
        if program is None or (execution != "loop" and len(turn) != compiled_for):
            mesh = data_mesh(config.devices) if execution == "loop" else _mesh(config, len(turn))
            program, compiled_for = Program(config, images, mesh, execution, len(turn)), len(turn)
            if compiled.get(compiled_for) is not None:
                program.use(compiled[compiled_for])
        bar.describe(turn[0].name if len(turn) == 1 else f"{len(turn)} members from {turn[0].name}")
        try:
            _train_turn(directory, program, turn, at, start, callbacks, stop)
        except DamagedCheckpointError as error:  # moved aside, so the next look finds an earlier one
            log.warning(f"{error} Continuing from an earlier checkpoint.")
            continue
        except DivergenceError:
            pass  # recorded in the folder of every member of the turn
        for member in turn:
            if (failure := directory.failure(member)) is not None:
                log.warning(f"{member.name} diverged and is left out (delete its folder to try again). {failure}")
        waiting = [member for member in waiting if member not in turn]
        if waiting:
            stop.check(f"stopped before {waiting[0].name}")


def _next_turn(directory: "_SweepDirectory", waiting: Sequence[GridMember], size: int) -> tuple[int | None, list[GridMember]]:
    """Members to train next, all of one step, and the step (None: the beginning). Those begun before come first."""
    steps = {member.name: directory.saved_steps(member) for member in waiting}
    begun = [member for member in waiting if steps[member.name]][:size]
    if not begun:
        return None, list(waiting[:size])
    # A kill while the members of a stack were being saved leaves some one checkpoint ahead of the others.
    common = set.intersection(*(set(steps[member.name]) for member in begun))
    if common:
        return max(common), begun
    at = max(steps[begun[0].name])
    return at, [member for member in begun if at in steps[member.name]]


def _train_turn(
    directory: "_SweepDirectory",
    program: Program,
    turn: Sequence[GridMember],
    at: int | None,
    start: Start | None,
    callbacks: Sequence[Callback],
    stop: Stop,
) -> None:
    with contextlib.ExitStack() as runs:
        members = [
            Member(own.config, runs.enter_context(RunDirectory(directory.member(own), own.config, program.images, start=start)))
            for own in turn
        ]
        keys = program.pack([jax.random.fold_in(make_key(own.config.seed), 0x70696373) for own in turn])

        images = program.images.holds_images

        def pictures(state: TrainState) -> Callable[[int, SplitScores], None]:
            galleries = list(
                draw_members(
                    program.model,
                    state.variables(),
                    program.images.examples("test", program.config.classes, PICTURES),
                    keys,
                    len(turn),
                    mesh=program.mesh,
                    execution=program.execution,
                    clip=images,
                )
            )
            return lambda member, scores: write_pictures(
                members[member].run.folder, galleries[member], scores.latent_rate, images
            )

        Trainer(program, members, callbacks, stop, pictures).train(at)


class _SweepDirectory:
    """The folder of a sweep while it trains."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        images: ImageSet,
        members: Sequence[GridMember],
        devices: str = "",
        start_from: str | Path | None = None,
    ):
        """Looks at the folder, and writes nothing before it is entered; `devices` are noted there.

        Raises:
          UserError: it holds another sweep or something else, or there is no run at `start_from`.
        """
        self.folder, self._config, self._images, self._devices = folder, config, images, devices
        self._wanted, info = [member.name for member in members], None
        self._source: Source | None = None
        check_place(folder, "choose another --workdir")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; --workdir must name a folder.")
        if is_used(folder):
            if not (folder / "sweep.json").is_file():
                raise UserError(f"{folder} is not empty and not a sweep of bsvae; choose another --workdir.")
            info = read_sweep(folder)
            changed = configs.changes(info.config, base_config(config))
            if {change.partition(":")[0] for change in changed} - {"epochs"}:
                raise UserError(
                    f"{folder} holds a sweep of another config ({'; '.join(changed)}). Choose another --workdir or that "
                    "config; a sweep that goes on may change epochs."
                )
            if changed and (left := [name for name in info.members if name not in self._wanted]):
                raise UserError(
                    f"{folder} goes on with all its members ({'; '.join(changed)}), and {left[0]} is none of these. Give lists "
                    "with all of them, or another --workdir."
                )
            if info.fingerprint != images.fingerprint(config.classes):
                raise UserError(f"{folder} was trained on other images of {images.name}; choose another --workdir.")
            for member in members:
                if self._has_begun(member):
                    self._check(member)
        self._begin_from(start_from, info, members)

    def _has_begun(self, member: GridMember) -> bool:
        return (self.member(member) / "config.json").is_file()

    def _check(self, member: GridMember) -> None:
        """Raise a UserError if the run of a member that has begun cannot become what is wanted."""
        folder = self.member(member)
        info = read_info(folder, member.config)
        check_same_data(folder, info, self._images)
        if configs.changes(info.config, member.config):
            step = max(self.saved_steps(member), default=0)
            check_change(folder, info.config, member.config, step, len(self._images.train), ("epochs",))

    def _begin_from(self, start_from: str | Path | None, info: SweepInfo | None, members: Sequence[GridMember]) -> None:
        """Find the run with whose weights members begin; not needed, and it may be gone, once all have begun."""
        if info is not None and start_from is not None:
            check_beginning(self.folder, info.started_from, start_from)
        self.started_from = None if info is None else info.started_from
        place = start_from if self.started_from is None else self.started_from["workdir"]
        if place is not None and not all(map(self._has_begun, members)):
            source = read_source(place, self.folder, self._config)
            if self.started_from is not None and self.started_from["sha256"] != source.record["sha256"]:
                raise UserError(
                    f"{source.name} has other weights than at step {self.started_from['step']}, when {self.folder} began from "
                    "it. Choose another --workdir for new members."
                )
            self._source, self.started_from = source, source.record

    def start(self, program: Config) -> Start | None:
        """What members of this `program_config` begin with, None where that is drawn from their seeds.

        Raises:
          UserError: nothing fits.
        """
        return None if self._source is None else start_with(self._source, program, self._images)

    def _description(self, members: list[str], before: "SweepInfo | None") -> dict[str, Any]:
        images = self._images
        spectrum = images.spectrum(self._config.classes) if before is None else before.eigenvalues
        return {
            "format": FORMAT,
            "config": configs.to_dict(base_config(self._config)),
            "data": {
                "name": images.name,
                "fingerprint": images.fingerprint(self._config.classes),
                "image_shape": images.image_shape,
                "levels": images.levels,
                "covariance_eigenvalues": None if spectrum is None else spectrum.tolist(),
            },
            "members": members,
            **({} if self.started_from is None else {"started_from": self.started_from}),
            "calls": [call._asdict() for call in [*(before.calls if before else ()), Call.now(self._devices)]],
        }

    def __enter__(self) -> "_SweepDirectory":
        """Make the folder, keep others out and note which members are wanted.

        Raises:
          UserError: another process is sweeping there, or it cannot be written.
        """
        folder = self.folder
        self._lock = take_folder(folder, "sweeping")
        info = read_sweep(folder) if (folder / "sweep.json").is_file() else None  # once more, now that it stays
        before = [] if info is None else info.members
        names = [*before, *(name for name in self._wanted if name not in before)]
        if names != before or (info is not None and configs.changes(info.config, base_config(self._config))):
            write_json(folder / "sweep.json", self._description(names, info), indent=None)
        return self

    def __exit__(self, *exception: object) -> None:
        """Let others in."""
        self._lock.close()

    def member(self, member: GridMember) -> Path:
        """Folder of a member."""
        return self.folder / "members" / member.name

    def saved_steps(self, member: GridMember) -> list[int]:
        """Steps with a checkpoint."""
        return saved_steps(self.member(member) / "checkpoints")

    def is_finished(self, member: GridMember) -> bool:
        """Whether its last step, or that where a callback stopped it, is evaluated and drawn."""
        folder = self.member(member)
        step = steps_through(member.config.epochs, len(self._images.train), member.config.batch_size)
        if read_stopped(folder) is not None and not configs.changes(read_info(folder, member.config).config, member.config):
            step = final_step(folder, step)  # with more epochs it goes on
        evaluated = set(evaluation_at(folder, step))
        return (folder / "pictures.npz").is_file() and evaluated == set(self._images.splits)

    def failure(self, member: GridMember) -> str | None:
        """Why it diverged."""
        return read_failure(self.member(member))

    def is_done(self, member: GridMember) -> bool:
        """Finished, or known to diverge."""
        return self.is_finished(member) or self.failure(member) is not None
