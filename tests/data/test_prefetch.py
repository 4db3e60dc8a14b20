"""Batches on the devices: resident or streamed, on one device, several, or two processes, the same images in the same order.

What a batch must hold is `images[indices]` in NumPy; what an epoch must hold is every index once.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bsvae_jax as bv
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.data import ImageSet, ShuffledOrder, load, prefetch
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages, HostImages, Stream, fits, gather, streamed_window
from bsvae_jax.distributed import mesh as parallel
from bsvae_jax.distributed.mesh import data_mesh, sweep_mesh
from bsvae_jax.distributed.preemption import Interrupted, Stop
from bsvae_jax.training import fit, program, trainer

PACKAGE = Path(prefetch.__file__).parents[2]
SMALL = Config(
    data=Digits(validation=None),
    network=MLP((16,)),
    latent_size=4,
    epochs=3,
    batch_size=64,
    optimizer=Optimizer(ema_decay=0.9),
)


def stored(count: int = 100, seed: int = 0) -> np.ndarray:
    """Images that say which they are: number i has the value i in each pixel, modulo 251, and some noise in one corner."""
    images = np.repeat(np.arange(count) % 251, 4 * 3).reshape(count, 2, 2, 3).astype(np.uint8)
    images[:, 0, 0, 0] = np.random.default_rng(seed).integers(0, 256, count)
    return images


def mapped(tmp_path: Path, images: np.ndarray) -> np.ndarray:
    np.save(tmp_path / "images.npy", images)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_batch_is_the_images_at_its_indices(tmp_path, resident, devices):
    images = stored()
    on_devices = DeviceImages(Examples(mapped(tmp_path, images)), data_mesh(devices), resident)
    indices = np.random.default_rng(1).integers(0, 100, 8)
    batch = on_devices.batch(indices).images
    np.testing.assert_array_equal(batch, images[indices])
    assert len(on_devices) == 100
    assert {shard.data.shape for shard in batch.addressable_shards} == {(8 // devices, 2, 2, 3)}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("devices", [1, 4])
def test_image_and_label_stay_together(tmp_path, key, resident, devices):
    """The label of an image is its number, which it shows in every pixel."""
    examples, mesh = Examples(mapped(tmp_path, stored()), np.arange(100, dtype=np.int32), 17), data_mesh(devices)
    on_devices, indices = DeviceImages(examples, mesh, resident), np.random.default_rng(1).integers(0, 100, 8)
    with Stream(examples, [ShuffledOrder(key, 100, 8)], mesh, P(None, "data"), 3, iter([0])) as stream:
        for found in (on_devices.batch(indices), stream.take(0)):
            images, labels = found.images, found.labels
            assert found.levels == 17
            np.testing.assert_array_equal(images[..., 1, 1, 0], labels)
            shares = [{shard.data.size for shard in part.addressable_shards} for part in (images, labels)]
            assert shares == [{images.size // devices}, {labels.size // devices}]
    np.testing.assert_array_equal(on_devices.batch(indices).labels, indices)
    assert len(on_devices) == 100


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_an_epoch_of_the_stream_is_every_image_once(tmp_path, key, devices):
    images = stored(96)
    images[:, 0, 0, 0] = np.arange(96)
    order = ShuffledOrder(key, 96, 8)
    starts = iter(range(0, 24, 3))
    with Stream(Examples(mapped(tmp_path, images)), [order], data_mesh(devices), P(None, "data"), 3, starts) as stream:
        pieces = [np.asarray(stream.take(step).images) for step in range(0, 24, 3)]
    seen = np.concatenate(pieces).reshape(-1, 2, 2, 3)[:, 0, 0, 0]
    assert sorted(seen[:96]) == list(range(96))
    assert sorted(seen[96:]) == list(range(96))
    assert seen[:96].tolist() != seen[96:].tolist()
    np.testing.assert_array_equal(seen, np.asarray(order(0, 24)).reshape(-1))  # on any number of devices


def test_the_stream_can_begin_at_any_step(tmp_path, key):
    images = Examples(mapped(tmp_path, stored(50)))
    open_at = functools.partial(Stream, images, [ShuffledOrder(key, 50, 8)], data_mesh(2), P(None, "data"), 2)
    with open_at(iter(range(0, 20, 2))) as stream:
        whole = [np.asarray(stream.take(step).images) for step in range(0, 20, 2)]
    for first in (6, 12):
        with open_at(iter(range(first, 20, 2))) as stream:
            rest = [np.asarray(stream.take(step).images) for step in range(first, 20, 2)]
        np.testing.assert_array_equal(rest, whole[first // 2 :])


def test_members_have_their_own_order(tmp_path):
    images = stored(60)
    orders = [ShuffledOrder(jax.random.key(seed), 60, 4) for seed in (0, 1, 1, 2)]
    mesh = sweep_mesh(2, 4, 4)
    with Stream(Examples(mapped(tmp_path, images)), orders, mesh, P("member", None, "data"), 3, iter([0])) as stream:
        piece = np.asarray(stream.take(0).images)
    assert piece.shape == (4, 3, 4, 2, 2, 3)
    for member, order in zip(piece, orders, strict=True):
        np.testing.assert_array_equal(member, images[np.asarray(order(0, 3))])


def test_a_stream_that_is_asked_for_another_step(tmp_path, key):
    order = ShuffledOrder(key, 50, 8)
    with (
        Stream(Examples(stored(50)), [order], data_mesh(1), P(None, "data"), 2, iter([4, 6])) as stream,
        pytest.raises(ValueError, match="the next piece begins at step 4, not 6"),
    ):
        stream.take(6)


def test_what_cannot_be_read_is_not_swallowed(key, monkeypatch):
    def gone(images, indices):
        raise OSError("the disk is gone")

    monkeypatch.setattr(prefetch, "gather", gone)
    with (
        Stream(Examples(stored(50)), [ShuffledOrder(key, 50, 8)], data_mesh(1), P(None, "data"), 2, iter([0])) as stream,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        stream.take(0)


def test_the_order_is_the_same_on_the_host(key):
    order = ShuffledOrder(key, 100, 8)
    np.testing.assert_array_equal(order(3, 30), order.on_host()(3, 30))


@pytest.mark.parametrize(
    ("batch", "members", "most", "expected"), [(512, 1, 50, 10), (512, 5, 50, 2), (2**20, 1, 50, 1), (1, 1, 7, 7)]
)
def test_pieces_are_of_bounded_size(batch, members, most, expected):
    """64x64 color images of 12,288 bytes: 2**26 / (512 * 12288) = 10.67 steps in a piece."""
    images = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10, 64, 64, 3), (0, 0, 0, 0))
    assert streamed_window(images[0].nbytes, batch, members, most) == expected


def test_residence_is_decided_by_size_alone(monkeypatch):
    """0.5 of 1,000 bytes on each of the devices; an array that would not even fit into this machine is not touched."""
    monkeypatch.setattr(prefetch, "memory_bytes", lambda mesh: 1000)
    mesh = data_mesh(2)

    def of(train: int, test: int) -> ImageSet:
        return ImageSet("x", np.zeros((train, 1, 1, 1), np.uint8), np.zeros((test, 1, 1, 1), np.uint8))

    assert fits(of(400, 100).shape.nbytes, mesh, 0.5)
    assert not fits(of(401, 100).shape.nbytes, mesh, 0.5)
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**12, 64, 64, 3), (0, 0, 0, 0))
    assert not fits(ImageSet("x", huge, huge[:1]).shape.nbytes, mesh, 0.5)


def test_devices_of_one_machine_share_its_memory():
    total = parallel.memory_bytes(data_mesh(1))
    assert parallel.memory_bytes(data_mesh(4)) == pytest.approx(total / 4, abs=2)
    with open("/proc/meminfo") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    assert total == pytest.approx(kibibytes * 1024, rel=1e-6)


# --- Memory -----------------------------------------------------------------------------------------------------------

STREAMING = """
import json, resource, sys
sys.path.insert(0, {root!r})
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from bsvae_jax.data import ShuffledOrder
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import Stream
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
images = np.load({path!r}, mmap_mode="r")
order = ShuffledOrder(jax.random.key(0), len(images), 256)
steps = len(images) // 256
total = jax.jit(lambda batch: batch.astype("float32").sum())
sizes = []
with Stream(Examples(images), [order], data_mesh(1), P(None, "data"), 1, iter(range(steps))) as stream:
    for step in range(steps):
        total(stream.take(step).images).block_until_ready()
        sizes.append(resident())
