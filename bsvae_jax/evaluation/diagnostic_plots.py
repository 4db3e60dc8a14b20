"""The figures of an evaluation, from arrays: likelihood bounds, residuals, variance, rate, interpolations, neighbors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bsvae_jax.evaluation.plots import cell_size, centers, drawn_as_lines, literal, log_scale, new_figure, show_examples

COLORS = ("#4477aa", "#cc3311", "#228833", "#aa3377", "#997700", "#009988")


CLASSES_NAMED = 20
"""Classes beyond which a legend would hide the points."""


def likelihood_curves(curves: Mapping[str, np.ndarray], title: str) -> Figure:
    """Importance-weighted bounds [K] against the number of samples, one line per name."""
    figure = new_figure(5.5, 3.8, title)
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(np.arange(1, len(curve) + 1), curve, color=color, label=f"{name}: {curve[-1]:.2f} at {len(curve)}")
    log_scale(axes, "x")
    axes.set_xlabel("importance samples K")
    axes.set_ylabel("lower bound of log p(x) [nats per image]")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def residual_calibration(
    normal_quantiles: np.ndarray,
    quantiles: Mapping[str, np.ndarray],
    nominal: np.ndarray,
    coverage: Mapping[str, np.ndarray],
    density: Mapping[str, np.ndarray],
    bins: np.ndarray,
    title: str,
) -> Figure:
    """Are the residuals N(0, sigma^2)? Their density, a QQ plot and a reliability curve.

    Args:
      normal_quantiles: of N(0, 1).
      quantiles: of the standardized residuals at the same probabilities, by how they were standardized; NaN: not known.
      nominal: coverage of central intervals under N(0, 1), (0, 1).
      coverage: observed coverage of the same intervals.
      density: of the standardized residuals in each bin.
      bins: centers of the bins.
      title: of the figure.
    """
    figure = new_figure(12.0, 4.0, title)
    histogram, qq, reliability = figure.subplots(1, 3)
    histogram.plot(bins, np.exp(-0.5 * bins**2) / np.sqrt(2 * np.pi), color="black", linestyle=":", label="N(0, 1)")
    for (name, values), color in zip(density.items(), COLORS, strict=False):
        histogram.plot(bins, np.where(values > 0, values, np.nan), color=color, label=name)
        qq.plot(normal_quantiles, quantiles[name], color=color, label=name)
        reliability.plot(nominal, coverage[name], color=color, label=name)
    histogram.set_yscale("log")
    histogram.set_ylim(1e-5, max(2.0, 2 * max(values.max() for values in density.values())))
    histogram.set_xlabel("residual [σ]")
    histogram.set_ylabel("density [1 / σ]")
    qq.plot(normal_quantiles, normal_quantiles, color="black", linestyle=":", label="N(0, 1)")
    qq.set_xlabel("quantile of N(0, 1) [σ]")
    qq.set_ylabel("quantile of the residuals [σ]")
    reliability.plot([0, 1], [0, 1], color="black", linestyle=":", label="calibrated")
    reliability.set_xlabel("share of N(0, 1) within ± k σ")
    reliability.set_ylabel("share of the residuals within ± k σ")
    for axes in (histogram, qq, reliability):
        axes.grid(alpha=0.3)
    figure.legend(*histogram.get_legend_handles_labels(), loc="outside lower center", ncols=4)  # a corner may hold a tail
    return figure


def variance_maps(mean_image: np.ndarray, squared_error: np.ndarray, variance: np.ndarray, title: str) -> Figure:
    """The data's mean image, the standard error of the reconstruction per pixel and the per-pixel optimal standard deviation.

    Args:
      mean_image: [H, W, C] in [0, 1], or another example.
      squared_error: averaged over the examples of this split, [H, W, C].
      variance: optimal per pixel on the training set, [H, W, C].
      title: of the figure.
    """
    names = ("root mean squared error, this split", "optimal σ, training set")
    lines = drawn_as_lines(mean_image.shape)
    figure = new_figure(11.0, 3.6, title)
    left, *others = figure.subplots(1, 2 if lines else 3)
    left.set_title("mean image of the training set" if not lines else "mean of the training set")
    if lines:
        (right,) = others
        left.plot(mean_image)
        for values, name, style in zip((squared_error, variance), names, ("-", "--"), strict=True):
            right.plot(np.sqrt(values.reshape(len(values), -1).mean(axis=1)), style, label=name)
        right.set_title("deviation" + (", mean over channels" if variance.ndim > 1 else ""))
        right.set_ylim(bottom=0)
        right.legend()
        for axes in (left, right):
            axes.set_xlabel("position" if mean_image.ndim > 1 else "component")
            axes.set_ylabel("value")
            axes.grid(alpha=0.3)
        return figure
    show_examples(left, mean_image[None], 1)
    while variance.ndim > 3:
        squared_error, variance = (values[len(values) // 2] for values in (squared_error, variance))
    deviations = [np.sqrt(values.mean(axis=-1)) for values in (squared_error, variance)]
    top = max(values.max() for values in deviations)
    for axes, values, name in zip(others, deviations, names, strict=True):
        shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name)
        figure.colorbar(shown, ax=axes, label="intensity, mean over channels" if variance.shape[-1] > 1 else "intensity")
    return figure


def variance_by_difficulty(
    variance: np.ndarray,
    difficulty: np.ndarray,
    rate: np.ndarray,
    calibrated: float,
    least: np.ndarray,
    most: np.ndarray,
    title: str,
) -> Figure:
    """sigma^2*(x) of every image against its difficulty, colored by rate, with the images of least and greatest variance.

    Args:
      variance: optimal for each image, [N].
      difficulty: mean squared difference from the mean training image: the error of a model that says nothing, [N].
      rate: nats, [N].
      calibrated: the one variance that is optimal for the training set.
      least: images of the least variance [n, H, W, C].
      most: of the greatest.
      title: of the figure.
    """
    figure = new_figure(10.0, 4.6, title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    axes = figure.add_subplot(grid[:, 0])
    points = axes.scatter(difficulty, variance, c=rate, s=4, cmap="viridis", rasterized=True)
    figure.colorbar(points, ax=axes, label="rate [nats]")
    axes.axhline(calibrated, color="#cc3311", linestyle="--", label="calibrated σ² (one for all)")
    log_scale(axes, "x", "y")
    axes.set_xlabel("difficulty: squared distance from the mean image, per pixel [intensity²]")
    axes.set_ylabel("optimal σ²*(x) [intensity²]")
    axes.grid(alpha=0.3)
    axes.legend()
    for row, (images, name) in enumerate(((least, "least σ²*(x)"), (most, "greatest σ²*(x)"))):
        shown = figure.add_subplot(grid[row, 1])
        show_examples(shown, images, len(images) // 2 or 1)
        shown.set_title(name)
    return figure


def rate_decomposition(
    parts: Mapping[str, tuple[float, float]], latents: Mapping[str, np.ndarray], most_information: float, title: str
) -> Figure:
    """Where the bits go: the parts of the rate as bars, and the rate of each latent, largest first.

    Args:
      parts: name to mean and standard error, nats.
      latents: name to values per latent, nats, [L]; the first decides the order.
      most_information: log N, the most that the mutual information of N images can be.
      title: of the figure.
    """
    figure = new_figure(11.0, 4.0, title)
    left, right = figure.subplots(1, 2)
    names = list(parts)
    values, errors = np.transpose([parts[name] for name in names])
    # The colors of the right panel, and gray for what it does not show.
    colors = [COLORS[0], *["#bbbbbb"] * (len(names) - 1)]
    if len(latents) > 1:
        colors[-1] = COLORS[1]
    left.barh(names, values, xerr=errors, color=colors)
    left.invert_yaxis()
    left.axvline(
        most_information, color="black", linestyle=":", label=f"log N = {most_information:.2f}: most I(x; z) of the set"
    )
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0))  # above: any place inside may hold a bar
    left.set_axisbelow(True)
    left.set_xlabel("nats per image, ± standard error over images")
    order = np.argsort(-next(iter(latents.values())))
    for (name, per_latent), color, marker in zip(latents.items(), COLORS, "osd^", strict=False):
        right.plot(np.arange(1, len(order) + 1), per_latent[order], color=color, marker=marker, markersize=3, label=name)
    right.set_xlabel("latent, by its rate")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylabel("nats per image")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def prior_and_posterior(
    points: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray], reach: tuple[np.ndarray, np.ndarray], title: str
) -> Figure:
    """Latents of several kinds side by side in one plane, and what some of them decode to.

    Args:
      points: name to points [n, 2].
      pictures: the same names to images [m, H, W, C], shown below.
      reach: lower and upper ends of both axes, [2] each.
      title: of the figure.
    """
    figure = new_figure(4.0 * len(points), 8.2, title)
    above, below = figure.subplots(2, len(points), squeeze=False)
    for axes, (name, own), color in zip(above, points.items(), COLORS, strict=False):
        axes.scatter(own[:, 0], own[:, 1], s=8 if len(own) < 500 else 4, alpha=0.5, color=color, linewidths=0, rasterized=True)
        axes.set_xlim(reach[0][0], reach[1][0])
        axes.set_ylim(reach[0][1], reach[1][1])
        axes.set_title(name)
        axes.set_xlabel("first principal axis of q(z)")
        axes.grid(alpha=0.3)
    above[0].set_ylabel("second principal axis of q(z)")
    for axes, images in zip(below, pictures.values(), strict=True):
        show_examples(axes, images, int(np.sqrt(len(images))))
        axes.set_axis_off()
    return figure


def interpolations(rows: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Decoded images [rows, steps, H, W, C] between two ends each; `labels` name the rows."""
    count, steps = rows.shape[:2]
    height, width = cell_size(rows.shape[2:])
    figure = new_figure(1.4 + 0.6 * steps, 0.8 + 0.6 * count * height / width, title)
    axes = figure.subplots()
    show_examples(axes, rows.reshape(-1, *rows.shape[2:]), steps)
    axes.set_yticks(centers(height, count), labels)
    axes.set_xticks(centers(width, steps)[[0, -1]], ["from one", "to the other"])
    axes.tick_params(length=0)
    return figure


