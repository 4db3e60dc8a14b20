"""What the compiler says of a compiled program: FLOPs, bytes, memory and collectives."""

import math
import re
from typing import Any, NamedTuple

from bsvae_jax.distributed.hardware import memory_sizes
from bsvae_jax.profiling.kernels import Kernel, kernels


class Collective(NamedTuple):
    """Communication of one kind in one step."""

    kind: str
    """all-reduce, all-gather, ..."""
    operations: int
    size: int
    """Bytes of the results on each device, of all operations."""


class ProgramCost(NamedTuple):
    """What the compiler says of one program, per device."""

    flops: float
    """Floating-point operations of one step; a multiply-add is two."""
    bytes_accessed: float
    """Bytes moved between the chip and its memory in one step."""
    arguments: int
    """Bytes of the arguments."""
    results: int
    """Bytes of results that do not take the place of an argument."""
    temporary: int
    """Bytes of everything in between, activations above all."""
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...] = ()
    """Of a GPU; of nothing else known."""

    @property
    def memory(self) -> int:
        """Peak memory, bytes."""
        return self.arguments + self.results + self.temporary

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / max(self.bytes_accessed, 1.0)

    @property
    def communicated(self) -> int:
        """Bytes of all collectives."""
        return sum(collective.size for collective in self.collectives)

    @property
    def launches(self) -> int:
        """Kernels of a step on a GPU."""
        return sum(kernel.times for kernel in self.kernels)


def program_cost(compiled: Any, gpu: bool = False) -> ProgramCost:
    """What the compiler says of a compiled program; of one for a GPU, which may not be there, what its text says."""
    text = compiled.as_text()
    if gpu:
        found = kernels(text)
        flops, moved = (sum(k.times * amount(k) for k in found) for amount in (lambda k: k.flops, lambda k: k.moved))
        return ProgramCost(float(flops), float(moved), *memory_sizes(compiled), collectives(text), found)
    cost = compiled.cost_analysis()
    return ProgramCost(
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)),
        *memory_sizes(compiled),
        collectives(text),
    )


_COLLECTIVE = re.compile(r" = ([^%]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_GROUPS_OF_ONE = re.compile(r"replica_groups=(\{\{\d+\}[,}]|\[\d+,1\])")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
"""The same of newer compilers, which name the axes of the mesh."""


def _exchanges(attributes: str) -> bool:
    """Whether the groups of a collective have more than one device each."""
    named = _NAMED.search(attributes)
    if named is None:
        return not _GROUPS_OF_ONE.search(attributes)
    sizes = dict(axis.replace("'", "").strip().split("=") for axis in named[1].split(","))
    return any(int(sizes[axis.strip().strip("'")]) > 1 for axis in named[2].split(",") if axis.strip())


def collectives(program: str) -> tuple[Collective, ...]:
    """Kinds, counts and sizes of the communication in the text of a compiled program; one pass through a loop is counted."""
    found: dict[str, list[int]] = {}
    for result, kind, rest in _COLLECTIVE.findall(program):
        sizes = [
            math.prod(int(n) for n in shape.split(",") if n) * (1 if name == "pred" else max(1, int(bits) // 8))
            for name, bits, shape in _ARRAY.findall(result)
        ]
        if _exchanges(rest):
            found.setdefault(kind, []).append(sum(sizes))
    return tuple(Collective(kind, len(sizes), sum(sizes)) for kind, sizes in sorted(found.items()))
