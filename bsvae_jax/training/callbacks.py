"""Callbacks: what is done beside training, at its start, its rows of metrics, its evaluations, its checkpoints and its end.

Derive from `Callback` and give an instance to `fit` or `fit_sweep`. The progress bar and TensorBoard are callbacks that both
add themselves; `EarlyStopping` and `WandbTracker` are for whoever asks.
"""

import contextlib
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bsvae_jax import config as configs
from bsvae_jax._io.files import write_atomically
from bsvae_jax._io.terminal import ProgressBar, log
from bsvae_jax.config import Config
from bsvae_jax.errors import BsvaeError, UserError, check_choice, check_count, check_kind, check_number
from bsvae_jax.evaluation.metrics import Report
from bsvae_jax.training.step import LOG_EVERY

Row = dict[str, Any]
"""A row of `metrics.jsonl`: `step`, `epoch`, `split` and the terms in nats per example, plain Python numbers.

Terms of training are means over `steps` steps, of which the last is `step`; `beta` is the weight of the rate in the objective,
of held-out rows that at which a schedule arrives."""
PLACE = ("step", "steps", "epoch", "split")
"""What of a row is no term."""

Answer = str | bool | None
"""What a hook returns: a sentence that says why training is to stop (or True), None to go on."""


class Run(NamedTuple):
    """The run that a hook is told about."""

    name: str
    """Of the workdir's last part; in a sweep, of the member."""
    workdir: Path
    config: Config
    step: int
    """Steps taken before this call, 0 for a new run."""
    total_steps: int


class CallbackError(BsvaeError):
    """A callback raised an error; the run was saved first, and the same call continues it. `__cause__` is what was raised.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> class Broken(bv.Callback):
    ...     def on_evaluation(self, run, row):
    ...         raise ValueError("no network")
    >>> config = bv.Config(network=bv.config.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     try:
    ...         _ = bv.fit(config, folder, progress=False, callbacks=[Broken()])
    ...     except bv.CallbackError as error:
    ...         print(str(error)[:65])
    Broken.on_evaluation raised ValueError: no network. The run is sa
    """


class Callback:
    """Base of callbacks: every hook does nothing, so override those that are wanted.

    Hooks are called in the primary process only, between two steps, with plain Python values. Any hook but `on_end` may return
    a sentence that says why to stop (or True): the run then ends at the next row of metrics, evaluated and saved like one that
    reached its last step, and `stopped.json` in its folder says why. The same call returns it as it is; without that file, it
    trains on. Of several members trained at once only the one asked about stops. An instance given to `fit_sweep` serves all
    members: keep what belongs to one of them by `run.name`.

    A hook that raises an error ends training as well, after the run is saved (`CallbackError`).

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> class Printer(bv.Callback):
    ...     def on_evaluation(self, run, row):
    ...         print(run.name, row["step"], row["split"])
    >>> config = bv.Config(network=bv.config.MLP((8,)), latent_size=2, epochs=2, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, Path(folder) / "run", progress=False, callbacks=[Printer()])
    run 3 validation
    run 6 validation
    """

    def on_start(self, run: Run, history: Sequence[Row]) -> Answer:
        """Called before the first step; `history` has the rows up to `run.step`, empty for a new run."""

    def on_steps(self, run: Run, step: int, metrics: Mapping[str, float]) -> Answer:
        """Called after every compiled call of one or more steps; `metrics` are the terms of the step `step` alone."""

    def on_metrics(self, run: Run, row: Row) -> Answer:
        """Called with every row of training metrics, of 50 steps or the rest of an epoch, and its `images_per_second`."""

    def on_evaluation(self, run: Run, row: Row) -> Answer:
        """Called with every row of held-out terms, of the images for validation where there are such."""

    def on_checkpoint(self, run: Run, step: int) -> Answer:
        """Called when the checkpoint of `step` is being written."""

    def on_end(self, run: Run, report: Report) -> None:
        """Called last, also after an error; `report` is empty where the run has not come to its end."""


class Callbacks:
    """Several callbacks as one, and the first error among them."""

    def __init__(self, callbacks: Sequence[Callback]):
        """They are called in this order.

        Raises:
          UserError: one is no `Callback`, or they are no sequence.
        """
        check_kind("callbacks", callbacks, Sequence, "give a list, callbacks=[...]")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                hint = ", not the class" if isinstance(callback, type) else ""
                raise UserError(
                    f"callbacks must be instances of classes derived from bsvae_jax.Callback{hint}; got {callback!r}."
                )
        self._callbacks = callbacks
        self.error: tuple[str, Exception] | None = None
        """Which hook of which callback raised what."""

    def call(self, hook: str, run: Run, *values: Any) -> str | None:
        """Call a hook of all of them; why to stop, where one asks for it."""
        reason = None
        for callback in self._callbacks:
            name = type(callback).__name__
            try:
                answer = getattr(callback, hook)(run, *values)
            except Exception as error:  # kept until the run is saved, and raised then
                self.error = self.error or (f"{name}.{hook}", error)
                continue
            if answer and reason is None:
                reason = f"{name} asked for it" if answer is True else f"{name}: {answer}"
        return reason

    def raise_error(self, saved: str) -> None:
        """Raise what a callback raised, where one did; `saved` says what became of the run."""
        if self.error is not None:
            hook, cause = self.error
            raise CallbackError(f"{hook} raised {type(cause).__name__}: {cause}. {saved}") from cause


