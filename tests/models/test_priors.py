"""The priors against scipy.stats, quadrature and, where they draw numbers, five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from bsvae_jax.models.priors import PriorModule, StandardNormal, gaussian_log_prob
from bsvae_jax.models.priors.prior import StandardNormalModule

MEAN = np.array([[0.0, 0.5, -2.0], [3.0, -0.1, 1.0]])
LOG_VARIANCE = np.array([[0.0, -3.0, 1.0], [-0.5, 0.2, -6.0]])
Z = np.array([[0.3, -1.0, 2.5], [4.0, 0.0, -7.0]])
MANY = 50_000


def f32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


class OneSample(PriorModule):
    """N(0, I) that does not know its KL divergence: the base class's Monte Carlo rate."""

    def log_prob(self, z):
        return jnp.sum(jax.scipy.stats.norm.logpdf(z), axis=-1)


def test_standard_normal_log_prob_is_scipys():
    value = StandardNormalModule(3).apply({}, *f32(Z), method="log_prob")
    np.testing.assert_allclose(value, stats.norm.logpdf(Z).sum(-1), rtol=1e-6)


def test_gaussian_log_prob_is_scipys():
    value = gaussian_log_prob(*f32(Z, MEAN, LOG_VARIANCE))
    np.testing.assert_allclose(value, stats.norm.logpdf(Z, MEAN, np.exp(LOG_VARIANCE / 2)).sum(-1), rtol=1e-6)


def quadrature_rate(mean: float, log_variance: float) -> float:
    """`KL(N(mean, exp(log_variance)) || N(0, 1))` by integrating its definition over +- 12 standard deviations."""
    q, p = stats.norm(mean, np.exp(log_variance / 2)), stats.norm()
    low, high = q.mean() - 12 * q.std(), q.mean() + 12 * q.std()
    value, error = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), low, high, points=[q.mean()])
    assert error < 1e-7
    return value


RATE = np.vectorize(quadrature_rate)(MEAN, LOG_VARIANCE).sum(-1)


def test_rate_of_the_standard_normal_is_the_integral_whatever_the_sample():
    for z in (Z, Z + 1.0):
        rate = StandardNormalModule(3).apply({}, *f32(MEAN, LOG_VARIANCE, z), method="rate")
        np.testing.assert_allclose(rate, RATE, rtol=1e-6)


def test_one_sample_rate_is_the_log_ratio_at_that_sample():
    q = stats.norm(MEAN, np.exp(LOG_VARIANCE / 2))
    rate = OneSample(3).apply({}, *f32(MEAN, LOG_VARIANCE, Z), method="rate")
    np.testing.assert_allclose(rate, (q.logpdf(Z) - stats.norm.logpdf(Z)).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("row", [0, 1])
def test_one_sample_rate_is_unbiased(row):
    noise = np.random.default_rng(row).normal(size=(MANY, 3))
    mean, log_variance = (np.broadcast_to(a[row], noise.shape) for a in (MEAN, LOG_VARIANCE))
    z = mean + np.exp(log_variance / 2) * noise
    rates = np.asarray(OneSample(3).apply({}, *f32(mean, log_variance, z), method="rate"), np.float64)
    standard_error = rates.std(ddof=1) / np.sqrt(MANY)
    assert 0 < standard_error < 0.02
    assert abs(rates.mean() - RATE[row]) < 5 * standard_error


@pytest.mark.parametrize("seed", [0, 1])
def test_standard_normal_samples(seed):
    z = np.asarray(StandardNormalModule(3).apply({}, jax.random.key(seed), MANY, method="sample"), np.float64)
    assert z.shape == (MANY, 3)
    # Standard errors for N independent standard normals: mean 1, variance sqrt(2), correlation 1, each over sqrt(N).
    tolerance = 5 / np.sqrt(MANY)
    assert np.max(np.abs(z.mean(0))) < tolerance
    covariance = np.cov(z.T)
    assert np.max(np.abs(np.diag(covariance) - 1)) < np.sqrt(2) * tolerance
    assert np.max(np.abs(covariance[np.triu_indices(3, 1)])) < tolerance
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-6  # five standard errors, two-sided, is 6e-7


def test_samples_follow_the_key():
    draw = [StandardNormalModule(3).apply({}, jax.random.key(seed), 4, method="sample") for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert np.all(draw[0] != draw[2])


def test_build_makes_the_module_of_the_config():
    prior = StandardNormal().build(5)
    assert type(prior) is StandardNormalModule
    assert prior.latent_size == 5


@pytest.mark.parametrize(("method", "arguments"), [("log_prob", f32(Z)), ("sample", (jax.random.key(0), 2))])
def test_the_base_class_leaves_the_density_to_its_subclasses(method, arguments):
    with pytest.raises(NotImplementedError):
        PriorModule(3).apply({}, *arguments, method=method)
