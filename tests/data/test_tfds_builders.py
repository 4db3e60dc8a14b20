"""TFDS builders that need no TensorFlow, from published files made here: tiny, of the published layout, with their own hashes.

What a builder is given as published is compared with what comes out of `data.load`, pixel by pixel and in order. The real
MNIST, where it is beside the checkout, goes through with its real hashes.
"""

import functools
import gzip
import hashlib
import io
import re
import shlex
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsvae_jax import config, data
from bsvae_jax._io import downloads
from bsvae_jax._io.downloads import Download
from bsvae_jax.cli import main
from bsvae_jax.data import idx, tfds_builders
from bsvae_jax.errors import UserError

PACKAGE = Path(tfds_builders.__file__).parents[3]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def publish(monkeypatch, builder, folder: Path, url: str = "http://localhost/") -> None:
    """Makes the files in `folder` the published ones of a builder, those of them that are there."""
    published = {}
    for purpose, wanted in builder.DOWNLOADS.items():
        path = folder / wanted.name
        if path.is_file():
            content = path.read_bytes()
            file = wanted.name if wanted.file else None
            published[purpose] = Download(url + wanted.name, len(content), hashlib.sha256(content).hexdigest(), file)
    monkeypatch.setattr(builder, "DOWNLOADS", {**builder.DOWNLOADS, **published})


def load(name: str, tmp_path: Path, **settings) -> data.ImageSet:
    return data.load(config.TFDS(name, data_dir=str(tmp_path / "tfds"), validation=None, **settings), progress=False)


# --- MNIST and Fashion-MNIST ------------------------------------------------------------------------------------------


def write_mnist(folder: Path, train: int = 40, test: int = 10) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        arrays[f"{part}-images"] = images = pixels(count, 28, 28, seed=seed)
        arrays[f"{part}-labels"] = labels = pixels(count, seed=seed + 2) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBB3I", 0, 8, 3, count, 28, 28) + images.tobytes())
        )
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes())
        )
    return arrays


@pytest.mark.parametrize("builder", [tfds_builders.Mnist, tfds_builders.FashionMnist])
def test_from_an_empty_folder_to_images(tmp_path, monkeypatch, served, builder):
    """The whole way, over a network: download, check, array_record, memory map; the second time nothing is asked for."""
    folder, url = served
    arrays = write_mnist(folder)
    publish(monkeypatch, builder, folder, url)
    images = load(builder.name, tmp_path)
    np.testing.assert_array_equal(images.train[..., 0], arrays["train-images"])
    np.testing.assert_array_equal(images.test[..., 0], arrays["t10k-images"])
    np.testing.assert_array_equal(images.train_labels, arrays["train-labels"])
    np.testing.assert_array_equal(images.test_labels, arrays["t10k-labels"])
    assert (images.name, images.label_names) == (builder.name, builder.CLASSES)
    assert list((tmp_path / "tfds" / builder.name).rglob("*.array_record*"))
    for path in folder.iterdir():
        path.unlink()
    np.testing.assert_array_equal(load(builder.name, tmp_path).train, images.train)
    assert "tensorflow" not in sys.modules


