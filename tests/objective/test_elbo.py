"""The objective against float64 NumPy and SciPy, quadrature, numerical minimization, and numbers derived by hand.

Values are compared in float64 at 1e-12 (a few dozen roundings); float32 has its own tests. Errors are tested as a user
meets them, with the shape and type checks of the test run switched off.
"""

import dataclasses
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64
from scipy import integrate, optimize, stats

from bsvae_jax.errors import UserError
from bsvae_jax.objective import (
    PAPER_FLOOR,
    QUANTIZATION_VARIANCE,
    Constant,
    ElboTerms,
    Learned,
    Optimal,
    Predicted,
    bits_per_dimension,
    elbo_terms,
    gaussian_nll,
    kl_gaussians,
    kl_per_latent,
    kl_to_standard_normal,
    mean_objective,
    optimal_gaussian_nll,
    optimal_variance,
    quantization_variance,
)

B, SHAPE, D = 3, (4, 5, 2), 40
FLOOR = 0.01
LOG_2PI = np.log(2 * np.pi)
AXES = {"example": (1, 2, 3), "batch": (0, 1, 2, 3), "pixel": (0,), "channel": (0, 1, 2)}
VARIANCE_SHAPE = {"example": (B, 1, 1, 1), "batch": (), "pixel": SHAPE, "channel": SHAPE[-1:]}

every_over = pytest.mark.parametrize("over", AXES)
jitted_or_not = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


@pytest.fixture
def x64():
    with float64():
        yield


def images(seed: int = 0, batch: int = B, shape: tuple[int, ...] = SHAPE, scale: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Images and means, float64, whose residuals differ in size between examples and between pixels."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(batch, *shape))
    spread = np.linspace(0.5, 2.0, x.size).reshape(x.shape)
    return x, x + scale * spread * rng.normal(size=x.shape)


def best_variance(x: np.ndarray, mean: np.ndarray, over: str, floor: float) -> np.ndarray:
    return np.mean((x - mean) ** 2, axis=AXES[over], keepdims=over == "example") + floor


def expected_nll(x: np.ndarray, mean: np.ndarray, variance: np.ndarray | float, floor: float) -> np.ndarray:
    """-log N(x + u; mean, variance) averaged over noise u of variance `floor`, summed over pixels. [B]"""
    return 0.5 * np.sum(np.log(2 * np.pi * variance) + ((x - mean) ** 2 + floor) / variance, axis=(1, 2, 3))


def sharing_sets(entries: np.ndarray, over: str) -> np.ndarray:
    """[variances, entries that share one]"""
    per_example = entries.reshape(len(entries), -1)
    per_channel = entries.reshape(-1, entries.shape[-1]).T
    sets = {"example": per_example, "batch": per_example.reshape(1, -1), "pixel": per_example.T, "channel": per_channel}
    return sets[over]


# --- Gaussian negative log-likelihood ---------------------------------------------------------------------------------


@jitted_or_not
@pytest.mark.parametrize("shape", [(), (B, 1, 1, 1), SHAPE, (B, *SHAPE), (2,), (1, 4, 1, 2)], ids=str)
def test_gaussian_nll_is_the_sum_of_normal_log_densities(x64, transform, shape):
    x, mean = images()
    variance = np.random.default_rng(1).uniform(0.1, 2.0, size=shape)
    expected = -stats.norm.logpdf(x, mean, np.sqrt(variance)).sum(axis=(1, 2, 3))
    nll = transform(gaussian_nll)(jnp.asarray(x), jnp.asarray(mean), jnp.asarray(variance))
    np.testing.assert_allclose(nll, expected, rtol=1e-12)


def test_gaussian_nll_takes_a_python_number_and_flat_images(x64):
    x, mean = images(shape=(6,))
    expected = [-stats.multivariate_normal.logpdf(x[i], mean[i], 0.3 * np.eye(6)) for i in range(B)]
    np.testing.assert_allclose(gaussian_nll(jnp.asarray(x), jnp.asarray(mean), 0.3), expected, rtol=1e-12)


# --- Optimal variance and its closed form -----------------------------------------------------------------------------


@every_over
@jitted_or_not
def test_optimal_variance_is_mean_squared_error_plus_floor(x64, transform, over):
    x, mean = images()
    variance = transform(lambda *a: optimal_variance(*a, over, FLOOR))(jnp.asarray(x), jnp.asarray(mean))
    chex.assert_shape(variance, VARIANCE_SHAPE[over])
    np.testing.assert_allclose(variance, best_variance(x, mean, over, FLOOR), rtol=1e-12)


def test_optimal_variance_by_hand():
    # Residuals [[0, 1], [2, 3]], squared [[0, 1], [4, 9]]: rows average 0.5 and 6.5, columns 2 and 5, all 3.5. Plus v0 = 0.25.
    x, mean = jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.zeros((2, 2))
    np.testing.assert_array_equal(optimal_variance(x, mean, "example", 0.25), [[0.75], [6.75]])
    np.testing.assert_array_equal(optimal_variance(x, mean, "pixel", 0.25), [2.25, 5.25])
    np.testing.assert_array_equal(optimal_variance(x, mean, "batch", 0.25), 3.75)
    # As two positions of two channels, [1, 2, 2]: channels are the columns.
    np.testing.assert_array_equal(optimal_variance(x[None], mean[None], "channel", 0.25), [2.25, 5.25])


@every_over
@jitted_or_not
def test_optimal_nll_per_example_and_its_closed_form(x64, transform, over):
    x, mean = images()
    nll = transform(lambda *a: optimal_gaussian_nll(*a, over, FLOOR))(jnp.asarray(x), jnp.asarray(mean))
    variance = best_variance(x, mean, over, FLOOR)
    np.testing.assert_allclose(nll, expected_nll(x, mean, variance, FLOOR), rtol=1e-12)
    # Averaged over the set that shares v*: D/2 (log(2 pi v*) + 1); of several variances each for its share of the D entries.
    closed_form = 0.5 * (np.log(2 * np.pi * variance) + 1)
    if over == "example":
        np.testing.assert_allclose(nll, D * closed_form.ravel(), rtol=1e-12)
    else:
        np.testing.assert_allclose(np.mean(nll), D * np.mean(closed_form), rtol=1e-12)


@every_over
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_optimal_variance_minimizes_the_expected_nll(x64, over, floor):
    x, mean = images()
    best = [
        optimize.minimize_scalar(
            lambda t, s=squares: 0.5 * np.sum(LOG_2PI + t + (s + floor) * np.exp(-t)), bounds=(-12, 3), options={"xatol": 1e-9}
        )
        for squares in sharing_sets((x - mean) ** 2, over)
    ]
    variance = optimal_variance(jnp.asarray(x), jnp.asarray(mean), over, floor)
    nll = optimal_gaussian_nll(jnp.asarray(x), jnp.asarray(mean), over, floor)
    # The objective is flat to second order, so a search finds the place to sqrt(eps) ~ 1e-8 and the value to eps.
    np.testing.assert_allclose(np.ravel(variance), np.exp([b.x for b in best]), rtol=1e-6)
    np.testing.assert_allclose(np.sum(nll), sum(b.fun for b in best), rtol=1e-11)


@hypothesis.settings(max_examples=25, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    over=st.sampled_from(list(AXES)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 1e3),
    floor=st.sampled_from([0.0, 1e-6, 1.0]),
    log_ratio=st.floats(-3, 3),
)
def test_no_other_variance_is_better(over, seed, scale, floor, log_ratio):
    x, mean = images(seed, scale=scale)
    variance = best_variance(x, mean, over, floor)
    # A common factor and one per variance, so that single entries are moved as well.
    other = variance * np.exp(log_ratio * np.random.default_rng(seed).uniform(size=variance.shape))
    with float64():
        nll = np.asarray(optimal_gaussian_nll(jnp.asarray(x), jnp.asarray(mean), over, floor))
    assert np.mean(nll) <= np.mean(expected_nll(x, mean, other, floor)) + 1e-9


@pytest.mark.parametrize("step", [1 / 255, 1 / 16, 1.0])
def test_distortion_is_the_expectation_over_uniform_dequantization_noise(x64, step):
    x, mean = images(shape=(2, 2, 1), scale=0.3)
    floor, variance = quantization_variance(step), 0.07

    def expectation(x_pixel: float, mean_pixel: float, v: float) -> float:
        def integrand(u):
            return -stats.norm.logpdf(x_pixel + u, mean_pixel, np.sqrt(v)) / step

        return integrate.quad(integrand, -step / 2, step / 2)[0]

    def expected(v):
        return [sum(expectation(*pixel, v) for pixel in zip(a.flat, b.flat, strict=True)) for a, b in zip(x, mean, strict=True)]

    arrays = jnp.asarray(x), jnp.asarray(mean), jnp.zeros(B)
    learned = elbo_terms(*arrays, Learned(floor=floor), log_variance=jnp.log(variance))
    np.testing.assert_allclose(learned.distortion, expected(variance), rtol=1e-10)
    batch = elbo_terms(*arrays, Optimal("batch", floor))
    shared = np.mean((x - mean) ** 2) + step**2 / 12
    np.testing.assert_allclose(batch.distortion, expected(shared), rtol=1e-10)


def test_floors_have_the_values_of_their_definitions(x64):
    assert pytest.approx(1 / 780_300, rel=1e-14) == QUANTIZATION_VARIANCE  # 12 * 255^2 = 12 * 65025 = 780300
    assert quantization_variance(1 / 16) == pytest.approx(1 / 3072, rel=1e-14)  # 12 * 256
    x, mean = images()
    # The paper's code: D/2 (log(2 pi MSE + 1e-5) + 1). A small residual makes the 1e-5 matter.
    mse = np.mean((1e-3 * (x - mean)) ** 2, axis=(1, 2, 3))
    paper = D / 2 * (np.log(2 * np.pi * mse + 1e-5) + 1)
    nll = optimal_gaussian_nll(jnp.asarray(1e-3 * x), jnp.asarray(1e-3 * mean), "example", PAPER_FLOOR)
    np.testing.assert_allclose(nll, paper, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "floor"),
    [
        (Constant(0.3), 0.0),
        (Optimal(), 1 / 780_300),
        (Learned(), 1 / 780_300),
        (Predicted(), 1 / 780_300),
        (Optimal(floor=0.0), 0.0),
        (Learned(floor=0.25), 0.25),
    ],
    ids=str,
)
def test_floor_of_a_variance_model(model, floor):
    assert model.v0 == pytest.approx(floor, rel=1e-14)


