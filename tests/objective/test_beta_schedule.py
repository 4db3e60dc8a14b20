"""Schedules of beta and free bits: against formulas written out, and float64 NumPy."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsvae_jax.config import MLP, Config, Flow, Linear, Mixture, from_dict, to_dict
from bsvae_jax.objective import (
    BetaSchedule,
    Capacity,
    ConstantBeta,
    Cyclical,
    ElboTerms,
    FreeBits,
    LinearWarmup,
    Optimal,
    TargetRate,
    mean_objective,
)
from bsvae_jax.training.program import program_config
from bsvae_jax.training.state import build_hyperparameters, build_model, create_state
from bsvae_jax.training.step import TrainState, train_step

SMALL = Config(network=MLP((8,)), latent_size=4, decoder_variance=Optimal("batch"), beta=2.0)


def weights(schedule, steps):
    return [float(schedule.weight(2.0, jnp.int32(step), jnp.float32(0.0), None)) for step in steps]


# --- Formulas ---------------------------------------------------------------------------------------------------------


def test_schedules_typed_by_hand():
    assert weights(ConstantBeta(), range(3)) == [2.0, 2.0, 2.0]
    np.testing.assert_allclose(weights(LinearWarmup(5), range(8)), [0, 0.4, 0.8, 1.2, 1.6, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(weights(Cyclical(4, 0.5), range(9)), [0, 1, 2, 2, 0, 1, 2, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(weights(Cyclical(4, 1.0), range(5)), [0, 0.5, 1, 1.5, 0], rtol=1e-6)
    assert [float(Capacity(20.0, 4).offset(jnp.int32(step))) for step in range(6)] == [0, 5, 10, 15, 20, 20]


def test_four_cycles_are_those_of_the_paper():
    """Fu et al. 2019, eqs. 6 and 7 as they stand there: t from 1, T steps, M cycles, a share R of each in which beta rises."""
    T, M, R = 40, 4, 0.5
    tau = np.array([(t - 1) % math.ceil(T / M) / (T / M) for t in range(1, T + 1)])
    np.testing.assert_allclose(weights(Cyclical(T // M, R), range(T)), 2.0 * np.where(tau <= R, tau / R, 1.0), rtol=1e-6)


def test_the_multiplier_follows_its_recursion():
    """Algorithm 1 of Rezende & Viola 2018 with the relative error of the rate, in float64."""
    schedule = TargetRate(20.0, speed=0.1)
    multiplier, expected = jnp.float32(1.0), 1.0
    for rate in (5.0, 15.0, 30.0, 70.0, 20.0, 0.0):
        multiplier = schedule.next_multiplier(multiplier, jnp.float32(rate))
        expected *= math.exp(0.1 * min(max(rate / 20.0 - 1.0, -1.0), 1.0))
        assert float(multiplier) == pytest.approx(expected, rel=1e-6)
    for rate, bound in ((0.0, 1e-6), (1e9, 1e6)):
        for _ in range(30):
            multiplier = TargetRate(20.0, speed=1.0).next_multiplier(multiplier, jnp.float32(rate))
        assert float(multiplier) == pytest.approx(bound, rel=1e-6)  # finite, and not 0, from where it would not come back


def test_what_evaluations_are_ranked_and_weighed_by():
    for schedule in (ConstantBeta(), LinearWarmup(5), Cyclical(4)):
        assert schedule.at_end(2.0, 30.0) == (2.0, 0.0)
        assert schedule.ranking(10.0, -50.0, 30.0) == 10.0
        assert schedule.finding(2.0, 30.0) is None
    assert Capacity(20.0).at_end(1000.0, 30.0) == (1000.0, 20.0)
    assert Capacity(20.0).at_end(1000.0, 15.0) == (-1000.0, 20.0)
    # Beyond 22 nats, 1.1 times the target, nothing can be the best; below, it is the least distortion, whatever beta.
    assert [TargetRate(20.0).ranking(10.0, -50.0, rate) for rate in (5.0, 21.9, 22.1)] == [-50.0, -50.0, None]
    assert [TargetRate(20.0).finding(1.5, rate) is None for rate in (17.0, 19.0, 21.0, 23.0)] == [False, True, True, False]


@pytest.mark.parametrize("steps", range(1, 30))
def test_a_run_that_ends_while_beta_rises_is_refused(steps):
    """By the weight itself: what is refused has not arrived within one step of the ramp."""
    schedule = Cyclical(10, 0.5)
    last = weights(schedule, [steps])[0] if steps % 10 else 2.0
    if last < 2.0:
        with pytest.raises(ValueError, match=f"The run of {steps} steps ends at step {steps % 10} of a cycle of 10"):
            schedule.check(2.0, steps, 0.0, 100.0)
    else:
        schedule.check(2.0, steps, 0.0, 100.0)


@pytest.mark.parametrize("cycle", [8, 30, 99])
@pytest.mark.parametrize("ramp", [0.3, 0.5, 0.9])
def test_the_cycle_that_is_recommended_is_taken(cycle, ramp):
    recommended = 0
    for steps in (7, 44, 153, 1001):
        try:
            Cyclical(cycle, ramp).check(1.0, steps, 0.0, 99.0)
        except ValueError as error:
            recommended += 1
            Cyclical(int(re.search(r"beta_schedule.steps (\d+)", str(error))[1]), ramp).check(1.0, steps, 0.0, 99.0)
    assert recommended


# --- Free bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
def test_free_bits_are_a_maximum_over_groups(group):
    """`sum_j max(nats, mean over the batch of KL_j)` and its gradient, by float64 NumPy: none where the nats are free."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(5, 4)) * np.array([0.1, 1.0, 2.0, 0.2])
    log_variance = rng.normal(size=(5, 4)) * 0.3
    rates = 0.5 * (np.exp(log_variance) - 1 - log_variance + mean**2)
    grouped = rates.reshape(5, -1, group).sum(2).mean(0)
    nats = float(np.sort(grouped)[0] * 1.5) if group < 4 else float(grouped[0] * 0.5)
    active = np.repeat(grouped > nats, group)
    assert group == 4 or 0 < active.sum() < 4

    def penalty(mean, log_variance):
        rate = jnp.sum(0.5 * (jnp.expm1(log_variance) - log_variance + mean**2), axis=1)
        terms = ElboTerms(jnp.zeros(5), rate, jnp.zeros(5), jnp.ones(()))
        return mean_objective(FreeBits(nats, group).penalized(terms, mean, log_variance), 3.0)

    given = jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    value, gradient = jax.value_and_grad(penalty, argnums=(0, 1))(*given)
    assert float(value) == pytest.approx(3.0 * np.maximum(nats, grouped).sum(), rel=1e-6)
    np.testing.assert_allclose(gradient[0], 3.0 * mean * active / 5, atol=1e-6)
    np.testing.assert_allclose(gradient[1], 1.5 * (np.exp(log_variance) - 1) * active / 5, atol=1e-6)


