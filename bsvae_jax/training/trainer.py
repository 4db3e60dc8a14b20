"""The loop: takes one run, or several members of a sweep at once, to their last step; reports, evaluates and saves on the way.

From `fit` to the arithmetic: `fit` -> `Trainer.train` -> `Program.take_steps` -> `step.run_steps` -> `step.train_step`.
"""

import contextlib
import dataclasses
import math
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax import objective
from bsvae_jax._io.disk import check_open_files
from bsvae_jax._io.terminal import log
from bsvae_jax.config import Config
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.preemption import EVALUATING, TRAINING, Stop
from bsvae_jax.errors import DivergenceError, UserError
from bsvae_jax.evaluation.diagnosis import OFF_TARGET, diagnose
from bsvae_jax.evaluation.metrics import Report, calibrated_elbo, summarize
from bsvae_jax.evaluation.scores import SplitScores, calibrate
from bsvae_jax.training.callbacks import Callback, Callbacks, Run
from bsvae_jax.training.evaluated import evaluation_at
from bsvae_jax.training.failed_step import failing_step
from bsvae_jax.training.metrics_log import MetricsRow
from bsvae_jax.training.per_image import write_per_image
from bsvae_jax.training.program import Program
from bsvae_jax.training.state import build_hyperparameters, learning_rate_schedule
from bsvae_jax.training.step import LOG_EVERY, StepMetrics, TrainState, data_order
from bsvae_jax.training.workdir import RunDirectory

Extras = Callable[[TrainState], Callable[[int, SplitScores], None]]
"""Given the state that is evaluated, what is called with a member's index and test scores before its evaluation is written."""


@dataclasses.dataclass
class Member:
    """One run among those trained together."""

    config: Config
    run: RunDirectory
    failure: DivergenceError | None = None
    """Why it diverged."""
    report: Report | None = None
    """Of its last step, once it has taken it or a callback has stopped it."""
    skipped: int = 0
    """Steps in a row that were not finite and left out."""
    findings: set[str] = dataclasses.field(default_factory=set)
    """What was wrong with the model at the last evaluation."""


class Requests(NamedTuple):
    """Why training is to pause between two steps, in any process."""

    signaled: bool
    """A signal asks to stop."""
    asked: bool
    """A callback asks to stop a member."""
    raised: bool
    """A callback has raised an error."""


