"""What a program will need and how fast it can be at best, from the compiler, for devices that need not be there.

FLOPs, bytes, memory and collectives are the compiler's, of the very program that `bsvae train` runs, and for GPUs its kernels;
times are a roofline drawn from them and the chip's published peaks: an estimate, and an optimistic one.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from bsvae_jax.config import Config
from bsvae_jax.data import DataShape
from bsvae_jax.data.prefetch import streamed_window
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed.hardware import CHIPS, TOPOLOGIES, Chip, Precision, check_precision, known_topologies
from bsvae_jax.distributed.mesh import REPLICATED, Execution, data_mesh, sweep_mesh
from bsvae_jax.errors import UserError, nearest
from bsvae_jax.evaluation.sampling import BATCH, parallelize_sampling, pieces
from bsvae_jax.profiling.cost_analysis import ProgramCost, program_cost
from bsvae_jax.profiling.gpu_targets import LAUNCH, TARGETS, WITHOUT_AUTOTUNING, gpu_devices, known_gpus, split_name
from bsvae_jax.random import make_key
from bsvae_jax.training.memory import NEEDS_LESS
from bsvae_jax.training.program import abstract_arguments, parallelize_training, program_config, program_model
from bsvae_jax.training.state import create_state, steps_per_dispatch

_EFFORT = hasattr(jax.config, "jax_exec_time_optimization_effort")
QUICK: dict[str, Any] = {"exec_time_optimization_effort": -1.0} if _EFFORT else {"optimization_level": "O0"}
"""Compiler options for TPUs under which a program compiles in a fraction of the time, with the same FLOPs and about the same
bytes: the older name, or from JAX 0.12 the newer."""

GPU_SHARE = 0.75
"""Of a GPU's memory that JAX takes; XLA_PYTHON_CLIENT_MEM_FRACTION sets another."""


class DoesNotFitError(UserError):
    """A program needs more memory than a device has."""


class Times(NamedTuple):
    """A roofline: the least time that a step can take on each part of the machine, seconds."""

    compute: float
    memory: float
    network: float
    launch: float = 0.0
    """Of the kernels of a GPU."""

    @property
    def step(self) -> float:
        """Arithmetic and memory at once, while the next kernels are launched; communication afterwards."""
        return max(self.compute, self.memory, self.launch) + self.network

    @property
    def bound(self) -> str:
        """What takes the longest."""
        parts = {"arithmetic": self.compute, "memory": self.memory, "launches": self.launch}
        return max(parts, key=parts.__getitem__)


class Compiled(NamedTuple):
    """A training program for one machine."""

    topology: str
    chip: Chip | None
    """None: no published peaks are known."""
    devices: int
    devices_per_chip: int
    batch_size: int
    members: int
    precision: Precision
    step: ProgramCost
    state: dict[str, int]
    """Bytes per device of the parameters, the optimizer's state, the images, ..."""
    memory: float = math.inf
    """Bytes of a device that a program may take."""

    def times(self) -> Times | None:
        """The roofline; None without published peaks."""
        return (
            None if self.chip is None else roofline(self.step, self.chip, self.precision, self.devices, self.devices_per_chip)
        )

    def images_per_second(self) -> float | None:
        """Of all members and devices together."""
        times = self.times()
        return None if times is None else self.batch_size * self.members / times.step

    def utilization(self) -> float | None:
        """Share of the chip's peak that the arithmetic of a step takes of the predicted time."""
        times = self.times()
        return None if times is None else times.compute / times.step


def roofline(step: ProgramCost, chip: Chip, precision: Precision, devices: int = 1, devices_per_chip: int = 1) -> Times:
    """The least time of each part of a step.

    A ring passes every byte that is reduced over `devices` devices `2 (n - 1) / n` times through each of them.

    Args:
      step: of one device.
      chip: its published peaks.
      precision: of the matrix products.
      devices: among which collectives communicate.
      devices_per_chip: that share the chip's peaks.
    """
    passes = 2.0 * (devices - 1) / devices
    return Times(
        step.flops / (chip.peak(precision) / devices_per_chip),
        step.bytes_accessed / (chip.bandwidth / devices_per_chip),
        passes * step.communicated / (chip.network / devices_per_chip),
        LAUNCH * step.launches,
    )


# --- Machines that are not there --------------------------------------------------------------------------------------


