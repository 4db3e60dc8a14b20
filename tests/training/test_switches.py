"""Switches of JAX that a user's environment may set: they change no run, or are recorded and spoken of."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64

import bsvae_jax as bv
from bsvae_jax import config as configs
from bsvae_jax._io.files import read_metrics
from bsvae_jax.data import augment
from bsvae_jax.data.shuffle import ShuffledOrder
from bsvae_jax.errors import DivergenceError
from bsvae_jax.evaluation.sampling import sample_prior
from bsvae_jax.models.priors.transformer import VelocityNetwork
from bsvae_jax.random import example_keys, make_key, normal_per_example, uniform_per_example
from bsvae_jax.training.checkpoints import Checkpoints, saved_steps
from bsvae_jax.training.fit_flow import _losses as flow_losses
from bsvae_jax.training.state import build_model, create_state
from bsvae_jax.training.stopped import read_failure

SMALL = bv.Config(
    data=bv.data.Digits(validation=None), network=configs.MLP((8,)), latent_size=2, epochs=2, batch_size=500, devices=1
)


def numbers_of(folder):
    """Every row of the metrics, and the arrays of the newest checkpoint."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        metadata = checkpoints._manager.metadata(checkpoints.steps()[-1]).custom_metadata
    return read_metrics(folder), metadata["sha256"], json.loads((folder / "evaluation.json").read_text())


def warnings_of(caplog):
    """What was warned of since the last look, but for how little the short runs have learned."""
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    found = [message for message in said if "posterior collapse" not in message]
    caplog.clear()
    return found


class _Stop(Exception):
    pass


def stopped_half_way(folder, monkeypatch):
    """A run of `SMALL` after its first epoch."""
    save = Checkpoints.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(_Stop):
            bv.fit(SMALL, folder, progress=False)
    assert saved_steps(folder / "checkpoints") == [3]


@pytest.mark.long
@pytest.mark.parametrize("first", [True, False])
def test_a_run_is_the_same_whatever_generator_is_the_default(first, tmp_path, monkeypatch, caplog):
    """Begun under `JAX_DEFAULT_PRNG_IMPL=rbg` and continued without, and the other way round."""
    bv.fit(SMALL, tmp_path / "whole", progress=False)
    begun, continued = (jax.default_prng_impl("rbg" if own else "threefry2x32") for own in (first, not first))
    with begun:
        stopped_half_way(tmp_path / "run", monkeypatch)
    with continued:
        bv.fit(SMALL, tmp_path / "run", progress=False)
        samples = sample_prior(bv.restore(tmp_path / "run"), 3)
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")
    np.testing.assert_array_equal(samples, sample_prior(bv.restore(tmp_path / "whole"), 3))
    assert not (tmp_path / "run" / "damaged_checkpoints").exists()
    assert not warnings_of(caplog)


@pytest.mark.long
def test_a_checkpoint_of_another_generator_is_not_damaged(tmp_path):
    """As earlier versions saved it under `JAX_DEFAULT_PRNG_IMPL=rbg`: a key of four numbers."""
    bv.fit(SMALL, tmp_path, progress=False)
    state = create_state(SMALL, build_model(SMALL, (8, 8, 1)), 6)
    arrays = state.arrays() | {"key": jax.random.key_data(jax.random.key(0, impl="rbg"))}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, arrays, None)
    for use in (lambda: bv.fit(SMALL, tmp_path, progress=False), lambda: bv.restore(tmp_path)):
        with pytest.raises(bv.UserError, match=r"its key is uint32 of shape \(4,\).*another JAX_DEFAULT_PRNG_IMPL.*sound"):
            use()
    assert saved_steps(tmp_path / "checkpoints")[-1] == 7


# --- JAX_ENABLE_X64 ---------------------------------------------------------------------------------------------------

IMAGE = (16, 16, 1)


def drawn_parameters(network, prior):
    model = build_model(dataclasses.replace(SMALL, network=network, prior=prior, latent_size=4), IMAGE)
    return jax.jit(model.init)(make_key(1), jnp.zeros((2, *IMAGE), jnp.float32), make_key(2))


def sampled(prior, network=SMALL.network):
    model = build_model(dataclasses.replace(SMALL, network=network, prior=prior, latent_size=4), IMAGE)
    return model.apply(drawn_parameters(network, prior), make_key(3), 50, method="sample_latents")


def augmented(**options):
    keys = jax.random.split(make_key(0), 20)
    images = np.random.default_rng(0).random((20, *IMAGE), np.float32)
    return augment(jnp.asarray(images), keys, configs.Augmentation(**options))


