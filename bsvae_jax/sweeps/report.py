"""The report of a sweep: table, figures and one self-contained page, from the files in its folder alone."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bsvae_jax import theory
from bsvae_jax._io.files import as_path, write_atomically
from bsvae_jax.config import StandardNormal
from bsvae_jax.data.image_set import SPLIT_NAMES
from bsvae_jax.evaluation.metrics import CONDITIONAL
from bsvae_jax.evaluation.plots import drawn_as_lines, save_all
from bsvae_jax.objective import Constant, Optimal, quantization_variance
from bsvae_jax.sweeps import plots
from bsvae_jax.sweeps.curves import (
    against_rate,
    as_curve,
    beta_names,
    collapsed,
    compare_with_theory,
    constant_grid,
    families_alike,
    largest_disagreement,
    member_values,
    points_of,
    prior_panels,
    readings,
    shannon,
)
from bsvae_jax.sweeps.page import Picture, page
from bsvae_jax.sweeps.plots import Curve, Line
from bsvae_jax.sweeps.results import (
    Family,
    SweepResults,
    best_setting,
    differences_to,
    families,
    mean_and_deviation,
    read_results,
    setting_of,
)
from bsvae_jax.sweeps.table import HEADINGS, as_csv, as_markdown, display, members_csv, tabled_quantities


def write_report(folder: str | Path) -> list[Path]:
    """Write `table.csv`, `table.md`, `members.csv`, `figures/*.png`, `figures/*.pdf` and `report.html` into a sweep's folder.

    Works on what has finished so far and says what has not.

    Returns:
      The files written; a PDF lies beside each PNG.

    >>> write_report("nowhere")
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: nowhere is not a sweep: it has no sweep.json. Give the folder that `bsvae sweep` wrote.

    Raises:
      UserError: not a sweep, or nothing has finished yet.
    """
    folder = as_path(folder, "folder")
    results = read_results(folder)
    texts = {
        "table.csv": as_csv(results),
        "members.csv": members_csv(results),
        "table.md": f"{status(results)}\n\n{as_markdown(results)}",
    }
    paths = []
    for name, text in texts.items():
        paths.append(folder / name)
        write_atomically(paths[-1], text.encode())
    pictures = draw(results)
    files = save_all({name: picture.figure for name, picture in pictures.items()}, folder / "figures")
    images = {file.stem: file.read_bytes() for file in files}
    paths += [*files, folder / "report.html"]
    write_atomically(paths[-1], page(results, [status(results), *sentences(results)], pictures, images).encode())
    return paths


def status(results: SweepResults) -> str:
    """How much of the sweep the report covers."""
    total = len(results.members) + len(results.failures) + len(results.unfinished)
    text = f"{len(results.members)} of {total} members finished"
    if results.failures:
        text += f", {len(results.failures)} diverged"
    if results.unfinished:
        count = len(results.unfinished)
        text += f"; {count} {'is' if count == 1 else 'are'} still to be trained (`bsvae sweep` continues)"
    if (source := results.info.started_from) is not None:
        text += f"; all began with the weights of {source['workdir']} (step {source['step']})"
    return text + "."


def sentences(results: SweepResults) -> list[str]:
    """What the report says beside the table, in sentences."""
    conditional = [] if results.info.config.classes is None else [CONDITIONAL]
    return [*best_beta(results), *differences(results), *findings(results), *conditional]


def best_beta(results: SweepResults) -> list[str]:
    """A sentence per model of several betas: which has the best calibrated likelihood, on which split it was chosen."""
    found, split = [], results.choosing_split
    if split == "test":
        chosen = "on the test set, {} nats (chosen on that set; a finer grid may have a better one)"
    else:
        chosen = "on the validation images, by which it is chosen, and {} nats on the test set"
    for family in families(results):
        if len(family.betas) < 2:
            continue
        best = _best(family, split)
        value = display(*mean_and_deviation(family.members[best], "calibrated_elbo", "test"))
        where = chosen.format(value)
        found.append(
            f"{family.label}: of {len(family.betas)} values, β = {family.betas[best]:g} has the best calibrated ELBO {where}."
        )
    return found


def _best(family: Family, split: str) -> int:
    """Index of the beta of the best calibrated ELBO on a split."""
    return int(np.argmax([mean_and_deviation(own, "calibrated_elbo", split)[0] for own in family.members]))


def differences(results: SweepResults) -> list[str]:
    """A sentence that compares the best setting of every model with the best of all, image by image; none of one model."""
    reference = best_setting(results)
    found, parts, base = differences_to(results, reference), [], ""
    for family in families(results):
        best = _best(family, results.choosing_split)
        setting, name = setting_of(family.members[best][0].config), f"{family.label} at β = {family.betas[best]:g}"
        difference = found.get(setting)
        if setting == reference:
            base = name
        elif difference is not None:
            parts.append(f"{name}: {display(*difference)}")
    if not parts:
        return []
    unit = "nats (± standard error over images and seeds)"
    return [f"Calibrated ELBO of the test set less that of {base}, paired by image and seed: {'; '.join(parts)} {unit}."]


def findings(results: SweepResults) -> list[str]:
    """A sentence per ailment: how many members have it, and at which beta of which model."""
    found = []
    for name in dict.fromkeys(name for member in results.members for name in member.findings):
        models, total = [], 0
        for family in families(results):
            betas = []
            for beta, own in points_of(family):
                count = sum(name in member.findings for member in own)
                total += count
                if count:
                    betas.append(f"{beta:g}" + (f" ({count} of {len(own)} seeds)" if count < len(own) else ""))
            if betas:
                models.append(f"{family.label} at β = {' and '.join(filter(None, [', '.join(betas[:-1]), betas[-1]]))}")
        found.append(f"{name.capitalize()} in {total} of {len(results.members)} members: {'; '.join(models)}.")
    return found


# --- Curves -----------------------------------------------------------------------------------------------------------


def _rate_distortion(results: SweepResults) -> Picture:
    split, found = "test", families(results)
    panels = prior_panels(found)
    curves = [_hinted(curve, "distortion") for curve in readings(results, split)]
    errors = [
        _hinted(against_rate(family, "mse", split, panel), "mean squared error")
        for prior, panel in panels.items()
        for family in found
        if family.prior == prior
    ]
    reference = shannon(results, max(float(curve.x.max()) for curve in curves))
    nats, squares = [], []
    if reference is not None:
        rates, mse = reference
        variance = mse + quantization_variance(results.info.bin_width)
        pixels = math.prod(results.info.image_shape)
        label = "Shannon's R(D) of a Gaussian"
        nats = [Line(label, rates, 0.5 * pixels * (np.log(2 * np.pi * variance) + 1))]
        squares = [Line(label, rates, mse)]
    several = len(panels) > 1
    first, second = ("Above", "Below") if several else ("Left", "Right")
    caption = (
        f"Rate and distortion on {results.info.data_name}, test set, mean over seeds; bars of one standard deviation, where "
        f"they reach beyond the marker. {first}: a β-VAE with a constant variance has another likelihood under each reading of "
        "its σ²; BS-VAE has one. With an optimal σ² it is a profile likelihood, no density, to be compared with its like "
        f"alone; the table has calibrated ones. {second}: squared error, which needs no reading. The dashed line, Shannon's "
        "R(D), is the best that any model could do on Gaussian data of the same covariance, with one variance for all images; "
        "structure beyond the covariance and a variance per image may pass below it."
    )
    alt = (
        f"Two panels{f' for each of {len(panels)} priors' if several else ''}: distortion in nats and mean squared error "
        f"against the rate, a point for each β of {len(curves)} readings and of {len(errors)} models, beside Shannon's bound "
        "where it is known."
    )
    figure = plots.rate_distortion(curves, errors, nats, squares)
    return Picture(figure, alt, caption, plots.places(figure, [*plots.by_panel(curves), *plots.by_panel(errors)]))


def _hinted(curve: Curve, quantity: str) -> Curve:
    """The curve with what a page says of its points, which have their beta as a hint."""
    hints, name = [], f"{curve.label}, {curve.panel}" if curve.panel else curve.label
    for index, (beta, gone) in enumerate(zip(curve.hints, curve.collapsed, strict=True)):
        rate = display(curve.x[index], curve.x_deviation[index] or math.nan)
        other = display(curve.y[index], curve.y_deviation[index] or math.nan)
        hints.append(f"{name}, {beta}: rate {rate}, {quantity} {other}" + (", collapsed" if gone else ""))
    return curve._replace(hints=hints)


def _metrics(results: SweepResults) -> Picture:
    panels: dict[str, list[Curve]] = {}
    found = families(results)
    priors = list(prior_panels(found))
    models = list(dict.fromkeys(family.model for family in found))
    for quantity in tabled_quantities(results):
        panels[HEADINGS[quantity]] = [
            as_curve(
                f"{family.label}, {SPLIT_NAMES[split]}",
                [(np.full(len(own), beta), member_values(own, quantity, split)) for beta, own in points_of(family)],
            )._replace(
                family=models.index(family.model),
                marker=priors.index(family.prior) if len(priors) > 1 else None,
                dashed=split == "train",
                collapsed=[collapsed(own) for own in family.members],
            )
            for family in found
            for split in ("test", "train")
        ]
    caption = (
        f"Every quantity of the table against β on {results.info.data_name}. Objective and distortion are each model's own and "
        "cannot be compared between models; profile and calibrated likelihood can, each among its kind. Means over seeds, with "
        "bars of one standard deviation, where they reach beyond the marker; lines between points guide the eye only."
    )
    alt = f"{len(panels)} panels, a quantity of the table each, against β: a line per model and split."
    return Picture(plots.metrics_against_beta(panels), alt, caption)


def _as_shown(values: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """What `pictures.npz` holds as figures take it: pictures in [0, 1], scaled by the originals if they are no images."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255.0
    if drawn_as_lines(originals.shape[1:]):
        return values
    low, high = float(originals.min()), float(originals.max())
    return (values - low) / max(high - low, 1e-30)