class StartWatch(Callback):
    """Warns of a run whose rate explodes in its first steps, which costs it a thousand more.

    A rate of 6 nats per latent tells 2^9 values of it apart. A network whose first log-variances are that far from those of
    the prior has gradients that Adam's second moments remember long after, so that its steps stay small. Of three starts of the
    paper's network with 0.3, 1.2 and 8 nats per latent, the last was 80 nats behind after 1,407 steps. With its gradient
    clipped it was not behind at step 469; a warm-up did not help (tests/benchmarks/training_parity.py), nor did clipping one
    of 11 nats per latent with batches of 512 (configs/mnist_paper.py).
    """

    NATS_PER_LATENT = 6.0

    def on_metrics(self, run: Run, row: Row) -> None:
        """Look at the first row."""
        first = row["epoch"] == 1 and row["step"] <= LOG_EVERY
        per_latent = (row["rate"] or 0.0) / run.config.latent_size
        if first and per_latent > self.NATS_PER_LATENT:
            log.warning(
                f"{run.name}: the rate of the first {row['step']} steps is {row['rate']:.0f} nats, {per_latent:.0f} of each "
                "latent: training begins badly. What may help: optimizer.gradient_clip at twice the gradient_norm that "
                "later steps have in metrics.jsonl; smaller initial weights of the layer that gives the posterior."
            )


