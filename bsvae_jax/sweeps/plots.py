"""Figures of a sweep from arrays: curves over beta, rate-distortion curves, grids. Imports nothing but `figures`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bsvae_jax.evaluation.plots import any_letters, cell_size, drawn_as_lines, new_figure, show_examples

COLORS = ("#cc3311", "#4477aa", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#555555", "#ee7733")
MARKERS = "osD^vP*X"


class Curve(NamedTuple):
    """Points of one family of models, each a mean over seeds with its standard deviation, in the order to be joined."""

    label: str
    x: np.ndarray
    y: np.ndarray
    x_deviation: np.ndarray
    y_deviation: np.ndarray
    names: tuple[str, ...] = ()
    """What to write beside each point."""
    family: int | None = None
    """Curves of one family share a color; None: a color of its own."""
    dashed: bool = False


class Line(NamedTuple):
    """A reference curve."""

    label: str
    x: np.ndarray
    y: np.ndarray


def _draw(axes: Any, curves: Sequence[Curve], lines: Sequence[Line] = (), joined: bool = True) -> None:
    for index, curve in enumerate(curves):
        family = (index if curve.family is None else curve.family) % 8
        style = dict(color=COLORS[family], marker=MARKERS[family], markersize=4, linewidth=1.2, capsize=2)
        if not joined:
            style["linestyle"] = "none"
        if curve.dashed:
            style |= dict(linestyle="--", markerfacecolor="white")
        axes.errorbar(curve.x, curve.y, curve.y_deviation, curve.x_deviation, label=curve.label, **style)
    for line, dashes in zip(lines, ("--", ":", "-."), strict=False):
        axes.plot(line.x, line.y, color="black", linestyle=dashes, linewidth=1.0, label=line.label, zorder=0)
    axes.grid(alpha=0.3)


def _name_points(figure: Figure, axes: Any, curves: Sequence[Curve]) -> None:
    """Write the names beside their points; call once the figure is complete, since the places depend on all that is there.

    Points too close together share one label. A label goes to the first side of its point where it covers no other label, and
    is left out where there is none.
    """
    with any_letters():
        figure.draw_without_rendering()  # places axes and legend
    inside, legend = axes.get_window_extent(), axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    for index, curve in enumerate(curves):
        color = COLORS[(index if curve.family is None else curve.family) % 8]
        for (x, y), name in _groups(axes, curve):
            for across, up in ((1, 1), (-1, -1), (1, -1), (-1, 1)):  # most curves fall
                text = axes.annotate(
                    name,
                    (x, y),
                    xytext=(5 * across, 5 * up),
                    textcoords="offset points",
                    ha="left" if across > 0 else "right",
                    va="bottom" if up > 0 else "top",
                    fontsize=7,
                    color=color,
                )
                box = text.get_window_extent()
                fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                if fits and not box.count_overlaps(taken):
                    taken.append(box)
                    break
                text.remove()


def _groups(axes: Any, curve: Curve) -> list[tuple[tuple[float, float], str]]:
    """The first point of every group of neighbors, and the names of all of them."""
    groups: list[tuple[tuple[float, float], str]] = []
    first = None
    for x, y, name in zip(curve.x, curve.y, curve.names, strict=False):
        place = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if first is not None and np.linalg.norm(place - first) < 0.06:
            point, names = groups[-1]
            groups[-1] = point, f"{names}, {name.removeprefix('β=')}"
        else:
            groups.append(((x, y), name))
            first = place
    return groups


def rate_distortion(
    readings: Sequence[Curve], squared_errors: Sequence[Curve], nats: Sequence[Line], errors: Sequence[Line], title: str
) -> Figure:
    """Distortion in nats (left) and mean squared error (right) against the rate.

    Args:
      readings: distortion against rate, a curve per reading of a model.
      squared_errors: mean squared error against rate, a curve per model; this axis needs no decoder variance.
      nats: reference lines for the left panel.
      errors: reference lines for the right panel.
      title: of the figure.
    """
    figure = new_figure(11.0, 4.8, title)
    left, right = figure.subplots(1, 2)
    _draw(left, readings, nats)
    left.set_ylabel("distortion −log p(x|z) [nats per image]")
    _draw(right, squared_errors, errors)
    right.set_ylabel("mean squared error [intensity²]")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("rate KL(q(z|x) ‖ p(z)) [nats per image]")
        axes.legend(fontsize=8)
    for axes, curves in ((left, readings), (right, squared_errors)):
        _name_points(figure, axes, curves)
    return figure


def _beta_axis(axes: Any, betas: np.ndarray) -> None:
    positive = betas[betas > 0]
    if len(positive) == 0:
        axes.set_xlabel("β")
        return
    if len(positive) < len(betas):  # 0 gets a place of its own, left of the least beta
        axes.set_xscale("symlog", linthresh=float(positive.min()))
    else:
        axes.set_xscale("log")
        if positive.max() < 100 * positive.min():  # decades alone would leave one tick or two
            distinct = np.unique(positive)
            ticks = distinct[np.unique(np.linspace(0, len(distinct) - 1, 5).round().astype(int))]
            axes.set_xticks(ticks, [f"{beta:g}" for beta in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("β")


def metrics_against_beta(panels: Mapping[str, Sequence[Curve]], title: str) -> Figure:
    """One panel per metric, its label the key; a curve per model and split."""
    columns = 3
    rows = -(-len(panels) // columns)
    figure = new_figure(11.0, 0.6 + 2.7 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (label, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, curves)
        _beta_axis(axes, np.concatenate([curve.x for curve in curves]))
        axes.set_ylabel(label)
        if "intensity²" in label and all(np.all(curve.y > 0) for curve in curves):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    abreast = 165 // (max(map(len, labels)) + 8)  # characters of this size across the figure, and of an entry
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(4, len(labels), abreast)), fontsize=8)
    return figure


def pictures_by_beta(
    originals: np.ndarray, reconstructions: np.ndarray, samples: np.ndarray, betas: Sequence[str], title: str
) -> Figure:
    """A row per beta: reconstructions of the originals at the left, samples of the prior at the right.

    Args:
      originals: [n, H, W, C] in [0, 1], or other examples.
      reconstructions: [betas, n, H, W, C].
      samples: [betas, n, H, W, C].
      betas: labels of the rows.
      title: of the figure.
    """
    count = len(originals)
    height, width = cell_size(originals.shape[1:])
    figure = new_figure(11.0, 0.8 + (len(betas) + 1) * 4.9 / count * height / width, title)
    left, right = figure.subplots(1, 2)
    rows = np.concatenate([originals[None], reconstructions])
    show_examples(left, rows.reshape(-1, *originals.shape[1:]), count)
    blank = np.full_like(originals, np.nan if drawn_as_lines(originals.shape[1:]) else 1.0)
    show_examples(right, np.concatenate([blank[None], samples]).reshape(-1, *originals.shape[1:]), count)
    centers = [(height + 1) * (row + 0.5) for row in range(len(betas) + 1)]
    left.set_yticks(centers, ["original", *betas])
    right.set_yticks(centers[1:], betas)
    for axes, name in ((left, "held-out images and reconstructions"), (right, "samples of the prior")):
        axes.tick_params(length=0)
        axes.set_title(name, fontsize=10)
    return figure


def latent_rates(rates: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Rate of each latent against beta, latents in the order of their rate; a panel per model.

    Args:
      rates: model to (betas [n], rates [n, L] in nats).
      title: of the figure.
    """
    figure = new_figure(1.5 + 4.2 * len(rates), 4.2, title)
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    latents = max(values.shape[1] for _, values in rates.values())
    colors = colormaps["viridis"](np.linspace(0, 0.95, latents))
    floor = 1e-3
    for axes, (model, (betas, values)) in zip(panels, rates.items(), strict=True):
        for latent in range(values.shape[1]):
            axes.plot(
                betas, np.maximum(values[:, latent], floor), color=colors[latent], linewidth=1.0, marker=".", markersize=4
            )
        _beta_axis(axes, np.asarray(betas))
        axes.set_yscale("log")
        axes.set_title(model, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"rate of a latent [nats per image], at least {floor:g}")
    ends = [panels[-1].lines[0], panels[-1].lines[-1]]
    panels[-1].legend(ends, ["most informative latent", f"least informative of {latents}"], fontsize=8)
    return figure


