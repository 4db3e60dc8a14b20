"""float32 products are full, or rounded where a config asks for it: read from the programs that compilers are given."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bsvae_jax.config import MLP, Config, Residual, Spatial
from bsvae_jax.models import Network
from bsvae_jax.models.priors import Flow
from bsvae_jax.training import build_model, create_state, train_step

X = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
LATENTS = 64
KEY = jax.eval_shape(lambda: jax.random.key(0))


class OwnEncoder(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        hidden = nn.Conv(4, (3, 3))(x).reshape(len(x), -1)
        return nn.Dense(LATENTS)(hidden), nn.Dense(LATENTS)(hidden)


class OwnDecoder(nn.Module):
    @nn.compact
    def __call__(self, z, train=False):
        return nn.Dense(64)(z).reshape(-1, 8, 8, 1)


@dataclass(frozen=True)
class Own(Network):
    """Its layers are Flax's, which say nothing of precision."""

    def build(self, latent_size, data_shape, outputs, axis_name, dtype, rematerialize):
        return OwnEncoder(), OwnDecoder()


def precisions(function, *arguments, platform="cpu"):
    """Of the factors of all products of a program."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in program.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)\b", line)]
    assert products
    return {name for line in products for name in re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line) or ["DEFAULT"]}


def of_a_step(precision, network, rematerialize, platform, said):
    config = Config(network=network, latent_size=LATENTS, precision=precision, rematerialize=rematerialize)
    model = build_model(config, X.shape[1:])
    with jax.default_matmul_precision(said):
        state = jax.eval_shape(lambda: create_state(config, model, 10))
        return precisions(train_step, state, X, KEY, 1.0, platform=platform)


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param((Residual((4,)), False, "cpu"), marks=pytest.mark.long),
        pytest.param((Residual((4,)), True, "cuda"), marks=pytest.mark.long),
        pytest.param((Spatial((4,), blocks=1, groups=2), False, "tpu"), marks=pytest.mark.long),
        (Own(), False, "cuda"),
    ],
)
def test_products_of_a_step_are_rounded_where_the_config_asks_for_it_alone(setup):
    """Whatever JAX's own setting says, and in one process one after the other."""
    assert of_a_step("float32", *setup, None) == {"HIGHEST"}
    assert of_a_step("tensorfloat32", *setup, "bfloat16") == {"HIGH"}
    assert of_a_step("float32", *setup, "tensorfloat32") == {"HIGHEST"}


def test_products_of_a_prior_are_full_in_every_precision():
    config = Config(network=MLP((8,)), latent_size=4, prior=Flow(), precision="tensorfloat32")
    model = build_model(config, X.shape[1:])
    variables = jax.eval_shape(lambda: create_state(config, model, 10).variables())
    z = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert precisions(lambda *given: model.apply(*given, method="log_prior"), variables, z) == {"HIGHEST"}
    assert precisions(lambda *given: model.apply(*given, method="decode"), variables, z) == {"HIGH"}


def test_tensorfloat32_on_a_cpu_is_float32():
    """A CPU rounds nothing, so that the numbers are those of float32; parameters and activations are of that type."""
    x, key, means = jax.random.uniform(jax.random.key(1), X.shape), jax.random.key(2), []
    for precision in ("float32", "tensorfloat32"):
        config = Config(network=MLP((8,)), latent_size=4, precision=precision)
        model = build_model(config, X.shape[1:])
        output = jax.jit(model.apply)(create_state(config, model, 10).variables(), x, key)
        assert output.decoded.mean.dtype == output.posterior.mean.dtype == jnp.float32
        means.append(output.decoded.mean)
    assert jnp.allclose(*means, rtol=1e-6, atol=1e-6)