def test_tfds_itself_reads_what_was_written(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    arrays = write_mnist(tmp_path / "files")
    publish(monkeypatch, tfds_builders.Mnist, tmp_path / "files")
    builder = tfds_builders.Mnist(data_dir=tmp_path / "tfds", manual_dir=tmp_path / "files")
    assert isinstance(builder, tfds.core.GeneratorBasedBuilder)
    builder.prepare()
    read = tfds.builder_from_directory(tmp_path / "tfds" / "mnist" / "1.0.0").as_data_source(split="test")
    assert len(read) == 10
    for example, image, label in zip(read, arrays["t10k-images"], arrays["t10k-labels"], strict=True):
        np.testing.assert_array_equal(example["image"][..., 0], image)
        assert example["label"] == label


@pytest.mark.long
def test_the_real_mnist_bit_for_bit(tmp_path, mnist_folder):
    images = load("mnist", tmp_path, manual_dir=str(mnist_folder))
    for split, part in (("train", "train"), ("test", "t10k")):
        content = gzip.decompress((mnist_folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        assert getattr(images, split).tobytes() == content[16:]
        labels = gzip.decompress((mnist_folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert getattr(images, f"{split}_labels").tolist() == list(labels)
    assert images.fingerprint() == data.load(config.MNIST(str(mnist_folder), validation=None)).fingerprint()


@pytest.mark.long
def test_a_config_trains_from_published_files_without_tensorflow(tmp_path, monkeypatch):
    """`bsvae train configs/mnist.py`, smaller; TensorFlow is not imported, whether or not it is installed."""
    write_mnist(tmp_path / "files")
    publish(monkeypatch, tfds_builders.Mnist, tmp_path / "files")
    path = PACKAGE / "configs" / "mnist.py"
    options = ["--data.manual-dir", tmp_path / "files", "--data.data-dir", tmp_path / "tfds", "--network", "mlp"]
    small = ["--network.hidden", 8, "--latent-size", 2, "--epochs", 1, "--batch-size", 8, "--workdir", tmp_path / "run"]
    main.main([str(argument) for argument in ["train", path, *options, *small]])
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        ("another byte", r"train-images-idx3-ubyte.gz is not the published file: its SHA-256 is \w+, expected \w+\. Put train"),
        (
            "cut",
            r"is not the published file: it has [\d,]+ bytes, expected [\d,]+\. Put train-images-idx3-ubyte",
        ),
        (
            "missing",
            r"files lacks train-images-idx3-ubyte.gz\. Put .* give that folder as --manual-dir \(in a config:",
        ),
        ("no folder", r"There is no folder '.*nowhere'; --manual-dir must name the folder of the published files"),
    ],
)
def test_wrong_files_in_the_manual_directory(tmp_path, monkeypatch, damage, telling):
    folder = tmp_path / "files"
    write_mnist(folder)
    publish(monkeypatch, tfds_builders.Mnist, folder)
    path = folder / "train-images-idx3-ubyte.gz"
    match damage:
        case "another byte":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "missing":
            path.unlink()
        case "no folder":
            folder = tmp_path / "nowhere"
    with pytest.raises(UserError, match=telling):
        load("mnist", tmp_path, manual_dir=str(folder))
    assert not (tmp_path / "tfds" / "mnist" / "1.0.0").exists()


def test_a_damaged_file_in_the_cache_is_not_trusted(tmp_path, monkeypatch, served, own_cache):
    folder, url = served
    write_mnist(folder)
    publish(monkeypatch, tfds_builders.Mnist, folder, url)
    (own_cache / "downloads").mkdir(parents=True)
    (own_cache / "downloads" / "train-images-idx3-ubyte.gz").write_bytes(b"x" * 10)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is not the published file: it has 10 bytes"):
        load("mnist", tmp_path)


def test_a_download_that_is_another_file(tmp_path, monkeypatch, served, own_cache):
    folder, url = served
    write_mnist(folder)
    publish(monkeypatch, tfds_builders.Mnist, folder, url)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"The download of http.*train-images.* has another SHA-256 than"):
        load("mnist", tmp_path)
    assert not list((own_cache / "downloads").iterdir())


def test_a_file_that_cannot_be_downloaded(tmp_path, monkeypatch, served):
    write_mnist(tmp_path / "files")
    publish(monkeypatch, tfds_builders.Mnist, tmp_path / "files", served[1])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz could not be downloaded \(404.*Put train-images-idx3"):
        load("mnist", tmp_path)


def test_no_room_for_a_download(tmp_path, monkeypatch, served):
    folder, url = served
    write_mnist(folder)
    publish(monkeypatch, tfds_builders.Mnist, folder, url)
    monkeypatch.setattr(downloads, "free_bytes", lambda folder: 10)
    with pytest.raises(UserError, match=r"has 0 MiB free; train-images-idx3-ubyte.gz takes"):
        load("mnist", tmp_path)


AT_ONCE = """
import hashlib, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from bsvae_jax import config, data
from bsvae_jax.data import tfds_builders as builders
folder = Path({folder!r})
def published(wanted):
    content = (folder / wanted.name).read_bytes()
    return wanted._replace(size=len(content), sha256=hashlib.sha256(content).hexdigest())
builders.Mnist.DOWNLOADS = {{purpose: published(wanted) for purpose, wanted in builders.Mnist.DOWNLOADS.items()}}
mnist = config.TFDS("mnist", data_dir={data_dir!r}, manual_dir=str(folder), validation=None)
images = data.load(mnist, progress=False)
print(images.fingerprint(), len(images.train))
"""


@pytest.mark.long
def test_two_processes_at_once_write_one_set(tmp_path):
    arrays = write_mnist(tmp_path / "files", train=3000)
    code = AT_ONCE.format(root=str(PACKAGE), folder=str(tmp_path / "files"), data_dir=str(tmp_path / "tfds"))
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0].split() for process in processes]
    expected = data.ImageSet("x", arrays["train-images"][..., None], arrays["t10k-images"][..., None]).fingerprint()
    assert results == [[expected, "3000"]] * 2
    assert [path.name for path in (tmp_path / "tfds" / "mnist").iterdir()] == ["1.0.0"]


def test_published_content_that_is_damaged(tmp_path, monkeypatch):
    """The hash is right, the content is not: a wrong table of hashes must not end in a traceback."""
    write_mnist(tmp_path / "files")
    (tmp_path / "files" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"nonsense"))
    publish(monkeypatch, tfds_builders.Mnist, tmp_path / "files")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is not an idx file"):
        load("mnist", tmp_path, manual_dir=str(tmp_path / "files"))


