"""The data against hand-made files, scikit-learn's own digits, and float64 SciPy at coordinates read off the output.

An augmentation is checked without repeating its random draws: two channels of each image are ramps that hold their own row and
column, so the output says where each pixel was sampled from, whatever was drawn. From that the map is solved and judged.
"""

import gc
import gzip
import io
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_digits

from bsvae_jax import config, data
from bsvae_jax._io.files import as_path, cache_folder
from bsvae_jax.config import Augmentation
from bsvae_jax.data.idx import read_idx
from bsvae_jax.data.image_set import to_unit_interval
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.errors import UserError
from bsvae_jax.random import example_keys, example_positions, normal_per_example


@pytest.fixture
def unchecked():
    """What a user runs: without it the type checker objects before the package's own sentence is reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    """Short enough to read in a terminal; not a page pasted from somewhere else."""
    return len(str(error.value)) < 500 and "\n" not in str(error.value)


# --- Digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    bunch = load_digits()
    digits = data.load(config.Digits(validation=None))
    assert digits.train.shape == (1500, 8, 8, 1)
    assert digits.test.shape == (297, 8, 8, 1)
    assert digits.train.dtype == digits.test.dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate([digits.train, digits.test])[..., 0], bunch.images)
    np.testing.assert_array_equal(np.concatenate([digits.train_labels, digits.test_labels]), bunch.target)
    assert (digits.train.min(), digits.train.max()) == (0, 16)
    assert (digits.name, digits.levels, digits.bin_width, digits.image_shape) == ("digits", 17, 0.0625, (8, 8, 1))


@pytest.mark.parametrize(
    ("levels", "stored", "expected"),
    [(17, [0, 1, 4, 8, 16], [0.0, 0.0625, 0.25, 0.5, 1.0]), (256, [0, 51, 102, 255], [0.0, 0.2, 0.4, 1.0])],
)
def test_to_unit_interval(levels, stored, expected):
    result = to_unit_interval(jnp.asarray(stored, jnp.uint8), levels)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-7)
    assert result[-1] == 1.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_to_unit_interval_leaves_floats(dtype):
    result = to_unit_interval(jnp.asarray([0.0, 0.25, 1.0], dtype), 256)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, [0.0, 0.25, 1.0])


# --- idx files --------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


TINY = {
    "train-images-idx3": random_bytes(6, 5, 4),
    "train-labels-idx1": np.array([5, 0, 4, 1, 9, 2], np.uint8),
    "t10k-images-idx3": random_bytes(2, 5, 4, seed=1),
    "t10k-labels-idx1": np.array([7, 255], np.uint8),
}


def write_tiny(folder: Path, compress: bool = False, **changed: bytes) -> None:
    """The four files of a tiny MNIST; `changed` replaces a file's bytes, by its name with underscores."""
    for name, array in TINY.items():
        content = changed.get(name.replace("-", "_"), idx(array))
        (folder / f"{name}-ubyte{'.gz' * compress}").write_bytes(gzip.compress(content) if compress else content)


