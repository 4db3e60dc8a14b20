"""Devices: the mesh, and the way of a function written for one device's share of the batch over all of them.

A step is written with a named axis `"data"` and explicit averages over it. `parallelize` runs it under `jit(shard_map)`, or
under `pmap`. A sweep's members are a second, outer axis: `parallelize` with an `execution` runs the same function for all of
them in one program, the members divided over the devices of the `"member"` axis.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bsvae_jax.distributed.hardware import check_platform
from bsvae_jax.errors import UserError

DATA_AXIS = "data"
"""Name of the axis of the devices that share a batch."""

MEMBER_AXIS = "member"
"""Name of the axis of the devices among which the members of a sweep are divided."""

Execution = Literal["loop", "scan", "vmap"]
"""How members share a compiled program: 'loop': one member a call, no member axis; 'vmap': all members side by side, their
matrix products batched; 'scan': all in one call, one after the other.

Side by side, convolutions become grouped ones. Compiled for an H100, a step of members of the MNIST network, 512 images each:

| members | precision | vmap: kernels, bytes, temporary | scan: kernels, bytes, temporary | least ms, vmap | scan |
| ---: | --- | --- | --- | ---: | ---: |
| 2 | float32 | 433, 0.91e10, 1.0 GiB | 568, 0.62e10, 0.5 GiB | 3.3 | 2.7 |
| 5 | float32 | 431, 2.28e10, 2.5 GiB | 1,420, 1.56e10, 0.5 GiB | 8.2 | 6.7 |
| 25 | float32 | 439, 11.7e10, 12.2 GiB | 7,100, 7.8e10, 0.9 GiB | 41 | 34 |
| 2 | bfloat16 | 397, 0.48e10, 0.5 GiB | 586, 0.32e10 (twice one member's) | 1.4 | 1.8 |
| 5 | bfloat16 | 398, 1.16e10, 1.3 GiB | 1,465, 0.80e10, 0.3 GiB | 3.5 | 4.4 |
| 25 | bfloat16 | 419, 6.0e10, 6.3 GiB | 7,325, 4.0e10 (25 times one member's) | 18 | 22 |

One member a process takes 284 kernels, 3.11e9 bytes and 0.4 GiB (float32), or 293, 1.60e9 and 0.2 GiB. In float32 arithmetic is
the longest part, and 'scan' the better one; in bfloat16 launches are, and 'vmap' is, as at the configs' batches of 128 (5
members, float32: 2.1 ms against 4.4). Of the CelebA network, 128 images, 5 members take 13 ms in 'vmap' and 10 one after the
other. `choose_execution` follows that. Whether cuDNN's grouped convolutions reach the bandwidth, whether launches overlap, and
what several processes on one GPU make of it, only a GPU can say: `python tests/benchmarks/accelerator.py`."""

DeviceMap = Literal["shard_map", "pmap"]
"""How a function of one device's share is run on all devices."""

REPLICATED = P()
"""The same value on every device."""
SHARDED = P(DATA_AXIS)
"""The leading axis is divided over the devices."""


def data_mesh(
    devices: int | None = None, batch_size: int | None = None, parts: int = 1, among: Sequence[Any] | None = None
) -> Mesh:
    """A one-dimensional mesh over `devices` devices (None: all), along which a batch is shared, in `parts` one after the other.

    They are taken from `among`; None: from those of this machine.

    Raises:
      UserError: more devices asked for than there are, or a batch that does not divide evenly over them.
    """
    available = jax.devices() if among is None else among
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise UserError(f"devices must lie in 1 ... {len(available)} (this machine's), got {devices}.")
    if batch_size is not None and batch_size % (count * parts):
        nearby = max(1, round(batch_size / (count * parts))) * count * parts
        also = f" in {parts} parts (gradient_accumulation)" if parts > 1 else ""
        raise UserError(f"batch_size {batch_size} does not divide over {count} devices{also}; {nearby} would.")
    return Mesh(np.asarray(available[:count]), (DATA_AXIS,))


def sweep_mesh(devices: int | None, members: int, batch_size: int, parts: int = 1, among: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `members` models trained at once: the member axis takes what it can, the data axis the rest.

    The member axis gets the largest divisor of the device count that is at most `members`, if the batch divides over the
    devices left, and the next larger one that it does divide over otherwise. Each device of the axis holds
    `ceil(members / size)` members. Devices are taken as by `data_mesh`; but of CPU devices, which are threads of one machine,
    no more than there are members, unless a number is asked for: to share a batch among them gains nothing.

    Raises:
      UserError: more devices asked for than there are.
    """
    available = data_mesh(devices, among=among).devices.reshape(-1)
    if devices is None and available[0].platform == "cpu":
        available = available[:members]
    count = len(available)
    sizes = [size for size in range(1, count + 1) if count % size == 0 and batch_size % (count // size * parts) == 0]
    size = max((size for size in sizes if size <= members), default=sizes[0])
    return Mesh(available.reshape(size, count // size), (MEMBER_AXIS, DATA_AXIS))


def member_slots(mesh: Mesh, members: int) -> int:
    """Length of the member axis of stacked arrays: `members` rounded up to a multiple of the devices that divide them."""
    size = mesh.shape[MEMBER_AXIS]
    return -(-members // size) * size


def parallelize(
    function: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    donate: tuple[int, ...] = (),
    execution: Execution = "loop",
    shared: tuple[int, ...] = (),
    convolutional: bool = False,
    by: DeviceMap = "shard_map",
) -> Callable:
    """`jit(shard_map(function))` over the mesh, or `pmap(function)`, for one model or for a stack of them.

    Either runs the same function and gives the same numbers. With `shard_map` arrays stay where they are, and the memory of
    donated ones is used again; `pmap` hands replicated arrays to every device at each call.

    `check_vma=False` keeps `pmean` the plain average it is under `pmap`: with checking on, the gradient of replicated
    parameters is already a sum over devices, and averaging it afterwards is silently n times too large.

    Args:
      function: written for one model and one device's share of the batch.
      mesh: of `data_mesh`; of `sweep_mesh` for a stack.
      in_specs: of each argument of one model, over the data axis.
      out_specs: of the results of one model.
      donate: arguments whose memory the result may take.
      execution: 'loop' for one model. With 'scan' or 'vmap' every argument and result has a leading axis of members.
      shared: arguments without that axis, the same for all members.
      convolutional: most of its time goes into convolutions; compiled for them where that takes an option.
      by: 'shard_map', or 'pmap' for one process and devices that share one batch.

    >>> mesh = data_mesh(1)
    >>> mean = lambda x: jax.lax.pmean(jnp.mean(x), DATA_AXIS)
    >>> [float(parallelize(mean, mesh, (SHARDED,), REPLICATED, by=by)(jnp.arange(4.0))) for by in ("shard_map", "pmap")]
    [1.5, 1.5]

    Raises:
      UserError: `pmap` with several processes, or with members divided over devices.
    """
    if execution == "loop":
        over_members, ins, outs = function, in_specs, out_specs
    else:
        over_members = _over_members(function, execution, len(in_specs), shared)
        ins = tuple(spec if i in shared else _with_members(spec) for i, spec in enumerate(in_specs))
        outs = _with_members(out_specs)
    if by == "pmap":
        return _by_pmap(over_members, mesh, ins, outs)
    mapped = jax.shard_map(over_members, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    options = _for_convolutions(mesh.devices.flat[0].platform) if convolutional else None
    return jax.jit(mapped, donate_argnums=donate, compiler_options=options)


def _by_pmap(function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
    """`jax.pmap` over the data axis, of the arrays that the `shard_map` of the same specs takes and to those it gives."""
    if jax.process_count() > 1 or mesh.shape.get(MEMBER_AXIS, 1) > 1:
        raise UserError("pmap is for one process whose devices share one batch; choose shard_map.")
    devices = mesh.shape[DATA_AXIS]

    def by_leaf(change: Callable[[Any, Any], Any], specs: Any, trees: Any) -> Any:
        over = lambda spec, tree: jax.tree.map(lambda leaf: change(spec, leaf), tree)  # noqa: E731
        return jax.tree.map(over, specs, trees, is_leaf=lambda node: isinstance(node, P))

    def axis_of(spec: Any) -> int | None:
        return spec.index(DATA_AXIS) if DATA_AXIS in spec else None

    def split(spec: Any, leaf: Any) -> Any:
        axis = axis_of(spec)
        if axis is None:
            return leaf
        shares = leaf.reshape(*leaf.shape[:axis], devices, leaf.shape[axis] // devices, *leaf.shape[axis + 1 :])
        return jax.device_put(shares, NamedSharding(mesh, P(*(None,) * axis, DATA_AXIS)))

    def join(spec: Any, leaf: Any) -> Any:
        axis = axis_of(spec)
        if axis is not None:
            leaf = leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    axes = [jax.tree.map(axis_of, specs, is_leaf=lambda node: isinstance(node, P)) for specs in (in_specs, out_specs)]
    mapped = jax.pmap(function, DATA_AXIS, in_axes=axes[0], out_axes=axes[1], devices=list(mesh.devices.flat))
    return lambda *arguments: by_leaf(join, out_specs, mapped(*by_leaf(split, in_specs, arguments)))


_ON_CPU: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
"""Matrix products by YNNPACK, convolutions by Eigen: the default has both by YNNPACK, which takes a third longer to train the
paper's network on 2 cores (JAX 0.10.2). Products inside a scan lose by it: linear models took 1.7 times as long."""


@functools.cache
def _for_convolutions(platform: str) -> dict[str, Any] | None:
    """What the compiler is told; None where this JAX no longer knows the option."""
    if platform != "cpu":
        return None
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_ON_CPU).lower().compile()
    except RuntimeError as error:
        if "No such compile option" not in str(error) and "not a valid enum" not in str(error):
            raise
        return None
    return _ON_CPU


def _with_members(specs: Any) -> Any:
    return jax.tree.map(lambda spec: P(MEMBER_AXIS, *spec), specs, is_leaf=lambda node: isinstance(node, P))


def _over_members(
    function: Callable[..., Any], execution: Execution, count: int, shared: tuple[int, ...]
) -> Callable[..., Any]:
    if execution == "vmap":
        return jax.vmap(function, in_axes=tuple(None if i in shared else 0 for i in range(count)))
    own = [i for i in range(count) if i not in shared]

    def scan(*arguments: Any) -> Any:
        def one(members: tuple[Any, ...]) -> Any:
            call = list(arguments)
            for i, value in zip(own, members, strict=True):
                call[i] = value
            return function(*call)

        return jax.lax.map(one, tuple(arguments[i] for i in own))

    return scan


def stack(trees: list[Any], mesh: Mesh, spec: P = REPLICATED) -> Any:
    """The arrays of several models as one tree with a leading axis of members, divided over the member axis of the mesh.

    The last model is repeated where the devices do not divide the members evenly. `spec` is that of the other axes.
    """
    trees = trees + [trees[-1]] * (member_slots(mesh, len(trees)) - len(trees))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return place(stacked, mesh, P(MEMBER_AXIS, *spec))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device of the mesh; never aliases its input, so it may be donated."""
    return place(tree, mesh, REPLICATED)


def place(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The arrays, which every process has, divided over the devices of all of them; never aliases its input."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding, may_alias=False)

    def share(leaf: Any) -> Array:
        if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(share(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(share, tree)


def padded_batches(mesh: Mesh, count: int, batch_size: int, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices `first ... count - 1` in batches of one size, which the devices of the data axis divide evenly.

    Args:
      mesh: with a data axis.
      count: of the examples.
      batch_size: examples in a batch; no more than there are, rounded up to a multiple of the devices.
      first: where to start.

    Yields:
      Indices [B], the last batch filled up with the first examples over again, and weights [B] that are 0 for those.
    """
    devices = mesh.shape[DATA_AXIS]
    batch_size = -(-min(batch_size, count) // devices) * devices
    for start in range(first, count, batch_size):
        positions = np.arange(start, start + batch_size)
        yield positions % count, (positions < count).astype(np.float32)


def keep_compiled_programs(folder: Path) -> None:
    """Keep compiled programs in a folder, for the next command; where `$JAX_COMPILATION_CACHE_DIR` does not name one already.

    Not on a CPU: its programs are of the very processor they were compiled on, and a folder may be shared.

    Raises:
      UserError: JAX_PLATFORMS names what this machine does not have.
    """
    check_platform()
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


def describe_devices(mesh: Mesh | None = None) -> str:
    """`"2 x NVIDIA H200 (gpu)"`, with a word of warning on a CPU where the machine has an accelerator.

    Args:
      mesh: the devices; None: all there are.
    """
    mesh = data_mesh() if mesh is None else mesh
    device = mesh.devices.flat[0]
    missed = unused_accelerator() if device.platform == "cpu" else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.devices.size} x {device.device_kind} ({device.platform}){processes}{missed}"


_OLDEST_DRIVER = {12: 525, 13: 580}
"""Driver that a major version of CUDA needs on Linux (NVIDIA, CUDA Compatibility)."""


def unused_accelerator() -> str:
    """What to do about an accelerator that this JAX does not use; empty where there is none, or a CPU was asked for."""
    if "cpu" in (getattr(jax.config, "jax_platforms", None) or ""):
        return ""
    if Path("/proc/driver/nvidia/version").exists():
        there = next((version for version in (13, 12) if importlib.util.find_spec(f"jax_cuda{version}_plugin")), None)
        remedy = (
            "pip install 'jax[cuda13]'"
            if there is None
            else f"its driver may be older than CUDA {there} needs ({_OLDEST_DRIVER[there]}); nvidia-smi names it. Update it"
            + (", or pip uninstall jax-cuda13-plugin and pip install 'jax[cuda12]'" if there == 13 else "")
        )
        return f"; WARNING: this machine has an NVIDIA GPU that JAX does not use: {remedy}"
    if os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("COLAB_TPU_ADDR") or Path("/dev/accel0").exists():
        return "; WARNING: this machine has a TPU that JAX does not use: pip install 'jax[tpu]'"
    return ""


MEMORY_SHARE = 0.85
"""Share of the free memory that is planned with; the rest is left to evaluation, transfers and fragmentation."""


def memory_bytes(mesh: Mesh) -> int:
    """All memory of each device of the mesh."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # all CPU devices share the machine's memory
        return int(psutil.virtual_memory().total / len(mesh.local_devices))
    return int(device.memory_stats()["bytes_limit"])


def available_bytes(mesh: Mesh) -> int:
    """Memory that may be planned with on each device of the mesh: a share of what is free now."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # all CPU devices share the machine's memory
        return int(MEMORY_SHARE * psutil.virtual_memory().available / len(mesh.local_devices))
    stats = device.memory_stats()
    return int(MEMORY_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
