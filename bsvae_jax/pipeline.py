"""From stored images to batches on the devices: resident, or streamed from the host with the next ones on their way.

Which images make a batch is decided by `data.ShuffledOrder` alone, so both ways give the same batches on any number of
devices and processes; each process reads only what its own devices need.
"""

import collections
import concurrent.futures
import functools
import mmap
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bsvae_jax.data import ImageSet, ShuffledOrder
from bsvae_jax.parallel import SHARDED, P, memory_bytes, replicate

WINDOW_BYTES = 2**26
"""Of the images that are streamed to the devices in one piece, about."""

AHEAD = 2
"""Pieces on their way to the devices while one is used."""


def fits(images: ImageSet, mesh: Mesh, share: float) -> bool:
    """Whether both splits fit into this share of the memory of each device; known from their sizes, without reading them.

    Of all the memory, not of what is free now: the answer is the same whenever it is asked on the same machine.
    """
    return images.train.nbytes + images.test.nbytes <= share * memory_bytes(mesh)


def gather(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """`images[indices]`; what a memory map has read is given back, so that resident memory does not grow with the set."""
    found = images[indices]
    base: Any = images
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
    return found


class DeviceImages:
    """The images of one split as the devices are given them: a copy on every device, or batch by batch from the host."""

    def __init__(self, images: np.ndarray, mesh: Mesh, resident: bool = True):
        """`images` [N, H, W, C] as stored; `resident`: copy all of them to every device of the mesh now."""
        self._images, self._mesh = images, mesh
        self.resident: Array | None = replicate(images, mesh) if resident else None
        """[N, H, W, C] on every device; None if they are streamed."""

    def __len__(self) -> int:
        """N."""
        return len(self._images)

    def batch(self, indices: np.ndarray) -> Array:
        """The images at `indices` [B], as stored, [B, H, W, C], divided over the data axis of the mesh."""
        if self.resident is not None:
            return _gather_resident(self._mesh)(self.resident, indices)
        return _place(self._images, np.asarray(indices), NamedSharding(self._mesh, SHARDED))


@functools.cache
def _gather_resident(mesh: Mesh) -> Any:
    return jax.jit(lambda images, indices: images[indices], out_shardings=NamedSharding(mesh, SHARDED))


def _place(images: np.ndarray, indices: np.ndarray, sharding: NamedSharding) -> Array:
    """`images[indices]` over the devices; every process gathers what its own devices hold, and nothing else."""
    shape = (*indices.shape, *images.shape[1:])

    def part(index: Any) -> np.ndarray:
        return gather(images, indices[index[: indices.ndim]])

    return jax.make_array_from_callback(shape, sharding, part)


def streamed_steps(images: np.ndarray, batch_size: int, members: int, most: int) -> int:
    """Steps whose batches are sent in one piece: as many as `WINDOW_BYTES` hold, 1 to `most`.

    Args:
      images: [N, H, W, C] as stored.
      batch_size: images in a step.
      members: models that each take batches of their own.
      most: upper limit.
    """
    return max(1, min(most, WINDOW_BYTES // (images[0].nbytes * batch_size * members)))


class Stream:
    """Batches of training images, gathered by a thread of their own while the devices compute."""

    def __init__(
        self, images: np.ndarray, orders: Sequence[ShuffledOrder], mesh: Mesh, spec: P, steps: int, starts: Iterator[int]
    ):
        """Opens the stream; use it in a `with` block.

        Args:
          images: [N, H, W, C] as stored, a memory map for instance.
          orders: of each member; one for a model without a member axis.
          mesh: of the devices.
          spec: of the pieces: [steps, B, H, W, C], or [members, steps, B, H, W, C].
          steps: in a piece.
          starts: the first step of each piece, in order.
        """
        self._images, self._steps, self._starts = images, steps, starts
        self._orders = [order.on_host() for order in orders]
        self._sharding, self._stacked = NamedSharding(mesh, spec), len(spec) == 3
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "images")
        self._coming: collections.deque[tuple[int, concurrent.futures.Future[Array]]] = collections.deque()
        self.waited = 0.0
        """Seconds that `take` has waited for images."""

    def __enter__(self) -> "Stream":
        """Sends the first pieces on their way."""
        self._send()
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives up what is on its way."""
        self._pool.shutdown(cancel_futures=True)

    def _send(self) -> None:
        while len(self._coming) <= AHEAD and (start := next(self._starts, None)) is not None:
            self._coming.append((start, self._pool.submit(self._piece, start)))

    def _piece(self, start: int) -> Array:
        indices = [np.asarray(order(start, self._steps)) for order in self._orders]
        return _place(self._images, np.stack(indices) if self._stacked else indices[0], self._sharding)

    def take(self, step: int) -> Array:
        """The piece that begins at `step`, which must be the next one."""
        start, piece = self._coming.popleft()
        if start != step:
            raise ValueError(f"the next piece begins at step {start}, not {step}")
        begun = time.perf_counter()
        images = piece.result()
        self.waited += time.perf_counter() - begun
        self._send()
        return images