def test_the_published_hashes_are_those_that_tfds_carries():
    """TFDS's own tables, of the same files, written by others."""
    import tensorflow_datasets as tfds

    known = {}
    for path in Path(tfds.__file__).parent.rglob("*"):
        if path.name == "checksums.tsv" or path.parent.name == "url_checksums":
            for line in path.read_text().splitlines():
                fields = line.split("\t")
                if len(fields) >= 3 and fields[1].isdigit():
                    known[fields[2].strip()] = int(fields[1])
    wanted = [file for builder in tfds_builders.BUILDERS.values() for file in builder.DOWNLOADS.values()]
    assert len(wanted) == 4 + 4 + 1 + 3 + 20
    for file in wanted:
        assert known.get(file.sha256) == file.size, file


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def write_cifar10(folder: Path, batches=5, cut: int = 0, drop: str = "") -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    arrays = {}
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for seed, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, batches + 1)), "test_batch.bin"]):
            images, labels = pixels(6, 32, 32, 3, seed=seed), pixels(6, seed=seed + 9) % 10
            records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(6, -1)], axis=1)
            content = records.tobytes()[: -cut or None]
            arrays[name] = images
            arrays[f"{name} labels"] = labels
            if name != drop:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return arrays


def test_cifar10(tmp_path, monkeypatch):
    arrays = write_cifar10(tmp_path / "files")
    publish(monkeypatch, tfds_builders.Cifar10, tmp_path / "files")
    images = load("cifar10", tmp_path, manual_dir=str(tmp_path / "files"))
    names = [f"data_batch_{n}.bin" for n in range(1, 6)]
    np.testing.assert_array_equal(images.train, np.concatenate([arrays[name] for name in names]))
    np.testing.assert_array_equal(images.train_labels, np.concatenate([arrays[f"{name} labels"] for name in names]))
    np.testing.assert_array_equal(images.test, arrays["test_batch.bin"])
    assert images.label_names[9] == "truck"


@pytest.mark.parametrize(
    ("options", "telling"),
    [({"cut": 5}, "is damaged: a batch has 18433 bytes"), ({"drop": "data_batch_3.bin"}, r"lacks data_batch_3\.bin")],
)
def test_cifar10_of_another_layout(tmp_path, monkeypatch, options, telling):
    write_cifar10(tmp_path / "files", **options)
    publish(monkeypatch, tfds_builders.Cifar10, tmp_path / "files")
    with pytest.raises(UserError, match=telling):
        load("cifar10", tmp_path, manual_dir=str(tmp_path / "files"))


def test_a_truncated_archive(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "files")
    path = tmp_path / "files" / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:2000])
    publish(monkeypatch, tfds_builders.Cifar10, tmp_path / "files")
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is truncated or damaged"):
        load("cifar10", tmp_path, manual_dir=str(tmp_path / "files"))