@pytest.mark.parametrize(
    ("nll", "shape", "step", "bits"),
    [
        (0.0, (28, 28, 1), 1 / 255, 7.994353436858858),  # density 1 on [0, 1]: log2(255)
        (0.0, (8, 8, 1), 1 / 16, 4.0),
        (-3 * 64 * np.log(2), (8, 8, 1), 1 / 16, 1.0),  # density 2^3 per pixel on a grid of 1/16: probability 1/2
        (64 * np.log(256 / 255), (64,), 1 / 255, 8.0),  # 256 levels with bins of 1/255: density 255/256, probability 1/256
    ],
)
def test_bits_per_dimension_by_hand(nll, shape, step, bits):
    assert bits_per_dimension(nll, shape, step) == pytest.approx(bits, rel=1e-14)


# --- KL divergence ----------------------------------------------------------------------------------------------------


@jitted_or_not
@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 2, 4)], ids=str)
def test_kl_is_the_formula(x64, transform, shape):
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=shape), rng.uniform(-6, 3, size=shape)
    expected = 0.5 * (np.exp(log_variance) - 1 - log_variance + mean**2).reshape(3, -1).sum(axis=1)
    kl = transform(kl_to_standard_normal)(jnp.asarray(mean), jnp.asarray(log_variance))
    np.testing.assert_allclose(kl, expected, rtol=1e-12)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, 0.0), (0.7, -2.0), (-3.0, 1.0), (1.5, -5.0)])
