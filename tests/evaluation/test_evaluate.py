"""Reported quantities against float64 NumPy written from the formulas, on scores made by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from bsvae_jax.evaluation import plots
from bsvae_jax.evaluation.metrics import (
    Quantity,
    as_json,
    as_table,
    calibrated_elbo,
    from_json,
    mean_quantity,
    sampling_error,
    summarize,
)
from bsvae_jax.evaluation.scores import SplitScores, calibrate, distortion_at, optimal_variance_of_split
from bsvae_jax.objective import Optimal

S, N, SHAPE, LATENTS, FLOOR = 3, 40, (3, 2, 1), 3, 1 / (12 * 16**2)
PIXELS = (2, 3, 4)
"""Axes of `residuals`."""


@pytest.fixture
def residuals():
    return np.random.default_rng(0).normal(size=(S, N, *SHAPE)) * np.linspace(0.05, 0.3, N).reshape(-1, 1, 1, 1)


@pytest.fixture
def scores(residuals):
    generator = np.random.default_rng(1)
    rate = generator.uniform(1, 5, (S, N))
    posterior_mean = generator.normal(size=(N, LATENTS)) * np.array([1.0, 0.5, 0.01])  # the last one is inactive
    squared = np.square(residuals)
    latent_rate = generator.dirichlet(np.ones(LATENTS)) * rate.mean()
    return SplitScores(
        squared_error=squared.sum(axis=PIXELS),
        rate=rate,
        pixel_squared_error=squared.mean(axis=(0, 1)),
        posterior_mean=posterior_mean,
        latent_rate=latent_rate,
        model_distortion=2.0 * rate,
        model_variance=0.01,
        scaled_error=(squared / (squared.mean(axis=(0, 1)) + FLOOR)).sum(axis=PIXELS),
    )


def test_likelihoods_are_gaussian_densities(scores, residuals):
    calibration = calibrate(scores, 7, FLOOR)
    summary = summarize(scores, 3.0, calibration)
    variance = np.square(residuals).mean() + FLOOR
    assert calibration.variance == pytest.approx(variance)
    # SciPy's normal density at the residuals, plus the expected dequantization noise D v0 / (2 v).
    nll = -stats.norm.logpdf(residuals, scale=np.sqrt(variance)).sum(axis=PIXELS) + 6 * FLOOR / (2 * variance)
    assert summary["calibrated_distortion"].value == pytest.approx(nll.mean())
    assert summary["calibrated_distortion"].value == pytest.approx(3 * (np.log(2 * np.pi * variance) + 1))  # closed form
    assert summary["calibrated_elbo"].value == pytest.approx(-(nll + scores.rate).mean())
    # Over images, of which each has the mean of its samples.
    assert summary["calibrated_elbo"].standard_error == pytest.approx(stats.sem((nll + scores.rate).mean(axis=0)))
    np.testing.assert_allclose(calibrated_elbo(scores, calibration), -(nll + scores.rate))
    per_pixel = np.square(residuals).mean(axis=(0, 1)) + FLOOR
    nll = -stats.norm.logpdf(residuals, scale=np.sqrt(per_pixel)).sum(axis=PIXELS) + (FLOOR / (2 * per_pixel)).sum()
    found = summary["calibrated_elbo_per_pixel_variance"]
    assert found.value == pytest.approx(-(nll + scores.rate).mean())
    assert found.standard_error == pytest.approx(stats.sem((nll + scores.rate).mean(axis=0)))
    own = np.square(residuals).mean(axis=PIXELS, keepdims=True) + FLOOR  # of each sample its own
    profile = -stats.norm.logpdf(residuals, scale=np.sqrt(own)).sum(axis=PIXELS) + 3 * FLOOR / own.reshape(S, N)
    assert summary["profile_elbo"].value == pytest.approx(-(profile + scores.rate).mean())


def test_the_noise_of_posterior_samples_is_told_from_that_of_images():
    """Of 2,000 images, 5 samples with a deviation of 3 each about means that differ by 10: 0.03 nats, to 2%."""
    generator = np.random.default_rng(0)
    values = 10 * generator.normal(size=2_000) + 3 * generator.normal(size=(5, 2_000))
    assert sampling_error(values) == pytest.approx(3 / np.sqrt(5 * 2_000), rel=0.02)
    # The standard error holds both: sqrt(10^2 + 3^2 / 5) / sqrt(2,000), to 3 of its deviations, 1.6% each.
    assert mean_quantity(values, "", "").standard_error == pytest.approx(np.sqrt(101.8 / 2_000), rel=0.05)


def test_the_noise_of_one_posterior_sample_is_not_known(scores):
    one = scores._replace(**{name: getattr(scores, name)[:1] for name in ("squared_error", "rate", "model_distortion")})
    of_splits = {"train": one._replace(scaled_error=scores.scaled_error[:1]), "test": scores}
    report = {split: summarize(own, 1.0, calibrate(scores, 7, FLOOR)) for split, own in of_splits.items()}
    assert "sampling_error" not in report["train"]
    assert [report[split]["posterior_samples"].value for split in report] == [1, S]
    (line,) = [line for line in as_table(report).splitlines() if line.startswith("sampling_error ")]
    assert line.split() == [
        "sampling_error",
        f"{report['test']['sampling_error'].value:.5g}",
        *["nats", "what", "these", "samples", "leave", "in", "calibrated_elbo"],
    ]


def test_bits_per_dimension_and_objective(scores):
    summary = summarize(scores, 3.0, calibrate(scores, 7, FLOOR))
    # 6 pixels on a grid of 1/16: -log2 of the probability of one cell.
    bits = -summary["calibrated_elbo"].value / (6 * np.log(2)) + 4
    assert summary["calibrated_bits_per_dimension"].value == pytest.approx(bits)
    assert summary["objective"].value == pytest.approx(5.0 * scores.rate.mean())  # 2 rate (distortion) + 3 rate
    assert summary["active_units"].value == 2


def test_reconstruction_error(scores, residuals):
    summary = summarize(scores, 3.0, calibrate(scores, 7, FLOOR))
    mse = np.square(residuals).mean(axis=PIXELS)
    assert summary["mse"].value == pytest.approx(mse.mean())
    assert summary["psnr"].value == pytest.approx(np.mean(10 * np.log10(1 / mse)))


def test_a_split_shares_its_variance_in_three_ways(scores, residuals):
    squared = np.square(residuals)
    np.testing.assert_allclose(optimal_variance_of_split(scores, "example", FLOOR), squared.mean(axis=PIXELS) + FLOOR)
    assert optimal_variance_of_split(scores, "batch", FLOOR) == pytest.approx(squared.mean() + FLOOR)
    np.testing.assert_allclose(optimal_variance_of_split(scores, "pixel", FLOOR), squared.mean(axis=(0, 1)) + FLOOR)
    np.testing.assert_allclose(
        distortion_at(scores, 0.5, 0.0), 3 * np.log(np.pi) + squared.sum(axis=PIXELS), rtol=1e-12
    )  # sigma^2 = 1/2: D/2 log(pi) + SSE, the paper's first reading


@pytest.mark.parametrize("over", ["batch", "pixel", "channel"])
def test_an_optimal_variance_of_a_whole_split_is_shared_over_the_split(residuals, over):
    """Against SciPy's densities and the dequantization noise, averaged over the split; shapes [3, 2, 2]: two channels."""
    residuals = np.stack([residuals[0, ..., 0], 2 * residuals[0, ..., 0]], axis=-1)
    squared = np.square(residuals)
    variance = squared.mean(axis={"batch": None, "pixel": 0, "channel": (0, 1, 2)}[over]) + FLOOR
    noise = np.sum(np.broadcast_to(FLOOR / (2 * variance), squared.shape[1:]))
    expected = noise - stats.norm.logpdf(residuals, scale=np.sqrt(variance)).sum(axis=(1, 2, 3))
    distortion, mean_variance = Optimal(over, FLOOR).split_distortion(
        squared.sum(axis=(1, 2, 3)), squared.mean(axis=0), (np.zeros(N), 0.0)
    )
    assert distortion.shape == (N,)
    np.testing.assert_allclose(distortion.mean(), expected.mean(), rtol=1e-12)
    assert mean_variance == pytest.approx(np.mean(variance))


