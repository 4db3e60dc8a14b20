"""Figures of a sweep as they are drawn: labels that cover nothing, collapsed models, error bars, latents that say nothing."""

import itertools

import numpy as np
import pytest

from bsvae_jax.sweeps import plots
from bsvae_jax.sweeps.plots import COLORS, Curve, Line

BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
# Measured on the digits, three seeds: BS-VAE, and SSE + beta * KL read with the optimal variance, 1/2 and beta/2.
RATES = np.array([[84.65, 59.11, 28.76, 0.190, 0.0002], *[[33.32, 9.634, 0.336, 0.0003, 0.0002]] * 3])
DISTORTIONS = np.array(
    [
        [-71.39, -70.62, -62.65, 5.209, 7.191],
        [-60.92, -33.62, 4.04, 7.074, 7.075],
        [37.26, 38.05, 41.06, 41.41, 41.41],
        [-47.66, -22.82, 41.06, 110.8, 184.0],
    ]
)
ERRORS = np.array([[0.00723, 0.00739, 0.00921, 0.07214, 0.07483], [0.00953, 0.0219, 0.0688, 0.07431, 0.07431]])
COLLAPSED = [[False] * 4 + [True], *[[False] * 3 + [True] * 2] * 3]
NAMES = tuple(f"β={beta:g}" for beta in BETAS)


def curves(values, named):
    deviation = np.full(len(BETAS), 0.3)
    return [
        Curve(f"model {i}", RATES[i], y, deviation, 0.01 * np.abs(y), NAMES if i < named else (), None, False, COLLAPSED[i])
        for i, y in enumerate(values)
    ]


@pytest.fixture
def figure():
    rates = np.linspace(0.0, 88.0, 100)
    nats = Line("Shannon", rates, 10.0 - 137.0 * (rates / 88.0) ** 0.5)
    errors = Line("Shannon", rates, 0.07 * np.exp(-rates / 19.5))
    return plots.rate_distortion(curves(DISTORTIONS, 1), curves(ERRORS, 2), [nats], [errors])