def test_kl_is_the_integral_of_its_definition(x64, mean, log_variance):
    scale = np.exp(log_variance / 2)
    q, p = stats.norm(mean, scale), stats.norm()
    # 12 standard deviations: the tail beyond is 1e-31.
    integral = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), mean - 12 * scale, mean + 12 * scale)[0]
    kl = kl_to_standard_normal(jnp.array([[mean]]), jnp.array([[log_variance]]))
    np.testing.assert_allclose(kl, [integral], rtol=1e-8, atol=1e-10)


def test_kl_of_two_gaussians_and_of_each_latent(x64):
    # Scalar by scalar, log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2.
    m_q, v_q, m_p, v_p = np.random.default_rng(2).normal(size=(4, B, 5))
    each = 0.5 * (v_p - v_q) + (np.exp(v_q) + (m_q - m_p) ** 2) / (2 * np.exp(v_p)) - 0.5
    np.testing.assert_allclose(kl_gaussians(*map(jnp.asarray, (m_q, v_q, m_p, v_p))), each.sum(axis=1), rtol=1e-12)
    standard = -0.5 * v_q + (np.exp(v_q) + m_q**2) / 2 - 0.5
    np.testing.assert_allclose(kl_per_latent(jnp.asarray(m_q), jnp.asarray(v_q)), standard, rtol=1e-12)


def test_kl_of_gaussians_of_different_shapes_is_refused(unchecked):
    with pytest.raises(UserError, match=r"mean_q, log_variance_q, mean_p and log_variance_p must have one shape, got \(2, 5\)"):
        kl_gaussians(jnp.zeros((2, 5)), *[jnp.zeros((2, 4))] * 3)


@pytest.mark.parametrize("model", [Constant(0.5), *map(Optimal, AXES)], ids=str)
def test_a_decoder_variance_is_an_argument_of_a_jitted_function(model):
    x, mean = (jnp.asarray(value, jnp.float32) for value in images())
    assert jax.tree.leaves(model) == []
    chex.assert_trees_all_close(
        jax.jit(elbo_terms)(x, mean, jnp.zeros(B), model), elbo_terms(x, mean, jnp.zeros(B), model), rtol=1e-5
    )


@pytest.mark.parametrize("log_variance", [1e-4, -1e-4, 1e-3])
def test_kl_keeps_its_digits_near_a_collapsed_posterior(log_variance):
    # Series of 1/2 (exp(t) - 1 - t) about 0; the next term is t^3/60 ~ 1e-11 of the sum.
    t = log_variance
    expected = t**2 / 4 * (1 + t / 3 + t**2 / 12)
    with float64():
        np.testing.assert_allclose(kl_to_standard_normal(jnp.zeros((1, 1)), jnp.array([[t]])), [expected], rtol=1e-10)
    # float32: expm1(t) is right to two ulps, 2^-22 t, next to t^2 / 2: rtol 4.8e-7 / t, half a per cent at 1e-4.
    # exp(t) - 1 - t is right to an ulp of 1, which is 24 times the whole value there.
    kl = kl_to_standard_normal(jnp.zeros((1, 1)), jnp.array([[t]], jnp.float32))
    np.testing.assert_allclose(kl, [expected], rtol=4.8e-7 / abs(t))


# --- ELBO terms and the objective -------------------------------------------------------------------------------------

MODELS = {
    "constant": (Constant(0.3), None, ()),
    "example": (Optimal("example", FLOOR), None, (B, 1, 1, 1)),
    "batch": (Optimal("batch", FLOOR), None, ()),
    "pixel": (Optimal("pixel", FLOOR), None, SHAPE),
    "channel": (Optimal("channel", FLOOR), None, SHAPE[-1:]),
    "learned": (Learned(floor=FLOOR), (), ()),
    "predicted": (Predicted(floor=FLOOR), (B, *SHAPE), (B, *SHAPE)),
}


@jitted_or_not
@pytest.mark.parametrize("name", MODELS)
def test_elbo_terms_of_every_variance_model(x64, transform, name):
    model, log_variance_shape, variance_shape = MODELS[name]
    x, mean = images()
    rate = np.array([3.0, 0.5, 7.0])
    log_variance = None
    if name == "constant":
        variance = np.array(0.3)
    elif log_variance_shape is None:
        variance = best_variance(x, mean, name, FLOOR)
    else:
        log_variance = np.random.default_rng(2).normal(-2, 1, size=log_variance_shape)
        variance = np.exp(log_variance)
    expected = ElboTerms(
        distortion=expected_nll(x, mean, variance, 0.0 if name == "constant" else FLOOR),
        rate=rate,
        mse=np.mean((x - mean) ** 2, axis=(1, 2, 3)),
        variance=variance,
    )

    def terms_and_objective(x, mean, rate, log_variance, beta):
        terms = elbo_terms(x, mean, rate, model, log_variance=log_variance)
        return terms, mean_objective(terms, beta)

    arrays = jax.tree.map(jnp.asarray, (x, mean, rate, log_variance, 2.5))
    terms, objective = transform(terms_and_objective)(*arrays)
    chex.assert_shape(list(terms), [(B,), (B,), (B,), variance_shape])
    chex.assert_trees_all_close(jax.tree.map(np.asarray, terms), expected, rtol=1e-12)
    np.testing.assert_allclose(objective, np.mean(expected.distortion) + 2.5 * 3.5, rtol=1e-12)  # mean rate = 10.5 / 3


# Example 0 observed whole, 1 in part, 2 in nothing but one entry; no entry of pixel (0, 0, 1) is observed.
MASK = np.random.default_rng(3).uniform(size=(B, *SHAPE)) < np.array([1.1, 0.5, 0.0])[:, None, None, None]
MASK[2, 3, 4, 0], MASK[:, 0, 0, 1] = True, False


