"""Training the velocity field of `FlowMatching` on latents: over all devices, interruptible, continued where it stopped.

Its loop is its own and a small one: the `Trainer` of the first stage is about images, a rate and a distortion. What makes that
one reliable is used here too: checkpoints with a digest, signals answered between two steps, randomness by the number of the
step and the place of an example in the batch, so that neither an interruption nor the number of devices changes the result.
"""

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from bsvae_jax._io.files import write_atomically
from bsvae_jax._io.terminal import ProgressBar, log
from bsvae_jax.config import FlowMatching, to_dict
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, data_mesh, parallelize, replicate
from bsvae_jax.distributed.preemption import EVALUATING, stop_on_signals
from bsvae_jax.errors import DivergenceError, UserError, check_count
from bsvae_jax.models.priors.flow_matching import flow_matching_loss
from bsvae_jax.models.priors.transformer import VelocityNetwork
from bsvae_jax.random import example_keys, example_positions
from bsvae_jax.training.checkpoints import Checkpoints
from bsvae_jax.training.step import averaged

FOLDER = "prior_training"
"""In the folder of the run, until the prior is there."""
WINDOW = 50
"""Steps in one compiled call."""
SAVE_EVERY = 500
"""Steps between evaluations on held-out latents, each followed by a checkpoint."""
BATCH = 256
"""Latents per step, over all devices together; rounded up to a multiple of them."""
LEARNING_RATE = 1e-3
WARMUP = 100
EMA_DECAY = 0.999
COMPARED = 2000
"""Held-out latents of which the loss is taken."""


class FlowState(NamedTuple):
    """Everything that decides the rest of a fit."""

    step: Any
    params: Any
    optimizer_state: Any
    ema_params: Any


def _optimizer(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, max(steps, WARMUP + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def _losses(network: VelocityNetwork, params: Any, latents: Array, keys: Array) -> Array:
    """Of each of the latents [B, L] at a time and with noise of its own key, [B]."""
    time = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), dtype=jnp.float32))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2), latents.shape[1:], jnp.float32))(keys)
    velocity = lambda x, t: network.apply({"params": params}, x, t)  # noqa: E731
    return flow_matching_loss(velocity, latents, noise, time)  # type: ignore[arg-type]


def _window(
    state: FlowState, latents: Array, count: Array, key: Key[Array, ""], *, network: VelocityNetwork, share: int, steps: int
) -> tuple[FlowState, Array]:
    """`count` steps of gradient descent, and the mean loss of the last of them; `share`: examples of this device."""
    optimizer = _optimizer(steps)

    def step(_: Array, carry: tuple[FlowState, Array]) -> tuple[FlowState, Array]:
        state, _ = carry
        keys = example_keys(jax.random.fold_in(key, state.step), example_positions(share, DATA_AXIS))
        chosen = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(latents), jnp.int32))(keys)
        loss = lambda params: jnp.mean(_losses(network, params, latents[chosen], keys))  # noqa: E731
        value, gradient = jax.lax.pmean(jax.value_and_grad(loss)(state.params), DATA_AXIS)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = averaged(state.ema_params, params, state.step, EMA_DECAY)
        return FlowState(state.step + 1, params, optimizer_state, ema_params), value

    return jax.lax.fori_loop(0, count, step, (state, jnp.float32(0.0)))


def map_moments(
    latents: Float[np.ndarray, "count latent"], prior: FlowMatching
) -> tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]:
    """Mean and standard deviation of each channel of the latent map, over positions and examples, [c] each.

    >>> map_moments(np.array([[0.0, 5.0, 2.0, 5.0]]), FlowMatching(rows=1, columns=2))
    (array([1., 5.]), array([1.e+00, 1.e-06]))
    """
    values = latents.reshape(len(latents) * prior.rows * prior.columns, -1)
    return values.mean(axis=0), np.maximum(values.std(axis=0), 1e-6)


