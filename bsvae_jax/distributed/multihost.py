"""Several processes that train one model: joining them, agreeing, and handing on what one of them read.

Every process runs the same program on its own devices. Process 0 is the primary one: it alone has a folder, and what it reads
there reaches the others over the network, so they need no shared disk.

A process that dies is noticed by the heartbeat of JAX's coordination service, whose C++ then ends all others with SIGABRT and
a stack trace, in which nobody is asked; a shell that outlives the process says in a sentence what has happened.
"""

import atexit
import collections
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bsvae_jax.distributed.preemption import Interrupted
from bsvae_jax.errors import UserError, check_count

Result = TypeVar("Result")

HEARTBEAT = 30
"""Seconds after which a process that has gone silent is given up, and all others end."""

CONNECT_TIMEOUT = 60
"""Seconds in which all processes must have been started."""

GRACE = 10.0
"""Seconds that a process which ends with an error waits for the others at its exit: they may have found the same error."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = CONNECT_TIMEOUT,
) -> None:
    """Join the processes of this program; before anything touches a device.

    Without arguments, all is taken from the environment where JAX knows it: SLURM, Open MPI, Cloud TPU pods, GKE.

    Args:
      coordinator: `HOST:PORT` of process 0, which all of them reach.
      processes: how many there are.
      process: which of them this one is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UserError: arguments that do not go together, nothing known of the environment, a port that is taken, or the others were
        not reached in time.
    """
    check_count("timeout", timeout)
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"The coordinator must be HOST:PORT, got {coordinator!r}.")
        if processes is None or process is None or not 0 <= process < processes:
            raise UserError(
                f"With a coordinator, the number of processes and which of them this is (0 ... number - 1) must be given; got "
                f"{processes} and {process}."
            )
        if process == 0:
            _gather(int(port), processes, timeout)
        else:
            _report_to(host.strip("[]"), int(port), processes, process, timeout)
    elif processes is not None or process is not None:
        raise UserError("A number of processes is for a coordinator, HOST:PORT of process 0; give that as well.")
    _explain_sudden_end(process)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        _say_last_word()
        raise UserError(
            "This does not look like a process of a cluster that JAX knows (SLURM, Open MPI, Cloud TPU, GKE). Give every "
            f"process --coordinator HOST:PORT --processes N --process I. ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        _say_last_word()
        where = "the others" if coordinator is None else f"the coordinator {coordinator}"
        raise UserError(
            f"Process {process} could not reach {where} within {timeout} s ({_first_line(error)}). Are all processes running, "
            "and is the port open between the machines?"
        ) from error
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        _say_last_word()
        counts = ", ".join(f"process {process} has {devices[process]}" for process in sorted(devices))
        raise UserError(f"All processes need the same number of devices; {counts}. Let each have as many.")


# --- Before JAX is asked: it ends a process with the stack of its C++ where another was not started, or the port is taken ---

_GREETING = "bsvae_jax process {} of {}"


def _gather(port: int, processes: int, timeout: float) -> None:
    """In process 0: wait on the coordinator's port until all others have reported, and let them go on."""
    end = time.monotonic() + timeout
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"Port {port} of the coordinator cannot be used ({os.strerror(error.errno or 0)}): another program has it. Give "
            "all processes another one."
        ) from error
    greetings = {_GREETING.format(process, processes): process for process in range(1, processes)}
    found: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        opened.enter_context(server)
        while len(found) < processes - 1:
            missing = ", ".join(str(process) for process in range(1, processes) if process not in found)
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                line, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"Of {processes} processes, these were not heard of within {timeout:g} s: {missing}. Were they started "
                    "with the same coordinator and number of processes, and is the port open between the machines?"
                ) from None
            opened.enter_context(line)
            greeting = _read_line(line, 5.0)
            if greeting in greetings:
                found[greetings[greeting]] = line
            elif greeting.startswith("bsvae_jax"):
                raise UserError(
                    f"This is process 0 of {processes}, and another says that it is {greeting[10:]}; give all the same."
                )
        for line in found.values():
            line.sendall(b"all there\n")
        for line in found.values():
            _read_line(line, 5.0)  # closed by the other end, so that the port is free at once


