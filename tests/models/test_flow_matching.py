"""Flow matching between two Gaussians, where velocity, flow, loss and density are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64
from scipy import stats

from bsvae_jax.errors import UserError
from bsvae_jax.models.priors.flow_matching import divergence, flow_matching_loss, integrate, log_density

MEAN = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 0.25]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)
ROOT = VECTORS @ np.diag(np.sqrt(VALUES)) @ VECTORS.T


def exact_velocity(x, t):
    """`E[z - n | x_t]` for n ~ N(0, I), z ~ N(m, S): `m + (t S - (1 - t) I) C^-1 (x - t m)`, C = (1 - t)^2 I + t^2 S."""
    mean, vectors, values = (jnp.asarray(value, x.dtype) for value in (MEAN, VECTORS, VALUES))
    t = t[:, None]
    gain = (t * values[None] - (1.0 - t)) / (jnp.square(1.0 - t) + jnp.square(t) * values[None])
    centered = jnp.matmul(x - t * mean[None], vectors, precision="highest")
    return mean[None] + jnp.matmul(gain * centered, vectors.T, precision="highest")


def exact_flow(n):
    """Along an eigenvector x_t - t m grows like the standard deviation: n goes to m + S^1/2 n."""
    return MEAN + n @ ROOT


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(size=(50, 3))


@pytest.mark.parametrize("backwards", [False, True])
def test_the_exact_velocity_carries_one_gaussian_to_the_other(backwards, noise):
    """The error of 40, 80, ... steps falls by 2 to the power of 2, Heun's order: in float64, to within a tenth of the order."""
    start, end = (exact_flow(noise), noise) if backwards else (noise, exact_flow(noise))
    with float64():
        errors = []
        for steps in (40, 80, 160, 320):
            found = integrate(exact_velocity, jnp.asarray(start), steps, backwards)
            errors.append(float(np.sqrt(np.mean(np.square(np.asarray(found) - end)))))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(orders[-1], 2, atol=0.1)
    assert errors[-1] < 3e-4


def test_samples_have_the_mean_and_covariance_of_the_data():
    """40,000 samples: 5 standard errors of a mean and of a covariance of Gaussians."""
    count = 40_000
    start = jax.random.normal(jax.random.key(1), (count, 3))
    found = np.asarray(jax.jit(lambda n: integrate(exact_velocity, n, 50))(start), np.float64)
    deviation = np.sqrt(np.diag(COVARIANCE))
    assert np.all(np.abs(found.mean(axis=0) - MEAN) < 5 * deviation / np.sqrt(count))
    error = np.sqrt((np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE)) + COVARIANCE**2) / count)
    assert np.all(np.abs(np.cov(found.T) - COVARIANCE) < 5 * error + 1e-3)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 1.0])
def test_the_loss_of_the_exact_velocity_is_the_variance_that_is_left(time):
    """`tr(S + I - G C G)` with G = (t S - (1 - t) I) C^-1; 5 standard errors of 40,000 examples. Any other field has more."""
    count = 40_000
    generator = np.random.default_rng(2)
    n = generator.normal(size=(count, 3))
    z = MEAN + generator.normal(size=(count, 3)) @ ROOT
    n, z, t = jnp.asarray(n, jnp.float32), jnp.asarray(z, jnp.float32), jnp.full(count, time, jnp.float32)
    together = (1 - time) ** 2 + time**2 * VALUES
    expected = np.sum(VALUES + 1 - (time * VALUES - (1 - time)) ** 2 / together)
    losses = np.asarray(flow_matching_loss(exact_velocity, z, n, t), np.float64)
    assert losses.shape == (count,)
    assert abs(losses.mean() - expected) < 5 * losses.std() / np.sqrt(count)
    other = flow_matching_loss(lambda x, t: exact_velocity(x, t) + 0.5, z, n, t)
    excess = np.asarray(other, np.float64) - losses
    assert abs(excess.mean() - 3 * 0.25) < 5 * excess.std() / np.sqrt(count)


def test_the_loss_at_one_example_by_hand():
    """x_t = 0.25 (0, 4) + 0.75 (4, 0) = (3, 1); u = 2 x_t = (6, 2); z - n = (4, -4); 2^2 + 6^2."""
    z, n = jnp.array([[4.0, 0.0]]), jnp.array([[0.0, 4.0]])
    assert float(flow_matching_loss(lambda x, t: 2.0 * x, z, n, jnp.array([0.75]))[0]) == 40.0


def test_the_density_is_that_of_the_data(noise):
    """40 steps of Heun, float64: the steps leave an error of 1e-3 nats, a quarter of it with twice as many."""
    expected = stats.multivariate_normal(MEAN, COVARIANCE).logpdf(exact_flow(noise))
    with float64():
        z = jnp.asarray(exact_flow(noise))
        errors = [np.abs(np.asarray(log_density(exact_velocity, z, steps)) - expected).max() for steps in (80, 160)]
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.8)


def test_probes_estimate_the_divergence_without_bias():
    """A field whose derivative is a full matrix A: one probe has variance 2 sum of squares off the diagonal of (A + A^T)/2."""
    matrix = np.random.default_rng(3).normal(size=(4, 4))
    velocity = lambda x, t: jnp.matmul(x, jnp.asarray(matrix.T, jnp.float32), precision="highest")  # noqa: E731
    x, time, count = jnp.ones((2, 4)), jnp.zeros(2), 20_000
    value, exact = divergence(velocity, x, time)
    np.testing.assert_allclose(exact, np.full(2, np.trace(matrix)), rtol=1e-5)
    np.testing.assert_allclose(value, np.ones((2, 4)) @ matrix.T, rtol=1e-5)
    probes = jax.random.rademacher(jax.random.key(4), (count, 2, 4), jnp.float32)
    _, estimate = divergence(velocity, x, time, probes)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * (np.sum(symmetric**2) - np.sum(np.diag(symmetric) ** 2))
    np.testing.assert_allclose(estimate, exact, atol=5 * np.sqrt(variance / count))  # 5 standard errors


def test_probes_in_the_density():
    """In the eigenvectors' frame du/dx is diagonal, and a probe of signs is exact there: no tolerance but rounding."""
    diagonal = lambda x, t: x * jnp.log(jnp.array([[2.0, 0.5, 3.0]]))  # noqa: E731
    z = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)), jnp.float32)
    probes = jax.random.rademacher(jax.random.key(6), (2, 6, 3), jnp.float32)
    np.testing.assert_allclose(log_density(diagonal, z, 20, probes=probes), log_density(diagonal, z, 20), rtol=1e-5)


def test_refused(unchecked):
    for function in (integrate, log_density):
        with pytest.raises(UserError, match="steps must be"):
            function(lambda x, t: x, jnp.ones((1, 1)), 0)
