"""Processes that decode images: Pillow holds Python's lock for half of the time, so that threads would share one core.

A worker is told file contents through a pipe and answers with pixels. It needs Pillow and NumPy alone, and so it does not
import the package's `__init__`, nor the user's script, as those of `multiprocessing` do. It ends when its pipe does.
"""

import pickle
import queue
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bsvae_jax.data.decoding import Preprocessing, decode_noted
from bsvae_jax.errors import UserError

Named = tuple[str, bytes]
"""Name and content of an image file."""

Noted = tuple[np.ndarray, tuple[str, ...]]
"""Its pixels, and what was lost of it."""

_PACKAGE = Path(__file__).parents[1]

_START = f"""
import sys, types
for name, path in {{"bsvae_jax": {str(_PACKAGE)!r}, "bsvae_jax.data": {str(_PACKAGE / "data")!r}}}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from bsvae_jax.data._workers import serve
serve(sys.stdin.buffer, sys.stdout.buffer)
"""


def decode_all(files: list[Named], preprocessing: Preprocessing) -> list[Noted | UserError]:
    """`decode_noted` of every file; an error in place of one that it refuses."""
    found: list[Noted | UserError] = []
    for name, content in files:
        try:
            found.append(decode_noted(content, preprocessing, name))
        except UserError as error:
            found.append(error)
    return found


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """What a worker does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the orders
    while True:
        try:
            files, preprocessing = pickle.load(requests)
            pickle.dump(decode_all(files, Preprocessing(*preprocessing)), answers, protocol=5)
            answers.flush()
        except (EOFError, BrokenPipeError):
            return


class Decoders:
    """`count` workers, or none: then the calling thread decodes. Use it in a `with` block, from any number of threads."""

    def __init__(self, count: int):
        """Starts the workers."""
        self._processes = [
            subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def __enter__(self) -> "Decoders":
        """Nothing more to start."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the workers, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.communicate()  # closes the pipes

    def decode(self, files: list[Named], preprocessing: Preprocessing) -> list[Noted | UserError]:
        """`decode_all`, by a worker.

        Raises:
          UserError: the worker died, of lack of memory for instance.
        """
        if not self._processes or not files:
            return decode_all(files, preprocessing)
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((files, tuple(preprocessing)), process.stdin, protocol=5)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except Exception as error:  # a broken pipe, or lack of memory here
            process.kill()  # one that is only out of step decodes nothing more either
            raise UserError(
                f"A process that decodes images died (status {process.wait()}), perhaps of lack of memory, at one of "
                f"{files[0][0]} and the {len(files) - 1} images after it. Give the command again; it continues."
            ) from error
        finally:
            self._idle.put(process)  # a dead one too: it fails at once, where nobody would wait for it in vain