def test_idx_written_by_hand(tmp_path):
    path = tmp_path / "hand"
    path.write_bytes(b"\x00\x00\x08\x02" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x03" + bytes([1, 2, 3, 4, 5, 255]))
    np.testing.assert_array_equal(read_idx(path), [[1, 2, 3], [4, 5, 255]])
    assert read_idx(path).dtype == np.uint8


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_reads_back_what_was_written(tmp_path, compress):
    write_tiny(tmp_path, compress)
    mnist = data.load(config.MNIST(folder=str(tmp_path), validation=None))
    np.testing.assert_array_equal(mnist.train, TINY["train-images-idx3"][..., None])
    np.testing.assert_array_equal(mnist.test, TINY["t10k-images-idx3"][..., None])
    np.testing.assert_array_equal(mnist.train_labels, [5, 0, 4, 1, 9, 2])
    np.testing.assert_array_equal(mnist.test_labels, [7, 255])
    assert mnist.train.dtype == np.uint8
    assert (mnist.name, mnist.levels, mnist.bin_width, mnist.image_shape) == ("mnist", 256, 1 / 255, (5, 4, 1))


def test_the_real_mnist(mnist_folder):
    """Sizes, class counts and first labels as published with the set; mean 0.1307, deviation 0.3081 as everybody has them."""
    mnist = data.load(config.MNIST(folder=str(mnist_folder), validation=None))
    assert mnist.train.shape == (60_000, 28, 28, 1)
    assert mnist.test.shape == (10_000, 28, 28, 1)
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(mnist.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.train.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert mnist.train.std() / 255 == pytest.approx(0.3081, abs=5e-5)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


GOOD = idx(TINY["train-images-idx3"])
ZIPPED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        pytest.param(b"", "not an idx file", id="no bytes"),
        pytest.param(b"\x00\x00", "not an idx file", id="two bytes"),
        pytest.param(b"<html>404</html>", "not an idx file of unsigned bytes: it starts with b'<htm'", id="html"),
        pytest.param(b"\x00\x00\x0d" + GOOD[3:], "not an idx file of unsigned bytes", id="idx of floats"),
        pytest.param(GOOD[:10], "truncated or damaged: 10 bytes", id="header cut"),
        pytest.param(GOOD[:-1], "truncated or damaged: 135 bytes, but its header promises 136", id="one byte short"),
        pytest.param(GOOD + b"\x00", "truncated or damaged: 137 bytes, but its header promises 136", id="one byte over"),
        pytest.param(ZIPPED[:-20], "cannot be read .* truncated or damaged", id="gzip cut"),
        pytest.param(ZIPPED[:5], "cannot be read .* truncated or damaged", id="gzip header cut"),
        pytest.param(flipped(ZIPPED, 60), "cannot be read .* truncated or damaged", id="gzip content"),
        pytest.param(flipped(ZIPPED, len(ZIPPED) - 8), "cannot be read .* truncated or damaged", id="gzip checksum"),
        pytest.param(gzip.compress(b"hello"), "not an idx file", id="gzip of something else"),
        pytest.param(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "truncated or damaged", id="sizes beyond 64 bits"),
        pytest.param(idx(np.zeros((0, 5, 4), np.uint8)), "non-empty array of rank 3, got shape \\(0, 5, 4\\)", id="no images"),
        pytest.param(idx(random_bytes(6)), "non-empty array of rank 3, got shape \\(6,\\)", id="labels for images"),
        pytest.param(idx(TINY["train-images-idx3"][:5]), "has 5 images, but .*train-labels-idx1-ubyte 6 labels", id="count"),
        pytest.param(idx(random_bytes(6, 4, 4)), "training images are \\(4, 4, 1\\), test images \\(5, 4, 1\\)", id="shape"),
    ],
)
def test_mnist_refuses_damaged_files(tmp_path, content, telling):
    write_tiny(tmp_path, train_images_idx3=content)
    with pytest.raises(UserError, match=telling) as error:
        data.load(config.MNIST(folder=str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    assert one_sentence(error)


@pytest.mark.parametrize("missing", TINY)
def test_mnist_names_the_missing_file(tmp_path, missing):
    write_tiny(tmp_path)
    (tmp_path / f"{missing}-ubyte").unlink()
    with pytest.raises(UserError, match=f"lacks {missing}-ubyte.gz"):
        data.load(config.MNIST(folder=str(tmp_path)))


# --- Arrays of one's own ----------------------------------------------------------------------------------------------


def load_arrays(path: Path, **settings) -> data.ImageSet:
    return data.load(config.Arrays(path=str(path), **settings))


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [("train", "test"), ("x_train", "x_test"), ("train_images", "test_images"), ("x_train", "test")],
)
def test_npz_with_a_test_set(tmp_path, train_name, test_name):
    train, test = random_bytes(5, 4, 3, 2), random_bytes(3, 4, 3, 2, seed=1)
    np.savez(tmp_path / "own.npz", **{train_name: train, test_name: test, "y_train": np.arange(5)})
    images = load_arrays(tmp_path / "own.npz")
    np.testing.assert_array_equal(images.train, train)
    np.testing.assert_array_equal(images.test, test)
    assert (images.name, images.levels, images.train.dtype, images.image_shape) == ("own", 256, np.uint8, (4, 3, 2))
    np.testing.assert_array_equal(images.train_labels, np.arange(5))


@pytest.mark.parametrize(
    ("count", "holdout", "held_out"), [(40, 0.1, 4), (40, 0.25, 10), (3, 0.1, 1), (2, 0.5, 1), (10, 0.9, 9)]
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_holdout_is_disjoint_and_complete(tmp_path, count, holdout, held_out, suffix):
    images = random_bytes(count, 6, 6)  # 288 random bits each: no two are alike
    path = tmp_path / f"own.{suffix}"
    if suffix == "npy":
        np.save(path, images)
    else:
        np.savez(path, train=images)
    split = load_arrays(path, holdout=holdout)
    assert split.train.shape == (count - held_out, 6, 6, 1)
    assert split.test.shape == (held_out, 6, 6, 1)
    assert sorted(image.tobytes() for image in [*split.train, *split.test]) == sorted(image.tobytes() for image in images)


def test_copies_of_a_training_image_are_not_held_out(tmp_path, caplog):
    images = random_bytes(24, 4, 4)
    images[4:] = images[np.arange(20) % 4]  # four images, each six times
    np.save(tmp_path / "copies.npy", images)
    assert len(load_arrays(tmp_path / "copies.npy").test) == 2
    assert "all 2 images drawn for testing are copies of training images, and say nothing of new ones" in caplog.text
    images = np.concatenate([images[:8], random_bytes(32, 4, 4)])
    np.save(tmp_path / "some.npy", images)
    for seed in range(5):
        split = load_arrays(tmp_path / "some.npy", holdout=0.5, holdout_seed=seed)
        train, test = ({image.tobytes() for image in part} for part in (split.train, split.test))
        assert not train & test
        assert len(split.train) + len(split.test) == 40
        assert 12 <= len(split.test) <= 20


def test_holdout_is_decided_by_its_seed(tmp_path):
    np.save(tmp_path / "own.npy", random_bytes(40, 4, 4))
    one, again, other = (load_arrays(tmp_path / "own.npy", holdout_seed=seed).test for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_holdout_is_drawn_at_random(tmp_path):
    """Every image has its turn: of 60 seeds, about 6 hold out any one of 10 images."""
    np.save(tmp_path / "own.npy", np.arange(10, dtype=np.uint8)[:, None, None])
    held_out = [int(load_arrays(tmp_path / "own.npy", holdout_seed=seed).test.item()) for seed in range(60)]
    assert set(held_out) == set(range(10))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 3, 2, 1), (4, 3, 2, 3)])
def test_floats_become_float32(shape, dtype):
    images = np.random.default_rng(0).uniform(size=shape).astype(dtype)
    images.flat[:2] = 0.0, 1.0  # both ends belong
    checked = data.check_images(images, "these")
    assert checked.dtype == np.float32
    assert checked.shape == (*shape, 1)[:4]
    np.testing.assert_array_equal(checked.reshape(shape), images.astype(np.float32))


def test_strided_images_become_contiguous():
    images = random_bytes(4, 6, 6, 3)[:, ::2, ::-1]
    checked = data.check_images(images, "these")
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, images)


NAN = np.zeros((4, 2, 2))
NAN[1, 0, 0] = NAN[1, 1, 1] = np.nan
NAN[3, 0, 0] = np.inf


