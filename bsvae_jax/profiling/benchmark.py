"""How fast a config trains on the devices at hand, and how that compares with what they could do and with PyTorch."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bsvae_jax.config import Config, Residual
from bsvae_jax.data import DataShape, ImageSet
from bsvae_jax.distributed.hardware import CHIPS, Precision, activations, check_precision
from bsvae_jax.distributed.mesh import Execution, data_mesh, describe_devices, sweep_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.models.layers import exact, float32_products
from bsvae_jax.objective import Optimal
from bsvae_jax.profiling.cost_analysis import ProgramCost, program_cost
from bsvae_jax.profiling.torch_vae import SETTINGS_ON_CPU, SETTINGS_ON_CUDA
from bsvae_jax.training.program import Program
from bsvae_jax.training.state import build_hyperparameters, check_against_data
from bsvae_jax.training.step import data_order


class Speed(NamedTuple):
    """What was measured."""

    machine: str
    precision: Precision
    batch_size: int
    """Images of a step, of all members."""
    images_per_second: tuple[float, ...]
    """Of each repeat."""
    compile_seconds: float
    waited: float
    """Share of the time that training waited for images."""
    step: ProgramCost
    """Of one device, by the compiler."""
    devices: int
    ceiling: float
    """FLOP/s that a large matrix product reaches on one device in this precision, measured."""
    published: float | None
    """Published FLOP/s of a device, where they are known."""
    peak_memory: int
    """Bytes: of a device's memory; on a CPU of the process."""

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.images_per_second)

    @property
    def step_seconds(self) -> float:
        """Time of one step, at the median."""
        return self.batch_size / self.median

    @property
    def utilization(self) -> float:
        """Arithmetic of a step over what the matrix product could have done in its time."""
        return self.step.flops / self.step_seconds / self.ceiling


class TorchSpeed(NamedTuple):
    """What PyTorch reached in one of its settings."""

    setting: str
    """Memory layout, and the mode of `torch.compile`."""
    version: str
    images_per_second: Sequence[float] = ()
    """Of each repeat; empty where it failed."""
    peak_memory: int | None = None
    """Bytes of a GPU's memory that PyTorch's arrays took; None on a CPU."""
    failure: str = ""
    """What PyTorch said where it failed."""

    @property
    def median(self) -> float:
        """Images per second; 0 where it failed."""
        return statistics.median(self.images_per_second or (0.0,))


def random_images(shape: DataShape, classes: int | None = None) -> ImageSet:
    """8-bit noise of the sizes of a data set, of `classes` in turn, where the set itself is not at hand: it takes as long."""
    rng = np.random.default_rng(0)
    train, test = (
        rng.integers(0, shape.levels, (count, *shape.image_shape), np.uint8) for count in (shape.train, max(shape.test, 1))
    )
    train_labels, test_labels = (np.arange(len(split)) % (classes or 1) for split in (train, test))
    return ImageSet("noise", train, test, shape.levels, train_labels, test_labels, known_fingerprint="noise")


def matrix_product_ceiling(precision: Precision, platform: str) -> float:
    """FLOP/s of the product of two large square matrices on one device: the best of some sizes."""
    dtype = activations(precision)

    @jax.jit
    def product(a: Array, b: Array) -> Array:
        with float32_products(precision == "tensorfloat32"):
            return jnp.matmul(a, b, precision=exact(dtype))

    best = 0.0
    for size in (1024, 2048) if platform == "cpu" else (4096, 8192):
        a = jnp.ones((size, size), dtype)
        jax.block_until_ready(product(a, a))
        for _ in range(5):
            begun, count = time.perf_counter(), 4
            results = [product(a, a) for _ in range(count)]
            jax.block_until_ready(results)
            best = max(best, count * 2.0 * size**3 / (time.perf_counter() - begun))
    return best


def _program(config: Config, images: ImageSet, members: int, execution: Execution) -> Program:
    """The training program on the devices at hand, not compiled yet."""
    along: tuple[Any, ...] = (config.batch_size, config.gradient_accumulation)
    mesh = data_mesh(config.devices, *along) if execution == "loop" else sweep_mesh(config.devices, members, *along)
    check_against_data(config, images)
    check_precision(config.precision, mesh.local_devices[0].device_kind)
    return Program(config, images, mesh, execution, members)


