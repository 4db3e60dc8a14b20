"""The trainer: drives one run, or several members of a sweep at once, to their last step, and `fit`, which does a whole run.

`Program` is what is compiled and what lies on the devices; `Trainer` is the loop that reports, evaluates and saves.
"""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bsvae_jax import objective
from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet, ShuffledOrder, load
from bsvae_jax.data.order import steps_through
from bsvae_jax.errors import DivergenceError
from bsvae_jax.parallel import (
    DATA_AXIS,
    MEMBER_AXIS,
    REPLICATED,
    Driving,
    P,
    data_mesh,
    describe_devices,
    lift,
    member_slots,
    replicate,
    stack,
)
from bsvae_jax.rundir import ProgressBar, RunDirectory, evaluation_at, write_evaluation
from bsvae_jax.scoring import EVALUATION_BATCH, SplitScores, calibrate, score_members, split_key
from bsvae_jax.summary import Report, summarize
from bsvae_jax.training import (
    LOG_EVERY,
    StepMetrics,
    TrainState,
    build_knobs,
    build_model,
    check_against_data,
    create_state,
    learning_rate_schedule,
    run_steps,
    steps_per_dispatch,
)


def program_config(config: Config) -> Config:
    """The config with a fixed value for every number that a compiled program takes as an array.

    Configs that agree in it can be trained by one program.
    """
    model = config.decoder_variance
    return dataclasses.replace(
        config,
        beta=1.0,
        seed=0,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
        decoder_variance=objective.Constant() if isinstance(model, objective.Constant) else model,
    )


class Program:
    """The compiled programs of one model, or of a stack of models that differ only in numbers, with the data they run on."""

    def __init__(self, config: Config, images: ImageSet, mesh: Mesh, driving: Driving = "loop"):
        """Of all members whose `program_config` is that of `config`; compiled at the first use.

        Args:
          config: of any member.
          images: the data.
          mesh: of `data_mesh` for driving 'loop', else of `sweep_mesh`.
          driving: 'loop' for one model at a time; 'scan' or 'vmap' for a stack.
        """
        self.config, self.images, self.mesh, self.driving = program_config(config), images, mesh, driving
        self.total = steps_through(config.epochs, len(images.train), config.batch_size)
        self.model = build_model(self.config, images.image_shape, images.step, DATA_AXIS)
        self.splits: dict[str, Array] = {
            "train": replicate(images.train, mesh),
            "test": replicate(images.test, mesh),
        }
        self.window = steps_per_dispatch(config, mesh.devices.flat[0].platform)
        self._run_steps: Any = lift(
            functools.partial(run_steps, levels=images.levels, augmentation=config.augmentation),
            mesh,
            (REPLICATED, REPLICATED, P(None, DATA_AXIS), REPLICATED, REPLICATED),
            REPLICATED,
            donate=(0,),
            driving=driving,
            shared=(1, 3),
        )

    def pack(self, trees: Sequence[Any]) -> Any:
        """The arrays of all members in the form in which they are driven; never aliases them."""
        return replicate(trees[0], self.mesh) if self.driving == "loop" else stack(list(trees), self.mesh)

    def unpack(self, tree: Any, members: int) -> list[Any]:
        """The arrays of each member, the inverse of `pack`."""
        if self.driving == "loop":
            return [tree]
        host = jax.device_get(tree)
        return [jax.tree.map(lambda leaf: jnp.asarray(leaf[member]), host) for member in range(members)]  # noqa: B023

    def take_steps(self, state: TrainState, order: Any, count: int, knobs: Any) -> tuple[TrainState, StepMetrics]:
        """The first `count` steps of the window `order`; the state's memory is reused."""
        return self._run_steps(state, self.splits["train"], order, jnp.int32(count), knobs)

    def needed_bytes(self, members: int) -> int:
        """Memory per device for training a stack of `members`, as the compiler counts it; compiles the training program.

        Arguments, results and temporary arrays, with the images of both splits. A 'vmap' needs temporary arrays for every
        member, a 'scan' for one.
        """
        sharding = NamedSharding(self.mesh, P(MEMBER_AXIS))
        slots = member_slots(self.mesh, members)
        batch = jax.ShapeDtypeStruct((self.window, self.config.batch_size), jnp.int32)
        one = jax.eval_shape(lambda: (create_state(self.config, self.model, self.total), build_knobs(self.config)))
        state, knobs, order = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype, sharding=sharding), (*one, batch)
        )
        count = jnp.int32(self.window)
        sizes = self._run_steps.lower(state, self.splits["train"], order, count, knobs).compile().memory_analysis()
        total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return int(total + sizes.temp_size_in_bytes + self.images.test.nbytes)

    def score(self, state: TrainState, split: str, configs: Sequence[Config]) -> Iterator[SplitScores]:
        """Scores of each member on a split, with the posterior samples that every evaluation of it takes."""
        return score_members(
            self.model,
            state.variables(),
            self.splits[split],
            self.pack([split_key(config.seed, split) for config in configs]),
            [build_model(config, self.images.image_shape, self.images.step).decoder_variance for config in configs],
            levels=self.images.levels,
            mesh=self.mesh,
            batch_size=EVALUATION_BATCH,
            driving=self.driving,
        )


