"""Training: one pure step, its loop over epochs, and `fit`, which does a whole run in a folder."""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from bsvae_jax import config as configs
from bsvae_jax import objective
from bsvae_jax.config import Config
from bsvae_jax.data import ImageSet, ShuffledOrder, augment, load
from bsvae_jax.data.order import steps_through
from bsvae_jax.data.sources import to_unit_interval
from bsvae_jax.errors import DivergenceError, UserError
from bsvae_jax.model import VAE
from bsvae_jax.parallel import DATA_AXIS, REPLICATED, P, data_mesh, describe_devices, lift, replicate
from bsvae_jax.randomness import example_keys, example_positions
from bsvae_jax.rundir import RunDirectory
from bsvae_jax.scoring import EVALUATION_BATCH, SplitScores, calibrate, score_split, split_key

LOG_EVERY = 50
"""Steps over which one training row of the metrics is averaged, at most."""


class TrainState(struct.PyTreeNode):
    """Everything that decides the future of a run. `model` and `optimizer` are static; the rest are arrays."""

    step: Array
    """Steps taken. (Shapes are not annotated: under `pmap` every leaf has a leading axis of devices.)"""
    params: Any
    batch_stats: Any
    """BatchNorm's running statistics; empty for networks without."""
    optimizer_state: Any
    ema_params: Any
    """Exponential moving average of the parameters, or None."""
    key: Array
    """Root of all randomness of the run; never changed, folded with the step."""
    model: VAE = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    ema_decay: float | None = struct.field(pytree_node=False, default=None)

    def variables(self) -> dict[str, Any]:
        """The variables to evaluate with: the averaged parameters where there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds: plain arrays only."""
        ema = {} if self.ema_params is None else self.ema_params
        return {
            "step": self.step,
            "params": self.params,
            "batch_stats": self.batch_stats,
            "optimizer_state": self.optimizer_state,
            "ema_params": ema,
            "key": jax.random.key_data(self.key),
        }

    def with_arrays(self, arrays: Mapping[str, Any]) -> "TrainState":
        """The inverse of `arrays`."""
        ema = None if self.ema_params is None else arrays["ema_params"]
        rest = {name: arrays[name] for name in ("step", "params", "batch_stats", "optimizer_state")}
        return self.replace(**rest, ema_params=ema, key=jax.random.wrap_key_data(arrays["key"]))


class StepMetrics(NamedTuple):
    """What one step reports, averaged over the global batch; nats per example."""

    objective: Float[Array, ""]
    distortion: Float[Array, ""]
    rate: Float[Array, ""]
    mse: Float[Array, ""]
    variance: Float[Array, ""]
    gradient_norm: Float[Array, ""]