def _report_to(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """In the others: tell process 0 that this one is there, and wait until all are."""
    end = time.monotonic() + timeout
    while True:
        try:
            line = socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > end - 1.0:
                why = error.strerror or error
                raise UserError(
                    f"Process 0 was not reached at {host}:{port} within {timeout:g} s ({why}). Is it running, and is the port "
                    "open between the machines?"
                ) from error
        time.sleep(0.5)
    with line:
        with contextlib.suppress(OSError):  # it has closed the connection, which is seen next
            line.sendall(f"{_GREETING.format(process, processes)}\n".encode())
        answer = _read_line(line, max(0.1, end - time.monotonic()) + 5.0)  # process 0, begun later, says who is missing
    if answer != "all there":
        raise UserError(
            f"Process 0 at {host}:{port} did not let process {process} join within {timeout:g} s: it waits for others, it has "
            "stopped (its own output says why), or another program has this port."
        )


def _read_line(line: socket.socket, seconds: float) -> str:
    """A line of at most 100 characters; less where the other end closes, or says nothing in time."""
    text, end = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):  # a time-out is one
        while not text.endswith(b"\n") and len(text) < 100:
            line.settimeout(max(0.01, end - time.monotonic()))
            if not (more := line.recv(1)):
                break
            text += more
    return text.decode(errors="replace").rstrip("\n")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


# --- When a process ends ----------------------------------------------------------------------------------------------


_shells: list[subprocess.Popen[bytes]] = []


def _explain_sudden_end(process: int | None) -> None:
    """A shell waits for the last word of this process, and speaks for it if it ends without one."""
    name = "A process" if process is None else f"Process {process}"
    sentence = (
        f"error: {name} has ended suddenly: it was killed or ran out of memory, or another process has ended and JAX, whose "
        "lines are above, ended this one. Give all of them the same command again: they continue from the last checkpoint."
    )
    command = ["sh", "-c", 'read word || printf "\\n%s\\n" "$0" >&2', sentence]
    _shells.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True))
    atexit.register(_say_last_word)


def _say_last_word() -> None:
    """This process ends as it should, or has said itself why not."""
    while _shells:
        _shells.pop().communicate(b"done\n")


_LOST_CONNECTION = re.compile(
    "Gloo \\w+ failed|NCCL operation \\S+ failed|Connection (closed|reset) by peer|Broken pipe|Socket closed"
)
"""In which words JAX says it depends on what this process was doing in that moment."""


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """An error that leaves the block in this process alone ends the others too, once this process exits.

    At its exit JAX waits minutes for the others, which wait for this process in the middle of a step. So it waits no longer
    than `GRACE`, in which an error that all have found has ended all; then it leaves, and the heartbeat ends the others.
    """
    try:
        yield
    except Interrupted:  # all stop together
        raise
    except BaseException as error:
        if not is_only():
            atexit.register(_leave_soon)  # before JAX's own, which was registered earlier
            if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _LOST_CONNECTION.search(str(error)):
                raise UserError(
                    "The connection to another process is closed: another process has ended. Its message says why; start all "
                    "of them again, they continue from the last checkpoint."
                ) from error
        raise


def _leave_soon() -> None:
    _say_last_word()
    for stream in (sys.stdout, sys.stderr):  # what is left there would be lost
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    timer = threading.Timer(GRACE, os._exit, [1])
    timer.daemon = True
    timer.start()


def primary_has_stopped() -> UserError:
    """What the other processes raise where the primary one raises an error of its own."""
    return UserError("Process 0 has stopped; its message says why.")


# --- While they train -------------------------------------------------------------------------------------------------


def is_primary() -> bool:
    """Whether this process writes files and speaks to the user."""
    return jax.process_index() == 0


def is_only() -> bool:
    """Whether there are no other processes."""
    return jax.process_count() == 1


def in_any_process(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set in any process; all of them must ask."""
    if is_only():
        return flags
    return tuple(np.any(multihost_utils.process_allgather(np.asarray(flags)), axis=0).tolist())


def from_primary(tree: Any) -> Any:
    """The primary process's values of a tree of arrays, as NumPy arrays; all must call, with the same shapes and types."""
    return tree if is_only() else multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def check_agreement(what: str, values: dict[str, Any], remedy: str) -> None:
    """Raise in every process if they do not all have the same values.

    Args:
      what: they are, for the message.
      values: by name, plain JSON values.
      remedy: what to do about it.

    Raises:
      UserError: they differ; names the first process that does, and in what.
    """
    if is_only():
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


def on_primary(action: Callable[[], Result], otherwise: Result) -> Result:
    """`action()` in the primary process, `otherwise` in the others; where it fails, all end, and not one waits for the others.

    Raises:
      UserError: in the other processes, where the primary one raised anything; there, what it raised.
    """
    if is_only():
        return action()
    result, raised = otherwise, None
    if is_primary():
        try:
            result = action()
        except Exception as error:  # raised again once the others know
            raised = error
    if in_any_process(raised is not None)[0]:
        raise raised or primary_has_stopped()
    return result