@contextlib.contextmanager
def _windows(program: Program, config: Config, members: int = 1) -> Iterator[Callable[[], tuple[Any, float]]]:
    """What takes a window of steps at each call: its metrics, which are not waited for, and seconds of waiting for images."""
    configs = [dataclasses.replace(config, seed=config.seed + member) for member in range(members)]
    states = [program.new_state(own) for own in configs]
    orders = [data_order(state, program.images, config.batch_size) for state in states]
    state, hyperparameters = program.pack(states), program.pack([build_hyperparameters(own) for own in configs])
    starts = itertools.count(0, program.window)
    with program.batches(orders, itertools.count(0, program.window)) as batches:

        def window() -> tuple[Any, float]:
            nonlocal state
            asked = time.perf_counter()
            images_of_window = batches(next(starts))
            waited = time.perf_counter() - asked
            state, metrics = program.take_steps(state, images_of_window, program.window, hyperparameters)
            return metrics, waited

        yield window


def measure(
    config: Config,
    images: ImageSet,
    repeats: int = 5,
    seconds: float = 3.0,
    members: int = 1,
    execution: Execution = "loop",
) -> Speed:
    """Train the config for a while, from the beginning; nothing is saved.

    Args:
      config: the experiment.
      images: its data, or `random_images` of its sizes.
      repeats: measurements, of which the median counts.
      seconds: that each of them takes, about.
      members: models trained at once, equal but for their seeds; images of all of them count.
      execution: 'loop' for one model; how a stack of them is driven otherwise.

    Raises:
      UserError: devices or data do not fit the config, or less than one repeat.
    """
    if repeats < 1 or not seconds > 0.0:
        raise UserError(f"At least one repeat of more than 0 seconds is needed, got {repeats} of {seconds:g}.")
    program = _program(config, images, members, execution)
    device = program.mesh.local_devices[0]
    begun = time.perf_counter()
    compiled = program.compile(members)
    compile_seconds = time.perf_counter() - begun
    speeds, waited, elapsed = [], 0.0, 0.0
    with _windows(program, config, members) as window:
        for _ in range(2):
            jax.block_until_ready(window()[0])
        for _ in range(repeats):
            begun, windows, previous = time.perf_counter(), 0, None
            while windows == 0 or time.perf_counter() - begun < seconds:
                current, waiting = window()
                waited += waiting
                windows += 1
                if previous is not None:  # one window in flight, as in training
                    jax.block_until_ready(previous)
                previous = current
            jax.block_until_ready(previous)
            took = time.perf_counter() - begun
            elapsed += took
            speeds.append(windows * program.window * members * config.batch_size / took)
    chip = CHIPS.get(device.device_kind)
    stats = device.memory_stats() if device.platform != "cpu" else None
    peak = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = device.platform == "gpu"  # where the compiler's own counts leave out cuDNN's convolutions
    cost = program_cost(compiled, gpu)
    if execution == "scan" and not gpu:  # the compiler counts one pass through a loop
        cost = cost._replace(flops=members * cost.flops, bytes_accessed=members * cost.bytes_accessed)
    return Speed(
        describe_devices(program.mesh),
        config.precision,
        members * config.batch_size,
        tuple(speeds),
        compile_seconds,
        waited / elapsed,
        cost,
        program.mesh.devices.size,
        matrix_product_ceiling(config.precision, device.platform),  # after the peak of memory, which its own arrays would be
        None if chip is None else chip.peak(config.precision),
        int(peak),
    )


class Kernels(NamedTuple):
    """What a profile shows of the work of one device."""

    per_step: float
    """Kernels, copies between places of its memory included."""
    busy: float
    """Share of the time from the first to the last of them in which the device worked."""


def profile_kernels(config: Config, images: ImageSet) -> Kernels | None:
    """Kernels of a training step, from a profile of a window of steps; None where it shows none, as on a CPU.

    Args:
      config: the experiment.
      images: its data, or `random_images` of its sizes.
    """
    program = _program(config, images, 1, "loop")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with _windows(program, config) as window, tempfile.TemporaryDirectory() as folder:
        jax.block_until_ready(window()[0])
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(window()[0])
        (profile,) = Path(folder).rglob("*.xplane.pb")
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(profile)).planes if "/device:" in plane.name]
        for plane in planes:
            # "Stream #..." on GPUs, where every one is a queue of kernels; "XLA Ops" on TPUs.
            lines = [line for line in plane.lines if line.name.startswith(("Stream", "XLA Ops"))]
            spans = sorted((event.start_ns, event.end_ns) for line in lines for event in line.events)
            if spans:
                return Kernels(len(spans) / program.window, _covered(spans) / (max(end for _, end in spans) - spans[0][0]))
    return None


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, sorted by their beginnings."""
    total, reached = 0.0, -math.inf
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


STALLED = 120.0
"""Seconds beside the measurements after which a setting of PyTorch is given up."""


def check_torch(config: Config) -> None:
    """Raise a UserError if there is no PyTorch, or none of the config's network, to compare with."""
    if not isinstance(config.network, Residual) or not isinstance(config.decoder_variance, Optimal):
        raise UserError("The PyTorch version is of the residual network with an optimal variance; choose --network residual.")
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed: pip install 'bsvae_jax[torch]'.")


