"""Pictures of an evaluation: runs the model where that is still needed and hands the arrays to `evaluation_figures`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from bsvae_jax.config import StandardNormal
from bsvae_jax.data import ImageSet
from bsvae_jax.data.image_set import SPLIT_NAMES, to_unit_interval
from bsvae_jax.evaluation import diagnostic_plots, plots, residuals
from bsvae_jax.evaluation.evaluate import Evaluated, SplitEvaluation, bound_name
from bsvae_jax.evaluation.figures import title_of
from bsvae_jax.evaluation.metrics import mean_quantity
from bsvae_jax.evaluation.nearest_neighbors import nearest_images
from bsvae_jax.evaluation.sampling import classes_in_turn, sample_prior
from bsvae_jax.evaluation.scores import split_key
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.random import make_key

EXTREMES = 16
"""Images shown of the least and of the greatest variance."""
INTERPOLATED = 5
"""Pairs of images between which is interpolated."""
STEPS = 11
COMPARED = 300
"""Samples and held-out images compared with the training set."""
DENSITY_BINS = 4
"""Bins of the residuals taken together in their density."""
PLOTTED = 1500
"""Latents plotted of each prior."""
DECODED = 64
"""Of them, those whose images are shown."""
SHOWN = 20
"""Samples shown above their nearest training images."""
ATTRIBUTES_SHOWN = 6
"""Attributes by which the latent space is colored: those that it separates best."""
BOUND_LABELS = {
    "importance_weighted_bound": "calibrated σ²",
    "importance_weighted_bound_dequantized": "calibrated σ², dequantized",
    "own_importance_weighted_bound": "the model's σ²",
    "own_importance_weighted_bound_dequantized": "the model's σ², dequantized",
}


def draw(run: Restored, images: ImageSet, evaluated: Evaluated, workdir: Path) -> list[Path]:
    """All figures of an evaluation, in `workdir/figures`: the PNG files; a PDF lies beside each."""
    title = title_of(run, images)
    drawn: dict[str, Any] = {
        "interpolations": _interpolations(run, images, title),
        "nearest_neighbors": _neighbors(run, images, title),
    }
    for split, parts in evaluated.splits.items():
        own = f"{title}, {SPLIT_NAMES[split]}"
        drawn[f"residuals_{split}"] = _residuals(parts, own)
        drawn[f"variance_maps_{split}"] = diagnostic_plots.variance_maps(
            images.as_shown(images.mean_image), parts.scores.pixel_squared_error, evaluated.calibration.variance_per_pixel, own
        )
        drawn[f"variance_by_difficulty_{split}"] = _difficulty(images, split, parts, evaluated, own)
        drawn[f"rate_parts_{split}"] = _rate(parts, own)
        drawn |= _latent_space(images, split, parts, own)
        if parts.bound is not None:
            names = [BOUND_LABELS[bound_name(density)] for density in parts.densities]
            curves = dict(zip(names, parts.bound.curve, strict=True))
            drawn[f"likelihood_{split}"] = diagnostic_plots.likelihood_curves(curves, own)
    return plots.save_all(drawn, workdir / "figures")


def draw_fitted(run: Restored, fitted: Restored, images: ImageSet, evaluated: Evaluated, workdir: Path) -> Path:
    """The aggregate posterior beside both priors, and what they decode to: `workdir/figures/fitted_prior.png`.

    Args:
      run: as it was trained.
      fitted: the same run with its fitted prior.
      images: of its data.
      evaluated: of `run`.
      workdir: of the run.
    """
    parts = evaluated.splits.get("test") or next(iter(evaluated.splits.values()))
    chosen = np.random.default_rng(0).permutation(len(parts.per_image.z))[:PLOTTED]
    aggregate = parts.per_image.z
    mean = aggregate.mean(axis=0)
    _, _, axes = np.linalg.svd(aggregate - mean, full_matrices=False)
    latents = {"aggregate posterior q(z)": aggregate[chosen]}
    for name, own in (("the model's prior p(z)", run), ("the fitted prior", fitted)):
        drawn: Any = own.model.apply(own.variables, make_key(run.config.seed), PLOTTED, method="sample_latents")
        latents[name] = np.asarray(drawn, np.float64)
    decode = jax.jit(run.model.apply, static_argnames="method")

    def decoded(z: np.ndarray) -> np.ndarray:
        # The same classes for all, in turn: what differs between the pictures is the prior.
        shown = jnp.asarray(z[:DECODED], jnp.float32)
        classes = np.resize(classes_in_turn(run), len(shown)) if run.config.classes else None
        return images.as_shown(np.asarray(decode(run.variables, shown, labels=classes, method="decode").mean))

    pictures = {name: decoded(z) for name, z in latents.items()}
    plane = np.zeros((2, aggregate.shape[1])) if aggregate.shape[1] < 2 else axes[:2]
    if aggregate.shape[1] < 2:  # one latent: its values against their order
        plane[0, 0] = 1.0
    points = {name: (z - mean) @ plane.T for name, z in latents.items()}
    together = np.concatenate(list(points.values()))
    reach = np.quantile(together, 0.002, axis=0) - 0.5, np.quantile(together, 0.998, axis=0) + 0.5
    title = title_of(run, images)
    figure = diagnostic_plots.prior_and_posterior(points, pictures, reach, f"Latents and what they decode to; {title}")
    (path,) = plots.save_all({"fitted_prior": figure}, workdir / "figures")
    return path


def _residuals(parts: SplitEvaluation, title: str) -> Any:
    normal_quantiles = np.linspace(-4.0, 4.0, 201)
    probabilities = np.asarray(norm.cdf(normal_quantiles), np.float64)
    widths = np.linspace(0.02, 4.0, 200)
    count = residuals.BINS // DENSITY_BINS
    width = 2 * residuals.LIMIT / count
    bins = (np.arange(count) + 0.5) * width - residuals.LIMIT
    counts = dict(zip(residuals.STANDARDIZED_BY, parts.per_image.residuals, strict=True))
    quantiles = {name: residuals.residual_quantiles(row, probabilities) for name, row in counts.items()}
    known = residuals.LIMIT - 1 / residuals.BINS_PER_UNIT  # the outermost bins hold all that lies beyond
    return diagnostic_plots.residual_calibration(
        normal_quantiles,
        {name: np.where(np.abs(values) < known, values, np.nan) for name, values in quantiles.items()},
        np.asarray(2 * norm.cdf(widths) - 1),
        {name: residuals.residual_coverage(row, widths) for name, row in counts.items()},
        {name: (row.reshape(count, -1).sum(axis=1) / row.sum() / width)[1:-1] for name, row in counts.items()},
        bins[1:-1],
        f"Residuals (x + u − μ) / σ; {title}",
    )


def _difficulty(images: ImageSet, split: str, parts: SplitEvaluation, evaluated: Evaluated, title: str) -> Any:
    variance = parts.scores.squared_error.mean(axis=0) / parts.scores.pixels + evaluated.calibration.floor
    stored, mean = getattr(images, split), images.mean_image

    def at(positions: np.ndarray) -> np.ndarray:
        return np.asarray(to_unit_interval(stored[positions], images.levels))

    parts_of_split = np.split(np.arange(len(stored)), range(1000, len(stored), 1000))
    difficulty = np.concatenate([np.square(at(part) - mean).reshape(len(part), -1).mean(axis=1) for part in parts_of_split])
    order = np.argsort(variance)
    return diagnostic_plots.variance_by_difficulty(
        variance,
        difficulty,
        parts.scores.rate.mean(axis=0),
        evaluated.calibration.variance,
        images.as_shown(at(order[:EXTREMES])),
        images.as_shown(at(order[-EXTREMES:])),
        title,
    )


def _rate(parts: SplitEvaluation, title: str) -> Any:
    def mean(values: np.ndarray) -> tuple[float, float]:
        quantity = mean_quantity(values, "nats", "")
        return quantity.value, quantity.standard_error or 0.0

    split, total = parts.rate, parts.scores.rate
    bars = {"rate": mean(total), "mutual information I(x; z)": mean(split.mutual_information)}
    bars["KL(q(z) ‖ p(z))"] = mean(split.aggregate_kl)
    standard_normal = parts.scores.aggregate_variance is None
    own = "rate: KL(q(z|x) ‖ p(z))" if standard_normal else "KL(q(z|x) ‖ Gaussian of the moments of q(z))"
    latents = {own: parts.scores.latent_rate}
    if split.total_correlation is not None and split.dimension_kl is not None:
        bars |= {
            "of it total correlation": mean(split.total_correlation),
            "of it dimension-wise KL": mean(split.dimension_kl.sum(axis=1)),
        }
        latents["dimension-wise: KL(q(z) ‖ p(z))"] = split.dimension_kl.mean(axis=0)
    return diagnostic_plots.rate_decomposition(bars, latents, float(np.log(total.shape[-1])), title)


def _latent_space(images: ImageSet, split: str, parts: SplitEvaluation, title: str) -> dict[str, Any]:
    """The posterior means by class or attribute; nothing where the data have neither."""
    labels: np.ndarray | None = getattr(images, f"{split}_labels")
    means = parts.scores.posterior_mean
    if labels is None or means.shape[1] < 2:
        return {}
    centered = means - means.mean(axis=0)
    _, spread, axes = np.linalg.svd(centered, full_matrices=False)
    points, shares = centered @ axes[:2].T, (spread**2 / max(float((spread**2).sum()), 1e-30))[:2].tolist()
    if labels.ndim == 1:
        names = images.label_names or tuple(str(number) for number in range(int(labels.max()) + 1))
        panels = {"class": (labels, names)}
    else:
        best = np.argsort(-_separation(points, labels))[:ATTRIBUTES_SHOWN].tolist()
        panels = {images.label_names[number]: (labels[:, number].astype(int), ("no", "yes")) for number in best}
    return {f"latent_space_{split}": diagnostic_plots.latent_space(points, shares, panels, title)}


def _separation(points: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Share of the variance of points [N, 2] that lies between those with and those without an attribute, [A]."""
    share = attributes.mean(axis=0)
    with_it = attributes.T.astype(np.float64) @ points / np.maximum(attributes.sum(axis=0), 1)[:, None]
    # The other mean follows from the total of zero.
    return (
        np.sum(with_it**2, axis=1)
        * share
        / np.maximum(1 - share, 1e-12)
        / max(float(np.square(points).sum(axis=1).mean()), 1e-30)
    )