# --- CelebA -----------------------------------------------------------------------------------------------------------

FACES = {"train": 6, "validation": 2, "test": 3}


def write_celeba(folder: Path, form: str = "zip", tables: str = "txt", attributes: bool = True) -> dict[str, bytes]:
    """Faces in the published layout; what each file holds, by its name."""
    folder.mkdir(exist_ok=True)
    count = sum(FACES.values())
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    files = {}
    for number, name in enumerate(names):
        content = io.BytesIO()
        Image.fromarray(pixels(218, 178, 3, seed=number)).save(content, "jpeg", quality=95)
        files[name] = content.getvalue()
    if form == "zip":
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"img_align_celeba/{name}", content)
    else:
        (folder / "img_align_celeba").mkdir()
        for name, content in files.items():
            (folder / "img_align_celeba" / name).write_bytes(content)
    parts = [0] * FACES["train"] + [1] * FACES["validation"] + [2] * FACES["test"]
    values = np.where(pixels(count, 40, seed=99) < 128, "-1", "1")
    heading = tfds_builders.CelebA.ATTRIBUTES
    if tables == "txt":
        partition = "\n".join(f"{name} {part}" for name, part in zip(names, parts, strict=True))
        (folder / "list_eval_partition.txt").write_text(partition + "\n")
        rows = [str(count), " ".join(heading), *(f"{name}  {' '.join(row)}" for name, row in zip(names, values, strict=True))]
        if attributes:
            (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    else:
        rows = ["image_id,partition", *(f"{name},{part}" for name, part in zip(names, parts, strict=True))]
        (folder / "list_eval_partition.csv").write_text("\n".join(rows) + "\n")
        rows = [",".join(["image_id", *heading]), *(f"{name},{','.join(row)}" for name, row in zip(names, values, strict=True))]
        if attributes:
            (folder / "list_attr_celeba.csv").write_text("\n".join(rows) + "\n")
    np.save(folder / "values.npy", values == "1")
    return files


@pytest.mark.parametrize(("form", "tables"), [("zip", "txt"), ("folder", "txt"), ("folder", "csv")])
def test_celeb_a_as_the_paper_takes_it(tmp_path, monkeypatch, form, tables):
    files = write_celeba(tmp_path / "files", form, tables)
    publish(monkeypatch, tfds_builders.CelebA, tmp_path / "files")
    images = load("celeb_a", tmp_path, manual_dir=str(tmp_path / "files"), crop=148, size=64)
    faces = [np.asarray(Image.open(io.BytesIO(content)))[35:183, 15:163] for content in files.values()]
    small = np.stack([np.asarray(Image.fromarray(face).resize((64, 64), Image.Resampling.BILINEAR)) for face in faces])
    np.testing.assert_array_equal(images.train, small[:6])
    np.testing.assert_array_equal(images.test, small[8:])
    order = [tfds_builders.CelebA.ATTRIBUTES.index(name) for name in images.label_names]
    expected = np.load(tmp_path / "files" / "values.npy")[:, order]
    np.testing.assert_array_equal(images.train_labels, expected[:6])
    np.testing.assert_array_equal(images.test_labels, expected[8:])


def test_celeb_a_hashes_its_images_once(tmp_path, monkeypatch):
    """The published archive has 1.4 GB."""
    write_celeba(tmp_path / "files")
    publish(monkeypatch, tfds_builders.CelebA, tmp_path / "files")
    hashed = []
    sha256_of = downloads.sha256_of
    monkeypatch.setattr(downloads, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    load("celeb_a", tmp_path, manual_dir=str(tmp_path / "files"), crop=148, size=64)
    assert hashed.count("img_align_celeba.zip") == 1


def test_celeb_a_without_attributes(tmp_path, monkeypatch):
    write_celeba(tmp_path / "files", attributes=False)
    publish(monkeypatch, tfds_builders.CelebA, tmp_path / "files")
    images = load("celeb_a", tmp_path, manual_dir=str(tmp_path / "files"), crop=148, size=64)
    assert images.train.shape == (6, 64, 64, 3)


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        ("nothing", r"lacks list_eval_partition.txt\. Put list_eval_partition.txt \(2,836,386 bytes, SHA-256 fc955bcb"),
        ("no images", r"lacks img_align_celeba.zip\. Put img_align_celeba.zip \(1,443,490,838 bytes, SHA-256 46fb8944"),
        ("a face missing", r"The images lack 1 of the 11 in list_eval_partition, 000004.jpg first"),
        ("attributes cut", r"list_attr_celeba lacks 1 of the images, 000011.jpg first"),
        ("attributes torn", r"list_attr_celeba.txt in .* is damaged: 000001.jpg has not 40 values"),
        ("out of the zip", r"img_align_celeba.zip has a member '../../000001.jpg', which leads out of it"),
    ],
)
def test_celeb_a_that_is_not_whole(tmp_path, monkeypatch, damage, telling):
    folder = tmp_path / "files"
    write_celeba(folder, "folder" if damage == "a face missing" else "zip")
    match damage:
        case "nothing":
            for path in folder.iterdir():
                path.unlink()
        case "no images":
            (folder / "img_align_celeba.zip").unlink()
        case "a face missing":
            (folder / "img_align_celeba" / "000004.jpg").unlink()
        case "attributes cut":
            lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
            (folder / "list_attr_celeba.txt").write_text("\n".join(lines[:-1]))
        case "attributes torn":
            lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
            (folder / "list_attr_celeba.txt").write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
        case "out of the zip":
            with zipfile.ZipFile(folder / "img_align_celeba.zip", "a") as archive:
                archive.writestr("../../000001.jpg", b"")
    publish(monkeypatch, tfds_builders.CelebA, folder)
    with pytest.raises(UserError, match=telling):
        load("celeb_a", tmp_path, manual_dir=str(folder), crop=148, size=64)


