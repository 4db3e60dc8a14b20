"""The results of a sweep, read from its folder: members, their means and deviations over seeds, and the table."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bsvae_jax._io.files import as_path
from bsvae_jax._io.terminal import aligned
from bsvae_jax.config import CHOICES, Config, Prior, StandardNormal
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import Report
from bsvae_jax.objective import Constant, DecoderVariance, Kind, Learned, Optimal, Predicted
from bsvae_jax.sweeps.fit_sweep import SweepInfo, read_sweep
from bsvae_jax.training.identity import read_run_arrays
from bsvae_jax.training.stopped import read_failure
from bsvae_jax.training.workdir import read_evaluation, read_info

SPLITS = ("test", "train")

TABLED = (
    "objective",
    "rate",
    "distortion",
    "profile_elbo",
    "calibrated_elbo",
    "importance_weighted_bound_dequantized",
    "variance",
    "mse",
    "psnr",
    "active_units",
    "mutual_information",
    "aggregate_kl",
    "fid",
    "kid",
    "lenet_fid",
    "lenet_kid",
)
"""Quantities of the table; those that no member has are left out."""

HEADINGS = {
    "objective": "objective [nats]",
    "rate": "rate [nats]",
    "distortion": "distortion [nats]",
    "profile_elbo": "profile ELBO [nats]",
    "calibrated_elbo": "calibrated ELBO [nats]",
    "importance_weighted_bound_dequantized": "importance-weighted bound, dequantized [nats]",
    "variance": "decoder variance [intensity²]",
    "mse": "mean squared error [intensity²]",
    "psnr": "PSNR [dB]",
    "active_units": "active latents",
    "mutual_information": "I(x; z) [nats]",
    "aggregate_kl": "KL(q(z) ‖ p(z)) [nats]",
    "fid": "FID",
    "kid": "KID",
    "lenet_fid": "FID (LeNet)",
    "lenet_kid": "KID (LeNet)",
}


class MemberResult(NamedTuple):
    """One finished member."""

    name: str
    config: Config
    report: Report
    findings: dict[str, str]
    """What is wrong with the model, by the name of the ailment."""
    pictures: dict[str, np.ndarray]
    """Of `pictures.npz`; empty where it is missing."""

    def value(self, quantity: str, split: str) -> float:
        """A reported number, NaN where there is none."""
        return self.report[split][quantity].value if quantity in self.report[split] else math.nan


class Setting(NamedTuple):
    """What the seeds of one row of the table share."""

    decoder_variance: DecoderVariance
    prior: Prior
    learning_rate: float
    beta: float


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
    def choosing_split(self) -> str:
        """The split on which the best beta is chosen: validation, or test where the data have none for it."""
        return "validation" if all("validation" in member.report for member in self.members) else "test"

    def settings(self) -> dict[Setting, list[MemberResult]]:
        """Finished members by setting, sorted by variance, prior, learning rate and beta; a setting may have none."""
        found: dict[Setting, list[MemberResult]] = {setting: [] for setting in self.diverged}
        for member in self.members:
            found.setdefault(setting_of(member.config), []).append(member)
        return {setting: found[setting] for setting in sorted(found, key=_order)}


def setting_of(config: Config) -> Setting:
    """The setting of a member."""
    return Setting(config.decoder_variance, config.prior, config.optimizer.learning_rate, config.beta)


_VARIANCES = (Optimal, Learned, Predicted, Constant)
"""Decoder variances in the order of tables; those of the user come after them, as their priors do."""


def _order(setting: Setting) -> tuple:
    variance, prior = setting.decoder_variance, setting.prior
    priors: tuple[type, ...] = tuple(CHOICES["prior"].values())
    return (*_place(variance, _VARIANCES), *_place(prior, priors), setting.learning_rate, setting.beta)


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
        evaluation = read_evaluation(own) if name in present else None
        latest = evaluation is not None and evaluation.checkpoint == "latest"
        report, findings = (evaluation.report, evaluation.findings) if evaluation is not None and latest else ({}, {})
        failure = read_failure(own)
        if set(report) >= set(SPLITS) and (own / "pictures.npz").is_file():
            pictures = read_run_arrays(own / "pictures.npz", "delete it, and `bsvae sweep` makes it again")
            members.append(MemberResult(name, read_info(own).config, report, findings, pictures))
        elif failure is not None:
            failures[name] = failure
            setting = setting_of(read_info(own).config)
            diverged[setting] = diverged.get(setting, 0) + 1
        else:
            unfinished.append(name)
    if not members:
        what = f"{len(failures)} diverged, {len(unfinished)} are not finished" if failures or unfinished else "there are none"
        raise UserError(f"{folder} has no finished member yet ({what}); `bsvae sweep` continues it.")
    members.sort(key=lambda member: (_order(setting_of(member.config)), member.config.seed))
    return SweepResults(info, members, failures, unfinished, diverged)


def mean_and_deviation(members: Sequence[MemberResult], quantity: str, split: str) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; NaN where there are too few."""
    values = np.array([member.value(quantity, split) for member in members])
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan


class TableRow(NamedTuple):
    """One setting on one split."""

    setting: Setting
    split: str
    seeds: int
    diverged: int
    cells: dict[str, tuple[float, float]]
    """Quantity to mean and standard deviation over seeds."""


def table_rows(results: SweepResults) -> Iterator[TableRow]:
    """The rows of the table: test first, then training; every setting once in each."""
    quantities = tabled_quantities(results)
    for split in SPLITS:
        for setting, members in results.settings().items():
            cells = {quantity: mean_and_deviation(members, quantity, split) for quantity in quantities}
            yield TableRow(setting, split, len(members), results.diverged.get(setting, 0), cells)


def tabled_quantities(results: SweepResults) -> list[str]:
    """The quantities of the table that some member has."""
    return [name for name in TABLED if any(name in member.report["test"] for member in results.members)]


def has_several_learning_rates(results: SweepResults) -> bool:
    """Whether the learning rate is worth a column."""
    return len({setting.learning_rate for setting in results.settings()}) > 1


def has_several_priors(results: SweepResults) -> bool:
    """Whether the prior is worth a column."""
    return len({setting.prior for setting in results.settings()}) > 1


def as_csv(results: SweepResults) -> str:
    """The table for programs: a row per setting and split, mean and standard deviation of each quantity in full precision."""
    quantities = tabled_quantities(results)
    names = [f"{quantity}_{what}" for quantity in quantities for what in ("mean", "std")]
    rows = [["split", "decoder_variance", "prior", "learning_rate", "beta", "seeds", "diverged", *names]]
    for row in table_rows(results):
        variance, prior, rate, beta = row.setting
        numbers = ["" if math.isnan(value) else repr(value) for quantity in quantities for value in row.cells[quantity]]
        start = [
            row.split,
            variance.name,
            prior.name,
            repr(rate),
            repr(beta),
            str(row.seeds),
            str(row.diverged),
        ]
        rows.append([*start, *numbers])
    return _csv(rows)