DRAWS = {
    "normal": lambda: normal_per_example(example_keys(make_key(0), jnp.arange(4)), (3,)),
    "uniform": lambda: uniform_per_example(example_keys(make_key(0), jnp.arange(4)), 0, (3,)),
    "order": lambda: ShuffledOrder(make_key(0), 1000, 10)(95, 10),
    "flip": lambda: augmented(flip=True),
    "rotation": lambda: augmented(rotation_degrees=10.0),
    "crop": lambda: augmented(crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25)),
    "linear": lambda: drawn_parameters(configs.Linear(), configs.StandardNormal()),
    "mlp": lambda: drawn_parameters(configs.MLP((8,)), configs.StandardNormal()),
    "residual": lambda: drawn_parameters(configs.Residual((4,)), configs.StandardNormal()),
    "mixture": lambda: drawn_parameters(configs.MLP((8,)), configs.Mixture(3)),
    "vamp": lambda: drawn_parameters(configs.MLP((8,)), configs.VampPrior(3)),
    "flow": lambda: drawn_parameters(configs.MLP((8,)), configs.Flow()),
    "samples": lambda: sampled(configs.StandardNormal()),
    "samples of a mixture": lambda: sampled(configs.Mixture(3)),
    "samples of a vamp": lambda: sampled(configs.VampPrior(3)),
    "samples of a flow": lambda: sampled(configs.Flow()),
    "flow matching": lambda: flow_matching_parts(),
}


def flow_matching_parts():
    """Initial parameters, times and noise of the training of a velocity, seen through its losses; and samples."""
    prior = configs.FlowMatching(width=16, depth=1, steps=2)
    network = VelocityNetwork(prior)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    params = network.init(make_key(0), z, jnp.zeros(6, jnp.float32))["params"]
    losses = flow_losses(network, params, z, example_keys(make_key(1), jnp.arange(6)))
    module = prior.build(4)
    variables = module.init(make_key(0), z, method="log_prob")
    return params, losses, module.apply(variables, make_key(2), 5, method="sample")


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_in_double_precision(name):
    expected = DRAWS[name]()
    with float64():
        found = DRAWS[name]()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, expected)
    if "linear" in name or name in ("mlp", "residual", "mixture", "vamp", "flow", "normal", "uniform"):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.long
def test_a_run_is_the_same_in_double_precision(tmp_path, caplog):
    bv.fit(SMALL, tmp_path / "single", progress=False)
    with float64():
        bv.fit(SMALL, tmp_path / "double", progress=False)
        samples = sample_prior(bv.restore(tmp_path / "double"), 20)
    for found, expected in zip(read_metrics(tmp_path / "double"), read_metrics(tmp_path / "single"), strict=True):
        assert (found.pop("split"), set(found)) == (expected.pop("split"), set(expected))
        assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(samples, sample_prior(bv.restore(tmp_path / "single"), 20), atol=1e-5)
    assert not warnings_of(caplog)
    bv.restore(tmp_path / "double")
    assert "JAX_ENABLE_X64 was True and is False" in warnings_of(caplog)[0]


# --- The others -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_continued_under_another_threefry_is_told(tmp_path, caplog):
    with jax.threefry_partitionable(False):
        bv.fit(SMALL, tmp_path, progress=False)
        assert not warnings_of(caplog)
    recorded = json.loads((tmp_path / "config.json").read_text())["switches"]
    assert recorded == {
        "jax_enable_x64": False,
        "jax_threefry_partitionable": False,
        "jax_default_matmul_precision": None,
        "jax_disable_jit": False,
    }
    for use in (lambda: bv.fit(SMALL, tmp_path, progress=False), lambda: bv.restore(tmp_path)):
        use()
        (warning,) = warnings_of(caplog)
        assert "began under other switches of JAX (JAX_THREEFRY_PARTITIONABLE was False and is True)" in warning


def test_a_run_that_recorded_no_switches_continues_without_a_word(tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("bsvae_jax.training.switches.SWITCHES", ())
        bv.fit(SMALL, tmp_path, progress=False)
    assert json.loads((tmp_path / "config.json").read_text())["switches"] == {}
    bv.fit(SMALL, tmp_path, progress=False)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("switch", [jax.debug_nans, jax.debug_infs])
def test_a_run_that_diverges_under_debug_nans_ends_as_any_other(switch, tmp_path):
    hot = dataclasses.replace(SMALL, optimizer=configs.Optimizer(learning_rate=1e30))
    messages = []
    for name, check in (("plain", contextlib.nullcontext()), ("checked", switch(True))):
        with check, pytest.raises(DivergenceError, match="Step 2 is not finite") as error:
            bv.fit(hot, tmp_path / name, progress=False)
        messages.append(str(error.value).replace(str(tmp_path / name), ""))
        assert read_failure(tmp_path / name) == str(error.value)
    assert messages[0] == messages[1]
    expected, found = (np.load(tmp_path / name / "failure.npz") for name in ("plain", "checked"))
    assert set(found) == set(expected)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_step_that_may_be_left_out_is_under_debug_nans(tmp_path):
    hot = dataclasses.replace(SMALL, epochs=1, optimizer=configs.Optimizer(learning_rate=1e30, skip_nonfinite=5))
    with jax.debug_nans(True), pytest.raises(DivergenceError, match="held-out objective after step 3"):
        bv.fit(hot, tmp_path, progress=False)
    assert sum(row.get("skipped_steps", 0) for row in read_metrics(tmp_path)) == 2
