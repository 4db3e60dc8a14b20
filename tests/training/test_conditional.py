"""Conditional runs: the class of each image reaches the model on every way, and everything that reads a run knows it."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import main, refused
from sklearn.neighbors import KNeighborsClassifier

import bsvae_jax as bv
from bsvae_jax import theory
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Arrays, Config, Constant, Digits, Linear, Optimizer
from bsvae_jax.data import ImageSet, load
from bsvae_jax.errors import DivergenceError, UserError
from bsvae_jax.evaluation import sampling
from bsvae_jax.evaluation.scores import split_key
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.objective import Optimal, quantization_variance
from bsvae_jax.random import make_key
from bsvae_jax.training.fit_prior import fit_prior
from bsvae_jax.training.state import build_model

SMALL = Config(
    data=Digits(validation=None),
    network=MLP((8,)),
    latent_size=2,
    classes=10,
    epochs=2,
    batch_size=500,
    devices=1,
    decoder_variance=Constant(0.1),
    posterior_samples=1,
)
TEST = load(Digits()).test.astype(np.float32) / 16
LABELS = load(Digits()).test_labels.astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("conditional") / "run"
    bv.fit(SMALL, workdir, progress=False)
    return workdir


def objectives(folder):
    return [row["objective"] for row in read_metrics(folder)]


# --- Every way to the model -------------------------------------------------------------------------------------------

WAYS = {
    "streamed": dict(resident_memory=0.0),
    "two devices": dict(devices=2),
    "pmap": dict(devices=2, device_map="pmap"),
    "two devices, streamed, in parts": dict(devices=2, resident_memory=0.0, gradient_accumulation=2),
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_do_not_depend_on_the_way(way, folder, tmp_path):
    bv.fit(dataclasses.replace(SMALL, **WAYS[way]), tmp_path / "run", progress=False)
    np.testing.assert_allclose(objectives(tmp_path / "run"), objectives(folder), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("execution", ["vmap", "scan"])
def test_a_member_of_a_sweep_is_the_run_alone(execution, folder, tmp_path):
    grid = bv.Sweep((0.5, 1.0), (Constant(0.1),), seeds=1)
    bv.fit_sweep(SMALL, grid, tmp_path / "sweep", execution=execution, progress=False)
    member = tmp_path / "sweep" / "members" / "constant-0.1_beta1_seed0"
    np.testing.assert_allclose(objectives(member), objectives(folder), rtol=1e-5)
    assert np.load(member / "pictures.npz")["samples"].shape == (10, 8, 8, 1)


@pytest.mark.long
def test_evaluation_is_of_the_true_labels(folder, tmp_path):
    run, images = bv.restore(folder), load(SMALL.data)
    report = bv.evaluate(run, images, splits=("test",), samples=3, bound_images=50).report["test"]
    output = run.model.apply(run.variables, jnp.asarray(TEST), split_key(0, "test"), labels=LABELS)
    assert report["mse"].value == pytest.approx(float(jnp.mean(jnp.square(TEST - output.decoded.mean))), rel=1e-5)
    other = run.model.apply(run.variables, jnp.asarray(TEST), split_key(0, "test"), labels=np.roll(LABELS, 1))
    assert abs(report["rate"].value - float(other.rate.mean())) > 1e-3
    assert np.isfinite(report["importance_weighted_bound"].value)
    with pytest.raises(UserError, match="digits has no labels of its test images"):
        bv.evaluate(run, dataclasses.replace(images, test_labels=None))
    assert np.isfinite(fit_prior(folder, kind="gaussian").held_out)


@pytest.mark.long
def test_a_step_that_is_not_finite_keeps_its_labels(tmp_path):
    config = dataclasses.replace(SMALL, optimizer=Optimizer(learning_rate=1e30))
    with pytest.raises(DivergenceError):
        bv.fit(config, tmp_path / "run", progress=False)
    failed = bv.failed_step(tmp_path / "run")
    assert failed.labels is not None
    assert failed.labels.shape == (500,)
    assert not np.isfinite(np.asarray(bv.train_step(*failed)[1])).all()


# --- Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_samples_of_the_classes_asked_for(folder, tmp_path, capsys):
    main("sample", folder, "--labels", 3, 7, "--count", 5, "--out", tmp_path / "samples.npz")
    found, run = np.load(tmp_path / "samples.npz"), bv.restore(folder)
    assert found["labels"].tolist() == [3, 7, 3, 7, 3]
    z = run.model.apply(run.variables, jax.random.fold_in(make_key(0), 0), sampling.BATCH, method="sample_latents")
    expected = run.model.apply(run.variables, z[:5], labels=jnp.array([3, 7, 3, 7, 3]), method="decode").mean
    np.testing.assert_allclose(found["images"] / 255, np.clip(expected, 0, 1), atol=0.51 / 255)  # rounded to 8 bits
    main("sample", folder, "--label", 3, "--count", 12, "--out", tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 12
    said = refused(capsys, "sample", folder, "--label", 4, "--count", 12, "--out", tmp_path / "images")
    assert "holds samples of another model or seed" in said
    assert "labels must be whole numbers in 0 ... 9" in refused(capsys, "sample", folder, "--label", 10)
    main("sample", folder, "--count", 25, "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.long
def test_programs_take_labels(folder, tmp_path):
    run = bv.restore(folder)
    encode, decode = (
        jax.export.deserialize(bytearray(file.read_bytes())).call for file in bv.export_stablehlo(folder, tmp_path / "out")
    )
    mean, _ = encode(TEST, LABELS)
    np.testing.assert_allclose(
        mean, run.model.apply(run.variables, jnp.asarray(TEST), labels=LABELS, method="encode").mean, atol=1e-5
    )
    expected = run.model.apply(run.variables, mean, labels=LABELS, method="decode").mean
    np.testing.assert_allclose(decode(mean, LABELS), expected, atol=1e-5)


@pytest.mark.long
def test_samples_are_of_their_class(tmp_path):
    """By the class of the nearest training image: measured 0.98, chance is 0.1; of 500 one standard error is 0.01."""
    fast = Optimizer(learning_rate=3e-3)
    config = Config(
        data=Digits(validation=None),
        network=MLP((64,)), latent_size=8, classes=10, epochs=100, batch_size=100, evaluate_every=100, devices=1, optimizer=fast
    )  # fmt: skip
    images = bv.fit(config, tmp_path / "run", progress=False).images
    nearest = KNeighborsClassifier(1).fit(images.train.reshape(1500, -1) / 16, images.train_labels)
    samples = sampling.sample_prior(bv.restore(tmp_path / "run"), 500)
    assert nearest.score(samples.reshape(500, -1) / 255, np.arange(500) % 10) > 0.9


@pytest.mark.long
def test_a_linear_model_lands_on_the_optimum_of_the_covariance_within_classes(tmp_path):
    config = Config(
        data=Digits(validation=None),
        network=Linear(), latent_size=4, classes=10, decoder_variance=Optimal("batch"), epochs=1000, batch_size=500,
        evaluate_every=1000, devices=1, optimizer=Optimizer(learning_rate=5e-2, weight_decay=0.0),
    )  # fmt: skip
    result = bv.fit(config, tmp_path / "run", progress=False)
    data = result.images.train.astype(np.float64) / 16
    centered = (
        data
        - np.stack([data[result.images.train_labels == label].mean(axis=0) for label in range(10)])[result.images.train_labels]
    )
    optimum = theory.linear_optimum(theory.covariance_eigenvalues(centered), 4, 1.0, quantization_variance(1 / 16))
    found = {name: quantity.value for name, quantity in result.report["train"].items()}
    # The tolerance of the model without classes: 0.5 nats and 2 percent; one posterior sample leaves 0.1 nats of noise.
    assert found["objective"] == pytest.approx(optimum.objective, abs=0.5)
    assert found["rate"] == pytest.approx(optimum.rate, rel=0.02)


# --- What does not fit ------------------------------------------------------------------------------------------------

BLANK = np.repeat(np.arange(6, dtype=np.uint8), 16).reshape(6, 4, 4, 1)
CLASSES = np.array([0, 1, 2, 0, 1, 2])
WRONG = {
    "none": (dict(test_labels=None), "blank has no labels of its test images; leave classes out, or choose data with labels"),
    "too large": (dict(test_labels=CLASSES + 1), "has labels up to 3 among its test images; classes 4 takes them"),
    "of no class": (dict(test_labels=CLASSES - 1), "has 2 test images that are of no class of the training images"),
    "too few": (dict(train_labels=CLASSES[:5]), r"has int64 labels of shape \(5,\) for its 6 train images; one class for each"),
    "attributes": (dict(train_labels=np.zeros((6, 3), bool)), r"has bool labels of shape \(6, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_of_data_that_do_not_fit(case):
    changed, sentence = WRONG[case]
    images = ImageSet("blank", BLANK, BLANK, **{"train_labels": CLASSES, "test_labels": CLASSES} | changed)
    with pytest.raises(UserError, match=sentence):
        [images.examples(split, 3) for split in images.splits]
    assert images.examples("train") is not None  # without classes they are of no account


def test_a_run_is_known_by_its_labels():
    images = ImageSet("blank", BLANK, BLANK, train_labels=CLASSES, test_labels=CLASSES)
    other = dataclasses.replace(images, train_labels=CLASSES[::-1])
    assert images.fingerprint() == other.fingerprint() != images.fingerprint(3) != other.fingerprint(3)


def test_data_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys):
    said = refused(capsys, "train", "configs/digits.py", "--classes", 5, "--workdir", tmp_path / "run")
    assert "digits has labels up to 9 among its train images; classes 10 takes them" in said
    said = refused(capsys, "train", "configs/digits.py", "--classes", 12, "--workdir", tmp_path / "run")
    assert "classes 12 are too many: no training image of digits is of class 10" in said
    np.savez(tmp_path / "images.npz", train=BLANK, test=BLANK)
    config = dataclasses.replace(SMALL, data=Arrays(str(tmp_path / "images.npz")), batch_size=2)
    with pytest.raises(UserError, match="has no labels of its train images"):
        bv.fit(config, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="has no labels of its train images"):
        bv.fit_sweep(config, bv.Sweep((1.0,), (Optimal(),), 1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_without_classes_has_no_samples_by_class():
    config = dataclasses.replace(SMALL, classes=None)
    run = Restored(build_model(config, (8, 8, 1)), {}, config, 0, (8, 8, 1), 17, None)
    with pytest.raises(UserError, match="This run was trained without classes"):
        sampling.sample_prior(run, 3, labels=(1,))
