"""Folders and archives of images, decoding, and the memory map they are decoded into.

Expected pixels come from PIL by itself, from torchvision's published rounding worked out by hand, or from arrays that were
written losslessly. Damaged files, caches and archives are made here.
"""

import contextlib
import fcntl
import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from PIL import Image

from bsvae_jax import config, data
from bsvae_jax.data import _workers as workers_module
from bsvae_jax.data import archives
from bsvae_jax.data import cache as prepared_module
from bsvae_jax.data import recipe as recipe_module
from bsvae_jax.data._workers import Decoders, decode_all
from bsvae_jax.data.cache import load_prepared, read_manifest
from bsvae_jax.data.decoding import CorruptImageError, Preprocessing, decode, decode_noted, read_header
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
    """Against the definition: halving weighs four neighbors by 1/8, 3/8, 3/8, 1/8 in each direction, away from the border."""
    array = pixels(8, 8)
    weights = np.array([1, 3, 3, 1]) / 8
    rows = np.stack([weights @ array[2 * i - 1 : 2 * i + 3].astype(float) for i in (1, 2)])
    expected = np.stack([rows[:, 2 * j - 1 : 2 * j + 3] @ weights for j in (1, 2)], axis=1)
    found = decode(png(array), Preprocessing(size=4), "x")[1:3, 1:3, 0]
    np.testing.assert_allclose(found, expected, atol=1.0)  # rounded to 8 bits after each direction


def test_the_shorter_side_becomes_the_size_and_the_center_is_kept():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    np.testing.assert_array_equal(decode(png(wide), Preprocessing(size=10), "x"), np.full((10, 10, 3), 200))
    assert decode(png(pixels(9, 31, 3)), Preprocessing(size=16), "x").shape == (16, 16, 3)


def test_channels():
    gray, color = pixels(4, 4), pixels(4, 4, 3)
    np.testing.assert_array_equal(decode(png(gray), Preprocessing(channels=3), "x"), np.repeat(gray[..., None], 3, axis=2))
    luma = color @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(decode(png(color), Preprocessing(channels=1), "x")[..., 0], luma, atol=1.0)
    with_alpha = np.dstack([color, pixels(4, 4)])
    alpha = with_alpha[..., 3:] / 255  # on white
    np.testing.assert_allclose(decode(png(with_alpha), Preprocessing(), "x"), alpha * color + (1 - alpha) * 255, atol=1.0)


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
    ramp = np.arange(64).reshape(8, 8) * 1000
    for kind, depth in (("I;16", np.uint16), ("I", np.int32), ("F", np.float32)):
        deep = png(ramp.astype(depth), "tiff")
        said = rf"photo has pixels of kind '{kind}'; images of 8 bits.*bsvae_jax.prepare\(map\(PIL"
        for channels in (None, 1, 3):
            with pytest.raises(UserError, match=said):
                decode(deep, Preprocessing(size=8, channels=channels), "photo")
    with pytest.raises(UserError, match="photo is 40 x 40 pixels, too small for a center crop of 41"):
        decode(good, Preprocessing(crop=41), "photo")


