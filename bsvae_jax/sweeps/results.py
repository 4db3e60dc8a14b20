"""The results of a sweep, read from its folder: members, their means, deviations and differences, and the curves they make."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsvae_jax._io.files import as_path
from bsvae_jax.config import CHOICES, Config, Prior, StandardNormal
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import Report
from bsvae_jax.objective import BetaSchedule, Constant, ConstantBeta, DecoderVariance, Kind, Learned, Optimal, Predicted
from bsvae_jax.sweeps.differences import Difference, paired_difference
from bsvae_jax.sweeps.info import SweepInfo, read_sweep
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.identity import read_run_arrays
from bsvae_jax.training.per_image import read_per_image
from bsvae_jax.training.stopped import final_step, read_failure
from bsvae_jax.training.workdir import read_info

SPLITS = ("test", "train", "validation")
"""In the order of the tables; the last is not always there."""


class MemberResult(NamedTuple):
    """One finished member."""

    name: str
    config: Config
    report: Report
    findings: dict[str, str]
    """What is wrong with the model, by the name of the ailment."""
    pictures: dict[str, np.ndarray]
    """Of `pictures.npz`; empty where it is missing."""
    test_elbo: np.ndarray | None = None
    """Calibrated ELBO of each test image, nats, [N]; None where it was not kept."""

    def value(self, quantity: str, split: str) -> float:
        """A reported number, NaN where there is none."""
        return float(self.report[split][quantity].value) if quantity in self.report[split] else math.nan


class Setting(NamedTuple):
    """What the seeds of one row of the table share."""

    decoder_variance: DecoderVariance
    prior: Prior
    learning_rate: float
    beta: float
    """Of the config: a schedule that finds its beta begins there."""
    beta_schedule: BetaSchedule


class SweepResults(NamedTuple):
    """Everything a report is made of."""

    info: SweepInfo
    members: list[MemberResult]
    """Finished, in the order of the table."""
    failures: dict[str, str]
    """Why members diverged, by name."""
    unfinished: list[str]
    """Members asked for that have neither finished nor diverged."""
    diverged: dict[Setting, int]
    """Number of diverged members of each setting."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of `SPLITS` that the data have."""
        validated = self.members and all("validation" in member.report for member in self.members)
        return SPLITS if validated else SPLITS[:2]

    @property
    def choosing_split(self) -> str:
        """The split on which the best beta is chosen: validation, or test where the data have none for it."""
        return "validation" if "validation" in self.splits else "test"

    def settings(self) -> dict[Setting, list[MemberResult]]:
        """Finished members by setting, sorted by variance, prior, schedule, learning rate and beta; a setting may have none."""
        found: dict[Setting, list[MemberResult]] = {setting: [] for setting in self.diverged}
        for member in self.members:
            found.setdefault(setting_of(member.config), []).append(member)
        return {setting: found[setting] for setting in sorted(found, key=_order)}


def setting_of(config: Config) -> Setting:
    """The setting of a member."""
    return Setting(config.decoder_variance, config.prior, config.optimizer.learning_rate, config.beta, config.beta_schedule)


_VARIANCES = (Optimal, Learned, Predicted, Constant)
"""Decoder variances in the order of tables; those of the user come after them, as their priors do."""


def _order(setting: Setting) -> tuple:
    variance, prior, schedule = setting.decoder_variance, setting.prior, setting.beta_schedule
    priors, schedules = (tuple(CHOICES[name].values()) for name in ("prior", "beta_schedule"))
    places = (*_place(variance, _VARIANCES), *_place(prior, priors), *_place(schedule, schedules))
    return (*places, setting.learning_rate, setting.beta)


