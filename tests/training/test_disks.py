"""Disks that are full or may not be written, and clocks that jump, in earnest: on file systems of memory, mounted for the test.

They need the right to mount, and skip without it; root, who alone has it, is not stopped by the permissions of a folder.
"""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

import bsvae_jax as bv
from bsvae_jax import data
from bsvae_jax.cli import main
from bsvae_jax.errors import UserError
from bsvae_jax.training import workdir
from bsvae_jax.training.checkpoints import Checkpoints, SaveError

pytestmark = pytest.mark.usefixtures("unchecked")

CONFIG = bv.Config(
    data=bv.data.Digits(validation=None),
    network=bv.config.MLP((8,)),
    latent_size=2,
    epochs=4,
    batch_size=500,
    devices=1,
    evaluate_every=2,
    steps_per_dispatch=1,
)


def mount(*arguments):
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")


@pytest.fixture
def disk(tmp_path):
    """A disk of 40 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=40m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    bv.fit(CONFIG, folder, progress=False)
    return folder


def fill(disk, left):
    """Leave `left` bytes of it."""
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)


# --- TensorBoard's events ---------------------------------------------------------------------------------------------


def crc32c(content):
    """RFC 3720's CRC-32C, bit by bit."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283  # the check value that catalogs of CRCs give


