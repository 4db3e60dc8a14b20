"""The order in which training sees the data: a fresh permutation every epoch, cut into batches without a remainder."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from bsvae_jax.errors import check_count
from bsvae_jax.random import check_key


class ShuffledOrder:
    """Indices of the examples of every step, on the device; depends on the key and the step alone.

    Epochs are permutations laid end to end and cut into batches, so a batch may straddle two epochs, every example is seen
    exactly once an epoch, and nothing is dropped. Any step can be asked for, so a resumed run needs no replay.

    >>> order = ShuffledOrder(jax.random.key(0), examples=3, batch_size=2)
    >>> order(0, 3).shape
    (3, 2)
    >>> sorted(order(0, 3).ravel().tolist())  # 3 steps of 2 are 2 epochs of 3
    [0, 0, 1, 1, 2, 2]

    Raises:
      UserError: something else than a key, or a number below 1.
    """

    def __init__(self, key: Key[Array, ""], examples: int, batch_size: int):
        """`examples` in the training set, `batch_size` over all devices together."""
        check_key(key)
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            check_count(name, value)
        self._key, self._examples, self._batch_size = key, examples, batch_size
        self._epochs: dict[int, Int[Array, " examples"]] = {}

    def _epoch(self, epoch: int) -> Int[Array, " examples"]:
        if epoch not in self._epochs:
            self._epochs[epoch] = jax.random.permutation(
                jax.random.fold_in(self._key, epoch), jnp.arange(self._examples, dtype=jnp.int32)
            )
        return self._epochs[epoch]

    def on_host(self) -> "ShuffledOrder":
        """The same order, computed by the host's processor, where it waits for no step of training."""
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it out
            return self
        return ShuffledOrder(jax.device_put(self._key, host), self._examples, self._batch_size)

    def __call__(self, step: int, count: int) -> Int[Array, "count batch"]:
        """Indices for steps `step ... step + count - 1`, [count, batch_size]."""
        first, offset = divmod(step * self._batch_size, self._examples)
        epochs = -(-count * self._batch_size // self._examples) + 1  # as many as the window can touch
        self._epochs = {epoch: order for epoch, order in self._epochs.items() if epoch >= first}
        permutations = [self._epoch(first + epoch) for epoch in range(epochs)]
        return _window(permutations, offset, count, self._batch_size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _window(
    permutations: list[Int[Array, " examples"]], offset: int | Int[Array, ""], count: int, batch_size: int
) -> Int[Array, "count batch"]:
    """Compiled once for a run: the offset is traced."""
    positions = offset + jnp.arange(count * batch_size)
    return jnp.concatenate(permutations)[positions].reshape(count, batch_size)


def steps_through(epochs: int, examples: int, batch_size: int) -> int:
    """Steps after which every example has been seen `epochs` times: `ceil(epochs * examples / batch_size)`."""
    return -(-epochs * examples // batch_size)
