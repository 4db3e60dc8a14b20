"""Residuals, SSIM and nearest images against NumPy, SciPy and scikit-image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bsvae_jax.config import MLP
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.evaluation import nearest_neighbors, residuals
from bsvae_jax.evaluation.diagnostic_figures import linear, spherical
from bsvae_jax.evaluation.nearest_neighbors import nearest_images
from bsvae_jax.evaluation.residuals import (
    image_statistics,
    residual_coverage,
    residual_quantiles,
    structural_similarity,
)
from bsvae_jax.evaluation.scores import Calibration, score_split
from bsvae_jax.models.vae import build_vae
from bsvae_jax.random import example_keys

LEVELS = 17


def two_images(shape):
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(3, *shape)).astype(np.float32)
    deviation = np.array([0.05, 0.2, 0.0]).reshape(3, 1, 1, 1)
    return x, np.clip(x + deviation * generator.normal(size=x.shape), 0, 1).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(28, 28, 1), (64, 48, 3)])
def test_ssim_is_that_of_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    x, mean = two_images(shape)
    options = dict(data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected = [
        metrics.structural_similarity(*pair, **options) for pair in zip(x.astype(float), mean.astype(float), strict=True)
    ]
    np.testing.assert_allclose(structural_similarity(jnp.asarray(x), jnp.asarray(mean)), expected, atol=2e-4)


def test_ssim_of_images_smaller_than_the_window():
    """Wang et al. (2004), eq. 13, written out for the four windows of 7 x 7 in an image of 8 x 8."""
    assert residuals.window(8, 8) == 7
    x, mean = two_images((8, 8, 1))
    weights = np.outer(*[stats.norm.pdf(np.arange(-3, 4), scale=1.5)] * 2)
    weights /= weights.sum()

    def similarity(a, b):
        (m, n), c1, c2 = (np.sum(weights * a), np.sum(weights * b)), 0.01**2, 0.03**2
        variances = [np.sum(weights * (one - center) ** 2) for one, center in ((a, m), (b, n))]
        covariance = np.sum(weights * (a - m) * (b - n))
        return (2 * m * n + c1) * (2 * covariance + c2) / ((m**2 + n**2 + c1) * (sum(variances) + c2))

    corners = [(i, j) for i in range(2) for j in range(2)]
    expected = [
        np.mean([similarity(a[i : i + 7, j : j + 7, 0], b[i : i + 7, j : j + 7, 0]) for i, j in corners])
        for a, b in zip(x.astype(float), mean.astype(float), strict=True)
    ]
    np.testing.assert_allclose(structural_similarity(jnp.asarray(x), jnp.asarray(mean)), expected, atol=2e-4)


@pytest.fixture(scope="module")
def passed():
    """One pass over 21 images, on one device and on eight, with a batch size that divides nothing."""
    model = build_vae(MLP(hidden=(8,)), 3, (4, 4, 1))
    images = np.random.default_rng(0).integers(0, LEVELS, (21, 4, 4, 1), dtype=np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jax.random.key(1))
    calibration = Calibration(0, 0.04, np.linspace(0.02, 0.09, 16).reshape(4, 4, 1), 1 / (12 * 16**2))
    results = []
    for devices in (1, 8):
        mesh = data_mesh(devices)
        stored, placed = DeviceImages(Examples(images, levels=LEVELS), mesh), replicate(variables, mesh)
        options = dict(batch_size=8)
        results.append(
            (
                image_statistics(model, placed, stored, jax.random.key(5), calibration, **options),
                score_split(model, placed, stored, jax.random.key(5), **options),
            )
        )
    return model, variables, images, calibration, results


@pytest.mark.long
def test_the_second_pass_sees_the_same_posterior_samples(passed):
    model, variables, images, _, [(found, scores), (on_eight, _)] = passed
    np.testing.assert_array_equal(found.posterior_mean, scores.posterior_mean)
    decoded = model.apply(variables, jnp.asarray(found.z, jnp.float32), method="decode").mean
    squared = np.square(images / 16.0 - np.asarray(decoded, np.float64)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(squared, scores.squared_error[0], rtol=1e-5)
    np.testing.assert_allclose(found.log_prior, stats.norm.logpdf(found.z).sum(axis=1), rtol=1e-5)
    for name in ("ssim", "z", "posterior_mean", "posterior_log_variance", "log_prior"):
        np.testing.assert_allclose(getattr(found, name), getattr(on_eight, name), rtol=1e-4, atol=1e-5, err_msg=name)


def test_residuals_are_counted(passed):
    """Histograms in NumPy, from the model's means and the noise by its documented key."""
    model, variables, images, calibration, [(found, _), (on_eight, _)] = passed
    decoded = model.apply(variables, jnp.asarray(found.z, jnp.float32), method="decode").mean
    keys = example_keys(jax.random.key(5), jnp.arange(21))
    noise = [jax.random.uniform(jax.random.fold_in(key, 1), (4, 4, 1), minval=-0.5, maxval=0.5) for key in keys]
    squared = np.square(images / 16.0 - np.asarray(decoded)).mean(axis=(1, 2, 3), keepdims=True) + calibration.floor
    residual = images / 16.0 + np.stack(noise) / 16 - np.asarray(decoded)
    edges = np.linspace(-residuals.LIMIT, residuals.LIMIT, residuals.BINS + 1)
    for row, variance in enumerate((calibration.variance, calibration.variance_per_pixel, squared)):
        expected, _ = np.histogram(np.clip(residual / np.sqrt(variance), -7.999, 7.999), edges)
        assert found.residuals[row].sum() == on_eight.residuals[row].sum() == 21 * 16
        # A residual within rounding of an edge may fall to either side.
        assert np.abs(found.residuals[row] - expected).sum() <= 4
        assert np.abs(found.residuals[row] - on_eight.residuals[row]).sum() <= 4