def measure_torch(
    config: Config,
    images: ImageSet,
    repeats: int = 5,
    seconds: float = 3.0,
    limit: float = math.inf,
) -> list[TorchSpeed]:
    """The same network and recipe in PyTorch on the same device, in each of its settings.

    Args:
      config: of a residual network with `Optimal(over="example")`.
      images: whose sizes it takes; its own are noise on the device.
      repeats: as for `measure`.
      seconds: the same.
      limit: seconds after which no other setting is begun.

    Raises:
      UserError: another network, no PyTorch, or PyTorch failed in every setting.
    """
    check_torch(config)
    network: Any = config.network
    setup = {
        "image_shape": images.image_shape,
        "widths": network.widths_for(images.image_shape),
        "latent_size": config.latent_size,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "tf32": config.precision == "tensorfloat32",
        "beta": config.beta,
        "ema": config.optimizer.ema_decay is not None,
        "images": len(images.train),
        "repeats": repeats,
        "seconds": seconds,
    }
    peers: list[TorchSpeed] = []
    version, begun = importlib.metadata.version("torch"), time.perf_counter()
    for layout, mode in SETTINGS_ON_CUDA if jax.default_backend() == "gpu" else SETTINGS_ON_CPU:
        if not peers or time.perf_counter() - begun < limit:
            peers.append(_torch_speed(version, setup | {"layout": layout, "mode": mode}, STALLED + repeats * seconds))
    if not any(peer.images_per_second for peer in peers):
        raise UserError(f"The PyTorch version failed: {[peer.failure for peer in peers]}")
    return peers


def _torch_speed(version: str, setup: dict[str, Any], timeout: float) -> TorchSpeed:
    """One setting, in a process of its own: PyTorch may crash, or stall when the memory layout changes in one process."""
    setting = setup["layout"] if setup["mode"] is None else f"{setup['layout']}, compiled ({setup['mode']})"
    command = [sys.executable, "-m", "bsvae_jax.profiling.torch_vae", json.dumps(setup)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return TorchSpeed(setting, version, failure=f"no speed in {timeout:.0f} s")
    if done.returncode:
        raised = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)  # a message may go on below it
        said = raised or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return TorchSpeed(setting, version, failure=said[-1])
    return TorchSpeed(setting, version, **json.loads(done.stdout.splitlines()[-1]))


def describe(speed: Speed) -> str:
    """Everything that was measured, as lines of text."""
    low, high = min(speed.images_per_second), max(speed.images_per_second)
    reached = speed.utilization * speed.ceiling
    published = "" if speed.published is None else f", {100 * reached / speed.published:.0f}% of the published peak"
    lines = [
        f"{speed.machine}, {speed.precision}, {speed.batch_size} images a step",
        f"  images/s      {speed.median:,.0f} (median of {len(speed.images_per_second)}, {low:,.0f} to {high:,.0f})",
        f"  a step        {1e3 * speed.step_seconds:.2f} ms",
        f"  compiling     {speed.compile_seconds:.1f} s",
        f"  utilization   {100 * speed.utilization:.0f}% of the {speed.ceiling / 1e12:.3g} TFLOP/s of a large matrix product"
        + published,
        f"  peak memory   {speed.peak_memory / 2**20:,.0f} MiB" + (" (of the process)" if "(cpu)" in speed.machine else ""),
        f"  waiting       {100 * speed.waited:.2g}% of the time for images",
    ]
    return "\n".join(lines)


def describe_against(speed: Speed, peers: list[TorchSpeed]) -> str:
    """PyTorch's settings, and the ratio to the best of them."""
    lines = []
    for peer in peers:
        spread = [f"{of(peer.images_per_second):,.0f}" for of in (min, max) if peer.images_per_second]
        found = f"{peer.median:,.0f} images/s ({' to '.join(spread)})" if spread else f"failed: {peer.failure}"
        lines.append(f"  PyTorch {peer.version}, {peer.setting}: {found}")
    best = max(peer.median for peer in peers)
    return "\n".join([*lines, f"  ratio to the best of PyTorch's: {speed.median / best:.2f}"])


def combined(first: Speed, second: Speed) -> Speed:
    """Two measurements of the same, before and after another's, as one."""
    return second._replace(
        images_per_second=first.images_per_second + second.images_per_second,
        compile_seconds=first.compile_seconds,
        waited=(first.waited + second.waited) / 2,
    )
