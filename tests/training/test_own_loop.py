"""`TrainState.create` and `train_step` as a library: modules, optimizers, priors and keys of one's own, without a config."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import float64

import bsvae_jax as bv
from bsvae_jax.errors import UserError
from bsvae_jax.models import priors

X = jax.random.uniform(jax.random.key(5), (8, 6), jnp.float32)
KEY = jax.random.key(1)


class Encoder(nn.Module):
    dropout: float = 0.0
    counts: bool = False
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        hidden = nn.Dense(16)(x)
        if self.dropout:
            hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        if self.counts:
            self.variable("counts", "batches", jnp.zeros, ())
        return nn.Dense(4, dtype=self.dtype)(hidden), nn.Dense(4, dtype=self.dtype)(hidden)


class Decoder(nn.Module):
    outputs: tuple[int, ...] = (6,)

    @nn.compact
    def __call__(self, z, train=False):
        return nn.Dense(int(np.prod(self.outputs)))(z).reshape(-1, *self.outputs)


class NNXEncoder(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.dropout = nnx.Linear(6, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.mean, self.log_variance = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, train=False):
        hidden = self.dropout(self.hidden(x), deterministic=not train)
        return self.mean(hidden), self.log_variance(hidden)


def vae(encoder=None, decoder=None, prior=None):
    return bv.VAE(encoder or Encoder(), decoder or Decoder(), prior=prior or bv.StandardNormal(4))


def state_of(model=None, optimizer=None, example=X, **also):
    optimizer = optimizer or optax.adam(1e-2)
    return bv.TrainState.create(model or vae(), optimizer, jax.random.key(0), example, **also)


def objective(state, key=KEY, x=X):
    return float(bv.train_step(state, x, key, 1.0)[1].objective)


# --- Modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [Encoder(dropout=0.5), nnx.bridge.to_linen(NNXEncoder)], ids=["linen", "nnx"])
@pytest.mark.parametrize("parts", [1, 2])
def test_dropout_is_drawn_from_the_key_of_the_step_and_not_in_evaluation(encoder, parts):
    """An evaluation with the key of a step has its posterior noise: they differ by the dropout alone."""
    for network, drops in ((encoder, True), (Encoder(), False)):
        state = state_of(vae(network)).replace(parts=parts)
        assert objective(state) == objective(state)
        evaluated = bv.mean_objective(vae(network).apply(state.variables(), X, KEY, method="elbo_terms"), 1.0)
        assert (abs(objective(state) - float(evaluated)) > 1e-3) == drops


def test_what_a_state_does_not_hold_is_refused():
    with pytest.raises(UserError, match="keep variables of the collection 'counts', which a TrainState does not hold"):
        state_of(vae(Encoder(counts=True)))


def test_a_decoder_of_another_shape_is_refused_in_parts_too(unchecked):
    x = jnp.zeros((4, 2, 3))

    class Flat(Encoder):
        @nn.compact
        def __call__(self, x, train=False):
            return Encoder()(x.reshape(len(x), -1), train)

    state = state_of(vae(Flat(), Decoder((3, 2))), example=x).replace(parts=2)
    with pytest.raises(UserError, match="x and mean must have one shape"):
        bv.train_step(state, x, KEY, 1.0)
    with pytest.raises(UserError, match="A batch of 8 images does not divide into 3 parts"):
        bv.train_step(state_of().replace(parts=3), X, KEY, 1.0)


def test_the_rate_of_posteriors_in_bfloat16_is_that_of_their_values():
    """`log q(z|x)` needs z in float32: rounded to bfloat16 it is another point, and far out where variances are small."""
    mean = jnp.linspace(-3, 3, 32).reshape(1, 32)
    log_variance = jnp.full((1, 32), -10.0)

    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            rows = (len(x), 32)
            return tuple(jnp.broadcast_to(a, rows).astype(jnp.bfloat16) for a in (mean, log_variance))

    model = vae(Fixed(), prior=priors.Mixture(1, latent_size=32))
    x = jnp.zeros((200, 6))
    variables = model.init(KEY, x, KEY)
    component = {"logits": jnp.zeros(1), "mean": jnp.zeros((1, 32)), "log_variance": jnp.zeros((1, 32))}
    assert jax.tree.map(jnp.shape, variables["params"]["prior_model"]) == jax.tree.map(jnp.shape, component)
    variables = {"params": {**variables["params"], "prior_model": component}}
    rates = np.float64(model.apply(variables, x, KEY).rate)
    own = np.float64(mean.astype(jnp.bfloat16).astype(jnp.float32))
    expected = 0.5 * np.sum(np.exp(-10.0) - 1 + 10.0 + own**2)
    # One sample has the variance of log q - log p: 32 / 2, and that of a mean s beside it.
    assert abs(rates.mean() - expected) < 4 * np.sqrt(16.5 / 200)
    assert rates.std() < 6.0, "4.1 by the formula"


# --- Priors, free bits, schedules, optimizers -------------------------------------------------------------------------


class Summed(priors.PriorModule):
    def log_prob(self, z):
        return priors.gaussian_log_prob(z, jnp.zeros_like(z), jnp.zeros_like(z)).sum()


@dataclass(frozen=True)
class SummedPrior(bv.Prior):
    def build(self, latent_size, encoder=None, data_shape=None):
        return Summed(latent_size)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vae(prior=SummedPrior(latent_size=4)).init(KEY, X, KEY), r"log_prob of Summed .* shape \(8,\), got \(\)"),
        (
            lambda: vae(prior=priors.FlowMatching(rows=3, latent_size=4)).init(KEY, X, KEY),
            "4 latents do not divide into the 3 x 1 positions",
        ),
        (
            lambda: state_of(vae(prior=priors.Mixture(latent_size=4)), free_bits=bv.FreeBits(0.1)),
            "rate under a prior other than StandardNormal does not fall into latents",
        ),
        (lambda: state_of(free_bits=bv.FreeBits(0.1, group=3)), "group 3 does not divide the 4 latents"),
        (lambda: state_of(beta_schedule=bv.TargetRate()), "A target rate must be given"),
        (lambda: state_of(optimizer=optax.MultiSteps(optax.adam(1e-2), 2)), "its gradient_transformation"),
        (
            lambda: vae().apply(state_of().variables(), X, jax.random.key(1, impl="rbg")),
            "key must be of threefry2x32, .* got one of rbg",
        ),
    ],
    ids=["summed", "flow matching", "free bits", "group", "target", "multi steps", "rbg"],
)
def test_what_would_train_something_else_is_refused(make, sentence, unchecked):
    with pytest.raises(UserError, match=sentence):
        make()


def test_an_optimizer_is_given_the_objective():
    plateau = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau())
    state, metrics = bv.train_step(state_of(optimizer=plateau), X, KEY, 1.0)
    assert float(state.optimizer_state[1].best_value) == float(metrics.objective)


def test_a_label_that_is_no_class_gives_nan_in_a_jitted_step():
    model = bv.models.build_vae(bv.models.MLP((8,)), 4, (6,), classes=3)
    step, labels = jax.jit(bv.train_step), jnp.array([0, 1, 2, 0, 1, 2, 0, 1])
    state = state_of(model)
    assert np.isfinite(step(state, X, KEY, 1.0, labels=labels)[1].objective)
    for wrong in (-1, 3):
        assert np.isnan(step(state, X, KEY, 1.0, labels=labels.at[3].set(wrong))[1].objective)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_step_keeps_the_types_of_the_state_in_float64(skip_nonfinite):
    with float64():
        model = bv.models.build_vae(bv.models.Residual((4,)), 2, (8, 8, 1), dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)))
        state = state_of(model, example=x, beta_schedule=bv.TargetRate(3.0)).replace(skip_nonfinite=skip_nonfinite)
        after = jax.eval_shape(bv.train_step, state, x, KEY, 1.0)[0]
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)


# --- Masks ------------------------------------------------------------------------------------------------------------


def test_an_example_with_nothing_observed_has_distortion_zero_without_a_floor():
    x, mask = jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([[True, True], [False, False]])

    def distortion(mean):
        return bv.elbo_terms(x, mean, jnp.zeros(2), bv.Optimal(floor=0.0), mask=mask).distortion

    np.testing.assert_allclose(distortion(jnp.ones((2, 2))), [np.log(2 * np.pi * 0.5) + 1, 0.0], rtol=1e-6)
    gradient = jax.grad(lambda mean: distortion(mean).sum())(jnp.ones((2, 2)))
    np.testing.assert_allclose(gradient[1], 0.0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("unobserved", [-95.0, np.nan])
def test_a_predicted_variance_that_is_not_observed_has_no_gradient(unobserved):
    mask = X > 0.5
    log_variance = jnp.where(mask, 0.0, unobserved)

    def distortion(log_variance):
        terms = bv.elbo_terms(X, 0 * X + 0.3, jnp.zeros(8), bv.Predicted(), log_variance=log_variance, mask=mask)
        return terms.distortion.sum()

    expected = np.where(mask, 0.5 * (1 - (np.float64(X) - 0.3) ** 2), 0.0)  # of 1/2 (lv + (r^2 + v0) exp(-lv)) at lv = 0
    np.testing.assert_allclose(jax.grad(distortion)(log_variance), expected, atol=1e-5)


def test_the_objective_of_terms_in_bfloat16_is_added_in_float32():
    terms = bv.ElboTerms(jnp.full(4, 100, jnp.bfloat16), jnp.full(4, 1.3, jnp.bfloat16), jnp.zeros(4), jnp.zeros(()))
    assert float(bv.mean_objective(terms, 0.01)) == pytest.approx(100.013, abs=1e-4)
