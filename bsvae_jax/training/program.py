"""What is compiled: the training program of one model, or of a stack of models, and the data on the devices that it runs on.

Everything a program is made from but the pixels is a `DataShape`, so that it can be compiled for devices that are not there.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bsvae_jax.config import Config, Optimizer, is_builtin
from bsvae_jax.data import DataShape, ImageSet, ShuffledOrder
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import AHEAD, DeviceImages, Stream, fits, streamed_window
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed.hardware import activations, memory_sizes
from bsvae_jax.distributed.mesh import (
    DATA_AXIS,
    MEMBER_AXIS,
    REPLICATED,
    Execution,
    P,
    member_slots,
    parallelize,
    place,
    replicate,
    stack,
)
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.scores import (
    Calibration,
    SplitScores,
    evaluation_batch,
    pixel_variance_of,
    samples_of_each,
    score_members,
    split_key,
)
from bsvae_jax.models.vae import VAE
from bsvae_jax.random import arranged
from bsvae_jax.training.packed import AS_GIVEN, Form
from bsvae_jax.training.state import build_hyperparameters, build_model, create_state, steps_per_dispatch
from bsvae_jax.training.step import StepMetrics, TrainState, run_steps, run_streamed_steps

_DEFAULT = 0.5
"""In place of every number of a decoder variance or of a schedule that a program takes as an array."""


def program_config(config: Config) -> Config:
    """The config with a fixed value for every number that a compiled program takes as an array.

    Configs that agree in it can be trained by one program.
    """
    kinds: dict[str, Any] = {
        name: dataclasses.replace(kind, **dict.fromkeys(kind.traced, _DEFAULT))
        for name, kind in (("decoder_variance", config.decoder_variance), ("beta_schedule", config.beta_schedule))
    }
    return dataclasses.replace(
        config,
        beta=1.0,
        seed=0,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
        **kinds,
    )


def program_model(config: Config, data: DataShape) -> VAE:
    """The model inside the program."""
    return build_model(config, data.image_shape, data.bin_width, DATA_AXIS)


def parallelize_training(config: Config, data: DataShape, mesh: Mesh, execution: Execution, resident: bool) -> Any:
    """The training program, not compiled yet: `run_steps` or, unless the images are `resident`, `run_streamed_steps`.

    Args:
      config: of any member.
      data: of the images.
      mesh: of `data_mesh` for execution 'loop', else of `sweep_mesh`.
      execution: 'loop' for one model; 'scan' or 'vmap' for a stack.
      resident: whether the images lie on the devices.
    """
    where = (REPLICATED, P(None, DATA_AXIS)) if resident else (P(None, DATA_AXIS),)
    run = run_steps if resident else run_streamed_steps
    form = form_of_parameters(config, mesh.devices.flat[0].platform)
    return parallelize(
        functools.partial(run, augmentation=config.augmentation, form=form),
        mesh,
        (REPLICATED, *where, REPLICATED, REPLICATED),
        REPLICATED,
        donate=(0,),
        execution=execution,
        shared=(1, 3) if resident else (2,),
        convolutional=config.network.convolutional,
        by=config.device_map,
    )


def form_of_parameters(config: Config, platform: str) -> Form:
    """The form of the parameters between steps: on GPUs, 39 of 325 kernels less by packing, and 17 of 310 by rounding.

    (H100, MNIST network, float32 and bfloat16.) AdamW treats all numbers alike, and this package's networks use kernels in the
    type of their activations alone; an optimizer or a network of the user's own may not.
    """
    if platform != "gpu":
        return AS_GIVEN
    rounds = config.precision == "bfloat16" and is_builtin(config.network)
    return Form(type(config.optimizer) is Optimizer, activations(config.precision) if rounds else None)


def abstract_arguments(
    config: Config, data: DataShape, mesh: Mesh, execution: Execution, members: int, window: int, resident: bool
) -> tuple[Any, ...]:
    """Shapes, types and shardings of what the program of `parallelize_training` is called with; no array is made.

    Args:
      config: of any member.
      data: of the images.
      mesh: as for `parallelize_training`.
      execution: the same.
      members: of the stack; 1 for execution 'loop'.
      window: steps in a call.
      resident: as for `parallelize_training`.
    """
    stacked = execution != "loop"
    slots = (member_slots(mesh, members),) if stacked else ()
    member = (MEMBER_AXIS,) if stacked else ()

    def abstract(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    program = program_config(config)
    total = steps_through(config.epochs, data.train, config.batch_size)
    one = jax.eval_shape(lambda: (create_state(program, program_model(program, data), total), build_hyperparameters(program)))
    state, hyperparameters = jax.tree.map(lambda leaf: abstract((*slots, *leaf.shape), leaf.dtype, *member), one)
    count = abstract((), jnp.int32)
    where = (*slots, window, config.batch_size)
    order = abstract(where, jnp.int32, *member, None, DATA_AXIS)
    if resident:
        images, labels = abstract((data.train, math.prod(data.image_shape)), data.dtype), abstract((data.train,), jnp.int32)
    else:
        images, labels = abstract((*where, *data.image_shape), data.dtype, *member, None, DATA_AXIS), order
    examples = Examples(images, None if config.classes is None else labels, data.levels)
    return (state, examples, *((order,) if resident else ()), count, hyperparameters)


class Program:
    """The compiled programs of one model, or of a stack of models that differ only in numbers, with the data they run on."""

    def __init__(self, config: Config, images: ImageSet, mesh: Mesh, execution: Execution = "loop", members: int = 1):
        """Of all members whose `program_config` is that of `config`; compiled at the first use.

        Args:
          config: of any member.
          images: the data.
          mesh: of `data_mesh` for execution 'loop', else of `sweep_mesh`.
          execution: 'loop' for one model at a time; 'scan' or 'vmap' for a stack.
          members: of the stack.
        """
        self.config, self.images, self.mesh, self.execution = program_config(config), images, mesh, execution
        self.data = images.shape
        self.total = steps_through(config.epochs, len(images.train), config.batch_size)
        self.model = program_model(self.config, self.data)
        self.resident = resident = fits(self.data.nbytes, mesh, config.resident_memory)
        """Whether the images lie on the devices; they are streamed otherwise."""
        self.window = steps_per_dispatch(config, mesh.devices.flat[0].platform)
        if not resident:
            self.window = streamed_window(self.data.image_bytes, config.batch_size, members, self.window)
        self._run_steps: Any = parallelize_training(self.config, self.data, mesh, execution, resident)
        self.compiled: Any = None
        """The training program that `needed_bytes` has compiled, for `use` in another of the same config and members."""
        # Equal slices of a batch are the shares of the devices.
        self._arrangement = arranged(config.batch_size, mesh.shape[DATA_AXIS], config.gradient_accumulation)

    @functools.cached_property
    def splits(self) -> dict[str, DeviceImages]:
        """The images of each split, placed when they are first asked for: before that, nothing is taken of a device."""
        return {
            split: DeviceImages(self.images.examples(split, self.config.classes), self.mesh, self.resident)
            for split in self.images.splits
        }

    def new_state(self, config: Config, images: ImageSet | None = None) -> TrainState:
        """The state of a member before its first step, with this program's constants; arguments as for `create_state`."""
        state = create_state(config, self.model, self.total, images=images)
        return state.replace(beta_schedule=self.config.beta_schedule)

    def pack(self, trees: Sequence[Any]) -> Any:
        """The arrays of all members in the form in which they are driven; never aliases them."""
        return replicate(trees[0], self.mesh) if self.execution == "loop" else stack(list(trees), self.mesh)

    def unpack(self, tree: Any, members: int) -> list[Any]:
        """The arrays of each member, the inverse of `pack`."""
        if self.execution == "loop":
            return [tree]
        host = jax.device_get(tree)
        return [jax.tree.map(lambda leaf: jnp.asarray(leaf[member]), host) for member in range(members)]  # noqa: B023

    @contextlib.contextmanager
    def batches(self, orders: Sequence[ShuffledOrder], starts: Iterator[int]) -> Iterator[Callable[[int], Any]]:
        """What `take_steps` is given: a function of the step that a window begins with.

        Args:
          orders: of each member.
          starts: the steps that will be asked for, in order.
        """
        if self.resident:
            yield lambda step: self._place_order(_windows(orders, step, self.window))
            return
        spec = P(None, DATA_AXIS)
        if self.execution != "loop":
            orders = [*orders, *[orders[-1]] * (member_slots(self.mesh, len(orders)) - len(orders))]
            spec = P(MEMBER_AXIS, None, DATA_AXIS)
        train = self.images.examples("train", self.config.classes)
        with Stream(train, orders, self.mesh, spec, self.window, starts, self._arrangement) as stream:
            yield stream.take

    def _place_order(self, windows: list[Array]) -> Any:
        if self.config.gradient_accumulation > 1:
            windows = [window[:, self._arrangement] for window in windows]
        spec = P(None, DATA_AXIS)  # as a program that is compiled beforehand wants it
        return place(windows[0], self.mesh, spec) if self.execution == "loop" else stack(windows, self.mesh, spec)

    def take_steps(self, state: TrainState, batches: Any, count: int, hyperparameters: Any) -> tuple[TrainState, StepMetrics]:
        """The first `count` steps of a window of `batches`; the state's memory is reused."""
        train = self.splits["train"].resident
        data = (batches,) if train is None else (train, batches)
        return self._run_steps(state, *data, np.int32(count), hyperparameters)

    def _arguments(self, members: int) -> tuple[Any, ...]:
        data, window = self.data, self.window
        return abstract_arguments(self.config, data, self.mesh, self.execution, members, window, self.resident)

    def compile(self, members: int = 1) -> Any:
        """The compiled training program of a stack of `members`, or of one model, which `take_steps` runs from now on."""
        if self.config.device_map == "pmap":
            raise UserError("A program of pmap is compiled at its first call; choose device_map shard_map to look at it.")
        return self.use(self._run_steps.lower(*self._arguments(members)).compile())

    def use(self, compiled: Any) -> Any:
        """Run this program, of `compile`, from now on; returns it."""
        self._run_steps = compiled
        return compiled

    def needed_bytes(self, members: int) -> int:
        """Memory per device for training a stack of `members`, as the compiler counts it; it is compiled, and runs from now on.

        Arguments, results and temporary arrays, with the images of all splits where they are resident. A 'vmap' needs
        temporary arrays for every member, a 'scan' for one.
        """
        arguments = self._arguments(members)
        besides = self.data.nbytes - self.images.train.nbytes
        if not self.resident:  # the pieces on their way
            piece = sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(arguments[1]))
            besides = AHEAD * piece // self.mesh.devices.size
        compiled = self._run_steps.lower(*arguments).compile()
        if self.config.device_map != "pmap":
            self.compiled = self.use(compiled)
        return sum(memory_sizes(compiled)) + besides

    def score(
        self, state: TrainState, split: str, configs: Sequence[Config], calibrations: Sequence[Calibration] | None = None
    ) -> Iterator[SplitScores]:
        """Scores of each member on a split, with the posterior samples that every evaluation of it takes.

        One of each image on the way; given the `calibrations` of all members, as many as their configs say.
        """
        images, known = self.splits[split], [None] * len(configs) if calibrations is None else calibrations
        return score_members(
            self.model,
            state.variables(),
            images,
            self.pack([split_key(config.seed, split) for config in configs]),
            self.pack([pixel_variance_of(own, images) for own in known]),
            self.pack([build_hyperparameters(config).variance for config in configs]),
            [build_model(config, self.images.image_shape, self.images.bin_width).decoder_variance for config in configs],
            batch_size=evaluation_batch(self.images.image_shape),
            execution=self.execution,
            samples=1 if calibrations is None else samples_of_each(self.config.posterior_samples, len(images)),
        )


def _windows(orders: Sequence[ShuffledOrder], step: int, window: int) -> list[Array]:
    """Indices of each member's batches; members of one seed share their order, which is asked once."""
    indices = {id(order): order(step, window) for order in set(orders)}
    return [indices[id(order)] for order in orders]