@jitted_or_not
@pytest.mark.parametrize("name", MODELS)
def test_terms_of_observed_entries(x64, transform, name):
    """Against sums over the entries picked in NumPy; what is not observed is NaN, and nothing of it is seen."""
    model, log_variance_shape, _ = MODELS[name]
    x, mean = images()
    squared = np.square(x - mean)
    log_variance, floor = None, 0.0 if name == "constant" else FLOOR
    if name == "constant":
        variance = np.full(MASK.shape, 0.3)
    elif log_variance_shape is None:
        variance = np.full(MASK.shape, floor)
        for entries in sharing_sets(np.arange(MASK.size).reshape(MASK.shape), name):
            observed = entries[MASK.ravel()[entries]]
            variance.ravel()[entries] += squared.ravel()[observed].mean() if len(observed) else 0.0
    else:
        log_variance = np.random.default_rng(2).normal(-2, 1, size=log_variance_shape)
        variance = np.broadcast_to(np.exp(log_variance), MASK.shape)
    nll = 0.5 * (np.log(2 * np.pi * variance) + (squared + floor) / variance)

    def terms_of(x, mean, mask, log_variance):
        return elbo_terms(x, mean, jnp.zeros(B), model, log_variance=log_variance, mask=mask)

    hidden = np.where(MASK, x, np.nan)
    terms = transform(terms_of)(*jax.tree.map(jnp.asarray, (hidden, mean, MASK, log_variance)))
    np.testing.assert_allclose(terms.distortion, [nll[i][MASK[i]].sum() for i in range(B)], rtol=1e-12)
    np.testing.assert_allclose(terms.mse, [squared[i][MASK[i]].mean() for i in range(B)], rtol=1e-12)
    x, mean, log_variance = jax.tree.map(jnp.asarray, (hidden, mean, log_variance))
    gradient = jax.grad(lambda m: terms_of(x, m, MASK, log_variance).distortion.sum())(mean)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[MASK] != 0)
    assert np.all(gradient[~MASK] == 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_of_everything_is_no_mask_and_one_of_nothing_is_zero(x64, name):
    model, log_variance_shape, _ = MODELS[name]
    x, mean = map(jnp.asarray, images())
    log_variance = None if log_variance_shape is None else jnp.full(log_variance_shape, -2.0)

    def terms_of(mask):
        return elbo_terms(x, mean, jnp.zeros(B), model, log_variance=log_variance, mask=mask)

    everything, nothing = (jax.tree.map(lambda t, i=i: t[i], jax.vmap(terms_of)(jnp.array([True, False]))) for i in range(2))
    chex.assert_trees_all_close(everything, terms_of(None), rtol=1e-12)
    np.testing.assert_array_equal(nothing.distortion, np.zeros(B))
    np.testing.assert_array_equal(nothing.mse, np.zeros(B))


@pytest.mark.parametrize("over", ["batch", "pixel", "channel"])
def test_observed_entries_are_counted_over_all_devices(over):
    """Devices that observe different numbers of entries: the mean of their means would be another variance."""
    x, mean = images(batch=4)
    mask = np.random.default_rng(4).uniform(size=x.shape) < np.array([0.9, 0.6, 0.3, 0.1])[:, None, None, None]
    arrays = [jnp.asarray(a)[:, None] for a in (x.astype(np.float32), mean.astype(np.float32), mask)]

    def variance(x, mean, mask):
        return elbo_terms(x, mean, jnp.zeros(1), Optimal(over, FLOOR), mask=mask, axis_name="data").variance

    total = np.sum(np.square(x - mean), axis=AXES[over], where=mask)
    expected = total / np.maximum(np.sum(mask, axis=AXES[over]), 1) + FLOOR
    for own in jax.pmap(variance, "data", devices=jax.devices()[:4])(*arrays):
        np.testing.assert_allclose(own, expected, rtol=1e-5)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 4.0), (0.5, 5.0), (1.0, 6.0), (10.0, 24.0)])
def test_mean_objective_by_hand(beta, expected):
    # Distortions 3 and 5 average 4, rates 1 and 3 average 2.
    terms = ElboTerms(jnp.array([3.0, 5.0]), jnp.array([1.0, 3.0]), jnp.zeros(2), jnp.ones(()))
    assert float(mean_objective(terms, beta)) == expected
    assert float(mean_objective(terms, jnp.asarray(beta))) == expected


def test_learned_variance_converges_to_the_batch_optimal_one(x64):
    x, mean = images()
    arrays = jnp.asarray(x), jnp.asarray(mean), jnp.zeros(B)
    learned = jax.jit(lambda t: jnp.mean(elbo_terms(*arrays, Learned(floor=FLOOR), log_variance=t).distortion))
    best = optimize.minimize_scalar(lambda t: float(learned(t)), bounds=(-10, 3), options={"xatol": 1e-9})
    assert np.exp(best.x) == pytest.approx(np.mean((x - mean) ** 2) + FLOOR, rel=1e-6)
    batch = elbo_terms(*arrays, Optimal("batch", FLOOR))
    assert best.fun == pytest.approx(float(jnp.mean(batch.distortion)), rel=1e-12)


# --- Derivatives ------------------------------------------------------------------------------------------------------


@every_over
def test_envelope_theorem(x64, over):
    """The closed form has the gradient of the likelihood with v* held fixed, for parameters of the mean and for v0 alike."""
    x, shift = images()

    def mean_of(theta):  # one parameter per pixel, and not linear
        return jax.nn.sigmoid(theta + jnp.asarray(shift))

    def closed_form(theta, floor):
        return jnp.mean(optimal_gaussian_nll(jnp.asarray(x), mean_of(theta), over, floor))

    def held_fixed(theta, floor):
        mean = mean_of(theta)
        variance = jax.lax.stop_gradient(optimal_variance(jnp.asarray(x), mean, over, floor))
        noise = 0.5 * floor * jnp.sum(jnp.broadcast_to(1 / variance, (B, *SHAPE))) / B  # the v0 of E ||x + u - mean||^2
        return jnp.mean(gaussian_nll(jnp.asarray(x), mean, variance)) + noise

    theta, floor = jnp.full(SHAPE, 0.3)[None], jnp.asarray(FLOOR)
    closed, held = (jax.grad(f, argnums=(0, 1))(theta, floor) for f in (closed_form, held_fixed))
    chex.assert_trees_all_close(closed, held, rtol=1e-11)
    # The same in NumPy: d/d theta = -mean_B (x - mu) mu' / v*, with mu' = mu (1 - mu); d/d v0 = mean_B sum_pixels 1 / (2 v*).
    mean = 1 / (1 + np.exp(-0.3 - shift))
    precision = np.broadcast_to(1 / best_variance(x, mean, over, FLOOR), x.shape)
    np.testing.assert_allclose(closed[0][0], -np.mean((x - mean) * precision * mean * (1 - mean), axis=0), rtol=1e-11)
    np.testing.assert_allclose(closed[1], 0.5 * precision.sum() / B, rtol=1e-11)


