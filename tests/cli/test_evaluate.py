"""`bsvae evaluate` and `bsvae sample` as a user gives them: numbers, figures, interruptions, wrong options."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import main, random_weights, refused
from PIL import Image

from bsvae_jax import data
from bsvae_jax.config import load_config
from bsvae_jax.data import ImageSet
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation import diagnostic_figures, evaluate, importance_weighted, sampling
from bsvae_jax.evaluation.evaluate import Fid
from bsvae_jax.evaluation.fid import distance, inception, lenet
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.sweeps.report import write_report  # noqa: F401 (Python 3.11 may fail to compile it deep inside a call)
from bsvae_jax.training.fit import fit
from bsvae_jax.training.per_image import read_per_image
from bsvae_jax.training.restore import restore

CONFIG = """
from bsvae_jax.config import MLP, Config
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.objective import Constant, Optimal
def get_config():
    return Config(network=MLP((16,)), latent_size=4, epochs=2, batch_size=500, devices=1, evaluate_every=2)
def get_sweep():
    return Sweep(beta=(1.0, 4.0), decoder_variance=(Optimal(),), seeds=1)
"""

pytestmark = pytest.mark.usefixtures("unchecked")


def values(folder):
    report = json.loads((folder / "evaluation.json").read_text())["splits"]
    return {split: {name: quantity["value"] for name, quantity in part.items()} for split, part in report.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.py").write_text(CONFIG)
    fit(load_config(folder / "small.py"), folder / "run", progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(path, **random_weights())
    return path


@pytest.fixture
def cheap_features(monkeypatch, tmp_path):
    """100 random projections in place of Inception, which takes a fifth of a second an image here; all else is as it is."""
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "FEATURES", 100)
    projection = np.random.default_rng(0).normal(size=(64, 100)).astype(np.float32)
    seen = []

    def features(network, batches, mesh, batch_size):
        for batch in batches:
            assert batch.dtype == np.uint8
            seen.append(batch)
            yield (batch.reshape(len(batch), -1) / np.float32(255)) @ projection

    monkeypatch.setattr(FeatureNetwork, "features", features)
    return seen, projection


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_number_and_figure(trained, capsys):
    main("evaluate", trained, "--samples", 3)
    table = capsys.readouterr().out
    found = values(trained)
    assert set(found) == {"train", "test", "validation"}
    for split in found.values():
        # Three samples tighten the bound; noise of the data costs a little.
        assert split["importance_weighted_bound"] > split["importance_weighted_bound_dequantized"] > split["calibrated_elbo"]
        assert 1 <= split["effective_samples"] <= 3
        assert split["mutual_information"] + split["aggregate_kl"] == pytest.approx(split["rate"], abs=0.3)
        assert split["total_correlation"] + split["dimension_kl"] == pytest.approx(split["aggregate_kl"], abs=1e-6)
        assert -1 < split["ssim"] < 1
        bits = -split["importance_weighted_bound_dequantized"] / (64 * np.log(2)) + 4
        assert split["importance_weighted_bound_bits_per_dimension"] == pytest.approx(bits)
    assert "K = 3" in table
    names = ["interpolations", "nearest_neighbors"]
    for split in ("train", "test"):
        names += [
            f"{name}_{split}" for name in ("residuals", "variance_maps", "variance_by_difficulty", "rate_parts", "likelihood")
        ]
    for name in names:
        with Image.open(trained / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300, name
            assert len(image.convert("L").getcolors(256)) > 20, f"{name} shows nothing"
    # A later call that asks for less keeps what was found.
    main("evaluate", trained, "--split", "test", "--posterior-samples", 2, "--no-figures")
    again = values(trained)
    assert again["test"]["importance_weighted_bound"] == found["test"]["importance_weighted_bound"]
    assert [own["posterior_samples"] for own in (found["train"], found["test"], again["test"])] == [8, 16, 2]
    assert again["test"]["sampling_error"] != found["test"]["sampling_error"]
    main("evaluate", trained, "--split", "test", "--posterior-samples", 1, "--no-figures")
    assert "sampling_error" not in values(trained)["test"]
    assert "sampling_error" in values(trained)["train"]
    main("evaluate", trained, "--split", "test", "--posterior-samples", 2, "--no-figures")
    assert read_per_image(trained, 6).mean() == pytest.approx(again["test"]["calibrated_elbo"], rel=1e-12)


@pytest.mark.long
def test_every_split_of_labeled_images_has_its_figures(tmp_path):
    """Of as many labels as it has images."""
    (tmp_path / "small.py").write_text(
        CONFIG.replace("epochs=2", "epochs=2, data=Digits(validation=0.2)").replace("MLP, C", "MLP, Digits, C")
    )
    main("train", tmp_path / "small.py", "--workdir", tmp_path / "run")
    main("evaluate", tmp_path / "run")
    drawn = {path.name for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert drawn >= {f"latent_space_{split}.png" for split in ("train", "test", "validation")}


@pytest.mark.long
def test_an_interrupted_bound_continues(trained, monkeypatch):
    run, images = restore(trained), data.load(restore(trained).config.data)
    monkeypatch.setattr(importance_weighted, "DECODED_AT_ONCE", 8)
    expected = evaluate.evaluate(run, images, ["test"], samples=2)
    done = []

    def interrupt(*arguments, **options):
        def keep(state):
            options["keep"](state)
            done.append(state.done)
            if len(done) == 3:
                raise KeyboardInterrupt

        return original(*arguments, **options | {"keep": keep, "keep_every": -1.0})

    original = importance_weighted.importance_weighted
    monkeypatch.setattr(importance_weighted, "importance_weighted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, images, ["test"], samples=2, workdir=trained)
    starts = []
    monkeypatch.setattr(
        importance_weighted, "importance_weighted", lambda *a, **o: starts.append(o["partial"]) or original(*a, **o)
    )
    found = evaluate.evaluate(run, images, ["test"], samples=2, workdir=trained)
    assert starts[0].done == done[-1] > 0
    assert found.report == expected.report
    assert not (trained / ".bound-test.npz").exists()
    # What was kept for another number of samples is of no use.
    monkeypatch.setattr(importance_weighted, "importance_weighted", interrupt)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, images, ["test"], samples=2, workdir=trained)
    monkeypatch.setattr(
        importance_weighted, "importance_weighted", lambda *a, **o: starts.append(o["partial"]) or original(*a, **o)
    )
    evaluate.evaluate(run, images, ["test"], samples=3, workdir=trained)
    assert starts[-1] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--samples", 0], "must lie in 1 ... 5,000, got 0"),
        (["--samples", 5001], "must lie in 1 ... 5,000, got 5001"),
        (["--samples", 2, "--bound-images", 0], "needs at least one image, got 0"),
        (["--posterior-samples", 0], "--posterior-samples must be a whole number >= 1, got 0"),
        (["--fid", 3], "at least 4, got 3"),
        (["--inception-weights", "x.npz"], "give --fid N"),
        (["--fid-network", "lenet"], "give --fid N"),
        (["--fid", 10, "--fid-network", "lenet", "--inception-weights", "x.npz"], "is for --fid-network inception"),
        (["--fid", 10, "--fid-network", "lenet", "--protocol", "paper"], "the network 'inception'; 'lenet' is trained"),
        (["--fid", 10, "--inception-weights", "absent.npz"], "There is no file absent.npz"),
    ],
)
def test_wrong_options(options, sentence, trained, capsys):
    before = (trained / "evaluation.json").read_bytes()
    assert sentence in refused(capsys, "evaluate", trained, *options)
    assert (trained / "evaluation.json").read_bytes() == before


def test_parameters_that_are_not_finite_are_refused(trained):
    run = restore(trained)
    run.variables["params"]["decoder"]["mean"]["bias"] = run.variables["params"]["decoder"]["mean"]["bias"] * np.nan
    with pytest.raises(UserError, match="has diverged, there is nothing to evaluate"):
        evaluate.evaluate(run, data.load(run.config.data))


# --- FID --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_fid_of_samples_against_the_images(trained, weights, cheap_features, capsys):
    """Against the distances of the same projections, computed here from the images themselves."""
    seen, projection = cheap_features
    main("evaluate", trained, "--split", "test", "--fid", 700, "--inception-weights", weights, "--no-figures")
    assert "NOT the published weights" in capsys.readouterr().out
    samples, images = np.concatenate(seen[:2]), np.concatenate(seen[2:])
    assert (len(samples), len(images)) == (700, 297)
    stored = data.load(restore(trained).config.data).test
    np.testing.assert_array_equal(images, np.round(stored / 16 * 255).astype(np.uint8))
    x, y = (part.reshape(len(part), -1) / np.float32(255) @ projection for part in (samples, images))
    expected = distance.frechet_distance(
        x.mean(axis=0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False),
        y.mean(axis=0, dtype=np.float64), np.cov(y.astype(np.float64), rowvar=False),
    )  # fmt: skip
    found = values(trained)["test"]
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert found["kid"] == pytest.approx(distance.kernel_distance(x, y).value, rel=1e-4)
    # The reference is kept, of the samples nothing.
    seen.clear()
    main("evaluate", trained, "--split", "test", "--fid", 700, "--inception-weights", weights, "--no-figures")
    assert sum(map(len, seen)) == 700
    assert not list(trained.glob(".fid-*"))


def test_a_covariance_of_too_few_samples_is_said(trained, weights, cheap_features, capsys):
    main("evaluate", trained, "--split", "test", "--fid", 90, "--inception-weights", weights, "--no-figures")
    assert "rank 89 in 100 dimensions and is far too high; use more than 100" in capsys.readouterr().err


def test_the_papers_protocol_stretches_every_sample_and_says_so(trained, weights, cheap_features, capsys, monkeypatch):
    seen, _ = cheap_features
    monkeypatch.setattr(evaluate, "PAPER_SAMPLES", 600)
    main("evaluate", trained, "--split", "test", "--protocol", "paper", "--inception-weights", weights, "--no-figures")
    samples = np.concatenate(seen[:2])
    assert len(samples) == 600
    assert set(samples.min(axis=(1, 2, 3))) == {0}
    assert set(samples.max(axis=(1, 2, 3))) == {255}
    assert "fid_paper_protocol" in values(trained)["test"]
    assert "PAPER'S PROTOCOL" in capsys.readouterr().out


@pytest.mark.long
def test_distances_by_a_network_trained_on_the_classes(trained, capsys, monkeypatch, tmp_path):
    """Against the distances of what `bsvae sample` would draw, by the features of the network that was kept."""
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lenet, "STEPS", 10)
    main("evaluate", trained, "--split", "test", "--fid", 600, "--fid-network", "lenet", "--no-figures")
    assert "of a LeNet that tells" in capsys.readouterr().out
    run, images = restore(trained), data.load(restore(trained).config.data)
    network = lenet.network(images)
    seed = int(jax.random.bits(jax.random.fold_in(jax.random.key(run.config.seed), evaluate.FID_SALT)))
    drawn = sampling.sample_prior(run, 600, seed)
    stored = np.round(images.test / 16 * 255).astype(np.uint8)
    x, y = (np.concatenate(list(network.features([part], data_mesh(), 100))).astype(np.float64) for part in (drawn, stored))
    assert x.shape == (600, 500)
    expected = distance.frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False))
    found = values(trained)["test"]
    assert found["lenet_fid"] == pytest.approx(expected, rel=1e-5)
    assert found["lenet_kid"] == pytest.approx(distance.kernel_distance(x, y).value, rel=1e-4)


def test_interrupted_features_continue(trained, weights, cheap_features, monkeypatch):
    seen, _ = cheap_features
    run, images = restore(trained), data.load(restore(trained).config.data)
    options = Fid(3100, inception.load_weights(weights))
    expected = evaluate.evaluate(run, images, ["test"], fid_options=options, workdir=trained).report["test"]["fid"].value
    seen.clear()
    cheap = FeatureNetwork.features

    def interrupt(*arguments):
        if sum(map(len, seen)) >= 2500:
            raise KeyboardInterrupt
        return cheap(*arguments)

    monkeypatch.setattr(FeatureNetwork, "features", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, images, ["test"], fid_options=options, workdir=trained)
    monkeypatch.setattr(FeatureNetwork, "features", cheap)
    seen.clear()
    found = evaluate.evaluate(run, images, ["test"], fid_options=options, workdir=trained).report["test"]["fid"].value
    assert sum(map(len, seen)) == 1100, "2,000 were kept"
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.long
def test_a_damaged_reference_is_named(trained, weights, cheap_features, tmp_path, capsys):
    command = ("evaluate", trained, "--split", "test", "--fid", 10, "--inception-weights", weights, "--no-figures")
    main(*command)
    (reference,) = (tmp_path / "cache" / "fid").glob("*.npz")
    reference.write_bytes(reference.read_bytes()[:1000])
    assert f"{reference} cannot be read as a NumPy file" in refused(capsys, *command)


@pytest.mark.long
def test_the_real_network_runs_over_several_devices(weights):
    """Eight fake devices and one, on four images: the sharded stream gives the features of one device."""
    network = inception.load_weights(weights).network()
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    one, two = (np.concatenate(list(network.features([images], data_mesh(n), 2))) for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


# --- A sweep ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_evaluating_a_sweep_fills_its_table(tmp_path, weights, cheap_features, capsys):
    (tmp_path / "small.py").write_text(CONFIG)
    main("sweep", tmp_path / "small.py", "--workdir", tmp_path / "sweep")
    main("evaluate", tmp_path / "sweep", "--split", "test", "--fid", 20, "--inception-weights", weights)
    header = (tmp_path / "sweep" / "table.csv").read_text().splitlines()[0]
    assert "fid_mean" in header
    assert "FID" in (tmp_path / "sweep" / "report.html").read_text()
    assert "FID" in capsys.readouterr().out
    # Of the best checkpoints there is no report: their own numbers, by member.
    main("evaluate", tmp_path / "sweep", "--split", "test", "--checkpoint", "best", "--json")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert sorted(found) == ["checkpoint", "members", "workdir"]
    assert found["checkpoint"] == "best"
    assert sorted(found["members"]) == ["optimal_beta1_seed0", "optimal_beta4_seed0"]
    for name, own in found["members"].items():
        best = json.loads((tmp_path / "sweep" / "members" / name / "evaluation_best.json").read_text())
        assert (own["checkpoint"], own["step"], own["splits"]) == ("best", best["step"], best["splits"])


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_devices(trained, monkeypatch):
    run = restore(trained)
    on_eight = sampling.sample_prior(run, 510, seed=3)
    monkeypatch.setattr(sampling, "data_mesh", lambda: data_mesh(1))
    on_one = sampling.sample_prior(run, 510, seed=3)
    # A mean within rounding of half a gray level may fall to either side.
    assert np.abs(on_one.astype(int) - on_eight).max() <= 1
    assert (on_one != on_eight).mean() < 1e-3


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_interrupted_sampling_continues(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "BATCH", 5)
    main("sample", trained, "--count", 23, "--out", tmp_path / f"expected-{name}")
    real, drawn = sampling.sample_batches, []

    def interrupt(run, count, seed, first, *labels):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(first)
        return real(run, count, seed, first, *labels)

    monkeypatch.setattr(sampling, "sample_batches", interrupt)
    with pytest.raises(SystemExit) as stop:
        main("sample", trained, "--count", 23, "--out", tmp_path / name)
    assert stop.value.code == 130
    capsys.readouterr()
    drawn.clear()
    monkeypatch.setattr(sampling, "sample_batches", lambda *arguments: drawn.append(arguments[3]) or real(*arguments))
    main("sample", trained, "--count", 23, "--out", tmp_path / name)
    assert drawn == [15, 20]
    assert "15 of them there already" in capsys.readouterr().out
    if name == "folder":
        names = sorted(path.name for path in (tmp_path / name).glob("*.png"))
        assert len(names) == 23
        assert all((tmp_path / name / n).read_bytes() == (tmp_path / f"expected-{name}" / n).read_bytes() for n in names)
        main("sample", trained, "--count", 30, "--out", tmp_path / name)  # more of the same: only what is new is drawn
        assert drawn[2:] == [20, 25]
    else:
        with np.load(tmp_path / name) as found, np.load(tmp_path / f"expected-{name}") as expected:
            np.testing.assert_array_equal(found["images"], expected["images"])
        assert {path.name for path in tmp_path.iterdir()} == {name, f"expected-{name}"}, "no parts are left"


def test_samples_of_others_are_left_alone(trained, tmp_path, capsys):
    folder = tmp_path / "folder"
    main("sample", trained, "--count", 2, "--out", folder)
    before = (folder / "000000.png").read_bytes()
    assert "samples of another model or seed" in refused(capsys, "sample", trained, "--count", 2, "--seed", 1, "--out", folder)
    assert (folder / "000000.png").read_bytes() == before
    main("sample", trained, "--count", 1, "--seed", 1, "--out", folder, "--overwrite")
    assert [path.name for path in folder.glob("*.png")] == ["000000.png"]
    assert (folder / "000000.png").read_bytes() != before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_bytes(b"precious")
    assert "exists and is not empty" in refused(capsys, "sample", trained, "--out", tmp_path / "photos")
    assert (tmp_path / "photos" / "000000.png").read_bytes() == b"precious"


def test_attributes_are_ordered_by_how_well_the_latent_space_separates_them():
    """Against the definition: the variance of the two groups' means, weighted, over the whole variance."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(400, 2))
    points -= points.mean(axis=0)
    attributes = np.stack(
        [generator.random(400) < 0.3, points[:, 1] > 0.5, points[:, 0] + generator.normal(size=400) > 0, np.ones(400, bool)],
        axis=1,
    )

    def between(attribute):
        groups = [points[attribute], points[~attribute]]
        return sum(len(group) * np.sum(group.mean(axis=0) ** 2) for group in groups if len(group)) / np.sum(points**2)

    found = diagnostic_figures._separation(points, attributes)
    np.testing.assert_allclose(found, [between(column) for column in attributes.T], atol=1e-12)
    assert np.argsort(-found).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("kind", ["classes", "many classes", "attributes", "none", "one latent"])
def test_the_latent_space_is_colored_by_what_the_data_know(kind):
    generator = np.random.default_rng(0)
    count, latents = 60, 1 if kind == "one latent" else 5
    images = np.zeros((count, 2, 2, 1), np.uint8)
    labels = {"classes": np.arange(count) % 3, "many classes": np.arange(count) % 30, "one latent": np.arange(count) % 3}.get(
        kind
    )
    names: tuple[str, ...] = ()
    if kind == "attributes":
        labels, names = generator.random((count, 9)) < 0.5, tuple(f"attribute {number}" for number in range(9))
    image_set = ImageSet("x", images, images, 256, labels, labels, names)
    scores = SimpleNamespace(posterior_mean=generator.normal(size=(count, latents)))
    drawn = diagnostic_figures._latent_space(image_set, "test", SimpleNamespace(scores=scores), "title")
    if kind in ("none", "one latent"):
        assert drawn == {}
        return
    panels = [axes for axes in drawn["latent_space_test"].axes if axes.get_visible()]
    assert len(panels) == (6 if kind == "attributes" else 1)
    shown = sum(len(collection.get_offsets()) for collection in panels[0].collections)
    assert shown == count
    assert (panels[0].get_legend() is None) == (kind == "many classes")
