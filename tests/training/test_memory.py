"""Accumulation, rematerialization and bfloat16: other ways of computing the same training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsvae_jax.config import MLP, Config, Optimizer, Residual
from bsvae_jax.data import load
from bsvae_jax.distributed.mesh import REPLICATED, SHARDED, data_mesh, parallelize, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.random import arranged
from bsvae_jax.training import state as building
from bsvae_jax.training import step as training
from bsvae_jax.training.fit import fit
from bsvae_jax.training.memory import check_memory, largest_batch
from bsvae_jax.training.program import Program

IMAGES = np.random.default_rng(0).random((16, 8, 8, 1)).astype(np.float32)
SMALL = Config(network=MLP((16,)), latent_size=3, batch_size=16, optimizer=Optimizer(gradient_clip=1e9))


def one_step(config, devices):
    """Gradient of the step, as Adam's first moment has it (0.1 of it), batch statistics and metrics."""
    mesh = data_mesh(devices)
    model = building.build_model(config, (8, 8, 1), axis_name="data")
    state = building.create_state(config, model, 100)
    step = parallelize(
        lambda state, x: training.train_step(state, x, jax.random.key(3), 0.5), mesh, (REPLICATED, SHARDED), REPLICATED
    )
    x = jnp.asarray(IMAGES[arranged(16, devices, config.gradient_accumulation)])
    after, metrics = jax.device_get(step(replicate(state, mesh), x))
    return after.optimizer_state[1][0].mu, after.batch_stats, metrics


def assert_close(found, expected, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.long
@pytest.mark.parametrize("variance", [Optimal("batch"), Optimal("pixel"), Learned(), Predicted(), Constant(0.3)])
@pytest.mark.parametrize(("parts", "devices"), [(4, 1), (2, 4)])
def test_accumulation_gives_the_gradients_of_the_whole_batch(variance, parts, devices):
    """Also where a variance is shared over the batch, which averages of the parts' gradients would get wrong."""
    config = dataclasses.replace(SMALL, decoder_variance=variance)
    gradient, _, metrics = one_step(config, 1)
    found, _, found_metrics = one_step(dataclasses.replace(config, gradient_accumulation=parts), devices)
    assert_close(found, gradient, 2e-6)
    assert_close(found_metrics, metrics, 1e-5)


@pytest.mark.long
def test_averaging_the_gradients_of_parts_would_be_seen():
    """The test above can fail: with a shared variance, the average over parts of gradients is another vector."""
    config = dataclasses.replace(SMALL, decoder_variance=Optimal("batch"))
    whole, *_ = one_step(config, 1)
    model = building.build_model(config, (8, 8, 1))
    state = building.create_state(config, model, 100)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(3), jnp.arange(16))

    def objective(params, part):
        terms = model.apply({"params": params}, jnp.asarray(IMAGES[part]), keys[part], train=True, method="elbo_terms")
        return jnp.mean(terms.distortion + 0.5 * terms.rate)

    parts = [jax.grad(objective)(state.params, slice(first, first + 4)) for first in range(0, 16, 4)]
    averaged = jax.tree.map(lambda *leaves: 0.1 * np.mean(leaves, axis=0), *parts)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), averaged, whole)
    assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_with_batch_norm_is_the_same_on_any_number_of_devices(devices):
    """A part holds the same examples wherever it is computed, so its batch statistics are the same."""
    config = dataclasses.replace(SMALL, network=Residual((4, 6)), gradient_accumulation=2)
    expected, found = one_step(config, 1), one_step(config, devices)
    assert_close(found[0], expected[0], 2e-4)
    assert_close(found[1], expected[1], 1e-5)


@pytest.mark.long
def test_rematerialization_changes_no_number():
    config = dataclasses.replace(SMALL, network=Residual((4, 6)))
    expected, found = one_step(config, 1), one_step(dataclasses.replace(config, rematerialize=True), 1)
    assert_close(found, expected, 1e-6)
    state = building.create_state(config, building.build_model(config, (8, 8, 1)), 10)
    again = building.create_state(config, building.build_model(dataclasses.replace(config, rematerialize=True), (8, 8, 1)), 10)
    assert_close(again.params, state.params, 0.0)


