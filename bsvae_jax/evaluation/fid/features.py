"""A network whose features compare two sets of images, and the stream of images through it over all devices."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, parallelize, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.run_over import fetched


@dataclass(frozen=True)
class FeatureNetwork:
    """What FID and KID are computed with."""

    name: str
    """As it stands in a report: 'inception'."""
    prefix: str
    """Of its distances' names, `fid` and `kid`; empty for the published network alone."""
    size: int
    """Length of a feature vector, d."""
    source: str
    """Hash that identifies the weights."""
    note: str
    """What a reader of its distances must know; may be empty."""
    compute: Callable[[Any, Array], Array]
    """Of variables and images, uint8 [b, H, W, C] of 1 or 3 channels, to features [b, d]; a function of a module."""
    variables: Any

    def features(self, batches: Iterable[np.ndarray], mesh: Mesh, batch_size: int) -> Iterator[np.ndarray]:
        """Features of a stream of images, computed in batches of one size over all devices of the mesh.

        Args:
          batches: uint8 [n, H, W, C], C of 1 or 3, of any n; all of one H, W, C.
          mesh: of `data_mesh`.
          batch_size: images per device call, rounded up to a multiple of the devices.

        Yields:
          float32 [n, d], in the order of the images.

        Raises:
          UserError: images that are not 8-bit, or of another number of channels.
        """
        devices = mesh.shape[DATA_AXIS]
        batch_size = -(-batch_size // devices) * devices
        variables = replicate(self.variables, mesh)
        compute = _parallelized(self.compute, mesh)

        def of(batch: np.ndarray) -> tuple[Any, int]:
            padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
            return compute(variables, padded), len(batch)

        for found, size in fetched(map(of, _rebatch(batches, batch_size))):
            yield found[:size]


@functools.cache
def _parallelized(compute: Callable[[Any, Array], Array], mesh: Mesh) -> Any:
    return parallelize(compute, mesh, (REPLICATED, SHARDED), SHARDED, convolutional=True)


def _rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, the last one shorter."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] not in (1, 3):
            raise UserError(
                f"FID takes 8-bit images [N, H, W, C] with 1 or 3 channels, got {batch.dtype} of shape {batch.shape}."
            )
        waiting.append(batch)
        joined = np.concatenate(waiting) if sum(map(len, waiting)) >= size else None
        while joined is not None and len(joined) >= size:
            yield joined[:size]
            joined = joined[size:]
            waiting = [joined]
    rest = np.concatenate(waiting) if waiting else np.empty(0)
    if len(rest):
        yield rest
