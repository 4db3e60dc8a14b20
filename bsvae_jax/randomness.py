"""Random numbers that do not depend on how a batch is spread over devices.

Each example of the global batch has its own key, made from its position in it. One device or eight, `pmap` or `shard_map`,
draw the same noise for the same example.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def example_positions(share: int, axis_name: str | None = None) -> Int[Array, " share"]:
    """Positions in the global batch of this device's `share` of examples; `0 ... share - 1` without a device axis."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * share
    return first + jnp.arange(share)


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
