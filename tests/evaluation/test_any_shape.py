"""Everything after training for examples that are no images: vectors, sequences and volumes of floats of any range."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import main, refused

from bsvae_jax.config import MLP, Config, Dataset
from bsvae_jax.data import ImageSet
from bsvae_jax.data.augmentation import Augmentation
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation import diagnostic_plots, plots, sampling
from bsvae_jax.evaluation.evaluate import Fid, evaluate
from bsvae_jax.evaluation.figures import draw
from bsvae_jax.evaluation.scores import split_key
from bsvae_jax.objective import Optimal
from bsvae_jax.random import example_keys, normal_per_example
from bsvae_jax.sweeps import plots as sweep_plots
from bsvae_jax.sweeps.fit_sweep import fit_sweep
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.sweeps.report import write_report
from bsvae_jax.training.fit import fit
from bsvae_jax.training.restore import restore

VECTORS, SEQUENCES, VOLUMES = (5,), (16, 3), (3, 4, 4, 1)
SHAPES = (VECTORS, SEQUENCES, VOLUMES)
KEPT = ("originals", "reconstructions", "samples")


@dataclass(frozen=True)
class Blobs(Dataset):
    """60 examples of a shape around 3, far outside [0, 1]."""

    size: tuple[int, ...] = SEQUENCES
    scale: float = 4.0

    def load(self):
        values = np.random.default_rng(0).normal(size=(60, 2)) @ np.random.default_rng(1).normal(size=(2, np.prod(self.size)))
        values = (3.0 + self.scale * values).reshape(60, *self.size).astype(np.float32)
        return ImageSet("blobs", values[:30], values[30:])


def config_of(shape) -> Config:
    return Config(data=Blobs(shape), network=MLP((8,)), latent_size=2, epochs=1, batch_size=30, devices=1)


class Runs(dict[tuple, Path]):
    """Folders of runs by shape, each trained when it is first asked for."""

    def __init__(self, parent: Path):
        self.parent = parent

    def __missing__(self, shape: tuple) -> Path:
        self[shape] = self.parent / f"rank{len(shape)}"
        fit(config_of(shape), self[shape], progress=False)
        return self[shape]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_leaves_out_what_needs_an_image(folder, shape):
    images = Blobs(shape).load()
    report = evaluate(restore(folder[shape]), images, ("test",)).report["test"]
    assert not {"psnr", "ssim"} & set(report)
    assert {"mse", "rate", "calibrated_elbo", "calibrated_bits_per_dimension", "mutual_information"} <= set(report)
    assert "psnr" not in json.loads((folder[shape] / "evaluation.json").read_text())["splits"]["test"]


@pytest.mark.long
def test_the_numbers_of_sequences_are_those_of_numpy(folder):
    run, images = restore(folder[SEQUENCES]), Blobs(SEQUENCES).load()
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run.variables["params"])

    def layer(part, name, x):
        return x @ params[part][name]["kernel"] + params[part][name]["bias"]

    def silu(x):
        return x * (1 + np.tanh(x / 2)) / 2

    squared_error, rate = {}, {}
    for split in ("train", "test"):
        x = getattr(images, split).astype(np.float64).reshape(30, -1)
        mean, log_variance = np.split(layer("encoder", "posterior", silu(layer("encoder", "Dense_0", x))), 2, axis=1)
        keys = example_keys(split_key(run.config.seed, split), jnp.arange(30))
        z = mean + np.exp(log_variance / 2) * np.asarray(normal_per_example(keys, (2,)), np.float64)
        squared_error[split] = np.sum((x - layer("decoder", "mean", silu(layer("decoder", "Dense_0", z)))) ** 2, axis=1)
        rate[split] = 0.5 * np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance, axis=1)
    v0 = 1 / 255**2 / 12
    variance = squared_error["train"].mean() / 48 + v0
    distortion = 24 * np.log(2 * np.pi * variance) + (squared_error["test"] + 48 * v0) / (2 * variance)
    report = evaluate(run, images, ("test",), posterior_samples=1).report["test"]
    assert report["rate"].value == pytest.approx(rate["test"].mean(), rel=1e-4)
    assert report["mse"].value == pytest.approx(squared_error["test"].mean() / 48, rel=1e-4)
    assert report["calibrated_elbo"].value == pytest.approx(-(distortion + rate["test"]).mean(), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("shape", [VECTORS, VOLUMES])
def test_figures_of_a_run(folder, shape):
    names = {path.name for path in draw(restore(folder[shape]), Blobs(shape).load(), folder[shape])}
    assert names == {"training_curves.png", "reconstructions.png", "samples.png", "latent_traversals.png"}


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_keep_their_range(folder, shape, capsys, tmp_path):
    main("sample", folder[shape], "--count", 3, "--out", tmp_path / "few.npz")
    drawn = np.load(tmp_path / "few.npz")["images"]
    assert (drawn.dtype, drawn.shape) == (np.float32, (3, *shape))
    (expected,) = sampling.sample_batches(restore(folder[shape]), 3)
    np.testing.assert_array_equal(drawn, expected)
    assert f"of shape {shape}; give --out" in refused(capsys, "sample", folder[shape], "--out", tmp_path / "few.png")


@pytest.mark.long
@pytest.mark.parametrize("count", [3, 260, 501])
def test_what_is_decoded_in_pieces_is_the_same(folder, count, monkeypatch):
    """As large images are: on eight devices here, 500 in pieces of 120 divide over neither."""
    run = restore(folder[VECTORS])
    whole = sampling.sample_prior(run, count)
    monkeypatch.setattr(sampling, "evaluation_batch", lambda shape, most: 120)
    assert sampling.pieces(VECTORS) == 5
    np.testing.assert_allclose(sampling.sample_prior(run, count), whole, rtol=1e-5)


@pytest.mark.long
def test_a_sweep_of_sequences_is_reported(tmp_path):
    fit_sweep(config_of(SEQUENCES), Sweep((0.5, 1.0), (Optimal(),), 1), tmp_path / "sweep", progress=False)
    (one, _) = sorted((tmp_path / "sweep" / "members").iterdir())
    with np.load(one / "pictures.npz") as pictures:
        assert all(pictures[name].dtype == np.float32 for name in KEPT)
        np.testing.assert_array_equal(pictures["originals"], Blobs(SEQUENCES).load().test[:10])
    names = {path.name for path in write_report(tmp_path / "sweep")}
    assert {"table.csv", "report.html", "pictures_optimal.png", "rate_distortion.png"} <= names
    assert "psnr" not in (tmp_path / "sweep" / "table.csv").read_text()


def test_lines_lie_in_their_boxes_at_one_scale():
    """Two sequences side by side: a ramp from the least to the greatest value, and a constant half-way."""
    examples = np.stack([np.linspace(-1.0, 3.0, 5), np.full(5, 1.0)])[..., None]
    axes = plots.new_figure(3.0, 2.0).subplots()
    plots.show_examples(axes, examples, 2)
    height, width = plots.cell_size((5, 1))
    x, y = map(np.asarray, axes.lines[0].get_data())
    inset = 0.05 * width
    np.testing.assert_allclose(x[[0, 4, 6, 10]], [inset, width - inset, width + 1 + inset, 2 * width + 1 - inset])
    np.testing.assert_allclose(y[[0, 4, 6, 10]], [height, 0, height / 2, height / 2])
    assert np.isnan(y[[5, 11]]).all()  # no line from one example to the next
    assert axes.texts[0].get_text() == "boxes: -1 to 3"


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_every_figure_takes_any_shape(shape):
    values = np.random.default_rng(0).uniform(size=(6, *shape))
    grid, rows = values.reshape(2, 3, *shape), np.ones(6)
    figures = [
        plots.image_grid(values, "samples"),
        plots.reconstructions(values, values[::-1], "pairs"),
        plots.latent_traversals(grid, [-1.0, 0.0, 1.0], ["z0", "z1"], "latents"),
        diagnostic_plots.interpolations(grid, ["linear", "linear"], "between"),
        diagnostic_plots.nearest_neighbors(values, values, {"samples": rows}, "near"),
        diagnostic_plots.variance_maps(values[0], values[1], values[2], "maps"),
        diagnostic_plots.variance_by_difficulty(rows, rows, rows, 1.0, values, values, "difficulty"),
        sweep_plots.pictures_by_beta(values, values[None], values[None], ["β = 1"]),
    ]
    for figure in figures:
        figure.canvas.draw()
    lined = figures[1].axes[0].lines
    assert len(lined) == (0 if shape == VOLUMES else 2 * (1 if shape == VECTORS else 3))
    if shape == VOLUMES:  # the middle of three slices
        np.testing.assert_array_equal(figures[5].axes[0].images[0].get_array(), values[0, 1, :, :, 0])


def test_images_beyond_the_unit_interval_are_no_pictures_of_8_bits():
    pale = np.zeros((2, 4, 4, 1), np.float32)
    inside, beyond = ImageSet("pale", pale, pale + 1), ImageSet("field", pale - 1, pale + np.float32(3))
    assert inside.holds_images
    assert not beyond.holds_images
    np.testing.assert_allclose(beyond.as_shown(np.array([3.0])), 0.0)
    assert inside.as_shown(pale) is pale


def test_what_needs_an_image_says_so(folder, tmp_path):
    config = dataclasses.replace(config_of(SEQUENCES), augmentation=Augmentation(flip=True))
    with pytest.raises(UserError, match=r"augmentation rotates, crops and flips images \[H, W, C\].*\(16, 3\)"):
        fit(config, tmp_path / "run", progress=False)
    with pytest.raises(
        UserError, match=r"FID compares images \[H, W, C\] in \[0, 1\]; the examples of blobs are of shape \(5,\)"
    ):
        evaluate(restore(folder[VECTORS]), Blobs(VECTORS).load(), fid_options=Fid(samples=4))
    with pytest.raises(UserError, match="PNG files hold images"):
        sampling.write_folder(restore(folder[VECTORS]), tmp_path / "png", 3, 0, False, lambda _: None)


def test_a_field_called_kind_is_refused():
    @dataclass(frozen=True)
    class Odd(Blobs):
        kind: str = "odd"

    with pytest.raises(UserError, match="a field of Odd is called kind"):
        Config(data=Odd())


NAMES = ("US$_$^", r"b\c$x$", "_hidden", "{100%}", "猫", "a\\$b$")


def test_names_are_drawn_as_they_are(tmp_path):
    def drawn(figure):
        plots.save(figure, tmp_path / "names.png")  # a formula that does not parse would end it
        return (tmp_path / "names.png").read_bytes()

    figure = diagnostic_plots.latent_space(
        np.ones((len(NAMES), 2)), (0.5, 0.5), {"$_": (np.arange(len(NAMES)), NAMES)}, "of $_$"
    )
    drawn(figure)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    for name, label in zip(NAMES, legend, strict=True):
        own, plain = plots.new_figure(2.0, 1.0, name), plots.new_figure(2.0, 1.0)
        plain.suptitle(name, parse_math=False)
        assert drawn(own) == drawn(plain)
        assert own.get_suptitle() == label