# --- The step ---------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    images: Float[Array, "batch height width channels"],
    key: Key[Array, ""],
    beta: float | Float[Array, ""],
) -> tuple[TrainState, StepMetrics]:
    """One step of gradient descent on `distortion + beta * rate`. Pure; jit, pmap or shard_map it.

    Where `state.model.axis_name` names a device axis, `images` is this device's share of the global batch, and squared errors
    of a shared variance, batch statistics, gradients and metrics are averaged over the axis: every device ends in the same
    state, which is that of one device with the whole batch.

    Args:
      state: donated by the trainer, so not to be used again there.
      images: [B, H, W, C] in [0, 1].
      key: for the posterior samples; each example takes its own by its position in the global batch.
      beta: weight of the rate, may be traced.
    """
    axis_name = state.model.axis_name

    def loss(params: Any) -> tuple[Float[Array, ""], tuple[objective.ElboTerms, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        terms, updates = state.model.apply(variables, images, key, train=True, method="elbo_terms", mutable=["batch_stats"])
        return objective.mean_objective(terms, beta), (terms, updates.get("batch_stats", {}))

    (value, (terms, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    means = {name: jnp.mean(term) for name, term in terms._asdict().items()} | {"objective": value}
    gradient, means = objective.mean_over_devices((gradient, means), axis_name)
    updates, optimizer_state = state.optimizer.update(gradient, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None and state.ema_decay is not None:
        # Early averages forget the initial parameters faster: (1 + t) / (10 + t) is below the decay for a while.
        decay = jnp.minimum(state.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1.0 - decay)
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        optimizer_state=optimizer_state,
        ema_params=ema_params,
    )
    return state, StepMetrics(**means, gradient_norm=optax.tree.norm(gradient))


def _data_step(
    state: TrainState,
    images: Array,
    indices: Int[Array, " batch"],
    beta: Float[Array, ""],
    *,
    levels: int,
    augmentation: configs.Augmentation,
) -> tuple[TrainState, StepMetrics]:
    """Gather this device's share of the batch from the resident images, augment it, take a step."""
    step_key = jax.random.fold_in(state.key, state.step)
    augmentation_key, posterior_key = jax.random.split(step_key)
    batch = to_unit_interval(images[indices], levels)
    positions = example_positions(len(indices), state.model.axis_name)
    batch = augment(batch, example_keys(augmentation_key, positions), augmentation)
    return train_step(state, batch, posterior_key, beta)


def _run_steps(
    state: TrainState,
    images: Array,
    order: Int[Array, "steps batch"],
    count: Int[Array, ""],
    beta: Float[Array, ""],
    *,
    levels: int,
    augmentation: configs.Augmentation,
) -> tuple[TrainState, StepMetrics]:
    """`count` <= steps data steps in one program, whatever `count`, so nothing is compiled again; metrics are [steps]."""
    step = functools.partial(_data_step, levels=levels, augmentation=augmentation)
    if len(order) == 1:  # without a loop: on CPU, XLA's fast convolutions do not run inside one
        state, metrics = step(state, images, order[0], beta)
        return state, jax.tree.map(lambda value: value[None], metrics)

    def body(i: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        state, history = carry
        state, metrics = step(state, images, order[i], beta)
        return state, jax.tree.map(lambda values, value: values.at[i].set(value), history, metrics)

    history = StepMetrics(*(jnp.zeros(len(order)) for _ in StepMetrics._fields))
    return jax.lax.fori_loop(0, count, body, (state, history))


# --- Building a run ---------------------------------------------------------------------------------------------------


def learning_rate_schedule(optimizer: configs.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step over a run of `steps`."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "cosine_restarts":
        # As the paper's code: cycles of floor(steps / cycles) + 1, so the last ends just short of 0.
        length = steps // optimizer.cycles + 1
        cycles = [optax.cosine_decay_schedule(peak, length) for _ in range(optimizer.cycles)]
        return optax.join_schedules(cycles, [length * i for i in range(1, optimizer.cycles)])
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1))
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])


def build_optimizer(optimizer: configs.Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with its schedule, after clipping where asked for."""
    adamw = optax.adamw(learning_rate_schedule(optimizer, steps), weight_decay=optimizer.weight_decay)
    if optimizer.gradient_clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.gradient_clip), adamw)


def with_data_floor(decoder_variance: objective.DecoderVariance, step: float) -> objective.DecoderVariance:
    """The decoder-variance model with its floor taken from the data's quantisation step where it is left open."""
    if isinstance(decoder_variance, objective.Constant) or decoder_variance.floor is not None:
        return decoder_variance
    return dataclasses.replace(decoder_variance, floor=objective.quantization_variance(step))


def build_model(
    config: Config, image_shape: tuple[int, int, int], step: float = 1.0 / 255.0, axis_name: str | None = None
) -> VAE:
    """The VAE of a config for images of a shape and quantisation step."""
    return VAE(
        image_shape=image_shape,
        latent_size=config.latent_size,
        network=config.network,
        decoder_variance=with_data_floor(config.decoder_variance, step),
        prior=config.prior,
        axis_name=axis_name,
        dtype=jnp.dtype(config.precision),
    )


def create_state(config: Config, model: VAE, steps: int) -> TrainState:
    """The state before the first step: parameters drawn from the config's seed, float32."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    optimizer = build_optimizer(config.optimizer, steps)

    def create() -> tuple[Any, Any, Any]:
        x = jnp.zeros((2, *model.image_shape))
        variables = model.clone(axis_name=None).init(init_key, x, init_key)
        return variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"])

    params, batch_stats, optimizer_state = jax.jit(create)()
    ema_params = None if config.optimizer.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        batch_stats,
        optimizer_state,
        ema_params,
        run_key,
        model,
        optimizer,
        config.optimizer.ema_decay,
    )


def steps_per_dispatch(config: Config, platform: str) -> int:
    """Steps in one compiled call: one for convolutions on CPU, which XLA runs slowly inside loops; else `LOG_EVERY`."""
    if config.steps_per_dispatch is not None:
        return config.steps_per_dispatch
    return 1 if platform == "cpu" and isinstance(config.network, configs.Residual) else LOG_EVERY


def check_against_data(config: Config, images: ImageSet) -> None:
    """What only config and data together can show to be wrong.

    Raises:
      UserError: a batch larger than the training set, or more latents than pixels.
    """
    if config.batch_size > len(images.train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(images.train)} training images of {images.name}.")
    pixels = math.prod(images.image_shape)
    if config.latent_size > pixels:
        raise UserError(f"latent_size {config.latent_size} exceeds the {pixels} pixels of an image.")


# --- fit --------------------------------------------------------------------------------------------------------------


class FitResult(NamedTuple):
    """A finished run."""

    state: TrainState
    images: ImageSet
    workdir: Path


def fit(config: Config, workdir: str | Path, progress: bool = True) -> FitResult:
    """Train as the config says, in `workdir`; continue there if a run of the same config was interrupted.

    Writes `config.json`, `metrics.jsonl` (a row per line), TensorBoard events, checkpoints, and at the end `calibration.npz`,
    the variance of the training set. A finished run is not trained again.

    Args:
      config: the experiment.
      workdir: a folder of this run alone.
      progress: show a progress bar and messages.

    Raises:
      UserError: before any training: the data, devices or workdir do not fit the config.
      DivergenceError: a loss or gradient is not finite; names the step, the terms and the last good checkpoint.
    """
    mesh = data_mesh(config.devices, config.batch_size)
    images = load(config.data, config.seed)
    check_against_data(config, images)
    with RunDirectory(Path(workdir), config, images, progress) as run:
        total = steps_through(config.epochs, len(images.train), config.batch_size)
        run.say(
            f"{images.name}: {len(images.train)} training and {len(images.test)} test images {images.image_shape}; "
            f"{config.epochs} epochs, {total} steps of {config.batch_size}; {describe_devices(mesh)}"
        )
        model = build_model(config, images.image_shape, images.step, DATA_AXIS)
        state = replicate(create_state(config, model, total), mesh)
        state = run.resume(state)
        trainer = _Trainer(config, images, mesh, run, total)
        state = trainer.train(state)
        trainer.calibrate(state)
        return FitResult(state, images, run.folder)


class _Trainer:
    """The loop of `fit`: dispatches steps, reports them, evaluates and saves."""

    def __init__(self, config: Config, images: ImageSet, mesh: Mesh, run: RunDirectory, total: int):
        self.config, self.images, self.mesh, self.run, self.total = config, images, mesh, run, total
        self.train_images: Array = replicate(images.train, mesh)
        self.test_images: Array = replicate(images.test, mesh)
        # Read back once, here: in the loop it would wait for the steps in flight.
        self.learning_rates = np.asarray(jax.vmap(learning_rate_schedule(config.optimizer, total))(jnp.arange(total)))
        self.window = steps_per_dispatch(config, mesh.devices.flat[0].platform)
        self.run_steps = lift(
            functools.partial(_run_steps, levels=images.levels, augmentation=config.augmentation),
            mesh,
            (REPLICATED, REPLICATED, P(None, DATA_AXIS), REPLICATED, REPLICATED),
            REPLICATED,
            donate=(0,),
        )

    def train(self, state: TrainState) -> TrainState:
        """Run to the last step from wherever `state` is."""
        config, count = self.config, len(self.images.train)
        order = ShuffledOrder(jax.random.fold_in(state.key, 2**31 - 1), count, config.batch_size)
        beta = jnp.float32(config.beta)
        step = int(state.step)
        epoch = next(e for e in range(config.epochs + 1) if steps_through(e, count, config.batch_size) >= step)
        with self.run.progress_bar(self.total, step, config.batch_size) as bar:
            while epoch < config.epochs:
                epoch += 1
                end = steps_through(epoch, count, config.batch_size)
                state = self._epoch(state, order, beta, step, end, epoch, bar)
                step = end
                if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                    self._evaluate_and_save(state, step, epoch, bar)
        return state

    def _epoch(
        self, state: TrainState, order: ShuffledOrder, beta: Array, step: int, end: int, epoch: int, bar: Any
    ) -> TrainState:
        in_flight: deque[tuple[int, int, StepMetrics]] = deque()
        row = _MetricsRow(epoch, self.config.batch_size)
        while step < end or in_flight:
            # Keep the device busy with a bounded number of dispatched calls while the oldest result is fetched.
            while step < end and len(in_flight) < 2:
                count = min(self.window, end - step)
                indices = order(step, self.window)  # the whole window, whatever is left of the epoch: one program
                state, metrics = self.run_steps(state, self.train_images, indices, jnp.int32(count), beta)
                step += count
                in_flight.append((step, count, metrics))
            last, count, metrics = in_flight.popleft()
            values = np.stack(jax.device_get(metrics))[:, :count]
            self._check_finite(values, last - count)
            row.add(values)
            bar.update(count, row.latest())
            if row.steps >= LOG_EVERY or last == end:
                self.run.log({"step": last, **row.mean(), "learning_rate": float(self.learning_rates[last - 1])})
                row = _MetricsRow(epoch, self.config.batch_size)
        return state

    def _check_finite(self, values: np.ndarray, start: int) -> None:
        bad = ~np.isfinite(values).all(axis=0)
        if bad.any():
            first = int(np.argmax(bad))
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(StepMetrics._fields, values[:, first], strict=True))
            raise DivergenceError(
                f"Step {start + first + 1} is not finite: {terms}. {self.run.last_checkpoint()} "
                "A lower --optimizer.learning-rate or --optimizer.gradient-clip 1.0 usually helps."
            )

    def _score(self, state: TrainState, images: Array, split: str) -> SplitScores:
        return score_split(
            state.model,
            state.variables(),
            images,
            split_key(self.config.seed, split),
            levels=self.images.levels,
            mesh=self.mesh,
            batch_size=EVALUATION_BATCH,
        )

    def _evaluate_and_save(self, state: TrainState, step: int, epoch: int, bar: Any) -> None:
        scores = self._score(state, self.test_images, "test")
        distortion, rate = float(scores.model_distortion.mean()), float(scores.rate.mean())
        value = distortion + self.config.beta * rate
        row: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "split": "test",
            "objective": value,
            "distortion": distortion,
            "rate": rate,
            "mse": float(scores.squared_error.mean() / scores.pixels),
            "variance": scores.model_variance,
        }
        if not math.isfinite(value):
            raise DivergenceError(
                f"The held-out objective after step {step} is not finite: distortion {distortion:g}, rate {rate:g}. "
                f"{self.run.last_checkpoint()}"
            )
        self.run.log(row)
        bar.evaluated(row)
        self.run.save(step, state.arrays(), value)

    def calibrate(self, state: TrainState) -> None:
        """Record the optimal variance of the whole training set, one number and one per pixel."""
        if self.run.is_calibrated(int(state.step)):
            return
        scores = self._score(state, self.train_images, "train")
        floor = objective.quantization_variance(self.images.step)
        self.run.write_calibration(calibrate(scores, int(state.step), floor))


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