_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Where there is no TPU, libtpu looks for one over the network and complains at length, unless it is told all this."""


@functools.cache
def _tpu_devices(topology: str) -> tuple[Any, ...]:
    kind, _, shape = topology.partition(":")
    if kind not in TOPOLOGIES or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        likely = nearest(topology, [*TARGETS, *(f"{k}:{s}" for k, shapes in TOPOLOGIES.items() for s in shapes)])
        raise UserError(
            f"There is no topology {topology!r}{likely}. Known ones: {known_topologies()}; {known_gpus()}; "
            "or cpu, gpu, tpu: this machine."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for TPUs needs libtpu, also where there is none: pip install 'bsvae_jax[tpu]'.")
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    one_chip = set(shape.split("x")) == {"1"}
    if one_chip:
        topology = f"{kind}:{TOPOLOGIES[kind][0]}"
    try:
        devices: tuple[Any, ...] = tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
        return tuple(device for device in devices if device.coords == devices[0].coords) if one_chip else devices
    except (RuntimeError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise UserError(f"libtpu knows no topology {topology!r} ({first}). Known ones: {known_topologies()}.") from error


def machine(topology: str, devices: int | None = None) -> tuple[list[Any], int]:
    """The devices of a topology such as 'v5e:2x4' or 'h100x8', or of this machine ('cpu', 'gpu', 'tpu'); how many share a chip.

    Args:
      topology: its name.
      devices: use so many of them; None: all.

    Raises:
      UserError: no such topology (those there are are listed), no libtpu or no CUDA, or fewer devices than asked for.
    """
    if topology in ("cpu", "gpu", "tpu"):
        try:
            found: list[Any] = jax.devices(topology)
        except RuntimeError as error:
            raise UserError(
                f"This machine has no {topology} that JAX can use; name a topology instead, v5e:2x4 for one."
            ) from error
        per_chip = 1
    elif gpus := split_name(topology):
        found, per_chip = list(gpu_devices(*gpus)), 1
    else:
        found = list(_tpu_devices(topology))
        per_chip = len(found) // len({tuple(device.coords) for device in found})
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise UserError(f"{topology} has {len(found)} devices, {devices} were asked for.")
    return found[:count], per_chip


# --- Compiling --------------------------------------------------------------------------------------------------------


def compile_training(
    config: Config,
    data: DataShape,
    topology: str,
    devices: int | None = None,
    members: int = 1,
    full: bool = False,
    memory: float | None = None,
) -> Compiled:
    """Compile the training program of a config for a machine; nothing is run and no array is made.

    Args:
      config: the experiment.
      data: what it will be trained on.
      topology: see `machine`.
      devices: of it; None: all.
      members: models of a sweep trained at once, divided over the devices; 1: one model, whose batch is.
      full: let the compiler take the time that it takes before training.
      memory: bytes of a device that a program may take; None: of the published ones what JAX takes, without limit if unknown.

    Raises:
      UserError: no such machine, a precision that it has not, a batch that does not divide over its devices, or a program
        that does not fit.
    """
    found, per_chip = machine(topology, config.devices if devices is None else devices)
    check_precision(config.precision, found[0].device_kind)
    execution: Execution = "loop" if members == 1 else "vmap"
    batch, parts = config.batch_size, config.gradient_accumulation
    mesh = data_mesh(None, batch, parts, found) if members == 1 else sweep_mesh(None, members, batch, parts, found)
    chip, platform = CHIPS.get(found[0].device_kind), found[0].platform
    own = math.inf if chip is None else (GPU_SHARE if platform == "gpu" else 1.0) * chip.memory / per_chip
    memory = own if memory is None else memory
    resident = data.nbytes <= config.resident_memory * memory
    window = steps_per_dispatch(config, platform)
    if not resident:
        window = streamed_window(data.image_bytes, batch, members, window)
    arguments = abstract_arguments(config, data, mesh, execution, members, window, resident)
    program = parallelize_training(program_config(config), data, mesh, execution, resident)
    with_what = f"{batch} images a step" + (f" and {members} members" if members > 1 else "")
    step = program_cost(_compile(program.lower(*arguments), topology, platform, full, with_what), platform == "gpu")
    if platform != "gpu":  # the compiler counts one pass through a loop
        step = step._replace(flops=parts * step.flops, bytes_accessed=parts * step.bytes_accessed)
    if step.memory > memory:  # only a device that is there runs out of it
        raise DoesNotFitError(_needs_more(step, memory, batch, with_what))
    held, precision = _held(arguments, mesh), config.precision
    return Compiled(topology, chip, len(found), per_chip, batch, members, precision, step, held, memory)


def compile_sampling(
    config: Config, data: DataShape, topology: str, devices: int | None = None, full: bool = False
) -> ProgramCost:
    """Compile the program of `bsvae sample`, one batch of it, for a machine; arguments as for `compile_training`."""
    found, _ = machine(topology, config.devices if devices is None else devices)
    mesh, platform = data_mesh(among=found), found[0].platform
    model = program_model(config, data).clone(axis_name=None)
    total = steps_through(config.epochs, data.train, config.batch_size)
    replicated = NamedSharding(mesh, REPLICATED)
    variables, key = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(lambda: (create_state(config, model, total).variables(), make_key(0))),
    )
    number, piece = pieces(data.image_shape), jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    labels = None if config.classes is None else jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=replicated)
    lowered = parallelize_sampling(model, mesh, number).lower(variables, key, labels, piece)
    cost = program_cost(_compile(lowered, topology, platform, full, f"{BATCH // number} samples"), platform == "gpu")
    return cost._replace(flops=number * cost.flops, bytes_accessed=number * cost.bytes_accessed)


def compile_other_batch(config: Config, *arguments: Any) -> Compiled | None:
    """As `compile_training`, of twice the batch, or of half of it where that does not fit; None where half does not divide."""
    for size, refused in ((2 * config.batch_size, DoesNotFitError), (config.batch_size // 2, UserError)):
        with contextlib.suppress(refused):
            return compile_training(dataclasses.replace(config, batch_size=size), *arguments)
    return None


def largest_batch(compiled: Compiled, other: Compiled | None, unit: int) -> int | None:
    """Largest batch that fits, by the straight line through the memory of two batches; None where there is no limit or no line.

    Args:
      compiled: of one batch.
      other: of another batch, all else equal.
      unit: what a batch must be a multiple of.
    """
    if other is None or compiled.memory == math.inf:
        return None
    each = (other.step.memory - compiled.step.memory) / (other.batch_size - compiled.batch_size)
    if each <= 0:
        return None
    return int((compiled.batch_size + (compiled.memory - compiled.step.memory) / each) // unit * unit)


def _compile(lowered: Any, topology: str, platform: str, full: bool, with_what: str) -> Any:
    options = WITHOUT_AUTOTUNING if split_name(topology) else QUICK if platform == "tpu" and not full else None
    try:
        return lowered.compile(compiler_options=options)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        raise DoesNotFitError(_does_not_fit(str(error), with_what)) from error


def _does_not_fit(message: str, with_what: str) -> str:
    """One sentence out of the compiler's pages: how much is needed, and for what above all."""
    used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) (\w+)", message)
    sizes = f" ({used[1]} of {used[2]} of {used[3]})" if used else ""
    largest = re.search(r"Size: ([\d.]+[KMGT]?)\s+Operator: .*?op_name=\"([^\"]*)\"[^\n]*\n\s+Shape: (\S+?)\{", message)
    what = f" The largest array is {largest[3]} ({largest[1]}), of {'/'.join(largest[2].split('/')[-2:])}." if largest else ""
    less = f"A smaller batch_size, {NEEDS_LESS}."
    return f"The program does not fit into the memory of a device with {with_what}{sizes}.{what} {less}"