def test_free_bits_of_all_latents_together_take_any_prior():
    for prior in (Mixture(), Flow()):
        assert dataclasses.replace(SMALL, prior=prior, free_bits=FreeBits(1.0, 4)).free_bits.least(4) == 1.0
    assert FreeBits(0.5, 2).least(4) == 1.0


# --- The step ---------------------------------------------------------------------------------------------------------


def state_of(config, axis_name=None):
    return create_state(config, build_model(config, (8, 8, 1), 1 / 16, axis_name), 10)


@pytest.mark.long
def test_the_objective_of_a_step_with_a_capacity_and_free_bits(key):
    """`distortion + beta |rate - C|` written out on the posteriors of the same network, and the norm of its gradient."""
    x = jax.random.uniform(key, (6, 8, 8, 1))
    free = FreeBits(0.02, 2)
    config = dataclasses.replace(SMALL, beta_schedule=Capacity(8.0, 4), free_bits=free)
    state = state_of(config).replace(step=jnp.int32(2))  # C is 4 nats, above the untrained rate

    def loss(params):
        output = state.model.apply({"params": params}, x, key)
        terms = state.model.apply({"params": params}, x, key, method="elbo_terms")
        mean, log_variance = output.posterior
        grouped = jnp.sum((0.5 * (jnp.expm1(log_variance) - log_variance + mean**2)).reshape(6, 2, 2), 2).mean(0)
        free_rate = jnp.sum(jnp.maximum(grouped, free.nats))
        return jnp.mean(terms.distortion) + 2.0 * jnp.abs(free_rate - 4.0), jnp.mean(terms.rate)

    (expected, rate), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    assert rate < 4.0
    _, metrics = jax.jit(train_step)(state, x, key, *build_hyperparameters(config))
    assert float(metrics.objective) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics.beta) == -2.0
    assert float(metrics.rate) == pytest.approx(float(rate), rel=1e-5)
    assert float(metrics.gradient_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)


