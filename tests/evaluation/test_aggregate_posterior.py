"""The parts of the rate where the aggregate posterior is Gaussian and all is known, and against float64 sums written out."""

import numpy as np
import pytest
from scipy import special, stats

from bsvae_jax.evaluation import aggregate_posterior as aggregate
from bsvae_jax.evaluation.aggregate_posterior import aggregate_posterior, rate_and_half_information, split_rate


def gaussian_posteriors(count, seed=0):
    """Posteriors N(m_i, S) whose means have exactly the covariance A: the aggregate posterior is about N(0, A + S)."""
    generator = np.random.default_rng(seed)
    covariance = np.array([[2.0, 0.9], [0.9, 0.7]])
    noise = np.array([0.3, 0.4])
    raw = generator.normal(size=(count, 2))
    raw -= raw.mean(axis=0)
    raw = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False, ddof=0))).T
    mean = raw @ np.linalg.cholesky(covariance).T
    z = mean + np.sqrt(noise) * generator.normal(size=(count, 2))
    log_variance = np.broadcast_to(np.log(noise), (count, 2))
    log_prior = stats.norm.logpdf(z).sum(axis=1)
    return z, mean, log_variance, log_prior, covariance + np.diag(noise), noise


def test_a_gaussian_aggregate_posterior():
    """Tolerance: four standard errors of 4,000 samples, and 0.01 nats for a mixture of 4,000 that is not quite Gaussian."""
    aggregate_queries = 4000
    z, mean, log_variance, log_prior, covariance, noise = gaussian_posteriors(aggregate_queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "QUERIES", aggregate_queries)
        found = split_rate(aggregate_posterior(z, mean, log_variance, log_prior, True))
    log_determinant = np.linalg.slogdet(covariance)[1]
    diagonal = np.diag(covariance)
    expected = {
        "mutual_information": 0.5 * (log_determinant - np.log(noise).sum()),
        "aggregate_kl": 0.5 * (diagonal.sum() - 2 - log_determinant),
        "total_correlation": 0.5 * (np.log(diagonal).sum() - log_determinant),
    }
    for name, value in expected.items():
        samples = getattr(found, name)
        assert value > 0.1
        assert abs(samples.mean() - value) < 4 * samples.std() / np.sqrt(len(samples)) + 0.01, name
    marginal = 0.5 * (diagonal - 1 - np.log(diagonal))
    error = 4 * found.dimension_kl.std(axis=0) / np.sqrt(len(z)) + 0.01
    assert np.all(np.abs(found.dimension_kl.mean(axis=0) - marginal) < error)


def test_every_density_is_the_mixture_written_out():
    """With posteriors of different widths, down to 1e-4, and a number of queries that does not fill its last chunk."""
    generator = np.random.default_rng(3)
    count, latents = 11, 3
    mean, z = generator.normal(size=(2, count, latents))
    log_variance = generator.uniform(-9, 1, (count, latents))
    z = mean + np.exp(log_variance / 2) * z
    log_prior = stats.norm.logpdf(z).sum(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "ENTRIES", 4 * count * latents)
        found = aggregate_posterior(z, mean, log_variance, log_prior, True)
    each = stats.norm.logpdf(z[:, None], mean, np.exp(log_variance / 2))  # [Q, N, L]
    np.testing.assert_allclose(found.log_posterior, each.sum(axis=2)[np.arange(count), np.arange(count)], rtol=1e-6)
    # The squares are of float32 differences of size 1 over widths of 0.01: a relative error of 1e-5.
    np.testing.assert_allclose(
        found.log_aggregate, special.logsumexp(each.sum(axis=2), axis=1) - np.log(count), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found.log_marginals, special.logsumexp(each, axis=1) - np.log(count), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_prior_marginals.sum(axis=1), log_prior, rtol=1e-12)


def test_the_parts_sum_to_the_rate():
    z, mean, log_variance, log_prior, *_ = gaussian_posteriors(300)
    densities = aggregate_posterior(z, mean, log_variance, log_prior, True)
    found = split_rate(densities)
    rate = densities.log_posterior - densities.log_prior
    np.testing.assert_allclose(found.mutual_information + found.aggregate_kl, rate, atol=1e-10)
    np.testing.assert_allclose(found.total_correlation + found.dimension_kl.sum(axis=1), found.aggregate_kl, atol=1e-10)


def test_posteriors_that_do_not_overlap_tell_which_image_it_was():
    mean = 100.0 * np.arange(50.0)[:, None]
    found = split_rate(aggregate_posterior(mean, mean, np.full((50, 1), -4.0), np.zeros(50), True))
    np.testing.assert_allclose(found.mutual_information, np.log(50), rtol=1e-6)


def test_information_that_rises_with_the_number_of_images_is_seen():
    """Posteriors apart: log N of N images. On one point: 0 of any number."""
    mean, wide = 100.0 * np.arange(50.0)[:, None], np.zeros((50, 1))
    whole, half = rate_and_half_information(mean, mean, np.full((50, 1), -4.0), np.zeros(50), True)
    assert whole.mutual_information.mean() - half == pytest.approx(np.log(2), rel=1e-5)
    whole, half = rate_and_half_information(wide, wide, wide, np.zeros(50), True)
    assert whole.mutual_information.mean() - half == pytest.approx(0.0, abs=1e-6)


def test_collapsed_posteriors_tell_nothing():
    z = np.random.default_rng(0).normal(size=(60, 4))
    found = split_rate(aggregate_posterior(z, np.zeros((60, 4)), np.zeros((60, 4)), stats.norm.logpdf(z).sum(axis=1), True))
    for part in found:
        np.testing.assert_allclose(part, 0.0, atol=1e-5)


def test_marginals_need_a_prior_that_factorizes():
    z, mean, log_variance, log_prior, *_ = gaussian_posteriors(20)
    found = split_rate(aggregate_posterior(z, mean, log_variance, log_prior, False))
    assert found.total_correlation is None
    assert found.dimension_kl is None