@jitted_or_not
@pytest.mark.parametrize("shape", [(), (B, 1, 1, 1), SHAPE, (B, *SHAPE)], ids=str)
def test_gradients_of_gaussian_nll(x64, transform, shape):
    x, mean = images()
    variance = np.random.default_rng(1).uniform(0.1, 2.0, size=shape)
    grad = jax.grad(lambda *a: jnp.sum(gaussian_nll(*a)), argnums=(0, 1, 2))
    of_x, of_mean, of_variance = transform(grad)(jnp.asarray(x), jnp.asarray(mean), jnp.asarray(variance))
    full = np.broadcast_to(variance, x.shape)
    np.testing.assert_allclose(of_x, (x - mean) / full, rtol=1e-12)
    np.testing.assert_allclose(of_mean, (mean - x) / full, rtol=1e-12)
    per_entry = 0.5 / full - 0.5 * (x - mean) ** 2 / full**2
    aligned = (1,) * (4 - len(shape)) + shape
    summed = tuple(axis for axis in range(4) if aligned[axis] == 1)
    np.testing.assert_allclose(of_variance, per_entry.sum(axis=summed, keepdims=True).reshape(shape), rtol=1e-11)


@jitted_or_not
def test_gradients_of_the_objective_in_beta_and_variance(x64, transform):
    x, mean = images()
    rate = np.array([3.0, 0.5, 7.0])

    def objective(beta, variance):
        arrays = jnp.asarray(x), jnp.asarray(mean), jnp.asarray(rate)
        return mean_objective(elbo_terms(*arrays, Constant(variance)), beta)

    of_beta, of_variance = transform(jax.grad(objective, argnums=(0, 1)))(jnp.asarray(2.0), jnp.asarray(0.3))
    assert float(of_beta) == pytest.approx(3.5, rel=1e-12)  # the mean rate
    sse = np.sum((x - mean) ** 2) / B
    assert float(of_variance) == pytest.approx(D / (2 * 0.3) - sse / (2 * 0.3**2), rel=1e-12)


def test_hessian_in_log_variance_and_log_beta(x64):
    x, mean = images()

    def objective(logs):
        arrays = jnp.asarray(x), jnp.asarray(mean), jnp.array([3.0, 0.5, 7.0])
        return mean_objective(elbo_terms(*arrays, Constant(jnp.exp(logs[0]))), jnp.exp(logs[1]))

    hessian = jax.jit(jax.hessian(objective))(jnp.log(jnp.array([0.3, 2.0])))
    # D/2 log v + SSE/(2v) + beta R: twice in log v leaves SSE/(2v), twice in log beta leaves beta R, and they do not mix.
    sse = np.sum((x - mean) ** 2) / B
    np.testing.assert_allclose(hessian, [[sse / (2 * 0.3), 0.0], [0.0, 2.0 * 3.5]], rtol=1e-11, atol=1e-12)


@every_over
def test_hessian_of_the_closed_form_in_the_mean(x64, over):
    """By the envelope theorem a v* wrongly held constant leaves the gradient as it is; the curvature tells."""
    residual = np.array([[0.3, -0.1, 0.5], [0.2, 0.4, -0.6]])  # two examples of three pixels
    hessian = jax.hessian(lambda mean: jnp.mean(optimal_gaussian_nll(jnp.zeros((2, 3)), mean, over, FLOOR)))
    # n entries share v = |r|^2 / n + v0 and contribute n/2 log v to the sum over the batch: gradient r / v,
    # Hessian I / v - (2/n) r r^T / v^2, and nothing between different sets.
    expected = np.zeros((6, 6))
    for members in sharing_sets(np.arange(6).reshape(2, 3), over):
        r = residual.ravel()[members]
        v = np.mean(r**2) + FLOOR
        expected[np.ix_(members, members)] = np.eye(len(r)) / v - 2 / len(r) * np.outer(r, r) / v**2
    np.testing.assert_allclose(hessian(jnp.asarray(residual)).reshape(6, 6), expected / 2, rtol=1e-11, atol=1e-13)


def test_vmap_over_beta_is_a_loop_over_beta(x64):
    x, mean = images()
    rate = np.array([3.0, 0.5, 7.0])
    betas = np.array([0.0, 0.1, 1.0, 30.0])

    def objective(beta, mean):  # the rate depends on the mean, so that beta reaches the gradient
        rates = jnp.asarray(rate) + jnp.sum(mean, axis=(1, 2, 3))
        return mean_objective(elbo_terms(jnp.asarray(x), mean, rates, Optimal("batch", FLOOR)), beta)

    values, grads = jax.vmap(jax.value_and_grad(objective, argnums=1), in_axes=(0, None))(jnp.asarray(betas), jnp.asarray(mean))
    v = np.mean((x - mean) ** 2) + FLOOR
    for value, grad, beta in zip(values, grads, betas, strict=True):
        mean_rate = np.mean(rate + mean.sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(value, D / 2 * (np.log(2 * np.pi * v) + 1) + beta * mean_rate, rtol=1e-12)
        np.testing.assert_allclose(grad, ((mean - x) / v + beta) / B, rtol=1e-11)


# --- beta and sigma^2 -------------------------------------------------------------------------------------------------


def train_linear_vae(beta: float, variance: float | None, data_scale: float = 1.0) -> tuple[np.ndarray, float, float]:
    """Optimum of a linear VAE with one latent on four points: reconstruction matrix a w^T, posterior variance, objective.

    Encoder q(z|x) = N(w.x, t), decoder a z; `variance` None takes the optimal variance of the batch. Four points with
    covariance eigenvalues 2 and 0.5, turned by 0.3 rad. z = w.x +- sqrt(t) has the mean and the second moment of q, and the
    squared error is quadratic in z, so the mean over both is the exact expectation.
    """
    points = data_scale * np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) @ TURN.T

    @jax.jit
    @jax.value_and_grad
    def objective(parameters):
        w, a, log_t = parameters[:2], parameters[2:4], parameters[4]
        x = jnp.asarray(points)
        m, scale = x @ w, jnp.exp(log_t / 2)
        z = jnp.concatenate([m + scale, m - scale])
        rate = kl_to_standard_normal(m[:, None], jnp.broadcast_to(log_t, (4, 1)))
        model = Optimal("batch", floor=0.0) if variance is None else Constant(variance)
        return mean_objective(elbo_terms(jnp.tile(x, (2, 1)), z[:, None] * a[None], jnp.tile(rate, 2), model), beta)

    start = np.array([0.5, 0.1, 0.4, -0.2, -1.0])
    best = optimize.minimize(
        lambda p: [np.asarray(o, np.float64) for o in objective(p)], start, jac=True, options={"gtol": 1e-9}
    )
    return np.outer(best.x[2:4], best.x[:2]), float(np.exp(best.x[4])), float(best.fun)


