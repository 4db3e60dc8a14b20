"""Conditional models: encoder and decoder against float64 NumPy, what the class may change, and labels that do not fit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bsvae_jax as bv
from bsvae_jax import theory
from bsvae_jax.config import MLP, Config, Digits, Linear, Residual, Spatial, VampPrior
from bsvae_jax.data import load
from bsvae_jax.errors import UserError
from bsvae_jax.models.layers import add_class
from bsvae_jax.models.vae import build_vae
from bsvae_jax.training.state import check_against_data

SHAPE, LATENT, CLASSES = (4, 4, 2), 4, 5
X = jnp.asarray(np.random.default_rng(0).uniform(size=(6, *SHAPE)), jnp.float32)
LABELS = jnp.array([3, 0, 0, 2, 3, 3])
KEY = jax.random.key(0)
NETWORKS = {
    "mlp": MLP((5, 6)),
    "linear": pytest.param(Linear(), marks=pytest.mark.long),
    "residual": pytest.param(Residual((3,)), marks=pytest.mark.long),
    "spatial": pytest.param(Spatial((2,), blocks=1, groups=1, attention=False), marks=pytest.mark.long),
}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def vae(network, classes=CLASSES, latents=LATENT):
    """A model and variables of which none is zero."""
    latents = 32 if isinstance(network, Spatial) else latents
    model = build_vae(network, latents, SHAPE, bv.Constant(0.3), classes=classes)
    shapes, rng = jax.eval_shape(model.init, KEY, X, KEY), np.random.default_rng(1)

    def fill(path, leaf):
        size = 0.3 if leaf.ndim < 2 else 0.8 / np.sqrt(np.prod(leaf.shape[:-1]))
        values = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key in ("scale", "var") else size * rng.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(fill, shapes)


def embeddings(tree):
    """The vectors of the classes, of encoder and decoder."""
    return [tree["params"][part]["class_embedding"]["embedding"] for part in ("encoder", "decoder")]


def f64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_a_conditional_mlp_is_its_formula():
    model, variables = vae(MLP((5, 6)))
    e, d = (f64(variables["params"][part]) for part in ("encoder", "decoder"))
    x, y, z = f64(X).reshape(6, -1), np.asarray(LABELS), np.random.default_rng(2).normal(size=(6, LATENT))

    def forward(p, inputs, last):
        hidden = inputs @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"] + p["class_embedding"]["embedding"][y]
        hidden = hidden / (1 + np.exp(-hidden))
        hidden = hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
        return hidden / (1 + np.exp(-hidden)) @ p[last]["kernel"] + p[last]["bias"]

    apply = jax.jit(model.apply, static_argnames="method")
    posterior = np.concatenate(apply(variables, X, labels=LABELS, method="encode"), axis=1)
    np.testing.assert_allclose(posterior, forward(e, x, "posterior"), atol=2e-6)  # float32, sums of 32 terms below 1
    decoded = apply(variables, jnp.asarray(z, jnp.float32), labels=LABELS, method="decode").mean
    np.testing.assert_allclose(decoded.reshape(6, -1), forward(d, z, "mean"), atol=2e-6)


def test_a_conditional_linear_model_is_its_formula():
    model, variables = vae(Linear())
    e, d = (f64(variables["params"][part]) for part in ("encoder", "decoder"))
    frame = next(part["frame"] for part in (e, d) if "frame" in part)
    x, y, z = f64(X).reshape(6, -1), np.asarray(LABELS), np.random.default_rng(2).normal(size=(6, LATENT))
    scale = np.exp(frame["log_scale"])
    apply = jax.jit(model.apply, static_argnames="method")
    posterior = apply(variables, X, labels=LABELS, method="encode")
    expected = scale * (x @ e["mean"]["kernel"] + e["class_embedding"]["embedding"][y] + frame["origin"])
    np.testing.assert_allclose(posterior.mean, expected, atol=2e-6)
    decoded = apply(variables, jnp.asarray(z, jnp.float32), labels=LABELS, method="decode").mean
    expected = (z / scale - frame["origin"]) @ d["mean"]["kernel"] + d["mean"]["bias"] + d["class_embedding"]["embedding"][y]
    np.testing.assert_allclose(decoded.reshape(6, -1), expected, atol=2e-6)


@every_network
def test_the_class_changes_the_elbo_and_only_its_own_vector_learns(network):
    model, variables = vae(network)

    @jax.jit
    @jax.value_and_grad
    def objective(params, labels):
        own = {**variables, "params": params}
        return bv.mean_objective(model.apply(own, X, KEY, labels=labels, method="elbo_terms"), 1.0)

    value, gradient = objective(variables["params"], LABELS)
    assert abs(value - objective(variables["params"], jnp.roll(LABELS, 1))[0]) > 1e-3 * abs(value)
    present = np.isin(np.arange(CLASSES), LABELS)
    for vectors in embeddings({"params": gradient}):
        np.testing.assert_array_equal(np.abs(vectors).max(axis=1) > 0, present)
    # Where all classes have the vector zero it is the model without classes.
    for part in ("encoder", "decoder"):
        variables["params"][part]["class_embedding"]["embedding"] *= 0.0
    told, _ = objective(variables["params"], LABELS)
    for part in ("encoder", "decoder"):
        del variables["params"][part]["class_embedding"]
    model = model.clone(classes=None, encoder=model.encoder.clone(classes=None), decoder=model.decoder.clone(classes=None))
    plain = jax.jit(lambda: bv.mean_objective(model.apply(variables, X, KEY, method="elbo_terms"), 1.0))()
    assert float(plain) == pytest.approx(float(told), rel=1e-6)  # two programs, whose sums may be ordered otherwise


@pytest.mark.long
def test_the_other_parameters_begin_as_without_classes():
    models = [build_vae(MLP((5,)), LATENT, SHAPE, classes=classes) for classes in (None, CLASSES)]
    plain, told = (jax.jit(model.init)(KEY, X, KEY) for model in models)
    vectors = embeddings(told)
    assert [leaf.shape for leaf in vectors] == [(CLASSES, 5)] * 2
    assert 0.5 < float(jnp.std(jnp.stack(vectors))) < 1.5  # of 50 draws from N(0, 1): five standard errors of 0.1
    for part in ("encoder", "decoder"):
        del told["params"][part]["class_embedding"]
    jax.tree.map(np.testing.assert_array_equal, plain, told)


@pytest.mark.long
def test_a_sum_in_bfloat16_does_not_stand_still():
    """The gradient of a vector is the number of examples of its class, beyond the 256 up to which bfloat16 counts."""

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            return add_class(x, labels, 2)

    x, labels = jnp.zeros((1000, 3), jnp.bfloat16), jnp.arange(1000) % 2
    variables = Alone().init(KEY, x, labels)
    gradient = jax.grad(lambda v: jnp.sum(Alone().apply(v, x, labels).astype(jnp.float32)))(variables)
    np.testing.assert_array_equal(gradient["params"]["class_embedding"]["embedding"], 500.0)


def test_covariance_within_classes(unchecked):
    rng = np.random.default_rng(3)
    data, labels = rng.normal(size=(40, 2, 2)), rng.integers(0, 3, 40)
    flat = data.reshape(40, -1)
    centered = flat - np.stack([flat[labels == label].mean(axis=0) for label in labels])
    expected = np.sort(np.linalg.eigvals(centered.T @ centered / 40).real)[::-1]
    np.testing.assert_allclose(theory.covariance_eigenvalues(data, labels), expected, rtol=1e-12)
    with pytest.raises(UserError, match="one class for each of 40 examples"):
        theory.covariance_eigenvalues(data, labels[1:])


# --- Own modules ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, labels=None):
        one_hot = jax.nn.one_hot(labels, CLASSES)
        hidden = jnp.concatenate([x.reshape(len(x), -1), one_hot], axis=1)
        return nn.Dense(LATENT)(hidden), nn.Dense(LATENT)(hidden)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z, train=False, labels=None):
        return nn.Dense(32)(jnp.concatenate([z, jax.nn.one_hot(labels, CLASSES)], axis=1)).reshape(-1, *SHAPE)


@pytest.mark.long
def test_own_modules_are_given_the_labels():
    model = bv.VAE(Encoder(), Decoder(), bv.StandardNormal(LATENT), classes=CLASSES)
    variables, sample = jax.jit(model.init)(KEY, X, KEY), jax.jit(model.apply, static_argnames=("count", "method"))
    same, other = (sample(variables, KEY, count=6, labels=labels, method="sample") for labels in (LABELS, LABELS * 0))
    np.testing.assert_array_equal(same[1:3], other[1:3])  # the class of both is 0
    assert np.abs(same[0] - other[0]).max() > 0.01


@dataclass(frozen=True)
class Deaf(bv.Network):
    """A network from before there were labels."""

    def build(self, latent_size, data_shape, outputs, axis_name, dtype, rematerialize):
        return MLP((4,)).build(latent_size, data_shape, outputs, axis_name, dtype, rematerialize)


def test_a_network_that_takes_no_labels_works_without_and_is_refused_with_them():
    assert build_vae(Deaf(), LATENT, SHAPE).classes is None
    with pytest.raises(UserError, match=r"build of Deaf has no argument classes, so this network takes no labels"):
        build_vae(Deaf(), LATENT, SHAPE, classes=CLASSES)


# --- What does not fit ------------------------------------------------------------------------------------------------

WRONG = {
    "missing": (CLASSES, dict(), r"conditional: give labels, the class of each example, 0 \.\.\. 4"),
    "too large": (CLASSES, dict(labels=LABELS + 2), r"labels must lie in 0 \.\.\. 4, got values from 2 to 5"),
    "negative": (CLASSES, dict(labels=LABELS - 1), r"labels must lie in 0 \.\.\. 4, got values from -1 to 2"),
    "too few": (CLASSES, dict(labels=LABELS[:5]), r"whole numbers of shape \(6,\), got int32 of shape \(5,\)"),
    "floats": (CLASSES, dict(labels=LABELS / 2), r"whole numbers of shape \(6,\), got float32"),
    "of another model": (None, dict(labels=LABELS), "knows no classes and takes no labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_do_not_fit(case, unchecked):
    classes, given, sentence = WRONG[case]
    model, variables = vae(MLP((4,)), classes)
    for method, inputs in (("encode", X), ("decode", jnp.ones((6, LATENT)))):
        with pytest.raises(UserError, match=sentence):
            model.apply(variables, inputs, method=method, **given)


def test_configs(unchecked):
    assert "classes" not in bv.config.to_dict(Config())  # as it was written before there were any
    config = Config(classes=10)
    assert bv.config.from_dict(bv.config.to_dict(config)) == config
    for wrong, sentence in ((0, "classes must be a whole number >= 1"), (2.5, "classes must be a whole number")):
        with pytest.raises(UserError, match=sentence):
            Config(classes=wrong)
    with pytest.raises(UserError, match="VampPrior encodes images that are of no class"):
        check_against_data(Config(classes=10, prior=VampPrior()), load(Digits()))
