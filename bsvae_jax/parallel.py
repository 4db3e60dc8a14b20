"""Devices: the mesh, and the lift of a function written for one device's share of the batch over all of them.

A step is written with a named axis `"data"` and explicit averages over it. `lift` runs it under `jit(shard_map)`;
`jax.pmap(step, axis_name="data")` runs the same function on stacked copies of the state.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsvae_jax.errors import UserError

DATA_AXIS = "data"
"""Name of the axis of the devices that share a batch."""

REPLICATED = P()
"""The same value on every device."""
SHARDED = P(DATA_AXIS)
"""The leading axis is divided over the devices."""


def data_mesh(devices: int | None = None, batch_size: int | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` devices (None: all), along which a batch is shared.

    Raises:
      UserError: more devices asked for than there are, or a batch that does not divide evenly over them.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise UserError(f"devices must lie in 1 ... {len(available)} (this machine's), got {devices}.")
    if batch_size is not None and batch_size % count:
        nearby = max(1, round(batch_size / count)) * count
        raise UserError(f"batch_size {batch_size} does not divide over {count} devices; {nearby} would.")
    return Mesh(np.asarray(available[:count]), (DATA_AXIS,))


def lift(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, donate: tuple[int, ...] = ()) -> Callable:
    """`jit(shard_map(function))` over the mesh. `donate`: arguments whose memory the result may take.

    `check_vma=False` keeps `pmean` the plain average it is under `pmap`: with checking on, the gradient of replicated
    parameters is already a sum over devices, and averaging it afterwards is silently n times too large.
    """
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device of the mesh; never aliases its input, so it may be donated."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED), may_alias=False)


def describe_devices(mesh: Mesh) -> str:
    """`"2 x NVIDIA H200 (gpu)"`."""
    device = mesh.devices.flat[0]
    return f"{mesh.devices.size} x {device.device_kind} ({device.platform})"