@pytest.mark.parametrize(
    ("images", "telling"),
    [
        (np.zeros((3, 4), np.uint8), "\\[N, H, W\\] or \\[N, H, W, C\\], got \\(3, 4\\)"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), "got \\(1, 2, 3, 4, 5\\)"),
        (np.uint8(3), "got \\(\\)"),
        (np.zeros((0, 4, 4), np.uint8), "is empty: its shape is \\(0, 4, 4, 1\\)"),
        (np.zeros((3, 4, 0, 1), np.float32), "is empty"),
        (np.zeros((3, 4, 4), np.int64), "got dtype int64"),
        (np.zeros((3, 4, 4), bool), "got dtype bool"),
        (np.zeros((3, 4, 4), np.uint16), "got dtype uint16"),
        (np.zeros((3, 4, 4), complex), "got dtype complex128"),
        (np.zeros((3, 4, 4), object), "got dtype object"),
        (NAN, "NaN or infinite values in 2 images"),
        (np.full((3, 4, 4), 255.0), "\\[0, 1\\], got values from 255 to 255; divide 8-bit values by 255"),
        (np.linspace(-0.5, 1, 12).reshape(3, 2, 2), r"got values from -0.5 to 1; take \(x \+ 1\) / 2 of values in \[-1, 1\]"),
        (np.linspace(-2, 2, 12).reshape(3, 2, 2), "got values from -2 to 2; shift and scale"),
        (np.linspace(0, 1.001, 12).reshape(3, 2, 2), "got values from 0 to 1.001"),
        (np.linspace(0, 1.00001, 12).reshape(3, 2, 2), "got values from 0 to 1.00001"),
        (np.arange(17.0).repeat(12).reshape(17, 3, 4), "got values from 0 to 16; .* n levels by n - 1"),
        (np.zeros((5, 3, 16, 16), np.uint8), "height 3 and width 16 with 16 channels, .*give images.transpose\\(0, 2, 3, 1\\)"),
        (np.zeros((5, 1, 28, 28), np.uint8), "height 1 and width 28 with 28 channels"),
        (np.zeros((5, 4, 8, 9), np.float32), "give images.transpose\\(0, 2, 3, 1\\)"),
        (np.zeros((5, 1, 8, 4), np.uint8), None),
        (np.zeros((5, 3, 4, 4), np.uint8), "height 3 and width 4 with 4 channels"),
        (np.zeros((5, 16, 3, 16), np.uint8), "give images.transpose\\(0, 1, 3, 2\\)"),
        (np.zeros((5, 2, 16, 16), np.uint8), "height 2 and width 16 with 16 channels"),
        (np.zeros((28, 28, 3), np.uint8), r"would be 28 images of height 28 and width 3; add an axis: the first, \[None\]"),
        (np.zeros((28, 28, 3, 1), np.uint8), None),
        (np.zeros((4, 28, 3), np.uint8), None),
        (np.zeros((8, 8, 3, 50), np.uint8), "give images.transpose\\(0, 1, 3, 2\\)"),
    ],
)
def test_check_images_refuses(images, telling, unchecked):
    if telling is None:
        data.check_images(images, "these")
        return
    with pytest.raises(UserError, match=f"^these .*{telling}") as error:
        data.check_images(images, "these")
    assert one_sentence(error)


def test_rounding_outside_the_unit_interval_is_clipped():
    found = data.check_images(np.array([[[-1e-7, 0.5], [0.25, 1.0000001]]]), "these")
    np.testing.assert_array_equal(found[0, ..., 0], [[0, 0.5], [0.25, 1]])


# --- What the values say of the levels --------------------------------------------------------------------------------

GRID = np.random.default_rng(3)


def on_levels(levels: int, dtype=np.float32) -> np.ndarray:
    return (GRID.integers(0, levels, (20, 8, 8)) / (levels - 1)).astype(dtype)


@pytest.mark.parametrize(
    ("images", "given", "levels", "said"),
    [
        pytest.param(random_bytes(20, 8, 8), None, 256, "8 pixels high, 8 wide, 1 channel, 256 levels.$", id="uint8"),
        pytest.param(random_bytes(20, 8, 8) % 2, None, 256, "0 ... 1, nearly black; --data.levels 2", id="a mask"),
        pytest.param(random_bytes(20, 8, 8) % 17, None, 256, "nearly black; --data.levels 17", id="17 levels"),
        pytest.param(random_bytes(20, 8, 8) % 2, 2, 2, "2 levels.$", id="a mask, given"),
        pytest.param(random_bytes(20, 8, 8), 17, None, "uint8 values up to 255, which needs data.levels of 256", id="too few"),
        pytest.param(random_bytes(20, 8, 8), 65536, None, "which needs data.levels of 256 ... 256, not 65536", id="too many"),
        pytest.param(on_levels(256), None, 256, "1/255: 256 levels are a guess, which --data.levels sets right", id="8 bits"),
        pytest.param(on_levels(256, np.float16), None, 256, "256 levels are a guess", id="8 bits in float16"),
        pytest.param(on_levels(256, np.float64), None, 256, "256 levels are a guess", id="8 bits in float64"),
        pytest.param(on_levels(2), None, 256, "256 levels are a guess", id="0 and 1"),
        pytest.param(on_levels(17), None, 17, "1/16: 17 levels are a guess", id="17 levels of floats"),
        pytest.param(on_levels(4096), None, 4096, "4,096 levels are a guess", id="12 bits"),
        pytest.param(on_levels(65536), None, 65536, "65,536 levels are a guess", id="16 bits"),
        pytest.param(on_levels(65536), 65536, 65536, "65,536 levels.$", id="16 bits, given"),
        pytest.param(
            GRID.random((20, 8, 8)), None, None, "floats of more than 256 values, .* give --data.levels", id="no grid"
        ),
        pytest.param(
            GRID.random((20, 8, 8)).astype(np.float16), None, None, "floats of more than 256 values", id="no grid in float16"
        ),
        pytest.param(GRID.random((20, 8, 8)), 256, 256, "256 levels.$", id="no grid, given"),
        pytest.param(GRID.random(9)[GRID.integers(0, 9, (20, 8, 8))], None, 256, "take 9 values: 256 levels", id="few values"),
        pytest.param(GRID.integers(0, 65536, (20, 8, 8), np.uint16), None, 65536, "65,536 levels.$", id="uint16"),
        pytest.param(GRID.integers(0, 4096, (20, 8, 8), np.uint16), 4096, 4096, "4,096 levels.$", id="uint16 of 12 bits"),
        pytest.param(GRID.integers(0, 256, (20, 8, 8)), 256, 256, "256 levels.$", id="int64"),
        pytest.param(GRID.integers(0, 2, (20, 8, 8)) > 0, None, 2, " 2 levels.$", id="booleans"),
        pytest.param(GRID.integers(0, 9, (20, 8, 8)), None, None, "signed 64 bits; .* give levels=256", id="int64 alone"),
        pytest.param(random_bytes(20, 8, 6, 3), None, 256, "8 pixels high, 6 wide, 3 channels, 256 levels.$", id="color"),
    ],
)
def test_levels_of_arrays(tmp_path, capsys, images, given, levels, said):
    np.save(tmp_path / "own.npy", images)
    if levels is None:
        with pytest.raises(UserError, match=said) as error:
            load_arrays(tmp_path / "own.npy", levels=given)
        assert one_sentence(error)
        return
    found = load_arrays(tmp_path / "own.npy", levels=given)
    assert (found.levels, found.bin_width) == (levels, 1 / (levels - 1))
    assert re.search(said, capsys.readouterr().err.strip())


