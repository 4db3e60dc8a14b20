"""One device or many, one model or a stack, pmap or shard_map: the same losses, gradients and states for the same batch."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsvae_jax import objective
from bsvae_jax.config import MLP, Config, Linear, Residual
from bsvae_jax.distributed.mesh import (
    DATA_AXIS,
    MEMBER_AXIS,
    REPLICATED,
    SHARDED,
    available_bytes,
    data_mesh,
    describe_devices,
    member_slots,
    parallelize,
    replicate,
    stack,
    sweep_mesh,
)
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.training.state import build_model, create_state
from bsvae_jax.training.step import StepMetrics, TrainState, train_step

BATCH = 16
VARIANCES = [Constant(0.1), Optimal("example"), Optimal("batch"), Optimal("pixel"), Learned(), Predicted()]
SGD = optax.sgd(1.0)


def _state(decoder_variance, network, axis_name, seed=0) -> TrainState:
    """A state whose optimizer is plain gradient descent, so that its update *is* the gradient: Adam hides a factor of n."""
    config = Config(network=network, latent_size=3, decoder_variance=decoder_variance, seed=seed)
    state = create_state(config, build_model(config, (6, 5, 1), 1 / 16, axis_name), steps=10)
    return state.replace(optimizer=SGD, optimizer_state=SGD.init(state.params), learning_rate=jnp.float32(1.0))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    # Brightness differs from image to image, so that the variances of the devices' shares differ.
    scale = jnp.linspace(0.1, 1.0, BATCH).reshape(-1, 1, 1, 1)
    return jax.random.uniform(jax.random.key(7), (BATCH, 6, 5, 1)) * scale


def _gradient(before: TrainState, after: TrainState):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before.params, after.params)


def _shard_map_step(state, images, key, beta, devices):
    mesh = data_mesh(devices)
    step = parallelize(train_step, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED)
    return step(replicate(state, mesh), images, key, beta)


def _default_shard_map_step(state, images, key, beta, devices):
    """With `check_vma=True`, under which JAX itself sums the gradient of a replicated parameter over the devices."""
    specs = (REPLICATED, SHARDED, REPLICATED, REPLICATED)
    step = jax.jit(jax.shard_map(train_step, mesh=data_mesh(devices), in_specs=specs, out_specs=REPLICATED))
    return step(replicate(state, data_mesh(devices)), images, key, beta)


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


@pytest.mark.parametrize(
    "decoder_variance", [pytest.param(v, marks=() if v == Optimal("batch") else pytest.mark.long) for v in VARIANCES], ids=str
)
@pytest.mark.parametrize("run", [_shard_map_step, _pmap_step], ids=["shard_map", "pmap"])
def test_many_devices_take_the_step_of_one(run, decoder_variance, images, key):
    _check_against_one_device(run, decoder_variance, MLP((8,)), images, key, (1, 2, 4, 8))


@pytest.mark.long
@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
def test_the_defaults_of_shard_map_take_the_step_of_one(decoder_variance, images, key):
    _check_against_one_device(_default_shard_map_step, decoder_variance, MLP((8,)), images, key, (2, 4))


@pytest.mark.long
def test_the_defaults_of_shard_map_average_batch_norm_over_devices(images, key):
    _check_against_one_device(_default_shard_map_step, Optimal("batch"), Residual((4,)), images, key, (2, 4))


# Each variance model without BatchNorm is above; here those that share nothing over the batch are alike.
ALIKE = {Constant, Learned, Predicted}


@pytest.mark.long
@pytest.mark.parametrize(
    "decoder_variance", [pytest.param(v, marks=pytest.mark.slow if type(v) in ALIKE else ()) for v in VARIANCES], ids=str
)
def test_batch_norm_averages_over_devices(decoder_variance, images, key):
    _check_against_one_device(_shard_map_step, decoder_variance, Residual((4,)), images, key, (8,))


@pytest.mark.slow
@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
@pytest.mark.parametrize("run", [_shard_map_step, _pmap_step], ids=["shard_map", "pmap"])
def test_batch_norm_averages_over_any_number_of_devices(run, decoder_variance, images, key):
    _check_against_one_device(run, decoder_variance, Residual((4, 6)), images, key, (1, 2, 4, 8))


@pytest.mark.long
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
    gradient = parallelize(wrong, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED)(state, images, key, 2.0)
    right = _gradient(single, expected)
    difference = optax.tree.norm(jax.tree.map(lambda a, b: a - b, gradient, right))
    assert difference > 0.05 * optax.tree.norm(right)


@pytest.mark.long
@pytest.mark.parametrize("network", [Linear(), Residual((4,))], ids=["linear", "residual"])
def test_a_second_step_compiles_nothing(network, images, key):
    chex.clear_trace_counter()
    state = _state(Optimal("batch"), network, DATA_AXIS)
    mesh = data_mesh(4)
    once = chex.assert_max_traces(train_step, n=1)
    step = parallelize(once, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED, donate=(0,))
    state = replicate(state, mesh)
    for beta in (0.1, 1.0, 100.0):
        state, metrics = step(state, images, key, jnp.float32(beta))
    assert int(state.step) == 3
    assert isinstance(metrics, StepMetrics)


# --- Stacks of models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "members", "shape", "slots"),
    [
        (8, 1, (1, 8), 1),
        (8, 3, (2, 4), 4),
        (8, 5, (4, 2), 8),
        (8, 8, (8, 1), 8),
        (8, 17, (8, 1), 24),
        (6, 4, (3, 2), 6),
        (7, 6, (1, 7), 6),
        (1, 5, (1, 1), 5),
        (None, 2, (2, 1), 2),  # of all CPU devices no more than members: they share no batch
        (None, 5, (5, 1), 5),
        (None, 17, (8, 1), 24),
    ],
)
def test_the_member_axis_takes_what_divides_and_the_batch_the_rest(devices, members, shape, slots):
    mesh = sweep_mesh(devices, members, 840)
    assert mesh.axis_names == (MEMBER_AXIS, DATA_AXIS)
    assert mesh.devices.shape == shape
    assert mesh.devices.ravel().tolist() == jax.devices()[: math.prod(shape)]
    assert member_slots(mesh, members) == slots
    assert describe_devices(mesh) == f"{devices or min(members, 8)} x cpu (cpu)"


@pytest.mark.parametrize(
    ("devices", "members", "batch_size", "shape"),
    [
        (8, 3, 18, (4, 2)),  # 18 does not divide by 4
        (8, 3, 19, (8, 1)),
        (8, 1, 20, (2, 4)),
        (8, 5, 19, (8, 1)),
        (8, 8, 19, (8, 1)),  # nothing is shared
        (6, 2, 2, (3, 2)),
        (1, 3, 19, (1, 1)),
    ],
)
def test_a_batch_that_does_not_divide_is_shared_by_fewer_devices(devices, members, batch_size, shape):
    mesh = sweep_mesh(devices, members, batch_size)
    assert mesh.devices.shape == shape
    assert batch_size % shape[1] == 0


def test_a_sweep_takes_no_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"devices must lie in 1 \.\.\. 8"):
        sweep_mesh(9, 3, 16)


def test_a_stack_holds_its_members_in_order_on_their_devices():
    trees = [{"a": jnp.full((3,), float(i)), "key": jax.random.key(i), "none": None} for i in range(5)]
    mesh = sweep_mesh(8, 5, 8)  # 4 x 2: two slots a device
    stacked = stack(trees, mesh)
    # The last member is repeated; written out by hand.
    members = [0, 1, 2, 3, 4, 4, 4, 4]
    np.testing.assert_array_equal(stacked["a"], np.repeat(np.array(members)[:, None], 3, axis=1))
    np.testing.assert_array_equal(
        jax.random.key_data(stacked["key"]), [jax.random.key_data(jax.random.key(member)) for member in members]
    )
    for row, devices in enumerate(mesh.devices):
        for shard in stacked["a"].addressable_shards:
            if shard.device in devices:
                np.testing.assert_array_equal(shard.data[:, 0], members[2 * row : 2 * row + 2])
    jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)(stacked)
    np.testing.assert_array_equal(trees[4]["a"], [4.0, 4.0, 4.0])  # not given away with the stack


@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_lift_gives_every_member_its_own_and_all_what_is_shared(execution):
    """A function whose value is known by hand: `mean(share * x) + y`, with one `x` for all."""

    def function(share, x, y):
        return jax.lax.pmean(jnp.mean(share * x), DATA_AXIS) + y

    mesh = sweep_mesh(8, 3, 8)
    shares = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    y = np.arange(4, dtype=np.float32)
    result = parallelize(function, mesh, (SHARDED, REPLICATED, REPLICATED), REPLICATED, execution=execution, shared=(1,))(
        shares, jnp.float32(3.0), y
    )
    np.testing.assert_allclose(result, 3.0 * shares.mean(axis=1) + y, rtol=1e-5)


def _members(count):
    """Seed, beta and constant variance of each of `count` members, all different but for the variance."""
    return [(seed, 0.5 * 1.5**seed, (0.1, 0.4)[seed % 2]) for seed in range(count)]


def _check_members(execution, decoder_variance, network, images, count):
    """Every member's step in a stack on 8 devices, against that model alone on one, with images and noise of its own."""
    constant = isinstance(decoder_variance, Constant)
    mesh = sweep_mesh(8, count, BATCH)
    members = _members(count)
    slots = member_slots(mesh, count)
    keys = [jax.random.key(100 + seed) for seed, _, _ in members]
    batches = [jnp.roll(images, seed, axis=0) * (1.0 - 0.05 * seed) for seed, _, _ in members]
    states = [_state(decoder_variance, network, DATA_AXIS, seed) for seed, _, _ in members]
    betas = [jnp.float32(beta) for _, beta, _ in members]
    variances = [jnp.float32(variance) if constant else None for _, _, variance in members]
    specs = (REPLICATED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    step = parallelize(train_step, mesh, specs, REPLICATED, execution=execution)
    batch = jnp.stack(batches + batches[-1:] * (slots - count))
    after, metrics = step(stack(states, mesh), batch, stack(keys, mesh), stack(betas, mesh), stack(variances, mesh))
    single_step = jax.jit(train_step)
    for i, (seed, beta, variance) in enumerate(members):
        # The independent side: no stack, no mesh, the variance in the model itself.
        single = _state(Constant(variance) if constant else decoder_variance, network, None, seed)
        expected, expected_metrics = single_step(single, batches[i], keys[i], beta)
        own = jax.tree.map(lambda leaf: np.asarray(leaf[i]), (after.params, after.batch_stats, metrics))  # noqa: B023
        gradient = _gradient(single, expected)
        scale = float(optax.tree.norm(gradient))
        assert scale > 1.0
        chex.assert_trees_all_close(own[2], expected_metrics, rtol=1e-5)
        # As above: 1e-5 of the whole gradient.
        chex.assert_trees_all_close(_gradient(single, expected.replace(params=own[0])), gradient, rtol=1e-5, atol=1e-5 * scale)
        # A running mean near 0 is a sum of activations of order 1 that cancel.
        chex.assert_trees_all_close(own[1], expected.batch_stats, rtol=1e-5, atol=5e-6)


@pytest.mark.long
@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_members_take_the_step_of_one_model(execution, decoder_variance, images):
    _check_members(execution, decoder_variance, MLP((8,)), images, 3)  # 2 x 4 devices, one slot left over


@pytest.mark.long
@pytest.mark.parametrize("count", [5, 8], ids=["4 x 2 devices", "8 x 1 devices"])
@pytest.mark.parametrize("decoder_variance", [Constant(0.1), Optimal("batch")], ids=str)
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_any_number_of_members_take_the_step_of_one_model(execution, decoder_variance, count, images):
    _check_members(execution, decoder_variance, MLP((8,)), images, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5, 8], ids="{} members".format)
