"""One device or many, pmap or shard_map: the same losses, gradients and states for the same global batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsvae_jax import objective
from bsvae_jax.config import MLP, Config, Linear, Residual
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.parallel import DATA_AXIS, REPLICATED, SHARDED, data_mesh, describe_devices, lift, replicate
from bsvae_jax.training import StepMetrics, TrainState, build_model, create_state, train_step

BATCH = 16
VARIANCES = [Constant(0.1), Optimal("example"), Optimal("batch"), Optimal("pixel"), Learned(), Predicted()]


def _state(decoder_variance, network, axis_name, seed=0) -> TrainState:
    """A state whose optimizer is plain gradient descent, so that its update *is* the gradient: Adam hides a factor of n."""
    config = Config(network=network, latent_size=3, decoder_variance=decoder_variance, seed=seed)
    state = create_state(config, build_model(config, (6, 5, 1), 1 / 16, axis_name), steps=10)
    optimizer = optax.sgd(1.0)
    return state.replace(optimizer=optimizer, optimizer_state=optimizer.init(state.params))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    # Brightness differs from image to image, so that the variances of the devices' shares differ.
    scale = jnp.linspace(0.1, 1.0, BATCH).reshape(-1, 1, 1, 1)
    return jax.random.uniform(jax.random.key(7), (BATCH, 6, 5, 1)) * scale


def _gradient(before: TrainState, after: TrainState):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before.params, after.params)


def _shard_map_step(state, images, key, beta, devices):
    mesh = data_mesh(devices)
    step = lift(train_step, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED)
    return step(replicate(state, mesh), images, key, beta)


def _pmap_step(state, images, key, beta, devices):
    step = jax.pmap(train_step, axis_name=DATA_AXIS, in_axes=(None, 0, None, None), devices=jax.devices()[:devices])
    after, metrics = step(state, images.reshape(devices, -1, *images.shape[1:]), key, beta)
    for leaf in jax.tree.leaves(after.params):
        np.testing.assert_array_equal(leaf[0], leaf[-1])  # every device ends in the same state
    return jax.tree.map(lambda leaf: leaf[0], (after, metrics))


def _check_against_one_device(run, decoder_variance, network, images, key, device_counts):
    # The independent side: one device, no device axis at all, the whole batch.
    single = _state(decoder_variance, network, None)
    expected, expected_metrics = jax.jit(train_step)(single, images, key, 2.0)
    gradient = _gradient(single, expected)
    scale = float(optax.tree.norm(gradient))
    many = _state(decoder_variance, network, DATA_AXIS)
    for devices in device_counts:
        after, metrics = run(many, images, key, jnp.float32(2.0), devices)
        chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
        # 1e-5 of the whole gradient: single entries may be sums that cancel.
        chex.assert_trees_all_close(_gradient(many, after), gradient, rtol=1e-5, atol=1e-5 * scale)
        chex.assert_trees_all_close(after.batch_stats, expected.batch_stats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
@pytest.mark.parametrize("run", [_shard_map_step, _pmap_step], ids=["shard_map", "pmap"])
def test_many_devices_take_the_step_of_one(run, decoder_variance, images, key):
    _check_against_one_device(run, decoder_variance, MLP((8,)), images, key, (1, 2, 4, 8))


@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
def test_batch_norm_averages_over_devices(decoder_variance, images, key):
    _check_against_one_device(_shard_map_step, decoder_variance, Residual((4,)), images, key, (8,))


@pytest.mark.slow
@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
@pytest.mark.parametrize("run", [_shard_map_step, _pmap_step], ids=["shard_map", "pmap"])
def test_batch_norm_averages_over_any_number_of_devices(run, decoder_variance, images, key):
    _check_against_one_device(run, decoder_variance, Residual((4, 6)), images, key, (1, 2, 4, 8))


def test_a_variance_per_device_gives_other_gradients(images, key):
    """The silent bug that the test above must be able to see: each device its own variance, gradients averaged."""
    single = _state(Optimal("batch"), MLP((8,)), None)
    expected, _ = train_step(single, images, key, 2.0)

    def wrong(state, share, key, beta):
        def loss(params):
            output = state.model.apply({"params": params}, share, key)
            terms = objective.elbo_terms(share, output.decoded.mean, output.rate, state.model.decoder_variance)
            return objective.mean_objective(terms, beta)

        return jax.lax.pmean(jax.grad(loss)(state.params), DATA_AXIS)

    state = _state(Optimal("batch"), MLP((8,)), DATA_AXIS)
    mesh = data_mesh(8)
    gradient = lift(wrong, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED)(state, images, key, 2.0)
    right = _gradient(single, expected)
    difference = optax.tree.norm(jax.tree.map(lambda a, b: a - b, gradient, right))
    assert difference > 0.05 * optax.tree.norm(right)


@pytest.mark.parametrize("network", [Linear(), Residual((4,))], ids=["linear", "residual"])
def test_a_second_step_compiles_nothing(network, images, key):
    chex.clear_trace_counter()
    state = _state(Optimal("batch"), network, DATA_AXIS)
    mesh = data_mesh(4)
    once = chex.assert_max_traces(train_step, n=1)
    step = lift(once, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED, donate=(0,))
    state = replicate(state, mesh)
    for beta in (0.1, 1.0, 100.0):
        state, metrics = step(state, images, key, jnp.float32(beta))
    assert int(state.step) == 3
    assert isinstance(metrics, StepMetrics)


def test_posterior_noise_does_not_depend_on_the_devices(images, key):
    model = _state(Constant(0.1), Linear(), DATA_AXIS).model
    variables = model.clone(axis_name=None).init(key, images, key)
    forward = functools.partial(lambda v, x, k: model.apply(v, x, k).z)
    z = [
        np.asarray(lift(forward, data_mesh(n), (REPLICATED, SHARDED, REPLICATED), SHARDED)(variables, images, key))
        for n in (1, 2, 8)
    ]
    np.testing.assert_allclose(z[1], z[0], rtol=1e-6)
    np.testing.assert_allclose(z[2], z[0], rtol=1e-6)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_would():
    with pytest.raises(UserError, match=r"batch_size 100 does not divide over 8 devices; 96 would"):
        data_mesh(8, 100)
    with pytest.raises(UserError, match=r"devices must lie in 1 \.\.\. 8"):
        data_mesh(9)


def test_devices_are_described():
    assert describe_devices(data_mesh(2)) == "2 x cpu (cpu)"