ROWS = {split: random_bytes(count, 4, 4, seed=count) for split, count in (("train", 5), ("test", 3), ("val", 2))}
CLASSES = {"train": np.array([0, 1, 1, 0, 2]), "test": np.array([2, 0, 0]), "val": np.array([1, 1])}


@pytest.mark.parametrize(
    ("names", "test", "left_out"),
    [
        ("train=train test=test", "test", None),
        ("X_train=train X_test=test y_train=train' y_test=test'", "test", None),
        ("train_images=train train_labels=train' test_images=test test_labels=test'", "test", None),
        ("x_train=train y_train=train' x_val=val y_val=val' x_test=test y_test=test'", "test", "'x_val', 'y_val'"),
        ("train=train val=val", "val", None),
        ("train=train validation=val validation_labels=val' train_labels=train'", "val", None),
        ("training=train evaluation=test", "test", None),
        ("train_x=train valid_x=val", "val", None),
        ("train=train test=test objects=objects", "test", "'objects'"),
        ("train=train test=test y_train=objects", "test", "'y_train'"),
        ("train=train test=test y_train=test'", "test", "'y_train'"),
        ("train=train x_train=test test=test", "test", "'x_train'"),
    ],
)
def test_names_in_an_npz(tmp_path, capsys, names, test, left_out):
    """Images by the name of their split, labels with a prime; nothing else is read."""
    objects = np.array([None, {}], object)
    values = {**ROWS, **{f"{split}'": labels for split, labels in CLASSES.items()}, "objects": objects}
    np.savez(tmp_path / "own.npz", **{name: values[of] for name, of in (pair.split("=") for pair in names.split())})
    found = load_arrays(tmp_path / "own.npz")
    np.testing.assert_array_equal(found.train[..., 0], ROWS["train"])
    np.testing.assert_array_equal(found.test[..., 0], ROWS[test])
    for labels, split in ((found.train_labels, "train"), (found.test_labels, test)):
        if f"{split}'" in names and left_out != "'y_train'":
            np.testing.assert_array_equal(labels, CLASSES[split])
        else:
            assert labels is None
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"left out: {left_out}." if left_out else "256 levels."), said


@pytest.mark.parametrize("name", ["images", "imgs", "arr_0", "X", "data", "Images"])
def test_the_only_images_of_an_npz(tmp_path, name):
    """dSprites: their name is `imgs`, and beside them lies an object."""
    images = random_bytes(10, 4, 4)
    np.savez(tmp_path / "own.npz", **{name: images, "labels": np.array(list("abcdefghij")), "metadata": np.array(None)})
    found = load_arrays(tmp_path / "own.npz")
    assert found.label_names == tuple("abcdefghij")
    for split, labels in ((found.train, found.train_labels), (found.test, found.test_labels)):
        np.testing.assert_array_equal(split[..., 0], images[labels])


def test_classes_of_arrays_are_those_of_the_training_images(tmp_path):
    labels = {"y_train": np.array([[7], [9], [7], [7], [9]]), "y_test": np.array([[9], [7], [8]])}
    np.savez(tmp_path / "own.npz", train=ROWS["train"], test=ROWS["test"], **labels)
    found = load_arrays(tmp_path / "own.npz")
    assert found.train_labels.tolist() == [0, 1, 0, 0, 1]
    assert found.test_labels.tolist() == [1, 0, -1]
    assert found.label_names == ("7", "9")


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def plain_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("read.me", "nothing here")
    return stream.getvalue()


EIGHT = random_bytes(8, 4, 4)


