"""The network trained on the classes of the data: its arithmetic, what it learns, and what its distances see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from bsvae_jax import data
from bsvae_jax.config import Digits
from bsvae_jax.data import ImageSet
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.fid import distance as fid
from bsvae_jax.evaluation.fid import lenet

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def digits():
    return data.load(Digits(validation=None))


@pytest.fixture(scope="module")
def network(digits, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BSVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lenet, "STEPS", 100)
        patch.setattr(lenet, "BATCH", 32)
        yield lenet.network(digits, progress=False)


def as_8_bits(images):
    return np.round(images / 16 * 255).astype(np.uint8)


def features_of(network, images):
    return np.concatenate(list(network.features([images], data_mesh(), 100)))


@pytest.mark.long
def test_features_are_those_of_sums_written_out(network):
    """Correlations by SciPy in float64, a maximum over 2 x 2, and the rest by NumPy, from the parameters."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    parameters = {name: {k: np.asarray(v, np.float64) for k, v in p.items()} for name, p in network.variables["params"].items()}

    def convolved(maps, kernel, bias):
        channels = [
            sum(scipy.signal.correlate2d(maps[..., i], kernel[..., i, o], mode="same") for i in range(maps.shape[-1]))
            for o in range(kernel.shape[-1])
        ]
        activation = np.maximum(np.stack(channels, axis=-1) + bias, 0)
        height, width, _ = activation.shape
        return activation.reshape(height // 2, 2, width // 2, 2, -1).max(axis=(1, 3))

    expected = []
    for image in images / 255.0:
        for name in ("conv0", "conv1"):
            image = convolved(image, **parameters[name])
        dense = parameters["features"]
        expected.append(np.maximum(image.reshape(-1) @ dense["kernel"] + dense["bias"], 0))
    found = features_of(network, images)
    assert np.std(expected) > 0.01, "features of a dead network agree with anything"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.max(expected))


@pytest.mark.long
def test_it_learns_the_classes(network):
    """Chance is 10%; these are 100 steps of 2,000, and of a quarter batch."""
    assert float(network.note.split("tells ")[1].split("%")[0]) > 75, network.note


@pytest.mark.long
def test_it_is_trained_once_and_always_to_the_same(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(lenet, "STEPS", 2)
    sources = []
    for cache in ("one", "other"):
        monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / cache))
        sources.append(lenet.network(digits, progress=False).source)
    monkeypatch.setattr(lenet, "_train", None)
    assert {lenet.network(digits, progress=False).source, *sources} == {sources[0]}


@pytest.mark.long
def test_distances_grow_with_what_is_wrong(digits, network):
    """Halves of a set are at no distance, within four standard errors; one upside down, blurred or of one class is far."""
    images = as_8_bits(digits.train)[np.random.default_rng(0).permutation(len(digits.train))]
    one, other = np.array_split(images, 2)
    reference = features_of(network, one)

    def distance(images):
        return fid.kernel_distance(features_of(network, images), reference)

    same = distance(other)
    assert abs(same.value) < 4 * same.standard_error
    turned = other[:, ::-1]
    blurred = scipy.ndimage.gaussian_filter(other, (0, 1.5, 1.5, 0))
    one_class = as_8_bits(digits.train[digits.train_labels == 3])
    for worse in map(distance, (turned, blurred, one_class)):
        assert worse.value > same.value + 4 * np.hypot(worse.standard_error, same.standard_error)


IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
LABELED = ImageSet("mine", IMAGES, IMAGES, train_labels=np.arange(4), test_labels=np.arange(4))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_labels": None}, "learns the classes of the images, but mine has no labels; use the published network"),
        ({"test_labels": None}, "mine has no labels"),
        ({"train_labels": np.zeros((4, 40), bool)}, "one class an image, but mine has attributes"),
        ({"train_labels": np.zeros(4, int)}, "tell classes apart, but mine has only one"),
        ({"train": IMAGES[:, :3], "test": IMAGES[:, :3]}, "at least 4 x 4 pixels"),
    ],
)
def test_images_it_cannot_learn_from_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        lenet.network(dataclasses.replace(LABELED, **changes))


def test_a_damaged_file_is_named(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path))
    shapes = jax.eval_shape(lambda: lenet.LeNet(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    monkeypatch.setattr(lenet, "_train", lambda *_: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    monkeypatch.setattr(lenet, "_accuracy", lambda *_: 0.5)
    lenet.network(digits, progress=False)
    (path,) = (tmp_path / "lenet").glob("*.npz")
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match=f"{path} cannot be read as a NumPy file.*the network is trained again"):
        lenet.network(digits)
    np.savez(path, accuracy=0.5)
    with pytest.raises(UserError, match=f"{path} is damaged: it holds other arrays"):
        lenet.network(digits)


@pytest.mark.long
def test_other_labels_are_another_network(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(lenet, "STEPS", 2)
    other = dataclasses.replace(digits, train_labels=digits.train_labels[::-1].copy())
    assert lenet.network(other, progress=False).source != lenet.network(digits, progress=False).source
