"""One pass over a split: posterior samples by their documented keys, whatever the batches and devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsvae_jax.config import MLP, Mixture, StandardNormal
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.evaluation.scores import Calibration, samples_of_each, score_split
from bsvae_jax.models.vae import build_vae
from bsvae_jax.objective import DecoderVariance, Learned, Optimal, mean_over_devices
from bsvae_jax.random import example_keys

SHAPE, LEVELS, COUNT, SAMPLES, FLOOR = (3, 2, 1), 17, 21, 3, 1 / 3072
CALIBRATION = Calibration(0, 0.05, np.linspace(0.01, 0.1, 6).reshape(SHAPE), FLOOR)


@pytest.mark.parametrize(
    ("prior", "variance"),
    [(StandardNormal(), Optimal("batch", FLOOR)), pytest.param(Mixture(2), Learned(0.3, FLOOR), marks=pytest.mark.long)],
    ids=["normal", "mixture"],
)
def test_posterior_samples_are_those_of_their_keys(prior, variance):
    """Sample s of image n of N takes key s N + n, on one device and on four, in batches that divide nothing."""
    model, key = build_vae(MLP((3,)), 2, SHAPE, variance, prior), jax.random.key(5)
    stored = np.random.default_rng(0).integers(0, LEVELS, (COUNT, *SHAPE), dtype=np.uint8)
    x = stored / 16.0
    images = jnp.asarray(x, jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images, jax.random.key(1))
    apply, expected = jax.jit(model.apply), []
    for sample in range(SAMPLES):
        output = apply(variables, images, example_keys(key, sample * COUNT + jnp.arange(COUNT)))
        expected.append((np.square(x - np.asarray(output.decoded.mean, np.float64)), np.asarray(output.rate)))
    squared, rate = (np.stack(values) for values in zip(*expected, strict=True))
    errors = squared.sum(axis=(2, 3, 4))
    shared = errors.mean() / 6 + FLOOR if isinstance(variance, Optimal) else 0.3
    for devices in (1, 4):
        mesh = data_mesh(devices)
        arguments = model, replicate(variables, mesh), DeviceImages(Examples(stored, levels=LEVELS), mesh), key
        options = dict(batch_size=8)
        scores = score_split(*arguments, **options, samples=SAMPLES, calibration=CALIBRATION)
        np.testing.assert_allclose(scores.squared_error, errors, rtol=1e-5)
        np.testing.assert_allclose(scores.rate, rate, rtol=1e-5)
        np.testing.assert_allclose(scores.pixel_squared_error, squared.mean(axis=(0, 1)), rtol=1e-5)
        scaled = (squared / CALIBRATION.variance_per_pixel).sum(axis=(2, 3, 4))
        np.testing.assert_allclose(scores.scaled_error, scaled, rtol=1e-5)
        # One variance for all images and samples.
        own = 3 * np.log(2 * np.pi * shared) + (errors + 6 * FLOOR) / (2 * shared)
        np.testing.assert_allclose(scores.model_distortion, own, rtol=1e-5)
        np.testing.assert_allclose(scores.posterior_mean, output.posterior.mean, rtol=1e-4, atol=1e-6)
        one = score_split(*arguments, **options)
        for name in ("squared_error", "rate", "posterior_mean"):
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(scores, name)[0])  # to the bit
        np.testing.assert_allclose(one.latent_rate, scores.latent_rate, rtol=1e-6)


@dataclass(frozen=True)
class OverBatch(DecoderVariance):
    """Shared over the batch in evaluation too: it has no `split_distortion`."""

    def distortion(self, residual_squared, log_variance, axis_name):
        variance = mean_over_devices(jnp.mean(residual_squared), axis_name) + 1e-3
        return variance, 0.5 * jnp.sum(jnp.log(2 * jnp.pi * variance) + residual_squared / variance, axis=(1, 2, 3))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_last_batch_is_filled_up_with_examples_of_the_split(devices):
    """21 examples in batches of 8: a variance of the last batch is that of its 5 and the first 3, not of copies of one."""
    model, key, mesh = build_vae(MLP((3,)), 2, SHAPE, OverBatch()), jax.random.key(5), data_mesh(devices)
    stored = np.random.default_rng(0).integers(0, LEVELS, (COUNT, *SHAPE), dtype=np.uint8)
    stored[-1] = LEVELS - 1  # unlike the others
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)), jax.random.key(1))
    scores = score_split(
        model, replicate(variables, mesh), DeviceImages(Examples(stored, levels=LEVELS), mesh), key, batch_size=8
    )
    errors = scores.squared_error[0]
    variance = np.mean([*errors[16:], *errors[:3]]) / 6 + 1e-3
    expected = 3 * np.log(2 * np.pi * variance) + errors[16:] / (2 * variance)
    np.testing.assert_allclose(scores.model_distortion[0, 16:], expected, rtol=1e-5)


def test_small_splits_have_more_samples():
    assert [samples_of_each(None, images) for images in (1, 625, 626, 5_000, 9_999, 10_000, 60_000)] == [16, 16, 16, 2, 2, 1, 1]
    assert samples_of_each(5, 60_000) == samples_of_each(5, 10) == 5
