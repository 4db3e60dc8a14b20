"""Gradients of the objective against finite differences in float64, leaf by leaf, and sums of bfloat16 gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import float64

from bsvae_jax.config import MLP, Flow, FlowMatching, Linear, Mixture, Residual, Spatial, StandardNormal, VampPrior
from bsvae_jax.models._subpixel import Convolution
from bsvae_jax.models.latent_map import _group_norm
from bsvae_jax.models.layers import BatchNorm, dense
from bsvae_jax.models.priors.flow_matching import flow_matching_loss
from bsvae_jax.models.priors.transformer import VelocityNetwork
from bsvae_jax.models.residual import TransposedConvolution
from bsvae_jax.models.vae import build_vae
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted, mean_objective

SHAPE, LATENT, BATCH = (4, 6, 1), 6, 5
RESIDUAL = Residual(widths=(2,))
CASES = {
    "linear": (Linear(), StandardNormal(), Optimal("batch")),
    "mlp": (MLP((5,)), StandardNormal(), Predicted(floor=0.01)),
    "residual": (RESIDUAL, StandardNormal(), Optimal("example")),
    "spatial": (Spatial(widths=(2, 2), blocks=1, groups=1), StandardNormal(), Learned(0.3)),
    "mixture": (MLP((5,)), Mixture(2), Constant(0.3)),
    "full mixture": (MLP((5,)), Mixture(2, "full"), Constant(0.3)),
    "flow": (MLP((5,)), Flow(2, 4), Constant(0.3)),
    "vamp": (MLP((5,)), VampPrior(3), Constant(0.3)),
    "vamp, linear": (Linear(), VampPrior(2), Constant(0.3)),
    "vamp, residual": (RESIDUAL, VampPrior(3), Optimal("pixel", floor=0.01)),
    "full mixture, residual": (RESIDUAL, Mixture(2, "full"), Optimal("channel", floor=0.01)),
    "flow, residual": (RESIDUAL, Flow(2, 4), Learned(0.3)),
}
QUICK = ("mlp", "mixture", "vamp")
MODES = [
    pytest.param(name, train, marks=() if name in QUICK and not train else pytest.mark.long)
    for name in CASES
    for train in (False, True)
]


def check_gradient(loss, params, rng):
    """The gradient of `loss(params)` in each array of them along a random direction, against its central difference."""
    gradients, value = flatten_dict(jax.jit(jax.grad(loss))(params)), jax.jit(loss)
    for path, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)

        def along(step, path=path, direction=direction):
            flat = flatten_dict(params)
            return float(value(unflatten_dict({**flat, path: flat[path] + step * direction})))

        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        # Rounding of the loss leaves 1e-16 / 1e-5 of it.
        slack = 1e-10 * abs(along(0.0))
        assert np.sum(gradient * direction) == pytest.approx(difference, rel=1e-6, abs=slack), path


def moved_from(shapes, rng):
    """Away from where training starts: a zero kernel or a unit scale would hide a missing term."""
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.3, 0.8, leaf.shape) * rng.choice([-1, 1], leaf.shape)), shapes)


@pytest.mark.parametrize(("name", "train"), MODES)
def test_every_gradient_is_a_finite_difference(name, train):
    network, prior, variance = CASES[name]
    with float64():
        rng = np.random.default_rng(0)
        model = build_vae(network, LATENT, SHAPE, variance, prior, dtype=jnp.float64)
        x, key = jnp.asarray(rng.uniform(size=(BATCH, *SHAPE))), jax.random.key(1)
        moved = moved_from(jax.eval_shape(model.init, key, x, key), rng)
        variances = jax.tree.map(jnp.abs, moved.get("batch_stats", {}))

        def loss(params):
            variables = {"params": params, "batch_stats": variances}
            terms, _ = model.apply(variables, x, key, train, method="elbo_terms", mutable=["batch_stats"])
            return mean_objective(terms, 1.5)

        check_gradient(loss, moved["params"], rng)


@pytest.mark.long
def test_every_gradient_of_flow_matching_is_a_finite_difference():
    """Of its loss in the parameters of the velocity, the only one that is trained after the others."""
    prior = FlowMatching(rows=2, columns=1, width=8, depth=1, heads=2)
    network = VelocityNetwork(prior)
    with float64():
        rng = np.random.default_rng(0)
        z, noise = jnp.asarray(rng.normal(size=(2, BATCH, LATENT)))
        time = jnp.asarray(rng.uniform(size=BATCH))
        params = moved_from(jax.eval_shape(network.init, jax.random.key(0), z, time)["params"], rng)

        def loss(params):
            return flow_matching_loss(lambda x, t: network.apply({"params": params}, x, t), z, noise, time).mean()

        check_gradient(loss, params, rng)


# 16,384 terms and more: a sum in bfloat16, of 8 bits, stands still at 256 or, taken in blocks, at a few thousands.
MAPS, FLAT = (16, 32, 32, 2), (16_384, 2)
LAYERS = {
    "dense": (dense(3, jnp.bfloat16), FLAT, ()),
    "dense over positions": (dense(3, jnp.bfloat16), (16, 1024, 2), ()),
    "convolution": (Convolution(3, 3, dtype=jnp.bfloat16), MAPS, ()),
    "transposed": (TransposedConvolution(3, 1, dtype=jnp.bfloat16), MAPS, ((32, 32),)),
    "unordered": (TransposedConvolution(3, 1, unordered=True, dtype=jnp.bfloat16), (4, 4096, 2), ((64, 64),)),
    "transposed, doubling": (TransposedConvolution(3, 2, dtype=jnp.bfloat16), MAPS, ((64, 64),)),
    "batch norm": (BatchNorm(False, None, jnp.bfloat16), MAPS, ()),
    "batch norm in training": (BatchNorm(True, None, jnp.bfloat16), MAPS, ()),
    "group norm": (_group_norm(1, jnp.bfloat16, "norm"), MAPS, ()),
}


@pytest.mark.long
@pytest.mark.parametrize(("layer", "shape", "arguments"), LAYERS.values(), ids=LAYERS)
def test_bfloat16_gradients_of_biases_and_scales_are_summed_in_float32(layer, shape, arguments):
    # Quarters, which bfloat16 holds exactly. A norm's scale sees what BatchNorm made of x, so x is +-1 in equal shares.
    x = jnp.asarray(np.where(np.arange(np.prod(shape)).reshape(shape) // 2 % 2, 1.0, -1.0), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, *arguments)

    def loss(params):
        y, _ = layer.apply({**variables, "params": params}, x, *arguments, mutable=["batch_stats"])
        weights = jnp.where(jnp.arange(y.size).reshape(y.shape) // y.shape[-1] % 2 == 0, 0.25, 1.0).astype(y.dtype)
        assert y.dtype == jnp.bfloat16
        return jnp.sum((y * weights).astype(jnp.float32)), y.size // y.shape[-1]

    gradients, count = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert np.all(np.asarray(gradients["bias"]) == 0.625 * int(count))
    if "scale" in gradients:
        np.testing.assert_allclose(gradients["scale"], 0.375 * int(count), rtol=2e-5)
