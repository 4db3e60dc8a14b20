"""Images for validation: which they are, and that choices are made on them."""

import dataclasses
import io
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bsvae_jax as bv
from bsvae_jax.config import MLP, Optimizer
from bsvae_jax.data import MNIST, TFDS, Arrays, DataShape, Digits, Folder, ImageSet, load, shape_of
from bsvae_jax.data.holdout import hold_out_validation
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.sweeps.report import best_beta
from bsvae_jax.sweeps.results import MemberResult, SweepResults
from bsvae_jax.training.evaluated import read_evaluation

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WARMED = Optimizer(warmup_steps=10, schedule="cosine")


def numbered(count: int, first: int = 0) -> np.ndarray:
    """Images [count, 4, 4, 1], each of its own gray: first, first + 1, ..."""
    return np.broadcast_to(np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1)).copy()


def numbers(images: np.ndarray | None) -> list[int]:
    """Which of the `numbered` images they are."""
    return [] if images is None else [int(image.flat[0]) for image in images]


def test_a_share_of_the_training_images_is_held_out():
    images = ImageSet("x", numbered(100), numbered(7, 200), 256, np.arange(100) % 10, np.zeros(7, int))
    divided = hold_out_validation(images, 0.2)
    kept, held_out = numbers(divided.train), numbers(divided.validation)
    assert (len(kept), len(held_out)) == (80, 20)
    assert sorted(kept + held_out) == list(range(100))
    assert (kept, held_out) == (sorted(kept), sorted(held_out))
    assert held_out != list(range(80, 100)), "drawn at random, since files are often ordered by class"
    assert numbers(divided.test) == numbers(images.test)
    np.testing.assert_array_equal(divided.train_labels, np.array(kept) % 10)
    np.testing.assert_array_equal(divided.validation_labels, np.array(held_out) % 10)
    assert divided.splits == ("train", "test", "validation")
    assert divided.choosing_split == "validation"
    assert images.splits == ("train", "test")
    assert images.choosing_split == "test"
    assert divided.shape == DataShape((4, 4, 1), 256, np.dtype(np.uint8), 80, 7, 20)
    assert divided.shape.nbytes == 107 * 16
    assert len({divided.fingerprint(), images.fingerprint(), hold_out_validation(images, 0.3).fingerprint()}) == 3
    assert divided.fingerprint() == hold_out_validation(images, 0.2).fingerprint()
    assert divided.sizes() == "80 training, 20 validation and 7 test images (4, 4, 1)"


def test_a_memory_map_is_not_copied_into_memory_that_is_not_there(tmp_path, monkeypatch):
    """Of a set on the disk the default share would else be the end of the process; what is in memory needs a question less."""
    np.save(tmp_path / "train.npy", numbered(100))
    mapped = ImageSet("lsun", np.load(tmp_path / "train.npy", mmap_mode="r"), numbered(7), 256)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1600))  # 100 images of 16 bytes
    assert len(hold_out_validation(mapped, 0.1).validation) == 10
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1599))
    with pytest.raises(UserError, match=r"lsun .* copied into memory: 0 MiB, and 0 MiB are free\. Give --data\.validation own"):
        hold_out_validation(mapped, 0.1)
    assert len(hold_out_validation(dataclasses.replace(mapped, train=numbered(100)), 0.1).validation) == 10


def test_copies_of_training_images_are_not_held_out():
    images = hold_out_validation(ImageSet("x", np.concatenate([numbered(20), numbered(10)]), numbered(1)), 0.5)
    assert not set(numbers(images.train)) & set(numbers(images.validation))
    assert len(images.validation) > 0


def test_the_split_is_the_same_for_every_seed_of_a_run_and_known_without_reading():
    one, other = (load(bv.Config(data=Digits(validation=0.1), seed=seed).data) for seed in (0, 1))
    assert one.fingerprint() == other.fingerprint()
    assert shape_of(Digits(validation=0.1)) == one.shape
    assert load(Digits(validation=None)).validation is None
    assert shape_of(Digits(validation=None)).validation == 0


