"""What the curves of a report are made of, where members differ in more than beta and decoder variance. Nothing is trained."""

import dataclasses

import numpy as np
import pytest

from bsvae_jax.config import Config, Linear, Optimizer, StandardNormal
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.objective import BetaSchedule, Capacity, Constant, ConstantBeta, LinearWarmup, Optimal, TargetRate
from bsvae_jax.sweeps import curves, report
from bsvae_jax.sweeps.info import SweepInfo
from bsvae_jax.sweeps.results import MemberResult, SweepResults, families

INFO = SweepInfo(Config(), "dots", "", (4, 4, 1), 256, None, [])


def member(beta, variance, learning_rate=1e-3, schedule: BetaSchedule | None = None, seed=0, final_beta=None) -> MemberResult:
    """A member whose rate is `10 / (1 + 2 v beta)`, a thousand learning rates more."""
    config = dataclasses.replace(
        Config(prior=StandardNormal(), seed=seed, optimizer=Optimizer(learning_rate)),
        beta=beta,
        decoder_variance=variance,
        beta_schedule=schedule or ConstantBeta(),
    )
    rate = 10.0 / (1.0 + 2.0 * getattr(variance, "variance", 0.5) * (final_beta or beta)) + 1000.0 * learning_rate
    values = dict(rate=rate, mse=1 / rate, distortion=-rate, profile_distortion=-2 * rate, calibrated_elbo=rate, variance=0.01)
    if final_beta is not None:
        values["final_beta"] = final_beta
    quantities = {name: Quantity(value, None, "nats", "") for name, value in values.items()}
    pictures = {name: np.zeros((2, 4, 4, 1), np.uint8) for name in ("originals", "reconstructions", "samples")}
    pictures["latent_rate"] = np.ones(2)
    return MemberResult(f"m{seed}", config, {"test": quantities, "train": quantities}, {}, pictures)


def sweep_of(*members: MemberResult) -> SweepResults:
    return SweepResults(INFO, list(members), {}, [], {})


def test_readings_do_not_mix_learning_rates():
    rates = (1e-3, 3e-2)
    found = curves.readings(sweep_of(*(member(beta, Constant(0.5), rate) for beta in (0.3, 3.0) for rate in rates)), "test")
    assert [curve.label for curve in found] == [
        f"β-VAE read with {reading}, learning rate {rate:g}"
        for rate in rates
        for reading in ("optimal σ² per image", "σ² = 1/2", "σ² = β/2")
    ]
    for curve, rate in zip(found, np.repeat(rates, 3), strict=True):
        np.testing.assert_allclose(curve.x, [10 / 1.3 + 1000 * rate, 10 / 4 + 1000 * rate])
        np.testing.assert_array_equal(curve.x_deviation, 0)  # no two seeds


def test_readings_do_not_mix_schedules_and_a_capacity_has_no_reading_by_beta():
    """Its beta is the weight of what the rate is beyond the capacity, not that of the rate."""
    schedules = (ConstantBeta(), LinearWarmup(6), Capacity(3.0, 6))
    found = curves.readings(sweep_of(*(member(1.0, Constant(0.5), schedule=schedule) for schedule in schedules)), "test")
    labels = [curve.label.removeprefix("β-VAE read with ") for curve in found]
    assert labels == [
        *("optimal σ² per image", "σ² = 1/2", "σ² = β/2"),
        *("optimal σ² per image, linear warmup-6", "σ² = 1/2, linear warmup-6", "σ² = β/2, linear warmup-6"),
        *("optimal σ² per image, capacity of 3 nats", "σ² = 1/2, capacity of 3 nats"),
    ]
    assert all(len(curve.x) == 1 for curve in found)


