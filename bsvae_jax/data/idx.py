"""The idx files in which MNIST and its likes are published."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bsvae_jax.errors import UserError


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an idx file, gzipped or not (the format of the MNIST files: magic 0 0 8 rank, big-endian sizes).

    Raises:
      UserError: not an idx file of unsigned bytes, damaged compression, or fewer or more bytes than its header promises.
    """
    try:
        with path.open("rb") as probe:
            gzipped = probe.read(2) == b"\x1f\x8b"
        stream: BinaryIO
        with gzip.open(path) if gzipped else path.open("rb") as stream:  # type: ignore[assignment]
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); it is truncated or damaged. Download it again.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4]!r}.")
    rank = content[3]
    header = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    expected = header + math.prod(shape)
    if len(content) < header or len(content) != expected:
        raise UserError(f"{path} is truncated or damaged: {len(content)} bytes, but its header promises {expected}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W] and their labels [N], uint8.

    Raises:
      UserError: a file that `read_idx` refuses, one of another rank or an empty one, or not a label for every image.
    """
    pair = []
    for path, rank in ((images_path, 3), (labels_path, 1)):
        array = read_idx(path)
        if array.ndim != rank or array.size == 0:
            raise UserError(f"{path} must hold a non-empty array of rank {rank}, got shape {array.shape}.")
        pair.append(array)
    images, labels = pair
    if len(images) != len(labels):
        raise UserError(f"{images_path} has {len(images)} images, but {labels_path} {len(labels)} labels.")
    return images, labels
