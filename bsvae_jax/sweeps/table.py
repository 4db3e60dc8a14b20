"""The table of a sweep: for programs (CSV), for people (Markdown, a terminal), for the report."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bsvae_jax._io.terminal import aligned
from bsvae_jax.data.image_set import SPLIT_NAMES
from bsvae_jax.sweeps.differences import Difference
from bsvae_jax.sweeps.results import (
    Setting,
    SweepResults,
    best_setting,
    differences_to,
    has_schedules,
    has_several_learning_rates,
    has_several_priors,
    mean_and_deviation,
)

TABLED = (
    "final_beta",
    "objective",
    "rate",
    "distortion",
    "profile_elbo",
    "calibrated_elbo",
    "calibrated_elbo_per_pixel_variance",
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
    "fitted_rate",
    "fitted_calibrated_elbo",
    "fitted_fid",
    "fitted_kid",
    "fitted_lenet_fid",
    "fitted_lenet_kid",
)
"""Quantities of the table; those that no member has are left out. `fitted_`: with a prior of `bsvae fit-prior`."""

HEADINGS = {
    "final_beta": "β at the end",
    "objective": "objective [nats]",
    "rate": "rate [nats]",
    "distortion": "distortion [nats]",
    "profile_elbo": "profile ELBO [nats]",
    "calibrated_elbo": "calibrated ELBO [nats]",
    "calibrated_elbo_difference": "paired difference to the chosen setting [nats]",
    "calibrated_elbo_per_pixel_variance": "calibrated ELBO, σ² per pixel [nats]",
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
    "fitted_rate": "rate, fitted prior [nats]",
    "fitted_calibrated_elbo": "calibrated ELBO, fitted prior [nats]",
    "fitted_fid": "FID, fitted prior",
    "fitted_kid": "KID, fitted prior",
    "fitted_lenet_fid": "FID (LeNet), fitted prior",
    "fitted_lenet_kid": "KID (LeNet), fitted prior",
}


class TableRow(NamedTuple):
    """One setting on one split."""

    setting: Setting
    split: str
    seeds: int
    diverged: int
    cells: dict[str, tuple[float, float]]
    """Quantity to mean and standard deviation over seeds."""
    difference: Difference | None
    """In calibrated ELBO, to `best_setting`; None of that itself, and of other splits than the test set."""


def table_rows(results: SweepResults) -> Iterator[TableRow]:
    """The rows of the table: test first, then training, then validation; every setting once in each."""
    quantities = tabled_quantities(results)
    differences = differences_to(results, best_setting(results)) if results.members else {}
    for split in results.splits:
        for setting, members in results.settings().items():
            cells = {quantity: mean_and_deviation(members, quantity, split) for quantity in quantities}
            difference = differences.get(setting) if split == "test" else None
            yield TableRow(setting, split, len(members), results.diverged.get(setting, 0), cells, difference)


def tabled_quantities(results: SweepResults) -> list[str]:
    """The quantities of the table that some member has."""
    return [name for name in TABLED if any(name in member.report["test"] for member in results.members)]


def as_csv(results: SweepResults) -> str:
    """The table for programs: a row per setting and split, mean and standard deviation of each quantity in full precision.

    Last the mean difference in calibrated ELBO to `best_setting` on the test set and its standard error, as `differences_to`
    has them.
    """
    quantities = tabled_quantities(results)
    names = [f"{quantity}_{what}" for quantity in quantities for what in ("mean", "std")]
    names += ["calibrated_elbo_difference", "calibrated_elbo_difference_standard_error"]
    schedules = has_schedules(results)
    heading = ["beta_schedule"] if schedules else []
    rows = [["split", "decoder_variance", "prior", *heading, "learning_rate", "beta", "seeds", "diverged", *names]]
    for row in table_rows(results):
        variance, prior, rate, beta, schedule = row.setting
        numbers = ["" if math.isnan(value) else repr(value) for quantity in quantities for value in row.cells[quantity]]
        start = [
            row.split,
            variance.name,
            prior.name,
            *([schedule.name] if schedules else []),
            repr(rate),
            repr(beta),
            str(row.seeds),
            str(row.diverged),
        ]
        difference = ["", ""] if row.difference is None else [repr(value) for value in row.difference]
        rows.append([*start, *numbers, *difference])
    return _csv(rows)


def as_json(results: SweepResults) -> list[dict[str, Any]]:
    """The table as plain JSON values, with the names of the kinds; `bsvae report --help` has the fields."""
    return [
        {
            "split": row.split,
            **row.setting._asdict(),
            **{name: getattr(row.setting, name).name for name in ("decoder_variance", "prior", "beta_schedule")},
            "seeds": row.seeds,
            "diverged": row.diverged,
            "quantities": {name: {"mean": mean, "standard_deviation": std} for name, (mean, std) in row.cells.items()},
            "difference": row.difference,
        }
        for row in table_rows(results)
    ]


def members_csv(results: SweepResults) -> str:
    """Every finished member: a row per member and split."""
    quantities = sorted({name for member in results.members for name in member.report["test"]})
    schedules = has_schedules(results)
    heading = ["beta_schedule"] if schedules else []
    rows = [["name", "split", "decoder_variance", "prior", *heading, "learning_rate", "beta", "seed", *quantities]]
    for member in results.members:
        config = member.config
        start = [
            config.decoder_variance.name,
            config.prior.name,
            *([config.beta_schedule.name] if schedules else []),
            repr(config.optimizer.learning_rate),
            repr(config.beta),
            str(config.seed),
        ]
        for split in results.splits:
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
    several, priors, schedules = has_several_learning_rates(results), has_several_priors(results), has_schedules(results)
    rate_heading = ["learning rate"] if several else []
    headings = [
        "model",
        *(["prior"] if priors else []),
        *(["β schedule"] if schedules else []),
        *rate_heading,
        "β",
        "seeds",
        *(HEADINGS[quantity] for quantity in quantities),
    ]
    rows = []
    own = [row for row in table_rows(results) if row.split == split]
    paired = any(row.difference is not None for row in own)
    if paired:
        headings.append(HEADINGS["calibrated_elbo_difference"])
    for row in own:
        setting = row.setting
        seeds = f"{row.seeds}" + (f" ({row.diverged} diverged)" if row.diverged else "")
        rate = [f"{setting.learning_rate:g}"] if several else []
        cells = [display(*row.cells[quantity]) for quantity in quantities]
        prior = [setting.prior.label] if priors else []
        difference = (display(*row.difference) if row.difference else "n/a",) if paired else ()
        schedule = [setting.beta_schedule.label] if schedules else []
        beta = f"from {setting.beta:g}" if setting.beta_schedule.has_multiplier else f"{setting.beta:g}"
        rows.append([setting.decoder_variance.label, *prior, *schedule, *rate, beta, seeds, *cells, *difference])
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
    """The table as Markdown tables, one of each split."""
    parts = []
    for split in results.splits:
        headings, rows = display_rows(results, split)
        lines = [headings, ["---"] * len(headings), *rows]
        title = SPLIT_NAMES[split].capitalize()
        parts.append(
            f"### {title}\n\n{error_bars(headings)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        )
    return "\n".join(parts)


def error_bars(headings: Sequence[str]) -> str:
    """What `±` is in a table of these headings."""
    paired = HEADINGS["calibrated_elbo_difference"] in headings
    differences = "; of paired differences, the standard error over test images and seeds" if paired else ""
    return f"Mean ± standard deviation over seeds{differences}."


def as_text(results: SweepResults) -> str:
    """The test set's table for a terminal, the most telling columns only."""
    headings, rows = display_rows(results, "test")
    shown = (
        *("final_beta", "rate", "profile_elbo", "calibrated_elbo", "calibrated_elbo_difference"),
        *("importance_weighted_bound_dequantized", "psnr", "active_units", "mutual_information", "aggregate_kl"),
        *("fid", "lenet_fid", "fitted_calibrated_elbo", "fitted_fid", "fitted_lenet_fid"),
    )
    kept = [i for i, heading in enumerate(headings) if heading not in HEADINGS.values()]
    kept += [headings.index(HEADINGS[name]) for name in shown if HEADINGS[name] in headings]
    return aligned([[line[i] for i in kept] for line in (headings, *rows)])