@pytest.mark.parametrize("decoder_variance", VARIANCES, ids=str)
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_every_number_of_members_and_every_variance(execution, decoder_variance, count, images):
    _check_members(execution, decoder_variance, MLP((8,)), images, count)


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_batch_norm_is_each_members_own(execution, images):
    _check_members(execution, Optimal("batch"), Residual((4,)), images, 3)


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_new_numbers_compile_nothing(execution, images):
    chex.clear_trace_counter()
    mesh = sweep_mesh(8, 3, BATCH)
    specs = (REPLICATED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    once = chex.assert_max_traces(train_step, n=1)
    step = parallelize(once, mesh, specs, REPLICATED, donate=(0,), execution=execution, shared=(1,))
    for seed in range(3):
        states = [_state(Constant(), MLP((8,)), DATA_AXIS, seed).replace(learning_rate=jnp.float32(seed + i)) for i in range(3)]
        numbers = [jnp.float32(10.0**i + seed) for i in range(3)]
        keys = [jax.random.key(seed + i) for i in range(3)]
        after, _ = step(stack(states, mesh), images, stack(keys, mesh), stack(numbers, mesh), stack(numbers, mesh))
        np.testing.assert_array_equal(after.step, [1, 1, 1, 1])


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_the_learning_rate_is_each_members_own(execution, images, key):
    rates = [0.25, 1.0, 3.0]
    mesh = sweep_mesh(1, 3, BATCH)
    states = [_state(Optimal(), MLP((8,)), DATA_AXIS).replace(learning_rate=jnp.float32(rate)) for rate in rates]
    specs = (REPLICATED, SHARDED, REPLICATED, REPLICATED)
    step = parallelize(train_step, mesh, specs, REPLICATED, execution=execution, shared=(1, 2, 3))
    after, _ = step(stack(states, mesh), images, key, jnp.float32(1.0))
    single = _state(Optimal(), MLP((8,)), None)
    gradient = _gradient(single, jax.jit(train_step)(single, images, key, 1.0)[0])
    scale = float(optax.tree.norm(gradient))
    for i, rate in enumerate(rates):
        own = jax.tree.map(lambda leaf: leaf[i], after.params)  # noqa: B023
        change = _gradient(single, single.replace(params=own))
        chex.assert_trees_all_close(change, jax.tree.map(lambda g: rate * g, gradient), rtol=1e-5, atol=1e-5 * rate * scale)  # noqa: B023


def test_memory_of_a_device_is_a_share_of_what_is_free():
    import psutil

    free = psutil.virtual_memory().available
    # All the fake devices share the machine's memory; other programs may take or give some meanwhile.
    assert available_bytes(data_mesh(1)) == pytest.approx(0.85 * free, rel=0.2)
    assert available_bytes(sweep_mesh(8, 2, 8)) == pytest.approx(available_bytes(data_mesh(1)) / 8, rel=0.2)


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_posterior_noise_does_not_depend_on_the_devices(images, key):
    model = _state(Constant(0.1), Linear(), DATA_AXIS).model
    variables = model.clone(axis_name=None).init(key, images, key)
    forward = functools.partial(lambda v, x, k: model.apply(v, x, k).z)
    z = [
        np.asarray(parallelize(forward, data_mesh(n), (REPLICATED, SHARDED, REPLICATED), SHARDED)(variables, images, key))
        for n in (1, 2, 8)
    ]
    # A float32 product of another share of the batch: a few units of the last place of numbers of size 1.
    np.testing.assert_allclose(z[1:], [z[0], z[0]], rtol=1e-6, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_would():
    with pytest.raises(UserError, match=r"batch_size 100 does not divide over 8 devices; 96 would"):
        data_mesh(8, 100)
    with pytest.raises(UserError, match=r"devices must lie in 1 \.\.\. 8"):
        data_mesh(9)


def test_devices_are_described():
    assert describe_devices(data_mesh(2)) == "2 x cpu (cpu)"
