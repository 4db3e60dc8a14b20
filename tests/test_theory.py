"""The linear-Gaussian optimum and Shannon's R(D) against numerical minimization, root finding, SciPy, scikit-learn and hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64
from scipy import optimize, stats
from sklearn.decomposition import PCA

from bsvae_jax.errors import UserError
from bsvae_jax.theory import (
    covariance_eigenvalues,
    critical_beta,
    gaussian_rate_distortion,
    linear_optimum,
    probabilistic_pca_log_likelihood,
)

SPECTRA = {
    "flat": np.array([4.0, 1.2, 0.8]),
    "steep": np.array([30.0, 3.0, 0.5, 0.1, 0.05]),
    "smooth": np.exp(-np.arange(6) / 2),
    "unsorted, twice 2": np.array([0.3, 2.0, 5.0, 2.0]),
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


# --- The optimum, by brute force --------------------------------------------------------------------------------------


def minimize_linear_vae(eigenvalues: np.ndarray, latents: int, beta: float, floor: float) -> tuple[float, float, float]:
    """Variance, rate and objective at the best of several BFGS minima, in the eigenbasis of the covariance.

    Latent i sees u ~ N(0, l) through q = N(g u, t) and decodes d z. Then E (u - d z)^2 = l (1 - d g)^2 + d^2 t and
    E KL = 1/2 (t + g^2 l - 1 - log t); dimensions without a latent cost l. The variance is profiled: v = error / D + v0.
    Parameters are g sqrt(l), d / sqrt(l) and log t, which makes every latent look alike to the minimizer.
    """
    l = np.sort(eigenvalues)[::-1]
    coded, rest, dimensions = l[:latents], l[latents:].sum(), len(l)

    def terms(parameters):
        g, d, log_t = parameters.reshape(3, latents)
        t = np.exp(log_t)
        error = np.sum(coded * ((1 - d * g) ** 2 + d**2 * t)) + rest
        rate = 0.5 * np.sum(t + g**2 - 1 - log_t)
        return error / dimensions + floor, rate

    def objective(parameters):
        g, d, log_t = parameters.reshape(3, latents)
        t = np.exp(log_t)
        v, rate = terms(parameters)
        # d/d error of D/2 log v is 1/(2v).
        gradient = [
            -2 * coded * d * (1 - d * g) / (2 * v) + beta * g,
            (-2 * coded * g * (1 - d * g) + 2 * coded * d * t) / (2 * v),
            coded * d**2 * t / (2 * v) + beta * 0.5 * (t - 1),
        ]
        return dimensions / 2 * (np.log(2 * np.pi * v) + 1) + beta * rate, np.concatenate(gradient)

    rng = np.random.default_rng(0)
    starts = [np.concatenate([rng.uniform(0.2, 1.0, 2 * latents), rng.uniform(-5, 0, latents)]) for _ in range(4)]
    best = min((optimize.minimize(objective, start, jac=True, options={"gtol": 1e-9}) for start in starts), key=lambda r: r.fun)
    return *terms(best.x), best.fun


@every_spectrum
@pytest.mark.parametrize("floor", [0.0, 0.04])
@pytest.mark.parametrize("latents", [1, 2, "all"])
def test_linear_optimum_is_what_a_minimizer_finds(spectrum, latents, floor):
    latents = len(spectrum) - (floor == 0) if latents == "all" else latents  # all D with floor 0 is unbounded below
    for beta in (0.1, 0.5, 1.0, 2.0, 10.0):
        optimum = linear_optimum(spectrum, latents, beta, floor)
        variance, rate, objective = minimize_linear_vae(spectrum, latents, beta, floor)
        # Flat to second order: the place is found to about the root of the accuracy of the value.
        assert optimum.objective == pytest.approx(objective, rel=1e-10, abs=1e-10)
        assert optimum.variance == pytest.approx(variance, rel=1e-5)
        assert optimum.rate == pytest.approx(rate, rel=1e-5, abs=1e-5)
        assert optimum.distortion == pytest.approx(objective - beta * rate, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_linear_optimum_needs_no_eigenbasis(beta):
    """Full encoder and decoder matrices on a rotated covariance: no aligned axes, no largest eigenvalues are assumed."""
    spectrum, latents, floor = np.array([5.0, 2.0, 0.7, 0.2]), 2, 0.01
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    with float64():
        covariance = jnp.asarray(basis * spectrum @ basis.T)

        @jax.jit
        @jax.value_and_grad
        def objective(parameters):
            w, a, t = parameters[:8].reshape(2, 4), parameters[8:16].reshape(4, 2), jnp.exp(parameters[16:])
            residual = jnp.eye(4) - a @ w
            error = jnp.trace(residual @ covariance @ residual.T) + jnp.sum(a**2 @ t)
            rate = 0.5 * (jnp.trace(w @ covariance @ w.T) + jnp.sum(t - 1 - jnp.log(t)))
            return 2 * (jnp.log(2 * jnp.pi * (error / 4 + floor)) + 1) + beta * rate

        starts = [np.append(rng.normal(0, 0.4, 16), [-1.0, -1.0]) for _ in range(3)]
        best = [
            optimize.minimize(lambda p: [np.asarray(o) for o in objective(p)], s, jac=True, options={"gtol": 1e-8}).fun
            for s in starts
        ]
    assert linear_optimum(spectrum, latents, beta, floor).objective == pytest.approx(min(best), rel=1e-9)


def test_linear_optimum_by_hand():
    # D = 3, K = 1: v = 2 / (3 - beta), s = beta v. At beta = 3/2: v = 4/3, s = 2, rate = 1/2 log(4/2).
    optimum = linear_optimum(np.array([1.0, 4.0, 1.0]), 1, 1.5)
    assert optimum.active == 1
    assert optimum.variance == pytest.approx(4 / 3, rel=1e-14)
    assert optimum.rate == pytest.approx(0.5 * np.log(2), rel=1e-14)
    assert optimum.distortion == pytest.approx(1.5 * (np.log(8 / 3 * np.pi) + 1), rel=1e-14)
    assert optimum.objective == pytest.approx(1.5 * (np.log(8 / 3 * np.pi) + 1) + 0.75 * np.log(2), rel=1e-14)


# --- Which latents are active -----------------------------------------------------------------------------------------


def random_problems(count: int):
    rng = np.random.default_rng(0)
    for _ in range(count):
        dimensions = int(rng.integers(2, 9))
        spectrum = np.exp(rng.normal(0, rng.choice([0.1, 1.0, 3.0]), size=dimensions))
        latents = int(rng.integers(1, dimensions))
        yield np.sort(spectrum)[::-1], latents, float(np.exp(rng.normal(0, 1.5))), float(rng.choice([0.0, 1e-3, 0.1]))


def test_just_one_number_of_active_latents_is_consistent_with_its_water_level():
    """Minimized over encoder and decoder at fixed v, the objective has one minimum in v, so two k never compete.

    Its derivative in log v is (D - E(v) / v) / 2 with E(v) = sum_{i<=K} min(l_i, beta v) + sum_{i>K} l_i + D v0. E is concave
    and not negative at 0, so E(v) / v falls and meets D once.
    """
    for spectrum, latents, beta, floor in random_problems(1000):
        optimum = linear_optimum(spectrum, latents, beta, floor)
        level, k = beta * optimum.variance, optimum.active
        assert k == np.sum(spectrum[:latents] > level)
        error = np.minimum(spectrum[:latents], level).sum() + spectrum[latents:].sum()
        assert optimum.variance == pytest.approx(error / len(spectrum) + floor, rel=1e-12)
        assert optimum.rate == pytest.approx(0.5 * np.log(np.maximum(spectrum[:latents] / level, 1)).sum(), rel=1e-9, abs=1e-12)


def test_at_most_dimensions_over_beta_latents_are_active():
    for spectrum, latents, beta, floor in random_problems(1000):
        assert linear_optimum(spectrum, latents, beta, floor).active <= len(spectrum) / beta
    # 4 / 1.5 = 2.67 leaves two, although the third eigenvalue is far above the variance that three active ones would leave.
    spectrum = np.array([1e6, 1e4, 80.0, 1e-3])
    assert linear_optimum(spectrum, 3, 1.5).active == 2  # v = 80.001 / (4 - 3), level 120
    assert linear_optimum(spectrum, 3, 1.3).active == 3  # v = 0.001 / (4 - 3.9), level 0.013


@pytest.mark.parametrize(
    ("beta", "active", "rate"),
    # (4, 1, 1), one latent: s = 2 beta / (3 - beta) reaches 4 at beta = D l_1 / sum l = 2, rate = 1/2 log(2 (3 - beta) / beta).
    [(1.0, 1, np.log(2)), (1.5, 1, 0.5 * np.log(2)), (1.98, 1, 0.5 * np.log(1.02 / 0.99)), (2.0, 0, 0.0), (5.0, 0, 0.0)],
)
def test_the_posterior_collapses_at_the_critical_beta_and_continuously(beta, active, rate):
    optimum = linear_optimum(np.array([4.0, 1.0, 1.0]), 1, beta)
    assert optimum.active == active
    assert optimum.rate == pytest.approx(rate, abs=1e-14)
    assert optimum.variance == pytest.approx(2 / (3 - beta) if active else 2.0, rel=1e-14)


@every_spectrum
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_collapsed_and_active_branch_meet_at_the_critical_beta(spectrum, floor):
    dimensions, latents = len(spectrum), len(spectrum) - 1
    critical = dimensions * spectrum.max() / (spectrum.sum() + dimensions * floor)
    assert critical_beta(spectrum, floor) == pytest.approx(critical, rel=1e-14)
    below, above = (linear_optimum(spectrum, latents, critical * factor, floor) for factor in (1 - 1e-6, 1 + 1e-6))
    assert (below.active, above.active, above.rate) == (1, 0, 0.0)
    # With k active d log s / d log beta = D / (D - k beta): the rate just below is half of that times 1e-6.
    assert below.rate == pytest.approx(0.5e-6 * dimensions / (dimensions - critical), rel=1e-3)
    assert above.variance == pytest.approx(spectrum.mean() + floor, rel=1e-12)
    assert below.objective == pytest.approx(above.objective, rel=1e-9)


def test_collapse_of_equal_eigenvalues_is_steep_but_continuous():
    # All of D = 10 unit eigenvalues coded: v = v0 / (1 - beta), s = beta v, so s = 1 at beta = 1 / (1 + v0).
    # A thousandth below it each latent still carries 1/2 log(1e-3 / (0.999 * 1e-6)) = 3.45 nats.
    spectrum = np.ones(10)
    assert linear_optimum(spectrum, 10, 0.999, 1e-6).rate == pytest.approx(5 * np.log(1e3 / 0.999), rel=1e-9)
    for excess in (1e-3, 1e-4):  # s = 1 / (1 + excess), for which beta = s / (v0 + s)
        level = 1 / (1 + excess)
        # 1 - beta ~ 1e-6 keeps ten digits, so the rate is known to 1e-10 per latent.
        optimum = linear_optimum(spectrum, 10, level / (1e-6 + level), 1e-6)
        assert optimum.rate == pytest.approx(5 * np.log1p(excess), abs=1e-8)
    assert linear_optimum(spectrum, 10, 1.0, 1e-6).active == 0


@pytest.mark.parametrize("dimensions", range(2, 9))
@pytest.mark.parametrize("eigenvalue", [0.1, 0.7, 1.0, 1.4, 2.3])
def test_noise_without_structure_has_an_optimum_at_beta_one(dimensions, eigenvalue):
    """The water level is then every eigenvalue itself, and rounding may put it on either side."""
    for latents in range(1, dimensions):
        optimum = linear_optimum(np.full(dimensions, eigenvalue), latents, 1.0)
        assert optimum.variance == pytest.approx(eigenvalue, rel=1e-12)
        assert optimum.rate == pytest.approx(0, abs=1e-12)


def test_a_water_level_on_an_eigenvalue_has_an_optimum():
    # All coded: v = D v0 / (D - D beta) = 0.25 / 2.5 = 0.1, level 0.05, on the last eigenvalue; the others are 600, 60, 10
    # and 2 times as large, a product of 720000.
    optimum = linear_optimum(SPECTRA["steep"], 5, 0.5, 0.05)
    assert optimum.variance == pytest.approx(0.1, rel=1e-12)
    assert optimum.rate == pytest.approx(0.5 * np.log(720_000), rel=1e-12)


@pytest.mark.parametrize("dimensions", range(4, 9))
def test_data_of_rank_r_have_an_optimum_at_beta_dimensions_over_r(dimensions):
    """There the objective no longer depends on v below l_r / beta, so that v is one of the optima, at level l_r."""
    for rank in range(1, dimensions):
        beta = dimensions / rank
        spectrum = np.append(np.arange(rank, 0, -1.0), np.zeros(dimensions - rank))  # l_r = 1
        expected = dimensions / 2 * (np.log(2 * np.pi / beta) + 1) + beta / 2 * np.log(spectrum[:rank]).sum()
        assert linear_optimum(spectrum, rank, beta).objective == pytest.approx(expected, rel=1e-9)


# --- Probabilistic PCA ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 3.0


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_beta_one_without_floor_is_probabilistic_pca(data, latents):
    eigenvalues, vectors = np.linalg.eigh(np.cov(data.T, bias=True))
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    noise = eigenvalues[latents:].mean()
    kept = vectors[:, :latents]
    covariance = kept * (eigenvalues[:latents] - noise) @ kept.T + noise * np.eye(5)
    expected = stats.multivariate_normal(data.mean(axis=0), covariance).logpdf(data).mean()

    variance, log_likelihood = probabilistic_pca_log_likelihood(eigenvalues, latents)
    assert variance == pytest.approx(noise, rel=1e-12)
    assert log_likelihood == pytest.approx(expected, rel=1e-12)
    optimum = linear_optimum(eigenvalues, latents, 1.0)
    assert optimum.active == latents
    assert optimum.variance == pytest.approx(noise, rel=1e-12)
    assert -optimum.objective == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_probabilistic_pca_is_that_of_scikit_learn(data, latents):
    n, dimensions = data.shape
    score = PCA(latents, svd_solver="full").fit(data).score(data)
    # scikit-learn divides the covariance by N - 1, not N. That stretches the model covariance by c = N / (N - 1), which adds
    # D log c to its log-determinant and turns tr(C^-1 S) = D into D / c; the likelihood is a little below its maximum.
    stretch = n / (n - 1)
    expected = score + 0.5 * dimensions * (np.log(stretch) + 1 / stretch - 1)
    eigenvalues = covariance_eigenvalues(data)
    assert probabilistic_pca_log_likelihood(eigenvalues, latents)[1] == pytest.approx(expected, rel=1e-12)
    assert expected > score


def test_probabilistic_pca_by_hand():
    # One of two dimensions kept, eigenvalues 9 and 4: -1/2 (2 log 2 pi + log 9 + log 4 + 2) = -(log 2 pi + log 6 + 1).
    variance, log_likelihood = probabilistic_pca_log_likelihood(np.array([4.0, 9.0]), 1)
    assert variance == 4.0
    assert log_likelihood == pytest.approx(-(np.log(12 * np.pi) + 1), rel=1e-14)


# --- Shannon's rate-distortion function -------------------------------------------------------------------------------


def water_filling(eigenvalues: np.ndarray, distortion: float) -> float:
    level = optimize.brentq(lambda s: np.minimum(s, eigenvalues).sum() - distortion, 0, eigenvalues.max(), xtol=1e-15)
    return 0.5 * np.log(np.maximum(eigenvalues / level, 1)).sum()


@every_spectrum
def test_rate_distortion_is_water_filling(spectrum):
    for fraction in (1e-6, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99):
        rate = gaussian_rate_distortion(spectrum, fraction * spectrum.sum())
        assert rate == pytest.approx(water_filling(spectrum, fraction * spectrum.sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("distortion", "rate"),
    [
        (1.0, 2 * np.log(2)),  # level 1/2 under both 4 and 1: 1/2 (log 8 + log 2)
        (2.0, np.log(2)),  # level 1, just where the smaller is dropped: 1/2 log 4
        (3.0, 0.5 * np.log(2)),  # level 2 under 4 alone, 2 + 1
        (5.0, 0.0),  # all of the variance
        (7.0, 0.0),
    ],
)
def test_rate_distortion_by_hand(distortion, rate):
    assert gaussian_rate_distortion(np.array([1.0, 4.0]), distortion) == pytest.approx(rate, rel=1e-14)


def test_rate_distortion_of_a_source_without_variance_is_zero():
    assert gaussian_rate_distortion(np.zeros(3), 0.0) == 0.0


@every_spectrum
def test_rate_distortion_falls_and_is_convex_with_slope_one_over_twice_the_level(spectrum):
    distortions = np.linspace(0.02, 1.2, 60) * spectrum.sum()
    rates = np.array([gaussian_rate_distortion(spectrum, d) for d in distortions])
    below = distortions[1:] < spectrum.sum()
    assert np.all(np.diff(rates)[below] < 0)
    assert np.all(rates[distortions >= spectrum.sum()] == 0)
    assert np.all(np.diff(rates, 2) >= -1e-12)
    level = 0.6 * spectrum.min()  # under all D of them: distortion D s
    distortion, h = len(spectrum) * level, 1e-5 * level
    slope = (gaussian_rate_distortion(spectrum, distortion + h) - gaussian_rate_distortion(spectrum, distortion - h)) / (2 * h)
    assert slope == pytest.approx(-1 / (2 * level), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_rate_distortion_where_the_water_level_meets_an_eigenvalue(seed):
    """The kinks of the curve, and the distortion nearest below the variance: rounding may put the level on either side."""
    spectrum = np.random.default_rng(seed).exponential(size=8)
    for level in spectrum:
        expected = 0.5 * np.log(np.maximum(spectrum / level, 1)).sum()
        rate = gaussian_rate_distortion(spectrum, float(np.minimum(level, spectrum).sum()))
        assert rate == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert gaussian_rate_distortion(spectrum, float(np.nextafter(spectrum.sum(), 0))) == pytest.approx(0, abs=1e-12)


@every_spectrum
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_the_optima_over_beta_trace_the_rate_distortion_function(spectrum, floor):
    """With K = D; without a floor the objective has a minimum only for beta > 1."""
    l, dimensions = np.sort(spectrum)[::-1], len(spectrum)
    actives = []
    for beta in np.geomspace(0.05 if floor else 1.001, 20.0, 40):
        optimum = linear_optimum(spectrum, dimensions, float(beta), floor)
        squared_error = optimum.active * beta * optimum.variance + l[optimum.active :].sum()
        assert squared_error == pytest.approx(dimensions * (optimum.variance - floor), rel=1e-9)
        assert optimum.rate == pytest.approx(gaussian_rate_distortion(spectrum, squared_error), rel=1e-9, abs=1e-9)
        if optimum.active:
            assert optimum.rate == pytest.approx(water_filling(spectrum, squared_error), rel=1e-9, abs=1e-9)
        actives.append(optimum.active)
    assert actives == sorted(actives, reverse=True)
    assert actives[-1] == 0
    assert actives[0] >= dimensions - 1  # so the whole curve was walked


# --- Eigenvalues of data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [2, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_covariance_eigenvalues_are_those_of_numpy(examples, dtype):
    rng = np.random.default_rng(0)
    scales = np.array([[3.0, 1.0], [0.3, 0.1], [2.0, 0.01]])
    images = (rng.normal(size=(examples, 3, 2)) * scales + 10.0).astype(dtype)  # a mean that float32 sums would smear
    covariance = np.cov(images.reshape(examples, 6).astype(np.float64).T, bias=True)
    expected = np.linalg.eigvalsh(covariance)[::-1]
    eigenvalues = covariance_eigenvalues(images)
    assert eigenvalues.dtype == np.float64
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-10, atol=1e-13)
    assert np.all(eigenvalues >= 0)  # two examples leave five at zero, give or take rounding


# --- Errors -----------------------------------------------------------------------------------------------------------

GOOD = np.array([2.0, 1.0, 0.5])


def raises(sentence: str):
    return pytest.raises(UserError, match=sentence)


@pytest.mark.parametrize(
    "function",
    [
        lambda e: linear_optimum(e, 1, 1.0),
        lambda e: gaussian_rate_distortion(e, 0.5),
        lambda e: probabilistic_pca_log_likelihood(e, 1),
    ],
    ids=["linear_optimum", "gaussian_rate_distortion", "probabilistic_pca"],
)
@pytest.mark.parametrize(
    ("eigenvalues", "sentence"),
    [
        (np.zeros(0), r"non-empty vector, got shape \(0,\)"),
        (np.eye(2), r"non-empty vector, got shape \(2, 2\)"),
        (np.array([1.0, np.nan]), "must be finite"),
        (np.array([np.inf, 1.0]), "must be finite"),
        (np.array([1.0, -0.1]), "are >= 0, got -0.1"),
        (np.array([-1.0, -2.0]), "are >= 0, got -2"),
    ],
    ids=str,
)
def test_eigenvalues_are_those_of_a_covariance(unchecked, function, eigenvalues, sentence):
    with raises(sentence):
        function(eigenvalues)


def test_eigenvalues_may_be_below_zero_by_rounding():
    assert linear_optimum(np.array([1.0, 0.5, -1e-16]), 1, 1.0) == linear_optimum(np.array([1.0, 0.5, 0.0]), 1, 1.0)


@pytest.mark.parametrize("latents", [0, -1, 4])
def test_latent_size_lies_between_one_and_the_dimensions(latents):
    with raises(rf"latent_size must lie in 1 ... 3 .*got {latents}"):
        linear_optimum(GOOD, latents, 1.0)


@pytest.mark.parametrize("latents", [0, 3])
def test_probabilistic_pca_leaves_one_dimension_of_noise(latents):
    with raises(f"latent_size must lie in 1 ... 2, got {latents}"):
        probabilistic_pca_log_likelihood(GOOD, latents)


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_beta_is_positive(beta):
    with raises("beta must be a finite number > 0, got"):
        linear_optimum(GOOD, 1, beta)


@pytest.mark.parametrize("floor", [-1e-6, np.nan, np.inf])
def test_floor_is_not_negative(floor):
    with raises("floor must be a finite number >= 0, got"):
        linear_optimum(GOOD, 1, 1.0, floor)


def test_data_of_low_rank_need_a_floor():
    rank_two = np.array([2.0, 1.0, 0.0, 0.0])
    with raises(r"rank 2 <= latent_size and floor = 0: .*Give a floor"):
        linear_optimum(rank_two, 2, 1.0)
    assert linear_optimum(rank_two, 1, 1.0).variance == pytest.approx(1 / 3, rel=1e-14)  # fewer latents: T_1 / (4 - 1)
    assert linear_optimum(rank_two, 2, 1.0, 0.1).variance == pytest.approx(0.2, rel=1e-14)  # a floor: 4 * 0.1 / (4 - 2)
    with raises("rank <= 2: the likelihood is unbounded"):
        probabilistic_pca_log_likelihood(rank_two, 2)


@pytest.mark.parametrize("distortion", [0.0, -1.0, np.nan, np.inf])
def test_distortion_is_positive(distortion):
    with raises("distortion must be a finite number > 0"):
        gaussian_rate_distortion(GOOD, distortion)


def test_a_covariance_needs_two_examples():
    with raises("at least 2 examples, got 1"):
        covariance_eigenvalues(np.zeros((1, 3)))
