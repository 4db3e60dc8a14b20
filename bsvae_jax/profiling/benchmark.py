"""How fast a config trains on the devices at hand, and how that compares with what they could do and with PyTorch."""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax.config import Config, Residual
from bsvae_jax.data import DataShape, ImageSet
from bsvae_jax.distributed.hardware import CHIPS, check_precision
from bsvae_jax.distributed.mesh import data_mesh, describe_devices
from bsvae_jax.errors import UserError
from bsvae_jax.models.layers import exact
from bsvae_jax.objective import Optimal
from bsvae_jax.profiling.cost_analysis import ProgramCost, program_cost
from bsvae_jax.training.program import Program
from bsvae_jax.training.state import build_hyperparameters, check_against_data, create_state
from bsvae_jax.training.step import data_order


class Speed(NamedTuple):
    """What was measured."""

    machine: str
    precision: str
    batch_size: int
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

    layout: str
    compiled: bool
    images_per_second: tuple[float, ...]
    version: str

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.images_per_second)


def random_images(shape: DataShape) -> ImageSet:
    """8-bit noise of the sizes of a data set, where the set itself is not at hand; speed does not depend on the values."""
    rng = np.random.default_rng(0)
    train, test = (
        rng.integers(0, shape.levels, (count, *shape.image_shape), np.uint8) for count in (shape.train, max(shape.test, 1))
    )
    return ImageSet("noise", train, test, shape.levels, known_fingerprint="noise")


def matrix_product_ceiling(precision: str, platform: str) -> float:
    """FLOP/s of the product of two large square matrices on one device: the best of some sizes."""
    dtype = jnp.dtype(precision)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=exact(dtype)))
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


def measure(config: Config, images: ImageSet, repeats: int = 5, seconds: float = 3.0) -> Speed:
    """Train the config for a while, from the beginning; nothing is saved.

    Args:
      config: the experiment.
      images: its data, or `random_images` of its sizes.
      repeats: measurements, of which the median counts.
      seconds: that each of them takes, about.

    Raises:
      UserError: devices or data do not fit the config, or less than one repeat.
    """
    if repeats < 1 or not seconds > 0.0:
        raise UserError(f"At least one repeat of more than 0 seconds is needed, got {repeats} of {seconds:g}.")
    mesh = data_mesh(config.devices, config.batch_size, config.gradient_accumulation)
    check_against_data(config, images)
    device = mesh.local_devices[0]
    check_precision(config.precision, device.device_kind)
    ceiling = matrix_product_ceiling(config.precision, device.platform)
    program = Program(config, images, mesh)
    begun = time.perf_counter()
    compiled = program.compile()
    compile_seconds = time.perf_counter() - begun
    first = create_state(program.config, program.model, program.total)
    order = data_order(first, images, config.batch_size)
    state, hyperparameters = program.pack([first]), program.pack([build_hyperparameters(config)])
    speeds, waited, elapsed = [], 0.0, 0.0
    with program.batches([order], itertools.count(0, program.window)) as batches:
        step = 0

        def window() -> Any:
            nonlocal state, step, waited
            asked = time.perf_counter()
            images_of_window = batches(step)
            waited += time.perf_counter() - asked
            state, metrics = program.take_steps(state, images_of_window, program.window, hyperparameters)
            step += program.window
            return metrics

        for _ in range(2):
            jax.block_until_ready(window())
        waited = 0.0
        for _ in range(repeats):
            begun, before, previous = time.perf_counter(), step, None
            while step == before or time.perf_counter() - begun < seconds:
                current = window()
                if previous is not None:  # one window in flight, as in training
                    jax.block_until_ready(previous)
                previous = current
            jax.block_until_ready(previous)
            took = time.perf_counter() - begun
            elapsed += took
            speeds.append((step - before) * config.batch_size / took)
    chip = CHIPS.get(device.device_kind)
    stats = device.memory_stats() if device.platform != "cpu" else None
    peak = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Speed(
        describe_devices(mesh),
        config.precision,
        config.batch_size,
        tuple(speeds),
        compile_seconds,
        waited / elapsed,
        program_cost(compiled),
        mesh.devices.size,
        ceiling,
        None if chip is None else chip.peak(config.precision),
        int(peak),
    )


def measure_torch(config: Config, images: ImageSet, repeats: int = 5, seconds: float = 3.0) -> list[TorchSpeed]:
    """The same network and recipe in PyTorch on the same device, in a process of its own, in each of its settings.

    Args:
      config: of a residual network with `Optimal(over="example")`.
      images: whose sizes it takes; its own are noise on the device.
      repeats: as for `measure`.
      seconds: the same.

    Raises:
      UserError: another network, no PyTorch, or PyTorch failed.
    """
    if not isinstance(config.network, Residual) or not isinstance(config.decoder_variance, Optimal):
        raise UserError("The PyTorch version is of the residual network with an optimal variance; choose --network residual.")
    setup = {
        "image_shape": images.image_shape,
        "widths": config.network.widths,
        "latent_size": config.latent_size,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "beta": config.beta,
        "ema": config.optimizer.ema_decay is not None,
        "images": len(images.train),
        "repeats": repeats,
        "seconds": seconds,
    }
    command = [sys.executable, "-m", "bsvae_jax.profiling.torch_vae", json.dumps(setup)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named 'torch'" in done.stderr:
        raise UserError("PyTorch is not installed: pip install 'bsvae_jax[torch]'.")
    if done.returncode:
        raise UserError(f"The PyTorch version failed: {done.stderr.strip().splitlines()[-1:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [TorchSpeed(row["layout"], row["compiled"], tuple(row["images_per_second"]), row["torch"]) for row in rows]


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
        low, high = min(peer.images_per_second), max(peer.images_per_second)
        how = f"{peer.layout}{', compiled' if peer.compiled else ''}"
        lines.append(f"  PyTorch {peer.version}, {how}: {peer.median:,.0f} images/s ({low:,.0f} to {high:,.0f})")
    best = max(peer.median for peer in peers)
    return "\n".join([*lines, f"  ratio to the best of PyTorch's: {speed.median / best:.2f}"])


def combined(first: Speed, second: Speed) -> Speed:
    """Two measurements of the same, before and after another's, as one."""
    return second._replace(
        images_per_second=first.images_per_second + second.images_per_second,
        compile_seconds=first.compile_seconds,
        waited=(first.waited + second.waited) / 2,
    )