def read_events(path):
    """The events of a file, by the published layout of TFRecord."""
    content, events, position = path.read_bytes(), [], 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        record = content[position + 12 : position + 12 + length]
        sums = struct.unpack_from("<I", content, position + 8) + struct.unpack_from("<I", content, position + 12 + length)
        for part, found in zip((content[position : position + 8], record), sums, strict=True):
            value = crc32c(part)
            assert found == (((value >> 15 | value << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
        events.append(Event.FromString(record))
        position += 16 + length
    return events


@pytest.mark.long
def test_a_run_leaves_its_metrics_as_events(whole):
    (path,) = (whole / "tensorboard").iterdir()
    first, start, *events = read_events(path)
    assert (first.file_version, start.session_log.status, start.step) == ("brain.Event:2", start.session_log.START, 1)
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (row["step"], f"{row['split']}/{name}"): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "epoch", "split", "steps")
    }
    assert {(step, tag) for step, tag, _ in found} - set(expected) == {
        (row["step"], "train/images_per_second") for row in rows if row["split"] == "train"
    }
    for step, tag, value in found:
        if (step, tag) in expected:
            assert value == pytest.approx(expected.pop((step, tag)), rel=1e-6)
    assert not expected


@pytest.mark.long
def test_events_that_do_not_fit_end_no_run(disk, caplog, whole, monkeypatch):
    """The disk is full for the first row's events, and said to be so once; everything else finds room."""
    write = RecordWriter.write

    def full(self, content):
        fill(disk, 0)
        try:
            write(self, content)
            self.flush()
        finally:
            (disk / "ballast").unlink()

    monkeypatch.setattr(RecordWriter, "write", full)
    bv.fit(CONFIG, disk / "run", progress=False)
    said = "TensorBoard events could not be written (No space left on device); metrics.jsonl has the numbers."
    assert caplog.text.count(said) == 1
    assert (disk / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.long
def test_events_of_a_run_that_is_continued_replace_those_from_there(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    before = set((tmp_path / "run" / "tensorboard").iterdir())
    bv.fit(CONFIG, tmp_path / "run", progress=False)
    (later,) = set((tmp_path / "run" / "tensorboard").iterdir()) - before
    assert later.name > max(path.name for path in before)
    _, start, *events = read_events(later)
    assert (start.session_log.status, start.step) == (start.session_log.START, 7)
    assert [event.step for event in events] == [9, 12, 12]


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("left", [600_000, 8192, 0])
def test_a_checkpoint_that_finds_no_room_is_an_error_and_leaves_nothing(disk, left):
    state = {"a": np.random.default_rng(0).normal(size=2**17), "b": np.arange(5)}  # a megabyte
    with Checkpoints(disk / "checkpoints") as checkpoints:
        checkpoints.save(1, state, 1.0)
        checkpoints.wait()
        fill(disk, left)
        for step in (2, 3):
            with contextlib.suppress(SaveError):
                checkpoints.save(step, state, 0.5)  # which may fail already
                with pytest.raises(SaveError, match=rf"step {step} could not be written to .* \(No space left on device"):
                    checkpoints.wait()
            assert checkpoints.steps() == [1]
            deadline = time.monotonic() + 20  # Orbax deletes in a thread
            while list((disk / "checkpoints").glob("*tmp*")):
                assert time.monotonic() < deadline, "unfinished files stay"
                time.sleep(0.01)
        (disk / "ballast").unlink()
        checkpoints.save(2, state, 0.5)
        checkpoints.wait()
        step, restored = checkpoints.restore(state)
    assert step == 2
    np.testing.assert_array_equal(restored["a"], state["a"])


@pytest.mark.long
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_pauses_saving(disk, whole, monkeypatch, caplog):
    """After the look at the free space; free again before the next checkpoint."""
    save, log = Checkpoints.save, workdir.RunDirectory.log

    def full(self, step, *arguments):
        if step == 6:
            fill(disk, 4096)
        save(self, step, *arguments)

    def free(self, row):
        if row["step"] == 9:
            self.settle()  # however slow the disk, it was full until then
            (disk / "ballast").unlink(missing_ok=True)
        log(self, row)

    monkeypatch.setattr(Checkpoints, "save", full)
    monkeypatch.setattr(workdir.RunDirectory, "log", free)
    bv.fit(CONFIG, disk / "run", progress=False)
    errors = caplog.text
    assert "is paused (The checkpoint of step 6 could not be written to" in errors
    assert "saving again, from step 12" in errors
    assert bv.restore(disk / "run").step == 12
    assert (disk / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (disk / "run" / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


@pytest.mark.long
def test_a_last_checkpoint_that_is_not_written_is_an_error(disk, whole, monkeypatch):
    save = Checkpoints.save

    def full(self, step, *arguments):
        if step == 12:
            fill(disk, 4096)
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(
            UserError, match=r"The end of training could not be saved in .*run \(The checkpoint of step 12 .*No space left"
        ):
            bv.fit(CONFIG, disk / "run", progress=False)
    assert not (disk / "run" / "evaluation.json").exists()
    (disk / "ballast").unlink()
    bv.fit(CONFIG, disk / "run", progress=False)
    assert (disk / "run" / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from bsvae_jax.cli import main as cli
from bsvae_jax.training.checkpoints import Checkpoints
sys.path[:0] = {tests!r}
from test_disks import fill
save, disk = Checkpoints.save, Path({disk!r})
def full(self, step, *arguments):
    fill(disk, 4096)
    save(self, step, *arguments)
Checkpoints.save = full
cli.main(sys.argv[1:])
"""


@pytest.mark.faults
def test_the_command_line_says_it_in_sentences_alone(disk, config_file):
    """Threads of Orbax and TensorStore are not heard; three times, since it depends on who is first."""
    script = SCRIPT.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], disk=str(disk))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(bv.__file__).parents[1])}
    for run in ("one", "two", "three"):
        (disk / "ballast").unlink(missing_ok=True)
        command = [sys.executable, "-c", script, "train", config_file, "--workdir", disk / run]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert found.returncode == 2, found.stderr
        assert "Traceback" not in found.stderr
        assert "closed" not in found.stderr
        assert found.stderr.splitlines()[-1].startswith("error: The end of training could not be saved in ")


# --- Disks that may only be read --------------------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path, whole):
    """A finished run on a disk that may only be read."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=10m", "tmpfs", folder)
    try:
        shutil.copytree(whole, folder / "run")
        mount("-o", "remount,ro", folder)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def refusal(capsys, *arguments):
    """The last line of what a command says that ends with status 2."""
    return refused(capsys, *arguments).strip().splitlines()[-1]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("from bsvae_jax.config import MLP, Config\ndef get_config(): return Config(network=MLP((8,)), epochs=1)\n")
    return path


@pytest.mark.long
def test_training_where_nothing_may_be_written(read_only, config_file, capsys):
    told = refusal(capsys, "train", config_file, "--workdir", read_only / "new")
    assert told.endswith("new cannot be written (Read-only file system); choose another --workdir.")
    told = refusal(capsys, "sweep", config_file, "--workdir", read_only / "sweep")
    assert told.endswith("sweep cannot be written (Read-only file system); choose another --workdir.")
    with pytest.raises(UserError, match=r"run cannot be written \(Read-only file system\); choose another --workdir"):
        bv.fit(CONFIG, read_only / "run", progress=False)


def test_samples_and_weights_where_nothing_may_be_written(read_only, whole, capsys):
    for out in ("samples.npz", "samples.png", "samples", "new/samples.npz"):
        told = refusal(capsys, "sample", whole, "--count", 3, "--out", read_only / out)
        assert "cannot be written (Read-only file system)" in told, told
    told = refusal(capsys, "export", whole, "--out", read_only / "weights.safetensors")
    assert "weights.safetensors cannot be written (Read-only file system)" in told


@pytest.mark.long
def test_a_run_that_may_only_be_read_is_restored_and_sampled(read_only, tmp_path, capsys):
    main.main(["sample", str(read_only / "run"), "--count", "3", "--out", str(tmp_path / "samples.npz")])
    assert np.load(tmp_path / "samples.npz")["images"].shape == (3, 8, 8, 1)
    run = bv.restore(read_only / "run")
    assert bv.evaluate(run, data.load(run.config.data), ("test",)).report["test"]
    told = refusal(capsys, "evaluate", read_only / "run")
    assert "Read-only file system" in told
    assert "run" in told


def test_a_cache_that_may_only_be_read(read_only, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.setenv("BSVAE_CACHE", str(read_only / "cache"))
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); set BSVAE_CACHE to a folder"):
        data.load(bv.config.Folder(str(tmp_path / "photos")), progress=False)


def test_a_prepared_set_in_a_cache_that_may_only_be_read_is_used(tmp_path, monkeypatch):
    """As of a group, prepared once by one of them."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    source = bv.config.Folder(str(tmp_path / "photos"))
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    expected = data.load(source, progress=False).train.copy()
    mount("--bind", tmp_path / "cache", tmp_path / "cache")
    try:
        mount("-o", "remount,bind,ro", tmp_path / "cache")
        np.testing.assert_array_equal(data.load(source, progress=False).train, expected)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "cache"], check=False)