def test_a_hint_says_which_beta_it_means():
    """Of the constant variance 2 v beta, of which cells with different beta may be one point; of others their own beta."""
    collapsed = member(4.0, Optimal())._replace(findings={"posterior collapse": "nothing"})
    found = curves.readings(
        sweep_of(member(0.3, Constant(0.05)), member(0.03, Constant(0.5)), member(0.0, Constant(0.5)), collapsed), "test"
    )
    own, optimal, half, by_beta = found
    assert (own.hints, own.collapsed) == (["β = 4"], [True])
    assert optimal.hints == half.hints == ["2σ²β = 0", "2σ²β = 0.03"]
    assert by_beta.hints == ["2σ²β = 0.03"]
    assert half.collapsed == [False, False]
    (hint,) = report._hinted(own, "distortion").hints
    assert hint == f"{own.label}, β = 4: rate {own.x[0]:.5g}, distortion {own.y[0]:.5g}, collapsed"


def test_the_grid_is_of_one_learning_rate():
    cells = [(beta, Constant(v)) for beta in (1.0, 2.0) for v in (0.1, 0.2)]
    both = sweep_of(*(member(*cell, learning_rate=rate) for cell in cells for rate in (1e-3, 1e-2)))
    betas, variances, rates = curves.constant_grid(both, "rate")
    assert (betas, variances) == ([1.0, 2.0], [0.1, 0.2])
    expected = [[10 / (1 + 2 * v * beta) + 10 for beta in betas] for v in variances]  # of 1e-2, which has the best ELBO
    np.testing.assert_allclose(rates, expected)
    (picture,) = report._beta_variance(both).values()
    assert picture.caption.startswith("β against σ² on the test set of dots, learning rate 0.01. ")
    assert "Along the diagonals, where β·σ² is equal, the rates differ by at most 0%." in picture.caption


def test_one_variance_with_two_learning_rates_is_no_grid():
    found = sweep_of(*(member(beta, Constant(0.5), rate) for beta in (1.0, 2.0) for rate in (1e-3, 1e-2)))
    assert curves.constant_grid(found, "rate")[1] == [0.5]
    assert report._beta_variance(found) == {}


@pytest.mark.parametrize("others", [(), (Optimal(),)])
def test_the_caption_of_the_grid_says_what_is_there(others):
    """Nothing of diagonals where no two products are equal, nothing of an optimal variance where none was trained."""
    variances = (Constant(0.1), Constant(0.3), *others)
    (picture,) = report._beta_variance(sweep_of(*(member(beta, v) for beta in (1.0, 2.0) for v in variances))).values()
    assert "diagonals" not in picture.caption
    assert ("The optimal variance has no such trade" in picture.caption) == bool(others)


def test_what_finds_its_beta_has_no_grid():
    target = (
        member(1.0, Constant(v), schedule=TargetRate(nats), final_beta=nats * v) for v in (0.1, 0.2) for nats in (1.0, 2.0)
    )
    assert report._beta_variance(sweep_of(*target)) == {}


def test_pictures_of_a_target_rate_have_the_beta_of_their_seed():
    found = [
        member(1.0, Optimal(), schedule=TargetRate(5.0), seed=seed, final_beta=beta) for seed, beta in ((0, 2.0), (1, 4.0))
    ]
    (family,) = families(sweep_of(*found))
    assert family.betas.tolist() == [3.0]
    (picture,) = report._galleries(sweep_of(*found)).values()
    left, right = picture.figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["original", "β = 2"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["β = 2"]


def test_a_capacity_is_not_compared_with_the_theory_of_beta():
    config = Config(network=Linear(), latent_size=2)
    info = INFO._replace(config=config, eigenvalues=np.array([0.1, 0.05]))
    members = [member(1.0, Optimal("batch"), schedule=Capacity(3.0, 6))]
    assert curves.compare_with_theory(SweepResults(info, members, {}, [], {})) is None


def test_every_point_has_a_hint():
    found = sweep_of(*(member(beta, v) for beta in (1.0, 2.0) for v in (Optimal(), Constant(0.5))))
    picture = report._rate_distortion(found)
    assert len(picture.points) == 2 * 4 + 2 * 2
    assert sum("2σ²β = " in hint for *_, hint in picture.points) == 2 * 3
