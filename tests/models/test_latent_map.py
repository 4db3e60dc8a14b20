"""The autoencoder with a latent map against NumPy in float64, layer lists summed by hand, one device and plain memory.

Errors are relative to the largest entry of the reference.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, random_variables, relative_error

from bsvae_jax import config as configs
from bsvae_jax.config import Config, Digits, Optimizer, Spatial
from bsvae_jax.data import load
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, data_mesh, parallelize, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.models import pytorch
from bsvae_jax.models.latent_map import Attention, ResidualBlock, SpatialDecoder, SpatialEncoder, doubled, latent_map
from bsvae_jax.models.layers import stage_size
from bsvae_jax.objective import Constant, Optimal
from bsvae_jax.training.fit import fit
from bsvae_jax.training.restore import restore
from bsvae_jax.training.state import build_model, check_against_data, create_state
from bsvae_jax.training.step import train_step

SMALL = Spatial(widths=(4, 6), blocks=1, groups=2)
SHAPE, LATENT, BATCH = (6, 5, 2), 18, 8  # a map of 3 x 3 positions and 2 channels


def built(dtype=jnp.float32, network=SMALL):
    """Encoder and decoder, `(module, random variables, input)` each."""
    modules = network.build(LATENT, SHAPE, dtype=dtype)
    inputs = normal(1, BATCH, *SHAPE), normal(2, BATCH, LATENT)
    return [(module, random_variables(module, value), value) for module, value in zip(modules, inputs, strict=True)]


# --- Layers against NumPy ---------------------------------------------------------------------------------------------


def exact(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def numpy_norm(x, params, groups):
    """Each example and group of channels to mean 0 and variance 1, over positions and the group."""
    y = np.empty_like(x)
    size = x.shape[-1] // groups
    for example, group in np.ndindex(len(x), groups):
        part = x[example, ..., group * size : (group + 1) * size]
        y[example, ..., group * size : (group + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return y * params["scale"] + params["bias"]


def numpy_convolution(x, params):
    """Stride 1, zeros outside."""
    kernel = params["kernel"]
    pad = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + params["bias"]
    for row, column in np.ndindex(kernel.shape[:2]):
        out += padded[:, row : row + x.shape[1], column : column + x.shape[2]] @ kernel[row, column]
    return out


def silu(x):
    return x / (1.0 + np.exp(-x))


@pytest.mark.parametrize(("groups", "before", "after"), [(1, 4, 4), (2, 4, 6), (4, 4, 8)])
def test_residual_block_is_its_formula(groups, before, after):
    block, x = ResidualBlock(after, groups), normal(3, 2, 3, 4, before)
    variables = random_variables(block, x)
    p, value = exact(variables["params"]), np.asarray(x, np.float64)
    y = numpy_convolution(silu(numpy_norm(value, p["norm1"], groups)), p["conv1"])
    y = numpy_convolution(silu(numpy_norm(y, p["norm2"], groups)), p["conv2"])
    shortcut = numpy_convolution(value, p["shortcut"]) if before != after else value
    assert ("shortcut" in p) == (before != after)
    assert relative_error(block.apply(variables, x), shortcut + y) < 1e-5


def test_attention_is_its_formula():
    attention, x = Attention(groups=2), 2.0 * normal(4, 2, 3, 2, 4)
    variables = random_variables(attention, x)
    p, value = exact(variables["params"]), np.asarray(x, np.float64)
    normed = numpy_norm(value, p["norm"], 2)
    expected = np.empty_like(value)
    for example, row, column in np.ndindex(2, 3, 2):
        query, key, content = (normed[example] @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
        scores = np.exp(np.sum(query[row, column] * key, axis=-1) / np.sqrt(4))  # [3, 2], of all positions
        mixed = np.sum(scores[..., None] * content, axis=(0, 1)) / scores.sum()
        expected[example, row, column] = value[example, row, column] + mixed @ p["out"]["kernel"] + p["out"]["bias"]
    assert relative_error(attention.apply(variables, x), expected) < 1e-5


def test_a_fresh_block_is_the_identity():
    x = normal(5, 2, 3, 4, 6)
    for layer in (ResidualBlock(6, 2), Attention(2)):
        np.testing.assert_array_equal(layer.apply(layer.init(jax.random.key(0), x), x), x)


@pytest.mark.parametrize(("size", "out"), [((2, 3), (4, 6)), ((2, 3), (3, 5)), ((1, 1), (1, 2))])
def test_doubling_repeats_rows_and_columns(size, out):
    x = normal(6, 2, *size, 3)
    expected = np.repeat(np.repeat(np.asarray(x), 2, axis=1), 2, axis=2)[:, : out[0], : out[1]]
    np.testing.assert_array_equal(doubled(x, out), expected)


# --- Shapes and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "widths", "latent", "expected"),
    [
        ((32, 32, 3), (8, 8, 16), 256, (8, 8, 4)),
        ((64, 64, 3), (8, 8, 8, 16), 192, (8, 8, 3)),
        ((28, 28, 1), (8, 16), 196, (14, 14, 1)),
        ((28, 28, 1), (8, 16, 16, 16), 32, (4, 4, 2)),
        ((13, 22, 2), (4, 4, 4), 48, (4, 6, 2)),
        ((1, 3, 1), (2,), 6, (1, 3, 2)),
    ],
)
def test_shapes(shape, widths, latent, expected):
    network = Spatial(widths, blocks=1, groups=2)
    assert latent_map(network, latent, *shape[:2]) == expected
    encoder, decoder = network.build(latent, (*shape[:2], 5))

    def run(module, inputs):
        return module.apply(module.init(jax.random.key(0), inputs), inputs)

    mean, log_variance = jax.eval_shape(lambda x: run(encoder, x), jnp.zeros((3, *shape)))
    image = jax.eval_shape(lambda z: run(decoder, z), jnp.zeros((3, latent)))
    assert (mean.shape, log_variance.shape, image.shape) == ((3, latent), (3, latent), (3, *shape[:2], 5))


def test_a_stage_has_half_the_side_of_the_one_before_rounded_up():
    for side in range(1, 70):
        halved = side
        for stage in range(6):
            assert stage_size(side, stage) == halved
            halved = (halved + 1) // 2


@pytest.mark.long
def test_the_latents_are_the_map_in_row_major_order():
    """What leaves the encoder's last convolution, and what enters the decoder's first."""
    (encoder, e, x), (decoder, d, z) = built()
    outputs = []
    for module, variables, inputs, layer in ((encoder, e, x, "posterior"), (decoder, d, z, "latent")):
        only = lambda module, _, layer=layer: module.name == layer  # noqa: E731
        result, kept = module.apply(variables, inputs, capture_intermediates=only, mutable=["intermediates"])
        outputs.append((result, kept["intermediates"][layer]["__call__"][0]))
    ((mean, log_variance), parameters), (_, entered) = outputs
    for example, row, column, channel in np.ndindex(BATCH, 3, 3, 2):
        latent = (row * 3 + column) * 2 + channel
        assert mean[example, latent] == parameters[example, row, column, channel]
        assert log_variance[example, latent] == parameters[example, row, column, 2 + channel]
    latents = np.asarray(z, np.float64)
    maps = np.stack([latents[:, 2 * position : 2 * position + 2] for position in range(9)], axis=1).reshape(BATCH, 3, 3, 2)
    assert relative_error(entered, numpy_convolution(maps, exact(d["params"]["latent"]))) < 1e-5


def test_parameters_counted_by_hand():
    def conv(kernel, before, after):
        return kernel * kernel * before * after + after

    def norm(features):
        return 2 * features

    def block(before, after):
        shortcut = conv(1, before, after) if before != after else 0
        return norm(before) + conv(3, before, after) + norm(after) + conv(3, after, after) + shortcut

    attention = norm(6) + 4 * (6 * 6 + 6)
    middle = block(6, 6) + attention + block(6, 6)
    encoder = conv(3, 2, 4) + block(4, 4) + block(4, 4) + conv(3, 4, 4) + block(4, 6) + block(6, 6) + middle
    encoder += norm(6) + conv(3, 6, 2 * 2)
    decoder = conv(3, 2, 6) + middle + 2 * block(6, 6) + conv(3, 6, 6) + block(6, 4) + block(4, 4) + norm(4) + conv(3, 4, 2)
    for attended in (True, False):
        network = dataclasses.replace(SMALL, blocks=2, attention=attended)
        for (_, variables, _), expected in zip(built(network=network), (encoder, decoder), strict=True):
            counted = sum(leaf.size for leaf in jax.tree.leaves(variables))
            assert counted == expected - (0 if attended else attention)


# --- What must not leak, and what must not matter ---------------------------------------------------------------------


@pytest.mark.long
def test_an_example_sees_itself_only():
    for module, variables, inputs in built():
        apply = jax.jit(module.apply)
        together = apply(variables, inputs)
        others = apply(variables, inputs.at[1:].set(100.0))
        chex.assert_trees_all_equal(*[jax.tree.map(lambda leaf: leaf[0], value) for value in (together, others)])
        alone = apply(variables, inputs[:1])
        for value, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert relative_error(value[:1], expected) < 1e-5


def test_training_and_evaluation_are_the_same_function():
    for module, variables, inputs in built():
        chex.assert_trees_all_equal(module.apply(variables, inputs, True), module.apply(variables, inputs, False))


@pytest.mark.long
def test_rematerialized_blocks_have_the_same_parameters_values_and_gradients():
    kinds = (
        (SpatialEncoder, {"latent_size": LATENT}, normal(1, BATCH, *SHAPE)),
        (SpatialDecoder, {"output_shape": SHAPE}, normal(2, BATCH, LATENT)),
    )
    for kind, options, inputs in kinds:
        plain, again = (kind(SMALL, rematerialize=flag, **options) for flag in (False, True))
        variables = random_variables(plain, inputs)
        chex.assert_trees_all_equal_shapes(variables, jax.eval_shape(again.init, jax.random.key(0), inputs))

        def loss(variables, module, inputs=inputs):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(module.apply(variables, inputs)))

        results = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables, module) for module in (plain, again)]
        # The same operations; the compiler may fuse, and so round, some of them otherwise.
        scale = float(optax.tree.norm(results[0][1]))
        chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6 * scale)
        jaxprs = [str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(variables, module)) for module in (plain, again)]
        assert ["checkpoint" in text or "remat" in text for text in jaxprs] == [False, True]


@pytest.mark.long
def test_bfloat16_computes_with_float32_parameters_and_outputs():
    for (module, made, inputs), (exact_module, variables, _) in zip(built(jnp.bfloat16), built(), strict=True):
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
        outputs, expected = (jax.jit(m.apply)(variables, inputs) for m in (module, exact_module))
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
        # bfloat16 rounds to 2^-9 = 0.002; some twenty roundings in a row and a largest-of-many leave a few per cent.
        errors = [relative_error(a, b) for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True)]
        assert 1e-4 < max(errors) < 0.05


@pytest.mark.long
def test_eight_devices_take_the_step_of_one(key):
    """Plain gradient descent, so that the update is the gradient; Adam would hide a factor."""
    config = Config(network=SMALL, latent_size=LATENT, decoder_variance=Optimal("batch"))
    images = jax.random.uniform(jax.random.key(7), (16, *SHAPE)) * jnp.linspace(0.1, 1.0, 16).reshape(-1, 1, 1, 1)
    sgd, results = optax.sgd(1.0), []
    for axis_name, devices in ((None, 1), (DATA_AXIS, 8)):
        model = build_model(config, SHAPE, axis_name=axis_name)
        state = create_state(config, model, 10)
        params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)  # the kernels that start at zero would hide the rest
        state = state.replace(params=params, optimizer=sgd, optimizer_state=sgd.init(params))
        state = state.replace(learning_rate=jnp.float32(1.0))
        if axis_name is None:
            after, metrics = jax.jit(train_step)(state, images, key, 2.0)
        else:
            mesh = data_mesh(devices)
            step = parallelize(train_step, mesh, (REPLICATED, SHARDED, REPLICATED, REPLICATED), REPLICATED)
            after, metrics = step(replicate(state, mesh), images, key, jnp.float32(2.0))
        gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, after.params)
        results.append((gradient, jax.device_get(metrics)))
    (one, one_metrics), (eight, eight_metrics) = results
    chex.assert_trees_all_close(eight_metrics, one_metrics, rtol=1e-5)
    chex.assert_trees_all_close(eight, one, rtol=1e-5, atol=1e-5 * float(optax.tree.norm(one)))


# --- In a run ---------------------------------------------------------------------------------------------------------

DIGITS = Config(
    network=Spatial(widths=(8, 8), blocks=1, groups=2),
    latent_size=32,
    optimizer=Optimizer(learning_rate=1e-2),
    beta=0.1,
    epochs=3,
    evaluate_every=3,
    batch_size=75,
    devices=1,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(DIGITS, tmp_path_factory.mktemp("spatial") / "run", progress=False)


@pytest.mark.long
def test_it_learns_the_digits(trained):
    """Sixty steps: well below the squared error of the mean image, which no latent is needed for."""
    images = trained.images.test / 16.0
    mean_image_error = float(np.mean(np.square(images - trained.images.train.mean(axis=0) / 16.0)))
    report = trained.report["test"]
    assert report["mse"].value < 0.7 * mean_image_error
    assert report["rate"].value > 1.0


@pytest.mark.long
def test_a_run_is_restored_and_samples(trained):
    run = restore(trained.workdir)
    assert run.config == DIGITS
    assert run.model.apply(run.variables, jax.random.key(0), 5, method="sample").shape == (5, 8, 8, 1)


def test_published_weights_are_refused():
    model = build_model(DIGITS, (8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jax.random.key(1))
    with pytest.raises(UserError, match="The published network is residual, this config has Spatial"):
        pytorch.from_state_dict({}, variables, DIGITS, (8, 8, 1), "published.pt")


@pytest.mark.long
def test_a_constant_variance_and_beta_are_one_number_to_the_model(key):
    """The gradient of the objective times v depends on `beta * v` alone: (SSE + D v0)/2 + beta v * rate, up to a constant."""
    images = jax.random.uniform(jax.random.key(7), (4, *SHAPE))

    def gradient(variance, beta):
        config = Config(network=SMALL, latent_size=LATENT, decoder_variance=Constant(variance))
        model = build_model(config, SHAPE)
        params = jax.tree.map(lambda leaf: leaf + 0.1, create_state(config, model, 10).params)

        def scaled(params):
            terms = model.apply({"params": params}, images, key, method="elbo_terms")
            return variance * jnp.mean(terms.distortion + beta * terms.rate)

        return jax.jit(jax.grad(scaled))(params)

    one, same, other = gradient(0.5, 0.02), gradient(0.01, 1.0), gradient(0.5, 1.0)
    scale = float(optax.tree.norm(one))
    chex.assert_trees_all_close(one, same, rtol=1e-4, atol=1e-5 * scale)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, one, other)) > 0.01 * scale


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent_size", "telling"),
    [
        (30, "latent_size 30 does not divide into the 4 x 4 positions.*(16 or 32 would)"),
        (10, "images 8 x 8, 2 stages.; 16 would"),
        (65, "exceeds the 64 pixels"),
    ],
)
def test_a_number_of_latents_that_is_no_map_is_refused_before_training(latent_size, telling, tmp_path):
    config = dataclasses.replace(DIGITS, latent_size=latent_size)
    with pytest.raises(UserError, match=telling):
        check_against_data(config, load(Digits()))
    with pytest.raises(UserError, match=telling):
        fit(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        ({"groups": 5}, r"network.groups must divide every width \(64, 128, 256\), got 5; 64 and its divisors do"),
        ({"widths": (8, 12)}, "got 32; 4 and its divisors do"),
        ({"groups": 0}, "network.groups must be a whole number >= 1"),
        ({"blocks": 0}, "network.blocks must be a whole number >= 1"),
        ({"attention": 1}, "network.attention must be True or False, got 1"),
        ({"widths": ()}, "network.widths must be a tuple of at least one width"),
    ],
)
def test_configs_that_are_refused(options, telling, unchecked):
    with pytest.raises(UserError, match=telling):
        Spatial(**options)


@pytest.mark.parametrize("prior", [configs.Mixture(), configs.VampPrior(), configs.Flow()], ids=str)
def test_a_prior_over_vectors_is_refused(prior):
    with pytest.raises(UserError, match=f"prior {type(prior).__name__} is over vectors and knows nothing of the map"):
        Config(network=Spatial(), prior=prior)


def test_the_config_rematerializes_it():
    """`Config.rematerialize` reaches the blocks, and the parameters stay those of the plain network."""
    texts = []
    for again in (False, True):
        model = build_model(dataclasses.replace(DIGITS, rematerialize=again), (8, 8, 1))
        x, key = jnp.zeros((2, 8, 8, 1)), jax.random.key(0)
        variables = jax.eval_shape(model.init, key, x, key)
        loss = lambda variables, model=model, x=x, key=key: jnp.sum(model.apply(variables, x, key).decoded.mean)  # noqa: E731
        texts.append(str(jax.make_jaxpr(jax.grad(loss))(variables)))
    assert ["checkpoint" in text or "remat" in text for text in texts] == [False, True]