def members_csv(results: SweepResults) -> str:
    """Every finished member: a row per member and split."""
    quantities = sorted({name for member in results.members for name in member.report["test"]})
    rows = [["name", "split", "decoder_variance", "prior", "learning_rate", "beta", "seed", *quantities]]
    for member in results.members:
        config = member.config
        start = [
            config.decoder_variance.name,
            config.prior.name,
            repr(config.optimizer.learning_rate),
            repr(config.beta),
            str(config.seed),
        ]
        for split in SPLITS:
            numbers = [repr(member.value(quantity, split)) for quantity in quantities]
            rows.append([member.name, split, *start, *numbers])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def display_rows(results: SweepResults, split: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one split's table for people: `mean ± standard deviation` to the digits that it leaves."""
    quantities = tabled_quantities(results)
    several, priors = has_several_learning_rates(results), has_several_priors(results)
    rate_heading = ["learning rate"] if several else []
    headings = [
        "decoder variance",
        *(["prior"] if priors else []),
        *rate_heading,
        "β",
        "seeds",
        *(HEADINGS[quantity] for quantity in quantities),
    ]
    rows = []
    for row in table_rows(results):
        if row.split != split:
            continue
        setting = row.setting
        seeds = f"{row.seeds}" + (f" ({row.diverged} diverged)" if row.diverged else "")
        rate = [f"{setting.learning_rate:g}"] if several else []
        cells = [display(*row.cells[quantity]) for quantity in quantities]
        prior = [setting.prior.label] if priors else []
        rows.append([setting.decoder_variance.label, *prior, *rate, f"{setting.beta:g}", seeds, *cells])
    return headings, rows


def display(mean: float, deviation: float) -> str:
    """`12.34 ± 0.05`: the deviation to two digits, the mean to the same place; five digits where there is no deviation.

    >>> display(12.3456, 0.0512), display(0.0051234, math.nan), display(3.0, 0.0), display(math.nan, math.nan)
    ('12.346 ± 0.051', '0.0051234', '3 ± 0', 'n/a')
    """
    if math.isnan(mean):
        return "n/a"
    if math.isnan(deviation):
        return f"{mean:.5g}"
    if deviation == 0:
        return f"{mean:.5g} ± 0"
    places = max(0, 1 - math.floor(math.log10(deviation)))
    if places > 6:
        return f"{mean:.5g} ± {deviation:.2g}"
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def as_markdown(results: SweepResults) -> str:
    """The table as two Markdown tables, test and training."""
    parts = []
    for split in SPLITS:
        headings, rows = display_rows(results, split)
        lines = [headings, ["---"] * len(headings), *rows]
        title = "Test set" if split == "test" else "Training set"
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def as_text(results: SweepResults) -> str:
    """The test set's table for a terminal, the most telling columns only."""
    headings, rows = display_rows(results, "test")
    shown = (
        *("rate", "profile_elbo", "calibrated_elbo", "psnr", "active_units", "mutual_information", "aggregate_kl"),
        *("fid", "lenet_fid"),
    )
    kept = [i for i, heading in enumerate(headings) if heading not in HEADINGS.values()]
    kept += [headings.index(HEADINGS[name]) for name in shown if HEADINGS[name] in headings]
    return aligned([[line[i] for i in kept] for line in (headings, *rows)])


class Family(NamedTuple):
    """The settings of one decoder-variance model, prior and learning rate, by ascending beta."""

    name: str
    """For file names."""
    label: str
    decoder_variance: DecoderVariance
    prior: Prior
    betas: np.ndarray
    members: list[list[MemberResult]]
    """Finished members (seeds) of each beta; at least one."""


def families(results: SweepResults) -> list[Family]:
    """The curves of every figure: one per decoder-variance model, prior and learning rate."""
    several, priors = has_several_learning_rates(results), has_several_priors(results)
    grouped: dict[tuple[DecoderVariance, Prior, float], list[tuple[float, list[MemberResult]]]] = {}
    for setting, members in results.settings().items():
        if members:
            grouped.setdefault(setting[:3], []).append((setting.beta, members))
    found = []
    for (variance, prior, rate), points in grouped.items():
        usual = isinstance(prior, StandardNormal)
        label = variance.label + (f", prior: {prior.label}" if priors or not usual else "")
        label += f", learning rate {rate:g}" if several else ""
        name = variance.name + ("" if usual else f"_{prior.name}") + (f"_rate{rate:g}" if several else "")
        found.append(
            Family(name, label, variance, prior, np.array([beta for beta, _ in points]), [members for _, members in points])
        )
    return found


def collapse_constants(found: Sequence[Family]) -> list[tuple[float, list[MemberResult]]]:
    """Members with a constant variance by `2 sigma^2 beta`, the beta of the equivalent objective SSE + beta * KL; ascending."""
    points: dict[float, list[MemberResult]] = {}
    for family in found:
        if isinstance(family.decoder_variance, Constant):
            for beta, members in zip(family.betas, family.members, strict=True):
                key = float(f"{2 * family.decoder_variance.variance * beta:.9g}")
                points.setdefault(key, []).extend(members)
    return sorted(points.items())
