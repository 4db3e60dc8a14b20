"""Figures as they are drawn: labels at their rows, a legend beside the bars, vectors for a paper."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from bsvae_jax.evaluation import diagnostic_plots, plots
from bsvae_jax.sweeps.plots import pictures_by_beta

BLACK = np.zeros((3, 4, 8, 8, 1))


def runs(dark):
    """Centers of the runs of True in a vector."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dark, [0]])))
    return (edges[::2] + edges[1::2]) / 2


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: plots.latent_traversals(BLACK, [0.0, 1.0, 2.0, 3.0], ["z0", "z1", "z2"], "t"), id="traversals"),
        pytest.param(lambda: plots.reconstructions(BLACK[0], BLACK[0], "t", columns=4), id="reconstructions"),
        pytest.param(lambda: diagnostic_plots.interpolations(BLACK, ["a", "b", "c"], "t"), id="interpolations"),
        pytest.param(lambda: diagnostic_plots.nearest_neighbors(BLACK[0], BLACK[0], {"a": np.ones(3)}, "t"), id="neighbors"),
        pytest.param(lambda: pictures_by_beta(BLACK[0], BLACK, BLACK, ["1", "2", "3"]), id="pictures of a sweep"),
    ],
)
def test_labels_are_centered_at_their_rows(figure):
    """Against the rows of black pixels that are there once the figure is drawn."""
    drawn = figure()
    for axes in drawn.axes:
        axes.set_title("")  # which may lie above the rows inside of the axes
    drawn.canvas.draw()
    pixels = np.asarray(drawn.canvas.buffer_rgba())[..., :3].max(axis=-1)
    checked = 0
    for axes in drawn.axes:
        if not axes.images:
            continue
        box = axes.get_window_extent()
        dark = pixels[:, round(box.x0) : round(box.x1)] < 20
        ticks = len(pixels) - axes.transData.transform([(0, y) for y in axes.get_yticks()])[:, 1]
        rows = runs(dark.any(axis=1))
        rows = rows[(rows > len(pixels) - box.y1) & (rows < len(pixels) - box.y0)]
        np.testing.assert_allclose(ticks, rows, atol=1.0)  # of rows 20 to 60 pixels high
        checked += len(rows)
        if len(axes.get_xticks()) == BLACK.shape[1]:
            columns = box.x0 + runs(dark[round(rows[0])])
            np.testing.assert_allclose(axes.transData.transform([(x, 0) for x in axes.get_xticks()])[:, 0], columns, atol=1.0)
    assert checked >= 2


def test_the_samples_of_a_sweep_have_no_empty_row():
    _, right = pictures_by_beta(BLACK[0], BLACK, BLACK, ["1", "2", "3"]).axes
    (image,) = right.images
    assert (image.get_array() == 0).any(axis=1).sum() == 3 * 8  # of 3 * 9 - 1 rows of pixels
    assert image.get_array().shape[0] == 3 * 9 - 1


def test_latents_are_colored_as_on_both_sides():
    """In the parts of the rate, a color stands for one quantity."""
    bars = dict.fromkeys(("rate", "I", "KL", "total correlation", "dimension-wise"), (2.0, 0.1))
    left, right = diagnostic_plots.rate_decomposition(bars, {"rate": np.ones(3), "dimension-wise": np.ones(3)}, 5.0, "t").axes
    colors = [bar.get_facecolor() for bar in left.patches]
    assert [colors[0], colors[-1]] == [to_rgba(line.get_color()) for line in right.lines]
    assert len(set(colors)) == 3


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.004, 0.7, ["0.01", "0.1"]),
        (0.002, 7.0, ["0.01", "0.1", "1"]),
        (0.04, 0.15, ["0.04", "0.06", "0.08", "0.1"]),
        (0.012, 0.07, ["0.02", "0.05"]),
        (0.0905, 0.0935, ["0.091", "0.092", "0.093"]),
    ],
)
def test_a_logarithmic_axis_has_three_plain_ticks(low, high, ticks):
    axes = plots.new_figure(3.0, 3.0).subplots()
    axes.set_ylim(low, high)
    plots.log_scale(axes, "y")
    axes.figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert len(shown) >= 3
    assert set(ticks) <= set(shown)
    assert not [label.get_text() for label in axes.get_yticklabels(minor=True) if label.get_text()]


def test_labels_of_lines_are_centered_at_their_boxes():
    assert plots.centers(plots.LINE_CELL[0], 3).tolist() == [6, 19, 32]  # boxes of 12 with a space of 1


def residuals():
    values, by = np.linspace(-4.0, 4.0, 9), ("one variance", "variance per pixel", "variance per image")
    quantiles, shares = dict.fromkeys(by, values), np.linspace(0.1, 0.9, 9)
    return diagnostic_plots.residual_calibration(
        values, quantiles, shares, dict.fromkeys(by, shares), dict.fromkeys(by, shares), values, "title"
    )


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(residuals, id="residuals"),
        pytest.param(
            lambda: diagnostic_plots.nearest_neighbors(BLACK[0], BLACK[0], {"a": np.ones(3)}, "title"), id="neighbors"
        ),
    ],
)
def test_no_label_is_cut_or_covers_the_title(figure):
    drawn = figure()
    drawn.canvas.draw()
    (title,) = [text for text in drawn.texts if text.get_text() == "title"]
    labels = [
        axis.label.get_window_extent() for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis) if axis.label.get_text()
    ]
    assert len(labels) >= 2
    assert all(drawn.bbox.containsx(x) for box in labels for x in (box.x0, box.x1))
    assert all(drawn.bbox.containsy(y) for box in labels for y in (box.y0, box.y1))
    assert not title.get_window_extent().count_overlaps(labels)


def test_the_legend_of_the_rates_parts_covers_no_bar():
    names = ("rate", "mutual information I(x; z)", "KL(q(z) ‖ p(z))", "of it total correlation", "of it dimension-wise KL")
    figure = diagnostic_plots.rate_decomposition(dict.fromkeys(names, (20.0, 0.1)), {"rate": np.ones(3)}, 19.0, "t")
    figure.canvas.draw()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert len(figure.axes[0].patches) == len(names)
    assert not legend.count_overlaps([bar.get_window_extent() for bar in figure.axes[0].patches])
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_a_pdf_in_vectors_lies_beside_the_png(tmp_path):
    def figures():
        rates = diagnostic_plots.rate_decomposition({"rate": (2.0, 0.1)}, {"rate": np.ones(3)}, 5.0, "of β = $1$")
        return {"rates": rates, "grid": plots.image_grid(BLACK[0], "samples")}

    drawn = figures()
    assert plots.save_all(drawn, tmp_path / "one") == [tmp_path / "one" / "rates.png", tmp_path / "one" / "grid.png"]
    plots.save_all(figures(), tmp_path / "two")
    content = {name: (tmp_path / "one" / f"{name}.pdf").read_bytes() for name in drawn}
    for name, pdf in content.items():
        assert pdf.startswith(b"%PDF-")
        assert pdf == (tmp_path / "two" / f"{name}.pdf").read_bytes()  # no date
        assert (b"/Subtype /Image" in pdf) == (name == "grid")
        assert b"/FontFile2" in pdf or name == "grid"  # TrueType: type 3 is refused by publishers
        assert b"/Type3" not in pdf
    (title,) = re.findall(rb"/Title \((.*?)\)", content["grid"])
    assert title == b"samples"
    assert drawn["grid"].get_suptitle() == ""  # told by the file, not drawn
    # Nothing but images is left on the page of the grid.
    assert b"/FontDescriptor" not in content["grid"]
