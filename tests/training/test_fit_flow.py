"""The velocity network against NumPy, the prior made of it against known densities, and its training as a second stage."""

import contextlib
import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bsvae_jax.cli import main
from bsvae_jax.config import Config, Digits, FlowMatching, Optimizer, Spatial, StandardNormal
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.distributed.preemption import Interrupted, Stop
from bsvae_jax.errors import UserError
from bsvae_jax.models.priors.transformer import Block, VelocityNetwork, time_features
from bsvae_jax.training import fit_flow
from bsvae_jax.training.checkpoints import Checkpoints
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.fit import fit
from bsvae_jax.training.fit_flow import fit_flow_matching, map_moments
from bsvae_jax.training.fit_prior import fit_prior
from bsvae_jax.training.fitted_prior import FittedPrior, fit_density, read_fitted
from bsvae_jax.training.restore import restore

SMALL = FlowMatching(rows=2, columns=1, width=16, depth=1, heads=2, steps=20)


def random_parameters(tree, scale=0.3, seed=7):
    """No gate that is zero hides what is behind it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), tree)


# --- The network ------------------------------------------------------------------------------------------------------


def numpy_norm(x):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)


@pytest.mark.long
def test_a_block_is_its_formula():
    block, rng = Block(width=8, heads=2), np.random.default_rng(0)
    x, condition = rng.normal(size=(3, 5, 8)), rng.normal(size=(3, 8))
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(condition, jnp.float32)
    variables = random_parameters(jax.eval_shape(block.init, jax.random.key(0), *arguments))
    p = jax.tree.map(np.float64, variables["params"])

    def dense(value, name):
        return value @ p[name]["kernel"] + p[name]["bias"]

    expected = np.empty_like(x)
    for example in range(3):
        modulation = dense(condition[example] / (1 + np.exp(-condition[example])), "modulation").reshape(6, 8)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = numpy_norm(x[example]) * (1 + scale1) + shift1
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            query, key, value = (dense(y, name)[:, head] for name in ("query", "key", "value"))
            weights = np.exp(query @ key.T / 2.0)
            heads.append(weights / weights.sum(axis=-1, keepdims=True) @ value)
        h = x[example] + gate1 * dense(np.concatenate(heads, axis=-1), "mixed")
        wide = dense(numpy_norm(h) * (1 + scale2) + shift2, "wide")
        gelu = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
        expected[example] = h + gate2 * dense(gelu, "narrow")
    np.testing.assert_allclose(block.apply(variables, *arguments), expected, atol=2e-5)


def test_time_features():
    found = time_features(jnp.array([0.0, 0.5]), 4)
    angles = np.array([0.5, 500.0])
    np.testing.assert_allclose(found, [[1, 1, 0, 0], [*np.cos(angles), *np.sin(angles)]], atol=1e-4)


@pytest.mark.long
def test_a_fresh_network_is_the_zero_field():
    network, x = VelocityNetwork(SMALL), jax.random.normal(jax.random.key(0), (3, 4))
    variables = network.init(jax.random.key(1), x, jnp.ones(3))
    np.testing.assert_array_equal(network.apply(variables, x, jnp.ones(3)), jnp.zeros((3, 4)))


# --- The prior --------------------------------------------------------------------------------------------------------


def prior_and_parameters(settings, latents, scale):
    module = settings.build(latents)
    made = module.init(jax.random.key(0), jnp.zeros((1, latents)), method="log_prob")["params"]
    return module, random_parameters(made, scale)


@pytest.mark.long
def test_without_a_velocity_it_is_a_gaussian_per_channel():
    module, params = prior_and_parameters(SMALL, 4, 0.0)
    params = {**params, "origin": jnp.array([1.0, -1.0]), "log_scale": jnp.log(jnp.array([2.0, 0.5]))}
    z = np.random.default_rng(1).normal(size=(6, 4))
    expected = stats.norm([1.0, -1.0, 1.0, -1.0], [2.0, 0.5, 2.0, 0.5]).logpdf(z).sum(axis=-1)
    found = module.apply({"params": params}, jnp.asarray(z, jnp.float32), method="log_prob")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    drawn = np.asarray(module.apply({"params": params}, jax.random.key(2), 20_000, method="sample"))
    # 5 standard errors of 20,000 samples.
    np.testing.assert_allclose(drawn.mean(axis=0), [1.0, -1.0, 1.0, -1.0], atol=5 * 2 / np.sqrt(20_000))
    np.testing.assert_allclose(drawn.std(axis=0), [2.0, 0.5, 2.0, 0.5], rtol=5 / np.sqrt(2 * 20_000))


@pytest.mark.long
def test_its_density_integrates_to_one():
    """Of one latent, over a grid: independent of how the density was derived."""
    settings = dataclasses.replace(SMALL, rows=1, steps=50)
    module, params = prior_and_parameters(settings, 1, 0.3)
    grid = np.linspace(-8.0, 8.0, 2001)
    params = {**params, "log_scale": jnp.zeros(1)}
    log_prob = module.apply({"params": params}, jnp.asarray(grid[:, None], jnp.float32), method="log_prob")
    assert np.trapezoid(np.exp(np.asarray(log_prob, np.float64)), grid) == pytest.approx(1.0, abs=2e-3)
    normal = stats.norm(float(params["origin"][0])).pdf(grid)
    assert np.max(np.abs(np.exp(np.asarray(log_prob)) - normal)) > 0.05  # it is not the Gaussian it starts from


@pytest.mark.long
def test_the_estimated_density_is_right_on_average_and_an_example_has_its_own_probes(monkeypatch):
    module, params = prior_and_parameters(SMALL, 4, 0.5)
    z = jax.random.normal(jax.random.key(3), (400, 4))
    apply = lambda z: module.apply({"params": params}, z, method="log_prob")  # noqa: E731
    exact = np.asarray(apply(z), np.float64)
    monkeypatch.setattr("bsvae_jax.models.priors.flow_prior.EXACT_LATENTS", 0)
    estimate = np.asarray(apply(z), np.float64)
    error = estimate - exact
    assert error.std() > 1e-3
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(z))  # 5 standard errors
    np.testing.assert_allclose(apply(z[::-1][:7]), estimate[::-1][:7], rtol=1e-4, atol=1e-4)  # whatever the batch


# --- Its training -----------------------------------------------------------------------------------------------------

GAUSSIAN = stats.multivariate_normal([3.0, -1.0], [[4.0, 3.0], [3.0, 4.0]])
TINY = FlowMatching(width=32, depth=1, heads=2, steps=20)


def run(folder, steps, latents=None, **identity):
    latents = GAUSSIAN.rvs(4000, random_state=0) if latents is None else latents
    return fit_flow_matching(TINY, latents, latents[:500], jax.random.key(5), steps, folder, identity, progress=False)


@pytest.mark.long
def test_it_learns_a_gaussian(tmp_path):
    found = run(tmp_path, 600)
    fitted = FittedPrior("flow_matching", TINY, found, 2, 0.0)
    fresh = GAUSSIAN.rvs(2000, random_state=1)
    gap = GAUSSIAN.logpdf(fresh) - fitted.log_prob(fresh)  # mean: KL(truth || fitted)
    independent = stats.norm([3.0, -1.0], 2.0).logpdf(fresh).sum(axis=1)
    assert (GAUSSIAN.logpdf(fresh) - independent).mean() > 0.3  # what a Gaussian without the correlation lacks
    assert -4 * gap.std() / np.sqrt(2000) < gap.mean() < 0.1
    drawn = np.asarray(fitted.sample(jax.random.key(6), 5000), np.float64)
    np.testing.assert_allclose(np.cov(drawn.T), GAUSSIAN.cov, rtol=0.15)
    np.testing.assert_allclose(drawn.mean(axis=0), GAUSSIAN.mean, atol=0.2)


@pytest.mark.long
def test_interrupted_and_continued_it_ends_the_same(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", 120)
    stop = Stop()

    @contextlib.contextmanager
    def signals():
        yield stop

    monkeypatch.setattr(fit_flow, "SAVE_EVERY", 50)
    with monkeypatch.context() as patch:
        patch.setattr(fit_flow, "stop_on_signals", signals)
        stop.number = signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped after step 50 of 120"):
            run(tmp_path / "cut", 120)
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: saved.append(step) or save(self, step, *rest))
    chex.assert_trees_all_equal(run(tmp_path / "cut", 120), whole)
    assert saved == [100, 120]
    fit_flow.finish_killed(tmp_path / "cut", {}, TINY, 121)
    assert (tmp_path / "cut" / fit_flow.FOLDER).exists()
    fit_flow.finish_killed(tmp_path / "whole", {}, TINY, 120)
    assert not (tmp_path / "whole" / fit_flow.FOLDER).exists()
    run(tmp_path / "cut", 120)  # finished: nothing is trained again
    assert saved == [100, 120]
    run(tmp_path / "cut", 120, checkpoint="of another model")
    assert saved == [100, 120, 50, 100, 120]


@pytest.mark.long
def test_any_number_of_devices_trains_the_same(tmp_path, monkeypatch):
    """A few steps: differences of rounding grow with them."""
    results = []
    for devices in (1, 8):
        monkeypatch.setattr(fit_flow, "data_mesh", lambda devices=devices: data_mesh(devices))
        results.append(run(tmp_path / str(devices), 5))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_moments_are_of_a_channel_over_positions():
    latents = np.random.default_rng(2).normal(size=(50, 2 * 3 * 4))
    mean, deviation = map_moments(latents, FlowMatching(rows=2, columns=3))
    maps = latents.reshape(50, 2, 3, 4)
    np.testing.assert_allclose(mean, maps.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(deviation, maps.std(axis=(0, 1, 2)))


@pytest.mark.slow
def test_the_two_stages(tmp_path, capsys, monkeypatch):
    """An autoencoder with a latent map, flow matching on it, then samples and an evaluation that take it like any prior."""
    config = Config(
        network=Spatial(widths=(8, 8, 8), blocks=1, groups=2),
        latent_size=8,
        optimizer=Optimizer(learning_rate=1e-2),
        beta=0.1,
        epochs=2,
        evaluate_every=2,
        batch_size=75,
        devices=1,
    )
    folder = tmp_path / "run"
    fit(config, folder, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("bsvae_jax.training.fit_prior.finish", lambda folder: None)  # a kill at the very end
        fitted = fit_prior(folder, "flow_matching", steps=100, width=32, depth=1)
    assert (folder / fit_flow.FOLDER).exists()
    assert fitted.prior == FlowMatching(rows=2, columns=2, width=32, depth=1)
    assert fitted.held_out > fitted.held_out_before
    assert read_fitted(folder).prior == fitted.prior
    assert fit_prior(folder, "flow_matching", steps=100, width=32, depth=1).held_out == fitted.held_out
    assert not (folder / fit_flow.FOLDER).exists()
    with pytest.raises(UserError, match="holds another prior"):
        fit_prior(folder, "flow_matching", steps=100, width=16, depth=1)
    with pytest.raises(UserError, match=r"holds another prior \(flow_matching of 100 steps"):
        fit_prior(folder, "flow_matching", steps=200, width=32, depth=1)
    restored = restore(folder, prior="fitted")
    assert restored.config.prior == StandardNormal()
    assert restored.model.apply(restored.variables, jax.random.key(0), 3, method="sample").shape == (3, 8, 8, 1)
    main.main(["evaluate", str(folder), "--prior", "fitted", "--split", "test", "--no-figures"])
    report = read_evaluation(folder).report["test"]
    assert report["fitted_rate"].value < report["rate"].value
    assert "flow_matching" in capsys.readouterr().out


# --- What is refused --------------------------------------------------------------------------------------------------


def test_refused(tmp_path):
    with pytest.raises(UserError, match="prior FlowMatching has no density that could be trained with the model"):
        Config(data=Digits(), prior=FlowMatching())
    with pytest.raises(UserError, match=r"prior.width must be a multiple of twice prior.heads \(8\), got 30"):
        FlowMatching(width=30)
    with pytest.raises(UserError, match="steps must be a whole number >= 1, got 0"):
        run(tmp_path, 0)
    with pytest.raises(UserError, match="3 latents do not divide into the 2 x 1 positions"):
        fit_flow_matching(SMALL, np.ones((5, 3)), np.ones((5, 3)), jax.random.key(0), 1, tmp_path, {}, False)
    with pytest.raises(UserError, match="flow_matching is trained on the latents of a run"):
        fit_density("flow_matching", np.ones((5, 3)), np.ones((5, 3)), jax.random.key(0))