def pixels_of(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def labels_that_cover_nothing(figure):
    """Its labels, found to lie where there is nothing but paper once all labels are gone, and not on each other."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in axes.texts]
    boxes = [text.get_window_extent() for text in texts]
    for text in texts:
        text.set_visible(False)
    for axes in figure.axes:
        axes.grid(False)
    paper = pixels_of(figure)
    for index, box in enumerate(boxes):
        top, bottom = len(paper) - round(box.y1), len(paper) - round(box.y0)
        assert (paper[top:bottom, round(box.x0) : round(box.x1)] == 255).all(), texts[index].get_text()
        assert not box.count_overlaps(boxes[:index])
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("dpi", [72, 100, 150])
def test_no_label_covers_a_line_a_point_or_another_label(figure, dpi):
    figure.set_dpi(dpi)
    found = labels_that_cover_nothing(figure)
    assert all(f"{beta:g}" in " ".join(found) for beta in BETAS)
    assert found.count("β=1") == 2  # in both panels


@pytest.mark.parametrize(("away", "reach"), [(3.0, 0.0), (12.0, 12.0)], ids=["markers", "error bars"])
def test_labels_keep_off_other_models(away, reach):
    """Another model's marker, or its long error bar, lies where the label of each point would go first."""
    x, none = np.array([10.0, 40.0, 70.0, 100.0]), np.zeros(4)
    named = Curve("named", x, np.array([0.0, 10.0, 20.0, 30.0]), none, none, ("β=1", "β=2", "β=3", "β=4"))
    other = Curve("other", x + away, named.y + 1.2, none + reach, none)
    found = labels_that_cover_nothing(plots.rate_distortion([named, other], [other], [], []))
    assert found == ["β=1", "β=2", "β=3", "β=4"]


def test_the_legends_cover_no_data(figure):
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= legend.y0
    assert not figure.axes[0].get_legend().get_window_extent().overlaps(figure.axes[1].get_legend().get_window_extent())


def test_collapsed_models_are_marked_and_no_line_leads_to_them(figure):
    for axes in figure.axes:
        dashed = [line for line in axes.lines if line.get_linestyle() != "None"]
        assert [line.get_label() for line in dashed] == ["Shannon"]  # no line between the points
        crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
        assert [line.get_xdata().tolist() for line in crosses] == [[0.0002], *[[0.0003, 0.0002]] * (len(crosses) - 1)]
        assert plots.COLLAPSED in [text.get_text() for text in axes.get_legend().get_texts()]
    over_beta = [curve._replace(x=np.array(BETAS)) for curve in curves(ERRORS, 0)]
    (axes,) = plots.metrics_against_beta({"error": over_beta}).axes[:1]
    for line, collapsed in zip([line for line in axes.lines if line.get_linestyle() == "-"], COLLAPSED, strict=False):
        assert np.isnan(line.get_ydata()).tolist() == collapsed


def test_without_collapse_nothing_is_said_of_it():
    whole = [curve._replace(collapsed=()) for curve in curves(DISTORTIONS, 0)]
    figure = plots.rate_distortion(whole, whole, [], [])
    assert plots.COLLAPSED not in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize(("reach", "seen"), [(0.0, False), (0.2, False), (6.0, True)])
def test_error_bars_lie_behind_their_markers_and_reach_beyond_them(reach, seen):
    """In the color of the marker; the others' pixels are what is left without any bar."""
    x = np.array([0.0, 50.0, 100.0])
    curve = Curve("model", x, x, 0 * x, np.array([0.0, reach, 0.0]))
    without, drawn = (plots.rate_distortion([one], [one], [], []) for one in (curve._replace(y_deviation=0 * x), curve))
    changed = np.argwhere((pixels_of(without) != pixels_of(drawn)).any(axis=-1))
    bar = [(row, column) for row, column in changed.tolist() if column < drawn.axes[0].get_window_extent().x1]
    assert bool(bar) == seen
    (column, row) = drawn.axes[0].transData.transform((50.0, 50.0))
    row = len(pixels_of(drawn)) - row
    assert all(abs(column - own) < 2 and abs(row - at) > 2 for at, own in bar)  # the marker's radius is 3.5 pixels


def test_one_huge_value_does_not_flatten_the_others():
    """Nor does its error bar: a panel with signs leaves it out and says so, a positive one is logarithmic."""
    x, none = np.array(BETAS), np.zeros(len(BETAS))
    signed = Curve("model", x, np.array([-60.0, -50.0, -30.0, 5.0, 7e6]), none, none)
    positive = signed._replace(y=np.array([180.0, 200.0, 250.0, 300.0, 1000.0]))
    whole = signed._replace(y=np.full(len(x), 4.0))
    panels = {"objective": [signed], "FID": [positive], "rate": [signed._replace(y=-x)], "active latents": [whole]}
    figure = plots.metrics_against_beta(panels)
    objective, distance, rate = figure.axes[:3]
    assert objective.get_ylim() == pytest.approx((-63.25, 11.5))
    assert objective.get_title(loc="right") == "cut off: ▲ up to 7e+06"
    assert (objective.get_yscale(), distance.get_yscale(), rate.get_yscale()) == ("linear", "log", "linear")
    figure.canvas.draw()
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes[:3]]
    assert ticks == [["0.01", "0.1", "1", "10", "100"]] * 3
    assert all(value == round(value) for value in figure.axes[3].get_yticks())


@pytest.mark.parametrize(
    ("betas", "ticks"),
    [
        ((0.005, 0.02, 0.08, 0.3, 0.6, 1.0, 2.0, 6.0), ["0.005", "0.02", "0.08", "0.3", "1", "6"]),
        ((0.0, 0.1, 1.0), ["0", "0.1", "1"]),
        ((2.0,), ["2"]),
        ((0.9, 1.0, 1.1, 10.0), ["0.9", "10"]),
    ],
)
def test_the_axis_of_beta_is_marked_where_models_were_trained(betas, ticks):
    x = np.array(betas)
    figure = plots.metrics_against_beta({"rate": [Curve("model", x, x, 0 * x, 0 * x)]})
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ticks


