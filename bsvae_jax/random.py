"""Random numbers that do not depend on how a batch is spread over devices.

Each example of the global batch has its own key, made from its position in it. One device or eight, `pmap` or `shard_map`,
draw the same noise for the same example.

Every draw states its type, here and elsewhere: the type that JAX chooses, and with it the numbers, depends on JAX_ENABLE_X64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bsvae_jax.errors import UserError

IMPLEMENTATION = "threefry2x32"
"""Of every key that is made here, whatever `JAX_DEFAULT_PRNG_IMPL` says: another draws other numbers from the same seed."""


def make_key(seed: int) -> Key[Array, ""]:
    """The key of a seed: `jax.random.key` of `IMPLEMENTATION`.

    >>> with jax.default_prng_impl("rbg"):
    ...     print(jax.random.key_impl(make_key(0)))
    threefry2x32
    """
    return jax.random.key(seed, impl=IMPLEMENTATION)


def wrap_key(data: Any) -> Key[Array, "..."]:
    """The key, or keys, of which a checkpoint or a file holds the `jax.random.key_data`."""
    return jax.random.wrap_key_data(data, impl=IMPLEMENTATION)


def check_key(key: Any, batch: int | None = None) -> None:
    """Raise a UserError unless `key` is one key of `jax.random.key`, or, given `batch`, one for each example."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        given = f"{key.dtype} of shape {key.shape}" if isinstance(key, jax.Array) else repr(key)
        raise UserError(f"key must be made by jax.random.key (jax.random.PRNGKey makes plain numbers), got {given}.")
    if str(jax.random.key_impl(key)) != IMPLEMENTATION:
        raise UserError(
            f"key must be of {IMPLEMENTATION}, whose numbers for an example do not depend on the others of its batch: "
            f"jax.random.key(seed, impl={IMPLEMENTATION!r}); got one of {jax.random.key_impl(key)}."
        )
    if key.shape not in ((), *(() if batch is None else ((batch,),))):
        wanted = "one key" if batch is None else f"one key, or one for each of the {batch} images,"
        raise UserError(f"key must be {wanted} got keys of shape {key.shape}.")


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
    """Numbers uniform over -1/2 ... 1/2, `[B, *shape]`, each example from `fold_in(key, number)`: dequantization noise.

    Folded, so that it is apart from the posterior sample, which takes the key itself.
    """

    def uniform(key: Key[Array, ""]) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, minval=-0.5, maxval=0.5)

    return jax.vmap(uniform)(keys)


def normal_per_example(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Standard normal numbers `[B, *shape]`, each example from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