# --- LSUN -------------------------------------------------------------------------------------------------------------


def webp(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels(20, 26, 3, seed=seed)).save(content, "webp", lossless=True)
    return content.getvalue()


def write_lsun(folder: Path, form: str) -> None:
    folder.mkdir(exist_ok=True)
    for part, seeds in (("train", range(5)), ("val", range(5, 7))):
        name = f"church_outdoor_{part}"
        if form == "exported":
            (folder / name / "a" / "b").mkdir(parents=True)
            for seed in seeds:
                (folder / name / "a" / "b" / f"{seed}.webp").write_bytes(webp(seed))
            continue
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(folder / f"{name}_lmdb"), map_size=2**24) as environment, environment.begin(write=True) as writing:
            for seed in seeds:
                writing.put(f"{seed:040d}".encode(), webp(seed))
        if form == "zip":
            with zipfile.ZipFile(folder / f"{name}_lmdb.zip", "w") as archive:
                archive.write(folder / f"{name}_lmdb" / "data.mdb", f"{name}_lmdb/data.mdb")
            for path in (folder / f"{name}_lmdb").iterdir():
                path.unlink()
            (folder / f"{name}_lmdb").rmdir()


@pytest.mark.parametrize("form", ["exported", "folder", "zip"])
def test_lsun(tmp_path, monkeypatch, form):
    write_lsun(tmp_path / "files", form)
    publish(monkeypatch, tfds_builders.Lsun, tmp_path / "files")
    images = load("lsun/church_outdoor", tmp_path, manual_dir=str(tmp_path / "files"), crop=20, test_split="validation")
    expected = np.stack([pixels(20, 26, 3, seed=seed)[:, 3:23] for seed in range(7)])
    np.testing.assert_array_equal(images.train, expected[:5])
    np.testing.assert_array_equal(images.test, expected[5:])


def test_lsun_that_is_no_lmdb(tmp_path, monkeypatch):
    pytest.importorskip("lmdb")
    for part in ("train", "val"):
        (tmp_path / "files" / f"church_outdoor_{part}_lmdb").mkdir(parents=True)
        (tmp_path / "files" / f"church_outdoor_{part}_lmdb" / "data.mdb").write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="church_outdoor_train_lmdb is not an LMDB that can be read"):
        load("lsun/church_outdoor", tmp_path, manual_dir=str(tmp_path / "files"), size=8)


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("lsun/church", r"LSUN has no category 'church' \(did you mean 'church_outdoor'\?\); give lsun/CATEGORY"),
        ("lsun", "LSUN has no category ''"),
        ("mnist/other", "mnist has no config 'other'; give 'mnist' alone"),
    ],
)
def test_names_that_are_no_sets(tmp_path, name, telling):
    with pytest.raises(UserError, match=telling):
        load(name, tmp_path)


