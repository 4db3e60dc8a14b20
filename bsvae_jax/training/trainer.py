"""The trainer: drives one run, or several members of a sweep at once, to their last step, and `fit`, which does a whole run.

`Program` is what is compiled and what lies on the devices; `Trainer` is the loop that reports, evaluates and saves.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax import objective
from bsvae_jax._io.files import as_path
from bsvae_jax._io.terminal import ProgressBar
from bsvae_jax.config import Config, to_dict
from bsvae_jax.data import ImageSet, load
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.hardware import check_precision
from bsvae_jax.distributed.lifeline import lifeline
from bsvae_jax.distributed.mesh import data_mesh, describe_devices
from bsvae_jax.distributed.preemption import Stop, stop_on_signals
from bsvae_jax.errors import DivergenceError, UserError, check_kind
from bsvae_jax.evaluation.diagnosis import diagnose
from bsvae_jax.evaluation.metrics import Report, summarize
from bsvae_jax.evaluation.scores import SplitScores, calibrate
from bsvae_jax.training.failed_step import failing_step
from bsvae_jax.training.follower import Follower
from bsvae_jax.training.program import Program
from bsvae_jax.training.step import (
    LOG_EVERY,
    StepMetrics,
    TrainState,
    build_hyperparameters,
    check_against_data,
    create_state,
    data_order,
    learning_rate_schedule,
)
from bsvae_jax.training.workdir import RunDirectory, evaluation_at, write_evaluation


class Member(NamedTuple):
    """One run among those trained together."""

    config: Config
    run: RunDirectory | Follower


class Trainer:
    """Trains the members of one program from wherever their folders are to the end."""

    def __init__(self, program: Program, members: Sequence[Member], bar: ProgressBar, stop: Stop):
        """All members stand at the same step; one member if the program's driving is 'loop'. `stop` may ask to stop."""
        self.program, self.members, self.bar, self.stop = program, members, bar, stop
        self.configs = [member.config for member in members]
        self.failures: list[DivergenceError | None] = [None] * len(members)
        # Read back once, here: in the loop it would wait for the steps in flight.
        self.learning_rates = [
            np.asarray(jax.vmap(learning_rate_schedule(config.optimizer, program.total))(jnp.arange(program.total)))
            for config in self.configs
        ]
        self._test_scores: dict[int, list[SplitScores]] = {}
        self._cut: list[_MetricsRow] = []
        self._skipped = [0] * len(members)
        self._ailing: list[set[str]] = [set() for _ in members]

    def train(self, at: int | None = None) -> TrainState:
        """Run to the last step.

        Args:
          at: step whose checkpoints to continue from; None: the newest of the only member.

        Raises:
          DivergenceError: every member diverged. If only some do, `failures` says so and the others go on.
          Interrupted: a signal asked to stop; the step in flight is finished and saved.
          UserError: the disk is full, so that the last step could not be saved.
        """
        program = self.program
        states = [self._begin(member, at) for member in self.members]
        step = int(states[0].step)
        orders = {
            state_config.seed: data_order(state, program.images, program.config.batch_size)
            for state, state_config in zip(states, self.configs, strict=True)
        }
        state = program.pack(states)
        del states
        hyperparameters = program.pack([build_hyperparameters(config) for config in self.configs])
        config, count = program.config, len(program.images.train)
        finished = next(e for e in range(config.epochs, -1, -1) if steps_through(e, count, config.batch_size) <= step)
        ends = [steps_through(e, count, config.batch_size) for e in range(finished + 1, config.epochs + 1)]
        starts = _window_starts(step, ends, program.window)
        saved = True
        with program.batches([orders[config.seed] for config in self.configs], starts) as batches:
            for epoch, end in enumerate(ends, finished + 1):
                state, step = self._epoch(state, batches, hyperparameters, step, end, epoch)
                stopping = self._stopping()
                if step == end and (epoch % config.evaluate_every == 0 or epoch == config.epochs):
                    saved = self._evaluate_and_save(state, step, epoch)
                elif stopping:
                    saved = self._save_unevaluated(state, step)
                if step == program.total or stopping:
                    settled = [member.run.settle() for member in self.members]
                    saved = saved and all(settled)
                if step < program.total and stopping:
                    self.stop.check(
                        f"stopped after step {step} of {program.total}" + ("" if saved else ", which could not be saved")
                    )
        if not saved:
            raise UserError(
                f"The disk of {self.members[0].run.folder} is full: the end of training could not be saved. "
                "Free some space and repeat the command; it continues from the last good checkpoint."
            )
        return state

    def _begin(self, member: Member, at: int | None) -> TrainState:
        """The state to continue from, the writer's in every process."""
        new = create_state(member.config, self.program.model, self.program.total, images=self.program.images)
        state = multihost.in_writer(lambda: member.run.resume(new, at), new)
        return state if multihost.alone() else state.with_arrays(multihost.from_writer(state.arrays()))

    def _stopping(self) -> bool:
        """Whether a signal has asked any process to stop; all of them ask at the same places."""
        stopping = multihost.anywhere(self.stop.number is not None)
        if stopping and self.stop.number is None:
            self.stop.number = signal.SIGTERM
        return stopping  # what was agreed: a signal may have come in the meantime

    def _epoch(
        self, state: TrainState, batches: Callable[[int], Any], hyperparameters: Any, step: int, end: int, epoch: int
    ) -> tuple[TrainState, int]:
        """To step `end`, or to where a signal asks to stop; the state and its step."""
        program = self.program
        in_flight: deque[tuple[int, int, StepMetrics]] = deque()
        rows = [_MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        for row, begun in zip(rows, self.members, strict=True):  # the beginning of a row that a signal has cut
            if (values_before := begun.run.read_row(step)) is not None:
                row.add(values_before)
        while (going := step < end and not self._stopping()) or in_flight:  # one look: a signal may come at any time
            # Keep the device busy with a bounded number of dispatched calls while the oldest result is fetched.
            while going and step < end and len(in_flight) < 2:
                count = min(program.window, end - step)
                # The whole window, whatever is left of the epoch: one program.
                state, metrics = program.take_steps(state, batches(step), count, hyperparameters)
                step += count
                in_flight.append((step, count, metrics))
            last, count, metrics = in_flight.popleft()
            # [terms, members, steps]
            values = np.stack([np.atleast_2d(value) for value in jax.device_get(metrics)])[:, : len(self.members), :count]
            for member, row in enumerate(rows):
                self._check_finite(member, values[:, member], last - count)
                row.add(values[:, member])
            self.bar.update(count * program.config.batch_size * len(self.members))
            if len(self.members) == 1:
                self.bar.show(**{name: f"{rows[0].latest()[name]:.1f}" for name in ("objective", "distortion", "rate")})
            if rows[0].steps >= LOG_EVERY or last == end:
                for member, row in self._going(rows):
                    rate = float(self.learning_rates[member][last - 1])
                    run = self.members[member].run
                    run.log({"step": last, **row.mean(), "learning_rate": rate}, images_per_second=row.images_per_second())
                rows = [_MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        self._cut = rows
        return state, step

    def _going(self, values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Index and value of the members that have not diverged."""
        return ((member, value) for member, value in enumerate(values) if self.failures[member] is None)

    def _fail_step(self, member: int, step: int, what: str) -> None:
        """Training step `step` was not finite: it is kept, to be run again."""
        config, run = self.members[member]
        if isinstance(run, Follower):
            return self._fail(member, step, what)
        run.say(f"{what} Repeating the steps since the last checkpoint, to keep the state before it.")
        file = run.save_failure(failing_step(config, self.program.images, self.program.total, step, run))
        again = (
            f" {file} holds the state and the batch of that step; to run it again:\n"
            "    import jax, bsvae_jax as bv\n"
            f"    with jax.debug_nans(True): bv.train_step(*bv.failed_step({str(run.folder)!r}))"
        )
        self._fail(member, step, what, again)

    def _fail(self, member: int, step: int, what: str, also: str = "") -> None:
        run = self.members[member].run
        remedy = "A lower --optimizer.learning-rate or --optimizer.gradient-clip 1.0 usually helps."
        message = f"{what} {run.last_checkpoint()} {remedy}{also}"
        self.failures[member] = error = DivergenceError(message)
        run.fail(step, message)
        if None not in self.failures:
            raise error

    def _check_finite(self, member: int, values: np.ndarray, start: int) -> None:
        allowed = self.configs[member].optimizer.skip_nonfinite
        bad = ~np.isfinite(values).all(axis=0)
        for first in np.flatnonzero(bad).tolist():
            before = 0 if first > 0 and not bad[first - 1] else self._skipped[member]
            self._skipped[member] = before + 1
            if self._skipped[member] <= allowed:
                sentence = f"step {start + first + 1} is not finite and is left out; {allowed} in a row may be."
                self.members[member].run.warn_once("skipped", f"{sentence} metrics.jsonl counts them.")
                continue
            if self.failures[member] is not None:
                return
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(StepMetrics._fields, values[:, first], strict=True))
            self._fail_step(member, start + first + 1, f"Step {start + first + 1} is not finite: {terms}.")
            return
        if not bad[-1]:
            self._skipped[member] = 0

    def _save_unevaluated(self, state: TrainState, step: int) -> bool:
        """A checkpoint between evaluations, because a signal asks to stop; whether all could be saved."""
        saved = []
        for member, arrays in self._going(self.program.unpack(state.arrays(), len(self.members))):
            run = self.members[member].run
            if self._cut[member].steps:
                run.save_row(step, self._cut[member].values())
            saved.append(run.save(step, arrays, None))
        return all(saved)

    def _evaluate_and_save(self, state: TrainState, step: int, epoch: int) -> bool:
        """Whether all could be saved."""
        saved = []
        scores = list(self.program.score(state, "test", self.configs))
        arrays = self.program.unpack(state.arrays(), len(self.members))
        for member, own in self._going(scores):
            config, run = self.members[member]
            distortion, rate = float(own.model_distortion.mean()), float(own.rate.mean())
            value = distortion + config.beta * rate
            if not math.isfinite(value):
                self._fail(
                    member,
                    step,
                    f"The held-out objective after step {step} is not finite: distortion {distortion:g}, rate {rate:g}.",
                )
                continue
            row: dict[str, Any] = {
                "step": step,
                "epoch": epoch,
                "split": "test",
                "objective": value,
                "distortion": distortion,
                "rate": rate,
                "mse": float(own.squared_error.mean() / own.pixels),
                "variance": own.model_variance,
            }
            run.log(row)
            findings = self._findings(own, config)
            for name, sentence in findings.items():
                if name in self._ailing[member] or step == self.program.total:  # what the next evaluation heals is none
                    run.warn_once(name, f"{name} after step {step}: {sentence}")
            self._ailing[member] = set(findings)
            saved.append(run.save(step, arrays[member], value))
            if len(self.members) == 1:
                self.bar.show(test=f"{value:.1f}")
        self._test_scores = {step: scores}
        return all(saved)

    def finish(self, state: TrainState, also: Callable[[int, SplitScores], None] = lambda member, scores: None) -> list[Report]:
        """Write calibration and evaluation of every member that has not diverged.

        Args:
          state: of the last step.
          also: called with a member's index and test scores before its evaluation is written, which marks it as finished.

        Returns:
          The report of each member; empty for those that diverged.
        """
        step = self.program.total
        test = self._test_scores.get(step) or self.program.score(state, "test", self.configs)
        floor = objective.quantization_variance(self.program.images.step)
        reports: list[Report] = [{} for _ in self.members]
        for member, (train_scores, test_scores) in enumerate(
            zip(self.program.score(state, "train", self.configs), test, strict=True)
        ):
            if self.failures[member] is not None:
                continue
            config, run = self.members[member]
            calibration = calibrate(train_scores, step, floor)
            run.write_calibration(calibration)
            reports[member] = {
                "train": summarize(train_scores, config.beta, calibration, self.program.images.holds_images),
                "test": summarize(test_scores, config.beta, calibration, self.program.images.holds_images),
            }
            also(member, test_scores)
            if multihost.is_writer():
                write_evaluation(run.folder, step, reports[member], findings=self._findings(test_scores, config))
        return reports

    def _findings(self, scores: SplitScores, config: Config) -> dict[str, str]:
        return diagnose(scores, config, self.program.images)


def _window_starts(step: int, ends: Sequence[int], window: int) -> Iterator[int]:
    """The steps at which the windows begin: every epoch, ending at the next of `ends`, is cut from where it begins."""
    for end in ends:
        yield from range(step, end, window)
        step = end


class _MetricsRow:
    """Averages of the steps since the last row."""

    def __init__(self, epoch: int, batch_size: int):
        self.epoch, self.batch_size, self.steps = epoch, batch_size, 0
        self._values: list[np.ndarray] = []
        self._start = time.perf_counter()

    def add(self, values: np.ndarray) -> None:
        self._values.append(values)
        self.steps += values.shape[1]

    def latest(self) -> dict[str, float]:
        return dict(zip(StepMetrics._fields, map(float, self._values[-1][:, -1]), strict=True))

    def values(self) -> np.ndarray:
        return np.concatenate(self._values, axis=1)

    def mean(self) -> dict[str, Any]:
        values = self.values()
        finite = np.isfinite(values).all(axis=0)  # others were left out of training as well
        # A row of nothing but such steps has no means; null is JSON's word for that.
        means = values[:, finite].mean(axis=1, dtype=np.float64) if finite.any() else [None] * len(values)
        named = {name: None if mean is None else float(mean) for name, mean in zip(StepMetrics._fields, means, strict=True)}
        skipped = {} if finite.all() else {"skipped_steps": int((~finite).sum())}
        return {"epoch": self.epoch, "split": "train", **named, **skipped}

    def images_per_second(self) -> float:
        return self.steps * self.batch_size / max(time.perf_counter() - self._start, 1e-9)


# --- fit --------------------------------------------------------------------------------------------------------------


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
    """After the last step, on all the devices of the run."""
    images: ImageSet
    """What it was trained and evaluated on."""
    workdir: Path
    report: Report
    """`{split: {name: Quantity}}` of the training and the test set."""


def _check_agreement(config: Config) -> None:
    """Before anything is computed, every process has the same config and the same program."""
    if multihost.alone():
        return
    if config.devices is not None:
        raise UserError("With several processes all their devices take part; leave out --devices.")
    versions = {name: version(name) for name in ("bsvae_jax", "jax", "jaxlib", "flax", "optax", "numpy")}
    multihost.check_agreement("versions of the libraries", versions, "Install the same everywhere.")
    multihost.check_agreement("config", to_dict(config), "Give every process the same command.")


def fit(config: Config, workdir: str | Path, progress: bool = True) -> FitResult:
    """Train as the config says, in `workdir`; continue there if a run of the same config was interrupted.

    Writes `config.json`, `metrics.jsonl` (a row per line), TensorBoard events, checkpoints, and at the end `calibration.npz`,
    the variance of the training set, and `evaluation.json`. A finished run is not trained again.

    Args:
      config: the experiment.
      workdir: a folder of this run alone; with several processes (`hosts.join`), that of process 0 only. If one of them dies,
        the others say so and end, with status 1: they wait for it in the middle of a step.
      progress: show a progress bar and messages.

    >>> import tempfile
    >>> from bsvae_jax.config import MLP
    >>> config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fit(config, folder, progress=False)
    ...     sorted(path.name for path in Path(folder).glob("*.json"))
    ['config.json', 'evaluation.json']

    Raises:
      UserError: before any training: the data, devices or workdir do not fit the config, or the processes do not agree; or at
        its end: the disk is full.
      DivergenceError: a loss, gradient or held-out objective is not finite; names the step, the terms and the last good
        checkpoint.
      Interrupted: SIGINT or SIGTERM; the step in flight was finished and saved, the same call continues after it.
    """
    check_kind("config", config, Config, "load_config(path) reads one from a file")
    folder = as_path(workdir, "workdir")
    with lifeline():
        return _fit(config, folder, progress)


def _fit(config: Config, folder: Path, progress: bool) -> FitResult:
    _check_agreement(config)
    mesh = data_mesh(config.devices, config.batch_size, config.gradient_accumulation)
    check_precision(config.precision, mesh.devices.flat[0].device_kind)
    images = load(config.data)
    check_against_data(config, images)
    multihost.check_agreement("images", {"fingerprint": images.fingerprint()}, "Give every process the same data.")
    progress = progress and multihost.is_writer()
    follower: RunDirectory | Follower = Follower(folder)
    opened = multihost.in_writer(lambda: RunDirectory(folder, config, images, progress), follower)
    with stop_on_signals() as stop, opened as run:
        program = Program(config, images, mesh)
        run.say(
            f"{images.name}: {len(images.train)} training and {len(images.test)} test images {images.image_shape}; "
            f"{config.epochs} epochs, {program.total} steps of {config.batch_size}; {describe_devices(mesh)}"
            + ("" if program.resident else "; images are streamed from the host")
        )
        done = max(run.saved_steps(), default=0)
        with ProgressBar(program.total * config.batch_size, done * config.batch_size, progress) as bar:
            trainer = Trainer(program, [Member(config, run)], bar, stop)
            state = trainer.train()
        nothing: Report = {}
        report = multihost.in_writer(lambda: evaluation_at(run.folder, program.total), nothing)
        if multihost.anywhere(multihost.is_writer() and not {"train", "test"} <= set(report)):
            (report,) = trainer.finish(state)
        return FitResult(state, images, run.folder, report)