def test_an_image_too_thin_to_be_enlarged_is_left_out_when_asked(tmp_path):
    write_images(tmp_path / "photos", 5)
    (tmp_path / "photos" / "thin.png").write_bytes(png(np.zeros((1, 30_000, 3), np.uint8)))
    with pytest.raises(UserError, match=r"thin\.png is 1 x 30000 pixels, too thin for a size of 64: .*--skip-corrupt"):
        load(tmp_path / "photos", size=64)
    assert len(load_prepared(of(tmp_path / "photos", size=64), skip_corrupt=True, progress=False).train) == 4
    assert decode(png(np.zeros((30_000, 200, 3), np.uint8)), Preprocessing(size=64), "long").shape == (64, 64, 3)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def own_png(height: int, width: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


HALF = np.dstack([np.full((4, 4, 3), 100, np.uint8), np.where(np.eye(4), 0, 255).astype(np.uint8)])
ON_WHITE = np.repeat(np.where(np.eye(4), 255, 100)[..., None], 3, axis=2)  # the diagonal is transparent
DEEP = (1000 * np.arange(48).reshape(4, 4, 3)).astype(">u2")
SEVERAL = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (100, 200)]
WHITE, EIGHT, FRAMES = (
    "transparent in part, and were laid on white",
    "16 bits a channel, of which the upper 8",
    "several frames",
)
PALETTE = Image.fromarray(HALF[..., 3] // 255).convert("P")
PALETTE.putpalette([9, 9, 9, 100, 100, 100])


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        pytest.param(png(HALF), ON_WHITE, WHITE, id="RGBA"),
        pytest.param(png(HALF, "webp", lossless=True), ON_WHITE, WHITE, id="RGBA of WebP"),
        pytest.param(png(HALF[..., 2:]), ON_WHITE[..., :1], WHITE, id="gray with alpha"),
        pytest.param(saved(PALETTE, "png", transparency=0), ON_WHITE, WHITE, id="a palette"),
        pytest.param(saved(PALETTE, "gif", transparency=0), ON_WHITE, WHITE, id="GIF"),
        pytest.param(
            saved(
                Image.fromarray(np.where(np.eye(4)[..., None], 9, HALF[..., :3]).astype(np.uint8)),
                "png",
                transparency=(9, 9, 9),
            ),
            ON_WHITE,
            WHITE,
            id="a transparent color",
        ),
        pytest.param(png(np.dstack([HALF[..., :3], np.full((4, 4), 255, np.uint8)])), HALF[..., :3], None, id="opaque"),
        pytest.param(
            own_png(4, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in DEEP)), DEEP // 256, EIGHT, id="RGB of 16 bits"
        ),
        pytest.param(b"P6 4 4 65535 " + DEEP.tobytes(), np.rint(DEEP / 65535 * 255), EIGHT, id="PPM of 16 bits"),
        pytest.param(png(HALF[..., :3]), HALF[..., :3], None, id="RGB"),
        *[
            pytest.param(
                saved(SEVERAL[0], kind, save_all=True, append_images=SEVERAL[1:], **options),
                HALF[..., :3],
                FRAMES,
                id=f"{kind} film",
            )
            for kind, options in [("gif", {}), ("tiff", {}), ("png", {}), ("webp", {"lossless": True})]
        ],
        *[
            pytest.param(saved(SEVERAL[0], kind, **options), HALF[..., :3], None, id=kind)
            for kind, options in [
                ("tga", {}),
                ("jpeg2000", {}),
                ("avif", {"quality": 100}),
                ("pcx", {}),
                ("ppm", {}),
                ("sgi", {}),
            ]
        ],
    ],
)
def test_what_is_lost_of_an_image_is_said(content, expected, said):
    found, notes = decode_noted(content, Preprocessing(), "x")
    np.testing.assert_allclose(found, expected, atol=1.0)
    assert read_header(content, "x") == found.shape
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)


TEXT = own_png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(2**21))))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(
            own_png(20_000, 10_000, 8, 0, b""), "more pixels than are read .*200000000 pixels.*BSVAE_MAX_PIXELS", id="200"
        ),
        pytest.param(own_png(10_000, 10_000, 8, 0, b""), "more pixels than are read .*100000000 pixels", id="100"),
        pytest.param(TEXT, "more text than is read .*save it without, or set BSVAE_MAX_TEXT", id="text"),
        pytest.param(TEXT[:33] + TEXT[-12:], "is not an image that can be read|is truncated", id="nothing in it"),
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"<html>404", "it starts with b'<html>404'", id="html"),
    ],
)
def test_the_reason_why_an_image_is_not_read(content, said):
    for read in (read_header, lambda content, what: decode(content, Preprocessing(), what)):
        if "truncated" not in said or read is not read_header:
            with pytest.raises(CorruptImageError, match=f"^photo.png .*{said}"):
                read(content, "photo.png")