def _galleries(results: SweepResults) -> dict[str, Picture]:
    drawn = {}
    for family in families(results):
        first = [own[0] for own in family.members]
        pictures = {
            name: _as_shown(np.stack([member.pictures[name] for member in first]), first[0].pictures["originals"])
            for name in ("originals", "reconstructions", "samples")
        }
        labels = [f"β = {beta:g}" for beta in family.betas]
        if family.beta_schedule.has_multiplier:  # of the seed whose pictures these are
            labels = [f"β = {member.value('final_beta', 'test'):.4g}" for member in first]
        figure = plots.pictures_by_beta(pictures["originals"][0], pictures["reconstructions"], pictures["samples"], labels)
        alt = f"{family.label}: originals, and a row of reconstructions and samples for each of {len(labels)} β."
        caption = (
            f"{family.label}: decoder means of one posterior sample of each test example (left) and of samples of the prior "
        )
        caption += "(right), first seed."
        caption += " Middle slices." if len(results.info.image_shape) > 3 else ""
        drawn[f"pictures_{family.name}"] = Picture(figure, alt, caption)
    return drawn


def _latent_rates(results: SweepResults) -> Picture:
    rates = {}
    for family in families(results):
        sorted_rates = [
            np.mean([np.sort(member.pictures["latent_rate"])[::-1] for member in own], axis=0) for own in family.members
        ]
        rates[family.label] = (family.betas, np.stack(sorted_rates), [collapsed(own) for own in family.members])
    caption = (
        f"Rate of each latent on the test set of {results.info.data_name}, sorted within a model and averaged over seeds: how "
        "many latents β leaves active."
    )
    alt = f"A panel for each of {len(rates)} models: the rates of its latents, sorted, against β."
    if any(not isinstance(family.prior, StandardNormal) for family in families(results)):
        caption += (
            " The rate of a prior that is not standard normal does not fall into latents; there it is KL(q(z|x) ‖ N) with the "
            "mean and variance that each latent has over the set, which bounds what it says of the image from above."
        )
    return Picture(plots.latent_rates(rates), alt, caption)