def beta_variance_grid(
    betas: Sequence[float],
    variances: Sequence[float],
    values: Mapping[str, np.ndarray],
    others: Mapping[str, Mapping[str, np.ndarray]],
    collapse: Sequence[Curve],
    title: str,
) -> Figure:
    """Heat maps over beta and the constant variance, with rows for models that have no such variance, and rate against
    beta * variance.

    Args:
      betas: columns, ascending.
      variances: rows, ascending.
      values: label to [variances, betas] of the constant model; NaN where nothing was trained.
      others: model to label to [betas].
      collapse: rate against beta * variance.
      title: of the figure.
    """
    figure = new_figure(5.0 * (len(values) + 1), 1.6 + 0.55 * (len(variances) + len(others)) + 1.4, title)
    panels = figure.subplots(1, len(values) + 1)
    for axes, (label, grid) in zip(panels, values.items(), strict=False):
        rows = np.vstack([grid, *(other[label][None] for other in others.values())])
        shown = np.ma.masked_invalid(rows)
        positive = bool(np.all(shown.compressed() > 0)) and float(shown.max() / shown.min()) > 100
        image = axes.imshow(shown, cmap="cividis", aspect="auto", norm=LogNorm() if positive else None)
        figure.colorbar(image, ax=axes, label=label, shrink=0.9)
        for (row, column), value in np.ndenumerate(rows):
            if np.isfinite(value):
                bright = image.norm(value) > 0.6
                axes.text(
                    column,
                    row,
                    f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.1g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if bright else "white",
                )
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_yticks(range(len(rows)), [*(f"{variance:g}" for variance in variances), *others])
        axes.axhline(len(variances) - 0.5, color="white", linewidth=3)
        axes.set_xlabel("β")
        axes.set_ylabel("constant decoder variance σ²")
    _draw(panels[-1], collapse)
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel("β · σ² (σ² of training for the optimal variance)")
    panels[-1].set_ylabel("rate [nats per image]")
    panels[-1].legend(fontsize=8)
    return figure


def linear_theory(
    measured: Sequence[Curve], lines: Sequence[Line], deviations: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str
) -> Figure:
    """Trained linear models on the rate-distortion function (left) and their relative deviation from theory (right).

    Args:
      measured: mean squared error against rate.
      lines: theory.
      deviations: quantity to (betas, |measured / theory - 1|).
      title: of the figure.
    """
    figure = new_figure(11.0, 4.5, title)
    left, right = figure.subplots(1, 2)
    _draw(left, measured, lines, joined=False)
    left.set_xlabel("rate [nats per image]")
    left.set_ylabel("mean squared error [intensity²]")
    left.set_yscale("log")
    for (label, (betas, values)), color in zip(deviations.items(), COLORS, strict=False):
        right.plot(betas, 100 * np.maximum(values, 1e-7), color=color, marker="o", markersize=4, label=label)
    right.axhline(1.0, color="black", linestyle=":", linewidth=1.0, label="1%")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("β")
    right.set_ylabel("deviation from theory [%]")
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.legend(fontsize=8)
    _name_points(figure, left, measured)
    return figure
