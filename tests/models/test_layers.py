"""BatchNorm against Flax's, against its definition in float64, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import float64

from bsvae_jax.distributed.mesh import DATA_AXIS, P, data_mesh, parallelize
from bsvae_jax.models.layers import BatchNorm, normalize

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(3.0, 2.0, size=(8, 3, 5, 4)).astype(np.float32))
SCALE = jnp.asarray([0.5, -1.0, 2.0, 1.0])
BIAS = jnp.asarray([0.0, 1.0, -1.0, 3.0])
COTANGENT = jnp.asarray(RANDOM.normal(size=X.shape).astype(np.float32))


def flax_norm(train, dtype=jnp.float32):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)


@pytest.mark.parametrize(("leaky", "bias_before"), [(False, 0.0), (True, np.arange(4.0, dtype=np.float32))])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_variables_values_gradients_and_averages_are_those_of_flax(train, dtype, leaky, bias_before):
    ours, theirs = BatchNorm(train, dtype=dtype, leaky=leaky), flax_norm(train, dtype)
    variables = theirs.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), X)) == jax.tree.map(jnp.shape, variables)
    variables = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": BIAS + 1.0, "var": SCALE**2}}

    def run(layer):
        def loss(params, x):
            before = (x, bias_before) if layer is ours else ((x + jnp.broadcast_to(bias_before, x.shape)).astype(dtype),)
            y, updates = layer.apply({**variables, "params": params}, *before, mutable=["batch_stats"])
            y = nn.leaky_relu(y) if leaky and layer is theirs else y
            return jnp.sum(COTANGENT * y.astype(jnp.float32)), (y, updates)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], X.astype(dtype))

    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    (_, found), gradients = jax.jit(lambda: run(ours))()
    (_, expected), expected_gradients = jax.jit(lambda: run(theirs))()
    assert found[0].dtype == expected[0].dtype == dtype
    close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=10 * tolerance
    )
    jax.tree.map(close, found, expected)
    jax.tree.map(close, gradients, expected_gradients)


@pytest.mark.parametrize("leaky", [False, True])
def test_the_written_derivative_is_that_of_the_definition(leaky):
    """Against central differences of the definition, in float64; no value lies within 1e-4 of the kink."""

    def definition(x, scale, bias):
        axes = (0, 1, 2)
        y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias
        assert np.abs(y).min() > 1e-4
        return np.where(leaky & (y < 0), 0.01 * y, y)

    arguments = [np.asarray(argument, np.float64) for argument in (X, SCALE, BIAS)]
    directions = [RANDOM.normal(size=argument.shape) for argument in arguments]
    with float64():
        form = lambda *given: normalize(*given, None, jnp.float64, leaky)  # noqa: E731
        (y, mean, variance), tangents = jax.jvp(form, tuple(map(jnp.asarray, arguments)), tuple(map(jnp.asarray, directions)))
        pulled = jax.vjp(form, *map(jnp.asarray, arguments))[1](tangents)
    np.testing.assert_allclose(y, definition(*arguments), rtol=1e-10)
    np.testing.assert_allclose(mean, arguments[0].mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(variance, arguments[0].var((0, 1, 2)), rtol=1e-12)
    width = 1e-5
    after, before = ([a + sign * width * d for a, d in zip(arguments, directions, strict=True)] for sign in (1, -1))
    np.testing.assert_allclose(tangents[0], (definition(*after) - definition(*before)) / (2 * width), atol=1e-8)
    for found, statistic in zip(tangents[1:], (np.mean, np.var), strict=True):
        expected = (statistic(after[0], (0, 1, 2)) - statistic(before[0], (0, 1, 2))) / (2 * width)
        np.testing.assert_allclose(found, expected, atol=1e-8)
    # Backwards is the transpose of forwards: <J d, J d> = <d, J^T J d>.
    squared = sum(float(np.vdot(tangent, tangent)) for tangent in tangents)
    np.testing.assert_allclose(sum(np.vdot(p, d) for p, d in zip(pulled, directions, strict=True)), squared, rtol=1e-10)


def test_second_derivatives_exist_in_both_orders():
    weights = jnp.arange(X.size, dtype=jnp.float32).reshape(X.shape) / X.size
    loss = lambda x: jnp.sum(weights * normalize(x, SCALE, BIAS, None, jnp.float32, True)[0] ** 3)  # noqa: E731
    _, forward_over_reverse = jax.jvp(jax.grad(loss), (X,), (COTANGENT,))
    reverse_over_forward = jax.grad(lambda x: jax.jvp(loss, (x,), (COTANGENT,))[1])(X)
    np.testing.assert_allclose(forward_over_reverse, reverse_over_forward, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_statistics_and_gradients_are_those_of_the_batch_of_all_devices(by):
    def gradients(x, cotangent, axis_name):
        def loss(scale, bias, x):
            y, mean, variance = normalize(x, scale, bias, axis_name, jnp.float32, True)
            return jnp.sum(cotangent * y), (mean, variance)

        of_parameters, statistics = jax.grad(loss, (0, 1), has_aux=True)(SCALE, BIAS, x)
        of_x = jax.grad(lambda x: loss(SCALE, BIAS, x)[0])(x)
        return (of_parameters, statistics), of_x

    def of_device(x, cotangent):
        (of_parameters, statistics), of_x = gradients(x, cotangent, DATA_AXIS)
        return (jax.lax.psum(of_parameters, DATA_AXIS), statistics), of_x

    mesh = data_mesh(4)
    found = parallelize(of_device, mesh, (P(DATA_AXIS), P(DATA_AXIS)), (P(), P(DATA_AXIS)), by=by)(X, COTANGENT)
    expected = jax.jit(lambda x, cotangent: gradients(x, cotangent, None))(X, COTANGENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
