"""What a command is handed by its surroundings, made fit: terminal, streams, plotting backend."""

import codecs
import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bsvae_jax.errors import BsvaeError, UserError

_PLAIN = {"±": "+-", "β": "beta", "σ²": "sigma^2", "σ": "sigma", "²": "^2", "×": "x", "·": "*", "–": "-", "—": "-", "…": "..."}
_CHECKS_OF_JAX = {
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    **{f"JAX_TRANSFER_GUARD{kind}": "allow" for kind in ("", "_HOST_TO_DEVICE", "_DEVICE_TO_HOST", "_DEVICE_TO_DEVICE")},
}
"""Switches by which JAX refuses what a program under development may not mean, and what they are by default. They change no
number; Optax and Orbax do not pass them."""
_NARROWEST = 40
"""Columns that help and tables are wrapped to at the least."""


def expand_user(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with `~`, which a shell leaves alone in quotes and behind `=`, as the home folder.

    Raises:
      UserError: there is no home folder, as in containers; a folder called `~` would be made.
    """

    def expand(argument: str) -> str:
        option, path = re.fullmatch(r"(--[\w.-]+=)?(.*)", argument, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        expanded = os.path.expanduser(path)
        if expanded.split("/")[0] == "~":
            raise UserError(
                f"{argument} is a path in the home folder, but this user has none (HOME is not set); give the path."
            )
        return option + expanded

    return [expand(str(argument)) for argument in arguments]


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    """Plain text for what the encoding of a terminal does not have."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    for character, plain in _PLAIN.items():
        text = text.replace(character, plain)
    return text.encode(error.encoding, "backslashreplace").decode(error.encoding), error.end


class _Lossy(io.RawIOBase):
    """A file that may be full or closed without harm to who writes there: progress and warnings are no result."""

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return self._file.write(data) or 0
        return len(data)


def _open_standard_streams() -> None:
    """Give a process that was started without an output one: else the next file that is opened takes its number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8"))


def lose_standard_output() -> None:
    """Let what is still to be printed go nowhere, since nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def commandline_environment() -> Iterator[None]:
    """For the time of a command: drawing needs no display, help has some width, and any terminal can be written to."""
    _open_standard_streams()
    codecs.register_error("bsvae", _transliterate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bsvae")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        # Stays until the process ends: Python flushes its streams then, and a failure would be the exit status.
        raw = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Lossy(raw)), sys.stderr.encoding, "bsvae", line_buffering=True)
    set_here = {"MPLBACKEND": "agg"} | {name: value for name, value in _CHECKS_OF_JAX.items() if name in os.environ}
    if shutil.get_terminal_size().columns < _NARROWEST:
        set_here["COLUMNS"] = str(_NARROWEST)
    before = {name: os.environ.get(name) for name in set_here}
    os.environ.update(set_here)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def numbers_without_figures() -> Iterator[None]:
    """Within the block an error of drawing is a warning: the numbers are there, whatever a font or a name does to a figure.

    A disk that is full and what was written for the user pass.
    """
    try:
        yield
    except (BsvaeError, OSError):
        raise
    except Exception as error:
        from bsvae_jax._io.terminal import log

        reason = str(error).strip().split("\n")[0][:200]
        log.warning(f"Figures could not be drawn ({type(error).__name__}: {reason}). The numbers are complete without them.")