def spherical(one: np.ndarray, other: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Spherical interpolation (Shoemake 1985) between two vectors [L], their lengths interpolated linearly, [steps, L]."""
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    ends = one / max(lengths[0], 1e-12), other / max(lengths[1], 1e-12)
    angle = np.arccos(np.clip(ends[0] @ ends[1], -1.0, 1.0))
    if np.sin(angle) < 1e-6:  # one direction, or opposite ones: no plane to turn in
        return linear(one, other, shares)
    share = shares[:, None]
    direction = (np.sin((1 - share) * angle) * ends[0] + np.sin(share * angle) * ends[1]) / np.sin(angle)
    return direction * ((1 - share) * lengths[0] + share * lengths[1])


def linear(one: np.ndarray, other: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Straight interpolation between two vectors [L], [steps, L]."""
    return (1 - shares[:, None]) * one + shares[:, None] * other


def _interpolations(run: Restored, images: ImageSet, title: str) -> Any:
    pairs = min(INTERPOLATED, len(images.test) // 2)
    x, labels = images.examples("test", run.config.classes, 2 * pairs).inputs()
    apply = jax.jit(run.model.apply, static_argnames="method")
    ends = np.asarray(apply(run.variables, x, labels=labels, method="encode").mean, np.float64)
    shares = np.linspace(0.0, 1.0, STEPS)
    # Arcs around the origin keep to where N(0, I) has its mass; of another prior nothing is known.
    ways = {"linear": linear} | ({"spherical": spherical} if isinstance(run.model.prior, StandardNormal) else {})
    paths = [path(ends[i], ends[i + 1], shares) for i in range(0, 2 * pairs, 2) for path in ways.values()]
    z = np.concatenate(paths).astype(np.float32)
    # The class changes in the middle of a path, as there is nothing between two classes.
    own = None if labels is None else np.repeat(np.asarray(labels).reshape(-1, 2), len(ways), axis=0)
    own = None if own is None else own[:, np.minimum(2 * np.arange(STEPS) // STEPS, 1)].ravel()
    decoded = np.asarray(apply(run.variables, z, labels=own, method="decode").mean)
    decoded = decoded.reshape(len(paths), STEPS, *run.image_shape)
    decoded = images.as_shown(decoded)
    return diagnostic_plots.interpolations(
        decoded, [*ways] * pairs, f"Decoder means between the posterior means of test images; {title}"
    )


def _neighbors(run: Restored, images: ImageSet, title: str) -> Any:
    limits = (0.0, 1.0) if images.holds_images else (-np.inf, np.inf)
    samples = sample_prior(run, COMPARED, run.config.seed) / (255.0 if images.holds_images else 1.0)
    held_out, labels = images.examples("test", run.config.classes, COMPARED).inputs()
    output: Any = jax.jit(run.model.apply)(run.variables, held_out, split_key(run.config.seed, "test"), labels=labels)
    sets = {
        "samples": samples,
        "test reconstructions": np.clip(np.asarray(output.decoded.mean), *limits),
        "test images": np.asarray(held_out),
    }
    found = {name: nearest_images(queries, images.train, images.levels) for name, queries in sets.items()}
    nearest = to_unit_interval(images.train[found["samples"].positions[:SHOWN]], images.levels)
    return diagnostic_plots.nearest_neighbors(
        images.as_shown(samples[:SHOWN]),
        images.as_shown(np.asarray(nearest)),
        {name: neighbors.distance for name, neighbors in found.items()},
        f"Samples of the prior and their nearest training images; {title}",
    )
