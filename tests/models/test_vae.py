"""The VAE against float64 NumPy: its sample, rate and distortion, what each may depend on, and its derivatives.

The noise of an example is recomputed from the definition, `normal(fold_in(key, position))`, one example at a time. What the
networks compute inside is tested elsewhere; here a linear network is compared whole and the others' outputs are taken as given.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import float64

from bsvae_jax.config import MLP, Linear, Residual
from bsvae_jax.errors import UserError
from bsvae_jax.models.vae import build_vae
from bsvae_jax.objective import Constant, ElboTerms, Learned, Optimal, Predicted, mean_objective

SHAPE, LATENT, BATCH, D = (4, 3, 2), 3, 6, 24
EIGHT_BITS = 1 / (12 * 255**2)
RTOL = 2e-6  # float32: a few roundings of 6e-8 over sums of 24 terms of one sign

VARIANCES = {
    "constant": Constant(0.3),
    "example": Optimal("example"),
    "batch": Optimal("batch", floor=0.02),
    "pixel": Optimal("pixel", floor=0.0),
    "channel": Optimal("channel", floor=0.0),
    "learned": Learned(initial_variance=0.2, floor=0.01),
    "learned, 8 bits": Learned(initial_variance=0.7),
    "predicted": Predicted(floor=0.03),
}
every_variance = pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES)
NETWORKS = {"linear": Linear(), "mlp": MLP(hidden=(5,)), "residual": Residual(widths=(3,))}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def images(seed: int = 0, count: int = BATCH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *SHAPE)), jnp.float32)


def vae(network=NETWORKS["mlp"], variance=VARIANCES["example"], seed=0, **options):
    """A model and random variables in which nothing is zero and no two posteriors are alike."""
    model = build_vae(network, LATENT, SHAPE, variance, **options)
    plain = model.clone(axis_name=None)  # an average over a device axis cannot be traced outside of it
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if leaf.ndim == 0:  # the trained log-variance, whose start is tested
            return leaf
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.3 if leaf.ndim == 1 else 0.6 / np.sqrt(leaf.shape[-2])), leaf.dtype)

    variables = jax.eval_shape(plain.init, jax.random.key(seed), images(), jax.random.key(0))
    variables = jax.tree_util.tree_map_with_path(fill, variables)
    if isinstance(variance, Learned):
        variables["params"]["log_variance"] = jnp.asarray(np.log(variance.initial_variance), jnp.float32)
    return model, variables


def f64(*arrays):
    values = [np.asarray(array, np.float64) for array in arrays]
    return values if len(values) > 1 else values[0]


def noise_of(key, count=BATCH):
    """One example at a time, from its position."""
    return np.stack([f64(jax.random.normal(jax.random.fold_in(key, i), (LATENT,))) for i in range(count)])


def numpy_kl(mean, log_variance):
    mean, log_variance = f64(mean, log_variance)
    return sum(0.5 * (np.exp(s) - 1 - s + m * m) for m, s in zip(mean.T, log_variance.T, strict=True))


def numpy_distortion(x, mean, log_variance, model):
    """`-log p(x|z)` per example and the variance used, from the formulas of the design."""
    x, mean = f64(x, mean)
    floor = 0.0 if isinstance(model, Constant) else EIGHT_BITS if model.floor is None else model.floor
    match model:
        case Constant(variance):
            variance = np.asarray(variance)
        case Learned(initial_variance):
            variance = np.asarray(initial_variance)
        case Predicted():
            variance = np.exp(f64(log_variance))
        case Optimal(over):
            axes = {"example": (1, 2, 3), "batch": None, "pixel": 0, "channel": (0, 1, 2)}[over]
            variance = np.mean((x - mean) ** 2, axis=axes, keepdims=over == "example") + floor
    per_pixel = 0.5 * (np.log(2 * np.pi * variance) + ((x - mean) ** 2 + floor) / variance)
    return per_pixel.reshape(BATCH, D).sum(1), variance


# --- One forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("network", [Linear(), MLP(hidden=(5,))], ids=str)
def test_z_is_the_posterior_mean_plus_deviation_times_the_examples_own_noise(network, key):
    model, variables = vae(network)
    output = model.apply(variables, images(), key)
    mean, log_variance = f64(*output.posterior)
    np.testing.assert_allclose(output.z, mean + np.exp(log_variance / 2) * noise_of(key), rtol=1e-5, atol=1e-6)
    assert np.ptp(mean, axis=0).min() > 1e-3


@every_variance
def test_rate_distortion_mse_and_variance_are_the_formulas(variance, key):
    model, variables = vae(variance=variance)
    x = images()
    output = model.apply(variables, x, key)
    terms = model.apply(variables, x, key, method="elbo_terms")
    distortion, used = numpy_distortion(x, output.decoded.mean, output.decoded.log_variance, variance)
    np.testing.assert_allclose(terms.distortion, distortion, rtol=RTOL, atol=1e-5)
    np.testing.assert_allclose(terms.variance, used, rtol=RTOL)
    assert terms.variance.shape == used.shape
    for rate in (terms.rate, output.rate):
        np.testing.assert_allclose(rate, numpy_kl(*output.posterior), rtol=RTOL)
    np.testing.assert_allclose(terms.mse, ((f64(x) - f64(output.decoded.mean)) ** 2).reshape(BATCH, D).mean(1), rtol=RTOL)


def test_encode_and_decode_of_a_linear_model_are_its_matrices(key):
    model, variables = vae(Linear())
    x, params = images(), jax.tree.map(f64, variables["params"])
    encoder, decoder = params["encoder"], params["decoder"]["mean"]
    scale, origin = np.exp(encoder["frame"]["log_scale"]), encoder["frame"]["origin"]
    mean = scale * (f64(x).reshape(BATCH, D) @ encoder["mean"]["kernel"] + origin)
    log_variance = np.sqrt(D) * encoder["log_variance"] + 2 * np.log(scale)
    posterior = model.apply(variables, x, method="encode")
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(posterior.log_variance, np.tile(log_variance, (BATCH, 1)), rtol=1e-5, atol=1e-6)
    output = model.apply(variables, x, key)
    z = mean + np.exp(log_variance / 2) * noise_of(key)
    expected = ((z / scale - origin) @ decoder["kernel"] + decoder["bias"]).reshape(BATCH, *SHAPE)
    np.testing.assert_allclose(output.decoded.mean, expected, rtol=1e-5, atol=1e-5)
    decoded = model.apply(variables, jnp.asarray(z, jnp.float32), method="decode")
    np.testing.assert_allclose(decoded.mean, expected, rtol=1e-5, atol=1e-5)
    assert decoded.log_variance is None


def test_the_frame_of_a_linear_model_changes_its_rate_and_not_its_distortion(key):
    model, variables = vae(Linear())
    moved = jax.tree.map(jnp.copy, variables)
    moved["params"]["encoder"]["frame"] = {"origin": jnp.array([0.5, -1.0, 2.0]), "log_scale": jnp.array([-1.0, 0.3, 1.0])}
    before, after = (model.apply(v, images(), key, method="elbo_terms") for v in (variables, moved))
    np.testing.assert_allclose(after.distortion, before.distortion, rtol=1e-4)
    assert np.min(np.abs(after.rate - before.rate)) > 0.1


def test_samples_of_a_linear_model_have_its_mean_and_covariance(key):
    """x = W'(z - origin) + b with z ~ N(0, I / scale^2) is Gaussian; the decoder's mean has no pixel noise. Five std errors."""
    count = 20_000
    model, variables = vae(Linear())
    x = f64(model.apply(variables, key, count, method="sample"))
    assert x.shape == (count, *SHAPE)
    weights, bias = f64(*(variables["params"]["decoder"]["mean"][name] for name in ("kernel", "bias")))
    origin, log_scale = f64(*(variables["params"]["encoder"]["frame"][name] for name in ("origin", "log_scale")))
    bias, weights = bias - origin @ weights, np.exp(-log_scale)[:, None] * weights
    covariance, x = weights.T @ weights, x.reshape(count, D)
    deviation = np.sqrt(np.diag(covariance))
    assert np.max(np.abs(x.mean(0) - bias) / deviation) < 5 / np.sqrt(count)
    # The variance of a Gaussian sample covariance is (S_ii S_jj + S_ij^2) / N.
    standard_error = np.sqrt((np.outer(deviation, deviation) ** 2 + covariance**2) / count)
    assert np.max(np.abs(np.cov(x.T) - covariance) / standard_error) < 5


# --- Decoder variances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial", "log_variance"), [(1.0, 0.0), (0.25, -1.3862943611), (np.e, 1.0)])
def test_learned_starts_at_its_initial_variance(initial, log_variance, key):
    model = build_vae(Linear(), LATENT, SHAPE, Learned(initial_variance=float(initial)))
    variables = model.init(key, images(), key)
    assert variables["params"]["log_variance"].shape == ()
    np.testing.assert_allclose(variables["params"]["log_variance"], log_variance, rtol=1e-6, atol=1e-7)
    variables["params"]["log_variance"] = jnp.float32(-0.75)
    decoded = model.apply(variables, jnp.zeros((2, LATENT)), method="decode")
    np.testing.assert_array_equal(decoded.log_variance, np.float32(-0.75))


def test_predicted_log_variance_is_the_second_half_of_the_channels():
    model, variables = vae(Linear(), Predicted())
    bias = np.tile([1.0, 2.0, 30.0, 40.0], 12)  # per pixel: two means, then two log-variances
    variables["params"]["decoder"]["mean"] = {"kernel": jnp.zeros((LATENT, 48)), "bias": jnp.asarray(bias, jnp.float32)}
    decoded = model.apply(variables, jnp.ones((2, LATENT)), method="decode")
    assert decoded.mean.shape == decoded.log_variance.shape == (2, *SHAPE)
    np.testing.assert_array_equal(decoded.mean, np.broadcast_to([1.0, 2.0], (2, *SHAPE)))
    np.testing.assert_array_equal(decoded.log_variance, np.broadcast_to([30.0, 40.0], (2, *SHAPE)))


@pytest.mark.parametrize("variance", [Constant(), Optimal()])
def test_the_other_variances_do_not_come_from_the_decoder(variance):
    model, variables = vae(variance=variance)
    assert model.apply(variables, jnp.zeros((2, LATENT)), method="decode").log_variance is None
    assert "log_variance" not in variables["params"]


# --- What a result depends on -----------------------------------------------------------------------------------------


def test_the_key_decides_everything(key):
    model, variables = vae()
    first, again, other = (model.apply(variables, images(), k) for k in (key, jax.random.key(0), jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.all(np.abs(first.z - other.z) > 1e-6)
    jax.tree.map(np.testing.assert_array_equal, first.posterior, other.posterior)


def test_a_key_per_example_does_as_the_one_key_does(key):
    model, variables = vae()
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(BATCH)])
    one = model.apply(variables, images(), key)
    jax.tree.map(np.testing.assert_array_equal, one, model.apply(variables, images(), keys))
    swapped = model.apply(variables, images(), keys[::-1])
    assert np.all(np.abs(one.z - swapped.z) > 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("network", "variance"),
    [("residual", "example"), ("linear", "constant"), ("mlp", "learned"), ("mlp", "predicted"), ("mlp", "example")],
)
def test_an_examples_terms_do_not_depend_on_the_others(network, variance, key):
    model, variables = vae(NETWORKS[network], VARIANCES[variance])

    @jax.jit
    def terms(x, key):
        terms = model.apply(variables, x, key, method="elbo_terms")
        return terms.distortion, terms.rate, terms.mse

    together = terms(images(), key)
    among_others = terms(images(seed=1).at[2].set(images()[2]), key)
    alone = terms(images()[2:3], jax.random.fold_in(key, 2)[None])
    for a, b, c in zip(together, among_others, alone, strict=True):
        np.testing.assert_allclose([b[2], c[0]], a[2], rtol=1e-5)
        assert abs(a[1] - b[1]) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("many_keys", [False, True], ids=["positions", "keys"])
def test_z_has_the_moments_of_the_posterior(many_keys):
    """Over positions under one key, and over keys at one position. For N draws of N(m, s^2) the standard errors are
    s / sqrt(N) of the mean, s^2 sqrt(2 / N) of the variance, 1 / sqrt(N) of a correlation of 0; the tolerance is five."""
    count = 20_000
    model, variables = vae()
    x = images(count=1)
    mean, log_variance = f64(*model.apply(variables, x, method="encode"))
    if many_keys:
        keys = jax.random.split(jax.random.key(3), count)
        z = jax.jit(jax.vmap(lambda k: model.apply(variables, x, k).z[0]))(keys)
    else:
        z = model.apply(variables, jnp.tile(x, (count, 1, 1, 1)), jax.random.key(4)).z
    standardized = (f64(z) - mean) / np.exp(log_variance / 2)
    assert standardized.shape == (count, LATENT)
    assert np.max(np.abs(standardized.mean(0))) < 5 / np.sqrt(count)
    covariance = np.cov(standardized.T)
    assert np.max(np.abs(np.diag(covariance) - 1)) < 5 * np.sqrt(2 / count)
    assert np.max(np.abs(covariance[np.triu_indices(LATENT, 1)])) < 5 / np.sqrt(count)


@pytest.mark.parametrize("over", ["batch", "pixel"])
def test_three_devices_do_as_one(over, key):
    devices, x = 3, images() * jnp.arange(1.0, BATCH + 1).reshape(-1, 1, 1, 1)
    model, variables = vae(variance=Optimal(over, floor=0.02), axis_name="data")

    def run(variables, x, key):
        output = model.apply(variables, x, key)
        return output, model.apply(variables, x, key, method="elbo_terms")

    lifted = jax.pmap(run, "data", in_axes=(None, 0, None), devices=jax.devices()[:devices])
    output, terms = lifted(variables, x.reshape(devices, -1, *SHAPE), key)
    joined = jax.tree.map(lambda leaf: leaf.reshape(BATCH, *leaf.shape[2:]), (output.posterior, output.z, output.decoded.mean))
    (mean, log_variance), z, decoded = f64(*joined[0]), *f64(*joined[1:])
    np.testing.assert_allclose(z, mean + np.exp(log_variance / 2) * noise_of(key), rtol=1e-5, atol=1e-6)
    distortion, used = numpy_distortion(x, decoded, None, model.decoder_variance)
    np.testing.assert_allclose(terms.distortion.reshape(BATCH), distortion, rtol=1e-5)
    for device in range(devices):
        np.testing.assert_allclose(terms.variance[device], used, rtol=1e-5)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_training_updates_the_batch_statistics_and_evaluation_does_not(key):
    model, variables = vae(Residual(widths=(3,)))
    before = variables["batch_stats"]

    @jax.jit
    def run(x):
        trained, updated = model.apply(variables, x, key, True, mutable=["batch_stats"])
        evaluated, kept = model.apply(variables, x, key, mutable=["batch_stats"])
        return trained.decoded.mean, updated["batch_stats"], evaluated.decoded.mean, kept["batch_stats"]

    trained, updated, evaluated, kept = run(images())
    assert len(jax.tree.leaves(before)) == 2 * (3 + 2 + 1) + 2 * (1 + 2 + 1)  # encoder: two blocks and the dense layer
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    for new, old in zip(jax.tree.leaves(updated), jax.tree.leaves(before), strict=True):
        assert np.all(new != old)
    assert np.max(np.abs(trained - evaluated)) > 0.01


@every_variance
def test_derivatives_with_respect_to_parameters_images_and_beta(variance, key):
    """Along a random direction against central differences, in float64; by beta, the mean rate."""
    with float64():
        model, variables = vae(variance=variance, dtype=jnp.float64)
        point = jax.tree.map(lambda a: a.astype(jnp.float64), (variables["params"], images(), jnp.float32(0.7)))

        def loss(params, x, beta):
            return mean_objective(model.apply({"params": params}, x, key, method="elbo_terms"), beta)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        _, gradients = run(*point)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
        posterior = model.apply({"params": point[0]}, point[1], method="encode")
        np.testing.assert_allclose(gradients[2], numpy_kl(*posterior).mean(), rtol=1e-12)
        rng, step = np.random.default_rng(5), 1e-5
        for argument in (0, 1):
            direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point[argument])

            def shifted(amount, argument=argument, direction=direction):
                moved = jax.tree.map(lambda leaf, d: leaf + amount * d, point[argument], direction)
                return float(run(*point[:argument], moved, *point[argument + 1 :])[0])

            slope = (shifted(step) - shifted(-step)) / (2 * step)
            products = jax.tree.map(lambda g, d: float(np.sum(f64(g) * d)), gradients[argument], direction)
            np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-6)
            assert abs(slope) > 1e-2


@pytest.mark.long
@every_network
def test_gradients_in_training_are_finite_and_reach_every_kernel(network, key):
    model, variables = vae(network)

    @jax.jit
    @jax.grad
    def gradient(params):
        merged = {**variables, "params": params}
        terms, _ = model.apply(merged, images(), key, True, mutable=["batch_stats"], method="elbo_terms")
        return mean_objective(terms, 1.0)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.all(np.isfinite(leaf)), path
        if path[-1].key == "kernel":
            assert np.max(np.abs(leaf)) > 1e-6, path


def test_vmap_over_beta():
    distortion, rate = np.array([3.0, 5.0, 10.0]), np.array([1.0, 2.0, 6.0])  # means 6 and 3
    terms = ElboTerms(*(jnp.asarray(a, jnp.float32) for a in (distortion, rate, rate, 1.0)))
    betas = jnp.array([0.0, 0.5, 1.0, 4.0])
    np.testing.assert_allclose(jax.vmap(lambda beta: mean_objective(terms, beta))(betas), [6.0, 7.5, 9.0, 18.0], rtol=1e-6)


def test_vmap_over_beta_through_the_model(key):
    model, variables = vae()
    x, betas = images(), jnp.array([0.0, 0.5, 4.0])
    values = jax.vmap(lambda b: mean_objective(model.apply(variables, x, key, method="elbo_terms"), b))(betas)
    output = model.apply(variables, x, key)
    distortion, _ = numpy_distortion(x, output.decoded.mean, None, model.decoder_variance)
    expected = distortion.mean() + np.asarray(betas) * numpy_kl(*output.posterior).mean()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """What a user runs: without it the type checker objects before the package's own sentence is reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 4, 3, 1), (4, 3, 2), (1, 2, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("method", ["encode", "__call__", "elbo_terms"])
def test_images_of_another_shape_are_refused_with_a_sentence(method, shape, key):
    model, variables = vae(Linear())
    arguments = () if method == "encode" else (key,)
    with pytest.raises(UserError) as error:
        model.apply(variables, jnp.zeros(shape), *arguments, method=method)
    assert str(error.value) == f"This model takes data of shape (4, 3, 2), got a batch of shape {shape}."
