"""Training as pure functions: the state, one step, many steps in one program, and how a config becomes a state.

What differs between the members of a sweep by its value alone (beta, the learning rate, a constant variance, the seed) is an
array here, so one compiled program serves them all; `trainer` drives it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from bsvae_jax import config as configs
from bsvae_jax import objective
from bsvae_jax.config import Config
from bsvae_jax.data import DataShape, ImageSet, ShuffledOrder, augment
from bsvae_jax.data.image_set import is_image, to_unit_interval
from bsvae_jax.errors import UserError, check_kind
from bsvae_jax.models.vae import VAE, build_vae
from bsvae_jax.random import check_key, example_keys, example_positions

LOG_EVERY = 50
"""Steps over which one training row of the metrics is averaged, at most."""

ORDER_SALT = 2**31 - 1
"""Folded into the key of a run for the order of its data."""

PRIOR = "prior_model"
"""Where the parameters of a prior lie among those of a `VAE`."""


class TrainState(struct.PyTreeNode):
    """Everything that decides the future of a run. `model` and `optimizer` are static; the rest are arrays.

    >>> config = Config(network=configs.MLP((8,)), latent_size=2)
    >>> state = create_state(config, build_model(config, (8, 8, 1)), steps=100)
    >>> int(state.step), sorted(state.params)
    (0, ['decoder', 'encoder'])
    """

    step: Any
    """Steps taken. (Types are not annotated: leaves may be abstract, and have a leading axis of devices or members.)"""
    params: Any
    batch_stats: Any
    """BatchNorm's running statistics; empty for networks without."""
    optimizer_state: Any
    ema_params: Any
    """Exponential moving average of the parameters, or None."""
    key: Any
    """Root of all randomness of the run; never changed, folded with the step."""
    learning_rate: Any
    """Peak learning rate: a factor of the optimizer's updates, whose schedule has a peak of 1."""
    model: VAE = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    ema_decay: float | None = struct.field(pytree_node=False, default=None)
    skip_nonfinite: bool = struct.field(pytree_node=False, default=False)
    """Whether a step whose loss or gradient is not finite changes nothing but the count of steps."""
    parts: int = struct.field(pytree_node=False, default=1)
    """Parts of a batch that follow one another (`Config.gradient_accumulation`)."""

    @classmethod
    def create(cls, model: VAE, optimizer: optax.GradientTransformation, key: Key[Array, ""], example: Array) -> "TrainState":
        """The state of any `VAE` before its first step, for `train_step` without a `Config`.

        Args:
          model: the VAE.
          optimizer: any of optax, with its own learning rate.
          key: decides the initial parameters, and all randomness of the run.
          example: a batch of the data, [B, ...]; only its shape and type are looked at.

        >>> from bsvae_jax.models import MLP, build_vae
        >>> x = jnp.ones((4, 8, 8, 1))
        >>> state = TrainState.create(build_vae(MLP((8,)), 2, (8, 8, 1)), optax.adamw(1e-3), jax.random.key(0), x)
        >>> state, metrics = jax.jit(train_step)(state, x, jax.random.key(1), beta=1.0)
        >>> int(state.step)
        1

        Raises:
          UserError: something that is no VAE, no optimizer or no key, or modules that do not fit the example.
        """
        check_kind("model", model, VAE, "bsvae_jax.VAE(encoder, decoder, prior)")
        check_kind("optimizer", optimizer, optax.GradientTransformation, "optax.adamw(1e-3), say")
        check_key(key)
        init_key, run_key = jax.random.split(key)
        variables = jax.jit(model.clone(axis_name=None).init)(init_key, jnp.zeros(jnp.shape(example), example.dtype), init_key)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return cls(
            jnp.zeros((), jnp.int32),
            params,
            batch_stats,
            optimizer.init(params),
            None,
            run_key,
            jnp.float32(1.0),
            model,
            optimizer,
        )

    def variables(self) -> dict[str, Any]:
        """The variables to evaluate with: the averaged parameters where there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds: plain arrays only, and nothing that the config says already."""
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


