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

from bsvae_jax.data import ShuffledOrder
from bsvae_jax.data.image_set import Examples
from bsvae_jax.distributed.mesh import SHARDED, P, memory_bytes, replicate

WINDOW_BYTES = 2**26
"""Of the images that are streamed to the devices in one piece, about."""

UNRELEASED = 2**24
"""Bytes read from a memory map before it is given back; the system may have mapped some times as many around them."""

AHEAD = 2
"""Pieces on their way to the devices while one is used."""


def fits(size: int, mesh: Mesh, share: float) -> bool:
    """Whether images of `size` bytes, both splits together, fit into this share of the memory of each device.

    Of all the memory, not of what is free now: the answer is the same whenever it is asked on the same machine.
    """
    return size <= share * memory_bytes(mesh)


def gather(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """`images[indices]`.

    Raises:
      IndexError: an index out of range, negative ones included.
    """
    if indices.size and not 0 <= indices.min() <= indices.max() < len(images):
        raise IndexError(f"indices {indices.min()} ... {indices.max()} of {len(images)} images")
    found = np.empty((*indices.shape, *images.shape[1:]), images.dtype)
    np.take(images, indices, axis=0, out=found, mode="clip")  # without `mode` it checks again, and takes five times as long
    return found


def rows_at(resident: Examples, indices: Any, image_shape: tuple[int, ...]) -> Examples:
    """Examples at `indices` [B] of those that lie on the device: of images flattened, [N, D], and of labels [N] beside them."""
    return jax.tree.map(lambda array: array[indices].reshape(-1, *image_shape) if array.ndim > 1 else array[indices], resident)


class HostImages:
    """Images in the host's memory or a memory map, of which about `UNRELEASED` bytes stay resident after they were read."""

    def __init__(self, images: np.ndarray):
        """`images` [N, H, W, C], or labels [N]."""
        self.images, self._read = images, 0
        mode: str | None = None
        base: Any = images
        while isinstance(base, np.ndarray):
            mode, base = getattr(base, "mode", mode), base.base  # of the memory map itself in the end
        # Not of a copy on write: pages that it gave back would be read from the file again, without its changes.
        self._map = base if isinstance(base, mmap.mmap) and mode in ("r", "r+", "w+") else None

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images at `indices`, of any shape."""
        found = gather(self.images, indices)
        self._read += found.nbytes
        if self._map is not None and self._read > UNRELEASED:
            self._map.madvise(mmap.MADV_DONTNEED)  # of the map, not of the page cache
            self._read = 0
        return found

    def place(self, indices: np.ndarray, sharding: NamedSharding) -> Array:
        """The images at `indices` over the devices; every process gathers what its own devices hold, and nothing else."""

        def part(index: Any) -> np.ndarray:
            return self.gather(indices[index[: indices.ndim]])

        return jax.make_array_from_callback((*indices.shape, *self.images.shape[1:]), sharding, part)


class DeviceImages:
    """The images of one split as the devices are given them: a copy on every device, or batch by batch from the host."""

    def __init__(self, examples: Examples, mesh: Mesh, resident: bool = True):
        """`examples` of `ImageSet.examples`, [N, ...]; `resident`: copy all of them to every device of the mesh now."""
        self._host, self.mesh = jax.tree.map(HostImages, examples), mesh
        self._shape = examples.images.shape
        flat = jax.tree.map(lambda array: array.reshape(len(array), -1) if array.ndim > 1 else array, examples)
        self.resident: Any = replicate(flat, mesh) if resident else None
        """Images flattened, [N, H * W * C], on every device, with their labels where they have them; None if streamed."""

    def __len__(self) -> int:
        """N."""
        return self._shape[0]

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self._shape[1:]

    def batch(self, indices: np.ndarray) -> Examples:
        """The examples at `indices` [B], as stored, [B, ...], divided over the data axis of the mesh."""
        if self.resident is not None:
            return _gather_resident(self.mesh, self.data_shape)(self.resident, indices)
        sharding = NamedSharding(self.mesh, SHARDED)
        return jax.tree.map(lambda part: part.place(np.asarray(indices), sharding), self._host)


@functools.cache
def _gather_resident(mesh: Mesh, image_shape: tuple[int, ...]) -> Any:
    gather_rows = functools.partial(rows_at, image_shape=image_shape)
    return jax.jit(gather_rows, out_shardings=NamedSharding(mesh, SHARDED))


def streamed_window(image_bytes: int, batch_size: int, members: int, most: int) -> int:
    """Steps whose batches are sent in one piece: as many as `WINDOW_BYTES` hold, 1 to `most`.

    Args:
      image_bytes: of one image, as stored.
      batch_size: images in a step.
      members: models that each take batches of their own.
      most: upper limit.
    """
    return max(1, min(most, WINDOW_BYTES // (image_bytes * batch_size * members)))


class Stream:
    """Batches of training images, gathered by a thread of their own while the devices compute."""

    def __init__(
        self,
        examples: Examples,
        orders: Sequence[ShuffledOrder],
        mesh: Mesh,
        spec: P,
        steps: int,
        starts: Iterator[int],
        arrangement: np.ndarray | None = None,
    ):
        """Opens the stream; use it in a `with` block.

        Args:
          examples: [N, ...] as stored, a memory map for instance.
          orders: of each member; one for a model without a member axis.
          mesh: of the devices.
          spec: of the pieces: [steps, B, H, W, C], or [members, steps, B, H, W, C].
          steps: in a piece.
          starts: the first step of each piece, in order.
          arrangement: order of the images within a batch, [B]; None: as the orders have them.
        """
        self._host, self._steps, self._starts = jax.tree.map(HostImages, examples), steps, starts
        self._arrangement = slice(None) if arrangement is None else arrangement
        self._orders = [order.on_host() for order in orders]
        self._sharding, self._stacked = NamedSharding(mesh, spec), len(spec) == 3
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "images")
        self._coming: collections.deque[tuple[int, concurrent.futures.Future[Examples]]] = collections.deque()
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

    def _piece(self, start: int) -> Examples:
        indices = [np.asarray(order(start, self._steps))[:, self._arrangement] for order in self._orders]
        wanted = np.stack(indices) if self._stacked else indices[0]
        return jax.tree.map(lambda part: part.place(wanted, self._sharding), self._host)

    def take(self, step: int) -> Examples:
        """The piece that begins at `step`, which must be the next one."""
        start, piece = self._coming.popleft()
        if start != step:
            raise ValueError(f"the next piece begins at step {start}, not {step}")
        begun = time.perf_counter()
        images = piece.result()
        self.waited += time.perf_counter() - begun
        self._send()
        return images