if {whole}:
    images[:].sum()
    sizes.append(resident())
print(json.dumps(sizes))
"""


def stream_of(path: Path, whole: bool = False) -> list[int]:
    code = STREAMING.format(root=str(PACKAGE), path=str(path), whole=whole)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.long
def test_resident_memory_stays_flat(tmp_path):
    """A set of 400 MB through pieces of 3 MB: after its first steps, resident memory grows by less than a third of it.

    (16 MiB are read before they are given back, and the system maps up to 64 KiB around every image of 12 KiB: 85 MiB; the
    pieces on their way and what the allocator keeps come to some more on a busy machine.)

    Reading it as a whole afterwards shows that the measure sees a map that is not given back.
    """
    count = 400 * 10**6 // (64 * 64 * 3)
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (count, 64, 64, 3))
    images[::7] = 3
    images.flush()
    sizes = np.asarray(stream_of(tmp_path / "images.npy", whole=True))
    before, streamed, whole = sizes[3], sizes[:-1].max(), sizes[-1]
    assert streamed - before < images.nbytes / 3
    assert whole - before > images.nbytes * 0.7


def test_gathering_is_indexing(tmp_path, monkeypatch):
    images = stored(1000)
    np.testing.assert_array_equal(gather(images, np.array([[1, 2], [999, 0]])), images[[[1, 2], [999, 0]]])
    for bad in ([0, 1000], [-1]):
        with pytest.raises(IndexError, match="of 1000 images"):
            gather(images, np.array(bad))
    monkeypatch.setattr(prefetch, "UNRELEASED", 0)
    there = HostImages(mapped(tmp_path, images)[100:])
    for _ in range(2):  # what was given back is still there
        np.testing.assert_array_equal(there.gather(np.array([5, 7, 5])), images[[105, 107, 105]])
    for mode in ("c", "r+"):  # in which the images can be changed; by "c" in memory alone
        changed = np.load(tmp_path / "images.npy", mmap_mode=mode)
        changed[:] = 7
        there = HostImages(changed[100:].reshape(900, -1))
        for _ in range(2):
            np.testing.assert_array_equal(there.gather(np.arange(900)), 7)


# --- Two processes ----------------------------------------------------------------------------------------------------

ONE_OF_TWO = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("127.0.0.1:{port}", 2, {number})
import numpy as np
from jax.sharding import PartitionSpec as P
from bsvae_jax.data import prefetch
from bsvae_jax.data import ShuffledOrder
from bsvae_jax.data.image_set import Examples
from bsvae_jax.distributed.mesh import data_mesh
images = np.load({path!r}, mmap_mode="r")
read = []
original = prefetch.gather
prefetch.gather = lambda images, indices: read.append(indices.size) or original(images, indices)
order = ShuffledOrder(jax.random.key(0), len(images), 8)
mesh = data_mesh()
assert mesh.devices.size == 4
with prefetch.Stream(Examples(images), [order], mesh, P(None, "data"), 2, iter(range(0, 12, 2))) as stream:
    for step in range(0, 12, 2):
        piece = stream.take(step).images
        for shard in piece.addressable_shards:
            np.save({out!r} + f"/{{step}}-{{shard.index[1].start}}.npy", shard.data)
assert sum(read) == 12 * 8 // 2, read  # its own half, and nothing else
"""