def lzma_npz() -> bytes:
    """With a wrong byte in the packed array."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train.npy", npy(EIGHT))
    return flipped(stream.getvalue(), 60)


@pytest.mark.parametrize(
    ("name", "content", "telling"),
    [
        pytest.param("a.npz", npz(train=EIGHT)[:-30], "cannot be read as a NumPy file", id="npz cut at the end"),
        pytest.param("a.npz", npz(train=EIGHT)[:100], "cannot be read as a NumPy file", id="npz cut early"),
        pytest.param("a.npz", flipped(npz(train=EIGHT), 250), "cannot be read as a NumPy file", id="npz with a wrong byte"),
        pytest.param("a.npz", b"no zip at all", "cannot be read as a NumPy file .it does not begin like", id="not a zip"),
        pytest.param("a.npz", b"", "cannot be read as a NumPy file", id="no bytes"),
        pytest.param("a.npz", npz(train=np.array([None])), "cannot be read as a NumPy file .* holds objects", id="objects"),
        pytest.param("a.npy", npy(np.array([None])), "cannot be read as a NumPy file .* holds objects", id="npy objects"),
        pytest.param("a.npy", npy(EIGHT)[:-1], "cannot be read as a NumPy file", id="npy cut"),
        pytest.param("a.npy", npy(EIGHT)[:40], "cannot be read as a NumPy file", id="npy header cut"),
        pytest.param("a.npz", npz(trian=EIGHT), "needs an array 'train' .* holds trian .*did you mean 'trian'", id="no train"),
        pytest.param("a.npz", npz(), "it holds nothing", id="empty npz"),
        pytest.param("a.npz", npz(y_train=EIGHT[:, 0, 0]), "needs an array 'train' .* holds y_train", id="labels alone"),
        pytest.param("a.npz", lzma_npz(), "cannot be read as a NumPy file", id="npz with LZMA"),
        pytest.param("a.npz", plain_zip(), "an archive of other files", id="some other zip"),
        pytest.param(
            "a.npz", npz(train=EIGHT, test=random_bytes(8, 4, 5)), "\\(4, 4, 1\\) uint8 .*\\(4, 5, 1\\) uint8", id="shape"
        ),
        pytest.param("a.npz", npz(train=EIGHT, test=EIGHT / 255), "uint8 and test images .* float32 differ", id="dtype"),
        pytest.param("a.npz", npz(train=EIGHT, test=EIGHT[:0]), "'test' in .* is empty", id="no test images"),
        pytest.param("a.npz", npz(x_train=EIGHT.astype(int)), "'x_train' in .* has signed 64 bits", id="dtype of train"),
        pytest.param("a.npy", npy(EIGHT[:1]), "holds 1 images: too few to keep 1 for testing", id="one image"),
    ],
)
def test_arrays_refuse(tmp_path, name, content, telling):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=telling) as error:
        load_arrays(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert one_sentence(error)


def test_pickled_code_is_not_run(tmp_path):
    """The classic attack: a pickle that writes a file when it is loaded."""
    target = tmp_path / "attacked"

    class Attack:
        def __reduce__(self):
            return Path.touch, (target,)

    array = np.empty(1, object)
    array[0] = Attack()
    np.savez(tmp_path / "a.npz", train=array)
    with pytest.raises(UserError, match="holds objects"):
        load_arrays(tmp_path / "a.npz")
    assert not target.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as content:
        content["train"]  # the file is a real attack
    assert target.exists()


def test_a_refused_npz_is_closed(tmp_path):
    """Closed at once, not whenever the garbage collector comes by with a ResourceWarning in some later test."""
    np.savez(tmp_path / "a.npz", trian=EIGHT)
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UserError) as error:
            load_arrays(tmp_path / "a.npz")
        del error
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_the_home_folder_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "own.npy", random_bytes(20, 4, 4))
    source = config.Arrays("~/own.npy")
    assert len(data.load(source, progress=False).train) == 18
    assert source.path == str(tmp_path / "own.npy")
    assert as_path("~/run", "workdir") == tmp_path / "run"
    monkeypatch.setenv("BSVAE_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"


@pytest.mark.parametrize("path", ["nowhere.npy", "", "."])
def test_arrays_name_a_missing_file(path):
    with pytest.raises(UserError, match=r"There is no file .*data\.path"):
        data.load(config.Arrays(path=path))


# --- TFDS -------------------------------------------------------------------------------------------------------------


def prepare_tfds(folder: Path, features: dict, **splits: list[dict]) -> None:
    """A TFDS set 'tiny_images' prepared as array_record, without TensorFlow: images must come as PIL images for that."""
    import tensorflow_datasets as tfds

    class TinyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # so only the prepared files are found again
        name = "tiny_images"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: list(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    TinyImages(data_dir=folder, file_format="array_record").download_and_prepare()


def image_and_label() -> dict:
    import tensorflow_datasets as tfds

    return {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=10)}


def labeled(images: np.ndarray) -> list[dict]:
    """Each image labeled by its position: TFDS shuffles what it prepares."""
    return [{"image": Image.fromarray(image), "label": label} for label, image in enumerate(images)]


def load_tfds(folder: Path, validation=None, **settings) -> data.ImageSet:
    return data.load(config.TFDS(name="tiny_images", data_dir=str(folder), validation=validation, **settings))


def test_tfds_bit_for_bit_without_tensorflow(tmp_path):
    train, test = random_bytes(9, 7, 5, 3), random_bytes(4, 7, 5, 3, seed=1)
    prepare_tfds(tmp_path, image_and_label(), train=labeled(train), test=labeled(test))
    images = load_tfds(tmp_path)
    assert sorted(images.train_labels) == list(range(9))
    assert sorted(images.test_labels) == list(range(4))
    np.testing.assert_array_equal(images.train, train[images.train_labels])
    np.testing.assert_array_equal(images.test, test[images.test_labels])
    assert (images.name, images.levels, images.train.dtype, images.image_shape) == ("tiny_images", 256, np.uint8, (7, 5, 3))
    assert "tensorflow" not in sys.modules


def test_tfds_own_validation_split(tmp_path):
    splits = {name: random_bytes(count, 6, 6, 3, seed=count) for name, count in (("train", 9), ("validation", 4), ("test", 3))}
    prepare_tfds(tmp_path, image_and_label(), **{name: labeled(images) for name, images in splits.items()})
    images = load_tfds(tmp_path, validation="own")
    for name in images.splits:
        np.testing.assert_array_equal(getattr(images, name), splits[name][getattr(images, f"{name}_labels")])
    assert load_tfds(tmp_path).validation is None
    share = load_tfds(tmp_path, validation=0.2)
    assert (len(share.train), len(share.validation), len(share.test)) == (7, 2, 3)


def test_tfds_slices_and_sets_without_labels(tmp_path):
    """Many stock sets have neither a test split nor labels; TFDS's own slices cut a hold-out."""
    images = random_bytes(10, 6, 6, 3)
    features = {"image": image_and_label()["image"]}
    prepare_tfds(tmp_path, features, train=[{"image": Image.fromarray(image)} for image in images])
    split = load_tfds(tmp_path, train_split="train[:7]", test_split="train[7:]")
    assert (len(split.train), len(split.test)) == (7, 3)
    assert split.train_labels is None
    assert sorted(image.tobytes() for image in [*split.train, *split.test]) == sorted(image.tobytes() for image in images)


