"""Which examples are kept from training: a share at random, no copy of which is trained on."""

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from bsvae_jax._io.disk import mebibytes
from bsvae_jax._io.terminal import log
from bsvae_jax.data.image_set import ImageSet
from bsvae_jax.errors import UserError

VALIDATION_SEED = 1
"""Seed of the examples for validation; apart from the run's, so that runs of all seeds are compared on the same."""


def contents_of(examples: np.ndarray) -> list[Hashable]:
    """What tells examples [N, ...] apart: hashes of their values."""
    return [hashlib.blake2b(example.tobytes(), digest_size=16).digest() for example in examples]


def hold_out(contents: Sequence[Hashable], share: float, seed: int, what: str, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions that stay, and positions held out, both in order; copies of what stays stay too, if not all are.

    Args:
      contents: of each example, equal where two are copies.
      share: held out, of the whole.
      seed: of the draw.
      what: they are, for messages.
      purpose: for which they are held out, for messages.

    >>> stay, held_out = hold_out(range(10), 0.2, seed=0, what="ten", purpose="testing")
    >>> len(stay), len(held_out)
    (8, 2)

    Raises:
      UserError: none would be left to train on.
    """
    count = len(contents)
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, round(share * count))
    if held_out >= count:
        raise UserError(f"{what} holds {count} images: too few to keep {held_out} for {purpose}.")
    trained = {contents[index] for index in order[held_out:]}
    is_copy = np.array([contents[index] in trained for index in order[:held_out]])
    if is_copy.all():
        log.warning(
            f"{what}: all {held_out} images drawn for {purpose} are copies of training images, and say nothing of new ones."
        )
        is_copy[:] = False
    if is_copy.any():
        log.info(f"{what}: {is_copy.sum():,} images drawn for {purpose} are copies of training images, and stay in training.")
    chosen = order[:held_out][~is_copy]
    return np.setdiff1d(order, chosen), np.sort(chosen)


def hold_out_validation(images: ImageSet, share: float) -> ImageSet:
    """The same images, with a share of those for training kept for validation; they are copied into memory.

    Raises:
      UserError: none would be left to train on, there is not a label for each, or they are a memory map larger than the memory
        that is free.
    """
    if isinstance(images.train, np.memmap):
        _check_memory(images)
    stay, chosen = hold_out(contents_of(images.train), share, VALIDATION_SEED, images.name, "validation")
    labels = images.train_labels
    if labels is not None and len(labels) != len(images.train):
        raise UserError(
            f"{images.name} has {len(labels)} labels for its {len(images.train)} training images; give one for each."
        )
    return dataclasses.replace(
        images,
        train=images.train[stay],
        validation=images.train[chosen],
        train_labels=None if labels is None else labels[stay],
        validation_labels=None if labels is None else labels[chosen],
        known_fingerprint=None,
    )


def _check_memory(images: ImageSet) -> None:
    """Raise a UserError if a copy of the training images is larger than the memory that is free."""
    import psutil  # only a memory map needs it

    needed, free = images.train.nbytes, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"To hold out validation images of {images.name} its training images are copied into memory: {mebibytes(needed)}, "
            f"and {mebibytes(free)} are free. Give --data.validation own for those that the set may have of its own, or None "
            "to make choices on the test images."
        )