def kept_for_the_backward_pass(config):
    """Bytes that a gradient needs beside its arguments."""
    model = building.build_model(config, (32, 32, 1))
    state = building.create_state(config, model, 10)

    def step(state, x):
        return training.train_step(state, x, jax.random.key(0), 1.0)

    compiled = jax.jit(step).lower(state, jax.ShapeDtypeStruct((64, 32, 32, 1), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.long
def test_accumulation_saves_memory():
    config = dataclasses.replace(SMALL, network=Residual((8,)), batch_size=64)
    whole = kept_for_the_backward_pass(config)
    assert kept_for_the_backward_pass(dataclasses.replace(config, gradient_accumulation=8)) < 0.4 * whole


@pytest.mark.long
def test_bfloat16_trains_as_well_as_float32(tmp_path):
    """Matrix products with 8 bits of mantissa, everything summed in float32: within 2% of the objective after training."""
    config = Config(network=MLP((64, 32)), latent_size=8, epochs=15, batch_size=64, devices=1)
    results = {}
    for precision in ("float32", "bfloat16"):
        run = fit(dataclasses.replace(config, precision=precision), tmp_path / precision, progress=False)
        results[precision] = run.report["test"]["objective"].value
        assert {leaf.dtype for leaf in jax.tree.leaves(run.state.params)} == {jnp.dtype("float32")}
    assert results["bfloat16"] != results["float32"]
    # The digits' objective is about -25 nats of 64 pixels; the spread over seeds is about 0.5 nats.
    assert results["bfloat16"] == pytest.approx(results["float32"], abs=0.5)


@pytest.mark.long
def test_a_run_with_accumulation_is_resident_or_streamed_alike(tmp_path):
    config = Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=400, devices=4, gradient_accumulation=2)
    resident = fit(config, tmp_path / "resident", progress=False)
    streamed = fit(dataclasses.replace(config, resident_memory=0.0), tmp_path / "streamed", progress=False)
    alone = fit(dataclasses.replace(config, devices=1), tmp_path / "alone", progress=False)
    assert_close(streamed.state.params, resident.state.params, 0.0)
    assert_close(alone.state.params, resident.state.params, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation": 0}, "gradient_accumulation must be a whole number >= 1, got 0"),
        ({"gradient_accumulation": 3}, "batch_size 16 does not divide into 3 parts"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_parts_that_do_not_divide_over_the_devices_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"batch_size 20 does not divide over 4 devices in 2 parts \(gradient_accumulation\); 16 would"
    ):
        fit(dataclasses.replace(SMALL, batch_size=20, gradient_accumulation=2, devices=4), tmp_path, progress=False)


# --- Memory, known before it is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [lambda batch: 10_000 + 30 * batch, lambda batch: 10_000 + 90 * int(batch**0.8)])
@pytest.mark.parametrize(("room", "devices", "parts"), [(10_300, 1, 1), (11_000, 2, 2), (12_345, 1, 4), (10_000, 1, 1)])
def test_the_batch_that_is_named_fits_and_has_been_compiled(needed, room, devices, parts, monkeypatch):
    """Of a line it is the largest there is, found by counting; of a curve it fits."""
    tried = []

    def counted(self, members):
        tried.append(self.config.batch_size)
        return needed(self.config.batch_size)

    monkeypatch.setattr(Program, "needed_bytes", counted)
    config = dataclasses.replace(SMALL, batch_size=240, gradient_accumulation=parts)
    program = Program(config, load(config.data), data_mesh(devices))
    found = largest_batch(program, needed(240), room)
    fitting = [batch for batch in range(devices * parts, 240, devices * parts) if needed(batch) <= room]
    if not fitting:
        assert found is None
        return
    assert found in fitting
    assert found in tried
    if needed(200) == 10_000 + 30 * 200:
        assert found == max(fitting)
    assert len(tried) <= 4


@pytest.mark.long
def test_a_run_that_does_not_fit_is_refused_before_its_images_are_placed(tmp_path, monkeypatch):
    """By what the compiler counts; and the batch of the message trains in that memory."""
    images = load(SMALL.data)
    small, large = (
        Program(dataclasses.replace(SMALL, batch_size=size), images, data_mesh(1)).needed_bytes(1) for size in (300, 1200)
    )
    room = (small + large) // 2
    config = dataclasses.replace(SMALL, batch_size=1200, epochs=1, devices=1)
    monkeypatch.setattr("bsvae_jax.training.fit.available_bytes", lambda mesh: room)
    monkeypatch.setattr(Program, "splits", property(lambda self: pytest.fail("the images were placed")))
    with pytest.raises(UserError, match=r"Training on 1200 images a step takes .* A batch_size of \d+ fits") as refusal:
        fit(config, tmp_path / "run", progress=False)
    fits = int(str(refusal.value).split("batch_size of ")[1].split()[0])
    assert 600 < fits < 900  # 750 by the line
    assert not (tmp_path / "run").exists()  # which would hold the config that does not fit
    check_memory(Program(dataclasses.replace(config, batch_size=fits), images, data_mesh(1)), room)