TURN = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
FIRST = np.outer(TURN[:, 0], TURN[:, 0])  # projection on the first principal axis

# Per mode with eigenvalue l, for err/(2v) + beta KL with err = l (1 - a w)^2 + a^2 t and KL = (t + w^2 l - 1 - log t)/2:
# the best a gives err = l t / M with M = w^2 l + t; then t = s M / l and M = 1, where s = beta v. So t = s / l and
# a w = 1 - s / l.


@pytest.mark.parametrize(("beta", "variance"), [(1.0, 0.2), (0.25, 0.8), (4.0, 0.05)])
def test_constant_variance_optimum_depends_on_beta_times_variance_alone(x64, beta, variance):
    reconstruction, posterior_variance, _ = train_linear_vae(beta, variance)
    assert posterior_variance == pytest.approx(0.1, rel=1e-6)  # 0.2 / 2
    np.testing.assert_allclose(reconstruction, 0.9 * FIRST, atol=1e-6)


def test_constant_variance_optimum_moves_with_beta_alone(x64):
    reconstruction, posterior_variance, _ = train_linear_vae(0.25, 0.2)
    assert posterior_variance == pytest.approx(0.025, rel=1e-6)  # 0.05 / 2
    np.testing.assert_allclose(reconstruction, 0.975 * FIRST, atol=1e-6)


@pytest.mark.parametrize("data_scale", [1.0, 2.0])
@pytest.mark.parametrize(("beta", "variance"), [(1.0, 1 / 2), (0.25, 2 / 7)])
def test_optimal_variance_leaves_beta_nothing_to_trade_with(x64, beta, variance, data_scale):
    """v* = l_2 / (D - beta) = 0.5 / (2 - beta) follows from beta, so beta v* does as well: each beta has its own optimum.

    Data twice as large has four times the v*, so the optimum is the same; with a constant variance it would be that of
    a quarter of beta.
    """
    reconstruction, posterior_variance, value = train_linear_vae(beta, None, data_scale)
    assert posterior_variance == pytest.approx(beta * variance / 2, rel=1e-6)  # 0.25 and 1/28
    np.testing.assert_allclose(reconstruction, (1 - beta * variance / 2) * FIRST, atol=1e-6)
    # D/2 (log(2 pi v*) + 1) + beta/2 log(l_1 / (beta v*)), the scale only in v*.
    expected = np.log(2 * np.pi * variance * data_scale**2) + 1 + beta / 2 * np.log(2 / (beta * variance))
    assert value == pytest.approx(expected, rel=1e-9)


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_precision_in_is_precision_out(x64, name, dtype):
    model, log_variance_shape, _ = MODELS[name]
    x, mean, rate = (jnp.asarray(a, dtype) for a in (*images(), np.ones(B)))
    log_variance = None if log_variance_shape is None else jnp.zeros(log_variance_shape, dtype)
    terms = elbo_terms(x, mean, rate, model, log_variance=log_variance)
    kl = kl_to_standard_normal(x, mean)
    for value in (*terms, mean_objective(terms, 2.0), kl, bits_per_dimension(kl, SHAPE), gaussian_nll(x, mean, 0.5)):
        chex.assert_type(value, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted_before_anything_is_squared_or_summed(dtype):
    # 300^2 overflows float16, and a bfloat16 sum of 784 terms stalls at 256 of them.
    rng = np.random.default_rng(0)
    x, mean = (jnp.asarray(rng.normal(0, 300, size=(2, 784)), dtype) for _ in range(2))
    x_exact, mean_exact = np.asarray(x, np.float64), np.asarray(mean, np.float64)
    residual_squared = (x_exact - mean_exact) ** 2
    mse = residual_squared.mean(axis=1)
    log_variance = jnp.full((2, 784), 20.0, dtype)  # exp(20) overflows float16
    predicted = elbo_terms(x, mean, jnp.zeros(2), Predicted(), log_variance=log_variance)
    results = {
        "gaussian_nll": (gaussian_nll(x, mean, 2.0), -stats.norm.logpdf(x_exact, mean_exact, np.sqrt(2)).sum(axis=1)),
        "optimal_variance": (optimal_variance(x, mean), mse[:, None]),
        "optimal_gaussian_nll": (optimal_gaussian_nll(x, mean), 392 * (np.log(2 * np.pi * mse) + 1)),
        "kl": (kl_to_standard_normal(mean, log_variance), 0.5 * (np.expm1(20) - 20 + mean_exact**2).sum(axis=1)),
        "mse": (predicted.mse, mse),
        "predicted": (predicted.distortion, 0.5 * (LOG_2PI + 20 + residual_squared * np.exp(-20)).sum(axis=1)),
    }
    for name, (value, expected) in results.items():
        chex.assert_type(value, jnp.float32)
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("model", [Constant(0.5), *map(Optimal, AXES), Learned(), Predicted()], ids=str)
def test_extreme_inputs_give_right_values_and_finite_gradients_in_float32(model):
    x, posterior = jnp.ones((2, 28, 28, 1)), jnp.array([[-50.0, 50.0, 0.0]] * 2)
    trained = isinstance(model, Learned | Predicted)
    # Per latent with mean 1: 1/2 (exp(lv) - 1 - lv + 1), for lv = -50, 50 and 0.
    rate = 0.5 * (np.exp(-50) + 50 + np.exp(50) - 50 + 1)
    v0 = 0.0 if isinstance(model, Constant) else 1 / 780_300

    def objective(x, mean, posterior, beta, log_variance):
        rate = kl_to_standard_normal(jnp.ones_like(posterior), posterior)
        return mean_objective(elbo_terms(x, mean, rate, model, log_variance=log_variance), beta)

    value_and_grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3, 4) if trained else (0, 1, 2, 3)))
    for residual, beta, log_variance in itertools.product([0.0, 1e3], [0.0, 1e4], [-50.0, 50.0] if trained else [None]):
        given = jnp.full(x.shape if isinstance(model, Predicted) else (), log_variance) if trained else None
        value, gradients = value_and_grad(x, x + residual, posterior, jnp.asarray(beta), given)
        chex.assert_tree_all_finite(gradients)
        variance = {Constant: 0.5, Optimal: residual**2 + v0}.get(type(model)) or np.exp(log_variance)
        expected = 392 * (np.log(2 * np.pi * variance) + (residual**2 + v0) / variance) + beta * rate
        np.testing.assert_allclose(value, expected, rtol=2e-5)  # 784 float32 terms, exp of 50 (whose ulp is 4e-6)