def test_the_numbers_of_an_axis_have_room():
    """The betas of target rates have many digits."""
    x = np.array([0.02782, 0.08544, 0.1965, 1.408, 2.238, 3.28])
    for figure in (
        plots.metrics_against_beta({name: [Curve("model", x, x, 0 * x, 0 * x)] for name in "abc"}),
        plots.latent_rates({name: (x, x[:, None], [False] * 6) for name in "abc"}),
    ):
        figure.canvas.draw()
        for axes in figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert len(boxes) > 2
            assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_no_two_families_look_the_same():
    nothing = np.zeros(1)
    looks = {plots._look(index, Curve("", nothing, nothing, nothing, nothing)) for index in range(64)}
    assert len(looks) == 64


def test_several_priors_have_a_column_each():
    """Of one scale and with one legend; a label keeps its color, and what is written covers nothing and is not cut off."""
    named = [
        curve._replace(panel=panel)
        for panel in ("prior: one", "prior: two", "prior: three")
        for curve in curves(DISTORTIONS, 4)
    ]
    errors = [curve._replace(y=0.05 + 0.04 * np.tanh(curve.y / 100)) for curve in named if curve.label != "model 0"]
    figure = plots.rate_distortion(named, errors, [], [])
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in above] == ["prior: one", "prior: two", "prior: three"]
    for row in (above, below):
        assert len({axes.get_ylim() for axes in row}) == len({axes.get_xlim() for axes in row}) == 1
        assert all([line.get_color() for line in axes.lines] == [line.get_color() for line in row[0].lines] for axes in row)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*(f"model {i}" for i in range(4)), plots.COLLAPSED]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert labels_that_cover_nothing(figure)
    for text in (legend, *(label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label, axes.title))):
        box = text.get_window_extent()
        assert box.width == 0 or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1)


def test_many_names_leave_room_for_the_points():
    one = curves(DISTORTIONS, 0)[0]
    named = [one._replace(label=f"runs/a-folder-of-a-name-of-more-than-forty-letters-{index}") for index in range(24)]
    figure = plots.rate_distortion(named, named, [], [])
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_window_extent().height > 3.5 * figure.dpi
        box = axes.get_legend().get_window_extent()
        assert box.y0 >= 0
        assert box.y1 < axes.xaxis.label.get_window_extent().y0


def test_values_equal_but_for_rounding_are_drawn():
    """A constant variance, of which the mean over images may be the next lower number."""
    x, none = np.array([1.0, 10.0]), np.zeros(2)
    curve = Curve("model", x, np.array([0.5, 0.5 * (1 - 4e-16)]), none, none)
    figure = plots.metrics_against_beta({"decoder variance [intensity²]": [curve]})
    assert figure.axes[0].get_ylim() == pytest.approx((0.25, 1.0))


def test_many_families_leave_their_panels_their_height():
    one = curves(DISTORTIONS, 0)[0]
    named = [one._replace(label=f"β-VAE, constant σ² = 0.5, learning rate {index}, training set") for index in range(36)]
    figure = plots.metrics_against_beta({f"quantity {index}": named for index in range(6)})
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert axes.get_window_extent().height > 1.7 * figure.dpi
        assert box.y1 < axes.xaxis.label.get_window_extent().y0


