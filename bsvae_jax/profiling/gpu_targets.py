"""GPUs that need not be there: what XLA has to know of one to compile for it.

Published figures. Per SM: the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide. The
float32 units, the number of SMs, the L2 cache and the boost clock: NVIDIA's whitepapers of each architecture (Turing, Ampere
A100, Ada, Hopper). Bandwidth and memory are those of `CHIPS`.
"""

import functools
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from bsvae_jax.distributed.hardware import CHIPS
from bsvae_jax.errors import UserError

LAUNCH = 3e-6
"""Seconds that the host takes to launch one kernel, in round numbers."""

WITHOUT_AUTOTUNING = {"xla_gpu_autotune_level": 0}
"""Compiler options where there is no GPU to try algorithms on."""

_OLDEST_JAX = (0, 12)


class _Architecture(NamedTuple):
    """Of one SM."""

    capability: tuple[int, int]
    float32_units: int
    threads: int
    shared_memory: int
    """KiB."""
    block_memory: int
    """KiB of it that one block of threads may ask for."""


class _Target(NamedTuple):
    device_kind: str
    architecture: _Architecture
    multiprocessors: int
    l2_cache: int
    """MiB."""
    clock: float
    """GHz."""


_TURING = _Architecture((7, 5), 64, 1024, 64, 64)
_AMPERE = _Architecture((8, 0), 64, 2048, 164, 163)
_ADA = _Architecture((8, 9), 128, 1536, 100, 99)
_HOPPER = _Architecture((9, 0), 128, 2048, 228, 227)

TARGETS = {
    "t4": _Target("Tesla T4", _TURING, 40, 4, 1.59),
    "a100": _Target("NVIDIA A100-SXM4-40GB", _AMPERE, 108, 40, 1.41),
    "l4": _Target("NVIDIA L4", _ADA, 58, 48, 2.04),
    "h100": _Target("NVIDIA H100 80GB HBM3", _HOPPER, 132, 50, 1.98),
    "h200": _Target("NVIDIA H200", _HOPPER, 132, 50, 1.98),
}
"""By the name of a topology; h100x8 is a host with eight."""

COUNTS = (1, 2, 4, 8)
"""GPUs of one host."""


def known_gpus() -> str:
    """All of them, for a message."""
    return f"{' '.join(TARGETS)}, or several of one host, h100x2 h100x4 h100x8"


def target_config(name: str) -> str:
    """What XLA is told of a GPU, a `GpuTargetConfigProto` as text; cuDNN and CUDA are of the versions JAX is built with."""
    kind, architecture, multiprocessors, l2_cache, clock = TARGETS[name]
    (major, minor), units, threads, shared, block = architecture
    chip = CHIPS[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {block * 1024}
  core_count: {multiprocessors} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {l2_cache * 2**20}
  memory_bandwidth: {chip.bandwidth:.0f} device_memory_size: {chip.memory:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
"""


def split_name(topology: str) -> tuple[str, int] | None:
    """Chip and number of one host's GPUs of a name such as 'h100x8'; None where it names no GPU of `TARGETS`.

    >>> split_name("h100x8"), split_name("l4"), split_name("v5e:2x4")
    (('h100', 8), ('l4', 1), None)

    Raises:
      UserError: a number of GPUs that no host has.
    """
    name, _, count = topology.partition("x")
    if name not in TARGETS or not re.fullmatch(r"(x\d+)?", topology.removeprefix(name)):
        return None
    if int(count or 1) not in COUNTS:
        raise UserError(f"A host has 1, 2, 4 or 8 GPUs, {topology} asks for {count}.")
    return name, int(count or 1)


@functools.cache
def gpu_devices(name: str, count: int) -> tuple[Any, ...]:
    """Devices to compile for, of one host with `count` GPUs. Call it before JAX has looked for GPUs of its own.

    Raises:
      UserError: JAX is too old, or has no CUDA.
    """
    plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if jax.__version_info__ < _OLDEST_JAX or not plugin:
        found = "JAX has none here" if not plugin else f"this is JAX {jax.__version__}"
        raise UserError(
            "Compiling for GPUs needs JAX 0.12 (Python 3.12) with CUDA, also where there is no GPU, and "
            f"{found}: pip install -U 'bsvae_jax[cuda]' 'jax>=0.12'."
        )
    # Without a driver the plugin's check of versions fails, and JAX leaves it out.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    described = topologies.get_topology_desc(platform="cuda", target_config=target_config(name), topology=f"1x1x{count}")
    return tuple(described.devices)
