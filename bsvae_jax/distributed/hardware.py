"""What computes: the platforms that JAX knows, and published peaks of accelerators, per chip, from which a roofline is drawn.

Sources: the manufacturers' data sheets; for TPUs Google Cloud's system architecture pages and, for v2 and v3, Jouppi et al.
2020 ("A domain-specific supercomputer for training deep neural networks"). Dense matrix products, without sparsity.
"""

import os
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bsvae_jax.errors import UserError

Precision = Literal["float32", "tensorfloat32", "bfloat16"]

BFLOAT16_PRODUCTS = 6
"""bfloat16 products that a TPU takes for one of full float32 precision (`jax.lax.Precision.HIGHEST`); half as many for one of
`HIGH`, which is TensorFloat-32 on GPUs."""


def activations(precision: Precision) -> Any:
    """The type of a network's activations."""
    return jnp.dtype("bfloat16" if precision == "bfloat16" else "float32")


class Chip(NamedTuple):
    """Peaks of one chip. A JAX device may be half of one (TPU v2, v3, v4)."""

    name: str
    bfloat16: float | None
    """FLOP/s of matrix products of bfloat16; None: it has none, and no TensorFloat-32."""
    tensorfloat32: float | None
    """FLOP/s of matrix products of float32 with rounded factors: TensorFloat-32, on TPUs three products of bfloat16."""
    float32: float
    """FLOP/s of matrix products at full float32 precision."""
    bandwidth: float
    """Bytes per second between the chip and its memory."""
    memory: float
    """Bytes."""
    network: float
    """Bytes per second between this chip and the others, both directions together."""

    def peak(self, precision: Precision) -> float:
        """FLOP/s of matrix products in a precision; those of float32 where the chip has no other."""
        return getattr(self, precision) or self.float32


def _tpu(name: str, teraflops: float, gigabytes_per_second: float, gibibytes: float, gigabits_per_second: float) -> Chip:
    flops = teraflops * 1e12
    products = (flops, 2 * flops / BFLOAT16_PRODUCTS, flops / BFLOAT16_PRODUCTS)
    return Chip(name, *products, gigabytes_per_second * 1e9, gibibytes * 2**30, gigabits_per_second * 1e9 / 8)


def _gpu(
    name: str,
    bfloat16: float | None,
    float32: float,
    gigabytes_per_second: float,
    gigabytes: float,
    network: float,
) -> Chip:
    half = None if bfloat16 is None else bfloat16 * 1e12
    rounded = None if half is None else half / 2  # of all that have both, by their data sheets
    return Chip(name, half, rounded, float32 * 1e12, gigabytes_per_second * 1e9, gigabytes * 1e9, network * 1e9)


CHIPS: dict[str, Chip] = {
    "TPU v2": _tpu("TPU v2", 46.0, 700.0, 16.0, 1984.0),
    "TPU v3": _tpu("TPU v3", 123.0, 900.0, 32.0, 2624.0),
    "TPU v4": _tpu("TPU v4", 275.0, 1228.0, 32.0, 2400.0),
    "TPU v5 lite": _tpu("TPU v5e", 197.0, 819.0, 16.0, 1600.0),
    "TPU v5": _tpu("TPU v5p", 459.0, 2765.0, 95.0, 4800.0),
    "TPU v6 lite": _tpu("TPU v6e", 918.0, 1640.0, 32.0, 3584.0),
    "Tesla T4": _gpu("T4", None, 8.1, 320.0, 16.0, 32.0),
    "Tesla V100-SXM2-16GB": _gpu("V100", None, 15.7, 900.0, 16.0, 300.0),
    "NVIDIA L4": _gpu("L4", 121.0, 30.3, 300.0, 24.0, 64.0),
    "NVIDIA A100-SXM4-40GB": _gpu("A100 40 GB", 312.0, 19.5, 1555.0, 40.0, 600.0),
    "NVIDIA A100-SXM4-80GB": _gpu("A100 80 GB", 312.0, 19.5, 2039.0, 80.0, 600.0),
    "NVIDIA H100 80GB HBM3": _gpu("H100", 989.0, 67.0, 3350.0, 80.0, 900.0),
    "NVIDIA H200": _gpu("H200", 989.0, 67.0, 4800.0, 141.0, 900.0),
}
"""By the `device_kind` that JAX reports."""

TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v2": ("2x2x1", "4x4x1", "8x8x1", "16x16x1"),
    "v3": ("2x2x1", "4x4x1", "8x8x1", "16x16x1"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
"""Arrangements of chips in which each kind of TPU is rented; 1x1 is one chip of the smallest."""


_PLATFORMS = {
    "cuda": "needs an NVIDIA GPU, its driver, and JAX built for it: pip install -U 'jax[cuda13]'",
    "gpu": "needs a GPU, its driver, and JAX built for it: pip install -U 'jax[cuda13]'",
    "tpu": "needs a machine with TPUs, and JAX built for them: pip install -U 'jax[tpu]'",
}


def check_platform() -> None:
    """Start JAX's backend.

    Raises:
      UserError: JAX_PLATFORMS names what this machine does not have.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX's own: it has the plugin, and finds no GPU
        wanted = getattr(jax.config, "jax_platforms", None) or "the platform"
        names = [name for name in wanted.split(",") if name in _PLATFORMS]
        remedy = "; ".join(f"{name} {_PLATFORMS[name]}" for name in names) or "known platforms are cpu, cuda, gpu and tpu"
        raise UserError(
            f"JAX cannot use {wanted} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}) on this machine: {remedy}. Without "
            "JAX_PLATFORMS it takes the best that there is, and JAX_PLATFORMS=cpu the processor."
        ) from error


def check_precision(precision: Precision, device_kind: str) -> None:
    """Raise a UserError where a chip that is known has no such products: it would compute in float32 all the same."""
    chip = CHIPS.get(device_kind)
    if chip is not None and getattr(chip, precision) is None:
        raise UserError(f"{device_kind} has no {precision}; train in float32 there (--precision float32).")


def known_topologies() -> str:
    """All of them, for a message."""
    return "; ".join(f"{kind}: {' '.join(shapes)}" for kind, shapes in TOPOLOGIES.items())


def memory_sizes(compiled: Any) -> tuple[int, int, int]:
    """Bytes of arguments, results and temporary arrays of a compiled program, as in its `ProgramCost`; the sum is its peak."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(sizes.argument_size_in_bytes), int(results), int(sizes.temp_size_in_bytes)
