"""Training with the parameters in the forms that a GPU keeps them in: the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsvae_jax.config import MLP, Config, Mixture, Optimizer
from bsvae_jax.data.image_set import Examples
from bsvae_jax.objective import Learned
from bsvae_jax.training import step
from bsvae_jax.training.packed import AS_GIVEN, Form, Packed, pack, unpack
from bsvae_jax.training.program import form_of_parameters
from bsvae_jax.training.state import build_hyperparameters, build_model, create_state

OPTIMIZER = Optimizer(weight_decay=0.1, gradient_clip=1.0, ema_decay=0.9, skip_nonfinite=1)
CONFIG = Config(
    network=MLP((5,)), latent_size=2, batch_size=4, prior=Mixture(2), decoder_variance=Learned(), optimizer=OPTIMIZER
)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)


def trained(config, form):
    state = create_state(config, build_model(config, (4, 4, 1)), 9)
    arguments = (Examples(jnp.asarray(IMAGES)), jnp.arange(12).reshape(3, 4), jnp.int32(2), build_hyperparameters(config))
    run = lambda state: step.run_steps(state, *arguments, augmentation=config.augmentation, form=form)  # noqa: E731
    return state, jax.jit(run)(state)


@pytest.mark.long
def test_steps_give_the_same_numbers_in_the_same_tree():
    """Decay that spares the prior, clipping, averages and the rate of the log-variance included; rounding alone differs."""
    before, (expected, expected_metrics) = trained(CONFIG, AS_GIVEN)
    _, (found, metrics) = trained(CONFIG, Form(packed=True))
    assert jax.tree.structure(found) == jax.tree.structure(before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, expected_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.arrays(), expected.arrays())


def test_parameters_moments_and_averages_are_packed_and_come_back():
    state = create_state(CONFIG, build_model(CONFIG, (4, 4, 1)), 9)
    packed = pack(state, state.params)
    (adam,) = [part for part in jax.tree.leaves(packed.optimizer_state, is_leaf=is_adam) if is_adam(part)]
    for tree in (packed.params, packed.ema_params, adam.mu, adam.nu):
        assert isinstance(tree["encoder"], Packed)
        assert all(leaf.ndim != 1 for leaf in tree["encoder"].others)
    jax.tree.map(np.testing.assert_array_equal, unpack(packed).arrays(), state.arrays())


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@dataclasses.dataclass(frozen=True)
class Own(Optimizer):
    """An optimizer that may not treat all numbers alike."""


@dataclasses.dataclass(frozen=True)
class OwnNetwork(MLP):
    """A network that may use its kernels in float32 as well."""


def test_only_what_is_known_not_to_mind_is_packed_or_rounded_and_on_gpus_alone():
    half = dataclasses.replace(CONFIG, precision="bfloat16")
    assert form_of_parameters(CONFIG, "gpu") == Form(True, None)
    assert form_of_parameters(half, "gpu") == Form(True, jnp.bfloat16)
    assert form_of_parameters(half, "cpu") == form_of_parameters(half, "tpu") == AS_GIVEN
    assert form_of_parameters(dataclasses.replace(half, optimizer=Own()), "gpu") == Form(False, jnp.bfloat16)
    assert form_of_parameters(dataclasses.replace(half, network=OwnNetwork()), "gpu") == Form(True, None)


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_that_are_kept_rounded_give_the_same_numbers(packed):
    """And are rounded once a step: what is trained are the parameters, in float32."""
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    before, (expected, expected_metrics) = trained(config, AS_GIVEN)
    _, (found, metrics) = trained(config, Form(packed, jnp.bfloat16))
    assert jax.tree.structure(found) == jax.tree.structure(before)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, expected_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.arrays(), expected.arrays())