class Progress(Callback):
    """The progress bar: images of all runs together, and the newest terms where one run trains alone."""

    def __init__(self, bar: ProgressBar):
        """`bar` counts the images of all runs that are trained, from those trained before."""
        self._bar = bar
        self._reached: dict[str, int] = {}

    def on_start(self, run: Run, history: Sequence[Row]) -> None:
        """Count from here."""
        self._reached[run.name] = run.step

    def on_steps(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar."""
        self._advance(run, step)
        if len(self._reached) == 1:
            self._bar.show(**{name: f"{metrics[name]:.1f}" for name in ("objective", "distortion", "rate")})

    def on_evaluation(self, run: Run, row: Row) -> None:
        """Show the held-out objective."""
        if len(self._reached) == 1:
            self._bar.show(**{row["split"]: f"{row['objective']:.1f}"})

    def on_end(self, run: Run, report: Report) -> None:
        """A run that stopped early has no images left to come."""
        if report:
            self._advance(run, run.total_steps)
        self._reached.pop(run.name, None)

    def _advance(self, run: Run, step: int) -> None:
        self._bar.update((step - self._reached[run.name]) * run.config.batch_size)
        self._reached[run.name] = step


class TensorBoard(Callback):
    """Writes every row as TensorBoard events into `tensorboard/` of the workdir.

    Events of a run that was cut off and repeats steps replace those from before. A disk that takes no events is warned of once
    and ends nothing: `metrics.jsonl` is the record that lasts. (Not `tensorboardX.SummaryWriter`, whose thread dies of a full
    disk and leaves a queue that blocks training once it is full; this is the writer that its thread calls.)
    """

    FLUSH_EVERY = 10.0
    """Seconds between two writes to the disk."""

    def __init__(self) -> None:
        """Files are opened with the first row of each run."""
        self._writers: dict[str, Any] = {}
        self._flushed: dict[str, float] = {}
        self._given_up: set[str] = set()

    def on_metrics(self, run: Run, row: Row) -> None:
        """Write the row."""
        if run.name in self._given_up:
            return
        try:
            self._write(run, row)
        except OSError as error:
            self._give_up(run, error)

    on_evaluation = on_metrics

    def on_end(self, run: Run, report: Report) -> None:
        """Close the file."""
        writer = self._writers.pop(run.name, None)
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._give_up(run, error)
        self._given_up.discard(run.name)

    def _write(self, run: Run, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        values = [Summary.Value(tag=name, simple_value=value) for name, value in named_values(row).items()]
        events = [Event(step=row["step"], summary=Summary(value=values))]
        writer = self._writers.get(run.name)
        if writer is None:
            folder = run.workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            writer = self._writers[run.name] = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"))
            # Of earlier files, TensorBoard drops what they have from this step on.
            start = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(step=run.step + 1, session_log=start), *events]
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        if time.monotonic() - self._flushed.get(run.name, -math.inf) >= self.FLUSH_EVERY:
            writer.flush()
            self._flushed[run.name] = time.monotonic()

    def _give_up(self, run: Run, error: OSError) -> None:
        why = error.strerror or error
        log.warning(f"TensorBoard events could not be written ({why}); metrics.jsonl has the numbers.")
        self._given_up.add(run.name)
        writer = self._writers.pop(run.name, None)
        if writer is not None:
            with contextlib.suppress(OSError):  # what it holds back does not fit either
                writer.close()


class EarlyStopping(Callback):
    """Stops a run whose held-out objective has not improved for some evaluations.

    A run that was interrupted and goes on remembers the evaluations before. `restore(workdir, "best")` has the best one. With
    a target rate, whose objectives do not compare, give another term.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> config = bv.Config(network=bv.config.MLP((8,)), latent_size=2, epochs=9, batch_size=500, devices=1)
    >>> stopping = bv.EarlyStopping(patience=2, min_improvement=1000.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     int(bv.fit(config, folder, progress=False, callbacks=[stopping]).state.step)  # 3 an epoch
    9
    """

    def __init__(self, patience: int, min_improvement: float = 0.0, term: str = "objective"):
        """Evaluations are `Config.evaluate_every` epochs apart.

        Args:
          patience: the run ends with so many evaluations in a row without an improvement.
          min_improvement: decrease that counts as one, in the term's unit (nats per example for most), >= 0.
          term: of the rows of held-out terms: `objective`, `distortion`, `rate` or `mse`.

        Raises:
          UserError: a value out of range.
        """
        check_count("patience", patience)
        check_number("min_improvement", min_improvement, low=0.0)
        check_choice("term", term, ("objective", "distortion", "rate", "mse"))
        self.patience, self.min_improvement, self.term = patience, min_improvement, term
        self._best: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def on_start(self, run: Run, history: Sequence[Row]) -> Answer:
        """Take in the evaluations before."""
        if self.term == "objective" and run.config.beta_schedule.has_multiplier:
            raise UserError(
                f"EarlyStopping follows the objective, whose beta a {run.config.beta_schedule.label} changes, so that two of "
                "them do not compare; give it term='distortion'."
            )
        self._best[run.name], self._count[run.name] = math.inf, 0
        answers = [self.on_evaluation(run, row) for row in history if row["split"] != "train"]
        return answers[-1] if answers else None

    def on_evaluation(self, run: Run, row: Row) -> Answer:
        """Compare with the best before."""
        if row[self.term] < self._best[run.name] - self.min_improvement:
            self._best[run.name], self._count[run.name] = row[self.term], 0
            return None
        self._count[run.name] += 1
        if self._count[run.name] < self.patience:
            return None
        return f"the held-out {self.term} has not improved for {self._count[run.name]} evaluations"


class WandbTracker(Callback):
    """Sends every row to Weights & Biases, one run there for each run here; `pip install 'bsvae_jax[wandb]'`.

    The config is sent at the start, the numbers of the final evaluation at the end. A run that is continued continues there.

    >>> issubclass(WandbTracker, Callback)
    True
    """

    def __init__(self, project: str = "bsvae_jax", **options: Any):
        """`options` go to `wandb.init`: `entity=`, `group=`, `mode="offline"` and the like.

        Raises:
          UserError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("WandbTracker needs the package wandb: pip install 'bsvae_jax[wandb]'.") from error
        self._wandb, self._options = wandb, {"project": project} | options
        self._runs: dict[str, Any] = {}

    def on_start(self, run: Run, history: Sequence[Row]) -> None:
        """Begin a run there, or continue the one of this workdir."""
        known = run.workdir / "wandb" / "run_id.txt"
        known.parent.mkdir(exist_ok=True)
        if not known.is_file():
            write_atomically(known, secrets.token_hex(4).encode())
        settings = {"name": run.name, "dir": str(run.workdir), "reinit": "create_new", "resume": "allow"} | self._options
        self._runs[run.name] = self._wandb.init(id=known.read_text(), config=configs.to_dict(run.config), **settings)

    def on_metrics(self, run: Run, row: Row) -> None:
        """Send the row."""
        self._runs[run.name].log(named_values(row), step=row["step"])

    on_evaluation = on_metrics

    def on_end(self, run: Run, report: Report) -> None:
        """Send the final evaluation and close the run there, as failed where it has not come to its end."""
        if (tracked := self._runs.pop(run.name, None)) is not None:
            for split, quantities in report.items():
                tracked.summary.update({f"final/{split}/{name}": quantity.value for name, quantity in quantities.items()})
            tracked.finish(exit_code=0 if report else 1)


def named_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names that trackers show, `split/term`; those that are missing are left out.

    >>> named_values({"step": 3, "epoch": 1, "split": "test", "rate": 2.0, "mse": None})
    {'test/rate': 2.0}
    """
    terms = {name: value for name, value in row.items() if name not in PLACE and value is not None}
    return {f"{row['split']}/{name}": value for name, value in terms.items()}


def with_own(callbacks: Sequence[Callback], bar: ProgressBar) -> list[Callback]:
    """Those that every run has, before those of the user."""
    return [TensorBoard(), StartWatch(), Progress(bar), *callbacks]
