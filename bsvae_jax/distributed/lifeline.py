"""A line between processes that train as one, over which each learns at once that another has ended.

A collective operation waits for a process that has died as long as the network does, for ever with some, and JAX's heartbeat
ends what waits half a minute later, with the stack of its C++. So while they train, every process keeps a TCP connection to
process 0. When one breaks, its other end says so and leaves, and with it all of them. A machine that vanishes closes no
connection; that is left to the heartbeat.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import psutil

from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.preemption import Interrupted

DONE, FAILED = b"D", b"F"
"""The last word on a line: the process has finished, or it has raised an error (and says itself which)."""

GRACE = 10.0
"""Seconds in which an error that all processes have found together may reach this one, before it ends because of another's."""

PATIENCE = 3.0
"""Seconds for an address of process 0 to answer, of which there may be several."""

_BYTES = 2048
"""Room for the addresses of process 0."""

_AGAIN = "Give all of them the same command again: they continue from the last checkpoint."


def _end(message: str) -> None:
    """Say it and leave. The main thread waits for a process that is gone and cannot be asked to."""
    os.write(2, f"\nerror: {message}\n".encode())
    os._exit(1)


def _read(line: socket.socket, count: int) -> bytes:
    """So many bytes, however they were divided on their way; fewer where the other end has closed."""
    words = b""
    while len(words) < count and (more := line.recv(count - len(words))):
        words += more
    return words


@contextlib.contextmanager
def lifeline(end: Callable[[str], None] = _end) -> Iterator[None]:
    """Within the block, which all processes enter and leave together, the death of any of them ends the others.

    Args:
      end: given the message for the user; the default prints it and ends the process with status 1.
    """
    if multihost.alone():
        yield
        return
    line = Lifeline(end)
    place = line.listen() if multihost.is_writer() else {}
    padded = np.zeros(_BYTES, np.uint8)
    text = np.frombuffer(json.dumps(place).encode(), np.uint8)
    padded[: len(text)] = text
    place = json.loads(bytes(multihost.from_writer(padded)).rstrip(b"\0"))
    if not multihost.is_writer() and not line.connect(place, jax.process_index()):
        where = ", ".join(place["addresses"])
        sys.stderr.write(f"note: process 0 does not answer at {where}; should it die, only JAX's heartbeat tells\n")
    word = FAILED
    try:
        yield
        word = DONE
    except Interrupted:  # all stop together
        word = DONE
        raise
    finally:
        line.leave(word)


class Lifeline:
    """One process's end: the connections to all others in process 0, to process 0 elsewhere."""

    def __init__(self, end: Callable[[str], None]):
        """`end` is given the message when another process is gone."""
        self._end = end
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._lines: list[socket.socket] = []
        self._server: socket.socket | None = None

    def listen(self) -> dict[str, Any]:
        """In process 0: accept the others from now on; returns the place for their `connect`."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        token = secrets.token_bytes(16)
        threading.Thread(target=self._accept, args=(self._server, token), daemon=True).start()
        found = [own.address for owns in psutil.net_if_addrs().values() for own in owns if own.family == socket.AF_INET]
        addresses = [socket.gethostname(), *sorted(found, key=lambda address: address.startswith("127."))][:8]
        return {"addresses": addresses, "port": self._server.getsockname()[1], "token": token.hex()}

    def connect(self, place: dict[str, Any], process: int) -> bool:
        """In the others: to process 0 at the first of its addresses that answers; whether one did."""
        token = bytes.fromhex(place["token"])
        for address in place["addresses"]:
            try:
                line = socket.create_connection((address, place["port"]), PATIENCE)
            except OSError:  # an address of another network
                continue
            try:
                line.sendall(token + process.to_bytes(4, "big"))
                known = hmac.compare_digest(_read(line, len(token)), token)
            except OSError:  # something else that has this port, on another machine of this address
                known = False
            if known:
                self._hold(line)
                threading.Thread(target=self._watch, args=(line, 0), daemon=True).start()
                return True
            line.close()
        return False

    def leave(self, word: bytes) -> None:
        """Stop watching, and tell the others how it ended, `DONE` or `FAILED`."""
        with self._lock:
            self._left.set()
            for line in self._lines:
                with contextlib.suppress(OSError):  # it has left before
                    line.sendall(word)
                    line.shutdown(socket.SHUT_RDWR)
                line.close()
        if self._server is not None:
            with contextlib.suppress(OSError):  # closing alone does not wake the thread that accepts
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()

    def _accept(self, server: socket.socket, token: bytes) -> None:
        while True:
            try:
                line, _ = server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(line, token), daemon=True).start()

    def _greet(self, line: socket.socket, token: bytes) -> None:
        """Keep the connection if it is one of the other processes: the token came to them over the collective."""
        line.settimeout(PATIENCE)
        try:
            words = _read(line, len(token) + 4)
            known = hmac.compare_digest(words[: len(token)], token)
            line.sendall(token if known else b"")
        except OSError:
            known = False
        if not known:
            line.close()
            return
        self._hold(line)
        self._watch(line, int.from_bytes(words[len(token) :], "big"))

    def _hold(self, line: socket.socket) -> None:
        line.settimeout(None)
        with self._lock:
            self._lines.append(line)

    def _watch(self, line: socket.socket, process: int) -> None:
        """Until the other end says its last word or none."""
        try:
            word = line.recv(1)
        except OSError:
            word = b""
        if word == DONE or self._left.wait(GRACE if word == FAILED else 0.0):
            return
        if word == FAILED:
            self._end(f"Process {process} has stopped with an error, which its own output gives. {_AGAIN}")
        else:
            self._end(
                f"Process {process} has ended without a word (killed, out of memory, or after another; its output may say), "
                f"and no other can go on without it. {_AGAIN}"
            )