def test_quantiles_and_coverage_of_a_normal_sample():
    """From the bin probabilities of N(0, 1): within the width of a bin, 1/32, and far less where bins are linear."""
    edges = np.linspace(-residuals.LIMIT, residuals.LIMIT, residuals.BINS + 1)
    counts = np.diff(stats.norm.cdf(edges)) * 1e9
    probabilities = np.array([0.001, 0.1, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(residual_quantiles(counts, probabilities), stats.norm.ppf(probabilities), atol=2e-3)
    widths = np.array([0.5, 1.0, 1.96, 3.0])
    np.testing.assert_allclose(residual_coverage(counts, widths), 2 * stats.norm.cdf(widths) - 1, atol=1e-4)


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_nearest_images_are_the_nearest(chunk_bytes, monkeypatch):
    monkeypatch.setattr(nearest_neighbors, "CHUNK_BYTES", chunk_bytes)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (30, 5, 4, 3), dtype=np.uint8)
    queries = generator.uniform(size=(7, 5, 4, 3)).astype(np.float32)
    queries[2] = images[17] / 255.0
    found = nearest_images(queries, images, 256)
    distances = np.sqrt(np.square(queries[:, None] - images[None] / 255.0).mean(axis=(2, 3, 4)))
    assert found.positions.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.distance, distances.min(axis=1), rtol=1e-5, atol=1e-6)
    assert found.distance[2] < 1e-6


def test_spherical_interpolation_turns_at_a_constant_rate():
    one, other = np.array([2.0, 0.0, 0.0]), np.array([0.0, 4.0, 0.0])
    path = spherical(one, other, np.array([0.0, 1 / 3, 0.5, 1.0]))
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), [2.0, 2 + 2 / 3, 3.0, 4.0])
    np.testing.assert_allclose(np.degrees(np.arctan2(path[:, 1], path[:, 0])), [0, 30, 45, 90], atol=1e-9)
    np.testing.assert_allclose(path[[0, -1]], [one, other], atol=1e-12)
    assert np.isfinite(spherical(one, -one, np.linspace(0, 1, 5))).all()
    np.testing.assert_allclose(linear(one, other, np.array([0.25])), [[1.5, 1.0, 0.0]])