# --- The grid of beta and sigma^2 -------------------------------------------------------------------------------------


def _beta_variance(results: SweepResults) -> dict[str, Picture]:
    error = "psnr" if "psnr" in tabled_quantities(results) else "mse"
    quantities = {"rate": "rate [nats per image]", error: HEADINGS[error]}
    betas, variances, rates = constant_grid(results, "rate")
    if len(variances) < 2 or len(betas) < 2:
        return {}
    values = {label: constant_grid(results, quantity)[2] for quantity, label in quantities.items()}
    others: dict[str, Mapping[str, np.ndarray]] = {}
    collapse = []
    alike = families_alike(results)
    for family in alike:
        positive = [(beta, own) for beta, own in points_of(family) if beta > 0]
        if isinstance(family.decoder_variance, Constant):
            products = [np.full(len(own), beta * family.decoder_variance.variance) for beta, own in positive]
            label = f"σ² = {family.decoder_variance.variance:g}"
        else:
            products = [beta * member_values(own, "variance", "train") for beta, own in positive]
            label = family.decoder_variance.label
            by_beta = dict(points_of(family))
            others[label.replace(", ", ",\n")] = {
                name: np.array([mean_and_deviation(by_beta.get(beta, []), quantity, "test")[0] for beta in betas])
                for quantity, name in quantities.items()
            }
        rates_of = [member_values(own, "rate", "test") for _, own in positive]
        curve = as_curve(label, list(zip(products, rates_of, strict=True)))
        collapse.append(curve._replace(collapsed=[collapsed(own) for _, own in positive]))
    worst, count = largest_disagreement(betas, variances, rates)
    what = alike[0].label.removeprefix(alike[0].decoder_variance.label)  # prior, schedule and learning rate
    caption = f"β against σ² on the test set of {results.info.data_name}{what}. "
    caption += "A constant σ² and β act through their product alone. "
    if count:
        caption += f"Along the diagonals, where β·σ² is equal, the rates differ by at most {100 * worst:.2g}%. "
    if any(isinstance(family.decoder_variance, Optimal) for family in alike):
        caption += "The optimal variance has no such trade: β alone decides, and σ² follows the data."
    figure = plots.beta_variance_grid(betas, variances, values, others, collapse)
    alt = f"Tables of rate and error over {len(betas)} β and {len(variances)} constant σ², and the rate against β·σ²."
    return {"beta_variance": Picture(figure, alt, caption)}


