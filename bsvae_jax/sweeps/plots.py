"""Figures of a sweep from arrays: curves over beta, rate-distortion points, grids. Imports nothing but `evaluation.plots`.

They have no titles: what a figure shows is for its caption to say.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from bsvae_jax.evaluation.plots import (
    any_letters,
    cell_size,
    centers,
    log_scale,
    new_figure,
    show_examples,
    show_only,
)

COLORS = ("#cc3311", "#4477aa", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#555555", "#ee7733")
MARKERS = "osD^vP*X"
COLLAPSED = "collapsed: no active latent"
LINEAR_BELOW = 0.01
"""Nats of a latent below which its axis is linear: it says nothing, and the decades of its noise would fill the figure."""


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
    collapsed: Sequence[bool] = ()
    """Which points are of models without an active latent; they are marked, and no line leads to them."""
    hints: Sequence[str] = ()
    """What a page says of each point when it is pointed at."""
    marker: int | None = None
    """Curves of one marker share its form; None: that of the family."""
    panel: str = ""
    """Name of the panel in which it stands, where a figure has several of one kind."""


class Line(NamedTuple):
    """A reference curve."""

    label: str
    x: np.ndarray
    y: np.ndarray


def _look(index: int, curve: Curve) -> tuple[str, str]:
    """Color and marker of the curve at an index among those of its panel; no two of 64 families share both."""
    family = index if curve.family is None else curve.family
    marker = family + family // 8 if curve.marker is None else curve.marker
    return COLORS[family % 8], MARKERS[marker % 8]


def _draw(axes: Any, curves: Sequence[Curve], lines: Sequence[Line] = (), joined: bool = True) -> None:
    for index, curve in enumerate(curves):
        color, marker = _look(index, curve)
        style: dict[str, Any] = dict(color=color, marker=marker, markersize=5, linewidth=1.2)
        style["linestyle"] = ("--" if curve.dashed else "-") if joined else "none"
        if curve.dashed:  # larger and behind: a ring around the filled marker of the same place
            style |= dict(markerfacecolor="white", markersize=7, zorder=1.9)
        collapsed = np.array(curve.collapsed or np.zeros(len(curve.x)), bool)
        axes.plot(curve.x, np.where(collapsed, np.nan, curve.y), label=curve.label, **style)
        axes.plot(curve.x[collapsed], curve.y[collapsed], "x", color=color, markersize=6)
        bars = [np.where(collapsed, np.nan, own) for own in (curve.y_deviation, curve.x_deviation)]
        axes.errorbar(curve.x, curve.y, *bars, fmt="none", ecolor=color, elinewidth=1.0, zorder=1.8)
    for line, dashes in zip(lines, ("--", ":", "-."), strict=False):
        axes.plot(line.x, line.y, color="black", linestyle=dashes, linewidth=1.0, label=line.label, zorder=0)
    if any(any(curve.collapsed) for curve in curves):
        axes.plot([], [], "x", color="black", label=COLLAPSED)
    axes.grid(alpha=0.3)


def _obstacles(axes: Any) -> tuple[list[Any], list[Bbox]]:
    """What a label must not cover, in pixels: the paths of lines and of error bars, and boxes around markers and legend."""
    paths, boxes = [], []
    for line in axes.lines:
        path = line.get_path().transformed(line.get_transform())
        reach = line.get_markersize() / 2 * axes.figure.dpi / 72
        if line.get_linestyle() != "None":
            paths.append(path)
        if line.get_marker() != "None":
            boxes += [Bbox(np.stack([place - reach, place + reach])) for place in path.vertices if np.isfinite(place).all()]
    for bars in axes.collections:
        paths += [path.transformed(bars.get_transform()) for path in bars.get_paths()]
    if (legend := axes.get_legend()) is not None:
        boxes.append(legend.get_window_extent())
    return paths, boxes


def _name_points(figure: Figure, panels: Sequence[Sequence[Curve]]) -> None:
    """Write the names of the curves of the first panels beside their points.

    Call it once the figure is complete, since the places depend on all that is there.

    Points too close together share one label. A label goes to the nearest place where it covers no line, no marker and no
    other label and no other marker is nearer than its own, and is left out where there is none.
    """
    with any_letters():
        figure.draw_without_rendering()  # places axes and legend
    for axes, curves in zip(figure.axes, panels, strict=False):
        _name_points_of(axes, curves)


def _name_points_of(axes: Any, curves: Sequence[Curve]) -> None:
    inside, (paths, taken) = axes.get_window_extent(), _obstacles(axes)
    markers = axes.transData.transform(np.concatenate([np.stack([curve.x, curve.y], axis=1) for curve in curves]))
    for index, curve in enumerate(curves):
        color, _ = _look(index, curve)
        for (x, y), name in _groups(axes, curve):
            for across, up in PLACES:
                text = axes.annotate(
                    name,
                    (x, y),
                    xytext=(across, up),
                    textcoords="offset points",
                    ha="center" if across == 0 else "left" if across > 0 else "right",
                    va="center" if up == 0 else "bottom" if up > 0 else "top",
                    fontsize=7,
                    color=color,
                )
                box = text.get_window_extent().padded(2)  # letters differ a little in size between resolutions
                fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                if (
                    fits
                    and _distances(box, axes.transData.transform([(x, y)]))[0] <= np.nanmin(_distances(box, markers)) + 1
                    and not box.count_overlaps(taken)
                    and not any(path.intersects_bbox(box, filled=False) for path in paths)
                ):
                    taken.append(box)
                    break
                text.remove()


def _distances(box: Bbox, points: np.ndarray) -> np.ndarray:
    """From a box to points [N, 2]."""
    outside = np.maximum(np.maximum(np.array(box.min) - points, points - np.array(box.max)), 0)
    return np.linalg.norm(outside, axis=1)


PLACES = [
    (distance * across, distance * up)
    for distance in (6, 10, 15)
    for across, up in ((1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0), (1, -1), (-1, 1))  # most curves fall
]
"""Points from a marker to its label, in the order in which they are tried."""


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


def by_panel(curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves of each panel, in the order of the figure; those of one label have one color in all of them."""
    labels = list(dict.fromkeys(curve.label for curve in curves))
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        family = labels.index(curve.label) if curve.family is None else curve.family
        panels.setdefault(curve.panel, []).append(curve._replace(family=family))
    return list(panels.values())