@pytest.mark.parametrize("published", [Digits(), MNIST(), TFDS(), TFDS("celeb_a"), TFDS("lsun/church_outdoor")])
def test_published_sets_hold_out_a_tenth_of_their_training_images_by_default(published):
    """No choice is made on their test images. Images of one's own are divided as one says."""
    assert published.validation == 0.1
    assert (Arrays("x.npz").validation, Folder("photos").validation) == (None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", DataShape((28, 28, 1), 256, np.uint8, 54_000, 10_000, 6_000)),
        # The published partition: 162,770, 19,867 and 19,962 of 202,599 faces.
        ("celeba_paper", DataShape((64, 64, 3), 256, np.uint8, 162_770, 19_962, 19_867)),
    ],
)
def test_published_sizes_are_known_without_the_data(name, expected, own_cache):
    """What `bsvae compile` and `bsvae bench --noise` need."""
    assert shape_of(bv.load_config(CONFIGS / f"{name}.py").data) == expected
    assert not own_cache.exists()


def write_folder(root: Path, splits: dict[str, np.ndarray]) -> Path:
    for split, images in splits.items():
        for number, image in zip(numbers(images), images, strict=True):
            file = root / split / f"{number % 2}" / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(file)
    return root


def write_zip(root: Path, splits: dict[str, np.ndarray]) -> Path:
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for split, images in splits.items():
            for number, image in zip(numbers(images), images, strict=True):
                content = io.BytesIO()
                Image.fromarray(image[..., 0]).save(content, "png")
                archive.writestr(f"{split}/{number % 2}/{number:03}.png", content.getvalue())
    return root / "set.zip"


def write_arrays(root: Path, splits: dict[str, np.ndarray]) -> Path:
    labels = {f"y_{split}": np.array(numbers(images)) % 2 for split, images in splits.items()}
    np.savez(root / "set.npz", **{f"x_{split}": images for split, images in splits.items()}, **labels)
    return root / "set.npz"


@pytest.mark.parametrize(
    ("write", "kind"), [(write_folder, Folder), (write_zip, Folder), (write_arrays, Arrays)], ids=["folder", "zip", "npz"]
)
@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_sets_own_images_for_validation(tmp_path, monkeypatch, write, kind, name):
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    path = str(write(tmp_path, {"train": numbered(10), name: numbered(4, 100), "test": numbered(5, 200)}))
    images = load(kind(path, validation="own"), progress=False)
    assert sorted(numbers(images.validation)) == [100, 101, 102, 103]
    assert sorted(numbers(images.test)) == [200, 201, 202, 203, 204]
    np.testing.assert_array_equal(images.validation_labels, np.array(numbers(images.validation)) % 2)
    np.testing.assert_array_equal(images.test_labels, np.array(numbers(images.test)) % 2)
    again = load(kind(path, validation="own"), progress=False)  # of a folder: as it was prepared
    assert again.fingerprint() == images.fingerprint()
    assert numbers(again.validation) == numbers(images.validation)
    without = load(kind(path), progress=False)
    assert without.validation is None
    assert sorted(numbers(without.train)) == list(range(10))


@pytest.mark.parametrize(
    ("write", "kind"), [(write_folder, Folder), (write_zip, Folder), (write_arrays, Arrays)], ids=["folder", "zip", "npz"]
)
def test_a_share_and_the_use_of_validation_images_without_a_test_set(tmp_path, monkeypatch, write, kind):
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    path = str(write(tmp_path, {"train": numbered(40), "val": numbered(4, 100)}))
    own = load(kind(path, validation="own"), progress=False)
    assert sorted(numbers(own.validation)) == [100, 101, 102, 103]
    assert len(own.test) == 4, "a tenth of the training images is tested on"
    assert sorted(numbers(own.train) + numbers(own.test)) == list(range(40))
    share = load(kind(path, validation=0.25), progress=False)
    assert sorted(numbers(share.test)) == [100, 101, 102, 103], "they take the place of a test set"
    assert len(share.validation) == 10
    assert sorted(numbers(share.train) + numbers(share.validation)) == list(range(40))
    np.testing.assert_array_equal(share.validation_labels, np.array(numbers(share.validation)) % 2)


@dataclasses.dataclass(frozen=True)
class Opposed(bv.Dataset):
    """Noise to learn by heart; the images for validation are other noise, the test images are those of training."""

    def load(self) -> ImageSet:
        rng = np.random.default_rng(0)
        train, other = (rng.integers(0, 256, (16, 4, 4, 1), np.uint8) for _ in range(2))
        return ImageSet("opposed", train, train, validation=other)