def test_the_limits_can_be_raised(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)  # put back after the test
    for name in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"):
        monkeypatch.setattr(PIL.PngImagePlugin, name, 2**20)
    with pytest.raises(CorruptImageError, match="more pixels"):
        decode(png(HALF), Preprocessing(), "x")
    monkeypatch.setenv("BSVAE_MAX_PIXELS", "16")
    monkeypatch.setenv("BSVAE_MAX_TEXT", str(2**22))
    assert decode(png(HALF), Preprocessing(), "x").shape == (4, 4, 3)
    assert decode(TEXT, Preprocessing(), "x").shape == (1, 1, 1)
    monkeypatch.setenv("BSVAE_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="BSVAE_MAX_PIXELS must be a whole number >= 1, got 'many'"):
        decode(png(HALF), Preprocessing(), "x")


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


@pytest.mark.parametrize("packed", ["", "zip", "gztar"])
def test_copies_of_a_training_image_are_not_held_out(tmp_path, packed):
    write_images(tmp_path / "photos", 20)
    for file in sorted((tmp_path / "photos").iterdir())[:10]:
        shutil.copy(file, file.with_stem(f"copy_of_{file.stem}"))
    path = tmp_path / "photos"
    if packed:
        path = Path(shutil.make_archive(str(path), packed, path))
    images = load(path, holdout=0.5)
    train, test = ({image.tobytes() for image in part} for part in (images.train, images.test))
    assert not train & test
    assert len(images.train) + len(images.test) == 30
    assert len(train) + len(test) == 20


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


@pytest.mark.parametrize("packed", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_an_archive_is_read_like_the_folder_in_it(tmp_path, packed):
    write_images(tmp_path / "photos" / "train", 5)
    write_images(tmp_path / "photos" / "test", 2, seed=1)
    folder = load(tmp_path / "photos")
    (tmp_path / "photos" / "__MACOSX").mkdir()
    (tmp_path / "photos" / "__MACOSX" / "._0000.png").write_text("what macOS adds")
    archived = load(Path(shutil.make_archive(str(tmp_path / "photos"), packed, tmp_path, "photos")))
    assert archived.name == "photos"
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
                    archive.writestr(f"{name}.png", png(pixels(6, 5, 3, seed=ord(name))))
            content = bytearray(path.read_bytes())
            content[60] ^= 1
            path.write_bytes(bytes(content))
            return path
    return folder


@pytest.mark.parametrize(
    ("kind", "telling"),
    [
        ("missing", "There is no folder or file .*photos'; data.path must name a folder, .zip or .tar of images"),
        ("empty", r"photos holds no images \(.bmp, .*.webp\)\."),
        ("other files", "holds no images .*; it holds 1 other files, 'notes.txt' first"),
        ("one image", "holds 1 images: too few to keep 1 for testing"),
        ("sizes differ", r"photos holds images of 2 sizes \(6 x 5: 3, 9 x 9: 1\); --size N"),
        ("channels differ", r"holds gray images and color images \(color: 3, gray: 1\); --channels 3"),
        ("corrupt", "0001.png is not an image .*`bsvae prepare --skip-corrupt`, with the same options, leaves"),
        ("truncated", "0001.png is truncated or damaged .*--skip-corrupt"),
        ("train alone", "has a folder 'train' beside more, but no 'test'"),
        ("folder linked out of it", "photos/x is a symbolic link to /, in which it lies itself; delete it"),
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


def lay_out(root: Path, names: list[str], packed: str) -> Path:
    """Files of these names, which nothing decodes; a name `a -> b` is a link to b."""
    if packed.startswith("tar"):
        with tarfile.open(root / f"set.{packed}", packed.replace("tar", "w").replace(".", ":")) as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(os.fsencode(name))
                archive.addfile(member, io.BytesIO(os.fsencode(name)))
        return root / f"set.{packed}"
    if packed:
        with zipfile.ZipFile(root / "set.zip", "w") as archive:
            for name in names:
                archive.writestr(name, name)
        return root / "set.zip"
    for name in names:
        name, _, target = name.partition(" -> ")
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / "set" / name).symlink_to(target)
        else:
            (root / "set" / name).write_bytes(os.fsencode(name))
    return root / "set"


def of_split(names: str, count: int = 3) -> list[str]:
    """`count` images in each of these folders."""
    return [f"{folder}/{number}.png" for folder in names.split() for number in range(count)]


# What lies in a folder; its training images, its test images (None: held out at random), classes, what is said.
LAYOUTS = {
    **{
        f"{train} and {test}": (
            of_split(f"{train} {test}"),
            of_split(train),
            of_split(test),
            (),
            f"3 images for training in '{Path(train).name}'",
        )
        for train, test in [
            *[("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "Evaluation")],
            *[("train", "eval"), ("train", "val"), ("train", "Valid"), ("train", "validation"), ("train2017", "val2017")],
            *[("training_set", "test_set"), ("train_images", "TestData"), ("a/train", "a/test")],
        ]
    },
    "both and validation": (
        of_split("train val test"),
        of_split("train"),
        of_split("test"),
        (),
        "left out: 3 images in 'val', apart from those for testing",
    ),
    "images beside": (
        [*of_split("Train Test"), "preview.png", "more/x.png"],
        of_split("Train"),
        of_split("Test"),
        (),
        r"left out: 2 images beside those folders \('more/x.png' first\)",
    ),
    "a level deeper, beside an image": (
        [*of_split("set/train set/test"), "preview.png"],
        of_split("set/train"),
        of_split("set/test"),
        (),
        "1 image beside",
    ),
    "splits in classes": (
        of_split("cat/train cat/test dog/train dog/test"),
        of_split("cat/train dog/train"),
        of_split("cat/test dog/test"),
        ("cat", "dog"),
        "in 'train', 6 images for testing in 'test'",
    ),
    "Tiny ImageNet": (
        of_split("train/n01/images train/n02/images val/images"),
        of_split("train/n01/images train/n02/images"),
        of_split("val/images"),
        ("n01", "n02"),
        "all test images lie in no class folder of training",
    ),
    "a flat test": (
        of_split("train/cat train/dog test"),
        of_split("train/cat train/dog"),
        of_split("test"),
        ("cat", "dog"),
        "all test images lie in no class",
    ),
    "a class of test images": (
        of_split("train/cat train/dog test/cat test/eel"),
        of_split("train/cat train/dog"),
        of_split("test/cat test/eel"),
        ("cat", "dog"),
        ", 3 test images lie in no class",
    ),
    "a stray image": (
        [*of_split("cat dog"), "x.png"],
        of_split("cat dog"),
        None,
        ("cat", "dog"),
        r"left out: 1 image beside the class folders \('x.png' first\)",
    ),
    "a stray training image": (
        [*of_split("train/cat train/dog test/cat test/dog"), "train/x.png"],
        of_split("train/cat train/dog"),
        of_split("test/cat test/dog"),
        ("cat", "dog"),
        "1 image beside the class folders",
    ),
    "many without a class": (
        [*of_split("cat dog"), "x.png", "y.png"],
        [*of_split("cat dog"), "x.png", "y.png"],
        None,
        (),
        "no classes, since 2 images lie in no class folder",
    ),
    "a class called train": (
        of_split("train/train train/car test/train test/car"),
        of_split("train/car train/train"),
        of_split("test/car test/train"),
        ("car", "train"),
        "6 images for training",
    ),
    "other suffixes": (
        ["a.JPE", "b.jfif", "c.TGA", "d.jp2", "e.avif", "f.heic", "g.heic", "h.txt", "i"],
        ["a.JPE", "b.jfif", "c.TGA", "d.jp2", "e.avif"],
        None,
        (),
        r"left out: other files \(2 .heic, 1 .txt, 1 without suffix\)",
    ),
    "one folder of several splits": (
        of_split("train_val/cat train_val/dog"),
        of_split("train_val/cat train_val/dog"),
        None,
        ("cat", "dog"),
        "6 images",
    ),
    "what systems add": (
        ["a.png", "b.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", ".thumbnails/a.png", "._a.png", "#recycle/c.png"],
        ["a.png", "b.png"],
        None,
        (),
        "set(|.zip|.tar): 2 images, of which a share is held out at random.$",
    ),
    "one folder that is a split": (
        of_split("train"),
        of_split("train"),
        None,
        (),
        "3 images in 'train', of which a share",
    ),
    "not UTF-8": (["caf\udce9.png", "b.png", "caf\udce9.heic"], ["b.png", "caf\udce9.png"], None, (), "1 .heic"),
    "a colon": (["a:1.png", "12:30/b.png"], ["12:30/b.png", "a:1.png"], None, (), "2 images"),
}
ZIPS = {
    "backslashes": (
        [name.replace("/", "\\") for name in of_split("set/train set/test")],
        [name.replace("/", "\\") for name in of_split("set/train")],
        [name.replace("/", "\\") for name in of_split("set/test")],
        (),
        "in 'test'",
    ),
    "a dot in front": (
        ["./data/train/0.png", "./data/test/1.png"],
        ["./data/train/0.png"],
        ["./data/test/1.png"],
        (),
        "in 'test'",
    ),
}
LINKS = {
    "train is a link out": (
        ["train -> ../other", *of_split("test ../other")],
        of_split("train"),
        of_split("test"),
        (),
        "3 images for training in 'train'",
    ),
    "splits are links inside": (
        ["train -> all/a", "test -> all/b", *of_split("all/a all/b")],
        of_split("train"),
        of_split("test"),
        (),
        "left out: 6 images beside",
    ),
    "a link out": (["a.png", "x.png -> ../secret.png", "../secret.png"], ["a.png", "x.png"], None, (), "2 images"),
    "a hidden link out": ([".venv -> /", "a.png"], ["a.png"], None, (), "1 image, of"),
    "a link seen twice": (
        ["b -> a", *of_split("a")],
        of_split("a"),
        None,
        (),
        r"left out: 3 images to which links lead again \('b/0.png' first\)",
    ),
    "test is train": (["test -> train", *of_split("train")], None, None, (), "training images and test images are the same"),
    "train is test": (["train -> test", *of_split("test")], None, None, (), "training images and test images are the same"),
    "one image of both": (
        ["test/9.png -> ../train/0.png", *of_split("train test")],
        of_split("train"),
        of_split("test"),
        (),
        r"left out: 1 image to which links lead again \('test/9.png' first\)",
    ),
    "a circle": (
        ["a/up -> ../..", "a/here -> .", "a/0.png -> ../../x.png", "../x.png"],
        None,
        None,
        (),
        "link to .*, in which it lies",
    ),
    "a circle inside": (["a/here -> ..", "a/0.png"], ["a/0.png"], None, (), "1 image, of"),
    "a file that is none": (["notes -> nowhere", "a.png"], ["a.png"], None, (), "1 image, of"),
}


@pytest.mark.parametrize(
    ("layout", "packed"),
    [
        *[pytest.param(layout, "", id=name) for name, layout in (LAYOUTS | LINKS).items()],
        *[pytest.param(layout, "zip", id=f"zip, {name}") for name, layout in (LAYOUTS | ZIPS).items() if name != "not UTF-8"],
        *[pytest.param(layout, "tar", id=f"tar, {name}") for name, layout in (LAYOUTS | ZIPS).items()],
        *[pytest.param(layout, "tar.xz", id=f"tar.xz, {name}") for name, layout in ZIPS.items()],
    ],
)
def test_how_images_are_divided(tmp_path, layout, packed):
    names, train, test, classes, said = layout
    path = lay_out(tmp_path, names, packed)
    if train is None:
        with pytest.raises(UserError, match=said):
            find_images(path)
        return
    found = find_images(path)
    found_train, found_test = found.splits["train"], found.splits.get("test")
    assert sorted(found_train.names) == sorted(train)
    assert (found_test and sorted(found_test.names)) == (test and sorted(test))
    assert found.classes == classes
    assert re.search(said, found.division), found.division
    found.division.encode()  # can be printed
    for split in (found_train, found_test):
        contents = [] if split is None else split.read(0, len(split))
        assert all(encoded.content for encoded in contents)
        for encoded in contents if classes else []:
            own = [part for part in encoded.name.split("/") if part in classes]
            assert encoded.label == (classes.index(own[-1]) if own else -1)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ("cat dog", "dog", "dog"),
        ("cat dog red", "cat/red cat/blue", "cat cat"),
        ("cat dog red", "eel/blue cat/red", "None cat"),
        ("images/cat images/dog", "dog", "dog"),
        ("images/cat images/dog", "images/dog", "dog"),
        ("images/cat images/dog", "pictures/dog", "dog"),
        ("cat dog", "images/cat images/dog", "cat dog"),
        ("images/cat images/images", "images/cat", "cat"),
        ("cat dog", "images/eel", "None"),
    ],
)
def test_the_class_of_a_held_out_image_is_one_of_training(tmp_path, train, test, expected):
    folders = [*(f"train/{folder}" for folder in train.split()), *(f"test/{folder}" for folder in test.split())]
    found = find_images(lay_out(tmp_path, of_split(" ".join(folders), 1), ""))
    held_out = found.splits["test"]
    labels = {
        name: "None" if label < 0 else found.classes[label] for name, label in zip(held_out.names, held_out.labels, strict=True)
    }
    wanted = zip(test.split(), expected.split(), strict=True)
    assert labels == {f"test/{folder}/0.png": label for folder, label in wanted}


@pytest.mark.parametrize("packed", ["", "zip", "tar.gz"], ids=["folder", "zip", "tar.gz"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (of_split("Train more"), "a folder 'Train' beside more, but no 'test'. Name the folders of splits"),
        (of_split("test cats"), "a folder 'test' beside cats, but no 'train'"),
        (of_split("test val"), "a folder 'test' beside val, but no 'train'"),
        ([*of_split("train"), "x.png"], "a folder 'train' beside x.png, but no 'test'"),
        (of_split("train Train test"), "several folders of one split, 'Train', 'train'"),
        (of_split("train test eval"), "several folders of one split, 'eval', 'test'"),
        (of_split("trainA trainB testA testB"), "look like splits: 'testA', 'testB', 'trainA', ..."),
        (of_split("DIV2K_train_HR DIV2K_valid_HR"), "look like splits: 'DIV2K_train_HR', 'DIV2K_valid_HR'"),
        (of_split("training/train training/validation"), "class folders that look like splits: 'train', 'validation'"),
        (["train_0.png", "train_1.png", "test_0.png"], "look like splits: 'test_0.png', 'train_1.png'"),
    ],
)
def test_folders_that_do_not_say_what_is_held_out(tmp_path, names, said, packed):
    with pytest.raises(UserError, match=said):
        find_images(lay_out(tmp_path, names, packed))


def odd_archive(kind: str, folder: Path) -> Path:
    path = folder / "odd.zip"
    packed = {"method": zipfile.ZIP_STORED, "lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}.get(
        kind, zipfile.ZIP_DEFLATED
    )
    with zipfile.ZipFile(path, "w", packed) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", png(pixels(6, 5, 3, seed=number)))
    content = bytearray(path.read_bytes())
    match kind:
        case "lzma" | "bzip2":
            content[60] ^= 0xFF
        case "method":
            content[8] = content[content.index(b"PK\x01\x02") + 10] = 9
        case "encrypted":
            content[6] |= 1
            content[content.index(b"PK\x01\x02") + 8] |= 1
        case "no name":
            with zipfile.ZipFile(path, "w") as archive:
                member = zipfile.ZipInfo("x")
                member.filename = ""
                archive.writestr(member, b"")
            return path
        case "npz" | "npy":
            path = folder / f"odd.{kind}"
            np.savez(path, train=pixels(5, 4, 4)) if kind == "npz" else np.save(path, pixels(5, 4, 4))
            return path
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lzma", "0.png cannot be read .*--skip-corrupt"),
        ("bzip2", "0.png cannot be read .*--skip-corrupt"),
        ("method", "'0.png' that is packed by method 9, which Python lacks. Unpack it, and give the folder"),
        ("encrypted", "'0.png' that is encrypted. Unpack it"),
        ("no name", "has a member without a name: it is damaged"),
        ("npz", "odd.npz is a file of arrays; give it as --data arrays --data.path"),
        ("npy", "odd.npy is a file of arrays; give it as --data arrays"),
    ],
)
def test_odd_archives(tmp_path, kind, said):
    with pytest.raises(UserError, match=said):
        load(odd_archive(kind, tmp_path))


def odd_tar(kind: str, path: Path) -> None:
    """Three images, and what is odd about their archive."""
    contents = {f"{number}.png": png(pixels(6, 5, 3, seed=number)) for number in range(3)}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo({"out": "../", "absolute": "/", "windows": "C:\\", "up": "..\\"}.get(kind, "") + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if kind in ("symbolic link", "hard link", "hard link to nowhere", "pipe"):
            member = tarfile.TarInfo("x.png")
            member.type = {"symbolic link": tarfile.SYMTYPE, "pipe": tarfile.FIFOTYPE}.get(kind, tarfile.LNKTYPE)
            member.linkname = {"hard link": "1.png", "pipe": ""}.get(kind, "../secret.png")
            archive.addfile(member)
        if kind == "again":
            member = tarfile.TarInfo("0.png")
            member.size = len(contents["1.png"])
            archive.addfile(member, io.BytesIO(contents["1.png"]))
    content = bytearray(path.read_bytes())
    second = content.index(b"1.png")  # where its header begins
    match kind:
        case "header damaged":
            content[second + 100] ^= 0xFF
        case "cut in a header":
            del content[second + 300 :]
        case "cut in an image":
            del content[second + 512 + 20 :]
        case "cut before an image":
            del content[second:]
        case "a bit":
            content[second + 512 + 20] ^= 1
        case "gzip cut" | "gzip of text":
            content = bytearray(gzip.compress(bytes(content) if kind == "gzip cut" else b"hello"))
            del content[len(content) // 2 if kind == "gzip cut" else len(content) :]
        case "no images":
            content = bytearray(10240)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("out", r"has a member '\.\./0.png', which leads out of it"),
        ("up", r"has a member '\.\.\\\\0.png', which leads out of it"),
        ("absolute", "has a member '/0.png', which leads out of it"),
        ("windows", "has a member 'C:.*0.png', which leads out of it"),
        ("symbolic link", "has a symbolic link, 'x.png'; it is not read. Unpack it, and give the folder"),
        ("hard link to nowhere", "is not a tar archive that can be read .*'../secret.png' not found"),
        ("header damaged", "is not a tar archive that can be read .no header of a member at byte 1,024"),
        ("cut in a header", "no header of a member"),
        ("cut in an image", "is not a tar archive that can be read .*download it again, or unpack it"),
        ("a bit", "1.png .*--skip-corrupt"),
        ("gzip cut", "is not a tar archive that can be read"),
        ("gzip of text", "is not a tar archive that can be read"),
        ("no images", "holds no images"),
    ],
)
def test_odd_tar_archives(tmp_path, own_cache, kind, said):
    odd_tar(kind, tmp_path / "odd.tar")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "odd.tar")
    assert not list(own_cache.rglob("manifest.json"))