def _needs_more(step: ProgramCost, available: float, batch: int, with_what: str) -> str:
    """The same of a program that was compiled: temporary memory grows with the batch."""
    largest = max(step.kernels, key=lambda kernel: kernel.result_bytes, default=None)
    of_layer = f", of {largest.layer}" if largest is not None and largest.layer else ""
    array = "" if largest is None else f" The largest array is {largest.result} ({_bytes(largest.result_bytes)}){of_layer}."
    fits = max(0, int(batch * (available - step.arguments - step.results) / step.temporary))
    return (
        f"The program does not fit into the memory of a device with {with_what} ({_bytes(step.memory)} of the "
        f"{_bytes(available)} that it may take).{array} A smaller batch_size, about {fits}, {NEEDS_LESS}."
    )


def _held(arguments: tuple[Any, ...], mesh: Mesh) -> dict[str, int]:
    """Bytes per device of what a training program is given."""
    state, *rest = arguments

    def size(tree: Any) -> int:
        def one(leaf: Any) -> int:
            itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
            return math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize

        return sum(one(leaf) for leaf in jax.tree.leaves(tree))

    held = {
        "parameters": size((state.params, state.batch_stats)),
        "optimizer": size(state.optimizer_state),
        "averaged parameters": size(state.ema_params),
        "images": size(rest[0]),
    }
    return {name: value for name, value in held.items() if value}


# --- For people -------------------------------------------------------------------------------------------------------


