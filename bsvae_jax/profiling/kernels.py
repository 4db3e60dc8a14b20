"""The kernels of one step, read from the text of a program that XLA compiled for a GPU (HLO after all its passes).

Every instruction outside a fusion is one launch: of a kernel that XLA wrote, of cuDNN or of cuBLAS. Bytes are those of the
operands and the results, as if nothing stayed in a cache: of an array that a kernel only slices, or updates in place, the
slices.
"""

import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["convolutions", "matrix products", "reductions", "elementwise", "data movement", "communication"]

_NO_LAUNCH = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_LOOPS = {"while", "call", "conditional"}
_MOVEMENT = _NO_LAUNCH | {
    *("broadcast", "concatenate", "convert", "copy", "copy-start", "dynamic-slice", "dynamic-update-slice", "gather", "iota"),
    *("pad", "reshape", "reverse", "slice", "transpose"),
}
_COMMUNICATION = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r'lhs_contracting_d(?:ims=\{|imensions":\[)([\d",]*)')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


class Kernel(NamedTuple):
    """One launch of a step."""

    name: str
    kind: Kind
    library: Literal["cuDNN", "cuBLAS"] | None
    """None: XLA's own."""
    result: str
    """Type and shape of its largest result."""
    result_bytes: int
    """Of that one."""
    moved: int
    """Bytes of the device's memory that it reads and writes."""
    flops: float
    """Of convolutions and matrix products; a multiply-add is two."""
    layer: str
    """Where in the model it comes from, "decoder/block/conv1 (backward)"; "" where the compiler does not say."""
    times: int
    """Launches in a step, in loops whose length is known."""


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, _Instruction]


def kernels(program: str) -> tuple[Kernel, ...]:
    """The kernels of one pass through the loop over steps; of the whole program where there is no loop of unknown length."""
    computations, entry = _parse(program)
    launches = list(_launches(computations, entry, 1, False))
    in_steps = [launch for launch in launches if launch[3]]
    return tuple(_kernel(computations, body, one, times) for body, one, times, _ in in_steps or launches)