@pytest.mark.parametrize("name", ["no_such_set_at_all", "", "not a name!"])
def test_tfds_unknown_name(tmp_path, name):
    message = f"TFDS has no set '{name}'" if name else "data.name must be a name, got ''"
    with pytest.raises(UserError, match=message) as error:
        data.load(config.TFDS(name=name, data_dir=str(tmp_path)))
    assert one_sentence(error), f"{len(str(error.value))} characters"


def test_tfds_stock_set_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match=r"no prepared split 'train' .*prepared: none.*`bsvae prepare kmnist`") as error:
        data.load(config.TFDS(name="kmnist", data_dir=str(tmp_path)))
    assert one_sentence(error)


@pytest.mark.parametrize(
    ("split", "telling"),
    [
        ("validation", "no prepared split .*prepared: train"),
        ("train+", "no prepared split .*prepared: train"),
        ("train[:2", "does not load.* Error parsing split"),
    ],
)
def test_tfds_missing_split(tmp_path, split, telling):
    prepare_tfds(tmp_path, image_and_label(), train=labeled(random_bytes(3, 4, 4, 3)))
    with pytest.raises(UserError, match=telling) as error:
        load_tfds(tmp_path, test_split=split)
    assert repr(split) in str(error.value)
    assert one_sentence(error)


def bad_tfds(kind: str, folder: Path) -> None:
    import tensorflow_datasets as tfds

    features, examples = image_and_label(), labeled(random_bytes(3, 4, 4, 3))
    match kind:
        case "no image":
            features = {"label": features["label"]}
            examples = [{"label": 1}]
        case "sizes differ":
            examples.append({"image": Image.fromarray(random_bytes(4, 5, 3)), "label": 3})
        case "integers":
            features = {"image": tfds.features.Tensor(shape=(4, 4), dtype=np.int64)}
            examples = [{"image": np.zeros((4, 4), np.int64)}]
        case "words for labels":
            features["label"] = tfds.features.Text()
            examples = [{**example, "label": "seven"} for example in examples]
    prepare_tfds(folder, features, train=examples, test=examples)
    for shard in folder.rglob("*train.array_record*"):
        if kind == "shard cut":
            shard.write_bytes(shard.read_bytes()[:100])
        if kind == "shard missing":
            shard.unlink()
    if kind == "tfrecord":
        (info,) = folder.rglob("dataset_info.json")
        assert '"array_record"' in info.read_text()
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


@pytest.mark.parametrize(
    ("kind", "telling"),
    [
        ("no image", "has no feature 'image'; its features are label"),
        ("sizes differ", "tiny_images holds images of 2 sizes \\(4 x 4: 6, 4 x 5: 2\\); --size N"),
        ("integers", "must be 8-bit images, got Tensor.*int64"),
        ("tfrecord", "not prepared as array_record"),
        (
            "shard cut",
            "image 0 of split 'train' of TFDS set 'tiny_images' cannot be read; prepare the TFDS set again, in .*tiny_images",
        ),
        ("shard missing", "'train' of TFDS set 'tiny_images' does not load; prepare it again"),
    ],
)
def test_tfds_refuses(tmp_path, kind, telling):
    bad_tfds(kind, tmp_path)
    with pytest.raises(UserError, match=telling) as error:
        load_tfds(tmp_path)
    assert "tiny_images" in str(error.value)
    assert one_sentence(error)


@pytest.mark.parametrize("stored", ["uint8", "float32"])
def test_the_mean_image_is_that_of_all_blocks(stored, tmp_path):
    """More than one block of 16 MiB, mapped from a file, against NumPy's mean in float64."""
    pixels = random_bytes(70, 512, 512, 1)
    np.save(tmp_path / "images.npy", pixels if stored == "uint8" else pixels.astype(np.float32) / 255)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    found = data.ImageSet("x", images, images[:1]).mean_image
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, pixels.mean(axis=0, dtype=np.float64) / 255, atol=1e-7 if stored == "float32" else 1e-14)


# --- Order ------------------------------------------------------------------------------------------------------------