def describe(compiled: Compiled) -> str:
    """Everything known of a compiled training program, as lines of text."""
    step, times = compiled.step, compiled.times()
    name = compiled.chip.name if compiled.chip else "no published peaks known"
    lines = [
        f"{compiled.topology}, {compiled.devices} devices ({name}), {compiled.precision}, {compiled.batch_size} images a step"
        + (f", {compiled.members} members" if compiled.members > 1 else ""),
        "per device and step:",
        f"  arithmetic    {step.flops:.3g} FLOP",
        f"  memory moved  {step.bytes_accessed:.3g} bytes ({step.intensity:.1f} FLOP/byte)",
        f"  peak memory   {_bytes(step.memory)}"
        + (f" of {_bytes(compiled.memory)}" if compiled.memory < math.inf else "")
        + f": temporary {_bytes(step.temporary)}, "
        + ", ".join(f"{what} {_bytes(size)}" for what, size in compiled.state.items()),
    ]
    communication = ", ".join(f"{c.operations} x {c.kind} of {_bytes(c.size)} in all" for c in step.collectives)
    lines.append(f"  communication {communication or 'none'}")
    if step.kernels:
        lines += kernel_lines(step)
    if times is not None:
        launches = f"launches {1e3 * times.launch:.3g}, " if step.kernels else ""
        lines += [
            f"  least time    {1e3 * times.step:.3g} ms: arithmetic {1e3 * times.compute:.3g}, "
            f"memory {1e3 * times.memory:.3g}, {launches}communication {1e3 * times.network:.3g}; bound by {times.bound}",
            f"in all: at most {compiled.images_per_second():,.0f} images/s, "
            f"{100 * (compiled.utilization() or 0):.0f}% of the peak",
            "An estimate, from the compiler's counts and published peaks"
            + (", without the autotuning that takes a GPU." if split_name(compiled.topology) else "."),
        ]
    return "\n".join(lines)


def as_json(compiled: Compiled) -> dict[str, Any]:
    """Everything known of a compiled training program but its single kernels, as plain values; infinite memory is no limit."""
    return {
        **compiled._asdict(),
        "chip": None if compiled.chip is None else compiled.chip.name,
        "step": compiled.step._replace(kernels=())._asdict(),
        "peak_memory": compiled.step.memory,
        "times": compiled.times(),
        "images_per_second": compiled.images_per_second(),
        "utilization": compiled.utilization(),
    }


def kernel_lines(step: ProgramCost) -> list[str]:
    """Kernels of a GPU's step by library and kind, with the bytes that each kind moves."""
    libraries = {name: sum(kernel.times for kernel in step.kernels if kernel.library == name) for name in ("cuDNN", "cuBLAS")}
    kinds: dict[str, list[int]] = {}
    for kernel in step.kernels:
        counted = kinds.setdefault(kernel.kind, [0, 0])
        counted[0] += kernel.times
        counted[1] += kernel.times * kernel.moved
    lines = [f"  kernels       {step.launches}: " + ", ".join(f"{count} of {name}" for name, count in libraries.items())]
    for kind, (count, moved) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        lines.append(f"    {kind:<15} {count:4d} kernels {moved:9.3g} bytes")
    return lines


def top_table(step: ProgramCost, count: int) -> str:
    """The `count` kernels of a GPU's step that move the most bytes, with the layer that each comes from: a Markdown table."""
    lines = ["| kernel | kind | library | result | bytes | FLOP | layer |", "| --- | --- | --- | --- | ---: | ---: | --- |"]
    for kernel in sorted(step.kernels, key=lambda kernel: -kernel.times * kernel.moved)[:count]:
        name = kernel.name + (f" x {kernel.times}" if kernel.times > 1 else "")
        moved, flops = kernel.times * kernel.moved, kernel.times * kernel.flops
        cells = [name, kernel.kind, kernel.library or "", kernel.result, f"{moved:.3g}", f"{flops:.3g}", kernel.layer]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling_table(rows: Sequence[Compiled]) -> str:
    """Predicted scaling over machines, the first row being the measure of the others: a Markdown table."""
    lines = [
        "| topology | devices | images a step | FLOP per device | bytes communicated | time [ms] | images/s | efficiency |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = rows[0].images_per_second()
    for row in rows:
        times, speed = row.times(), row.images_per_second()
        shown = ["", "", ""]
        if times is not None and speed is not None and first is not None:
            each = first / rows[0].devices
            shown = [f"{1e3 * times.step:.3g}", f"{speed:,.0f}", f"{100 * speed / (each * row.devices):.0f}%"]
        cells = [row.topology, str(row.devices), f"{row.batch_size * row.members:,}", f"{row.step.flops:.3g}"]
        cells += [f"{row.step.communicated:,}", *shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(size: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