def test_what_a_tar_archive_may_hold_besides(tmp_path, caplog):
    expected = {seed: pixels(6, 5, 3, seed=seed) for seed in range(3)}
    for kind, seeds in (("hard link", [0, 1, 2, 1]), ("again", [1, 1, 2]), ("pipe", [0, 1, 2]), ("cut before an image", [0])):
        odd_tar(kind, tmp_path / "odd.tar")
        caplog.clear()
        found = find_images(tmp_path / "odd.tar").splits["train"]
        contents = [encoded.content for encoded in found.read(0, len(found))]
        for content, seed in zip(contents, seeds, strict=True):
            np.testing.assert_array_equal(Image.open(io.BytesIO(content)), expected[seed])
        assert ("has no mark at its end: images may be missing" in caplog.text) == (kind == "cut before an image")


def test_a_tar_archive_that_changes_while_it_is_read(tmp_path):
    write_images(tmp_path / "photos", 3, shape=(400, 400, 3))  # more than is read ahead
    path = Path(shutil.make_archive(str(tmp_path / "photos"), "tar", tmp_path / "photos"))
    found = find_images(path).splits["train"]
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    answers = found.read(0, 3)
    (changed,) = [answer for answer in answers if isinstance(answer, CorruptImageError)]
    assert "cannot be read (the archive has changed)" in str(changed)


