"""Reading PyTorch's `state_dict` files without PyTorch and without running what is in them.

A `.pth` file is a pickle, which is a program. The reader here is not an unpickler: it knows only the instructions that
build dictionaries, tuples, numbers, strings and tensors. For whatever a program would import, call or build besides (the
hyperparameters of PyTorch Lightning may be objects of any class), a placeholder stands: nothing is imported or called. Both
layouts that `torch.save` has written are read, the zip archive (PyTorch >= 1.6) and the plain one before it.
"""

import io
import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from bsvae_jax._io.terminal import log
from bsvae_jax.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_CONTAINERS = ("state_dict", "model_state_dict", "model", "network")
"""Where training scripts keep the state_dict among what else they save."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "vae.")
"""What DataParallel, torch.compile and modules that hold the network put before every name."""
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_KNOWN = {_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT, *(f"torch {name}" for name in _DTYPES)}


class _Global(NamedTuple):
    """One of the names of `_KNOWN` that the pickle would import; never imported here."""

    name: str


class _Storage(NamedTuple):
    """A block of numbers, by its key in the file."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Object(NamedTuple):
    """What stands for an object that would be imported or built; never is."""

    name: str
    """Of its class or function, `module name`."""


class _Refused(Exception):
    """Why a file is not read."""


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file that `torch.save(module.state_dict(), path)` wrote, or a `.safetensors` file of the same arrays.

    The state_dict may be kept in a dictionary of what else a training script saves (`_CONTAINERS`), and every name may begin
    with a prefix of `_PREFIXES`, which is dropped; the log says so.

    Returns:
      `{name: array}`, in the order of the file.

    Raises:
      UserError: no such file, a damaged one, or one without named tensors.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
            arrays = _read_safetensors(content)
        else:
            arrays = _read_zip(content) if zipfile.is_zipfile(io.BytesIO(content)) else _read_legacy(content)
        return _without_prefix(arrays, path)
    except _Refused as error:
        raise UserError(f"{path} is refused: {error}. Wanted is a file of torch.save(module.state_dict(), path).") from None
    except (ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, MemoryError, RuntimeError) as error:
        raise UserError(f"{path} is not a state_dict of PyTorch, or damaged ({type(error).__name__}: {error}).") from error
    except (zipfile.BadZipFile, NotImplementedError, OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is a damaged archive ({error}).") from error


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    arrays = safetensors.numpy.load(content)
    if arrays and all(name.startswith(("params.", "batch_stats.")) for name in arrays):
        raise _Refused("it holds weights by the names of bsvae export, whose run bsvae_jax.restore opens")
    return arrays


def _without_prefix(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    dropped = ""
    while prefix := next((known for known in _PREFIXES if all(name.startswith(known) for name in arrays)), ""):
        arrays, dropped = {name.removeprefix(prefix): array for name, array in arrays.items()}, dropped + prefix
        if not arrays:
            raise _Refused("it holds no arrays")
    if dropped:
        log.info(f"{path}: every name begins with {dropped!r}, which was dropped.")
    return arrays


def _read_zip(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Refused("the archive has no data.pkl")
        (root,) = roots
        if f"{root}constants.pkl" in names:
            raise _Refused("it is a TorchScript program")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        if sum(item.file_size for item in archive.infolist()) > 2 * len(content) + 2**20:  # torch.save does not compress
            raise _Refused("the archive unpacks to far more than its size")
        program = io.BytesIO(archive.read(f"{root}data.pkl"))
        return _arrays(_build(program), lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(content: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(content)
    if _build(file) != LEGACY_MAGIC or _build(file) != LEGACY_PROTOCOL:
        raise _Refused("it does not begin like one")
    system = _build(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    tensors = _build(file)
    items = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in _every_tensor(tensors)}
    blocks = {}
    for key in _build(file):
        size = int.from_bytes(file.read(8), "little", signed=True)
        if key not in items or not 0 <= size * items[key] <= len(content):
            raise _Refused("its blocks of numbers are not those of its tensors")
        blocks[key] = file.read(size * items[key])
    return _arrays(tensors, lambda storage: blocks[storage.key])


def _every_tensor(value: Any) -> Iterator[_Tensor]:
    """Those of the state_dict, of the optimizer and of whatever else is there."""
    if isinstance(value, _Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _every_tensor(part)


def _tensors(value: Any) -> dict[str, _Tensor]:
    """The named tensors of a state_dict, or of the one that is kept beside the state of an optimizer, say."""
    places = (("", value), *((name, value.get(name)) for name in _CONTAINERS)) if isinstance(value, dict) else ()
    for place, part in places:
        tensors = {name: own for name, own in part.items() if isinstance(own, _Tensor)} if isinstance(part, dict) else {}
        if tensors and all(isinstance(name, str) for name in tensors):
            if place:
                log.info(f"Of the entries {', '.join(map(str, value))} the tensors of {place!r} are read.")
            return tensors
    if isinstance(value, _Object):
        raise _Refused(f"it holds no named tensors, but an object of {value.name.replace(' ', '.')}, which is never built")
    entries = f", but entries {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) and value else ""
    raise _Refused(f"it holds no named tensors{entries}")


def _arrays(value: Any, read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """The tensors with their numbers, each checked to lie within its storage."""
    blocks: dict[str, bytes] = {}
    arrays = {}
    for name, (storage, offset, shape, strides) in _tensors(value).items():
        if storage.key not in blocks:  # several tensors may share one
            blocks[storage.key] = read(storage)
        block = blocks[storage.key]
        if len(block) != storage.size * storage.dtype.itemsize:
            raise _Refused(f"the numbers of {name!r} are cut off")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or count > storage.size or (count and last >= storage.size):
            raise _Refused(f"{name!r} reaches beyond its numbers")
        flat = np.frombuffer(block, storage.dtype)[min(offset, storage.size) :]
        steps = [stride * storage.dtype.itemsize for stride in strides]
        arrays[name] = np.lib.stride_tricks.as_strided(flat, shape, steps).copy() if count else np.zeros(shape, flat.dtype)
    return arrays


# --- The pickle, as data ----------------------------------------------------------------------------------------------

_MARK = object()
_LITERALS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "NONE": lambda: None,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: _Object("builtins set"),
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _refuse_instruction(name: str) -> NoReturn:
    raise _Refused(f"its pickle holds more than tensors (instruction {name})")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    values: list[Any] = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _instructions(file: io.BytesIO) -> list[tuple[Any, Any, int | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in texts that are refused anyway
        return list(pickletools.genops(file))


def _build(file: io.BytesIO) -> Any:
    """The value that one pickle describes; the file is left behind its end."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in _instructions(file):
        name = instruction.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_global(f"{stack[-2]} {stack[-1]}")]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_call(stack[-2], stack[-1])]
        elif name == "NEWOBJ_EX":
            stack[-3:] = [_call(stack[-3], stack[-2])]
        elif name in ("SETITEM", "SETITEMS"):
            values = _pop_to_mark(stack) if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            if _fillable(stack[-1], dict, name):
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else _pop_to_mark(stack)
            if _fillable(stack[-1], list, name):
                stack[-1].extend(values)
        elif name == "FROZENSET":
            _pop_to_mark(stack)
            stack.append(_Object("builtins frozenset"))
        elif name == "BUILD":  # the _metadata attribute of a state_dict, which says nothing about its numbers
            stack.pop()
            _fillable(stack[-1], dict, name)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            _refuse_instruction(name)
    raise _Refused("its pickle has no end")


def _fillable(target: Any, kind: type, instruction: str) -> bool:
    """Whether values go into a container of this kind; those of an object are left out with it."""
    if not isinstance(target, kind | _Object):
        _refuse_instruction(instruction)
    return isinstance(target, kind)


def _global(name: str) -> _Global | _Object:
    return _Global(name) if name in _KNOWN else _Object(name)


def _storage(description: Any) -> Any:
    """A block of numbers; or a class, beside which PyTorch < 1.6 kept its source."""
    if description[0] == "module":
        return description[1]
    kind, storage_type, key, _, size, *rest = description
    if kind != "storage" or not isinstance(storage_type, _Global) or any(value is not None for value in rest):
        raise _Refused("its pickle refers to something outside that is not a block of numbers")
    dtype = _DTYPES[storage_type.name.removeprefix("torch ")]
    return _Storage(str(key), np.dtype(dtype), int(size))


def _call(function: Any, arguments: Any) -> Any:
    """What the three known functions would return; an object, of any other."""
    if isinstance(function, _Object):
        return function
    name = function.name if isinstance(function, _Global) else ""
    if name == _ORDERED_DICT and arguments == ():
        return {}
    if name == _REBUILD_TENSOR and isinstance(arguments[0], _Storage):
        storage, offset, shape, strides = arguments[:4]
        return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
    if name == _REBUILD_PARAMETER and isinstance(arguments[0], _Tensor):
        return arguments[0]
    raise _Refused("its pickle calls something that is not a tensor")