class Member(NamedTuple):
    """One run among those trained together."""

    config: Config
    run: RunDirectory


class Trainer:
    """Trains the members of one program from wherever their folders are to the end."""

    def __init__(self, program: Program, members: Sequence[Member], bar: ProgressBar):
        """All members stand at the same step; one member if the program's driving is 'loop'."""
        self.program, self.members, self.bar = program, members, bar
        self.configs = [member.config for member in members]
        self.failures: list[DivergenceError | None] = [None] * len(members)
        # Read back once, here: in the loop it would wait for the steps in flight.
        self.learning_rates = [
            np.asarray(jax.vmap(learning_rate_schedule(config.optimizer, program.total))(jnp.arange(program.total)))
            for config in self.configs
        ]
        self._test_scores: dict[int, list[SplitScores]] = {}

    def train(self, at: int | None = None) -> TrainState:
        """Run to the last step.

        Args:
          at: step whose checkpoints to continue from; None: the newest of the only member.

        Raises:
          DivergenceError: every member diverged. If only some do, `failures` says so and the others go on.
        """
        program = self.program
        states = [member.run.resume(create_state(member.config, program.model, program.total), at) for member in self.members]
        step = int(states[0].step)
        orders = {state_config.seed: self._order(state) for state, state_config in zip(states, self.configs, strict=True)}
        state = program.pack(states)
        del states
        knobs = program.pack([build_knobs(config) for config in self.configs])
        config, count = program.config, len(program.images.train)
        epoch = next(e for e in range(config.epochs + 1) if steps_through(e, count, config.batch_size) >= step)
        while epoch < config.epochs:
            epoch += 1
            end = steps_through(epoch, count, config.batch_size)
            state = self._epoch(state, orders, knobs, step, end, epoch)
            step = end
            if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                self._evaluate_and_save(state, step, epoch)
        return state

    def _order(self, state: TrainState) -> ShuffledOrder:
        key = jax.random.fold_in(state.key, 2**31 - 1)
        return ShuffledOrder(key, len(self.program.images.train), self.program.config.batch_size)

    def _epoch(
        self, state: TrainState, orders: dict[int, ShuffledOrder], knobs: Any, step: int, end: int, epoch: int
    ) -> TrainState:
        program = self.program
        in_flight: deque[tuple[int, int, StepMetrics]] = deque()
        rows = [_MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        while step < end or in_flight:
            # Keep the device busy with a bounded number of dispatched calls while the oldest result is fetched.
            while step < end and len(in_flight) < 2:
                count = min(program.window, end - step)
                # The whole window, whatever is left of the epoch: one program.
                windows = {seed: order(step, program.window) for seed, order in orders.items()}
                indices = program.pack([windows[config.seed] for config in self.configs])
                state, metrics = program.take_steps(state, indices, count, knobs)
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
                    self.members[member].run.log({"step": last, **row.mean(), "learning_rate": rate})
                rows = [_MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        return state

    def _going(self, values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Index and value of the members that have not diverged."""
        return ((member, value) for member, value in enumerate(values) if self.failures[member] is None)

    def _fail(self, member: int, step: int, what: str) -> None:
        run = self.members[member].run
        message = (
            f"{what} {run.last_checkpoint()} A lower --optimizer.learning-rate or --optimizer.gradient-clip 1.0 usually helps."
        )
        self.failures[member] = error = DivergenceError(message)
        run.fail(step, message)
        if None not in self.failures:
            raise error

    def _check_finite(self, member: int, values: np.ndarray, start: int) -> None:
        bad = ~np.isfinite(values).all(axis=0)
        if bad.any() and self.failures[member] is None:
            first = int(np.argmax(bad))
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(StepMetrics._fields, values[:, first], strict=True))
            self._fail(member, start + first + 1, f"Step {start + first + 1} is not finite: {terms}.")

    def _evaluate_and_save(self, state: TrainState, step: int, epoch: int) -> None:
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
            run.save(step, arrays[member], value)
            if len(self.members) == 1:
                self.bar.show(test=f"{value:.1f}")
        self._test_scores = {step: scores}

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
                "train": summarize(train_scores, config.beta, calibration),
                "test": summarize(test_scores, config.beta, calibration),
            }
            also(member, test_scores)
            write_evaluation(run.folder, step, reports[member])
        return reports


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

    def mean(self) -> dict[str, Any]:
        means = np.concatenate(self._values, axis=1).mean(axis=1, dtype=np.float64)
        rate = self.steps * self.batch_size / max(time.perf_counter() - self._start, 1e-9)
        named = dict(zip(StepMetrics._fields, map(float, means), strict=True))
        return {"epoch": self.epoch, "split": "train", **named, "images_per_second": rate}


# --- fit --------------------------------------------------------------------------------------------------------------


class FitResult(NamedTuple):
    """A finished run."""

    state: TrainState
    images: ImageSet
    workdir: Path
    report: Report
    """`{split: {name: Quantity}}` of the training and the test set."""


def fit(config: Config, workdir: str | Path, progress: bool = True) -> FitResult:
    """Train as the config says, in `workdir`; continue there if a run of the same config was interrupted.

    Writes `config.json`, `metrics.jsonl` (a row per line), TensorBoard events, checkpoints, and at the end `calibration.npz`,
    the variance of the training set, and `evaluation.json`. A finished run is not trained again.

    Args:
      config: the experiment.
      workdir: a folder of this run alone.
      progress: show a progress bar and messages.

    Raises:
      UserError: before any training: the data, devices or workdir do not fit the config.
      DivergenceError: a loss or gradient is not finite; names the step, the terms and the last good checkpoint.
    """
    mesh = data_mesh(config.devices, config.batch_size)
    images = load(config.data)
    check_against_data(config, images)
    with RunDirectory(Path(workdir), config, images, progress) as run:
        program = Program(config, images, mesh)
        run.say(
            f"{images.name}: {len(images.train)} training and {len(images.test)} test images {images.image_shape}; "
            f"{config.epochs} epochs, {program.total} steps of {config.batch_size}; {describe_devices(mesh)}"
        )
        done = max(run.saved_steps(), default=0)
        with ProgressBar(program.total * config.batch_size, done * config.batch_size, progress) as bar:
            trainer = Trainer(program, [Member(config, run)], bar)
            state = trainer.train()
        report = evaluation_at(run.folder, program.total)
        if not {"train", "test"} <= set(report):
            (report,) = trainer.finish(state)
        return FitResult(state, images, run.folder, report)