def test_a_compressed_archive_needs_room(tmp_path, monkeypatch):
    odd_tar("sound", tmp_path / "odd.tar")
    (tmp_path / "odd.tgz").write_bytes(gzip.compress((tmp_path / "odd.tar").read_bytes()))
    monkeypatch.setattr(archives, "free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"odd.tgz is decompressed in .*cache, whose disk has 1 MiB free: too few"):
        find_images(tmp_path / "odd.tgz")


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
    return config.Folder(str(folder), **settings).recipe()


def test_the_manifest_says_everything(tmp_path):
    write_images(tmp_path / "photos" / "cats", 3)
    write_images(tmp_path / "photos" / "dogs", 3, seed=1)
    wanted = of(tmp_path / "photos", crop=5, size=4)
    images = load_prepared(wanted, progress=False)
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
    monkeypatch.setattr(recipe_module, "version", lambda name: "another")
    keys.add(of(folder).key())
    assert len(keys) == 9
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path / "elsewhere" / "photos", copy_function=shutil.copy2)
    assert of(tmp_path / "elsewhere" / "photos").key() == of(folder).key(), "where it lies changes nothing"


def test_numbers_of_numpy_are_as_good_as_those_of_python(tmp_path, unchecked):
    write_images(tmp_path / "photos", 9)
    ours = {"size": 4, "holdout": 0.5, "validation": 0.25}
    theirs = {"size": np.int64(4), "holdout": np.float32(0.5), "validation": np.float32(0.25)}
    assert of(tmp_path / "photos", **theirs).key() == of(tmp_path / "photos", **ours).key()
    assert load(tmp_path / "photos", **theirs).splits == ("train", "test", "validation")
    assert data.shape_of(config.Folder(str(tmp_path / "photos"), **theirs)).validation == 1


