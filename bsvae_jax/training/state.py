"""How a config becomes a model, an optimizer and the state before the first step; and what config and data must agree in."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from bsvae_jax import config as configs
from bsvae_jax.config import Config, is_builtin
from bsvae_jax.data import DataShape, ImageSet
from bsvae_jax.data.image_set import is_image, to_unit_interval
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed.hardware import activations
from bsvae_jax.errors import UserError
from bsvae_jax.models.vae import VAE, build_vae
from bsvae_jax.random import make_key
from bsvae_jax.training.step import (
    LOG_EVERY,
    PRIOR,
    Hyperparameters,
    TrainState,
    check_collections,
    data_shape_of,
    initial_multiplier,
)


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
    """The config's, AdamW unless it is the user's own, after clipping where asked for, at a peak learning rate of 1
    (`TrainState.learning_rate`).

    The parameters of a prior do not decay: towards 0, a mixture's means would meet and a pseudo-input would turn black.

    The same object for the same arguments, so that states made from them share one compiled program.

    Raises:
      UserError: the `build` of a class of the user's own returns something else.
    """
    return _unit_optimizer(dataclasses.replace(optimizer, learning_rate=1.0), steps, learned_prior)


def _decays(params: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each parameter decays."""
    return {name: jax.tree.map(lambda _, own=name: own != PRIOR, part) for name, part in params.items()}


@functools.cache
def _unit_optimizer(optimizer: configs.Optimizer, steps: int, learned_prior: bool) -> optax.GradientTransformation:
    # Without a prior to spare there is no mask: it would be one more level in the state of every checkpoint.
    mask = _decays if learned_prior else None
    built = optimizer.build(learning_rate_schedule(optimizer, steps), mask)
    if not isinstance(built, optax.GradientTransformation):
        raise UserError(f"build of {type(optimizer).__name__} must return an optax.GradientTransformation, got {built!r}.")
    if optimizer.gradient_clip is None:
        return built
    return optax.chain(optax.clip_by_global_norm(optimizer.gradient_clip), built)


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
        activations(config.precision) if dtype is None else dtype,
        config.rematerialize,
        config.classes,
        config.precision == "tensorfloat32",
    )


def build_hyperparameters(config: Config) -> Hyperparameters:
    """The numbers of a config's objective."""
    variance, schedule = (
        {name: jnp.float32(getattr(kind, name)) for name in kind.traced}
        for kind in (config.decoder_variance, config.beta_schedule)
    )
    return Hyperparameters(jnp.float32(config.beta), variance, schedule)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_arrays(model: VAE, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> tuple[Any, Any, Any]:
    """Compiled once for all the members of a sweep whose variances have no parameters."""
    variables = model.init({"params": key, "dropout": key}, jnp.zeros((2, *data_shape_of(model))), key)
    check_collections(variables)
    return variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"])


def create_state(
    config: Config,
    model: VAE,
    steps: int,
    variables: Mapping[str, Any] | None = None,
    images: ImageSet | None = None,
) -> TrainState:
    """The state before the first step: `variables`, or parameters drawn from the config's seed; float32.

    The pseudo-inputs of a `VampPrior` are training images of `images`, chosen by the seed; without them noise around gray.
    """
    init_key, run_key = jax.random.split(make_key(config.seed))
    optimizer = build_optimizer(config.optimizer, steps, not isinstance(config.prior, configs.StandardNormal))
    if variables is None:
        params, batch_stats, optimizer_state = _initial_arrays(model.without_variance(), optimizer, init_key)
        started = None if images is None else config.prior.initial_parameters(images.train, config.seed)
        if started is not None and images is not None:
            own = {name: to_unit_interval(values, images.levels) for name, values in started.items()}
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
        config.beta_schedule,
        config.free_bits,
        initial_multiplier(config.beta_schedule),
    )


def steps_per_dispatch(config: Config, platform: str) -> int:
    """Steps in one compiled call: one for convolutions on CPU, which XLA runs slowly inside loops; else `LOG_EVERY`."""
    if config.steps_per_dispatch is not None:
        return config.steps_per_dispatch
    return 1 if platform == "cpu" and config.network.convolutional else LOG_EVERY


def for_data(config: Config, data_shape: tuple[int, ...]) -> Config:
    """The config with its network as it is for data of this shape."""
    return dataclasses.replace(config, network=config.network.for_data(data_shape))


def check_against_data(config: Config, images: ImageSet) -> None:
    """What only config and data together can show to be wrong.

    Raises:
      UserError: a batch larger than the training set, a warm-up longer than the run, a schedule of beta that does not fit it
        or that asks for more than can be carried, more latents than pixels, more pseudo-inputs than training images, or labels
        that are missing or are not of the config's classes.
    """
    if config.batch_size > len(images.train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(images.train)} training images of {images.name}.")
    total = steps_through(config.epochs, len(images.train), config.batch_size)
    if config.optimizer.warmup_steps >= total:
        raise UserError(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} must be fewer than the {total} steps of the whole run; "
            "train for more epochs, or warm up for fewer steps."
        )
    config.prior.check(len(images.train))
    if config.classes is not None and isinstance(config.prior, configs.VampPrior):
        raise UserError("prior VampPrior encodes images that are of no class; with classes choose another prior.")
    labeled = [images.examples(split, config.classes) for split in images.splits]
    if config.classes is not None and (unseen := set(range(config.classes)) - set(np.unique(labeled[0].labels).tolist())):
        raise UserError(f"classes {config.classes} are too many: no training image of {images.name} is of class {min(unseen)}.")
    check_against_shape(config, images.shape)
    config.beta_schedule.check(config.beta, total, config.free_bits.least(config.latent_size), most_nats(config, images.shape))


def most_nats(config: Config, data: DataShape) -> float:
    """A rate, nats per example, beyond which nothing more is carried.

    A decoder sees as many bits of each latent as its type has, and an image of D entries and n levels has D log(n) nats.
    """
    bits = 8 if config.precision == "bfloat16" else 24
    latents = config.latent_size * bits * math.log(2.0)
    return min(latents, math.prod(data.image_shape) * math.log(data.levels)) if data.dtype == np.uint8 else latents


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
    if not all(is_builtin(getattr(config, field)) for field in configs.KINDS):  # what a class of the user's own returns
        build_optimizer(config.optimizer, steps=1)
        model = build_model(config, data.image_shape, data.bin_width)
        example, key = jnp.zeros((2, *data.image_shape)), make_key(0)
        jax.eval_shape(lambda: model.init(key, example, key, method="elbo_terms"))