sizes = pytest.mark.parametrize(("examples", "batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 2)])
"""Batches that divide the epoch, that straddle two epochs, that are the whole epoch, and that are longer than it."""


@sizes
def test_every_example_once_per_epoch(key, examples, batch):
    epochs = 3 * batch  # a whole number of batches
    order = np.asarray(data.ShuffledOrder(key, examples, batch)(0, epochs * examples // batch))
    assert order.shape == (3 * examples, batch)
    for epoch in order.reshape(epochs, examples):
        assert sorted(epoch) == list(range(examples))


@sizes
def test_any_window_is_its_single_steps(key, examples, batch):
    """A resumed run asks a fresh object for a late step; it must see what the uninterrupted run saw."""
    single = data.ShuffledOrder(key, examples, batch)
    steps = np.concatenate([single(step, 1) for step in range(12)])
    for start, count in [(0, 12), (3, 5), (11, 1), (7, 2), (1, 8)]:  # also backwards
        np.testing.assert_array_equal(single(start, count), steps[start : start + count])
        np.testing.assert_array_equal(data.ShuffledOrder(key, examples, batch)(start, count), steps[start : start + count])


def test_epochs_and_keys_differ():
    """Two orders of 1,000 examples agree in about one place (Poisson, mean 1), in none of 28 pairs in more than 10 places."""
    orders = [np.asarray(data.ShuffledOrder(jax.random.key(seed), 1000, 1000)(0, 4)) for seed in (0, 1)]
    rows = np.concatenate([*orders])
    agreements = [np.sum(a == b) for i, a in enumerate(rows) for b in rows[:i]]
    assert len(agreements) == 28
    assert max(agreements) <= 10
    assert all(np.sum(row == np.arange(1000)) <= 10 for row in rows)


def test_every_place_sees_every_example(key):
    """Chi-squared test that example 0 lands uniformly in a permutation of 8."""
    order = np.asarray(data.ShuffledOrder(key, 8, 8)(0, 400))
    assert stats.chisquare(np.bincount(np.argmin(order, axis=1), minlength=8)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [
        *[(1, 1500, 100, 15), (1, 1500, 128, 12), (2, 1500, 128, 24), (3, 1500, 128, 36), (50, 60_000, 128, 23_438)],
        *[(1, 5, 8, 1), (2, 5, 8, 2), (1, 8, 8, 1), (3, 8, 8, 3), (10**6, 10**6, 10**3, 10**9)],
    ],
)
def test_steps_through(epochs, examples, batch, steps):
    assert steps_through(epochs, examples, batch) == steps


# --- Augmentation -----------------------------------------------------------------------------------------------------

HEIGHT, WIDTH, DRAWS = 14, 18, 300


def ramps() -> np.ndarray:
    """One image: channel 0 holds its row, 1 its column (shares of the size, center 0.5), 2 noise, 3 ones."""
    rows, columns = np.meshgrid((np.arange(HEIGHT) + 0.5) / HEIGHT, (np.arange(WIDTH) + 0.5) / WIDTH, indexing="ij")
    return np.stack([rows, columns, np.random.default_rng(0).uniform(size=rows.shape), np.ones_like(rows)], -1).astype(
        np.float32
    )


jitted_augment = jax.jit(data.augment, static_argnums=2)


def augmented(settings: Augmentation, image: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), draws)
    images = jnp.broadcast_to(jnp.asarray(image), (draws, *image.shape))
    return np.asarray(jitted_augment(images, keys, settings))


def solve_map(output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear part [2, 2] and offset [2] of output pixel -> source pixel (centers, in pixels from the image's center)."""
    inside = output[..., 3] > 1 - 1e-5  # ramps are exact where bilinear interpolation meets no edge
    assert inside.sum() >= 20
    rows, columns = np.nonzero(inside)
    places = np.stack([rows + 0.5 - HEIGHT / 2, columns + 0.5 - WIDTH / 2, np.ones(len(rows))], -1)
    source = output[inside][:, :2].astype(np.float64) * (HEIGHT, WIDTH) - (HEIGHT / 2, WIDTH / 2)
    solution, *_ = np.linalg.lstsq(places, source, rcond=None)
    np.testing.assert_allclose(places @ solution, source, atol=1e-3)  # it is an affine map
    return solution[:2].T, solution[2]


def resampled(image: np.ndarray, linear: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """SciPy's bilinear sampling in float64. `grid-constant` is zeros outside, blended at the edge as JAX's `constant` is."""
    center = (np.array([HEIGHT, WIDTH]) - 1) / 2
    shift = linear @ -center + offset + center
    channels = np.moveaxis(image.astype(np.float64), -1, 0)
    return np.stack([ndimage.affine_transform(c, linear, shift, order=1, mode="grid-constant") for c in channels], -1)


@pytest.fixture(scope="module")
def rotated() -> np.ndarray:
    return augmented(Augmentation(rotation_degrees=30.0), ramps())


@pytest.fixture(scope="module")
def cropped() -> np.ndarray:
    return augmented(Augmentation(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 1.5)), ramps())


@pytest.fixture(scope="module")
def all_at_once() -> np.ndarray:
    return augmented(Augmentation(rotation_degrees=20.0, crop_scale=(0.3, 0.9), crop_ratio=(0.8, 1.25), flip=True), ramps())


def test_nothing_asked_nothing_done(key):
    images = jnp.asarray(random_bytes(4, 6, 5, 2) / np.float32(255))
    np.testing.assert_array_equal(data.augment(images, jax.random.split(key, 4), Augmentation()), images)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["rotated", "cropped", "all_at_once"])
def test_resampling_is_scipys(kind, request):
    """Every pixel of the channels, edges included, at the coordinates that the ramps reveal."""
    for output in request.getfixturevalue(kind)[:40]:
        np.testing.assert_allclose(output, resampled(ramps(), *solve_map(output)), atol=2e-4)


def test_rotation_is_a_uniform_rotation_about_the_center(rotated):
    maps = [solve_map(output) for output in rotated]
    linear, offset = np.stack([m[0] for m in maps]), np.stack([m[1] for m in maps])
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.broadcast_to(np.eye(2), linear.shape), atol=1e-4)
    np.testing.assert_allclose(np.linalg.det(linear), 1.0, atol=1e-4)  # turned, not mirrored
    np.testing.assert_allclose(offset, 0.0, atol=1e-3)
    degrees = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert stats.kstest(degrees, stats.uniform(-30, 60).cdf).pvalue > 1e-3
    assert np.abs(degrees).max() <= 30.0 + 1e-2


def test_crop_has_the_scale_and_ratio_asked_for_and_stays_inside(cropped):
    maps = [solve_map(output) for output in cropped]
    linear, offset = np.stack([m[0] for m in maps]), np.stack([m[1] for m in maps])
    np.testing.assert_allclose(linear[:, [0, 1], [1, 0]], 0.0, atol=1e-3)  # upright
    height, width = linear[:, 0, 0], linear[:, 1, 1]  # shares of the image
    assert stats.kstest(height * width, stats.uniform(0.2, 0.4).cdf).pvalue > 1e-3
    assert stats.kstest(np.log(width / height), stats.uniform(np.log(0.5), np.log(3)).cdf).pvalue > 1e-3
    assert ((height * width > 0.2 - 1e-3) & (height * width < 0.6 + 1e-3)).all()
    assert ((width / height > 0.5 - 1e-3) & (width / height < 1.5 + 1e-3)).all()
    places = []
    for share, shift, size in ((height, offset[:, 0], HEIGHT), (width, offset[:, 1], WIDTH)):
        left = 1 - share
        assert (np.abs(shift / size) < left * (0.5 + 1e-3) + 1e-6).all()  # rounding alone where nothing is left
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.where(left > 1e-3, (shift / size + left / 2) / left, 0.5)  # 0: against the first edge, 1: the last
        places.append(place)
        assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > 1e-3
    independent = np.corrcoef([*places, height * width, np.log(width / height)]) - np.eye(4)
    assert np.abs(independent).max() < 5 / np.sqrt(DRAWS)


def test_crop_never_exceeds_the_image():
    """The whole area at a ratio of two would need a width of 1.41 images; it is cut to 1, its height stays 0.71."""
    for output in augmented(Augmentation(crop_ratio=(2.0, 2.0)), ramps(), draws=10):
        linear, _ = solve_map(output)
        np.testing.assert_allclose(linear, np.diag([np.sqrt(0.5), 1.0]), atol=1e-3)


def test_crop_of_a_quarter_doubles_everything():
    """A ramp stays a ramp with half the slope."""
    image = ramps()
    for output in augmented(Augmentation(crop_scale=(0.25, 0.25)), image, draws=20):
        inside = output[1:-1, 1:-1]
        np.testing.assert_allclose(np.diff(inside[..., 0], axis=0), 0.5 / HEIGHT, atol=1e-5)
        np.testing.assert_allclose(np.diff(inside[..., 1], axis=1), 0.5 / WIDTH, atol=1e-5)
        np.testing.assert_allclose(np.diff(inside[..., 0], axis=1), 0.0, atol=1e-5)


def test_rotation_moves_mass_around_the_center():
    """A blob keeps its mass and its distance from the center, and goes to both sides of where it was."""
    rows, columns = np.meshgrid(np.arange(33) - 16.0, np.arange(33) - 16.0, indexing="ij")
    blob = np.exp(-(rows**2 + (columns - 8.0) ** 2) / 8.0).astype(np.float32)[..., None]
    outputs = augmented(Augmentation(rotation_degrees=90.0), blob, draws=50)[..., 0]
    np.testing.assert_allclose(outputs.sum((1, 2)), blob.sum(), rtol=0.01)
    down, right = ((outputs * place).sum((1, 2)) / outputs.sum((1, 2)) for place in (rows, columns))
    np.testing.assert_allclose(np.hypot(down, right), 8.0, atol=0.1)
    assert down.min() < -6
    assert down.max() > 6
    assert right.min() > -0.1


def test_flip_mirrors_about_half():
    image = ramps()
    outputs = augmented(Augmentation(flip=True), image, draws=1000)
    mirrored = (outputs == image[:, ::-1]).all((1, 2, 3))
    untouched = (outputs == image).all((1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert abs(mirrored.sum() - 500) < 5 * np.sqrt(1000 / 4)


def test_flip_is_independent_of_the_rest(all_at_once):
    """With everything on, the sign of the determinant tells the flips; either way the angles are uniform."""
    linear = np.stack([solve_map(output)[0] for output in all_at_once])
    flip = np.linalg.det(linear) < 0
    assert abs(flip.sum() - DRAWS / 2) < 5 * np.sqrt(DRAWS / 4)
    degrees = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))  # a flip changes the second column alone
    for group in (degrees[flip], degrees[~flip]):
        assert stats.kstest(group, stats.uniform(-20, 40).cdf).pvalue > 1e-3


EVERYTHING = Augmentation(rotation_degrees=45.0, crop_scale=(0.1, 1.0), crop_ratio=(0.5, 2.0), flip=True)


def test_values_stay_in_range():
    outputs = augmented(EVERYTHING, np.random.default_rng(1).integers(0, 2, (9, 7, 3)).astype(np.float32))
    assert outputs.dtype == np.float32
    assert outputs.min() >= 0.0
    assert outputs.max() <= 1.0 + 1e-6  # the four weights of one pixel are rounded


@pytest.mark.long
def test_each_image_by_its_own_key(key):
    """The same image and key give the same result in any batch, at any place, jitted or not; other keys give others."""
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 9, 7, 3)), jnp.float32)
    keys = jax.random.split(key, 6)
    together = data.augment(images, keys, EVERYTHING)
    np.testing.assert_allclose(jitted_augment(images, keys, EVERYTHING), together, atol=1e-5)
    np.testing.assert_allclose(jitted_augment(images[::-1], keys[::-1], EVERYTHING), together[::-1], atol=1e-5)
    np.testing.assert_allclose(jitted_augment(images[2:3], keys[2:3], EVERYTHING), together[2:3], atol=1e-5)
    others = np.asarray(jitted_augment(jnp.broadcast_to(images[0], images.shape), keys, EVERYTHING))
    assert all(np.abs(a - b).max() > 0.05 for i, a in enumerate(others) for b in others[:i])


