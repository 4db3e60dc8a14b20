"""Room on the disk, and files that may be open, asked before they are needed."""

import resource
import shutil
from pathlib import Path
from typing import Any

import jax

from bsvae_jax.errors import UserError

CHECKPOINTS = 4
"""Checkpoints on disk at once: the latest two, the best, and the one being written."""
MARGIN = 16 * 2**20
"""Bytes left for metrics, figures and the like."""
OPEN_FILES = 64
"""Files that the process opens at once, apart from those that a run keeps open; saving a checkpoint takes some 20."""


def free_bytes(folder: Path) -> int:
    """Free space of the disk that holds `folder`, or will."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def mebibytes(count: int | float) -> str:
    """`"1,234 MiB"`."""
    return f"{count / 2**20:,.0f} MiB"


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or abstract arrays, of a tree: about what its checkpoint takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_room(folder: Path, checkpoint: int, saved: int = 0) -> None:
    """Raise a UserError if the disk has no room for the checkpoints of a run.

    Args:
      folder: of the run; need not exist.
      checkpoint: bytes of one.
      saved: checkpoints that are there already and will be replaced.
    """
    needed = max(CHECKPOINTS - saved, 1) * checkpoint + MARGIN
    free = free_bytes(folder.absolute())
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {mebibytes(free)} free, this run needs {mebibytes(needed)} for checkpoints "
            f"({mebibytes(checkpoint)} each). Free some space, or choose another --workdir."
        )


def check_open_files(runs: int) -> None:
    """Allow this process the open files that `runs` runs need which are trained together: each keeps a lock and its events.

    Raises:
      UserError: the system does not.
    """
    needed = OPEN_FILES + 2 * runs
    allowed, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed >= needed or allowed == resource.RLIM_INFINITY:
        return
    if limit < needed and limit != resource.RLIM_INFINITY:
        raise UserError(
            f"A process may have {limit} files open here, and training {runs} at a time needs {needed}: raise the limit "
            f"(ulimit -n {needed}) and repeat the command."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, limit))
