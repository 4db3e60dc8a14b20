"""`bsvae compile`: the speed of training on other machines, computed."""

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any, Literal

from bsvae_jax.cli.document import document
from bsvae_jax.cli.experiment import ConfigFile, Experiment, read_experiment
from bsvae_jax.cli.options import Merged
from bsvae_jax.config import Config
from bsvae_jax.errors import check_count, check_number

if TYPE_CHECKING:
    from bsvae_jax.data import DataShape


def compile(
    config_file: ConfigFile,
    experiment: Merged[Experiment],
    topology: tuple[str, ...] = ("v5e:2x4",),
    members: int = 1,
    scaling: Literal["weak", "strong"] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    images: int | None = None,
    full: bool = False,
    top: int = 0,
    memory: float | None = None,
    json: bool = False,
) -> None:
    """Compile the training and sampling programs of a config for a machine, which need not be there.

    Prints per device the arithmetic, the memory moved and held, the communication, the kernels of a GPU by kind, the least
    time of a step by the machine's published peaks, and the largest batch that fits. TPUs are compiled for with libtpu alone,
    GPUs with the extra `cuda` alone and JAX 0.12; nothing is run and no data are read where their size is known.

    With --json: {"machines": [{"topology", "chip", "devices", "batch_size", "members", "precision", "step": {"flops",
    "bytes_accessed", "arguments", "results", "temporary", "collectives"}, "state": {what: bytes}, "memory", "peak_memory",
    "times", "images_per_second", "utilization", "largest_batch", "sampling"}]}, per device, in bytes and seconds.

    Example: bsvae compile configs/mnist.py --topology v5e:2x4 h100 --precision bfloat16 --batch-size 4096

    Args:
      config_file: A Python file with get_config(); configs/ holds ready ones.
      experiment: The experiment of a config file, changed by options.
      topology: A TPU and the arrangement of its chips, v2:2x2x1 to v6e:16x16; GPUs of one host, t4, l4, a100, h100, h200
        or h100x8; or cpu, gpu or tpu, those of this machine. With several and --scaling, a table.
      members: Compile a stack of so many members of a sweep, divided over the devices.
      scaling: weak: batch_size images, or --members, on every device; strong: on all of them together.
      image_shape: Height, width and channels, in place of the data's own, which are then not read.
      images: Number of training images, with --image-shape.
      full: Let the compiler of TPUs take its time, minutes, as it does before training; times are about the same.
      memory: GiB of a device that training may take, in place of the published ones: with --topology cpu, whose program holds
        about the arrays of any other, an estimate for a GPU that cannot be compiled for here.
      json: Print one JSON document on standard output.
      top: List so many kernels of a GPU's step, those that move the most bytes, with the layer that each comes from.
    """
    from bsvae_jax.data import shape_of
    from bsvae_jax.distributed.hardware import check_platform
    from bsvae_jax.profiling import aot
    from bsvae_jax.training.state import check_against_shape, for_data

    config = experiment.config
    if memory is not None:
        check_number("--memory", memory, low=0.0, open_low=True)
    limit = None if memory is None else memory * 2**30
    for name in topology:  # before anything is compiled, and before JAX looks for a GPU and finds none
        aot.machine(name, config.devices)
    check_platform()
    check_count("--members", members)
    check_count("--top", top, low=0)
    with document(json) as found:
        shape = shape_of(config.data, image_shape, images)
        config = for_data(config, shape.image_shape)
        check_against_shape(config, shape)
        if scaling is None:
            found["machines"] = [_describe(config, shape, name, members, full, limit, top) for name in topology]
            return
        rows = []
        for name in topology:
            devices = len(aot.machine(name, config.devices)[0])
            factor = 1 if scaling == "strong" else devices
            if members == 1:
                scaled = dataclasses.replace(config, batch_size=config.batch_size * factor)
                rows.append(aot.compile_training(scaled, shape, name, None, 1, full, limit))
            else:
                rows.append(aot.compile_training(config, shape, name, None, members * factor, full, limit))
            print(aot.scaling_table(rows).splitlines()[-1], file=sys.stderr)
        print(aot.scaling_table(rows))
        print("Computed, not measured: the compiler's counts and published peaks.")
        found["machines"] = [aot.as_json(row) for row in rows]


def _describe(
    config: Config, shape: "DataShape", name: str, members: int, full: bool, limit: float | None, top: int
) -> dict[str, Any]:
    """Print all that is known of one machine; the same as plain values."""
    from bsvae_jax.profiling import aot

    compiled = aot.compile_training(config, shape, name, None, members, full, limit)
    print(aot.describe(compiled))
    if top and compiled.step.kernels:
        print(aot.top_table(compiled.step, top))
    largest = None
    if compiled.memory < math.inf:
        other = aot.compile_other_batch(config, shape, name, None, members, full, limit)
        unit = config.gradient_accumulation * (compiled.devices if members == 1 else 1)
        largest = aot.largest_batch(compiled, other, unit)
        if other is not None and largest is not None:
            print(
                f"largest batch that fits: about {largest:,}, by the memory of {compiled.batch_size} and of {other.batch_size}"
            )
    sampling = aot.compile_sampling(config, shape, name, None, full)
    print(f"sampling 500 images: {sampling.flops:.3g} FLOP, {sampling.bytes_accessed:.3g} bytes per device\n")
    return {**aot.as_json(compiled), "largest_batch": largest, "sampling": sampling._replace(kernels=())}


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the options are without being given: the experiment of the config file."""
    return {"experiment": read_experiment("compile", arguments)}