def rate_distortion(
    readings: Sequence[Curve], squared_errors: Sequence[Curve], nats: Sequence[Line], errors: Sequence[Line]
) -> Figure:
    """Distortion in nats (left) and mean squared error (right) against the rate; nothing joins the points.

    Curves of several panels have a column for each: distortion above, mean squared error below.

    Args:
      readings: distortion against rate, a curve per reading of a model.
      squared_errors: mean squared error against rate, a curve per model; this axis needs no decoder variance.
      nats: reference lines of distortion.
      errors: reference lines of mean squared error.
    """
    above, below = by_panel(readings), by_panel(squared_errors)
    several = len(above) > 1
    figure = new_figure(1.0 + 3.5 * len(above), 8.1) if several else new_figure(11.0, 5.6)
    grid = figure.subplots(2, len(above), sharex=True, sharey="row") if several else figure.subplots(1, 2)[:, None]
    for panels, lines, own in ((above, nats, grid[0]), (below, errors, grid[1])):
        for axes, curves in zip(own, panels, strict=True):
            _draw(axes, curves, lines, joined=False)
    grid[0, 0].set_ylabel("distortion −log p(x|z) [nats per image]")
    grid[1, 0].set_ylabel("mean squared error [intensity²]")
    log_scale(grid[1, 0], "y")
    for axes in grid[1] if several else grid[:, 0]:
        axes.set_xlabel("rate KL(q(z|x) ‖ p(z)) [nats per image]")
    if several:
        for axes, curves in zip(grid[0], above, strict=True):
            axes.set_title(curves[0].panel, fontsize=10)
        _legend_below(figure, grid.flat)
    else:
        for axes in grid[:, 0]:
            names = axes.get_legend_handles_labels()[1]
            columns = 2 if max(map(len, names)) < 40 else 1
            rows = -(-len(names) // columns)
            figure.set_figheight(max(figure.get_figheight(), 4.8 + 0.19 * rows))
            # Below: any place inside may hold points and their bars.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=8)
    _name_points(figure, [*above, *below])
    return figure


def _legend_below(figure: Figure, panels: Iterable[Any]) -> None:
    """One legend of these panels below them all; the figure grows by what it takes."""
    found = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    abreast = int(15 * figure.get_figwidth() / (max(map(len, found)) + 8))  # characters across the figure, and of an entry
    columns = max(1, min(4, len(found), abreast))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(found) // columns))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8)


def places(figure: Figure, panels: Sequence[Sequence[Curve]]) -> list[tuple[float, float, str]]:
    """`(from the left, from the top, hint)` of every point of a figure's first panels, in percent of its width and height."""
    found = []
    for axes, curves in zip(figure.axes, panels, strict=False):
        for curve in curves:
            pixels = axes.transData.transform(np.stack([curve.x, curve.y], axis=1)) / figure.bbox.size
            found += [(100 * x, 100 * (1 - y), hint) for (x, y), hint in zip(pixels.tolist(), curve.hints, strict=True)]
    return found


def _beta_axis(axes: Any, betas: np.ndarray) -> None:
    positive = betas[betas > 0]
    if len(positive) == 0:
        axes.set_xlabel("β")
        return
    if len(positive) < len(betas):  # 0 gets a place of its own, left of the least beta
        axes.set_xscale("symlog", linthresh=float(positive.min()))
    else:
        axes.set_xscale("log")
    distinct = np.unique(betas)
    places = axes.xaxis.get_transform().transform(distinct)
    numbers = [f"{beta:g}" for beta in distinct]
    ticks = [0]  # those of the betas that leave room for their numbers, of 36 characters across an axis
    for index, place in enumerate(places):
        room = max(1 / 7, (1 + (len(numbers[ticks[-1]]) + len(numbers[index])) / 2) / 36)
        if place - places[ticks[-1]] > room * (places[-1] - places[0]):
            ticks.append(index)
    axes.set_xticks(distinct[ticks], [numbers[tick] for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("β")


def _value_axis(axes: Any, label: str, curves: Sequence[Curve]) -> None:
    """A scale on which a few large values do not flatten the others.

    It is logarithmic for positive values of squared intensity, or with a largest one of more than twice what four fifths of
    them reach; where not all are positive, values of ten times that lie beyond the axis, which says so.
    """
    axes.set_ylabel(label)
    values = np.concatenate([curve.y for curve in curves])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return
    sizes = np.abs(values)
    usual = np.quantile(sizes, 0.8, method="lower")
    if values.min() > 0 and ("intensity²" in label or sizes.max() > 2 * usual):
        log_scale(axes, "y")
        if np.ptp(values) < 1e-6 * usual:  # equal but for rounding, over which no axis can reach
            axes.set_ylim(usual / 2, usual * 2)
        return
    axes.ticklabel_format(axis="y", useOffset=False)
    if np.all(values == values.round()):  # no half of a latent
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    kept = values[sizes <= 10 * usual]
    if len(kept) < len(values) and np.ptp(kept) > 0:
        show_only(axes, kept, values)


def metrics_against_beta(panels: Mapping[str, Sequence[Curve]]) -> Figure:
    """One panel per metric, its label the key; a curve per model and split."""
    rows = -(-len(panels) // 3)
    figure = new_figure(11.0, 0.3 + 2.7 * rows)
    grid = figure.subplots(rows, 3, squeeze=False, sharex=True)
    betas = np.concatenate([curve.x for curves in panels.values() for curve in curves])
    for axes, (label, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, curves)
        _beta_axis(axes, betas)
        axes.tick_params(labelbottom=True)
        _value_axis(axes, label, curves)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.align_ylabels()
    _legend_below(figure, grid.flat[:1])
    return figure


def pictures_by_beta(originals: np.ndarray, reconstructions: np.ndarray, samples: np.ndarray, betas: Sequence[str]) -> Figure:
    """A row per beta: decoder means of the originals' posteriors at the left, of samples of the prior at the right.

    Args:
      originals: [n, H, W, C] in [0, 1], or other examples.
      reconstructions: [betas, n, H, W, C].
      samples: [betas, n, H, W, C].
      betas: labels of the rows.
    """
    count = len(originals)
    height, width = cell_size(originals.shape[1:])
    figure = new_figure(11.0, 0.5 + (len(betas) + 1) * 4.9 / count * height / width)
    left, right = figure.subplots(1, 2)
    rows = np.concatenate([originals[None], reconstructions])
    show_examples(left, rows.reshape(-1, *originals.shape[1:]), count)
    show_examples(right, samples.reshape(-1, *originals.shape[1:]), count)
    bottom, top = right.get_ylim()
    right.set_ylim(bottom, top - (height + 1))  # beside the originals, where the title has its place
    left.set_yticks(centers(height, len(betas) + 1), ["original", *betas])
    right.set_yticks(centers(height, len(betas)), betas)
    left.set_title("test images and reconstructions", fontsize=10)
    right.set_title("decoder means of samples of the prior", fontsize=10, y=1 - (height + 1) / (bottom - top + height + 1))
    for axes in (left, right):
        axes.tick_params(length=0)
    return figure


def latent_rates(rates: Mapping[str, tuple[np.ndarray, np.ndarray, Sequence[bool]]]) -> Figure:
    """Rate of each latent against beta, latents in the order of their rate; a panel per model.

    Args:
      rates: model to (betas [n], rates [n, L] in nats, which of the n have collapsed).
    """
    columns = min(4, len(rates))
    rows = -(-len(rates) // columns)
    figure = new_figure(1.5 + 4.2 * columns, 4.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    panels, unused = grid.flat[: len(rates)], grid.flat[len(rates) :]
    latents = max(values.shape[1] for _, values, _ in rates.values())
    colors = colormaps["viridis"](np.linspace(0, 0.95, latents))
    for axes, (model, (betas, values, collapsed)) in zip(panels, rates.items(), strict=True):
        gone = np.asarray(collapsed, bool)
        for color, own in zip(colors, values.T, strict=False):
            axes.plot(betas, np.where(gone, np.nan, own), color=color, linewidth=1.0, marker=".", markersize=4)
        axes.plot(betas[gone], values[gone].mean(axis=1), "x", color="black", markersize=6)
        _beta_axis(axes, betas)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(model, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=-0.1 * LINEAR_BELOW)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"rate of a latent [nats], linear below {LINEAR_BELOW:g}")
    for axes in unused:
        axes.set_axis_off()
    lines = panels[-1].lines
    named = {"most informative latent": lines[0], f"least informative of {latents}": lines[-2]}
    if any(any(collapsed) for *_, collapsed in rates.values()):
        named[COLLAPSED] = lines[-1]
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def beta_variance_grid(
    betas: Sequence[float],
    variances: Sequence[float],
    values: Mapping[str, np.ndarray],
    others: Mapping[str, Mapping[str, np.ndarray]],
    collapse: Sequence[Curve],
) -> Figure:
    """Heat maps over beta and the constant variance, with rows for models that have no such variance, and rate against
    beta * variance.

    Args:
      betas: columns, ascending.
      variances: rows, ascending.
      values: label to [variances, betas] of the constant model; NaN where nothing was trained.
      others: model to label to [betas].
      collapse: rate against beta * variance.
    """
    width = min(max(5.0, 2.2 + 0.2 * len(betas)), 9.0)
    figure = new_figure(width * len(values) + 5.0, 2.8 + 0.55 * (len(variances) + len(others)))
    panels = figure.subplots(1, len(values) + 1, width_ratios=[*(width for _ in values), 5.0])
    apart, turned = -(-len(betas) // 40), 90 if len(betas) > 5 else 0  # columns from one number to the next
    for axes, (label, grid) in zip(panels, values.items(), strict=False):
        rows = np.vstack([grid, *(other[label][None] for other in others.values())])
        shown = np.ma.masked_invalid(rows)
        positive = bool(np.all(shown.compressed() > 0)) and float(shown.max() / shown.min()) > 100
        image = axes.imshow(shown, cmap="cividis", aspect="auto", norm=LogNorm() if positive else None)
        figure.colorbar(image, ax=axes, label=label, shrink=0.9)
        for (row, column), value in np.ndenumerate(rows):
            if np.isfinite(value) and apart == 1:
                text, color = f"{value:.{3 if abs(value) >= 0.01 else 1}g}", "black" if image.norm(value) > 0.6 else "white"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color, rotation=turned)
        axes.set_xticks(range(0, len(betas), apart), [f"{beta:g}" for beta in betas[::apart]], rotation=turned)
        axes.set_yticks(range(len(rows)), [*(f"{variance:g}" for variance in variances), *others])
        axes.axhline(len(variances) - 0.5, color="white", linewidth=3)
        axes.set_xlabel("β")
        axes.set_ylabel("constant decoder variance σ²")
    _draw(panels[-1], collapse, joined=False)
    log_scale(panels[-1], "x")
    panels[-1].set_xlabel("β · σ²\n(σ² of training where it is not constant)")
    panels[-1].set_ylabel("rate [nats per image]")
    _legend_below(figure, panels[-1:])
    return figure


def linear_theory(
    measured: Sequence[Curve], lines: Sequence[Line], deviations: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Figure:
    """Trained linear models on the rate-distortion function (left) and their relative deviation from theory (right).

    Args:
      measured: mean squared error against rate.
      lines: theory.
      deviations: quantity to (betas, |measured / theory - 1|).
    """
    figure = new_figure(11.0, 4.5)
    left, right = figure.subplots(1, 2)
    _draw(left, measured, lines, joined=False)
    left.set_xlabel("rate [nats per image]")
    left.set_ylabel("mean squared error [intensity²]")
    log_scale(left, "y")
    for (label, (betas, values)), color in zip(deviations.items(), COLORS, strict=False):
        right.plot(betas, 100 * np.maximum(values, 1e-7), color=color, marker="o", markersize=4, label=label)
    right.axhline(1.0, color="black", linestyle=":", linewidth=1.0, label="1%")
    log_scale(right, "x", "y")
    right.set_xlabel("β")
    right.set_ylabel("deviation from theory [%]")
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.legend(fontsize=8)
    _name_points(figure, [measured])
    return figure