@dataclasses.dataclass(frozen=True)
class Mislabeled(bv.Dataset):
    """A label is missing."""

    def load(self) -> ImageSet:
        images = np.zeros((4, 4, 4, 1), np.uint8)
        return ImageSet("mislabeled", images, images, train_labels=np.arange(3))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (lambda: Digits(validation=0.0), {}, r"must be a share of .* above 0 and up to 0.9, .*; got 0.0"),
        (lambda: Digits(validation=1.0), {}, "a share of the training images above 0 and up to 0.9, 'own' for those"),
        (lambda: Digits(validation="own"), {}, r"digits has no images of its own for validation, .* give a share"),
        (lambda: Opposed(validation=0.5), {}, "load of Opposed gives 16 images for validation, and data.validation 0.5 asks"),
        (lambda: Mislabeled(validation=0.5), {}, "mislabeled has 3 labels for its 4 training images; give one for each"),
        (lambda: Digits(validation=0.9), {}, "batch_size 500 exceeds the 150 training images of digits"),
        (
            lambda: Digits(),
            {"optimizer": WARMED},
            r"optimizer.warmup_steps 10 must be fewer than the 3 steps of the whole run",
        ),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_training(tmp_path, data, settings, message):
    with pytest.raises(UserError, match=message):
        bv.fit(
            bv.Config(data=data(), network=MLP((4,)), latent_size=2, epochs=1, batch_size=500, devices=1, **settings),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def opposed(tmp_path_factory) -> Path:
    optimizer = Optimizer(1e-2, schedule="constant")
    config = bv.Config(
        data=Opposed(), network=MLP((32,)), latent_size=8, optimizer=optimizer, beta=0.01, epochs=200, batch_size=16, devices=1
    )
    folder = tmp_path_factory.mktemp("opposed") / "run"
    bv.fit(dataclasses.replace(config, evaluate_every=25), folder, progress=False)
    return folder


def test_the_best_checkpoint_is_that_of_the_validation_images(opposed):
    rows = {row["step"]: row["objective"] for row in bv.read_metrics(opposed) if row["split"] == "validation"}
    assert list(rows) == list(range(25, 201, 25))
    best = min(rows, key=lambda step: rows[step])
    assert best < 200, "the noise for validation cannot be learned, so training goes past its optimum"
    assert bv.restore(opposed, "best").step == best
    assert {row["split"] for row in bv.read_metrics(opposed)} == {"train", "validation"}


def test_early_stopping_looks_at_the_validation_images(opposed, tmp_path):
    """The objective of the test images, which are those of training, falls to the end."""
    config = bv.restore(opposed).config
    state = bv.fit(config, tmp_path / "run", progress=False, callbacks=[bv.EarlyStopping(patience=2)]).state
    assert int(state.step) < 200


def test_every_split_is_evaluated(opposed):
    images = load(Opposed())
    assert list(read_evaluation(opposed).report) == ["train", "test", "validation"]
    found = bv.evaluate(bv.restore(opposed), images).report
    assert list(found) == ["train", "test", "validation"]
    for split, quantities in read_evaluation(opposed).report.items():
        assert found[split]["objective"].value == pytest.approx(quantities["objective"].value, rel=1e-5)
    assert found["validation"]["calibrated_elbo"].value < found["test"]["calibrated_elbo"].value
    with pytest.raises(UserError, match=r"There is no split 'valid'.*; the splits are train, test and validation\."):
        bv.evaluate(bv.restore(opposed), images, splits=("valid",))


def test_the_best_beta_is_chosen_on_the_validation_images():
    """Of two members the one with the better validation images; it is the worse one of the test images."""

    def member(beta: float, **elbos: float) -> MemberResult:
        report = {split: {"calibrated_elbo": Quantity(elbo, None, "nats", "")} for split, elbo in elbos.items()}
        return MemberResult(f"beta{beta:g}", bv.Config(beta=beta), report, {}, {})

    def sentence(members: list[MemberResult]) -> str:
        results = SweepResults(None, members, {}, [], {})  # type: ignore[arg-type]
        return best_beta(results)[0].split(": ")[1]

    both = [member(1.0, validation=20.0, test=23.0), member(10.0, validation=30.0, test=13.0)]
    assert sentence(both) == (
        "of 2 values, β = 10 has the best calibrated ELBO on the validation images, by which it is chosen, "
        "and 13 nats on the test set."
    )
    assert sentence([member(1.0, test=23.0), member(10.0, test=13.0)]) == (
        "of 2 values, β = 1 has the best calibrated ELBO on the test set, 23 nats (chosen on that set; a finer grid may "
        "have a better one)."
    )