@pytest.mark.long
def test_two_processes_read_their_own_halves_of_the_same_batches(tmp_path, key):
    images = stored(50)
    mapped(tmp_path, images)
    (tmp_path / "out").mkdir()
    port = 20000 + abs(hash(str(tmp_path))) % 20000
    settings = {"root": str(PACKAGE), "path": str(tmp_path / "images.npy"), "out": str(tmp_path / "out"), "port": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO.format(number=number, **settings)], stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    order = ShuffledOrder(key, 50, 8)
    for step in range(0, 12, 2):
        parts = [np.load(tmp_path / "out" / f"{step}-{first}.npy") for first in (0, 2, 4, 6)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), images[np.asarray(order(step, 2))])


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(tmp_path: Path, name: str, **changes) -> fit.FitResult:
    return bv.fit(dataclasses.replace(SMALL, **changes), tmp_path / name, progress=False)


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_streamed_training_is_resident_training(tmp_path, devices):
    """Adam amplifies rounding where a gradient is near 0; 72 steps leave well under 1e-4."""
    resident = trained(tmp_path, "resident", devices=devices)
    streamed = trained(tmp_path, "streamed", devices=devices, resident_memory=0.0)
    chex.assert_trees_all_close(streamed.state.params, resident.state.params, atol=1e-4)
    for ours, theirs in zip(read_metrics(tmp_path / "streamed"), read_metrics(tmp_path / "resident"), strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=1e-4)
    for split in ("train", "test"):
        ours, theirs = streamed.report[split]["calibrated_elbo"], resident.report[split]["calibrated_elbo"]
        assert ours.value == pytest.approx(theirs.value, rel=1e-4)


