"""The importance-weighted bound against the exact likelihood of linear models, and against float64 sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from bsvae_jax import data
from bsvae_jax.config import MLP, Config, Digits, Linear, Optimizer
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation import importance_weighted as likelihood
from bsvae_jax.evaluation.importance_weighted import Density, importance_weighted
from bsvae_jax.models.vae import build_vae
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.random import example_keys
from bsvae_jax.training.fit import fit
from bsvae_jax.training.restore import restore

FROZEN = Density(frozen=True, dequantized=False)
OWN = Density(frozen=False, dequantized=False)
LEVELS = 17


# --- Linear models, whose likelihood is known -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear model of 8 latents, trained until its posteriors are nearly the true ones, which are then widened by a fifth."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    config = Config(
        data=Digits(), network=Linear(), latent_size=8, decoder_variance=Optimal("batch"), epochs=60, evaluate_every=60,
        optimizer=Optimizer(learning_rate=1e-2), devices=1,
    )  # fmt: skip
    fit(config, folder, progress=False)
    run = restore(folder)
    widened = run.variables["params"]["encoder"]["log_variance"] + 2 * np.log(1.2) / np.sqrt(64)  # in units of sqrt(D)
    run.variables["params"]["encoder"]["log_variance"] = widened
    return run


def exact(run, images, variance):
    """`log N(x; b, W W^T + v I)` per image, and the true posteriors' means and covariance, from SciPy and linear algebra."""
    x = images.reshape(len(images), -1).astype(np.float64) / (LEVELS - 1)
    latents = run.config.latent_size
    decoded = run.model.apply(run.variables, jnp.concatenate([jnp.zeros((1, latents)), jnp.eye(latents)]), method="decode").mean
    decoded = np.asarray(decoded, np.float64).reshape(latents + 1, -1)
    offset, weights = decoded[0], (decoded[1:] - decoded[0]).T  # [D], [D, L]
    covariance = weights @ weights.T + variance * np.eye(len(offset))
    precision = np.eye(latents) + weights.T @ weights / variance
    means = (x - offset) @ weights @ np.linalg.inv(precision) / variance
    return stats.multivariate_normal.logpdf(x, offset, covariance), means, np.linalg.inv(precision)


def bound(run, images, samples, densities=(FROZEN,), variance=0.02, key=1, devices=1, **options):
    mesh = data_mesh(devices)
    variables = replicate(run.variables, mesh)
    placed = DeviceImages(Examples(images, levels=LEVELS), mesh)
    arguments = (run.model, variables, placed, jax.random.key(key), densities, variance, samples)
    return importance_weighted(*arguments, **options)


@pytest.mark.long
def test_the_bound_rises_to_the_exact_log_likelihood(linear):
    images = data.load(linear.config.data).test[:100]
    variance = linear.calibration.variance
    log_likelihood, *_ = exact(linear, images, variance)
    found = bound(linear, images, 5000, variance=variance)
    gaps = log_likelihood.mean() - found.curve[0, np.array([1, 3, 10, 100, 1000, 5000]) - 1]
    assert gaps[0] > 0.1, "posteriors that are exact would leave nothing to see"
    assert gaps[0] > gaps[1] > gaps[2] > -0.02
    # 0.1 is what the bound must reach at K = 5,000; over 100 images its noise at K = 100 is about 0.02.
    assert np.all(np.abs(gaps[3:]) < 0.05)
    # Image by image as well: weights of finite variance, whose relative error falls with the square root of K.
    np.testing.assert_allclose(found.log_likelihood[0], log_likelihood, atol=0.5)
    assert found.curve[0, -1] == pytest.approx(found.log_likelihood[0].mean(), abs=1e-4)


def test_the_gap_of_the_elbo_is_the_divergence_from_the_true_posterior(linear):
    images = data.load(linear.config.data).train
    variance = linear.calibration.variance
    log_likelihood, means, covariance = exact(linear, images, variance)
    x = jnp.asarray(images, jnp.float32) / (LEVELS - 1)
    own, log_variance = (np.asarray(part, np.float64) for part in linear.model.apply(linear.variables, x, method="encode"))
    precision = np.linalg.inv(covariance)
    difference = own - means
    # KL of two Gaussians, the first with a diagonal covariance.
    divergence = 0.5 * (
        np.exp(log_variance) @ np.diag(precision)
        + np.einsum("nl,lm,nm->n", difference, precision, difference)
        - own.shape[1]
        + np.linalg.slogdet(covariance)[1]
        - log_variance.sum(axis=1)
    )
    gap = log_likelihood - bound(linear, images, 1, variance=variance).log_likelihood[0]
    # One sample per image: the mean is known within its standard error, of which four are allowed.
    assert divergence.mean() > 0.05
    assert abs(gap.mean() - divergence.mean()) < 4 * gap.std() / np.sqrt(len(gap))


def test_one_sample_is_the_elbo_and_dequantization_costs_what_it_should(linear):
    """`E_u log N(x + u; mean, v) = log N(x; mean, v) - D v0 / (2 v)`: the two bounds differ by that on average at K = 1."""
    images = data.load(linear.config.data).train
    variance = linear.calibration.variance
    found = bound(linear, images, 1, (FROZEN, Density(frozen=True, dequantized=True)), variance)
    difference = found.log_likelihood[0] - found.log_likelihood[1]
    expected = 64 * linear.floor / (2 * variance)
    assert abs(difference.mean() - expected) < 4 * difference.std() / np.sqrt(len(difference))


