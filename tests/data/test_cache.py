"""Folders and archives of images, decoding, and the memory map they are decoded into.

Expected pixels come from PIL by itself, from torchvision's published rounding worked out by hand, or from arrays that were
written losslessly. Damaged files, caches and archives are made here.
"""

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsvae_jax import config, data
from bsvae_jax.data import _workers as workers_module
from bsvae_jax.data import cache as prepared_module
from bsvae_jax.data._workers import Decoders, decode_all
from bsvae_jax.data.cache import prepared, read_manifest
from bsvae_jax.data.datasets import recipe
from bsvae_jax.data.decoding import CorruptImageError, Preprocessing, decode, read_header
from bsvae_jax.data.image_files import find_images
from bsvae_jax.errors import UserError


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(array: np.ndarray, kind: str = "png", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind, **options)
    return content.getvalue()


def write_images(folder: Path, count: int, shape=(6, 5, 3), seed: int = 0, suffix: str = "png") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = pixels(count, *shape, seed=seed)
    for number, array in enumerate(arrays):
        (folder / f"{number:04d}.{suffix}").write_bytes(png(array))
    return arrays


def load(folder: Path, **settings) -> data.ImageSet:
    return data.load(config.Folder(str(folder), **settings), progress=False)


# --- Decoding ---------------------------------------------------------------------------------------------------------


def test_pixels_are_those_that_were_written():
    for shape in [(7, 5, 3), (7, 5)]:
        array = pixels(*shape)
        found = decode(png(array), Preprocessing(), "x")
        np.testing.assert_array_equal(found, array.reshape(7, 5, -1))


def test_crop_then_resize_are_those_of_the_paper():
    """CelebA's 218 x 178: CenterCrop(148) keeps rows 35 ... 182 and columns 15 ... 162; Resize(64) is Pillow's bilinear."""
    array = pixels(218, 178, 3)
    cropped = array[35:183, 15:163]
    np.testing.assert_array_equal(decode(png(array), Preprocessing(crop=148), "x"), cropped)
    resized = np.asarray(Image.fromarray(cropped).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(png(array), Preprocessing(crop=148, size=64), "x"), resized)


def test_resizing_is_a_triangle_filter_with_antialiasing():
    """Against the definition: halving weighs four neighbours by 1/8, 3/8, 3/8, 1/8 in each direction, away from the border."""
    array = pixels(8, 8)
    weights = np.array([1, 3, 3, 1]) / 8
    rows = np.stack([weights @ array[2 * i - 1 : 2 * i + 3].astype(float) for i in (1, 2)])
    expected = np.stack([rows[:, 2 * j - 1 : 2 * j + 3] @ weights for j in (1, 2)], axis=1)
    found = decode(png(array), Preprocessing(size=4), "x")[1:3, 1:3, 0]
    np.testing.assert_allclose(found, expected, atol=1.0)  # rounded to 8 bits after each direction


def test_the_shorter_side_becomes_the_size_and_the_centre_is_kept():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    np.testing.assert_array_equal(decode(png(wide), Preprocessing(size=10), "x"), np.full((10, 10, 3), 200))
    assert decode(png(pixels(9, 31, 3)), Preprocessing(size=16), "x").shape == (16, 16, 3)


