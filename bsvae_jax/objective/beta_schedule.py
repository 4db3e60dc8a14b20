"""How beta changes during training: one small frozen dataclass for each way, pure functions of the step, beta and the rate.

A step minimizes `mean(distortion) + weight * (mean(rate) - offset)`, where both come from the schedule and are constants of
the gradient. Derive `BetaSchedule` for a way of your own; a config takes it like the ones here.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from bsvae_jax.errors import UserError, check_count, check_number
from bsvae_jax.objective.gaussian import check_positive
from bsvae_jax.objective.kind import Kind

Scalar = Any
"""A number, or an array of shape [] that may be traced."""

TOLERANCE = 0.1
"""Relative deviation of a rate from its target beyond which an evaluation says so."""


@dataclass(frozen=True)
class BetaSchedule(Kind, abc.ABC):
    """Base of all schedules; a class of your own needs `weight`, and what else of this it wants otherwise.

    >>> @dataclass(frozen=True)
    ... class HalfCosine(BetaSchedule):
    ...     steps: int = 1000
    ...
    ...     def weight(self, beta, step, rate, multiplier):
    ...         return beta * 0.5 * (1.0 - jnp.cos(jnp.pi * jnp.minimum(step / self.steps, 1.0)))
    >>> print(HalfCosine().weight(2.0, 500, 0.0, None))
    1.0
    """

    traced: ClassVar[tuple[str, ...]] = ()
    """Fields that the compiled program takes as arrays, so that members of a sweep which differ in them share one program."""
    has_multiplier: ClassVar[bool] = False
    """Whether training changes a multiplier of beta (`next_multiplier`), which is part of its state and of checkpoints."""
    meaning: ClassVar[str] = "distortion + beta * rate, the model's own"
    """What the objective of an evaluation is."""

    @abc.abstractmethod
    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """Weight of the rate at a step: the beta of its row in `metrics.jsonl`.

        Args:
          beta: of the config.
          step: number of steps taken before, [].
          rate: of the step, averaged over the global batch, nats, [].
          multiplier: of the state, []; 1 at first; None unless `has_multiplier`.
        """

    def offset(self, step: Scalar) -> Scalar:
        """Nats taken off the rate in the objective of a step: its value changes by a constant, its gradient does not."""
        return 0.0

    def next_multiplier(self, multiplier: Scalar, rate: Scalar) -> Scalar:
        """The multiplier after a step of this `rate`, nats, averaged over the global batch."""
        return multiplier

    def at_end(self, beta: float, rate: float) -> tuple[float, float]:
        """Weight and offset of every evaluation's objective, whatever its step: those at which the schedule arrives.

        Args:
          beta: of the config, times the multiplier where there is one.
          rate: of the split, nats.
        """
        return beta, 0.0

    def ranking(self, objective: float, distortion: float, rate: float) -> float | None:
        """What the best checkpoint has least of, nats, from held-out terms; None: this one cannot be the best."""
        return objective

    def check_target(self) -> None:
        """Raise a UserError where a target has no usual value and is not given; by default there is none."""

    def finding(self, beta: float, rate: float) -> str | None:
        """What is wrong with the rate of a split, nats, at this beta, for `diagnose`; None: nothing."""
        return None

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """Raise a UserError where this schedule does not fit a run.

        Args:
          beta: of the config.
          steps: of the whole run.
          least: nats that free bits leave without a weight.
          most: nats that latents and data can carry.
        """
        if not beta > 0:
            raise UserError(f"beta_schedule {self.name} scales beta, which is {beta:g}; give a beta > 0.")


@dataclass(frozen=True)
class ConstantBeta(BetaSchedule):
    """The same beta at every step (Higgins et al. 2017, beta-VAE, eq. 4).

    >>> ConstantBeta().weight(2.0, 100, 0.0, None)
    2.0
    """

    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """`beta`."""
        return beta

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """It fits any run."""


@dataclass(frozen=True)
class LinearWarmup(BetaSchedule):
    """`beta * min(1, t / steps)` at step t from 0 (Sonderby et al. 2016, arXiv 1602.02282, "Warm-up from deterministic to
    variational autoencoder"; the KL annealing of Bowman et al. 2016, arXiv 1511.06349, section 3.1, on a line).

    >>> [float(LinearWarmup(4).weight(2.0, step, 0.0, None)) for step in (0, 1, 4, 9)]
    [0.0, 0.5, 2.0, 2.0]

    Raises:
      UserError: `steps` is not a whole number >= 1.
    """

    steps: int = 1000
    """Steps of the warm-up."""

    def __post_init__(self) -> None:
        check_count("beta_schedule.steps", self.steps)

    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """`beta * min(1, step / steps)`."""
        return beta * _ramp(step, self.steps)

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """The warm-up is shorter than the run."""
        super().check(beta, steps, least, most)
        _check_shorter(self.steps, steps, "warm up")


@dataclass(frozen=True)
class Cyclical(BetaSchedule):
    """In each cycle beta rises from 0 over a share `ramp` of its steps and then stays (Fu et al. 2019, arXiv 1903.10145, eqs. 6
    and 7): `beta * min(1, tau / ramp)`, `tau = (t mod steps) / steps` at step t from 0.

    Theirs has M cycles in a run of T steps, `steps = T / M`; M = 4 and ramp = 1/2.

    >>> [float(Cyclical(4).weight(2.0, step, 0.0, None)) for step in (0, 1, 2, 3, 4)]
    [0.0, 1.0, 2.0, 2.0, 0.0]

    Raises:
      UserError: `steps` is not a whole number >= 1, or `ramp` is not in (0, 1].
    """

    steps: int = 1000
    """Steps of a cycle."""
    ramp: float = 0.5
    """Share of a cycle in which beta rises."""

    def __post_init__(self) -> None:
        check_count("beta_schedule.steps", self.steps)
        check_number("beta_schedule.ramp", self.ramp, low=0.0, high=1.0, open_low=True)

    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """`beta * min(1, tau / ramp)`."""
        return beta * _ramp(step % self.steps, self.ramp * self.steps)

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """The run ends where beta does not rise."""
        super().check(beta, steps, least, most)

        def has_risen(cycle: int) -> bool:  # the last step may be the one before beta arrives
            return (steps - 1) % cycle >= self.ramp * cycle - 1

        if not has_risen(self.steps):
            nearest = min(filter(has_risen, range(2, steps + 1)), key=lambda cycle: abs(cycle - self.steps), default=None)
            raise UserError(
                f"The run of {steps} steps ends at step {(steps - 1) % self.steps + 1} of a cycle of {self.steps}, where beta "
                "still rises; "
                + ("train for more epochs." if nearest is None else f"with beta_schedule.steps {nearest} it has arrived.")
            )


@dataclass(frozen=True)
class Capacity(BetaSchedule):
    """`distortion + beta * |rate - C|` with a C that rises from 0 to `nats` (Burgess et al. 2018, arXiv 1804.03599, eq. 8).

    Beta is their gamma, 1000; it has to exceed the slope of the distortion over the rate, or the rate does not reach C. The
    rate is that of the global batch. The weight is `beta * sign(rate - C)`: it alternates, and its mean over the steps is the
    beta that would hold the rate at C.

    >>> print(Capacity(20.0, steps=10).offset(5), Capacity(20.0, steps=10).weight(1000.0, 5, 9.0, None))
    10.0 -1000.0

    Raises:
      UserError: `nats` is not a number > 0, or `steps` not a whole number >= 1.
    """

    nats: Any = 25.0
    """C at the end, nats per example; 25 on dSprites in the paper."""
    steps: int = 100_000
    """Steps in which C rises on a line; the paper's."""

    traced: ClassVar[tuple[str, ...]] = ("nats",)
    meaning: ClassVar[str] = "distortion + beta * |rate - nats|, the model's own"

    def __post_init__(self) -> None:
        check_positive("beta_schedule.nats", self.nats)
        check_count("beta_schedule.steps", self.steps)
        _keep_float(self)

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"capacity of {self.nats:g} nats"

    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """`beta * sign(rate - C)`."""
        return beta * jnp.sign(rate - self.offset(step))

    def offset(self, step: Scalar) -> Scalar:
        """C, nats."""
        return self.nats * _ramp(step, self.steps)

    def at_end(self, beta: float, rate: float) -> tuple[float, float]:
        """`beta * sign(rate - nats)` and `nats`."""
        return (beta if rate >= self.nats else -beta), self.nats

    def finding(self, beta: float, rate: float) -> str | None:
        """The rate is far from the capacity."""
        return _missed(self.nats, rate, f"beta (their gamma) is {beta:g} and may be too small to hold it there")

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """C arrives before the run ends, at a rate that can be had."""
        super().check(beta, steps, least, most)
        _check_shorter(self.steps, steps, "let the capacity rise")
        _check_target(self.nats, least, most)


@dataclass(frozen=True)
class TargetRate(BetaSchedule):
    """Least distortion at a rate of `nats`: beta is the Lagrange multiplier of that constraint, found while training.

    GECO (Rezende & Viola 2018, arXiv 1810.00597, algorithm 1: `lambda <- lambda * exp(constant * C)`) with the rate as the
    constraint in place of the reconstruction error, whose multiplier is the inverse of this one:
    `beta <- beta * exp(speed * clip(rate / nats - 1, -1, 1))` after each step. It begins at the config's beta. The multiplier
    of the optimum is the beta of the model that has this rate: `-d distortion / d rate`, with an optimal variance that of
    `theory.linear_optimum` for linear models.

    The best checkpoint is the one of least held-out distortion among those of a held-out rate of at most 1.1 times the target:
    objectives of different beta do not compare.

    >>> print(TargetRate(20.0, speed=0.5).next_multiplier(2.0, 60.0))  # 2 exp(1/2): the error counts as 1 at most
    3.2974424
    >>> TargetRate(20.0).weight(0.5, 0, 60.0, 3.0)
    1.5

    Raises:
      UserError: `nats` is not a number >= 0, or `speed` is not in (0, 1].
    """

    nats: Any = 0.0
    """The rate, nats per example, > 0; there is no usual one, so it has to be given."""
    speed: float = 0.03
    """Relative change of beta in a step whose rate is twice the target. Networks that follow slowly need a smaller one."""

    traced: ClassVar[tuple[str, ...]] = ("nats",)
    has_multiplier: ClassVar[bool] = True
    meaning: ClassVar[str] = "distortion + beta * rate, beta being the multiplier that training came to (final_beta)"

    LARGEST: ClassVar[float] = 1e6
    """Bound of the multiplier, and of its inverse: from there it comes back."""

    def __post_init__(self) -> None:
        check_positive("beta_schedule.nats", self.nats, allow_zero=True)
        check_number("beta_schedule.speed", self.speed, low=0.0, high=1.0, open_low=True)
        _keep_float(self)

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"target rate of {self.nats:g} nats"

    def weight(self, beta: Scalar, step: Scalar, rate: Scalar, multiplier: Scalar | None) -> Scalar:
        """`beta * multiplier`."""
        assert multiplier is not None, "the state has it"
        return beta * multiplier

    def next_multiplier(self, multiplier: Scalar, rate: Scalar) -> Scalar:
        """`multiplier * exp(speed * clip(rate / nats - 1, -1, 1))`."""
        error = jnp.clip(rate / self.nats - 1.0, -1.0, 1.0)
        return jnp.clip(multiplier * jnp.exp(self.speed * error), 1.0 / self.LARGEST, self.LARGEST)

    def ranking(self, objective: float, distortion: float, rate: float) -> float | None:
        """The distortion, where the rate keeps to the target."""
        return distortion if rate <= (1.0 + TOLERANCE) * self.nats else None

    def finding(self, beta: float, rate: float) -> str | None:
        """The rate is far from the target."""
        return _missed(self.nats, rate, f"beta has come to {beta:.3g}")

    def check(self, beta: float, steps: int, least: float, most: float) -> None:
        """The rate is given, and can be had."""
        super().check(beta, steps, least, most)
        self.check_target()
        _check_target(self.nats, least, most)

    def check_target(self) -> None:
        """The rate is given."""
        if not self.nats > 0:
            raise UserError("A target rate must be given: beta_schedule.nats, nats per example, as in TargetRate(20.0).")


def _keep_float(schedule: Capacity | TargetRate) -> None:
    """Whole nats become a float, so that the command line takes floats for them."""
    if isinstance(schedule.nats, int):
        object.__setattr__(schedule, "nats", float(schedule.nats))


def _ramp(step: Scalar, steps: Scalar) -> Scalar:
    """From 0 at step 0 to 1 at `steps`, and 1 from there."""
    return jnp.minimum(step / steps, 1.0)


def _check_shorter(own: int, steps: int, what: str) -> None:
    if own >= steps:
        raise UserError(
            f"beta_schedule.steps {own} must be fewer than the {steps} steps of the whole run; train for more epochs, or "
            f"{what} in fewer steps."
        )


def _check_target(nats: float, least: float, most: float) -> None:
    if nats > most:
        raise UserError(
            f"beta_schedule.nats {nats:g} is more than can be carried, {most:.4g} nats: each latent has the bits of its "
            "type (24 of float32, 8 of bfloat16), and an image those of its pixels. Give a lower rate, or more latents."
        )
    if nats <= least:
        raise UserError(
            f"beta_schedule.nats {nats:g} contradicts free_bits, which leave {least:g} nats without a weight: no beta lowers "
            "the rate that far. Give a higher rate, or fewer free nats."
        )


def _missed(nats: float, rate: float, state: str) -> str | None:
    if abs(rate / nats - 1.0) <= TOLERANCE:
        return None
    if rate < nats:
        remedy = (
            "the network may carry no more: more latents or a wider network help, or a lower target; so does longer training"
        )
    else:
        remedy = "longer training helps, or a start at a larger beta"
    return f"the rate is {rate:.4g} nats where {nats:g} are asked for, and {state}; {remedy}."