# --- Random numbers per example ---------------------------------------------------------------------------------------


def test_positions_over_devices_count_the_global_batch():
    alone = example_positions(12)
    shared = jax.pmap(lambda _: example_positions(3, "data"), axis_name="data", devices=jax.devices()[:4])(jnp.zeros(4))
    np.testing.assert_array_equal(alone, range(12))
    np.testing.assert_array_equal(shared, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])


def test_noise_belongs_to_the_example(key):
    """The noise of examples 5 and 6 is the same whether or not the others are drawn; it is normal, and no two share it."""
    everything = np.asarray(normal_per_example(example_keys(key, jnp.arange(500)), (8,)))
    some = normal_per_example(example_keys(key, jnp.arange(5, 7)), (8,))
    np.testing.assert_array_equal(some, everything[5:7])
    assert stats.kstest(everything.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(everything.T) - np.eye(8)).max() < 5 / np.sqrt(500)
    assert len(np.unique(everything)) > 3990


def test_tfds_labels_that_are_words_are_left_out(tmp_path):
    bad_tfds("words for labels", tmp_path)
    assert load_tfds(tmp_path).train_labels is None


def test_windows_of_one_size_are_compiled_once(monkeypatch):
    from bsvae_jax.data import shuffle as order

    chex.clear_trace_counter()
    once = chex.assert_max_traces(order._window.__wrapped__, n=1)
    monkeypatch.setattr(order, "_window", jax.jit(once, static_argnums=(2, 3)))
    windows = data.ShuffledOrder(jax.random.key(0), 101, 8)
    for step in range(0, 60, 3):
        windows(step, 3)
