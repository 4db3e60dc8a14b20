"""Random numbers that do not depend on how a batch is spread over devices.

Each example of the global batch has its own key, made from its position in it. One device or eight, `pmap` or `shard_map`,
draw the same noise for the same example.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


def example_positions(share: int, axis_name: str | None = None, parts: int = 1) -> Int[Array, " share"]:
    """Positions in the global batch of this device's `share` of examples; `0 ... share - 1` without a device axis.

    A batch that is taken in `parts`, one after the other, is cut into parts first, and each of them is divided over the
    devices: a part then holds the same examples on any number of devices.
    """
    if axis_name is None:
        return jnp.arange(share)
    own, devices = share // parts, jax.lax.axis_size(axis_name)
    starts = jnp.arange(parts) * (own * devices) + jax.lax.axis_index(axis_name) * own
    return (starts[:, None] + jnp.arange(own)[None]).reshape(share)


def arranged(batch_size: int, devices: int, parts: int) -> np.ndarray:
    """The order of a batch in which equal slices of it are the devices' shares of `example_positions`, [batch_size]."""
    return np.arange(batch_size).reshape(parts, devices, -1).swapaxes(0, 1).reshape(-1)


def example_keys(key: Key[Array, ""], positions: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """One key per example, `fold_in(key, position)`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def uniform_per_example(keys: Key[Array, " batch"], number: int, shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Numbers uniform over -1/2 ... 1/2, `[B, *shape]`, each example from `fold_in(key, number)`: dequantisation noise.

    Folded, so that it is apart from the posterior sample, which takes the key itself.
    """
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-0.5, maxval=0.5))(keys)


def normal_per_example(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Standard normal numbers `[B, *shape]`, each example from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