def test_table_and_json_say_the_same(scores):
    report = {"test": summarize(scores, 1.0, calibrate(scores, 7, FLOOR))}
    values = json.loads(json.dumps(as_json(report)))
    assert values["test"]["rate"]["value"] == pytest.approx(scores.rate.mean())
    assert from_json(values) == report
    (line,) = [line for line in as_table(report).splitlines() if line.startswith("rate ")]
    assert f"{scores.rate.mean():.5g} ± " in line


def test_a_meaning_with_numbers_of_a_split_names_the_split():
    information = {split: Quantity(size, None, "nats", f"<= log N = {size}") for split, size in (("train", 7.0), ("test", 5.0))}
    report = {split: {"rate": Quantity(8.0, 0.5, "nats", "KL"), "information": own} for split, own in information.items()}
    _, rate, bound = as_table(report).splitlines()
    assert rate.split() == ["rate", *["8", "±", "0.5"] * 2, "nats", "KL"]
    assert bound.split() == ["information", "7", "5", "nats", *["train:", "<=", "log", "N", "=", "7.0"]]


# --- Figures ----------------------------------------------------------------------------------------------------------


def _pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255.0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_at_its_place(channels):
    images = np.zeros((5, 4, 4, channels))
    images[3] = 1.0  # second row of two columns, right
    image = _pixels(plots.image_grid(images, "five", columns=2))
    axes_rows, axes_columns = np.nonzero((image < 0.01).all(axis=-1))
    top, bottom, left, right = axes_rows.min(), axes_rows.max(), axes_columns.min(), axes_columns.max()
    tile = image[top:bottom, left:right]
    height, width = tile.shape[:2]
    at = lambda row, column: tile[int((row + 0.5) / 3 * height), int((column + 0.5) / 2 * width)].mean()  # noqa: E731
    assert [round(at(row, column)) for row in range(3) for column in range(2)] == [0, 0, 0, 1, 0, 1]  # last: no image, white


