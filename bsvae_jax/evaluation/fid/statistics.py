"""Feature statistics of many images, kept in a file as they come, so that hours of work survive an interruption."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from bsvae_jax._io.files import read_arrays, write_arrays
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.fid import distance
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.evaluation.sampling import BATCH

GROUP = BATCH
"""Images at whose multiples an interrupted computation continues: those of a batch of samples."""
KEPT = 10_000
"""Images whose features themselves are kept, for KID; all count in the moments."""
FEATURE_BATCH = 50
"""Images per device call, per device."""


class FeatureStatistics(NamedTuple):
    """Of a set of images."""

    moments: distance.Moments
    features: np.ndarray
    """Of those of the images that are `kept_of` all, float32 [n, d]."""


def kept_of(total: int) -> np.ndarray:
    """Positions, ascending, of the images whose features are kept: all, or `KEPT` at random, as files may lie by class.

    >>> print(kept_of(4), len(kept_of(60_000)))
    [0 1 2 3] 10000
    """
    return np.sort(np.random.default_rng(0).permutation(total)[:KEPT])


def read(path: Path, size: int, total: int) -> FeatureStatistics | None:
    """The statistics of features of length `size` in a file so far, of `total` in the end; None where there is no such file.

    Raises:
      UserError: a damaged file.
    """
    if not path.is_file():
        return None
    remedy = "delete it, and it is computed again"
    arrays = read_arrays(path, remedy)
    shapes = {name: array.shape for name, array in arrays.items()}
    if "features" in shapes:  # of an earlier version, which kept those of the first images
        return None
    kept = (int(np.searchsorted(kept_of(total), arrays["size"])) if shapes.get("size") == () else -1, size)
    if shapes != {"size": (), "mean": (size,), "scatter": (size, size), "kept": kept}:
        raise UserError(f"{path} is damaged (arrays of shapes {shapes}); {remedy}.")
    return FeatureStatistics(distance.Moments(int(arrays["size"]), arrays["mean"], arrays["scatter"]), arrays["kept"])


def _write(path: Path, statistics: FeatureStatistics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, **statistics.moments._asdict(), kept=statistics.features)


def feature_statistics(
    network: FeatureNetwork,
    images: Callable[[int], Iterator[np.ndarray]],
    total: int,
    mesh: Mesh,
    path: Path,
    begin: Callable[[int], None],
    progress: Callable[[int], None],
) -> FeatureStatistics:
    """Statistics of `total` images, from the file at `path` as far as it has come, and written to it.

    Args:
      network: whose features.
      images: given a multiple of `GROUP`, the images from there on, uint8, in batches of `GROUP` (the last one shorter).
      total: how many there are.
      mesh: of `data_mesh`.
      path: of the file; its name must identify network and images.
      begin: told the number of images that the file knows already.
      progress: told the number of images done since it was told before.

    Raises:
      UserError: images that are not 8-bit of 1 or 3 channels, or a damaged file.
    """
    size = network.size
    known = read(path, size, total) or FeatureStatistics(distance.no_moments(size), np.zeros((0, size), np.float32))
    begin(known.moments.size)
    if known.moments.size == total:
        return known
    moments, kept, unsaved, positions = known.moments, [known.features], 0, kept_of(total)
    batch_size = FEATURE_BATCH * mesh.devices.size

    def so_far() -> FeatureStatistics:
        return FeatureStatistics(moments, np.concatenate(kept))

    for group in images(moments.size):
        found = np.concatenate(list(network.features([group], mesh, batch_size)))
        first, last = np.searchsorted(positions, [moments.size, moments.size + len(found)])
        kept.append(found[positions[first:last] - moments.size])
        moments = distance.add(moments, found)
        unsaved += len(found)
        progress(len(found))
        if unsaved >= 4 * GROUP:
            _write(path, so_far())
            unsaved = 0
    if unsaved:
        _write(path, so_far())
    return so_far()