def fit_flow_matching(
    prior: FlowMatching,
    latents: Float[np.ndarray, "count latent"],
    held_out: Float[np.ndarray, "others latent"],
    key: Key[Array, ""],
    steps: int,
    folder: Path,
    identity: dict[str, Any],
    progress: bool = True,
) -> dict[str, Any]:
    """Train a velocity field on latents, which it standardizes per channel of the map.

    AdamW without decay, a cosine after a short warm-up, gradients clipped to norm 1, an exponential moving average of the
    parameters, which is what the result holds.

    Args:
      prior: the network.
      latents: [N, L].
      held_out: of other images, [M, L], for the loss that is shown.
      key: decides initial parameters, batches, times and noise.
      steps: of training.
      folder: where `prior_training` with the checkpoints is kept until `finish`.
      identity: of the latents, plain JSON values; a fit of others in `folder` is begun anew.
      progress: show a progress bar.

    Returns:
      The parameters of the module that `prior` builds, float32.

    Raises:
      UserError: no steps, or latents that the map's positions do not divide.
      DivergenceError: the loss is not finite.
      Interrupted: a signal asked to stop; the same call continues.
    """
    check_count("steps", steps)
    size = latents.shape[1]
    if size % (prior.rows * prior.columns):
        raise UserError(f"{size} latents do not divide into the {prior.rows} x {prior.columns} positions of the prior's map.")
    mean, deviation = map_moments(latents, prior)
    tiled_mean, tiled_deviation = (np.tile(values, prior.rows * prior.columns)[None] for values in (mean, deviation))
    mesh = data_mesh()
    share = -(-BATCH // mesh.shape[DATA_AXIS])
    init_key, run_key, compare_key = jax.random.split(key, 3)
    network = VelocityNetwork(prior)
    standard, others = (
        jnp.asarray((part - tiled_mean) / tiled_deviation, jnp.float32) for part in (latents, held_out[:COMPARED])
    )
    compare_keys = example_keys(compare_key, jnp.arange(len(others)))
    compare = jax.jit(lambda params: jnp.mean(_losses(network, params, others, compare_keys)) / size)
    run = parallelize(
        functools.partial(_window, network=network, share=share, steps=steps), mesh, (REPLICATED,) * 4, REPLICATED, donate=(0,)
    )
    params = jax.jit(network.init)(init_key, standard[:1], jnp.zeros(1))["params"]
    state = FlowState(jnp.int32(0), params, jax.jit(_optimizer(steps).init)(params), jax.tree.map(jnp.copy, params))
    standard, run_key = replicate(standard, mesh), replicate(run_key, mesh)
    place = _open(folder / FOLDER, _about(identity, prior, steps))
    with stop_on_signals() as stop, Checkpoints(place / "checkpoints") as checkpoints:
        if checkpoints.steps():
            _, arrays = checkpoints.restore(state._asdict(), warn=log.warning)
            state = FlowState(**arrays)
        step, saved = int(state.step), int(state.step)
        state = replicate(state, mesh)
        with ProgressBar(steps * BATCH, step * BATCH, progress, "latents") as bar:
            bar.describe("flow matching")
            while step < steps:
                count = min(WINDOW, steps - step, saved + SAVE_EVERY - step)
                state, loss = run(state, standard, jnp.int32(count), run_key)
                step += count
                value = float(loss) / size
                if not math.isfinite(value):
                    raise DivergenceError(f"The flow-matching loss at step {step} is not finite; the latents may be extreme.")
                bar.update(count * BATCH)
                bar.show(loss=f"{value:.3f}")
                stopping = stop.number is not None  # one look: a signal may come at any time
                if step - saved == SAVE_EVERY or step == steps or stopping:
                    held_out_loss = float(compare(jax.device_get(state.ema_params)))
                    bar.show(held_out=f"{held_out_loss:.3f}")
                    checkpoints.save(step, jax.device_get(state._asdict()), held_out_loss)
                    saved = step
                if step < steps and stopping:
                    stop.check(f"stopped after step {step} of {steps} of the prior")
            stop.expect(EVALUATING)
    moments = {"origin": mean.astype(np.float32), "log_scale": np.log(deviation).astype(np.float32)}
    return {**moments, "velocity": jax.device_get(state.ema_params)}


def _about(identity: dict[str, Any], prior: FlowMatching, steps: int) -> bytes:
    """What tells a fit from others."""
    return json.dumps({**identity, "prior": to_dict(prior), "steps": steps}, indent=2).encode()


def _holds(place: Path, about: bytes) -> bool:
    path = place / "fit.json"
    return path.is_file() and path.read_bytes() == about


def _open(place: Path, about: bytes) -> Path:
    """The folder of a fit; emptied where it holds one of something else."""
    if not _holds(place, about):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_atomically(place / "fit.json", about)
    return place


def finish(folder: Path) -> None:
    """Remove what a fit kept to continue from, now that its result is kept elsewhere."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def finish_killed(folder: Path, identity: dict[str, Any], prior: FlowMatching, steps: int) -> None:
    """`finish` for a fit that a kill ended after its result was kept; what another fit continues from stays."""
    if _holds(folder / FOLDER, _about(identity, prior, steps)):
        finish(folder)