def _place(kind: Kind, known: tuple[type, ...]) -> tuple:
    """Kinds as they are listed, then by their numbers, then by name."""
    place = known.index(type(kind)) if type(kind) in known else len(known)
    values = [getattr(kind, field.name) for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return place, [value for value in values if isinstance(value, int | float)], kind.name


def read_results(folder: str | Path) -> SweepResults:
    """Read what a sweep has come to so far.

    >>> read_results("nowhere")
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: nowhere is not a sweep: it has no sweep.json. Give the folder that `bsvae sweep` wrote.

    Raises:
      UserError: not a sweep, damaged files, or no member has finished yet.
    """
    folder = as_path(folder, "folder")
    info = read_sweep(folder)
    members, failures, unfinished = [], {}, []
    diverged: dict[Setting, int] = {}
    present = sorted(path.name for path in (folder / "members").glob("*") if (path / "config.json").is_file())
    for name in [*info.members, *(name for name in present if name not in info.members)]:
        own = folder / "members" / name
        evaluation, report, findings = read_evaluation(own) if name in present else None, {}, {}
        if evaluation is not None and _is_last(own, evaluation.step, info.config.epochs):
            report, findings = evaluation.report, evaluation.findings
        failure = read_failure(own)
        if set(report) >= set(SPLITS[:2]) and (own / "pictures.npz").is_file():
            pictures = read_run_arrays(own / "pictures.npz", "delete it, and `bsvae sweep` makes it again")
            elbo = read_per_image(own, evaluation.step) if evaluation is not None else None
            members.append(MemberResult(name, read_info(own).config, report, findings, pictures, elbo))
        elif failure is not None:
            failures[name] = failure
            setting = setting_of(read_info(own).config)
            diverged[setting] = diverged.get(setting, 0) + 1
        else:
            unfinished.append(name)
    if not members:
        what = f"{len(failures)} diverged, {len(unfinished)} not finished" if failures or unfinished else "there are none"
        raise UserError(f"{folder} has no finished member yet ({what}); `bsvae sweep` continues it.")
    members.sort(key=lambda member: (_order(setting_of(member.config)), member.config.seed))
    return SweepResults(info, members, failures, unfinished, diverged)


def _is_last(folder: Path, step: int, epochs: int) -> bool:
    """Whether the run in `folder`, a member of a sweep of so many epochs, ends with this step; those before went on since."""
    run = read_info(folder)
    if run.train is None:
        return True
    total = steps_through(epochs, run.train, run.config.batch_size)
    return step == (final_step(folder, total) if run.config.epochs == epochs else total)  # a stopped one may be to go on


def mean_and_deviation(members: Sequence[MemberResult], quantity: str, split: str) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; NaN where there are too few."""
    values = np.array([member.value(quantity, split) for member in members])
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan


def best_setting(results: SweepResults) -> Setting:
    """The one of the best mean calibrated ELBO, on the split by which that is chosen."""
    means = {
        setting: mean_and_deviation(members, "calibrated_elbo", results.choosing_split)[0]
        for setting, members in results.settings().items()
    }
    return max(means, key=lambda setting: np.nan_to_num(means[setting], nan=-math.inf))


def differences_to(results: SweepResults, reference: Setting) -> dict[Setting, Difference]:
    """Calibrated ELBO of the test images less that of the reference, of every setting with a seed in common with it.

    Paired: of the same images and the same seeds.
    """
    values: dict[Setting, dict[int, np.ndarray]] = {
        setting: {member.config.seed: member.test_elbo for member in members if member.test_elbo is not None}
        for setting, members in results.settings().items()
    }
    found = {}
    for setting, own in values.items():
        seeds = sorted(own.keys() & values[reference].keys())
        if seeds and setting != reference:
            one, other = (np.stack([of[seed] for seed in seeds]) for of in (own, values[reference]))
            found[setting] = paired_difference(one, other)
    return found


def has_several_learning_rates(results: SweepResults) -> bool:
    """Whether the learning rate is worth a column."""
    return len({setting.learning_rate for setting in results.settings()}) > 1


def has_several_priors(results: SweepResults) -> bool:
    """Whether the prior is worth a column."""
    return len({setting.prior for setting in results.settings()}) > 1


def has_schedules(results: SweepResults) -> bool:
    """Whether the schedule of beta is worth a column."""
    return any(not isinstance(setting.beta_schedule, ConstantBeta) for setting in results.settings())


class Family(NamedTuple):
    """The settings of one decoder-variance model, prior, schedule and learning rate, by ascending beta."""

    name: str
    """For file names."""
    label: str
    model: str
    """The label without the prior."""
    rest: str
    """What the label says beyond the decoder variance and the prior: the schedule and the learning rate, if worth a word."""
    decoder_variance: DecoderVariance
    prior: Prior
    beta_schedule: BetaSchedule
    """Target rates are of one family, with the first of them here."""
    learning_rate: float
    betas: np.ndarray
    """Of target rates, those that training came to, means over seeds."""
    members: list[list[MemberResult]]
    """Finished members (seeds) of each beta; at least one."""


def families(results: SweepResults) -> list[Family]:
    """The curves of every figure: one per decoder-variance model, prior, schedule of beta and learning rate."""
    several, priors = has_several_learning_rates(results), has_several_priors(results)
    grouped: dict[tuple[Any, ...], list[tuple[float, BetaSchedule, list[MemberResult]]]] = {}
    for setting, members in results.settings().items():
        if members:
            beta, schedule = setting.beta, setting.beta_schedule
            group: Any = schedule
            if schedule.has_multiplier:
                beta = float(f"{mean_and_deviation(members, 'final_beta', 'test')[0]:.4g}")
                group = type(schedule)
            grouped.setdefault((*setting[:3], group), []).append((beta, schedule, members))
    found = []
    for (variance, prior, rate, _), points in grouped.items():
        points.sort(key=lambda point: point[0])
        schedule = points[0][1]
        usual = isinstance(prior, StandardNormal)
        name, rest = variance.name + ("" if usual else f"_{prior.name}"), ""
        if not isinstance(schedule, ConstantBeta):
            rest += f", {'target rates' if schedule.has_multiplier else schedule.label}"
            name += f"_{'target_rates' if schedule.has_multiplier else schedule.name}"
        rest += f", learning rate {rate:g}" if several else ""
        name += f"_rate{rate:g}" if several else ""
        label = variance.label + (f", prior: {prior.label}" if priors or not usual else "") + rest
        betas, own = np.array([beta for beta, _, _ in points]), [members for _, _, members in points]
        found.append(Family(name, label, variance.label + rest, rest, variance, prior, schedule, rate, betas, own))
    return found


def collapse_constants(found: Sequence[Family]) -> dict[float, list[MemberResult]]:
    """Members with a constant variance by `2 sigma^2 beta`, the beta of the equivalent objective SSE + beta * KL; ascending."""
    points: dict[float, list[MemberResult]] = {}
    for family in found:
        if isinstance(family.decoder_variance, Constant):
            for beta, members in zip(family.betas, family.members, strict=True):
                key = float(f"{2 * family.decoder_variance.variance * beta:.9g}")
                points.setdefault(key, []).extend(members)
    return dict(sorted(points.items()))
