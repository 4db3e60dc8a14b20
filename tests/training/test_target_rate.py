"""Runs with a target rate or another schedule of beta: the beta of the theory, exact resume, devices, sweeps."""

import dataclasses
import signal

import chex
import jax
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax import theory
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Config, Digits, Linear, Optimizer
from bsvae_jax.data import load
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, data_mesh, parallelize, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.sweeps import report
from bsvae_jax.sweeps.results import families
from bsvae_jax.sweeps.table import as_csv, display_rows
from bsvae_jax.training.fit import fit
from bsvae_jax.training.restore import restore
from bsvae_jax.training.state import build_hyperparameters, build_model, create_state
from bsvae_jax.training.step import train_step

SMALL = Config(
    data=Digits(validation=None), network=MLP((8,)), latent_size=4, epochs=2, batch_size=500, devices=1
)  # 3 steps an epoch

pytestmark = pytest.mark.long


def test_without_a_checkpoint_of_the_target_there_is_no_best(tmp_path):
    """A target that a few steps do not come to; the latest is not passed off as the best."""
    config = dataclasses.replace(SMALL, beta_schedule=bv.TargetRate(1e-4), epochs=1)
    folder = fit(config, tmp_path / "run", progress=False).workdir
    assert rows(folder, "test")[-1]["rate"] > 1e-3
    with pytest.raises(UserError, match=r"has no best checkpoint: .* none has a rate that the schedule of beta asks for"):
        restore(folder, "best")
    assert restore(folder).step == 3


def rows(folder, split):
    return [row for row in read_metrics(folder) if (row["split"] == "train") == (split == "train")]


def test_the_multiplier_of_a_linear_model_is_the_beta_of_theory(tmp_path):
    """A rate is asked for and theory knows the beta of it: it has to be found, and the distortion that goes with it."""
    images, floor = load(bv.data.Digits(validation=None)), 1 / 3072
    optimum = theory.linear_optimum(images.covariance_eigenvalues, 4, 2.0, floor)
    config = Config(
        data=Digits(validation=None),
        network=Linear(),
        latent_size=4,
        decoder_variance=bv.Optimal("batch"),
        beta_schedule=bv.TargetRate(optimum.rate),
        optimizer=Optimizer(learning_rate=5e-2, weight_decay=0.0),
        epochs=600,
        batch_size=500,
        evaluate_every=600,
        devices=1,
    )
    report = fit(config, tmp_path / "run", progress=False).report["train"]
    # 3 and 1 percent: the last batches move the multiplier by 1 percent, and one posterior sample is drawn for each image.
    assert report["final_beta"].value == pytest.approx(2.0, rel=0.03)
    assert report["rate"].value == pytest.approx(optimum.rate, rel=0.01)
    assert report["distortion"].value == pytest.approx(optimum.distortion, abs=0.5)
    assert report["objective"].value == pytest.approx(
        report["distortion"].value + report["final_beta"].value * report["rate"].value
    )


class StopAfterOneEpoch(bv.Callback):
    def on_checkpoint(self, run, step):
        signal.raise_signal(signal.SIGTERM)


def test_an_interrupted_run_continues_to_the_same_multiplier(tmp_path):
    config = dataclasses.replace(SMALL, beta_schedule=bv.TargetRate(5.0, speed=0.5), beta=3.0)
    whole = fit(config, tmp_path / "whole", progress=False)
    with pytest.raises(bv.Interrupted):
        fit(config, tmp_path / "parts", progress=False, callbacks=[StopAfterOneEpoch()])
    parts = fit(config, tmp_path / "parts", progress=False)
    chex.assert_trees_all_equal(whole.state.arrays(), parts.state.arrays())
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    multiplier = float(whole.state.multiplier)
    assert multiplier != 1.0
    run = restore(tmp_path / "whole")
    assert run.beta == pytest.approx(3.0 * multiplier, rel=1e-6)
    final = whole.report["test"]["final_beta"].value
    assert final == run.beta == rows(tmp_path / "whole", "test")[-1]["beta"]
    assert bv.evaluate(run, whole.images, ("test",)).report["test"]["objective"].value == pytest.approx(
        whole.report["test"]["objective"].value, rel=1e-6
    )
    # The last checkpoint may be none of the best: its rate decides.
    with pytest.raises(bv.CallbackError, match="EarlyStopping follows the objective, whose beta a target rate of 5 nats"):
        fit(config, tmp_path / "early", progress=False, callbacks=[bv.EarlyStopping(3)])
    with pytest.raises(UserError, match=r"beta_schedule\.nats: 5\.0 -> 6\.0"):
        fit(dataclasses.replace(config, beta_schedule=bv.TargetRate(6.0, speed=0.5)), tmp_path / "whole", progress=False)


