"""A program run over all examples of a split, and its results on the host."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import padded_batches


def fetched(results: Iterable[Any]) -> Iterator[Any]:
    """Host copies of what a device computes, each fetched while the next one is in flight."""
    waiting: list[Any] = []
    for result in results:
        waiting.append(result)
        if len(waiting) == 2:
            yield jax.device_get(waiting.pop(0))
    yield from map(jax.device_get, waiting)


def run_over(images: DeviceImages, batch_size: int, compute: Callable[..., Any], times: int = 1) -> Iterator[Any]:
    """Host copies of `compute(stored, positions, weights)` of every batch of `padded_batches`, in order.

    All images are taken several `times` over, one time after the other; positions count on, and batches have the same size.
    """
    count = len(images)
    batches = padded_batches(images.mesh, times * count, min(batch_size, times * count))
    return fetched(compute(images.batch(positions % count), positions, weights) for positions, weights in batches)


def joined(batches: Iterable[Any], count: int) -> Any:
    """One tree of arrays [count, ...] of the trees of several batches, without what filled up the last one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)