@pytest.mark.parametrize("variance", [1e-30, 1e30])
def test_gaussian_nll_of_extreme_variances_in_float32(variance):
    x = jnp.ones((1, 784))
    value, gradient = jax.value_and_grad(lambda mean: gaussian_nll(x, mean, variance)[0])(x + 0.5)
    np.testing.assert_allclose(value, 392 * (np.log(2 * np.pi * variance) + 0.25 / variance), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.full((1, 784), 0.5 / variance), rtol=1e-5)


@pytest.mark.parametrize("log_variance", [-50.0, 50.0])
def test_kl_of_extreme_posteriors_in_float32(log_variance):
    mean, log_variances = jnp.full((1, 2), 1e3), jnp.full((1, 2), log_variance)
    value, gradients = jax.value_and_grad(lambda *a: kl_to_standard_normal(*a)[0], argnums=(0, 1))(mean, log_variances)
    np.testing.assert_allclose(value, np.expm1(log_variance) - log_variance + 1e6, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], np.full((1, 2), 1e3), rtol=1e-6)
    np.testing.assert_allclose(gradients[1], np.full((1, 2), 0.5 * np.expm1(log_variance)), rtol=1e-5)


# --- Devices ----------------------------------------------------------------------------------------------------------


def on_devices(devices: int, over: str, axis_name: str | None):
    """With a batch split over devices: v* and NLL, each of `elbo_terms` and of its function; objective; gradient in a bias."""
    x, mean = images(batch=16, shape=(4, 4, 1))
    mean = x + (mean - x) * np.arange(1, 17)[:, None, None, None] ** 2 / 64  # devices get residuals of different size

    def step(x, mean):
        def loss(bias):
            terms = elbo_terms(x, mean + bias, jnp.ones(len(x)), Optimal(over, FLOOR), axis_name=axis_name)
            return mean_objective(terms, 2.0, "data"), terms

        (objective, terms), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.zeros((1, 4, 4, 1)))
        variances = terms.variance, optimal_variance(x, mean, over, FLOOR, axis_name)
        nlls = terms.distortion, optimal_gaussian_nll(x, mean, over, FLOOR, axis_name)
        return variances, nlls, objective, jax.lax.pmean(gradient, "data")

    split = [jnp.asarray(a, jnp.float32).reshape(devices, 16 // devices, 4, 4, 1) for a in (x, mean)]
    out = jax.pmap(step, axis_name="data", devices=jax.devices()[:devices])(*split)
    return x.astype(np.float32).astype(np.float64), mean.astype(np.float32).astype(np.float64), jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("over", ["batch", "pixel", "channel"])
def test_a_shared_variance_is_that_of_the_global_batch_on_any_number_of_devices(devices, over):
    x, mean, (variances, nlls, objective, gradient) = on_devices(devices, over, "data")
    expected = best_variance(x, mean, over, FLOOR)
    for device in range(devices):  # every device holds the global value
        for variance in variances:
            np.testing.assert_allclose(variance[device], expected, rtol=1e-6)
        np.testing.assert_allclose(objective[device], np.mean(expected_nll(x, mean, expected, FLOOR)) + 2.0, rtol=1e-6)
        # -mean_B (x - mu) / v*; single entries cancel over the batch, hence the absolute part.
        true_gradient = -np.mean((x - mean) / expected, axis=0)
        np.testing.assert_allclose(gradient[device][0], true_gradient, atol=2e-6 * np.abs(true_gradient).max())
    for nll in nlls:
        np.testing.assert_allclose(nll.reshape(16), expected_nll(x, mean, expected, FLOOR), rtol=1e-6)


@pytest.mark.parametrize("over", ["batch", "pixel", "channel"])
def test_a_variance_per_device_gives_another_gradient(over):
    """The classic silent bug; were this gradient the same, the test above could not fail."""
    x, mean, (*_, gradient) = on_devices(4, over, None)
    true_gradient = -np.mean((x - mean) / best_variance(x, mean, over, FLOOR), axis=0)
    assert np.linalg.norm(gradient[0][0] - true_gradient) > 0.5 * np.linalg.norm(true_gradient)


def test_a_variance_per_example_needs_no_other_device():
    x, mean, (variances, nlls, _, _) = on_devices(4, "example", "data")
    expected = best_variance(x, mean, "example", FLOOR)
    for variance, nll in zip(variances, nlls, strict=True):
        np.testing.assert_allclose(variance.reshape(expected.shape), expected, rtol=1e-6)
        np.testing.assert_allclose(nll.reshape(16), expected_nll(x, mean, expected, FLOOR), rtol=1e-6)


# --- Errors -----------------------------------------------------------------------------------------------------------

X, RATE = jnp.zeros((B, *SHAPE)), jnp.zeros(B)
NUMBER = "a finite number > 0, got"
BAD_NUMBERS = [-1.0, 0.0, float("nan"), float("inf"), np.float32(-1)]


def raises(sentence: str):
    return pytest.raises(UserError, match=sentence)


@pytest.mark.parametrize("function", [gaussian_nll, optimal_variance, optimal_gaussian_nll, elbo_terms])
@pytest.mark.parametrize("shape", [(B, 4, 5, 1), (B, 40), (1, *SHAPE)], ids=str)
def test_images_of_different_shape_are_not_broadcast(unchecked, function, shape):
    rest = {gaussian_nll: (0.5,), elbo_terms: (RATE, Constant(0.5))}.get(function, ())
    with raises(r"must have one shape .*\(3, 4, 5, 2\)"):
        function(X, jnp.zeros(shape), *rest)


def test_images_need_a_batch_axis_and_pixels(unchecked):
    with raises(r"\[batch, \.\.\.pixels\]"):
        gaussian_nll(RATE, RATE, 0.5)


@pytest.mark.parametrize("shape", [(B,), (5,), (2, 1, 1, 1), (4, 5, 3), (1, B, *SHAPE)], ids=str)
def test_a_variance_must_broadcast_against_the_images(unchecked, shape):
    with raises("does not broadcast"):
        gaussian_nll(X, X, jnp.ones(shape))


def test_a_variance_may_not_enlarge_the_images(unchecked):
    with raises("does not broadcast"):
        gaussian_nll(X[..., :1], X[..., :1], jnp.ones(SHAPE))


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
def test_a_variance_is_a_positive_number(unchecked, value):
    with raises(f"variance must be {NUMBER}"):
        gaussian_nll(X, X, value)
    with raises(f"Constant.variance must be {NUMBER}"):
        Constant(value)
    with raises(f"Learned.initial_variance must be {NUMBER}"):
        Learned(initial_variance=value)


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("model", [Optimal, Learned, Predicted])
def test_the_floor_of_a_model_is_not_negative(unchecked, model, value):
    with raises(f"{model.__name__}.floor must be a finite number >"):
        model(floor=value)


def test_a_predicted_variance_needs_a_floor_above_zero(unchecked):
    with raises(f"Predicted.floor must be {NUMBER}"):
        Predicted(floor=0.0)


@pytest.mark.parametrize("value", [-1e-6, float("nan")])
@pytest.mark.parametrize("function", [optimal_variance, optimal_gaussian_nll])
def test_the_floor_of_a_function_is_not_negative(unchecked, function, value):
    with raises("floor must be a finite number >= 0"):
        function(X, X, floor=value)


@pytest.mark.parametrize(
    "ask", [lambda o: Optimal(o), lambda o: optimal_variance(X, X, o), lambda o: optimal_gaussian_nll(X, X, o)]
)
def test_what_shares_a_variance_is_one_of_four(unchecked, ask):
    with raises(r"'example', 'batch', 'pixel', 'channel', got 'exmple' \(did you mean 'example'\?\)"):
        ask("exmple")
    with raises(r"got 'zzz'\.$"):  # nothing is near
        ask("zzz")
    with raises("A variance per pixel and per example is unbounded below"):
        ask("pixel and example")


@pytest.mark.parametrize("mask", [np.ones((B, *SHAPE)), [True], True], ids=["numbers", "list", "bool"])
def test_a_mask_is_a_boolean_array(unchecked, mask):
    with raises("mask must be a boolean array, True where an entry is observed, got"):
        elbo_terms(X, X, RATE, Optimal(), mask=mask)


@pytest.mark.parametrize("shape", [(B,), (B, 4), (2, B, *SHAPE)], ids=str)
def test_a_mask_broadcasts_to_the_images(unchecked, shape):
    with raises(r"mask of shape .* does not broadcast to the shape \(3, 4, 5, 2\) of x"):
        elbo_terms(X, X, RATE, Optimal(), mask=np.ones(shape, bool))


def test_a_variance_of_ones_own_without_masks_refuses_one(unchecked):
    @dataclasses.dataclass(frozen=True)
    class Unmasked(Constant):
        def distortion(self, residual_squared, log_variance, axis_name):
            return super().distortion(residual_squared, log_variance, axis_name)

    assert elbo_terms(X, X, RATE, Unmasked()).distortion.shape == (B,)
    with raises("distortion of Unmasked takes no mask; give it a fourth parameter, mask=None"):
        elbo_terms(X, X, RATE, Unmasked(), mask=np.ones(SHAPE, bool))


@pytest.mark.parametrize("model", [Learned(), Predicted()], ids=str)
def test_a_trained_variance_needs_its_log_variance(unchecked, model):
    with raises(f"{type(model).__name__} needs log_variance"):
        elbo_terms(X, X, RATE, model)
    with raises(rf"log_variance of {type(model).__name__} must have shape .*, got \(3, 1\)"):
        elbo_terms(X, X, RATE, model, log_variance=jnp.zeros((3, 1)))


@pytest.mark.parametrize("model", [Constant(0.5), Optimal()], ids=str)
def test_other_variances_take_no_log_variance(unchecked, model):
    with raises(f"{type(model).__name__} takes no log_variance"):
        elbo_terms(X, X, RATE, model, log_variance=jnp.zeros(()))


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf"), np.float64(-0.1)])
def test_beta_is_a_number_of_at_least_zero(unchecked, beta):
    with raises("beta must be a finite number >= 0, got"):
        mean_objective(ElboTerms(RATE, RATE, RATE, jnp.ones(())), beta)


def test_kl_wants_equal_shapes(unchecked):
    with raises(r"one shape, got \(3, 2\) and \(3, 1\)"):
        kl_to_standard_normal(jnp.zeros((3, 2)), jnp.zeros((3, 1)))