def test_training_curves_have_units_and_both_splits():
    terms = dict(objective=3.0, distortion=2.0, rate=1.0, mse=0.1, variance=0.1)
    rows = [
        dict(step=step, epoch=step // 2, split=split, learning_rate=1e-3, **terms)
        for step in (2, 4, 6)
        for split in ("train", "test")
    ]
    figure = plots.training_curves(rows, "title")
    labels = " ".join(axes.get_ylabel() for axes in figure.axes)
    assert labels.count("[nats per image]") == 3
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["epoch"] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training batches", "test set"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [1, 2, 3])


def test_training_curves_say_what_they_cut_off():
    """The first steps of forty lie beyond the axis, where they would flatten the others."""
    rows = [
        dict(step=step, epoch=step, split="train", learning_rate=1e-3, rate=rate, objective=rate % 2, distortion=1.0, mse=0.1)
        for step, rate in enumerate([-70.0, 123.456, *np.linspace(20.0, 30.0, 38)], 1)
    ]
    objective, _, rate, *_ = plots.training_curves(rows, "title").axes
    assert rate.get_title(loc="right") == "cut off: ▲ up to 123.5, ▼ down to -70"
    assert rate.get_ylim() == pytest.approx((19.5, 31.0))
    assert objective.get_title(loc="right") == ""  # 0 to 2 from first to last


def test_traversals_and_reconstructions_are_labeled():
    zeros, values = np.zeros((2, 13, 4, 4, 1)), np.linspace(-3, 3, 13).tolist()
    traversals = plots.latent_traversals(zeros, values, ["z5", "z1"], "title", of="2 of 9 latents, most informative first")
    traversals.draw_without_rendering()  # the layout, and then what is drawn in it, as `savefig` has it
    traversals.set_layout_engine("none")
    traversals.canvas.draw()
    (axes,) = traversals.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z5", "z1"]
    assert axes.get_xlabel() == "value of the latent [prior standard deviations]\n2 of 9 latents, most informative first"
    (left, below), (right, above) = axes.xaxis.label.get_window_extent().get_points()
    assert 0 <= left < right <= traversals.bbox.width  # beside two rows it would be cut
    assert -1 <= below < above <= traversals.bbox.height  # the last pixel is below the letters
    pairs = plots.reconstructions(np.zeros((15, 4, 4, 1)), np.ones((15, 4, 4, 1)), "title", columns=10)
    assert len(pairs.axes) == 2
    assert [label.get_text() for label in pairs.axes[0].get_yticklabels()] == ["original", "decoder mean"]
