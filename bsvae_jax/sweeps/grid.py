"""A sweep as a value: which members there are, what each is called, and the config that trains it alone."""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bsvae_jax._io.files import as_path
from bsvae_jax.config import (
    CHOICES,
    Config,
    Mixture,
    Prior,
    StandardNormal,
    VampPrior,
    load_module,
    naming_fields,
)
from bsvae_jax.errors import UserError, as_number, check_count, shown
from bsvae_jax.objective import BetaSchedule, Constant, ConstantBeta, DecoderVariance, Optimal, TargetRate


class GridMember(NamedTuple):
    """One run of a sweep."""

    name: str
    """Its folder, `members/NAME`."""
    config: Config
    """What `bsvae train` would be given."""


@dataclass(frozen=True)
class Sweep:
    """The product of settings that a sweep trains, over one base config.

    >>> grid = Sweep(beta=(0.1, 1.0), decoder_variance=(Optimal(), Constant(0.5)), seeds=1)
    >>> [member.name for member in grid.members(Config())][:3]
    ['optimal_beta0.1_seed0', 'optimal_beta1_seed0', 'constant-0.5_beta0.1_seed0']

    Raises:
      UserError: a setting without values or with one twice, or `seeds` < 1.
    """

    beta: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """Weights of the rate; the paper's five."""
    decoder_variance: tuple[DecoderVariance, ...] = (Optimal(), Constant())
    """Decoder-variance models; BS-VAE and the conventional beta-VAE."""
    seeds: int = 5
    """Number of seeds, counted up from the config's."""
    learning_rate: tuple[float, ...] = ()
    """Peak learning rates; empty: the config's own."""
    prior: tuple[Prior, ...] = ()
    """Priors of the latents; empty: the config's own."""
    own_beta: tuple[tuple[DecoderVariance, tuple[float, ...]], ...] = ()
    """Decoder variances with betas of their own in place of `beta`: a constant variance collapses at another one."""
    beta_schedule: tuple[BetaSchedule, ...] = ()
    """Schedules of beta; empty: the config's own. One that finds its beta itself, as `TargetRate`, has one member for all of
    the betas here: it begins at the config's."""

    def __post_init__(self) -> None:
        for name in ("beta", "decoder_variance", "learning_rate", "prior", "beta_schedule"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or (not values and name in ("beta", "decoder_variance")):
                raise UserError(f"A sweep needs at least one {name}, got {shown(values)}.")
            values = tuple(map(as_number, values))
            if not all(isinstance(value, Hashable) for value in values):
                raise UserError(f"{name} must hold numbers or kinds, got {shown(values)}.")
            repeated = [value for index, value in enumerate(values) if value in values[:index]]
            if repeated:
                raise UserError(f"{name} names {repeated[0]!r} twice; every member of a sweep is different.")
        for variance, betas in self.own_beta:
            if variance not in self.decoder_variance or not betas or len(set(betas)) < len(betas):
                raise UserError(
                    f"own_beta gives a decoder variance of the sweep at least one beta, each once; got {betas} of {variance!r}."
                )
        check_count("seeds", self.seeds)

    def members(self, config: Config) -> list[GridMember]:
        """All members, by decoder variance, prior, schedule of beta, learning rate, beta and seed.

        Raises:
          UserError: a value that no `Config` takes, or two members that would have one name.
        """
        rates = self.learning_rate or (config.optimizer.learning_rate,)
        seeds = range(config.seed, config.seed + self.seeds)
        own_beta = dict(self.own_beta)
        schedules = self.beta_schedule or (config.beta_schedule,)
        product = (
            (variance, prior, schedule, *rest)
            for variance, prior, schedule in itertools.product(self.decoder_variance, self.prior or (config.prior,), schedules)
            for rest in itertools.product(rates, _betas(schedule, config, own_beta.get(variance, self.beta)), seeds)
        )
        members = []
        for variance, prior, schedule, rate, beta, seed in product:
            optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
            beta = float(beta) if type(beta) is int else beta  # what is no number is for Config to refuse
            changes: dict[str, Any] = {"decoder_variance": variance, "prior": prior, "beta_schedule": schedule}
            own = dataclasses.replace(config, optimizer=optimizer, beta=beta, seed=seed, **changes)
            members.append(GridMember(member_name(own, config.optimizer.learning_rate), own))
        names = [member.name for member in members]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(
                f"Two members would be called {repeated[0]}: their decoder variances differ in the floor or the start only, "
                "which one sweep cannot hold; use another --workdir for the other."
            )
        return members


def _betas(schedule: BetaSchedule, config: Config, betas: tuple[float, ...]) -> tuple[float, ...]:
    return (config.beta,) if isinstance(schedule, BetaSchedule) and schedule.has_multiplier else betas


def member_name(config: Config, usual_learning_rate: float) -> str:
    """`optimal_beta0.1_seed2`; named as well: other priors than standard normal, schedules, an unusual learning rate."""
    rate = config.optimizer.learning_rate
    unusual = "" if isinstance(config.prior, StandardNormal) else f"_{config.prior.name}"
    unusual += "" if isinstance(config.beta_schedule, ConstantBeta) else f"_{config.beta_schedule.name}"
    unusual += "" if rate == usual_learning_rate else f"_rate{rate:.10g}"
    return f"{config.decoder_variance.name}{unusual}_beta{config.beta:.10g}_seed{config.seed}"


def base_config(config: Config) -> Config:
    """The config with a fixed value for everything that a sweep varies: two sweeps of one base may share a workdir."""
    varied: dict[str, Any] = {"decoder_variance": Optimal(), "prior": StandardNormal(), "beta_schedule": ConstantBeta()}
    return dataclasses.replace(config, beta=1.0, seed=0, **varied)


def choose_variances(
    config: Config,
    default: tuple[DecoderVariance, ...],
    names: Sequence[str] | None,
    variance: Sequence[float] | None,
    over: Sequence[str] | None,
) -> tuple[DecoderVariance, ...]:
    """The decoder-variance models that the command line asks for.

    Args:
      config: whose own model decides the settings (a floor, say) of models of its kind.
      default: of the config file's sweep.
      names: kinds by name; None: those of `default`.
      variance: one `Constant` for each.
      over: one `Optimal` for each.

    Raises:
      UserError: an empty list, or settings of a kind that is not among the models.
    """
    settings = ((Constant, "variance", variance), (Optimal, "over", over))
    return _choose("decoder_variance", config, default, names, settings)


def choose_priors(
    config: Config,
    default: tuple[Prior, ...],
    names: Sequence[str] | None,
    components: Sequence[int] | None,
    pseudo_inputs: Sequence[int] | None,
) -> tuple[Prior, ...]:
    """The priors that the command line asks for.

    Args:
      config: whose own prior decides the settings of priors of its kind.
      default: of the config file's sweep; empty: the config's own.
      names: kinds by name; None: those of `default`.
      components: one `Mixture` for each.
      pseudo_inputs: one `VampPrior` for each.

    Raises:
      UserError: an empty list, or settings of a kind that is not among the priors.
    """
    settings = ((Mixture, "components", components), (VampPrior, "pseudo_inputs", pseudo_inputs))
    return _choose("prior", config, default or (config.prior,), names, settings)


def choose_schedules(
    config: Config,
    default: tuple[BetaSchedule, ...],
    names: Sequence[str] | None,
    nats: Sequence[float] | None,
) -> tuple[BetaSchedule, ...]:
    """The schedules of beta that the command line asks for.

    Args:
      config: whose own schedule decides the settings of schedules of its kind.
      default: of the config file's sweep; empty: the config's own.
      names: kinds by name; None: those of `default`.
      nats: one `TargetRate` for each.

    Raises:
      UserError: an empty list, or settings of a kind that is not among the schedules.
    """
    return _choose("beta_schedule", config, default or (config.beta_schedule,), names, ((TargetRate, "nats", nats),))


def _choose(
    field: str,
    config: Config,
    default: tuple[Any, ...],
    names: Sequence[str] | None,
    settings: Sequence[tuple[type, str, Sequence[Any] | None]],
) -> tuple[Any, ...]:
    """The models of a config's field by name; `settings`: of a kind, the setting of which there is one for each value."""
    option = f"--{field.replace('_', '-')}"
    for suffix, given in (("", names), *((f".{setting.replace('_', '-')}", values) for _, setting, values in settings)):
        if given is not None and not given:
            raise UserError(f"{option}{suffix} needs at least one value.")
    kinds: dict[type, list[Any]] = {}
    if names is None:
        for model in default:
            kinds.setdefault(type(model), []).append(model)
    else:
        for name in names:
            kind = CHOICES[field][name]
            if kind in kinds:
                raise UserError(f"{option} names {name} twice.")
            of_kind = [model for model in (*default, getattr(config, field)) if type(model) is kind]
            kinds[kind] = of_kind[:1] or [kind()]
    for kind, setting, values in settings:
        if values is None:
            continue
        if kind not in kinds:
            called = next(name for name, choice in CHOICES[field].items() if choice is kind)
            raise UserError(f"{option}.{setting.replace('_', '-')} is for {called}, which the sweep does not train.")
        kinds[kind] = [dataclasses.replace(kinds[kind][0], **{setting: value}) for value in values]
    return tuple(model for models in kinds.values() for model in models)


def load_sweep(path: str | Path) -> Sweep:
    """The `Sweep` returned by `get_sweep()` of a config file; the paper's grid where there is none.

    Raises:
      UserError: as `load_config`; or `get_sweep` returns something else.
    """
    module = load_module(as_path(path, "path"), Sweep)
    if not hasattr(module, "get_sweep"):
        return Sweep()
    with naming_fields(as_path(path, "path"), Sweep):
        sweep = module.get_sweep()
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep() of {path} must return a bsvae_jax Sweep, got {type(sweep).__name__}.")
    return sweep