def test_channels():
    grey, colour = pixels(4, 4), pixels(4, 4, 3)
    np.testing.assert_array_equal(decode(png(grey), Preprocessing(channels=3), "x"), np.repeat(grey[..., None], 3, axis=2))
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(decode(png(colour), Preprocessing(channels=1), "x")[..., 0], luma, atol=1.0)
    with_alpha = np.dstack([colour, pixels(4, 4)])
    np.testing.assert_array_equal(decode(png(with_alpha), Preprocessing(), "x"), colour)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    upright = pixels(4, 6, 3)
    turns = {  # what a camera stores for each value of EXIF, from its definition
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = png(np.ascontiguousarray(turns[orientation]), exif=exif)
    np.testing.assert_array_equal(decode(content, Preprocessing(), "x"), upright)
    assert read_header(content, "x") == (4, 6, 3)


def test_bad_images_are_named():
    good = png(pixels(40, 40, 3), "jpeg")
    for content in (b"", b"hello", good[: len(good) // 2], good[:10], png(pixels(9, 9, 3))[:-30]):
        with pytest.raises(CorruptImageError, match=r"photo\.jpg is"):
            decode(content, Preprocessing(), "photo.jpg")
    sixteen = png(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    with pytest.raises(CorruptImageError, match="photo has pixels of kind 'I;16'; images of 8 bits"):
        decode(sixteen, Preprocessing(), "photo")
    with pytest.raises(UserError, match="photo is 40 x 40 pixels, too small for a centre crop of 41"):
        decode(good, Preprocessing(crop=41), "photo")


# --- Finding ----------------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_held_out_in_part(tmp_path):
    arrays = write_images(tmp_path / "photos", 20)
    images = load(tmp_path / "photos", holdout=0.25)
    assert (images.name, images.image_shape, len(images.train), len(images.test)) == ("photos", (6, 5, 3), 15, 5)
    together = np.concatenate([images.train, images.test])
    order = np.lexsort(together.reshape(20, -1).T[::-1])
    np.testing.assert_array_equal(together[order], arrays[np.lexsort(arrays.reshape(20, -1).T[::-1])])  # each once
    assert images.train_labels is None
    other = load(tmp_path / "photos", holdout=0.25, holdout_seed=1)
    assert not np.array_equal(other.test, images.test)
    np.testing.assert_array_equal(load(tmp_path / "photos", holdout=0.25).test, images.test)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_splits_and_classes_are_folders(tmp_path, test_name):
    written = {
        (split, kind): write_images(tmp_path / "set" / split / kind, count, seed=seed)
        for seed, (split, kind, count) in enumerate(
            [("train", "cat", 4), ("train", "dog", 3), (test_name, "cat", 2), (test_name, "dog", 1)]
        )
    }
    (tmp_path / "set" / "README.txt").write_text("not an image")
    images = load(tmp_path / "set")
    np.testing.assert_array_equal(images.train, np.concatenate([written["train", "cat"], written["train", "dog"]]))
    np.testing.assert_array_equal(images.test, np.concatenate([written[test_name, "cat"], written[test_name, "dog"]]))
    assert images.train_labels.tolist() == [0] * 4 + [1] * 3
    assert images.test_labels.tolist() == [0, 0, 1]
    assert images.label_names == ("cat", "dog")


def test_classes_without_splits(tmp_path):
    cats, dogs = write_images(tmp_path / "a" / "cats", 6), write_images(tmp_path / "a" / "dogs", 6, seed=1)
    images = load(tmp_path / "a")
    for array, label in zip(images.train, images.train_labels, strict=True):
        assert any(np.array_equal(array, known) for known in (cats, dogs)[label])


def test_a_zip_is_read_like_the_folder_in_it(tmp_path):
    write_images(tmp_path / "photos" / "train", 5)
    write_images(tmp_path / "photos" / "test", 2, seed=1)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in (tmp_path / "photos").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
        archive.writestr("__MACOSX/photos/train/._0000.png", "what macOS adds")
    folder, archived = load(tmp_path / "photos"), load(tmp_path / "photos.zip")
    np.testing.assert_array_equal(archived.train, folder.train)
    np.testing.assert_array_equal(archived.test, folder.test)
    assert archived.fingerprint() == folder.fingerprint()


def bad_folder(kind: str, folder: Path) -> Path:
    folder.mkdir()
    match kind:
        case "missing":
            folder.rmdir()
        case "empty":
            pass
        case "other files":
            (folder / "notes.txt").write_text("hello")
        case "one image":
            write_images(folder, 1)
        case "sizes differ":
            write_images(folder, 3)
            (folder / "x.png").write_bytes(png(pixels(9, 9, 3)))
        case "channels differ":
            write_images(folder, 3)
            (folder / "x.png").write_bytes(png(pixels(6, 5)))
        case "corrupt":
            write_images(folder, 3)
            (folder / "0001.png").write_bytes(b"nonsense")
        case "truncated":
            write_images(folder, 3)
            (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:-30])
        case "train alone":
            write_images(folder / "train", 3)
            write_images(folder / "more", 3)
        case "link out of it":
            write_images(folder, 3)
            (folder.parent / "secret.png").write_bytes(png(pixels(6, 5, 3)))
            (folder / "x.png").symlink_to(folder.parent / "secret.png")
        case "folder linked out of it":
            write_images(folder, 3)
            (folder / "x").symlink_to("/")
        case "dangling link":
            write_images(folder, 3)
            (folder / "x.png").symlink_to(folder / "nowhere.png")
        case "not a zip":
            path = folder / "a.zip"
            path.write_bytes(b"PK nonsense")
            return path
        case "zip cut":
            path = folder / "a.zip"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a.png", png(pixels(6, 5, 3)))
            path.write_bytes(path.read_bytes()[:-10])
            return path
        case "zip out of itself" | "zip absolute" | "zip of Windows":
            path = folder / "a.zip"
            names = {"zip out of itself": "../a.png", "zip absolute": "/etc/a.png", "zip of Windows": "..\\a.png"}
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(names[kind], png(pixels(6, 5, 3)))
            return path
        case "zip with a link":
            path = folder / "a.zip"
            member = zipfile.ZipInfo("a.png")
            member.external_attr = 0o120777 << 16
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(member, "/etc/passwd")
            return path
        case "zip member damaged":
            path = folder / "a.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for name in "abc":
                    archive.writestr(f"{name}.png", png(pixels(6, 5, 3)))
            content = bytearray(path.read_bytes())
            content[60] ^= 1
            path.write_bytes(bytes(content))
            return path
    return folder


@pytest.mark.parametrize(
    ("kind", "telling"),
    [
        ("missing", "There is no folder or file .*photos'; data.path must name a folder, or a .zip, of images"),
        ("empty", r"photos holds no images \(.bmp, .*.webp\)\."),
        ("other files", "holds no images .*; it holds 1 other files, 'notes.txt' first"),
        ("one image", "holds 1 images: too few to keep 1 for testing"),
        ("sizes differ", r"photos holds images of 2 sizes \(6 x 5: 3, 9 x 9: 1\); --size N"),
        ("channels differ", r"holds grey images and colour images \(colour: 3, grey: 1\); --channels 3"),
        ("corrupt", "0001.png is not an image that can be read .*`bsvae prepare --skip-corrupt` leaves such images out"),
        ("truncated", "0001.png is truncated or damaged .*--skip-corrupt"),
        ("train alone", "has a folder 'train' beside more, but no 'test'"),
        ("link out of it", "x.png is a symbolic link out of the folder, to .*secret.png; copy the images"),
        ("folder linked out of it", "photos/x is a symbolic link out of the folder, to /;"),
        ("dangling link", "x.png cannot be read"),
        ("not a zip", "a.zip is not a zip archive that can be read"),
        ("zip cut", "a.zip is not a zip archive that can be read"),
        ("zip out of itself", "has a member '../a.png', which leads out of it; it is not read"),
        ("zip absolute", "has a member '/etc/a.png', which leads out of it"),
        ("zip of Windows", r"has a member '\.\.\\\\a.png', which leads out of it"),
        ("zip with a link", "has a symbolic link, 'a.png'; it is not read"),
        ("zip member damaged", "a.png cannot be read .*Bad CRC-32.*--skip-corrupt"),
    ],
)
def test_bad_folders_are_refused(tmp_path, own_cache, kind, telling):
    path = bad_folder(kind, tmp_path / "photos")
    with pytest.raises(UserError, match=telling):
        load(path)
    assert not list(own_cache.rglob("manifest.json")), "nothing is taken for finished"


def test_a_folder_that_is_not_named():
    with pytest.raises(UserError, match="must name a folder"):
        data.load(config.Folder())


def test_mixed_images_are_made_alike_when_asked(tmp_path):
    write_images(tmp_path / "a", 3)
    (tmp_path / "a" / "x.png").write_bytes(png(pixels(9, 12)))
    images = load(tmp_path / "a", size=4, channels=3)
    assert images.image_shape == (4, 4, 3)


# --- The prepared set -------------------------------------------------------------------------------------------------


def of(folder: Path, **settings):
    return recipe(config.Folder(str(folder), **settings))


def test_the_manifest_says_everything(tmp_path):
    write_images(tmp_path / "photos" / "cats", 3)
    write_images(tmp_path / "photos" / "dogs", 3, seed=1)
    wanted = of(tmp_path / "photos", crop=5, size=4)
    images = prepared(wanted, progress=False)
    manifest = read_manifest(wanted.folder())
    assert manifest["preprocessing"] == {"crop": 5, "size": 4, "channels": None}
    assert (manifest["shape"], manifest["splits"]) == ([4, 4, 3], {"train": 5, "test": 1})
    assert manifest["label_names"] == ["cats", "dogs"]
    assert manifest["fingerprint"] == images.fingerprint() == data.ImageSet("x", images.train, images.test).fingerprint()
    assert set(manifest["files"]) == {"images.npy", "labels.npy"}
    for name, file in manifest["files"].items():
        found = subprocess.run(
            ["sha256sum", wanted.folder() / name], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        assert file["sha256"] == found
    np.testing.assert_array_equal(np.load(wanted.folder() / "images.npy")[:5], images.train)
    assert isinstance(images.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images.train[0] = 0


def test_the_key_covers_what_changes_a_pixel(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    write_images(folder, 5)
    keys = {of(folder).key()}
    for settings in ({"size": 4}, {"crop": 4}, {"channels": 1}, {"holdout": 0.5}, {"holdout_seed": 7}):
        keys.add(of(folder, **settings).key())
    (folder / "0001.png").write_bytes(png(pixels(6, 5, 3, seed=9)))
    os.utime(folder / "0001.png", ns=(1, 1))
    keys.add(of(folder).key())
    (folder / "0004.png").rename(folder / "0005.png")
    keys.add(of(folder).key())
    monkeypatch.setattr(prepared_module, "version", lambda name: "another")
    keys.add(of(folder).key())
    assert len(keys) == 9
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path / "elsewhere" / "photos", copy_function=shutil.copy2)
    assert of(tmp_path / "elsewhere" / "photos").key() == of(folder).key(), "where it lies changes nothing"


def test_a_finished_set_is_not_decoded_again(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 5)
    first = load(tmp_path / "photos")
    monkeypatch.setattr(prepared_module, "Decoders", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load(tmp_path / "photos").train, first.train)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "no manifest", "manifest of nonsense", "newer format", "gone"])
def test_a_damaged_set_is_made_again(tmp_path, damage, capsys):
    write_images(tmp_path / "photos", 5)
    first = load(tmp_path / "photos")
    expected = first.train.copy()
    folder = of(tmp_path / "photos").folder()
    file, manifest = folder / "images.npy", folder / "manifest.json"
    match damage:
        case "a flipped bit":
            content = bytearray(file.read_bytes())
            content[-7] ^= 16
            file.write_bytes(bytes(content))
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "no manifest":
            manifest.unlink()
        case "manifest of nonsense":
            manifest.write_text("{")
        case "newer format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
        case "gone":
            file.unlink()
    np.testing.assert_array_equal(load(tmp_path / "photos").train, expected)
    assert "is damaged; it is made again" in capsys.readouterr().err


def test_what_another_process_has_made_again_is_not_deleted(tmp_path, monkeypatch, capsys):
    """Both see the damage, the other has the lock first: nothing is deleted without the lock, and nothing good with it."""
    write_images(tmp_path / "photos", 5)
    expected = load(tmp_path / "photos").train.copy()
    folder = of(tmp_path / "photos").folder()
    shutil.copytree(folder, tmp_path / "good")
    (folder / "images.npy").write_bytes(b"")
    locked = prepared_module.locked

    @contextlib.contextmanager
    def after_the_other(*arguments):
        assert (folder / "images.npy").read_bytes() == b"", "changed without the lock"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "good", folder)
        with locked(*arguments):
            yield

    monkeypatch.setattr(prepared_module, "locked", after_the_other)
    monkeypatch.setattr(prepared_module, "Decoders", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load(tmp_path / "photos").train, expected)
    assert "damaged" not in capsys.readouterr().err


def test_a_set_that_vanishes_while_it_is_checked_is_made_again(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 5)
    expected = load(tmp_path / "photos").train.copy()
    folder, checked = of(tmp_path / "photos").folder(), prepared_module.sha256_of

    def too_late(*arguments):
        shutil.rmtree(folder, ignore_errors=True)
        return checked(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "sha256_of", too_late)
        assert prepared_module._open(folder, False) is None
    np.testing.assert_array_equal(load(tmp_path / "photos").train, expected)


def test_corrupt_images_are_left_out_and_listed(tmp_path, capsys):
    arrays = write_images(tmp_path / "photos" / "train", 300, (4, 4, 3))
    write_images(tmp_path / "photos" / "test", 3, (4, 4, 3), seed=1)
    bad = [0, 17, 255, 256, 299]
    for number in bad:
        (tmp_path / "photos" / "train" / f"{number:04d}.png").write_bytes(b"nonsense")
    (tmp_path / "photos" / "test" / "0001.png").write_bytes(b"")
    wanted = of(tmp_path / "photos")
    with pytest.raises(UserError, match=r"0000\.png is not an image"):
        prepared(wanted, progress=False)
    images = prepared(wanted, skip_corrupt=True, progress=False)
    np.testing.assert_array_equal(images.train, np.delete(arrays, bad, axis=0))
    assert len(images.test) == 2
    skipped = read_manifest(wanted.folder())["skipped"]
    assert len(skipped) == 6
    assert [f"{number:04d}.png" in why for number, why in zip(bad, skipped, strict=False)] == [True] * 5
    assert "6 corrupt images were left out" in capsys.readouterr().err
    assert images.fingerprint() == data.ImageSet("x", images.train, images.test).fingerprint()


def test_no_room_is_known_before_anything_is_decoded(tmp_path, own_cache, monkeypatch):
    write_images(tmp_path / "photos", 5)
    monkeypatch.setattr(prepared_module, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(prepared_module, "Decoders", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"has 0 MiB free; the 5 images of photos take 16 MiB\. Free some space"):
        load(tmp_path / "photos")


@pytest.mark.parametrize("place", ["/proc/nothing", "a file"])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, place):
    write_images(tmp_path / "photos", 5)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / place))
    with pytest.raises(UserError, match=r"prepared cannot be written \(.*\); set BSVAE_CACHE to a folder"):
        load(tmp_path / "photos")


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from bsvae_jax import config, data
from bsvae_jax.data import _workers as workers
original = workers.Decoders.decode
def slow(self, files, preprocessing):
    time.sleep({pause} * len(files))
    return original(self, files, preprocessing)