# --- Folders, and the command -----------------------------------------------------------------------------------------


def prepare(*arguments) -> None:
    main.main(["prepare", *map(str, arguments)])


def test_prepare_says_how_to_train(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path / "files")
    publish(monkeypatch, tfds_builders.Mnist, tmp_path / "files")
    prepare("mnist", "--manual-dir", tmp_path / "files", "--data-dir", tmp_path / "tfds", "--size", 8)
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("40 training and 10 test images (8, 8, 1): ")
    assert Path(first.split(": ")[1]).is_dir()
    assert "bsvae train CONFIG --data tfds" in second
    assert "--data.size 8" in second


def test_prepare_skips_what_it_is_told_to(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(20):
        Image.fromarray(pixels(6, 5, 3) // (number + 1)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"nonsense")
    with pytest.raises(SystemExit) as exit_:
        prepare(tmp_path / "photos")
    assert exit_.value.code == 2
    assert "3.png is not an image that can be read" in capsys.readouterr().err
    prepare(tmp_path / "photos", "--skip-corrupt")
    captured = capsys.readouterr()
    assert "17 training and 2 test images (6, 5, 3)" in captured.out
    assert "1 corrupt images were left out" in captured.err


def test_prepare_prepares_what_training_with_validation_reads(tmp_path, capsys):
    for split in ("train", "test", "val"):
        (tmp_path / "my photos" / split).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(pixels(6, 5, 3) // (number + 1)).save(tmp_path / "my photos" / split / f"{number}.png")
    for given, said in (("0.2", "8 training, 2 validation and 10 test"), ("own", "10 training, 10 validation and 10 test")):
        prepare(tmp_path / "my photos", "--validation", given)
        first, second = capsys.readouterr().out.strip().splitlines()
        assert first.startswith(f"{said} images (6, 5, 3): ")
        options = ["folder", "--data.validation", given, "--data.path", f"{tmp_path}/my photos"]
        assert shlex.split(second) == ["bsvae", "train", "CONFIG", "--data", *options]
        source = config.Folder(f"{tmp_path}/my photos", validation="own" if given == "own" else float(given))
        assert source.recipe().folder() == Path(first.split(": ")[1])
    with pytest.raises(SystemExit):
        prepare(tmp_path / "my photos", "--validation", 2)
    assert "data.validation must be a share of the training images above 0 and up to 0.9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "telling"),
    [
        ("./nowhere", r"There is no folder or archive './nowhere'"),
        ("photos.zip", r"There is no folder or archive 'photos\.zip'"),
        ("photos.tar.gz", r"There is no folder or archive 'photos\.tar\.gz'"),
        ("mnistt", "TFDS has no set 'mnistt'"),
    ],
)
def test_prepare_refuses(source, telling, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare(source, "--data-dir", tmp_path)
    assert re.search(telling, capsys.readouterr().err)


def test_a_set_of_the_catalog_asks_for_tensorflow(tmp_path):
    """In a process where TensorFlow cannot be found, as where it is not installed."""
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'tensorflow' else find(name, *rest)\n"
        "from bsvae_jax.cli import main as cli\n"
        f"cli.main(['prepare', 'kmnist', '--data-dir', {str(tmp_path)!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Preparing TFDS's own set 'kmnist' needs TensorFlow (training does not): pip install" in result.stderr


def test_idx_pairs(tmp_path):
    arrays = write_mnist(tmp_path)
    images, labels = idx.read_pair(tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz")
    np.testing.assert_array_equal(images, arrays["t10k-images"])
    np.testing.assert_array_equal(labels, arrays["t10k-labels"])
    read = functools.partial(idx.read_pair, tmp_path / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"has 10 images, but .*train-labels.* 40 labels"):
        read(tmp_path / "train-labels-idx1-ubyte.gz")