# --- Linear models against theory -------------------------------------------------------------------------------------


def _linear_theory(results: SweepResults) -> dict[str, Picture]:
    comparison = compare_with_theory(results)
    if comparison is None:
        return {}
    betas, active, measured, expected = comparison
    live = active > 0
    deviations = {name: np.abs(measured[name][live] / expected[name][live] - 1) for name in ("rate", "mse")}
    eigenvalues = results.info.eigenvalues
    reference = shannon(results, float(expected["rate"].max()))
    assert eigenvalues is not None, "there is a comparison only with a spectrum"
    assert reference is not None, "and data of no variance have no active latent"
    dense = np.geomspace(betas.min(), betas.max(), 200)
    floor = quantization_variance(results.info.bin_width)
    latents = results.info.config.latent_size
    optima = [theory.linear_optimum(eigenvalues, latents, float(beta), floor) for beta in dense]
    lines = [
        Line("Shannon's R(D)", *reference),
        Line(
            f"optimum with {latents} latents",
            np.array([optimum.rate for optimum in optima]),
            np.array([optimum.variance - floor for optimum in optima]),
        ),
    ]
    nothing = np.zeros(len(betas))
    curve = Curve("trained", measured["rate"], measured["mse"], nothing, nothing, tuple(beta_names(betas.tolist())))
    figure = plots.linear_theory(
        [curve],
        lines,
        {"rate": (betas[live], deviations["rate"]), "mean squared error": (betas[live], deviations["mse"])},
    )
    caption = f"Linear members with one optimal variance on {results.info.data_name}, training set, against the exact optimum. "
    alt = "Left: trained linear models on the rate-distortion curves of theory. Right: their deviation from it against β."
    if live.any():
        caption += (
            f"Largest deviation where theory has an active latent ({int(live.sum())} of {len(betas)} β): rate "
            f"{100 * deviations['rate'].max():.2g}%, mean squared error {100 * deviations['mse'].max():.2g}%; objective "
            f"{np.abs(measured['objective'] - expected['objective']).max():.2g} nats over all β."
        )
    return {"linear_theory": Picture(figure, alt, caption)}


def draw(results: SweepResults) -> dict[str, Picture]:
    """Every figure of the report by its file name."""
    return {
        "rate_distortion": _rate_distortion(results),
        "metrics": _metrics(results),
        **_beta_variance(results),
        **_linear_theory(results),
        **_galleries(results),
        "latent_rates": _latent_rates(results),
    }
