"""Beginning with the weights of another run: which of them fit, and what a run keeps of where it began.

A run that began from another has the weights it took in a file of its own, so that it can be continued, or begun again, when
the other is gone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax._io.files import as_path
from bsvae_jax.errors import UserError
from bsvae_jax.models.pytorch import flatten, unflatten
from bsvae_jax.training.step import TrainState

FILE = "start.npz"
"""What the weights that were taken are called in the folder of the run that took them."""

SHOWN = 5
"""Layers that a sentence names."""


class Source(NamedTuple):
    """A run that others begin from."""

    name: str
    """For sentences."""
    arrays: dict[str, np.ndarray]
    """The weights that it is evaluated with, by names like `params.encoder.posterior.kernel`."""
    record: dict[str, Any]
    """Its workdir, identity and step, and the SHA-256 of those weights."""


class Start(NamedTuple):
    """What a run begins with in place of weights drawn from its seed."""

    arrays: dict[str, np.ndarray]
    """The weights that it takes, by name."""
    record: dict[str, Any]
    """For `config.json`: that of the `Source`, and the names of the arrays that were taken and that start anew."""
    sentence: str
    """All of that for people."""


def _place(name: str) -> str:
    """`encoder.posterior.kernel` of `params.encoder.posterior.kernel`."""
    return name.partition(".")[2]


def _layer(name: str) -> str:
    """`encoder.posterior` of that, '' of the trained log-variance."""
    return _place(name).rpartition(".")[0]


def fitting(shapes: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the arrays to take: those of the layers of which every array is there, in the same shape.

    A bias is of no use to another kernel, nor are the statistics of a BatchNorm to another scale: a layer is taken whole.

    Args:
      shapes: of the run's own arrays, by name.
      other: of those of the run that it begins from.

    >>> own = {"params.encoder.out.kernel": (64, 8), "params.encoder.out.bias": (8,), "params.decoder.in.bias": (5,)}
    >>> fitting(own, own | {"params.encoder.out.kernel": (64, 4)})
    ['params.decoder.in.bias']
    """
    anew = {_layer(name) for name, shape in shapes.items() if other.get(name) != shape}
    return [name for name in shapes if _layer(name) not in anew]


def take(shapes: Mapping[str, tuple[int, ...]], source: Source) -> Start:
    """The weights of `source` that fit into a model of these `shapes`, by name.

    Raises:
      UserError: no layer of the encoder or the decoder fits.
    """
    there = {name: tuple(array.shape) for name, array in source.arrays.items()}
    taken = fitting(shapes, there)
    anew = [name for name in shapes if name not in taken]
    unlike = {
        _layer(name) or _place(name): f"{name.rpartition('.')[2]} is {shapes[name]} here and {there.get(name, 'absent')} there"
        for name in anew
        if there.get(name) != shapes[name]
    }
    differing = _listed([f"{layer} ({why})" for layer, why in unlike.items()])
    if not any(name.startswith(("params.encoder.", "params.decoder.")) for name in taken):
        raise UserError(
            f"{source.name} is of another network, of which no layer fits: {differing}. Give a run of this config's network."
        )
    arrays = {name: source.arrays[name] for name in taken}
    count = sum(array.size for array in arrays.values())
    sentence = f"Beginning with the weights of {source.name}: {len(taken)} of {len(shapes)} arrays, {count:,} numbers."
    if anew:
        sentence += f" These layers start anew: {differing}."
    if left := dict.fromkeys(_layer(name) or _place(name) for name in there if name not in shapes):
        sentence += f" These have no place here: {_listed(list(left))}."
    return Start(arrays, {**source.record, "taken": taken, "anew": anew}, sentence)


def _listed(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def begin_with(state: TrainState, arrays: Mapping[str, Any]) -> TrainState:
    """The state before the first step with these weights, by name, in place of its own; the optimizer starts anew."""
    own = flatten({"params": state.params, "batch_stats": state.batch_stats})
    variables = unflatten(own | {name: jnp.asarray(array, own[name].dtype) for name, array in arrays.items()})
    params = variables["params"]
    return state.replace(
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        optimizer_state=jax.jit(state.optimizer.init)(params),
        ema_params=None if state.ema_params is None else jax.tree.map(jnp.copy, params),
    )


def check_beginning(workdir: Path, record: Mapping[str, Any] | None, start_from: str | Path) -> None:
    """Raise a UserError unless what is in `workdir` began from the run at `start_from`, as its `record` says."""
    place = str(as_path(start_from, "start_from").resolve())
    if record is None or record["workdir"] != place:
        began = "with weights drawn from its seed" if record is None else f"from {record['workdir']}"
        raise UserError(
            f"{workdir} began {began}, not from {place}. Leave out --start-from to continue it, or choose another --workdir."
        )
