"""The switches of JAX that decide to which numbers a run comes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bsvae_jax._io.terminal import log

SWITCHES = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision", "jax_disable_jit")
"""Of JAX, by which the same run comes to other numbers."""


def switches() -> dict[str, Any]:
    """How the `SWITCHES` are set now."""
    return {name: getattr(jax.config, name) for name in SWITCHES}


def check_switches(folder: Path, began_under: Mapping[str, Any]) -> None:
    """Warn if JAX does not draw and round as it did when the run in `folder` began."""
    changed = [
        f"{name.upper()} was {began_under[name]} and is {now}"
        for name, now in switches().items()
        if began_under.get(name, now) != now
    ]
    if changed:
        log.warning(
            f"{folder} began under other switches of JAX ({'; '.join(changed)}): random numbers and rounding differ. Set them "
            "back for the numbers that it would have come to."
        )
