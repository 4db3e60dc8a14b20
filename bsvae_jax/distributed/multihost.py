"""Several processes that train one model: joining them, agreeing, and handing on what one of them read.

Every process runs the same program on its own devices. Process 0 is the writer: it alone has a folder, and what it reads there
reaches the others over the network, so they need no shared disk.
"""

import hashlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bsvae_jax.errors import UserError

Result = TypeVar("Result")

HEARTBEAT = 30
"""Seconds after which a process that has gone silent is given up, and all others end."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the processes of this program; before anything touches a device.

    Without arguments, all is taken from the environment where JAX knows it: SLURM, Open MPI, Cloud TPU pods, GKE.

    Args:
      coordinator: `HOST:PORT` of process 0, which all of them reach.
      processes: how many there are.
      process: which of them this one is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UserError: arguments that do not go together, nothing known of the environment, or the others were not reached in time.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"The coordinator must be HOST:PORT, got {coordinator!r}.")
        if processes is None or process is None or not 0 <= process < processes:
            raise UserError(
                f"With a coordinator, the number of processes and which of them this is (0 ... number - 1) must be given; got "
                f"{processes} and {process}."
            )
    elif processes is not None or process is not None:
        raise UserError("A number of processes is for a coordinator, HOST:PORT of process 0; give that as well.")
    if coordinator is not None and process != 0:
        _wait_for(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise UserError(
            "This does not look like a process of a cluster that JAX knows (SLURM, Open MPI, Cloud TPU, GKE). Give every "
            f"process --coordinator HOST:PORT --processes N --process I. ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        where = "the others" if coordinator is None else f"the coordinator {coordinator}"
        raise UserError(
            f"Process {process} could not reach {where} within {timeout} s ({_first_line(error)}). Are all processes running, "
            "and is the port open between the machines?"
        ) from error


def _wait_for(coordinator: str, timeout: int) -> None:
    """Until the coordinator answers: JAX itself would end the process without a word to the user."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end - 1.0:
                why = error.strerror or error
                raise UserError(
                    f"Process 0 was not reached at {coordinator} within {timeout} s ({why}). Is it running, and is the port "
                    "open between the machines?"
                ) from error
        time.sleep(1.0)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def is_writer() -> bool:
    """Whether this process writes files and speaks to the user."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any process; all of them must ask."""
    return flag if alone() else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def from_writer(tree: Any) -> Any:
    """The writer's values of a tree of arrays, as NumPy arrays; all processes must call, with the same shapes and types."""
    return tree if alone() else multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def check_agreement(what: str, values: dict[str, Any], remedy: str) -> None:
    """Raise in every process if they do not all have the same values.

    Args:
      what: they are, for the message.
      values: by name, plain JSON values.
      remedy: what to do about it.

    Raises:
      UserError: they differ; names the first process that does, and in what.
    """
    if alone():
        return
    text = json.dumps(values, sort_keys=True).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
    if (digests == digests[:1]).all():
        return
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    all_values = [json.loads(bytes(own[:size]).decode()) for own, size in zip(texts, sizes.tolist(), strict=True)]
    other = next(index for index, own in enumerate(all_values) if own != all_values[0])
    differing = [
        f"{name}: {all_values[0].get(name)!r} in process 0, {all_values[other].get(name)!r} in process {other}"
        for name in sorted({*all_values[0], *all_values[other]})
        if all_values[0].get(name) != all_values[other].get(name)
    ]
    raise UserError(f"The processes do not have the same {what} ({'; '.join(differing)}). {remedy}")


def in_writer(action: Callable[[], Result], otherwise: Result) -> Result:
    """`action()` in the writer, `otherwise` elsewhere; where it fails, all end, and not one waits for the others.

    Raises:
      UserError: in the other processes, where the writer raised anything; there, what it raised.
    """
    if alone():
        return action()
    result, raised = otherwise, None
    if is_writer():
        try:
            result = action()
        except Exception as error:  # raised again once the others know
            raised = error
    if anywhere(raised is not None):
        raise raised or UserError("Process 0 has stopped; its message says why.")
    return result