@pytest.mark.parametrize("count", [2, 5, 6, 17, 40, 60])
def test_the_numbers_of_a_grid_have_room(count):
    betas, variances = [float(f"{beta:.3g}") for beta in np.geomspace(1.234e-4, 1234.0, count)], [0.01, 0.123, 1.0]
    values = {name: np.random.default_rng(0).uniform(-1e5, -1e3, (3, count)) for name in ("rate", "error")}
    others = {f"model {i},\nper image": {name: own[0] for name, own in values.items()} for i in range(2)}
    x, none = np.geomspace(1e-5, 1e3, 5), np.zeros(5)
    collapse = [Curve(f"σ² = {i}", x, x, none, none) for i in range(9)]
    figure = plots.beta_variance_grid(betas, variances, values, others, collapse)
    figure.canvas.draw()
    *maps, right = figure.axes[:3]
    for axes in maps:
        ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(ticks) >= min(count, 30)
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))
        numbers = [text.get_window_extent() for text in axes.texts]
        assert len(numbers) == (5 * count if count <= 40 else 0)
        assert not any(box.count_overlaps(numbers[:index]) for index, box in enumerate(numbers))
    legend, label = figure.legends[0].get_window_extent(), right.xaxis.label.get_window_extent()
    assert 0 <= legend.y0 < legend.y1 < min(label.y0, maps[0].xaxis.label.get_window_extent().y0)
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert label.x1 <= figure.bbox.x1


def test_many_models_are_drawn_in_rows_of_four():
    rates = (np.array(BETAS[:3]), np.array([[5.0, 4.0], [2.0, 0.3], [0.3, 0.1]]), [False] * 3)
    figure = plots.latent_rates({f"model {index}": rates for index in range(6)})
    figure.canvas.draw()
    assert figure.get_figwidth() < 20
    places = [axes.get_position() for axes in figure.axes]
    assert [axes.axison for axes in figure.axes] == [True] * 6 + [False] * 2
    assert places[3].y0 == places[0].y0 > places[4].y1
    assert [axes.get_ylabel() != "" for axes in figure.axes[:6]] == [True, False, False, False, True, False]


def test_places_are_those_of_the_markers(figure):
    hinted = [curve._replace(hints=[f"{curve.label} {name}" for name in NAMES]) for curve in curves(DISTORTIONS, 0)]
    places = plots.places(figure, [hinted])
    assert [hint for *_, hint in places[:6]] == [*(f"model 0 {name}" for name in NAMES), "model 1 β=0.01"]
    figure.set_dpi(150)
    pixels = pixels_of(figure)
    for index, (left, top, _) in enumerate(places):
        x, y = round(left / 100 * pixels.shape[1]), round(top / 100 * pixels.shape[0])
        color = [int(COLORS[index // 5][i : i + 2], 16) for i in (1, 3, 5)]
        around = pixels[y - 5 : y + 6, x - 5 : x + 6]
        covered = index % 5 >= 2 and index >= 5  # another model's marker may lie there
        assert covered or (np.abs(around - color).max(axis=-1) < 12).any()


def test_latents_that_say_little_are_told_apart_and_collapse_is_marked():
    """Rates far below a thousandth of a nat have places of their own, between 0 and the least decade."""
    betas, values = np.array(BETAS[:4]), np.array([[5.0, 4.0], [2.0, 0.3], [4e-3, 2e-4], [0.0, 0.0]])
    figure = plots.latent_rates({"model": (betas, values, [False] * 3 + [True])})
    figure.canvas.draw()
    (axes,) = figure.axes
    drawn = np.array([line.get_ydata() for line in axes.lines[:2]])
    np.testing.assert_array_equal(drawn, np.where([False] * 3 + [True], np.nan, values.T))
    places = axes.transData.transform([(1.0, y) for y in (0.0, 2e-4, 4e-3, 0.3)])[:, 1]
    assert axes.get_window_extent().y0 < places[0] < places[1] < places[2] - 5 < places[3] - 5
    assert axes.lines[2].get_xdata().tolist() == [10.0]
    assert "linear below 0.01" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()][2:] == [plots.COLLAPSED]
    whole = plots.latent_rates({"model": (betas[:3], values[:3], [False] * 3)})
    assert [text.get_text() for text in whole.legends[0].get_texts()] == ["most informative latent", "least informative of 2"]


def test_figures_for_a_paper_have_no_title(figure):
    assert figure.get_suptitle() == ""