def nearest_neighbors(samples: np.ndarray, nearest: np.ndarray, distances: Mapping[str, np.ndarray], title: str) -> Figure:
    """Samples above their nearest training images, and how near they are compared with held-out images.

    Args:
      samples: [N, H, W, C] in [0, 1].
      nearest: the nearest training image of each.
      distances: name to root mean squared distances from the nearest training image.
      title: of the figure.
    """
    figure = new_figure(12.0, 4.2, title)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 2))
    axes = figure.add_subplot(grid[0])
    columns, (height, _) = max(1, len(samples) // 2), cell_size(samples.shape[1:])
    rows: list[Any] = []
    for start in range(0, len(samples), columns):
        rows += [samples[start : start + columns], nearest[start : start + columns]]
    show_examples(axes, np.concatenate(rows), columns)
    axes.set_yticks(centers(height, len(rows)), ["sample", "nearest"] * (len(rows) // 2))
    axes.tick_params(length=0)
    spread = figure.add_subplot(grid[1])
    edges = np.linspace(0, max(values.max() for values in distances.values()) * 1.05, 40)
    for (name, values), color in zip(distances.items(), COLORS, strict=False):
        label = f"{name} (median {np.median(values):.3f})"
        spread.hist(values, edges.tolist(), histtype="step", linewidth=1.5, color=color, density=True, label=label)
    spread.set_xlabel("RMS distance from the nearest training image [intensity]")
    spread.set_ylabel("density [1 / intensity]")
    spread.set_ylim(top=1.35 * spread.get_ylim()[1])  # room for the legend above the bars
    spread.grid(alpha=0.3)
    spread.legend()
    return figure


def latent_space(
    points: np.ndarray, shares: Sequence[float], panels: Mapping[str, tuple[np.ndarray, Sequence[str]]], title: str
) -> Figure:
    """Posterior means on two axes [N, 2], colored by class.

    Args:
      points: of each image.
      shares: of the variance of the posterior means that each axis carries.
      panels: by name, the class [N] of each image, and the names of the classes.
      title: of the figure.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(
        5.2 if len(panels) == 1 else 3.4 * columns, 4.6 if len(panels) == 1 else 3.2 * rows, title, fontsize=9.0
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, (classes, names)) in zip(grid.flat, panels.items(), strict=False):
        colors = colormaps["tab10" if len(names) <= 10 else "turbo"]
        drawn = []
        for number in range(len(names)):
            own = points[classes == number]
            color = colors(number if len(names) <= 10 else number / (len(names) - 1))
            size = float(np.clip(6000 / len(points), 3, 20))
            drawn.append(axes.scatter(own[:, 0], own[:, 1], s=size, color=color, alpha=0.6, linewidths=0, rasterized=True))
        if len(panels) > 1:
            axes.set_title(literal(name), fontsize=9)
        axes.set_xlabel(f"first principal axis of the posterior means ({shares[0]:.0%})", fontsize=8)
        axes.set_ylabel(f"second principal axis ({shares[1]:.0%})", fontsize=8)
        axes.grid(alpha=0.3)
        if len(names) <= CLASSES_NAMED:
            axes.legend(
                drawn,  # a label of an artist's own would be left out if it began with an underscore
                [literal(label) for label in names],
                title=None if len(panels) > 1 else literal(name),
                fontsize=7,
                title_fontsize=8,
                markerscale=1.5,
                loc="center left" if len(panels) == 1 else "best",
                bbox_to_anchor=(1.0, 0.5) if len(panels) == 1 else None,
            )
    return figure