class Hyperparameters(NamedTuple):
    """The numbers of the objective that a compiled step takes as arrays."""

    beta: Float[Array, "*members"]
    """Weight of the rate."""
    variance: dict[str, Float[Array, "*members"]]
    """Fields of the decoder variance by name: those that it lists as `traced`."""


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
    images: Float[Array, "batch *shape"],
    key: Key[Array, ""],
    beta: float | Float[Array, ""],
    variance: Mapping[str, Any] | float | Float[Array, ""] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One step of gradient descent on `distortion + beta * rate`. Pure; jit, pmap or shard_map it.

    Where `state.model.axis_name` names a device axis, `images` is this device's share of the global batch, and squared errors
    of a shared variance, batch statistics, gradients and metrics are averaged over the axis: every device ends in the same
    state, which is that of one device with the whole batch.

    Args:
      state: donated by the trainer, so not to be used again there.
      images: [B, ...], [B, H, W, C] in [0, 1] of images.
      key: for the posterior samples; each example takes its own by its position in the global batch.
      beta: weight of the rate, may be traced.
      variance: fields of the decoder variance by name, in place of the model's own, may be traced; one number is the field
        `variance`, which `Constant` has. None: the model's own.

    Returns:
      The state after the step, and the metrics of the batch before it: nats per example, `mse` and `variance` in squared
      intensity, each [].

    >>> config = Config(network=configs.MLP((8,)), latent_size=2)
    >>> state = create_state(config, build_model(config, (8, 8, 1)), steps=100)
    >>> state, metrics = jax.jit(train_step)(state, jnp.ones((4, 8, 8, 1)), jax.random.key(0), beta=0.5)
    >>> int(state.step)
    1
    >>> bool(jnp.allclose(metrics.objective, metrics.distortion + 0.5 * metrics.rate))
    True

    Raises:
      UserError: a `state`, images or a `key` of another kind or shape than the model's, or a `beta` or `variance` that is out
        of range and not traced.
    """
    check_kind("state", state, TrainState)
    axis_name = state.model.axis_name
    model = state.model
    if variance is not None:
        fields = variance if isinstance(variance, Mapping) else {"variance": variance}
        unknown = fields.keys() - {field.name for field in dataclasses.fields(model.decoder_variance)}
        if unknown:
            raise UserError(f"{type(model.decoder_variance).__name__} has no field {min(unknown)!r} to replace.")
        if fields:
            model = model.clone(decoder_variance=dataclasses.replace(model.decoder_variance, **fields))

    def loss(params: Any) -> tuple[Float[Array, ""], tuple[objective.ElboTerms, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        if state.parts > 1:
            terms, batch_stats = _terms_in_parts(model, variables, images, key, state.parts)
        else:
            terms, updates = model.apply(variables, images, key, train=True, method="elbo_terms", mutable=["batch_stats"])
            batch_stats = updates.get("batch_stats", {})
        return objective.mean_objective(terms, beta), (terms, batch_stats)

    (value, (terms, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    means = {name: jnp.mean(term) for name, term in terms._asdict().items()} | {"objective": value}
    gradient, means = objective.mean_over_devices((gradient, means), axis_name)
    updates, optimizer_state = state.optimizer.update(gradient, state.optimizer_state, state.params)
    updates = jax.tree.map(lambda update: state.learning_rate * update, updates)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None and state.ema_decay is not None:
        ema_params = averaged(ema_params, params, state.step, state.ema_decay)
    gradient_norm = optax.tree.norm(gradient)
    after = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        optimizer_state=optimizer_state,
        ema_params=ema_params,
    )
    if state.skip_nonfinite:
        finite = jnp.isfinite(means["objective"]) & jnp.isfinite(gradient_norm)
        before = state.replace(step=state.step + 1)
        after = jax.tree.map(lambda new, old: new if new is old else jax.lax.select(finite, new, old), after, before)
    return after, StepMetrics(**means, gradient_norm=gradient_norm)


def _terms_in_parts(
    model: VAE, variables: Mapping[str, Any], images: Array, key: Key[Array, ""], parts: int
) -> tuple[objective.ElboTerms, Any]:
    """ELBO terms of the whole batch, and the batch statistics after it, with the activations of one part in memory at a time.

    Each part is computed again in the backward pass, when the terms of all are known: a variance that is shared over the batch
    is that of the whole batch, not of a part, and so are its gradients.
    """

    @jax.checkpoint
    def forward(batch_stats: Any, part: tuple[Array, Array]) -> tuple[Any, Any]:
        own = {"params": variables["params"], "batch_stats": batch_stats}
        output, updates = model.apply(own, *part, train=True, mutable=["batch_stats"])
        return updates.get("batch_stats", {}), (output.decoded, output.rate)

    def split(values: Array) -> Array:
        return values.reshape(parts, len(images) // parts, *values.shape[1:])

    keys = example_keys(key, example_positions(len(images), model.axis_name, parts))
    batch_stats, (decoded, rate) = jax.lax.scan(forward, variables["batch_stats"], (split(images), split(keys)))
    mean, log_variance = decoded
    if log_variance is not None:  # one number, the same of every part; or one per pixel
        log_variance = jnp.mean(log_variance) if log_variance.ndim == 1 else log_variance.reshape(images.shape)
    terms = objective.elbo_terms(
        images,
        mean.reshape(images.shape),
        rate.reshape(-1),
        model.decoder_variance,
        log_variance=log_variance,
        axis_name=model.axis_name,
    )
    return terms, batch_stats


def averaged(average: Any, params: Any, step: Array, decay: float) -> Any:
    """The exponential moving average of the parameters after step number `step` (from 0) has led to `params`.

    Early averages forget the initial parameters faster: `(1 + t) / (10 + t)` is below the decay for a while.
    """
    return optax.incremental_update(params, average, 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step)))


def data_shape_of(model: VAE) -> tuple[int, ...]:
    """Shape of one example; of a model that was built from a config, which knows it."""
    assert model.data_shape is not None, "build_model says it"
    return model.data_shape


def data_order(state: TrainState, images: ImageSet, batch_size: int) -> ShuffledOrder:
    """The order in which a run takes its training images."""
    return ShuffledOrder(jax.random.fold_in(state.key, ORDER_SALT), len(images.train), batch_size)


def prepare_batch(
    state: TrainState, stored: Array, levels: int, augmentation: configs.Augmentation
) -> tuple[Float[Array, "batch *shape"], Key[Array, ""]]:
    """What `train_step` is given at the step that `state` stands before: this device's augmented batch, and the key.

    `stored` is this device's share of the batch as the data set has it, [B, ...].
    """
    step_key = jax.random.fold_in(state.key, state.step)
    augmentation_key, posterior_key = jax.random.split(step_key)
    batch = to_unit_interval(stored, levels)
    if augmentation == configs.Augmentation():
        return batch, posterior_key
    positions = example_positions(len(batch), state.model.axis_name, state.parts)
    return augment(batch, example_keys(augmentation_key, positions), augmentation), posterior_key


def run_steps(
    state: TrainState,
    images: Array,
    order: Int[Array, "steps batch"],
    count: Int[Array, ""],
    hyperparameters: Hyperparameters,
    *,
    levels: int,
    augmentation: configs.Augmentation,
) -> tuple[TrainState, StepMetrics]:
    """`count` <= steps steps in one program, whatever `count`, so nothing is compiled again; metrics are [steps].

    Args:
      state: donated by the trainer.
      images: all training images as stored, flattened, [N, H * W * C], on every device: rows are gathered from it as it lies,
        while the images of a four-dimensional array may be laid out anew at every call, padded to the registers of a TPU.
      order: this device's share of the indices of each step's batch, [steps, B].
      count: how many of the steps to take.
      hyperparameters: beta, and numbers of the decoder variance.
      levels: grey levels of stored uint8 images.
      augmentation: random changes of the images.
    """

    shape = data_shape_of(state.model)

    def stored(i: Any) -> Array:
        return images[order[i]].reshape(-1, *shape)

    return _run_steps(state, stored, len(order), count, hyperparameters, levels, augmentation)


def run_streamed_steps(
    state: TrainState,
    batches: Array,
    count: Int[Array, ""],
    hyperparameters: Hyperparameters,
    *,
    levels: int,
    augmentation: configs.Augmentation,
) -> tuple[TrainState, StepMetrics]:
    """`run_steps` on images that come with the call: this device's share of each step's batch, [steps, B, ...]."""
    return _run_steps(state, lambda i: batches[i], len(batches), count, hyperparameters, levels, augmentation)


def _run_steps(
    state: TrainState,
    stored: Callable[[Any], Array],
    steps: int,
    count: Int[Array, ""],
    hyperparameters: Hyperparameters,
    levels: int,
    augmentation: configs.Augmentation,
) -> tuple[TrainState, StepMetrics]:
    def step(i: Any, state: TrainState) -> tuple[TrainState, StepMetrics]:
        batch, posterior_key = prepare_batch(state, stored(i), levels, augmentation)
        return train_step(state, batch, posterior_key, hyperparameters.beta, hyperparameters.variance)

    if steps == 1:  # without a loop: on CPU, XLA's fast convolutions do not run inside one
        state, metrics = step(0, state)
        return state, jax.tree.map(lambda value: value[None], metrics)

    def body(i: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        state, history = carry
        state, metrics = step(i, state)
        return state, jax.tree.map(lambda values, value: values.at[i].set(value), history, metrics)

    history = StepMetrics(*(jnp.zeros(steps) for _ in StepMetrics._fields))
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


def build_optimizer(optimizer: configs.Optimizer, steps: int, learned_prior: bool = False) -> optax.GradientTransformation:
    """AdamW with its schedule, after clipping where asked for, at a peak learning rate of 1 (`TrainState.learning_rate`).

    The parameters of a prior do not decay: towards 0, a mixture's means would meet and a pseudo-input would turn black.

    The same object for the same arguments, so that states made from them share one compiled program.
    """
    return _unit_optimizer(dataclasses.replace(optimizer, learning_rate=1.0), steps, learned_prior)


def _decays(params: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each parameter decays."""
    return {name: jax.tree.map(lambda _, own=name: own != PRIOR, part) for name, part in params.items()}