def test_a_finished_set_is_not_decoded_again(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 5)
    first = load(tmp_path / "photos")
    monkeypatch.setattr(prepared_module, "Decoders", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load(tmp_path / "photos").train, first.train)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "no manifest", "manifest of nonsense", "newer format", "gone"])
def test_a_damaged_set_is_made_again(tmp_path, damage, caplog):
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
    assert "is damaged; it is made again" in caplog.text


def changed(value):
    """Other JSON values in place of this one."""
    match value:
        case bool() | None:
            return [1]
        case int() | float():
            return [value + 1, str(value), None]
        case str():
            return [value + "x", 7]
        case list():
            return [
                [*value, 1],
                {},
                *([*value[:n], other, *value[n + 1 :]] for n, old in enumerate(value) for other in changed(old)),
            ]
        case dict():
            without = [{key: old for key, old in value.items() if key != gone} for gone in value]
            return [*without, [], *({**value, key: other} for key, old in value.items() for other in changed(old))]


def test_no_change_of_a_manifest_is_taken_for_the_set(tmp_path):
    write_images(tmp_path / "photos" / "cats", 3)
    write_images(tmp_path / "photos" / "dogs", 3, seed=1)
    wanted = of(tmp_path / "photos", size=4)
    load_prepared(wanted, progress=False)
    path = wanted.folder() / "manifest.json"
    intact = path.read_text()
    others = [*changed(json.loads(intact)), 5, "x", None]
    assert len(others) > 60
    for text in [*map(json.dumps, others), "[" * 100_000, "\x00", intact[:-3], intact.replace("cats", "rats")]:
        path.write_text(text)
        assert prepared_module._open(wanted, False) is None, text[:300]
    path.write_bytes(b"\xff\xfe")
    assert prepared_module._open(wanted, False) is None
    path.write_text(intact)
    assert prepared_module._open(wanted, False) is not None