def test_rows_say_the_beta_of_their_steps(tmp_path):
    """Two epochs of three steps: 0, 1/4, 1/2 and 3/4, 1, 1 of 2; held-out rows have the beta at which the schedule arrives."""
    fit(dataclasses.replace(SMALL, beta_schedule=bv.LinearWarmup(4), beta=2.0), tmp_path / "run", progress=False)
    np.testing.assert_allclose([row["beta"] for row in rows(tmp_path / "run", "train")], [0.5, 2 * 2.75 / 3], rtol=1e-6)
    for row in rows(tmp_path / "run", "test"):
        assert row["beta"] == 2.0
        assert row["objective"] == pytest.approx(row["distortion"] + 2.0 * row["rate"])


def test_a_step_is_the_same_on_any_number_of_devices(key):
    """Rates are averaged over the devices before they are compared: shares of the batch lie on both sides of what is free."""
    images = jax.random.uniform(key, (8, 8, 8, 1)) * np.linspace(0.0, 3.0, 8, dtype=np.float32)[:, None, None, None]
    config = dataclasses.replace(SMALL, beta_schedule=bv.TargetRate(0.5), beta=2.0)
    model = build_model(config, (8, 8, 1), 1 / 16)
    single = create_state(config, model, 10)
    output = model.apply({"params": single.params}, images, key)
    per_latent = bv.kl_per_latent(*output.posterior)
    order = np.sort(np.asarray(per_latent.mean(0)))
    free = bv.FreeBits(float(order[1:3].mean()))  # two of the four latents are above, in the mean over the whole batch
    halves = np.asarray(per_latent).reshape(2, 4, 4).mean(1) > free.nats
    assert (halves[0] != halves[1]).any()
    numbers = build_hyperparameters(config)
    expected, metrics = train_step(single.replace(free_bits=free), images, key, *numbers)
    mesh = data_mesh(2)
    state = create_state(config, build_model(config, (8, 8, 1), 1 / 16, DATA_AXIS), 10).replace(free_bits=free)
    step = parallelize(train_step, mesh, (REPLICATED, SHARDED, *[REPLICATED] * 4), REPLICATED)
    after, own = step(replicate(state, mesh), images, key, *numbers)
    chex.assert_trees_all_close(own, metrics, rtol=1e-4)
    assert float(after.multiplier) == pytest.approx(float(expected.multiplier), rel=1e-6)
    assert float(after.multiplier) != 1.0


def test_members_of_a_sweep_are_the_runs_of_their_own(tmp_path):
    """Constant betas and two targets in one sweep: a target has one member, begun at the config's beta, however many betas."""
    targets = (bv.TargetRate(3.0, speed=0.5), bv.TargetRate(5.0, speed=0.5))
    grid = bv.Sweep((1.0, 4.0), (bv.Optimal(),), seeds=1, beta_schedule=(bv.ConstantBeta(), *targets))
    result = bv.fit_sweep(dataclasses.replace(SMALL, beta=2.0), grid, tmp_path / "sweep", progress=False)
    assert result.finished == [
        "optimal_beta1_seed0",
        "optimal_beta4_seed0",
        "optimal_target_rate-3-0.5_beta2_seed0",
        "optimal_target_rate-5-0.5_beta2_seed0",
    ]
    for name, target in zip(result.finished[2:], targets, strict=True):
        config = dataclasses.replace(SMALL, beta=2.0, beta_schedule=target)
        alone = fit(config, tmp_path / name, progress=False)
        member = restore(tmp_path / "sweep" / "members" / name)
        assert member.config == config
        assert member.multiplier == pytest.approx(float(alone.state.multiplier), rel=1e-5)
        chex.assert_trees_all_close(member.variables["params"], alone.state.params, atol=1e-5)
    results = bv.read_results(tmp_path / "sweep")
    one, other = families(results)
    assert one.betas.tolist() == [1.0, 4.0]
    found = sorted(restore(tmp_path / "sweep" / "members" / name).beta for name in result.finished[2:])
    np.testing.assert_allclose(other.betas, found, rtol=1e-3)
    assert other.label == "BS-VAE, optimal σ² per image, target rates"
    (sentence,) = report.differences(results)  # names the beta that training came to, not 2, where it began
    assert sum(f"target rates at β = {beta:g}" in sentence for beta in other.betas) == 1
    headings, cells = display_rows(results, "test")
    assert (headings[1], headings[4]) == ("β schedule", "β at the end")
    assert [row[1:3] for row in cells][1:] == [
        ["constant beta", "4"],
        ["target rate of 3 nats", "from 2"],
        ["target rate of 5 nats", "from 2"],
    ]
    assert as_csv(results).startswith(
        "split,decoder_variance,prior,beta_schedule,learning_rate,beta,seeds,diverged,final_beta_m"
    )
    assert "target rates" in bv.write_report(tmp_path / "sweep")[-1].read_text()