@pytest.mark.long
def test_one_program_for_any_step_and_target(key):
    """Neither the step nor the target nor beta is a constant of the program, and the multiplier is part of the state."""
    x = jax.random.uniform(key, (6, 8, 8, 1))
    traces = []

    @jax.jit
    def step(state, hyperparameters):
        traces.append(1)
        return train_step(state, x, key, *hyperparameters)

    configs = [
        dataclasses.replace(SMALL, beta_schedule=TargetRate(nats, 0.1), beta=beta) for nats, beta in ((5.0, 2.0), (9.0, 3.0))
    ]
    assert program_config(configs[0]) == program_config(configs[1])
    base = program_config(configs[0])
    for config in configs:
        state, multiplier = state_of(base), 1.0
        for _ in range(3):
            state, metrics = step(state, build_hyperparameters(config))
            assert float(metrics.beta) == pytest.approx(config.beta * multiplier, rel=1e-6)
            multiplier *= math.exp(0.1 * np.clip(float(metrics.rate) / config.beta_schedule.nats - 1, -1, 1))
            assert float(state.multiplier) == pytest.approx(multiplier, rel=1e-6)
    assert len(traces) == 1
    assert float(state.with_arrays(state.arrays()).multiplier) == float(state.multiplier)


@dataclasses.dataclass(frozen=True)
class Halved(BetaSchedule):
    def weight(self, beta, step, rate, multiplier):
        return 0.5 * beta


def test_states_and_files_of_before_are_as_they_were():
    """No array of a checkpoint is new without a multiplier, and a config without the fields is that of a constant beta."""
    kept = {"step", "params", "batch_stats", "optimizer_state", "ema_params", "key"}
    for schedule in (ConstantBeta(), LinearWarmup(5), Halved()):
        arrays = jax.eval_shape(lambda own=schedule: state_of(dataclasses.replace(SMALL, beta_schedule=own)).arrays())
        assert set(arrays) == kept
    arrays = jax.eval_shape(lambda: state_of(dataclasses.replace(SMALL, beta_schedule=TargetRate(5.0))).arrays())
    assert set(arrays) == kept | {"multiplier"}
    values = to_dict(SMALL)
    del values["beta_schedule"], values["free_bits"]
    assert from_dict(values) == SMALL


def test_a_state_without_a_config_takes_a_schedule(key):
    model = build_model(dataclasses.replace(SMALL, network=Linear()), (8, 8, 1), 1 / 16)
    schedule = TargetRate(5.0)
    made = jax.eval_shape(lambda: TrainState.create(model, optax.adam(1e-3), key, jnp.ones((2, 8, 8, 1)), schedule))
    assert (made.beta_schedule, made.multiplier.shape) == (schedule, ())