workers.Decoders.decode = slow
images = data.load(config.Folder({folder!r}), progress=False)
print(images.fingerprint(), len(images.train))
"""


def script(folder: Path, pause: float) -> list[str]:
    root = str(Path(prepared_module.__file__).parents[2])
    return [sys.executable, "-c", SCRIPT.format(root=root, folder=str(folder), pause=pause)]


def test_killed_at_any_moment_it_continues(tmp_path, own_cache):
    """SIGKILL three times while it decodes; what is done is not done again, and the result is that of one go."""
    arrays = write_images(tmp_path / "photos", 1500, (4, 4, 3))
    wanted = of(tmp_path / "photos")
    unfinished = own_cache / "prepared" / f".{wanted.folder().name}.unfinished" / "progress.jsonl"
    done = 0
    for _ in range(3):
        process = subprocess.Popen(script(tmp_path / "photos", 0.004))
        while not unfinished.is_file() or len(unfinished.read_text().splitlines()) <= done:
            assert process.poll() is None, "finished before it was killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
        done = len(unfinished.read_text().splitlines())
    assert not wanted.folder().exists()
    # A torn line, and an image that changed behind our back, are found out.
    chunk = json.loads(unfinished.read_text().splitlines()[0])[0]
    with unfinished.open("a") as log:
        log.write('[["train", 0')
    there = np.load(unfinished.with_name("images.npy"), mmap_mode="r+")
    there[chunk[3]] ^= 255
    there.flush()
    decoded = []
    original = Decoders.decode

    def counted(self, files, preprocessing):
        decoded.append(len(files))
        return original(self, files, preprocessing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoders, "decode", counted)
        images = prepared(wanted, progress=False)
    assert sum(decoded) <= 1500 - (done - 1) * 150  # the test split's chunk has 150 images, others 256
    position = np.random.default_rng(0).permutation(1500)
    np.testing.assert_array_equal(images.test, arrays[np.sort(position[:150])])
    np.testing.assert_array_equal(images.train, arrays[np.sort(position[150:])])
    assert not unfinished.parent.exists()


@pytest.mark.faults
def test_killed_at_random_moments_while_it_prepares(tmp_path, own_cache, capsys):
    """Until 15 have hit: from the first import to the renaming of the finished folder. The set is that of one go."""
    write_images(tmp_path / "photos", 2000, (4, 4, 3))
    wanted = of(tmp_path / "photos")
    expected = prepared(wanted, progress=False).fingerprint()
    shutil.rmtree(own_cache / "prepared")
    begun = time.monotonic()
    subprocess.run(script(tmp_path / "photos", 0.001), check=True, capture_output=True)
    whole = time.monotonic() - begun
    generator = np.random.default_rng(0)
    runs, lost = 0, []
    while len(lost) < 15:
        shutil.rmtree(own_cache / "prepared")
        while True:
            begun = time.time()
            process = subprocess.Popen(script(tmp_path / "photos", 0.001), stdout=subprocess.PIPE, text=True)
            try:
                out, _ = process.communicate(timeout=generator.uniform(0.3, 0.7) * whole)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                killed = time.time()
                process.communicate()
                kept = [path.stat().st_mtime for path in (own_cache / "prepared").glob(".*/progress.jsonl")]  # a line a chunk
                lost.append(killed - max([begun, *kept]))
        assert process.returncode == 0
        assert out.split()[0] == expected
        runs += 1
    with capsys.disabled():
        cost = f"at most {max(lost):.1f} s lost by one; {runs} / {runs} sets identical, one takes {whole:.1f} s"
        print(f"\nprepare, SIGKILL: {len(lost)} / {len(lost)} kills survived, {cost}")


def test_two_processes_at_once_make_one_set(tmp_path):
    write_images(tmp_path / "photos", 600, (4, 4, 3))
    processes = [
        subprocess.Popen(script(tmp_path / "photos", 0.004), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate() for process in processes]
    assert len({out for out, _ in results}) == 1
    assert results[0][0].split()[1] == "540"
    assert any("another process is preparing photos; waiting for it" in err for _, err in results)
    images = load(tmp_path / "photos")
    assert images.fingerprint() == results[0][0].split()[0]


def test_a_dead_process_holds_no_lock(tmp_path, own_cache):
    write_images(tmp_path / "photos", 5)
    wanted = of(tmp_path / "photos")
    (own_cache / "prepared").mkdir(parents=True)
    lock = own_cache / "prepared" / f".{wanted.folder().name}.lock"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_hold, args=(str(lock),))
    process.start()
    while not lock.is_file():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert len(prepared(wanted, progress=False).train) == 4


def _hold(path: str) -> None:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(60)


def test_the_stamp_of_a_zip_is_of_its_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("x.png", png(pixels(4, 4, 3, seed=seed)))
    stamps = [find_images(tmp_path / f"{name}.zip").stamp for name in "abc"]
    assert stamps[0] == stamps[1] != stamps[2]


# --- Workers ----------------------------------------------------------------------------------------------------------


def test_workers_decode_as_the_calling_thread_does():
    files = [(f"{seed}.png", png(pixels(9, 7, 3, seed=seed))) for seed in range(5)]
    files[2] = ("bad.png", b"nonsense")
    wanted = Preprocessing(crop=6, size=4)
    found = decode_all(files, wanted)
    for count in (0, 2):
        with Decoders(count) as decoders:
            for ours, theirs in zip(decoders.decode(files, wanted), found, strict=True):
                if isinstance(theirs, CorruptImageError):
                    assert isinstance(ours, CorruptImageError)
                    assert str(ours) == str(theirs)
                else:
                    np.testing.assert_array_equal(ours, theirs)


def test_a_worker_imports_neither_jax_nor_the_package():
    code = workers_module._START.replace("serve(sys", "print('jax' in sys.modules, 'optax' in sys.modules) or sys.exit()#")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == ["False", "False"]


def test_a_worker_that_dies_is_an_error_with_a_name():
    with Decoders(1) as decoders:
        (process,) = decoders._processes
        process.kill()
        process.wait()
        with pytest.raises(
            UserError, match=r"died \(status -9\), perhaps of lack of memory, at one of a\.png and the 0 images"
        ):
            decoders.decode([("a.png", png(pixels(4, 4, 3)))], Preprocessing())


def test_workers_end_with_their_process(tmp_path):
    """SIGKILL leaves nobody behind."""
    write_images(tmp_path / "photos", 1500, (4, 4, 3))
    process = subprocess.Popen(script(tmp_path / "photos", 0.01))
    children: list[str] = []
    while len(children) < 2:
        assert process.poll() is None
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its process"
        time.sleep(0.05)


def test_a_script_without_a_main_guard_may_prepare(tmp_path):
    """`multiprocessing` would import the script in every worker, which would then prepare in turn."""
    write_images(tmp_path / "photos", 1500, (4, 4, 3))
    path = tmp_path / "experiment.py"
    path.write_text(
        SCRIPT.format(root=str(Path(prepared_module.__file__).parents[2]), folder=str(tmp_path / "photos"), pause=0)
    )
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert found.stdout.split()[1] == "1350"
    assert len(found.stdout.splitlines()) == 1
