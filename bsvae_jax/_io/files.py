"""Files that are whole or not there, and damaged ones that say so."""

import contextlib
import glob
import hashlib
import io
import json
import lzma
import os
import re
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from bsvae_jax._io.terminal import log
from bsvae_jax.errors import UserError, check_kind

try:
    import fcntl
except ModuleNotFoundError as error:
    raise ImportError("bsvae_jax runs on Linux and macOS; on Windows, in WSL (Windows Subsystem for Linux).") from error

DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError, SyntaxError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError, IndexError),
)
"""What NumPy and the standard library have been seen to raise on damaged archives."""
TEMPORARY = re.compile(r"\..+\.([0-9]{1,9})\.part", re.DOTALL)
"""Names of files that are being written, and by which process."""


def cache_folder() -> Path:
    """Where downloads, prepared images and reference statistics are kept: `$BSVAE_CACHE`, or `~/.cache/bsvae_jax`.

    For a user without a name and a home, as containers have them, a folder among the temporary ones.
    """
    if folder := os.environ.get("BSVAE_CACHE"):
        return Path(os.path.expanduser(folder))
    try:
        return Path.home() / ".cache" / "bsvae_jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"bsvae_jax-{os.getuid()}"


def printable(name: str) -> str:
    """The name of a file, with bytes that are not UTF-8 spelled out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def as_path(path: Any, what: str) -> Path:
    """A path given as text, with `~` for the home folder, or as a path; a UserError names `what` otherwise."""
    check_kind(what, path, (str, os.PathLike), "give the path of a file or folder")
    return Path(os.path.expanduser(path))


def sha256_of(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `progress` is called with the number of bytes of each block that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _sweep(folder: Path, name: str = "*") -> None:
    """Remove the temporary files, of any file or the one of this name, of processes that a kill has ended."""
    import psutil  # only what writes needs it

    for left in folder.glob(f".{name}.*.part"):
        match = TEMPORARY.fullmatch(left.name)
        if match and not psutil.pid_exists(int(match[1])):
            left.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _sweep(path.parent, glob.escape(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(path: Path, /, **arrays: Any) -> None:
    """Write an `.npz`, as `write_atomically` does."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def digest_of(values: Any) -> str:
    """SHA-256 of JSON values, but for the entry `digest` in which it is kept beside them."""
    kept = {name: value for name, value in values.items() if name != "digest"} if isinstance(values, dict) else values
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    """Write plain JSON values and their digest for people to read, as `write_atomically` does."""
    write_atomically(path, (json.dumps(values | {"digest": digest_of(values)}, indent=indent) + "\n").encode())


@contextlib.contextmanager
def sense_of(path: Path, remedy: str = "") -> Iterator[None]:
    """For a block that makes sense of what a file holds: what values of other types, missing or too large ones raise there.

    Raises:
      UserError: that, with the file's name and at the end the `remedy`. A UserError of the block is passed on.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        ending = f"; {remedy}." if remedy else "."
        raise UserError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}){ending}") from error


@contextlib.contextmanager
def read_json(path: Path, remedy: str = "") -> Iterator[Any]:
    """The values of a JSON file, for the block that makes sense of them.

    Raises:
      UserError: it is no JSON, it was edited since `write_json` wrote it, or the block made no sense of it (`sense_of`).
    """
    with sense_of(path, remedy):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("digest", digest_of(values)) != digest_of(values):
            raise ValueError("it was changed after it was written")
        yield values


@contextlib.contextmanager
def locked(path: Path, name: str, remedy: str) -> Iterator[None]:
    """Keep other processes out of the block, and wait for one that is in it; the system lets go of the lock of a dead one.

    Args:
      path: of the lock, an empty file that stays.
      name: of what is prepared, for whom has to wait.
      remedy: what to do where the lock cannot be made.

    Raises:
      UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}); {remedy}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning(f"another process is preparing {name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_arrays(path: Path, remedy: str, choose: Callable[[list[str]], Iterable[str]] = list) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` or the one of an `.npy` (under the name ''); never runs anything in it.

    `choose` is told the names of all arrays of an `.npz`, and answers with those to be read.

    Raises:
      UserError: not such a file, or a damaged one; the sentence ends with `remedy`.
    """
    try:
        with path.open("rb") as file:  # np.load by name would leave a damaged file open
            content = np.load(file, allow_pickle=False)
            several = isinstance(content, np.lib.npyio.NpzFile)
            arrays = {name: content[name] for name in choose(content.files)} if several else {"": content}
            others = several and content.zip.namelist() and not any(name.endswith(".npy") for name in content.zip.namelist())
            if others or not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("an archive of other files")
            return arrays
    except DAMAGE as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        if "contains pickled" in what:  # NumPy's words for all that begins like no file of its own
            what = "it does not begin like one"
        raise UserError(f"{path} cannot be read as a NumPy file ({what}): it is damaged or holds objects; {remedy}.") from error


def is_used(folder: Path, *first: str) -> bool:
    """Whether there is a folder that holds more than its lock, files named `first`, and what a kill left of a first file."""
    unused = (".lock", *first)
    return folder.is_dir() and any(path.name not in unused and not TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def take_folder(folder: Path, doing: str, option: str = "--workdir") -> TextIO:
    """Make a folder and keep other processes out until the file returned is closed; the system closes it for a dead process.

    Raises:
      UserError: another process has it (`doing` says what), or it cannot be written.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise UserError(
            f"{folder} is a URL; {option} must be a local folder. Mount the bucket and give the folder it appears in."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another {option}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"Another process is {doing} in {folder}; choose another {option}.") from error
    _sweep(folder)
    return lock


def is_taken(folder: Path) -> bool:
    """Whether a process works in the folder: whether `take_folder` would refuse it."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def digest(tree: Any) -> str:
    """SHA-256 of names, types, shapes and values of all arrays: what a checkpoint must restore to."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of the `metrics.jsonl` of a run, in order; a last line torn by a kill is left out.

    >>> import tempfile
    >>> row = '{"step": 50, "epoch": 1, "split": "train", "rate": 8.5}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "metrics.jsonl").write_text(f'{row}\\n{{"step": 1')
    ...     read_metrics(folder)
    [{'step': 50, 'epoch': 1, 'split': 'train', 'rate': 8.5}]

    Raises:
      UserError: another line is no JSON, or a row lacks its step, epoch or split, or has a value that is no number.
    """
    path = as_path(folder, "folder") / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1:
                break
            raise UserError(f"{path}, line {number + 1} is damaged: {error}.") from error
        if not _is_row(row):
            raise UserError(
                f"{path}, line {number + 1} is damaged: expected step, epoch, split and numbers, got {line[:80]!r}."
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether this is what training logs: step, epoch, split and numbers, None where there is none."""
    if not isinstance(row, dict) or not isinstance(row.get("split"), str):
        return False
    numbers = [value for name, value in row.items() if name != "split"]
    step, steps = row.get("step"), row.get("steps", 1)  # step 0: a callback stopped it before the first one
    place = type(step) is int and step >= 0 and type(steps) is int and steps >= 1 and row.get("epoch") is not None
    return place and all(value is None or type(value) in (int, float) for value in numbers)
