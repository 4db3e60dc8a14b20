"""What training takes of a device's memory, known before anything of it is taken."""

import dataclasses

import jax

from bsvae_jax._io.disk import mebibytes
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.mesh import DATA_AXIS
from bsvae_jax.errors import UserError
from bsvae_jax.training.program import Program

NEEDS_LESS = "--gradient-accumulation 2 (or more), --rematerialize or (where a chip has it) --precision bfloat16 needs less"


def check_memory(program: Program, available: int) -> None:
    """Compile the training program of one model, which it runs from then on, and refuse it where a device cannot hold it.

    Let pass are programs of several processes, whose memory none of them sees, and those that are not compiled before their
    first call: of `pmap`, and without `jit`.

    Args:
      program: of execution 'loop', whose images are not placed yet.
      available: bytes of each device that may be planned with, as `available_bytes` says.

    Raises:
      UserError: it needs more; the message has the largest batch that fits, of which the compiler was asked as well.
    """
    unjitted = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    if unjitted or program.config.device_map == "pmap" or not multihost.is_only():
        return
    needed = program.needed_bytes(1)
    if needed <= available:
        return
    batch = program.config.batch_size
    fits = largest_batch(program, needed, available)
    remedy = "Not even the smallest batch fits: choose a smaller network" if fits is None else f"A batch_size of {fits} fits"
    raise UserError(
        f"Training on {batch} images a step takes {mebibytes(needed)} of a device's memory, and {mebibytes(available)} can be "
        f"planned with. {remedy}; {NEEDS_LESS}."
    )


def largest_batch(program: Program, needed: int, available: int) -> int | None:
    """The largest batch that fits, to the line through those that were compiled: each one named has been; None: no batch does.

    Args:
      program: of execution 'loop'.
      needed: bytes of its own batch, more than there are.
      available: as for `check_memory`.
    """

    def bytes_of(batch: int) -> int:
        config = dataclasses.replace(program.config, batch_size=batch)
        return Program(config, program.images, program.mesh).needed_bytes(1)

    unit = program.mesh.shape[DATA_AXIS] * program.config.gradient_accumulation
    small, large = unit, program.config.batch_size
    if small >= large or (least := bytes_of(small)) > available:
        return None
    while needed > available:
        guess = small + int((available - least) * (large - small) / (needed - least)) // unit * unit
        large = min(guess, large - unit)
        needed = least if large == small else bytes_of(large)
    return large