# --- Any model, against sums written out ------------------------------------------------------------------------------


def small(decoder_variance):
    """An MLP whose weights are far from zero."""
    model = build_vae(MLP(hidden=(8,)), 2, (4, 4, 1), decoder_variance)
    images = np.random.default_rng(0).integers(0, LEVELS, (5, 4, 4, 1), dtype=np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jax.random.key(1))
    generator = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * generator.normal(size=leaf.shape).astype(np.float32), variables)
    return model, variables, images


def written_out(model, variables, images, samples, key, variance, dequantized):
    """`log 1/K sum exp(log weight)` in float64, sample by sample; the same random numbers by their documented keys."""
    x = images.astype(np.float64) / (LEVELS - 1)
    mean, log_variance = (
        np.asarray(part, np.float64) for part in model.apply(variables, jnp.asarray(x, jnp.float32), method="encode")
    )
    keys = example_keys(key, jnp.arange(len(x)))
    if dequantized:
        noise = jnp.stack([jax.random.uniform(jax.random.fold_in(k, 0), x.shape[1:], minval=-0.5, maxval=0.5) for k in keys])
        x = x + np.asarray(noise, np.float64) / (LEVELS - 1)
    weights = []
    for number in range(samples):
        noise = np.stack([np.asarray(jax.random.normal(jax.random.fold_in(k, number + 1), mean.shape[1:])) for k in keys])
        z = mean + np.exp(log_variance / 2) * noise
        decoded = model.apply(variables, jnp.asarray(z, jnp.float32), method="decode")
        own = np.exp(np.asarray(decoded.log_variance, np.float64)) if variance is None else variance
        log_x = stats.norm.logpdf(x, np.asarray(decoded.mean, np.float64), np.sqrt(own)).sum(axis=(1, 2, 3))
        log_z = stats.norm.logpdf(z).sum(axis=1) - stats.norm.logpdf(z, mean, np.exp(log_variance / 2)).sum(axis=1)
        weights.append(log_x + log_z)
    weights = np.stack(weights)
    effective = np.exp(2 * special.logsumexp(weights, axis=0) - special.logsumexp(2 * weights, axis=0))
    return special.logsumexp(weights, axis=0) - np.log(samples), effective


def run_small(model, variables, images, densities, samples, variance=0.3, devices=1, **options):
    mesh = data_mesh(devices)
    placed = DeviceImages(Examples(images, levels=LEVELS), mesh)
    arguments = (model, replicate(variables, mesh), placed, jax.random.key(3), densities, variance, samples)
    return importance_weighted(*arguments, **options)


@pytest.mark.long
@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize(
    ("decoder_variance", "density_variance"),
    [(Optimal(), 0.3), (Constant(0.2), 0.2), (Learned(), None), (Predicted(), None)],
)
def test_the_sum_over_samples(decoder_variance, density_variance, dequantized):
    model, variables, images = small(decoder_variance)
    density = Density(frozen=isinstance(decoder_variance, Optimal), dequantized=dequantized)
    found = run_small(model, variables, images, [density], 7)
    expected, effective = written_out(model, variables, images, 7, jax.random.key(3), density_variance, dequantized)
    # float32 values of size 100
    np.testing.assert_allclose(found.log_likelihood[0], expected, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(found.effective_samples[0], effective, rtol=2e-3)
    curve = [
        written_out(model, variables, images, k, jax.random.key(3), density_variance, dequantized)[0].mean() for k in (1, 4)
    ]
    np.testing.assert_allclose(found.curve[0, [0, 3]], curve, rtol=1e-5, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("samples", [1, 5, 64, 65])
def test_chunks_batches_and_devices_change_nothing(samples, monkeypatch):
    model, variables, images = small(Constant(0.2))
    expected = run_small(model, variables, images, [FROZEN, OWN], samples)
    assert expected.curve.shape == (2, samples)
    monkeypatch.setattr(likelihood, "CHUNK", 4)
    monkeypatch.setattr(likelihood, "DECODED_AT_ONCE", 8)
    for devices in (1, 2, 8):
        found = run_small(model, variables, images, [FROZEN, OWN], samples, devices=devices)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_an_interrupted_bound_continues(monkeypatch):
    model, variables, images = small(Constant(0.2))
    monkeypatch.setattr(likelihood, "DECODED_AT_ONCE", 4)
    kept, told = [], []
    expected = run_small(model, variables, images, [FROZEN], 3, keep=kept.append, keep_every=-1.0, progress=told.append)
    assert [state.done for state in kept] == [1, 2, 3, 4, 5]
    assert sum(told) == 5
    for state in kept:
        again = run_small(model, variables, images, [FROZEN], 3, partial=state)
        for one, other in zip(again, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_first_images_only():
    model, variables, images = small(Constant(0.2))
    whole = run_small(model, variables, images, [FROZEN], 3)
    part = run_small(model, variables, images, [FROZEN], 3, count=2)
    np.testing.assert_allclose(part.log_likelihood, whole.log_likelihood[:, :2], rtol=1e-6)


@pytest.mark.parametrize("samples", [0, -1, 5001])
def test_a_number_of_samples_out_of_range_is_refused(samples):
    with pytest.raises(UserError, match=r"1 \.\.\. 5,000"):
        run_small(*small(Constant(0.2)), [FROZEN], samples)


def test_an_optimal_variance_is_no_density():
    with pytest.raises(UserError, match="not a density"):
        run_small(*small(Optimal()), [OWN], 2)