def test_a_set_under_the_name_of_another_is_made_again(tmp_path):
    write_images(tmp_path / "photos", 6)
    small, large = of(tmp_path / "photos", size=4), of(tmp_path / "photos", size=5)
    load_prepared(small, progress=False)
    shutil.copytree(small.folder(), large.folder())
    assert load_prepared(large, progress=False).image_shape == (5, 5, 3)


@pytest.mark.parametrize(
    "line", [b"5", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'[["train", 0, 5, 0], 1, [], {}, "x"]', b'{"a": 1}']
)
def test_nonsense_in_the_record_of_an_unfinished_set(tmp_path, line):
    write_images(tmp_path / "photos", 6)
    wanted = of(tmp_path / "photos")
    unfinished = wanted.folder().with_name(f".{wanted.folder().name}.unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "progress.jsonl").write_bytes(line + b"\n")
    assert len(load_prepared(wanted, progress=False).train) == 5


def test_names_that_are_not_utf_8(tmp_path, caplog):
    """To the end: prepared, left out and listed, and named."""
    caplog.set_level("INFO", "bsvae_jax")
    folder = tmp_path / "caf\udce9"
    for seed, name in enumerate(("a", "caf\udce9")):
        write_images(folder / name, 3, seed=seed)
    (folder / "a" / "\udce9.png").write_bytes(b"nonsense")
    wanted = of(folder)
    with pytest.raises(UserError, match="is not an image that can be read"):
        load_prepared(wanted, progress=False)
    images = load_prepared(wanted, skip_corrupt=True, progress=False)
    assert (images.name, images.label_names) == ("caf\\xe9", ("a", "caf\\xe9"))
    assert len(images.train) + len(images.test) == 6
    np.save(folder / "\udce9.npy", pixels(5, 4, 4))
    assert data.load(config.Arrays(str(folder / "\udce9.npy"))).name == "\\xe9"
    assert "caf\\xe9: 7 images, of which a share" in caplog.text


def test_labels_of_training_images_alone(tmp_path, caplog):
    """And what was lost of images is said at every use, from the manifest."""
    caplog.set_level("INFO", "bsvae_jax")
    for folder in ("train/cat", "train/dog", "test"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "set" / folder / f"{number}.png").write_bytes(png(HALF))
    for _ in range(2):
        images = load(tmp_path / "set")
        assert images.train_labels.tolist() == [0, 0, 1, 1]
        assert images.test_labels is None
        np.testing.assert_array_equal(images.test[0], ON_WHITE)
        said = caplog.messages
        caplog.clear()
        assert said == [
            "set: 4 images for training in 'train', 2 images for testing in 'test', all test images lie in no class folder of "
            "training.",
            "set: 6 images are transparent in part, and were laid on white",
        ]


def test_what_another_process_has_made_again_is_not_deleted(tmp_path, monkeypatch, caplog):
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
    assert "damaged" not in caplog.text


def test_a_set_that_vanishes_while_it_is_checked_is_made_again(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 5)
    expected = load(tmp_path / "photos").train.copy()
    folder, checked = of(tmp_path / "photos").folder(), prepared_module.sha256_of

    def too_late(*arguments):
        shutil.rmtree(folder, ignore_errors=True)
        return checked(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "sha256_of", too_late)
        assert prepared_module._open(of(tmp_path / "photos"), False) is None
    np.testing.assert_array_equal(load(tmp_path / "photos").train, expected)


def test_corrupt_images_are_left_out_and_listed(tmp_path, caplog):
    arrays = write_images(tmp_path / "photos" / "train", 300, (4, 4, 3))
    write_images(tmp_path / "photos" / "test", 3, (4, 4, 3), seed=1)
    bad = [0, 17, 255, 256, 299]
    for number in bad:
        (tmp_path / "photos" / "train" / f"{number:04d}.png").write_bytes(b"nonsense")
    (tmp_path / "photos" / "test" / "0001.png").write_bytes(b"")
    wanted = of(tmp_path / "photos")
    with pytest.raises(UserError, match=r"0000\.png is not an image"):
        load_prepared(wanted, progress=False)
    images = load_prepared(wanted, skip_corrupt=True, progress=False)
    np.testing.assert_array_equal(images.train, np.delete(arrays, bad, axis=0))
    assert len(images.test) == 2
    skipped = read_manifest(wanted.folder())["skipped"]
    assert len(skipped) == 6
    assert [f"{number:04d}.png" in why for number, why in zip(bad, skipped, strict=False)] == [True] * 5
    assert "6 corrupt images were left out" in caplog.text
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


@pytest.mark.long
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
        images = load_prepared(wanted, progress=False)
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
    expected = load_prepared(wanted, progress=False).fingerprint()
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


@pytest.mark.long
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
    assert len(load_prepared(wanted, progress=False).train) == 4


def _hold(path: str) -> None:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(60)


def test_the_stamp_of_an_archive_is_of_its_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("x.png", png(pixels(4, 4, 3, seed=seed)))
    shutil.unpack_archive(tmp_path / "a.zip", tmp_path / "a")
    shutil.make_archive(str(tmp_path / "a"), "gztar", tmp_path / "a", "x.png")
    stamps = [find_images(tmp_path / name).stamp for name in ("a.zip", "a.tar.gz", "b.zip", "c.zip")]
    assert stamps[0] == stamps[1] == stamps[2] != stamps[3]


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
                    np.testing.assert_array_equal(ours[0], theirs[0])


def test_a_worker_imports_neither_jax_nor_the_package():
    code = workers_module._START.replace("serve(sys", "print('jax' in sys.modules, 'optax' in sys.modules) or sys.exit()#")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == ["False", "False"]


def test_a_worker_that_dies_is_an_error_with_a_name():
    with Decoders(1) as decoders:
        decoders._processes[0].kill()
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"died \(status -9\), perhaps of lack of memory, at one of a\.png and the 0 images"
            ):
                decoders.decode([("a.png", png(pixels(4, 4, 3)))], Preprocessing())
            assert not decoders._idle.empty(), "who decodes next would wait for ever"
        assert decoders.decode([], Preprocessing()) == []


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


@pytest.mark.long
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