class Trainer:
    """Trains the members of one program from wherever their folders are to the end."""

    def __init__(
        self,
        program: Program,
        members: Sequence[Member],
        callbacks: Sequence[Callback],
        stop: Stop,
        extras: Extras | None = None,
    ):
        """All members stand at the same step; one member if the program's execution is 'loop'. `stop` may ask to stop.

        Raises:
          UserError: the system does not allow the files that they keep open.
        """
        check_open_files(len(members))
        self.program, self.members, self.stop, self.extras = program, members, stop, extras
        self.configs = [member.config for member in members]
        self.callbacks = Callbacks(callbacks if multihost.is_primary() else [])
        # Read back once, here: in the loop it would wait for the steps in flight.
        self.learning_rates = [
            np.asarray(jax.vmap(learning_rate_schedule(config.optimizer, program.total))(jnp.arange(program.total)))
            for config in self.configs
        ]
        self._asked: dict[int, str] = {}  # which members are to stop, and why
        self._runs: list[Run] = []

    def train(self, at: int | None = None) -> TrainState:
        """Run to the last step, or to where callbacks stop the last member, and evaluate; the state there.

        Args:
          at: step whose checkpoints to continue from; None: the newest of the only member.

        Raises:
          DivergenceError: every member diverged. If only some do, `Member.failure` says so and the others go on.
          Interrupted: a signal asked to stop; the steps in flight are finished and saved.
          CallbackError: a callback raised an error; the steps in flight are finished and saved.
          UserError: the last step could not be saved, because the disk is full or cannot be written.
        """
        program, config, count = self.program, self.program.config, len(self.program.images.train)
        # What is not finite is looked for here, and its step is kept; JAX's own check would end the run before that.
        with jax.debug_nans(False), jax.debug_infs(False), self._told_the_end():
            states = [self._begin(member, at) for member in self.members]
            step, saved = int(states[0].step), True
            orders = {
                own.seed: data_order(state, program.images, own.batch_size)
                for own, state in zip(self.configs, states, strict=True)
            }
            state, hyperparameters = program.pack(states), program.pack([build_hyperparameters(own) for own in self.configs])
            del states
            finished = next(e for e in range(config.epochs, -1, -1) if steps_through(e, count, config.batch_size) <= step)
            ends = [steps_through(e, count, config.batch_size) for e in range(finished + 1, config.epochs + 1)]
            self._start(state, step)
            self._expect(step)
            starts = _window_starts(step, ends, program.window)
            with program.batches([orders[own.seed] for own in self.configs], starts) as batches:
                for epoch, end in enumerate(ends, finished + 1):
                    while step < end and self._active():
                        state, step = self._epoch(state, batches, hyperparameters, step, end, epoch)
                        self._expect(step)
                        evaluated = step == end and (epoch % config.evaluate_every == 0 or epoch == config.epochs)
                        if evaluated:
                            saved = self._evaluate_and_save(state, step, epoch)
                        saved = self._answer(state, step, epoch, evaluated, saved)
            if not saved:
                run = next(member.run for member in self.members if member.run.unsaved)
                raise UserError(
                    f"The end of training could not be saved in {run.folder} ({run.unsaved}). Mend that and repeat the "
                    "command; it continues from the last good checkpoint."
                )
            self._finish(state, step, self._active())
        self.callbacks.raise_error("The run has come to its end.")
        return state

    def _begin(self, member: Member, at: int | None) -> TrainState:
        """The state to continue from, the primary process's in all of them."""
        new = self.program.new_state(member.config, self.program.images)
        state = multihost.on_primary(lambda: member.run.resume(new, at), new)
        return state if multihost.is_only() else state.with_arrays(multihost.from_primary(state.arrays()))

    def _start(self, state: TrainState, step: int) -> None:
        """Tell the callbacks, and finish those members that a callback has stopped here before."""
        for index, (config, run) in enumerate((member.config, member.run) for member in self.members):
            self._runs.append(Run(run.folder.name, run.folder, config, step, self.program.total))
            self._call(index, "on_start", run.history())
        stopped = [multihost.in_any_process(member.run.stopped_step() == step)[0] for member in self.members]
        self._finish(state, step, [index for index, here in enumerate(stopped) if here])
        if self._requests().raised:
            self.callbacks.raise_error("Nothing was trained.")
            raise multihost.primary_has_stopped()

    @contextlib.contextmanager
    def _told_the_end(self) -> Iterator[None]:
        """After the block, however it ends, callbacks are told so of every run whose start they were told."""
        try:
            yield
        finally:
            for member, run in zip(self.members, self._runs, strict=False):
                self.callbacks.call("on_end", run, member.report or {})

    def _active(self) -> list[int]:
        """Indices of the members that are still trained."""
        return [index for index, member in enumerate(self.members) if member.failure is None and member.report is None]

    def _epoch(
        self, state: TrainState, batches: Callable[[int], Any], hyperparameters: Any, step: int, end: int, epoch: int
    ) -> tuple[TrainState, int]:
        """To step `end`, or to the end of a row of metrics where something asks to pause; the state and its step."""
        program, begin = self.program, step
        row_steps = -(-LOG_EVERY // program.window) * program.window
        in_flight: deque[tuple[int, int, StepMetrics]] = deque()
        rows = [MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        going = True
        while going or in_flight:
            # Keep the device busy with a bounded number of dispatched calls while the oldest result is fetched.
            while going and len(in_flight) < 2:
                if step == end or ((step - begin) % row_steps == 0 and any(self._requests())):
                    going = False
                    break
                count = min(program.window, end - step)
                # The whole window, whatever is left of the epoch: one program.
                state, metrics = program.take_steps(state, batches(step), count, hyperparameters)
                step += count
                in_flight.append((step, count, metrics))
            if not in_flight:
                break
            last, count, metrics = in_flight.popleft()
            # [terms, members, steps]
            values = np.stack([np.atleast_2d(value) for value in jax.device_get(metrics)])[:, : len(self.members), :count]
            for member, row in enumerate(rows):
                self._check_finite(member, values[:, member], last - count)
                row.add(values[:, member])
            for member in self._active():
                self._call(member, "on_steps", last, rows[member].latest())
            if rows[0].steps >= LOG_EVERY or last == end:
                self._log(rows, last)
                rows = [MetricsRow(epoch, program.config.batch_size) for _ in self.members]
        return state, step

    def _log(self, rows: Sequence[MetricsRow], step: int) -> None:
        """Write a row of metrics of every member, and tell the callbacks."""
        for member in self._active():
            row = {"step": step, **rows[member].mean(), "learning_rate": float(self.learning_rates[member][step - 1])}
            self.members[member].run.log(row)
            self._call(member, "on_metrics", row | {"images_per_second": rows[member].images_per_second()})

    # --- What asks to pause -------------------------------------------------------------------------------------------

    def _expect(self, step: int) -> None:
        """What a signal is answered from this step on."""
        self.stop.expect(TRAINING if step < self.program.total else EVALUATING)

    def _call(self, member: int, hook: str, *values: Any) -> None:
        """Call a hook of all callbacks for a member, and note where one asks to stop it."""
        reason = self.callbacks.call(hook, self._runs[member], *values)
        if reason is not None:
            self._asked.setdefault(member, reason)

    def _requests(self) -> Requests:
        """What signals and callbacks ask for in any process; all of them call this at the same places."""
        own = Requests(self.stop.number is not None, bool(self._asked), self.callbacks.error is not None)
        found = Requests(*multihost.in_any_process(*own))  # what was agreed: a signal may have come in the meantime
        if found.signaled and self.stop.number is None:
            self.stop.number = signal.SIGTERM
        if found.asked and not self._asked:  # with several processes there is one member
            self._asked[0] = "a callback in process 0"
        return found

    def _answer(self, state: TrainState, step: int, epoch: int, evaluated: bool, saved: bool) -> bool:
        """Stop the members that callbacks ask to, or all of them where a signal came or a callback raised an error.

        `evaluated` says whether all are evaluated and saved at this step, `saved` whether that succeeded; returns the latter.
        """
        requests, total = self._requests(), self.program.total
        asked, self._asked = self._asked, {}
        stopping = [member for member in self._active() if member in asked]
        if stopping and step < total:
            if not evaluated:
                saved = self._evaluate_and_save(state, step, epoch, only=stopping)
            if saved and all(self.members[member].run.settle() for member in stopping):
                for member in stopping:
                    self.members[member].run.stop(step, asked[member])
                self._finish(state, step, stopping)
        if (requests.signaled or requests.raised) and not evaluated:
            saved = self._save_unevaluated(state, step)
        if step == total or requests.signaled or requests.raised:
            settled = [member.run.settle() for member in self.members]
            saved = saved and all(settled)
        if requests.raised:
            where = f"The run is saved at step {step}, and the same call continues it." if saved else "It could not be saved."
            self.callbacks.raise_error(where)
            raise multihost.primary_has_stopped()
        if requests.signaled and step < total and self._active():
            self.stop.check(f"stopped after step {step} of {total}" + ("" if saved else ", which could not be saved"))
        return saved

    # --- What is not finite -------------------------------------------------------------------------------------------

    def _check_finite(self, member: int, values: np.ndarray, start: int) -> None:
        own, allowed = self.members[member], self.configs[member].optimizer.skip_nonfinite
        bad = ~np.isfinite(values).all(axis=0)
        for first in np.flatnonzero(bad).tolist():
            before = 0 if first > 0 and not bad[first - 1] else own.skipped
            own.skipped = before + 1
            if own.skipped <= allowed:
                sentence = f"step {start + first + 1} is not finite and is left out; {allowed} in a row may be."
                own.run.warn_once("skipped", f"{sentence} metrics.jsonl counts them.")
                continue
            if member not in self._active():
                return
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(StepMetrics._fields, values[:, first], strict=True))
            self._fail_step(member, start + first + 1, f"Step {start + first + 1} is not finite: {terms}.")
            return
        if not bad[-1]:
            own.skipped = 0

    def _fail_step(self, member: int, step: int, what: str) -> None:
        """Training step `step` was not finite: it is kept, to be run again."""
        config, run = self.members[member].config, self.members[member].run

        def keep() -> str:
            log.info(f"{what} Repeating the steps since the last checkpoint, to keep the state before it.")
            file = run.save_failure(failing_step(config, self.program.images, self.program.total, step, run))
            return (
                f" {file} holds the state and the batch of that step; to run it again:\n"
                "    import jax, bsvae_jax as bv\n"
                f"    with jax.debug_nans(True): bv.train_step(*bv.failed_step({str(run.folder)!r}))"
            )

        self._fail(member, step, what, multihost.on_primary(keep, ""))

    def _fail(self, member: int, step: int, what: str, also: str = "") -> None:
        own = self.members[member]
        remedy = "A lower --optimizer.learning-rate or --optimizer.gradient-clip 1.0 usually helps."
        message = f"{what} {own.run.last_checkpoint()} {remedy}{also}"
        own.failure = DivergenceError(message)
        own.run.fail(step, message)
        if all(member.failure is not None for member in self.members):
            raise own.failure

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def _save_unevaluated(self, state: TrainState, step: int) -> bool:
        """A checkpoint between evaluations, because training is interrupted; whether all could be saved."""
        arrays = self.program.unpack(state.arrays(), len(self.members))
        saved = [self._save(member, step, arrays[member], None) for member in self._active()]
        return all(saved)

    def _save(self, member: int, step: int, arrays: Any, ranking: float | None) -> bool:
        saved = self.members[member].run.save(step, arrays, ranking)
        if saved:
            self._call(member, "on_checkpoint", step)
        return saved

    def _evaluate_and_save(self, state: TrainState, step: int, epoch: int, only: Sequence[int] | None = None) -> bool:
        """Evaluate the members that are trained, or `only` some, on held-out images, and save them; whether all could be saved.

        The images are those for validation, or those for testing where there are none.
        """
        saved, split = [], self.program.images.choosing_split
        scores = list(self.program.score(state, split, self.configs))
        arrays, betas = self.program.unpack(state.arrays(), len(self.members)), self._betas(state)
        for index in self._active() if only is None else only:
            own, config = scores[index], self.configs[index]
            member = self.members[index]
            distortion, rate = float(own.model_distortion.mean()), float(own.rate.mean())
            weight, offset = config.beta_schedule.at_end(betas[index], rate)
            value = distortion + weight * (rate - offset)
            if not math.isfinite(value):
                what = f"The held-out objective after step {step} is not finite: distortion {distortion:g}, rate {rate:g}."
                self._fail(index, step, what)
                continue
            row: dict[str, Any] = {
                "step": step,
                "epoch": epoch,
                "split": split,
                "objective": value,
                "distortion": distortion,
                "rate": rate,
                "mse": float(own.squared_error.mean() / own.pixels),
                "variance": own.model_variance,
                "beta": weight,
            }
            member.run.log(row)
            findings = self._findings(own, config, betas[index])
            for name, sentence in findings.items():
                if step == self.program.total or (name in member.findings and name != OFF_TARGET):  # what heals is none
                    member.run.warn_once(name, f"{name} after step {step}: {sentence}")
            member.findings = set(findings)
            self._call(index, "on_evaluation", row)
            saved.append(self._save(index, step, arrays[index], config.beta_schedule.ranking(value, distortion, rate)))
        return all(saved)

    def _finish(self, state: TrainState, step: int, members: Sequence[int]) -> None:
        """Write calibration and evaluation of members whose last step is `step`; what is there already is not made again."""
        images = self.program.images
        for index in members:
            own = self.members[index]
            report: Report = multihost.on_primary(lambda run=own.run: evaluation_at(run.folder, step), {})  # type: ignore[misc]
            if self.extras is None and multihost.in_any_process(set(images.splits) <= set(report))[0]:
                own.report = report
        missing = [index for index in members if self.members[index].report is None]
        if not missing:
            return
        floor, betas = objective.quantization_variance(images.bin_width), self._betas(state)
        calibrations = [calibrate(scores, step, floor) for scores in self.program.score(state, "train", self.configs)]
        scored = [self.program.score(state, split, self.configs, calibrations) for split in images.splits]
        extra = self.extras(state) if self.extras is not None else None
        for index, of_splits in enumerate(zip(*scored, strict=True)):
            if index not in missing:
                continue
            member, config, calibration = self.members[index], self.configs[index], calibrations[index]
            member.run.write_calibration(calibration)
            scores = dict(zip(images.splits, of_splits, strict=True))
            report = {
                split: summarize(of, betas[index], calibration, images.holds_images, config.beta_schedule)
                for split, of in scores.items()
            }
            if multihost.is_primary():
                write_per_image(member.run.folder, step, calibrated_elbo(scores["test"], calibration))
            if extra is not None:
                extra(index, scores["test"])
            member.run.write_evaluation(step, report, self._findings(scores["test"], config, betas[index]))
            member.report = report

    def _betas(self, state: TrainState) -> list[float]:
        """Beta of each member, times the multiplier that its schedule has come to."""
        betas = [config.beta for config in self.configs]
        if state.multiplier is None:
            return betas
        multipliers = self.program.unpack(state.multiplier, len(self.members))
        return [beta * float(multiplier) for beta, multiplier in zip(betas, multipliers, strict=True)]

    def _findings(self, scores: SplitScores, config: Config, beta: float) -> dict[str, str]:
        return diagnose(scores, config, self.program.images, beta)


def _window_starts(step: int, ends: Sequence[int], window: int) -> Iterator[int]:
    """The steps at which the windows begin: every epoch, ending at the next of `ends`, is cut from where it begins."""
    for end in ends:
        yield from range(step, end, window)
        step = end