@functools.cache
def _unit_optimizer(optimizer: configs.Optimizer, steps: int, learned_prior: bool) -> optax.GradientTransformation:
    # Without a prior to spare there is no mask: it would be one more level in the state of every checkpoint.
    mask = _decays if learned_prior else None
    adamw = optax.adamw(learning_rate_schedule(optimizer, steps), weight_decay=optimizer.weight_decay, mask=mask)
    if optimizer.gradient_clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.gradient_clip), adamw)


def build_model(
    config: Config, data_shape: tuple[int, ...], bin_width: float = 1.0 / 255.0, axis_name: str | None = None, dtype: Any = None
) -> VAE:
    """The VAE of a config for data of a shape and grid spacing; `dtype`: in place of the config's precision."""
    return build_vae(
        config.network,
        config.latent_size,
        data_shape,
        config.decoder_variance.with_floor(bin_width),
        config.prior,
        axis_name,
        jnp.dtype(config.precision) if dtype is None else dtype,
        config.rematerialize,
    )


def build_hyperparameters(config: Config) -> Hyperparameters:
    """The numbers of a config's objective."""
    model = config.decoder_variance
    return Hyperparameters(jnp.float32(config.beta), {name: jnp.float32(getattr(model, name)) for name in model.traced})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_arrays(model: VAE, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> tuple[Any, Any, Any]:
    """Compiled once for all the members of a sweep."""
    variables = model.init(key, jnp.zeros((2, *data_shape_of(model))), key)
    return variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"])


def create_state(
    config: Config,
    model: VAE,
    steps: int,
    variables: Mapping[str, Any] | None = None,
    images: ImageSet | None = None,
) -> TrainState:
    """The state before the first step: `variables`, or parameters drawn from the config's seed; float32.

    The pseudo-inputs of a `VampPrior` are training images of `images`, chosen by the seed; without them noise around grey.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    optimizer = build_optimizer(config.optimizer, steps, not isinstance(config.prior, configs.StandardNormal))
    if variables is None:
        params, batch_stats, optimizer_state = _initial_arrays(model.clone(axis_name=None), optimizer, init_key)
        started = None if images is None else config.prior.initial_parameters(images.train, config.seed)
        if started is not None and images is not None:
            own = {name: to_unit_interval(jnp.asarray(values), images.levels) for name, values in started.items()}
            params = {**params, PRIOR: {**params[PRIOR], **own}}
    else:
        params, batch_stats = variables["params"], variables["batch_stats"]
        optimizer_state = jax.jit(optimizer.init)(params)
    ema_params = None if config.optimizer.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        batch_stats,
        optimizer_state,
        ema_params,
        run_key,
        jnp.float32(config.optimizer.learning_rate),
        model,
        optimizer,
        config.optimizer.ema_decay,
        config.optimizer.skip_nonfinite > 0,
        config.gradient_accumulation,
    )


def steps_per_dispatch(config: Config, platform: str) -> int:
    """Steps in one compiled call: one for convolutions on CPU, which XLA runs slowly inside loops; else `LOG_EVERY`."""
    if config.steps_per_dispatch is not None:
        return config.steps_per_dispatch
    return 1 if platform == "cpu" and config.network.convolutional else LOG_EVERY


def check_against_data(config: Config, images: ImageSet) -> None:
    """What only config and data together can show to be wrong.

    Raises:
      UserError: a batch larger than the training set, more latents than pixels, or more pseudo-inputs than training images.
    """
    if config.batch_size > len(images.train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(images.train)} training images of {images.name}.")
    config.prior.check(len(images.train))
    check_against_shape(config, images.shape)


def check_against_shape(config: Config, data: DataShape) -> None:
    """What only config and the sizes of the data together can show to be wrong.

    Raises:
      UserError: more latents than pixels, or a number of them that is no latent map; augmentation of what is no image.
    """
    pixels = math.prod(data.image_shape)
    if config.latent_size > pixels:
        what = "pixels of an image" if is_image(data.image_shape) else "values of one example"
        raise UserError(f"latent_size {config.latent_size} exceeds the {pixels} {what}.")
    if config.augmentation != configs.Augmentation() and not is_image(data.image_shape):
        raise UserError(
            f"augmentation rotates, crops and flips images [H, W, C]; one example of these data has shape {data.image_shape}. "
            "Leave augmentation out of the config."
        )
    config.network.check(config.latent_size, data.image_shape)