def _parse(program: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            is_entry, name = re.match(r"(ENTRY )?%?([\w.\-]+)", line).groups()  # type: ignore[union-attr]
            entry = name if is_entry else entry
            current = computations[name] = {}
        elif found := _INSTRUCTION.match(line):
            root, name, kind, opcode, operands, rest = found.groups()
            names = tuple(re.findall(r"%?([\w.\-]+)(?:,|$)", operands))
            current[name] = _Instruction(name, kind, opcode, names, rest, root is not None)
    return computations, entry


def _launches(
    computations: dict[str, Computation], name: str, times: int, in_steps: bool
) -> Iterator[tuple[Computation, _Instruction, int, bool]]:
    """Every launch, how often, and whether inside the loop over steps: the one whose length is an argument."""
    body = computations[name]
    for one in body.values():
        if one.opcode in _LOOPS:
            trips = _TRIPS.search(one.rest)
            inside = in_steps or (one.opcode == "while" and trips is None)
            for called in _called(one):
                yield from _launches(computations, called, times * (int(trips[1]) if trips else 1), inside)
        elif one.opcode not in _NO_LAUNCH and not one.opcode.endswith(("-done", "-update")):
            yield body, one, times, in_steps


def _called(one: _Instruction) -> list[str]:
    return [name for single, several in _CALLED.findall(one.rest) for name in re.findall(r"[\w.\-]+", single or several)]


def _sizes(type_: str) -> list[tuple[int, str]]:
    """Bytes and text of the arrays of a type."""
    return [
        (math.prod(_numbers(shape)) * (1 if name == "pred" else max(1, int(bits) // 8)), f"{name}[{shape}]")
        for name, bits, shape in _ARRAY.findall(type_)
    ]


def _size(type_: str) -> int:
    return sum(size for size, _ in _sizes(type_))


def _shape(one: _Instruction) -> list[int]:
    """Of the first array."""
    found = _ARRAY.search(one.type)
    return _numbers(found[3]) if found else []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _kernel(computations: dict[str, Computation], body: Computation, one: _Instruction, times: int) -> Kernel:
    fused = [computations[name] for name in _called(one) if one.opcode in ("fusion", "async-start")]
    inside = [inner for computation in fused for inner in computation.values()] or [one]
    opcodes = {inner.opcode for inner in inside}
    target = re.search(r'custom_call_target="__(cudnn|cublas)', one.rest)
    library: Literal["cuDNN", "cuBLAS"] | None = None if target is None else "cuDNN" if target[1] == "cudnn" else "cuBLAS"
    kind: Kind = "elementwise"
    if any(opcode.startswith(_COMMUNICATION) for opcode in opcodes):
        kind = "communication"
    elif "convolution" in opcodes or library == "cuDNN":
        kind = "convolutions"
    elif "dot" in opcodes or library == "cuBLAS":
        kind = "matrix products"
    elif "reduce" in opcodes:
        kind = "reductions"
    elif opcodes <= _MOVEMENT:
        kind = "data movement"
    # Libraries are given scratch memory as bytes; how much of it they touch is theirs.
    results = [found for found in _sizes(one.type) if library is None or not found[1].startswith(("u8", "s8"))] or [(0, "()")]
    operands = [body[name].type for name in one.operands if name in body]
    if one.opcode == "fusion":
        moved = _written(fused[0]) + sum(_read(fused[0], i, type_) for i, type_ in enumerate(operands))
    elif one.opcode in ("dynamic-slice", "gather", "slice"):
        moved = 2 * _size(one.type)
    elif one.opcode == "dynamic-update-slice":
        moved = 2 * _size(operands[1])
    else:
        moved = sum(size for size, _ in results) + sum(map(_size, operands))
    flops = sum(_flops(fused[0] if fused else body, inner) for inner in inside)
    size, shape = max(results)
    return Kernel(one.name, kind, library, shape, size, moved, flops, _layer([one, *inside]), times)


def _read(fused: Computation, index: int, type_: str) -> int:
    """Bytes that a fusion reads of one operand: of one that is only sliced, or updated in place, the slices."""
    parameter = next(one for one in fused.values() if one.opcode == "parameter" and one.operands == (str(index),))
    parts = []
    for user in fused.values():
        if parameter.name in user.operands:
            if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name != user.operands[1]:
                parts.append(0)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter.name:
                parts.append(_size(user.type))
            else:
                return _size(type_)
    return min(sum(parts), _size(type_))


def _written(fused: Computation) -> int:
    root = next(one for one in fused.values() if one.root)
    written = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(_size(fused[one.operands[1]].type if one.opcode == "dynamic-update-slice" else one.type) for one in written)


def _flops(body: Computation, one: _Instruction) -> float:
    """Of a convolution or a matrix product; padding is multiplied too."""
    contracted, labels = _CONTRACTED.search(one.rest), _LABELS.search(one.rest)
    arrays = [_shape(one), *(_shape(body[name]) for name in one.operands if name in body)]
    if contracted:
        return 2.0 * math.prod(arrays[0]) * math.prod(arrays[1][axis] for axis in _numbers(contracted[1]))
    if not labels:
        return 0.0
    # Positions and examples of the forward convolution's result times the weights, also backwards.
    result, left, right = arrays[:3]
    if "BackwardFilter" in one.rest:
        kernel, output = result, right
    elif "BackwardInput" in one.rest:
        kernel, output = right, left
    else:
        kernel, output = right, result
    return 2.0 * math.prod(output) / output[labels[3].index("f")] * math.prod(kernel)


def _layer(instructions: list[_Instruction]) -> str:
    """The modules in the first name that has any: what follows `encoder`, `decoder` or the prior, without the operation."""
    for one in instructions:
        found = re.search(r'op_name="([^"]*)"', one.rest)
        path = (
            re.search(r"/((?:encoder|decoder|prior_model)\b[^/]*(?:/\w+)*?)(?:/cond|/jit\(|/\w+$|/\w*\()", found[1])
            if found
            else None
        )
        if found and path:
            return path[1] + (" (backward)" if "transpose(" in found[1] else "")
    return ""