@pytest.mark.long
def test_streaming_does_not_compile_again(tmp_path):
    counts = []
    original = program.run_streamed_steps

    def counted(*arguments, **options):
        counts.append(1)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "run_streamed_steps", counted)
        trained(tmp_path, "run", resident_memory=0.0, steps_per_dispatch=5)
    assert len(counts) == 1  # traced once, whatever is left of an epoch


@pytest.mark.long
@pytest.mark.parametrize("resident_memory", [0.0, 0.5])
def test_interrupted_inside_an_epoch_it_goes_on_to_the_bit(tmp_path, resident_memory, monkeypatch):
    """Signals after 13, 14 and 40 of 71 steps are answered at the next row of metrics, of 10 steps or the rest of an epoch."""
    monkeypatch.setattr(trainer, "LOG_EVERY", 10)
    changes = {"resident_memory": resident_memory, "steps_per_dispatch": 1}
    whole = trained(tmp_path, "whole", **changes)
    for stop_at, stops_at in ((13, 20), (14, 24), (40, 44)):
        asked = Stop()
        original = program.Program.take_steps

        def take(self, state, *rest, asked=asked, stop_at=stop_at, original=original):
            if int(state.step) >= stop_at:
                asked.number = 15
            return original(self, state, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program.Program, "take_steps", take)
            patch.setattr(fit, "stop_on_signals", lambda asked=asked: _given(asked))
            with pytest.raises(Interrupted, match=f"stopped after step {stops_at} of 71"):
                trained(tmp_path, "cut", **changes)
    cut = trained(tmp_path, "cut", **changes)
    chex.assert_trees_all_equal(cut.state.arrays(), whole.state.arrays())
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


class _given:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


@pytest.mark.long
@pytest.mark.parametrize(
    "execution", ["loop", *(pytest.param(execution, marks=pytest.mark.slow) for execution in ("scan", "vmap"))]
)
def test_a_streamed_sweep_is_a_resident_one(tmp_path, execution):
    grid = bv.Sweep(beta=(0.5, 2.0), decoder_variance=(bv.Optimal(),), seeds=2)
    for name, share in (("resident", 0.5), ("streamed", 0.0)):
        bv.fit_sweep(
            dataclasses.replace(SMALL, epochs=1, resident_memory=share), grid, tmp_path / name, execution, progress=False
        )
    members = sorted(path.name for path in (tmp_path / "resident" / "members").iterdir())
    assert len(members) == 4
    for member in members:
        ours, theirs = (bv.restore(tmp_path / name / "members" / member) for name in ("streamed", "resident"))
        chex.assert_trees_all_close(ours.variables, theirs.variables, atol=1e-4)


@pytest.mark.long
def test_evaluation_streams_too(tmp_path):
    resident, streamed = (trained(tmp_path, str(share), epochs=1, resident_memory=share) for share in (0.5, 0.0))
    images = load(SMALL.data)
    reports = [bv.evaluate(bv.restore(result.workdir), images, ("test",), samples=3).report for result in (resident, streamed)]
    for name, quantity in reports[0]["test"].items():
        assert reports[1]["test"][name].value == pytest.approx(quantity.value, rel=1e-3, abs=1e-3), name


@pytest.mark.long
def test_memory_that_a_streamed_stack_needs_grows_with_its_pieces():
    images = load(SMALL.data)
    config = dataclasses.replace(SMALL, resident_memory=0.0, devices=1)
    mesh = sweep_mesh(1, 4, 64)
    needed = [program.Program(config, images, mesh, "scan", count).needed_bytes(count) for count in (1, 4)]
    piece = 50 * 64 * 64  # steps, images, bytes of an image
    assert needed[1] - needed[0] > 3 * 3 * piece * 0.9  # three members more, one piece used and two on their way
