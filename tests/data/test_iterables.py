"""Images written from iterables: what is stored against the arrays given, what continues, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import bsvae_jax as bv
from bsvae_jax.config import Arrays
from bsvae_jax.data import iterables, memory_map
from bsvae_jax.errors import UserError


def random(dtype=np.uint8, *shape, high=None, seed=0):
    shape = shape or (40, 6, 5, 3)
    return np.random.default_rng(seed).integers(0, high or np.iinfo(dtype).max + 1, shape, dtype)


def sorted_rows(images):
    """Images in an order of their own, to compare sets."""
    flat = np.asarray(images).reshape(len(images), -1)
    return flat[np.lexsort(flat.T[::-1])]


def together(images):
    return np.concatenate([getattr(images, split) for split in images.splits])


def prepare(images, folder, **options):
    return bv.prepare(images, folder, progress=False, **options)


class Tensor:
    """What a tensor of another library is: something that becomes an array."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class Indexed:
    """A map-style data set of PyTorch, which knows neither its iterator nor its end."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index % len(self.items)]


FORMS = {
    "generator": (lambda x, y: (image for image in x), {}),
    "array": (lambda x, y: x, {}),
    "lists": (lambda x, y: [image.tolist() for image in x.astype(int)], {"levels": 256}),
    "Fortran": (lambda x, y: map(np.asfortranarray, x), {}),
    "other byte order": (lambda x, y: (image.astype(">u2") for image in x), {"levels": 256}),
    "tensors": (lambda x, y: map(Tensor, x), {}),
    "pictures": (lambda x, y: map(Image.fromarray, x), {}),
    "dictionaries": (lambda x, y: ({"image": image} for image in x), {}),
    "loader": (lambda x, y: [[x[:16]], [x[16:32]], [x[32:]]], {"batched": True}),
    "pairs": (lambda x, y: zip(x, y, strict=True), {}),
    "dictionaries with labels": (lambda x, y: ({"img": image, "label": label} for image, label in zip(x, y, strict=True)), {}),
    "loader with labels": (lambda x, y: [(Tensor(x[i : i + 7]), y[i : i + 7]) for i in range(0, 40, 7)], {"batched": True}),
    "indexed": (lambda x, y: Indexed(list(zip(x, y, strict=True))), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_was_given(form, tmp_path, unchecked):
    x, y = random(), np.arange(40)
    make, options = FORMS[form]
    written = prepare(make(x, y), tmp_path / "set", holdout=0.3, **options)
    assert (written.train.dtype, written.levels, written.image_shape) == (np.uint8, 256, (6, 5, 3))
    np.testing.assert_array_equal(sorted_rows(together(written)), sorted_rows(x))
    assert isinstance(written.train, np.memmap)
    if "label" in form or form in ("pairs", "indexed"):
        for split in written.splits:
            np.testing.assert_array_equal(x[getattr(written, f"{split}_labels")], getattr(written, split))
    else:
        assert written.train_labels is None
    read = bv.data.load(Arrays(str(tmp_path / "set")), progress=False)
    np.testing.assert_array_equal(read.train, written.train)
    assert read.fingerprint() == bv.data.ImageSet("set", np.array(read.train), np.array(read.test)).fingerprint()


@pytest.mark.parametrize(
    ("images", "options", "levels", "expected"),
    [
        (random(np.uint16), {}, 65536, lambda x: x / 65535),
        (random(np.uint16, high=4096), {"levels": 4096}, 4096, lambda x: x / 4095),
        (random(np.int32, high=17), {"levels": 17}, 17, None),
        (random(np.uint8, high=2).astype(bool), {}, 2, None),
        (random() / np.float32(255), {"levels": 256}, 256, lambda x: x),
        ((random() / 255).astype(np.float16), {"levels": 256}, 256, lambda x: x),
        (random() * 3.5 - 80.0, {"levels": 1000, "scale": (-80.0, 1000.0)}, 1000, lambda x: (x + 80) / 1080),
        (random(np.int16) * 1, {"levels": 65536, "scale": (-32768.0, 32767.0)}, 65536, lambda x: (x + 32768.0) / 65535),
    ],
    ids=["16 bits", "12 bits", "17 levels", "masks", "float32", "float16", "scaled", "scaled integers"],
)
def test_depths(images, options, levels, expected, tmp_path):
    written = prepare(iter(images), tmp_path / "set", holdout=0.3, **options)
    assert written.levels == levels
    assert written.bin_width == 1 / (levels - 1)
    if expected is None:
        assert written.train.dtype == np.uint8
        np.testing.assert_array_equal(sorted_rows(together(written)), sorted_rows(images))
    else:
        assert written.train.dtype == np.float32
        found, wanted = sorted_rows(together(written)), sorted_rows(expected(images))
        np.testing.assert_allclose(found, wanted, atol=2**-24)  # half of float32's last digit below 1


def test_pictures_of_16_bits_palettes_and_transparency(tmp_path):
    deep = [Image.fromarray(image) for image in random(np.uint16, 30, 6, 5)]
    assert prepare(deep, tmp_path / "deep").levels == 65536
    picture = Image.new("RGBA", (5, 6), (255, 0, 0, 0))
    black = Image.new("RGB", (5, 6))
    written = prepare([picture, picture.quantize(4), black], tmp_path / "set", test=[black])
    np.testing.assert_array_equal(written.train[:, 0, 0], [[255] * 3, [255] * 3, [0] * 3])


@pytest.mark.parametrize("form", ["dictionaries", "lists", "pairs"])
@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "CMYK"])
def test_batches_of_pictures(mode, form, tmp_path):
    pictures = [Image.fromarray(image).convert("L" if mode == "1" else "RGB").convert(mode) for image in X[:9]]
    batches = [pictures[:3], pictures[3:6], pictures[6:8], pictures[8:]]
    forms = {"dictionaries": [{"image": batch} for batch in batches], "pairs": [(of, [0] * len(of)) for of in batches]}
    given = forms.get(form, batches)
    one = prepare(pictures, tmp_path / "one", test=pictures[8:])
    many = prepare(given, tmp_path / "many", test=given[3:], batched=True)
    assert many.fingerprint() == one.fingerprint()


def test_the_draw_is_by_content(tmp_path):
    x = random(np.uint8, 2000, 3, 3, 1)
    doubled = np.concatenate([x, x])
    written = prepare(doubled, tmp_path / "set", holdout=0.2, validation=0.1)
    assert written.splits == ("train", "test", "validation")
    sets = [{image.tobytes() for image in getattr(written, split)} for split in written.splits]
    assert sum(map(len, sets)) == 2000, "copies are on one side"
    # Binomial: five standard deviations of 2,000 draws.
    for found, share in zip(sets, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(found) / 2000 - share) < 5 * np.sqrt(share * (1 - share) / 2000)
    other = prepare(doubled, tmp_path / "other", holdout=0.2, holdout_seed=1)
    assert {image.tobytes() for image in other.test} != sets[1]
    assert bv.data.load(Arrays(str(tmp_path / "set")), progress=False).splits == ("train", "test")
    own = bv.data.load(Arrays(str(tmp_path / "set"), validation="own"), progress=False)
    assert len(own.validation) == len(written.validation)
    np.testing.assert_array_equal(
        prepare(doubled[::-1], tmp_path / "again", holdout=0.2, validation=0.1).test[::-1], written.test
    )


def test_splits_of_their_own(tmp_path):
    x = random()
    written = prepare(x[:30], tmp_path / "set", test=x[30:35], validation=iter(x[35:]))
    for split, part in zip(written.splits, (x[:30], x[30:35], x[35:]), strict=True):
        np.testing.assert_array_equal(getattr(written, split), part)


class Interruption(BaseException):
    """As Ctrl-C is no Exception."""


def ends_in(error, x, after):
    yield from x[:after]
    if error is not None:
        raise error


@pytest.mark.parametrize("block", [2**24, 500])
@pytest.mark.parametrize("error", [Interruption(), OSError("gone"), None], ids=["interrupted", "raised", "ended"])
def test_what_was_written_stays_and_the_same_call_continues(error, block, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_map, "BLOCK", block)
    x = random(np.uint16, seed=1)
    whole = prepare(x, tmp_path / "whole")
    said = {"OSError": r"image 23 of train could not be had \(OSError: gone\)", "NoneType": "ended after 23 images, of 40"}
    for _ in range(2):
        with pytest.raises(BaseException, match=said.get(type(error).__name__)) as caught:
            prepare(ends_in(error, x, 23), tmp_path / "set", count=40)
        assert isinstance(caught.value, UserError) == (error is None or isinstance(error, Exception))
        kept = [np.load(tmp_path / "set" / f"{split}.npy") for split in ("train", "test")]
        assert sum(map(len, kept)) == 23
    with pytest.raises(UserError, match=r"holds no images that bsvae_jax\.prepare has finished"):
        bv.data.load(Arrays(str(tmp_path / "set")), progress=False)
    continued = prepare(x, tmp_path / "set")
    assert continued.fingerprint() == whole.fingerprint()
    for name in ("train.npy", "test.npy"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert prepare(x, tmp_path / "set").fingerprint() == whole.fingerprint()  # compared from the first to the last


def test_rows_that_a_kill_leaves_uncounted_are_written_again(tmp_path):
    x = random()
    prepare(x, tmp_path / "set", test=x[:1])
    before = (tmp_path / "set" / "train.npy").read_bytes()
    (tmp_path / "set" / "manifest.json").unlink()
    torn = memory_map.Growing(tmp_path / "other.npy")
    torn.append(x[:3])
    torn.close()
    content = (tmp_path / "other.npy").read_bytes() + b"torn" * 10_000
    for left in (content, b"", content[:40]):
        (tmp_path / "set" / "train.npy").write_bytes(left)
        prepare(x, tmp_path / "set", test=x[:1])
        assert (tmp_path / "set" / "train.npy").read_bytes() == before


def test_an_endless_generator_is_read_to_the_count(tmp_path):
    def endless():
        generator = np.random.default_rng(0)
        while True:
            yield generator.integers(0, 256, (7, 4, 4), np.uint8)

    written = prepare(endless(), tmp_path / "set", count=100, batched=True)
    assert len(together(written)) == 100


X = random()
REFUSED = {
    "no iterable": (3, {}, "train must be an iterable of images, got a value of type int"),
    "text": ("images", {}, "train must be an iterable of images"),
    "nothing": ([], {}, "train gave no images"),
    "None": ([None], {}, "image 0 of train is no array of numbers, but of type object"),
    "words": (["a"], {}, "is no array of numbers"),
    "ragged": ([[[1, 2], [3]]], {}, "image 0 of train is no array: "),
    "shape": ([X[0], X[1][:5]], {}, r"image 1 of train has shape \(5, 5, 3\), those before it \(6, 5, 3\)"),
    "gray and color": ([X[0], X[1][..., 0]], {}, r"image 1 of train has shape \(6, 5, 1\), those before it \(6, 5, 3\)"),
    "mixed depth": ([X[0], X[1].astype(np.uint16)], {}, "image 1 of train has 16 bits, those before it 8 bits; give all"),
    "a batch": ([X], {}, r"image 0 of train has shape \(40, 6, 5, 3\): an image is \[H, W\] or .*batched=True is for batches"),
    "no batch": ([X[0][..., 0]], {"batched": True}, r"batch 0 of train has shape \(6, 5\): a batch is \[N, H, W\]"),
    "channels first": ([X[0].transpose(2, 0, 1)[:, :, [0] * 6]], {}, "channels must be last"),
    "floats": (X / 255, {}, "image 0 of train has floats; .* give levels=256 for images that had 8 bits, 65536 for 16"),
    "out of range": (X / 1.0, {"levels": 256}, r"image 0 of train must lie in \[0, 1\], got values from"),
    "out of scale": (X / 1.0, {"levels": 256, "scale": (0, 100)}, "has values from .* beyond the scale, 0 ... 100"),
    "out of levels": (X, {"levels": 17}, "has values from .* beyond 17 levels, 0 ... 16"),
    "below 0": ([X[0].astype(int) - 300], {"levels": 256}, "has values from -300 to .* beyond 256 levels"),
    "wide integers": ([X[0].astype(int)], {}, "image 0 of train has signed 64 bits; bits per dimension depend on"),
    "NaN": ([np.full((4, 4), np.nan)], {"levels": 256}, "image 0 of train holds NaN or infinite values"),
    "NaN, scaled": ([np.full((4, 4), np.nan)], {"levels": 256, "scale": (0, 9)}, "has values from nan to nan, beyond the"),
    "empty": ([X[0][:0]], {}, "image 0 of train is empty"),
    "no image": ([{"pixels": X[0]}], {}, "image 0 of train has no 'image', but 'pixels'; give the images alone"),
    "named classes": ([(X[0], "cat")], {}, "has classes of shape .* and type .*; classes are whole numbers"),
    "some classes": ([(X[0], 1), X[1]], {}, "image 1 of train has 0 classes for 1 images"),
    "too few classes": ([(X, np.arange(3))], {"batched": True}, "batch 0 of train has 3 classes for 40 images"),
    "other test": (X, {"test": X[:, :4]}, r"image 0 of test has shape \(4, 5, 3\), those before it"),
    "nothing held out": (X[:1], {}, "no image was drawn for t"),
    "scale": (X, {"scale": (1, 0), "levels": 9}, r"scale must be two numbers, the lower one first, got \(1, 0\)"),
    "no scale": (X, {"scale": 3, "levels": 9}, "scale must be two numbers, the values that become 0 and 1, got 3"),
    "holdout": (X, {"holdout": 2}, "holdout must be a finite number > 0 and <= 0.9, got 2"),
    "levels": (X, {"levels": 1}, "levels must be a whole number >= 2, got 1"),
    "count": (X, {"count": 50}, "train ended after 40 images, of 50. What was written before it stays in"),
    "batched": (X, {"batched": 1}, "batched must be True or False"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tmp_path, unchecked):
    images, options, said = REFUSED[kind]
    with pytest.raises(UserError, match=said):
        prepare(images, tmp_path / "set", **options)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_len_that_promises_more(tmp_path):
    class Short(list):
        def __len__(self):
            return 50

    with pytest.raises(UserError, match="train ended after 40 items, of the 50 that its len says"):
        prepare(Short(X), tmp_path / "set")


def test_folders_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and holds something else than images of this call"):
        prepare(X, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    prepare(X, tmp_path / "set", validation=0.3)
    for images, options, said in (
        (X, {}, "holds something else than images of this call"),
        (random(seed=1), {"validation": 0.3}, "holds other rows of a call before, from row 0 on, than are given now"),
        (X[:3], {"validation": 0.3}, "rows of a call before, and . are given now"),
        (X / 255, {"validation": 0.3, "levels": 256}, "holds other rows"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(images, tmp_path / "set", **options)
    assert prepare(X, tmp_path / "set", validation=0.3).shape.train


def test_a_refused_call_leaves_a_finished_set(tmp_path):
    written = prepare(X, tmp_path / "set", test=X[:3])
    files = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for images, options, said in (
        ([X[0] + 1j], {}, "no array of numbers"),
        (ends_in(OSError("gone"), X, 5), {}, "could not be had"),
        (ends_in(OSError("gone"), X, 40), {}, "could not be had"),
        (X[:20], {}, "40 rows of a call before, and 20 are given now"),
        (random(seed=1), {}, "other rows"),
        (X, {"count": 50}, "ended after 40 images"),
        (X, {"test": None}, "other rows|rows of a call"),
        (X[:1], {"validation": 0.1}, "rows of a call before|no image was drawn"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(images, tmp_path / "set", **{"test": X[:3]} | options)
        assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == files
    assert bv.data.load(Arrays(str(tmp_path / "set")), progress=False).fingerprint() == written.fingerprint()
    with pytest.raises(UserError, match="could not be had"):  # what is added makes another set of it
        prepare(ends_in(OSError("gone"), random(np.uint8, 60, 6, 5, 3), 50), tmp_path / "set", test=X[:3])
    with pytest.raises(UserError, match="holds no images that"):
        bv.data.load(Arrays(str(tmp_path / "set")), progress=False)


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_map, "BLOCK", 500)
    monkeypatch.setattr(memory_map, "free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"has 1 MiB free after . images\. Free some space and repeat the call: it continues"):
        prepare(X, tmp_path / "set")
    monkeypatch.undo()
    assert len(together(prepare(X, tmp_path / "set"))) == 40


def test_damage_is_seen(tmp_path):
    folder = tmp_path / "set"
    prepare(zip(X, range(40), strict=True), folder)
    sound = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    assert {path.name for path in sound} == {"train.npy", "test.npy", "train_labels.npy", "test_labels.npy", "manifest.json"}
    for path, content in sound.items():
        changed = bytearray(content)
        changed[-20] ^= 1
        for damage in (bytes(changed), content[:-5], None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(UserError, match=r"damaged|holds no images that"):
                bv.data.load(Arrays(str(folder)), progress=False)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"set has 256 levels; leave out data\.levels, which is 17"):
        bv.data.load(Arrays(str(folder), levels=17), progress=False)
    values = json.loads((folder / "manifest.json").read_text())
    del values["digest"]
    for change in ({"format": 99}, {"levels": 1}, {"files": {}}, {"fingerprints": []}):
        (folder / "manifest.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError):
            bv.data.load(Arrays(str(folder)), progress=False)


def test_a_bar_is_shown_and_the_set_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bsvae_jax._io.terminal.SECONDS_BETWEEN_LINES", 0)
    bv.prepare(X, tmp_path / "set")
    errors = capsys.readouterr().err
    assert "writing train: 40 of 40 images (100 %)" in errors
    assert iterables.prepare is bv.prepare
