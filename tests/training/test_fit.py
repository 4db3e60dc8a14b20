"""Training end to end on small data: the linear optimum, exact resume, schedules, averages, and what stops a run."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsvae_jax import theory
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, MNIST, Arrays, Augmentation, Config, Digits, Linear, Optimizer, Residual, load_config
from bsvae_jax.data import load
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.errors import DivergenceError, UserError
from bsvae_jax.evaluation.evaluate import evaluate
from bsvae_jax.evaluation.metrics import as_json
from bsvae_jax.evaluation.scores import score_split
from bsvae_jax.objective import Constant, Learned, Optimal, quantization_variance
from bsvae_jax.training import state as building
from bsvae_jax.training.evaluated import read_calibration
from bsvae_jax.training.fit import fit
from bsvae_jax.training.per_image import read_per_image
from bsvae_jax.training.restore import restore
from bsvae_jax.training.state import build_model, build_optimizer, create_state, learning_rate_schedule, steps_per_dispatch
from bsvae_jax.training.step import train_step
from bsvae_jax.training.stopped import read_failure
from bsvae_jax.training.workdir import read_info

SMALL = Config(
    data=Digits(validation=None),
    network=MLP((16,)),
    latent_size=4,
    epochs=2,
    batch_size=500,
    devices=1,
    optimizer=Optimizer(ema_decay=0.9),
)  # 3 steps an epoch


def _rows(folder, drop=("images_per_second",)):
    return [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(folder)]


# --- The linear optimum -----------------------------------------------------------------------------------------------


def _linear_result(result, config):
    """Objective, variance and rate over the whole training set, from its scores and the closed form, in float64."""
    images, mesh = result.images, data_mesh(1)
    scores = score_split(
        result.state.model,
        result.state.variables(),
        DeviceImages(images.examples("train"), mesh),
        jax.random.key(9),
        batch_size=2000,
    )
    pixels, floor = scores.pixels, quantization_variance(images.bin_width)
    variance = scores.squared_error.sum() / (len(images.train) * pixels) + floor
    rate = scores.rate.mean()
    return pixels / 2 * (np.log(2 * np.pi * variance) + 1) + config.beta * rate, variance, rate


def _linear_theory(images, latent_size, beta):
    data = images.train.astype(np.float64) * images.bin_width
    eigenvalues = theory.covariance_eigenvalues(data)
    return eigenvalues, theory.linear_optimum(eigenvalues, latent_size, beta, quantization_variance(images.bin_width))


def _linear_config(beta, epochs):
    return Config(
        data=Digits(validation=None),
        network=Linear(),
        latent_size=4,
        decoder_variance=Optimal(over="batch"),
        beta=beta,
        optimizer=Optimizer(learning_rate=5e-2, weight_decay=0.0),
        epochs=epochs,
        batch_size=500,
        evaluate_every=epochs,
        devices=1,
    )


@pytest.mark.long
@pytest.mark.parametrize("beta", [pytest.param(0.3, marks=pytest.mark.slow), 1.0, 4.0])
def test_a_linear_model_lands_on_the_optimum(beta, tmp_path):
    config = _linear_config(beta, epochs=1000)
    result = fit(config, tmp_path / "run", progress=False)
    objective, variance, rate = _linear_result(result, config)
    _, optimum = _linear_theory(result.images, 4, beta)
    assert optimum.active == 4
    # 0.5 nats and 2 percent are the project's tolerance; one posterior sample per image leaves about 0.1 nats of noise.
    assert objective == pytest.approx(optimum.objective, abs=0.5)
    assert variance == pytest.approx(optimum.variance, rel=0.02)
    assert rate == pytest.approx(optimum.rate, rel=0.02)


@pytest.mark.long
def test_a_linear_model_collapses_beyond_the_critical_beta(tmp_path):
    images = load(Digits(validation=None))
    eigenvalues, _ = _linear_theory(images, 4, 1.0)
    config = _linear_config(1.2 * theory.critical_beta(eigenvalues, quantization_variance(images.bin_width)), epochs=500)
    result = fit(config, tmp_path / "run", progress=False)
    _, variance, rate = _linear_result(result, config)
    assert rate < 1e-3
    assert variance == pytest.approx(eigenvalues.mean() + quantization_variance(images.bin_width), rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0, 100.0])
def test_the_linear_mnist_config_lands_on_the_optimum(beta, tmp_path, mnist_folder):
    config = load_config(Path(__file__).parents[2] / "configs" / "linear_mnist.py")
    config = dataclasses.replace(config, beta=beta, data=MNIST(str(mnist_folder)), devices=1)
    result = fit(config, tmp_path / "run", progress=False)
    objective, variance, rate = _linear_result(result, config)
    _, optimum = _linear_theory(result.images, config.latent_size, beta)
    print(f"beta {beta:g}: measured {objective:.3f} {variance:.6f} {rate:.3f}; theory {optimum}")  # noqa: T201
    assert objective == pytest.approx(optimum.objective, abs=0.5)
    assert variance == pytest.approx(optimum.variance, rel=0.02)
    assert rate == pytest.approx(optimum.rate, rel=0.02, abs=1e-3)
    if optimum.active == 0:
        assert rate < 1e-3


@pytest.mark.long
def test_a_learned_variance_converges_to_the_batch_optimal_one(tmp_path):
    # In the same model, at the end of training, the trained number must be close to MSE + v0 of the training set.
    config = dataclasses.replace(
        SMALL, decoder_variance=Learned(), epochs=300, evaluate_every=300, optimizer=Optimizer(learning_rate=2e-2)
    )
    fit(config, tmp_path / "run", progress=False)
    calibration = read_calibration(tmp_path / "run")
    learned = float(np.exp(restore(tmp_path / "run").variables["params"]["log_variance"]))
    # 3 percent: the learning rate falls to 0, so the number trails the error's last decrease by about a percent.
    assert learned == pytest.approx(calibration.variance, rel=0.03)


@pytest.mark.long
def test_a_learned_variance_arrives_within_the_digits_own_schedule(tmp_path):
    # Twelve epochs of small batches, 1,200 steps at the digits' rate of 1e-3: at that rate it would end near exp(-0.6) = 0.55.
    config = dataclasses.replace(SMALL, decoder_variance=Learned(), epochs=12, evaluate_every=12, batch_size=15)
    config = dataclasses.replace(config, optimizer=Optimizer(learning_rate=1e-3, schedule="cosine"))
    fit(config, tmp_path / "run", progress=False)
    calibration = read_calibration(tmp_path / "run")
    learned = float(np.exp(restore(tmp_path / "run").variables["params"]["log_variance"]))
    assert learned == pytest.approx(calibration.variance, rel=0.3)


# --- One step ---------------------------------------------------------------------------------------------------------


def test_the_step_is_pure_and_repeats(key):
    model = build_model(SMALL, (8, 8, 1), 1 / 16)
    state = create_state(SMALL, model, 10)
    images = jax.random.uniform(key, (5, 8, 8, 1))
    step = jax.jit(train_step)
    one, two = step(state, images, key, 1.0), step(state, images, key, 1.0)
    chex.assert_trees_all_equal(one[0].arrays(), two[0].arrays())
    assert int(state.step) == 0


def test_the_update_is_adamw_of_the_gradient(key):
    """Against AdamW written out for its first step: moments debiased to g and g^2, decay decoupled."""
    config = dataclasses.replace(SMALL, optimizer=Optimizer(learning_rate=0.1, weight_decay=0.01, schedule="constant"))
    model = build_model(config, (8, 8, 1), 1 / 16)
    state = create_state(config, model, 10)
    images = jax.random.uniform(key, (5, 8, 8, 1))

    def loss(params):
        terms = model.apply({"params": params}, images, key, method="elbo_terms")
        return jnp.mean(terms.distortion + 3.0 * terms.rate)

    gradient = jax.jit(jax.grad(loss))(state.params)
    after, metrics = jax.jit(train_step)(state, images, key, 3.0)
    expected = jax.tree.map(
        lambda p, g: np.float64(p) - 0.1 * (np.float64(g) / (abs(np.float64(g)) + 1e-8) + 0.01 * np.float64(p)),
        state.params,
        gradient,
    )
    chex.assert_trees_all_close(after.params, expected, atol=1e-5)
    squares = sum(float(np.sum(np.square(np.float64(g)))) for g in jax.tree.leaves(gradient))
    assert float(metrics.gradient_norm) == pytest.approx(squares**0.5, rel=1e-5)
    assert float(metrics.objective) == pytest.approx(float(metrics.distortion + 3.0 * metrics.rate), rel=1e-5)


@pytest.mark.long
def test_a_variance_given_to_the_step_takes_the_place_of_the_models(key):
    images = jax.random.uniform(key, (5, 8, 8, 1))
    states = {
        variance: create_state(config, build_model(config, (8, 8, 1), 1 / 16), 10)
        for variance in (0.1, 0.5)
        for config in [dataclasses.replace(SMALL, decoder_variance=Constant(variance))]
    }
    step = jax.jit(train_step)
    expected, expected_metrics = step(states[0.1], images, key, 1.0)
    after, metrics = step(states[0.5], images, key, 1.0, jnp.float32(0.1))
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-6)
    chex.assert_trees_all_close(after.params, expected.params, atol=1e-6)
    assert float(metrics.variance) == pytest.approx(0.1)
    assert float(step(states[0.5], images, key, 1.0)[1].variance) == 0.5


def test_the_average_of_parameters_follows_its_recursion(key):
    model = build_model(SMALL, (8, 8, 1), 1 / 16)
    state = create_state(SMALL, model, 10)
    images = jax.random.uniform(key, (5, 8, 8, 1))
    step = jax.jit(train_step)
    average = np.asarray(state.params["encoder"]["posterior"]["kernel"], np.float64)
    for count in range(4):
        state, _ = step(state, images, key, 1.0)
        decay = min(0.9, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * np.asarray(state.params["encoder"]["posterior"]["kernel"], np.float64)
    np.testing.assert_allclose(state.ema_params["encoder"]["posterior"]["kernel"], average, atol=1e-6)


def test_paper_schedule_is_two_cosine_cycles():
    steps = 100
    schedule = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="cosine_restarts", cycles=2), steps)
    # torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0 = steps // 2 + 1), by its formula.
    expected = [1.0 + np.cos(np.pi * (step % 51) / 51) for step in range(steps)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(steps)], expected, atol=1e-6)


def test_other_schedules():
    cosine = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="cosine", warmup_steps=10), 110)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 1, 2, 1, 0], atol=1e-6)
    no_warmup = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="cosine"), 100)
    np.testing.assert_allclose([no_warmup(0), no_warmup(50), no_warmup(100)], [2, 1, 0], atol=1e-6)
    constant = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="constant", warmup_steps=4), 100)
    np.testing.assert_allclose([constant(0), constant(2), constant(4), constant(99)], [0, 1, 2, 2], atol=1e-6)


def test_clipping_bounds_the_gradient_that_adam_sees():
    clipped = build_optimizer(Optimizer(gradient_clip=1.0), 10)
    gradient = {"w": jnp.array([3.0, 4.0])}
    state = clipped.init(gradient)
    _, state = clipped.update(gradient, state, gradient)
    first_moment = optax.tree.get(state, "mu")["w"]
    np.testing.assert_allclose(first_moment, 0.1 * np.array([0.6, 0.8]), rtol=1e-6)  # (1 - b1) * g / |g|


def test_the_floor_comes_from_the_data_unless_given():
    assert Optimal().with_floor(1 / 16).floor == pytest.approx(1 / (12 * 256))
    assert Optimal(floor=0.5).with_floor(1 / 16).floor == 0.5
    assert Constant(0.1).with_floor(1 / 16) == Constant(0.1)


def test_steps_per_dispatch_is_one_only_for_convolutions_on_cpu():
    residual = dataclasses.replace(SMALL, network=Residual((4,)))
    assert (steps_per_dispatch(residual, "cpu"), steps_per_dispatch(residual, "gpu")) == (1, 50)
    assert (steps_per_dispatch(SMALL, "cpu"), steps_per_dispatch(SMALL, "tpu")) == (50, 50)
    assert steps_per_dispatch(dataclasses.replace(SMALL, steps_per_dispatch=7), "cpu") == 7


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_leaves_its_record(tmp_path):
    fit(SMALL, tmp_path / "run", progress=False)
    rows = read_metrics(tmp_path / "run")
    assert [(row["split"], row["step"], row["epoch"]) for row in rows] == [
        ("train", 3, 1),
        ("test", 3, 1),
        ("train", 6, 2),
        ("test", 6, 2),
    ]
    for row in rows:
        assert row["objective"] == pytest.approx(row["distortion"] + row["rate"], rel=1e-5)
    # Half a cosine from 1e-3 over 6 steps; a row says the rate of its last step.
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    np.testing.assert_allclose(rates, [5e-4 * (1 + np.cos(np.pi * step / 6)) for step in (2, 5)], rtol=1e-5)
    assert read_info(tmp_path / "run").config == SMALL
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    restored = restore(tmp_path / "run")
    assert (restored.step, restored.image_shape, restored.levels) == (6, (8, 8, 1), 17)
    assert restored.calibration is not None


@pytest.mark.long
def test_a_run_ends_with_its_evaluation(tmp_path):
    small = dataclasses.replace(SMALL, posterior_samples=1)  # as on the way
    result = fit(small, tmp_path / "run", progress=False)
    path = tmp_path / "run" / "evaluation.json"
    written = json.loads(path.read_text())
    assert (written["step"], written["checkpoint"]) == (6, "latest")
    assert written["splits"] == as_json(result.report)
    assert list(written["splits"]) == ["train", "test"]
    kept = read_per_image(tmp_path / "run", 6)
    assert kept.shape == (297,)
    assert kept.mean() == pytest.approx(result.report["test"]["calibrated_elbo"].value, rel=1e-12)
    assert read_per_image(tmp_path / "run", 3) is None
    # Against another pass over the data, by the parameters read back, on all eight devices.
    again = evaluate(restore(tmp_path / "run"), result.images).report
    for split, quantities in result.report.items():
        for name, quantity in quantities.items():
            assert quantity.value == pytest.approx(again[split][name].value, rel=1e-6), (split, name)
    last = read_metrics(tmp_path / "run")[-1]
    for name in ("objective", "distortion", "rate", "mse", "variance"):
        assert result.report["test"][name].value == pytest.approx(last[name], rel=1e-9)
    # A kill between the last checkpoint and the evaluation is made good.
    content = path.read_bytes()
    path.unlink()
    (tmp_path / "run" / "calibration.npz").unlink()
    fit(small, tmp_path / "run", progress=False)
    assert path.read_bytes() == content
    assert read_calibration(tmp_path / "run").variance == result.report["train"]["calibrated_variance"].value


@pytest.mark.long
def test_calibration_is_the_optimal_variance_of_the_training_set(tmp_path):
    result = fit(SMALL, tmp_path / "run", progress=False)
    run = restore(tmp_path / "run")
    x = result.images.train.astype(np.float64) / 16
    means = run.model.apply(run.variables, jnp.asarray(x, jnp.float32), jax.random.key(1)).decoded.mean
    # Other posterior samples than fit's: 96,000 pixels agree to well under 2 percent.
    squared_error = np.square(x - np.asarray(means, np.float64))
    assert run.calibration.variance == pytest.approx(squared_error.mean() + 1 / 3072, rel=0.02)
    assert run.calibration.variance == pytest.approx(run.calibration.variance_per_pixel.mean())
    assert run.calibration.floor == pytest.approx(1 / 3072)


class _Stop(Exception):
    pass


@pytest.mark.long
@pytest.mark.parametrize("network", [MLP((16,)), Residual((4,))], ids=["mlp", "residual"])
def test_an_interrupted_run_continues_to_the_same_numbers(network, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, network=network, epochs=3, augmentation=Augmentation(flip=True))
    whole = fit(config, tmp_path / "whole", progress=False).state

    from bsvae_jax.training.workdir import RunDirectory

    log, calls = RunDirectory.log, itertools.count()

    def stop_in_the_third_epoch(self, row):
        log(self, row)
        if next(calls) == 4:  # after the row of epoch 3, before its checkpoint
            raise _Stop

    monkeypatch.setattr(RunDirectory, "log", stop_in_the_third_epoch)
    with pytest.raises(_Stop):
        fit(config, tmp_path / "parts", progress=False)
    monkeypatch.undo()
    continued = fit(config, tmp_path / "parts", progress=False).state
    chex.assert_trees_all_equal(continued.arrays(), whole.arrays())
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


@pytest.mark.long
def test_a_finished_run_is_not_trained_again(tmp_path):
    first = fit(SMALL, tmp_path / "run", progress=False)
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "evaluation.json", "calibration.npz")]
    before = [path.read_bytes() for path in files]
    written = [path.stat().st_mtime_ns for path in files[1:]]
    second = fit(SMALL, tmp_path / "run", progress=False)
    chex.assert_trees_all_equal(first.state.arrays(), second.state.arrays())
    assert first.report == second.report
    assert before == [path.read_bytes() for path in files]
    assert written == [path.stat().st_mtime_ns for path in files[1:]]  # nor evaluated


@pytest.mark.long
def test_devices_and_dispatch_do_not_change_a_run(tmp_path):
    config = dataclasses.replace(SMALL, decoder_variance=Optimal("batch"), augmentation=Augmentation(flip=True))
    runs = {
        name: fit(dataclasses.replace(config, **change), tmp_path / name, progress=False).state
        for name, change in {"one": {}, "four": {"devices": 4}, "stepwise": {"steps_per_dispatch": 1}}.items()
    }
    for name in ("four", "stepwise"):
        # Adam amplifies rounding where a gradient is near 0; 6 steps of 1e-3 leave well under 1e-4.
        chex.assert_trees_all_close(runs[name].params, runs["one"].params, atol=1e-4)
        for ours, theirs in zip(_rows(tmp_path / name), _rows(tmp_path / "one"), strict=True):
            assert ours["objective"] == pytest.approx(theirs["objective"], rel=1e-4)


@pytest.mark.long
def test_evaluation_counts_the_last_partial_batch(tmp_path, key):
    """297 test images in batches of 64 on 4 devices, against one plain pass over all of them."""
    images = load(Digits(validation=None))
    model = build_model(SMALL, images.image_shape, images.bin_width)
    variables = {"params": create_state(SMALL, model, 1).params, "batch_stats": {}}
    mesh = data_mesh(4)
    scores = score_split(model, variables, DeviceImages(images.examples("test"), mesh), key, batch_size=64)
    x = jnp.asarray(images.test, jnp.float32) / 16
    output = model.apply(variables, x, key)
    squared = np.square(np.asarray(x, np.float64) - np.asarray(output.decoded.mean, np.float64))
    np.testing.assert_allclose(scores.squared_error[0], squared.sum(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(scores.pixel_squared_error, squared.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scores.rate[0], output.rate, rtol=1e-5)
    variance = squared.mean(axis=(1, 2, 3)) + 1 / 3072
    np.testing.assert_allclose(scores.model_distortion[0], 32 * (np.log(2 * np.pi * variance) + 1), rtol=1e-5)


@pytest.mark.long
def test_a_run_that_diverges_says_where_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The loss turns NaN in the second epoch; the first epoch's checkpoint must be named and still load."""
    schedule = learning_rate_schedule

    def explode(optimizer, steps):
        return optax.join_schedules([schedule(optimizer, steps), optax.constant_schedule(1e30)], [3])

    monkeypatch.setattr(building, "learning_rate_schedule", explode)
    # Optimizers are kept by their settings: neither may an earlier one be used here, nor this one later.
    monkeypatch.setattr(building, "_unit_optimizer", functools.cache(building._unit_optimizer.__wrapped__))
    config = dataclasses.replace(SMALL, epochs=3, optimizer=Optimizer())
    with pytest.raises(DivergenceError, match=r"Step 5 is not finite: objective .*, rate .*checkpoints/3\. A lower") as error:
        fit(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert restore(tmp_path / "run").step == 3
    assert all(np.isfinite(row["objective"]) for row in read_metrics(tmp_path / "run"))
    assert read_failure(tmp_path / "run") == str(error.value)
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["step"] == 5
    assert not (tmp_path / "run" / "evaluation.json").exists()
    # Without the explosion the same command goes on from the checkpoint, and the failure is forgotten.
    assert int(fit(config, tmp_path / "run", progress=False).state.step) == 9
    assert read_failure(tmp_path / "run") is None


@pytest.mark.long
def test_restore_gives_the_averaged_parameters_and_the_best_step(tmp_path, unchecked):
    result = fit(SMALL, tmp_path / "run", progress=False)
    run = restore(tmp_path / "run")
    chex.assert_trees_all_equal(run.variables["params"], jax.device_get(result.state.ema_params))
    assert restore(tmp_path / "run", "best").step in (3, 6)
    with pytest.raises(UserError, match="'latest' or 'best'"):
        restore(tmp_path / "run", "newest")


@pytest.mark.long
def test_best_is_the_least_held_out_objective(tmp_path):
    """30 training images, 400 epochs: the model overfits, so the end is not the best."""
    images = load(Digits(validation=None))
    np.savez(tmp_path / "few.npz", train=images.train[:30] * 15, test=images.test * 15)
    config = dataclasses.replace(
        SMALL, data=Arrays(str(tmp_path / "few.npz")), batch_size=30, epochs=400, evaluate_every=80, network=MLP((64,))
    )
    fit(config, tmp_path / "run", progress=False)
    objectives = {row["step"]: row["objective"] for row in read_metrics(tmp_path / "run") if row["split"] == "test"}
    best = min(objectives, key=objectives.get)
    assert best < 320, objectives
    assert restore(tmp_path / "run", "best").step == best
    assert restore(tmp_path / "run").step == 400


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog):
    whole = fit(SMALL, tmp_path / "run", progress=False).state
    newest = tmp_path / "run" / "checkpoints" / "6"
    for path in newest.rglob("*"):
        if path.is_file() and "default" in path.parts and path.stat().st_size > 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    continued = fit(SMALL, tmp_path / "run", progress=False).state
    assert "checkpoints/6 does not load" in caplog.text
    chex.assert_trees_all_close(continued.params, whole.params, atol=1e-6)
    assert restore(tmp_path / "run").step == 6  # saved anew, the damaged one kept aside
    assert (tmp_path / "run" / "damaged_checkpoints" / "6_0").is_dir()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 2000}, "batch_size 2000 exceeds the 1500 training images of digits"),
        ({"latent_size": 65}, "latent_size 65 exceeds the 64 pixels"),
        ({"devices": 8, "batch_size": 12}, "does not divide over 8 devices; 16 would"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        fit(dataclasses.replace(SMALL, **change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_another_config_or_a_foreign_folder_is_left_alone(tmp_path):
    fit(SMALL, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"another config \(beta: 1\.0 -> 2\.0\)"):
        fit(dataclasses.replace(SMALL, beta=2.0), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("...")
    with pytest.raises(UserError, match="not empty and not a run"):
        fit(SMALL, foreign, progress=False)
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]


def test_a_second_process_is_kept_out(tmp_path):
    from bsvae_jax.training.workdir import RunDirectory

    images = load(Digits(validation=None))
    with RunDirectory(tmp_path / "run", SMALL, images), pytest.raises(UserError, match="Another process is training"):
        RunDirectory(tmp_path / "run", SMALL, images)
    with RunDirectory(tmp_path / "run", SMALL, images):
        pass  # the lock goes with its holder


@pytest.mark.long
def test_other_data_under_the_same_config_are_refused(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((20, 4, 4), np.uint8))
    config = dataclasses.replace(SMALL, data=Arrays(str(path)), batch_size=9, latent_size=2)
    fit(config, tmp_path / "run", progress=False)
    np.save(path, np.zeros((20, 5, 5), np.uint8))
    with pytest.raises(UserError, match=r"was trained on images \(4, 4, 1\)"):
        fit(config, tmp_path / "run", progress=False)
    np.save(path, np.ones((20, 4, 4), np.uint8))
    with pytest.raises(UserError, match="was trained on other images of images: their content has changed"):
        fit(config, tmp_path / "run", progress=False)


@pytest.mark.long
def test_the_seed_of_a_run_does_not_choose_its_test_images(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8))
    config = dataclasses.replace(SMALL, data=Arrays(str(tmp_path / "images.npy")), batch_size=9, latent_size=2, epochs=1)
    runs = [fit(dataclasses.replace(config, seed=seed), tmp_path / str(seed), progress=False) for seed in (0, 1)]
    np.testing.assert_array_equal(runs[0].images.test, runs[1].images.test)
    weights = [np.asarray(run.state.params["encoder"]["posterior"]["kernel"]) for run in runs]
    assert np.abs(weights[0] - weights[1]).max() > 0.1


@pytest.mark.long
def test_a_torn_last_line_of_the_metrics_is_repaired(tmp_path):
    fit(SMALL, tmp_path / "run", progress=False)
    path = tmp_path / "run" / "metrics.jsonl"
    intact = path.read_bytes()
    path.write_bytes(intact + b'{"step": 9, "ob')
    assert len(read_metrics(tmp_path / "run")) == 4
    fit(SMALL, tmp_path / "run", progress=False)
    assert path.read_bytes() == intact
    assert json.loads(intact.splitlines()[-1])["split"] == "test"
