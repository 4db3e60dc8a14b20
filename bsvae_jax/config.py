"""An experiment as one frozen, typed value, checked when it is made.

Every field can be overridden on the command line by its dotted name (`--optimizer.learning-rate 3e-4`). The fields `data`,
`network`, `decoder_variance`, `prior`, `beta_schedule` and `optimizer` are kinds: those of the library can be chosen by name
(`--decoder-variance constant`), and a config file may define its own by deriving `Dataset`, `Network`, `DecoderVariance`,
`Prior`, `BetaSchedule` or `Optimizer`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from bsvae_jax._io.files import as_path
from bsvae_jax.data.augmentation import Augmentation
from bsvae_jax.data.datasets import MNIST, TFDS, Arrays, Dataset, Digits, Folder, check_validation
from bsvae_jax.errors import UserError, check_choice, check_count, check_flag, check_kind, check_number, nearest
from bsvae_jax.models.latent_map import Spatial
from bsvae_jax.models.linear import Linear
from bsvae_jax.models.mlp import MLP
from bsvae_jax.models.network import Network
from bsvae_jax.models.priors import Flow, FlowMatching, Mixture, Prior, StandardNormal, VampPrior
from bsvae_jax.models.residual import Residual
from bsvae_jax.objective import Constant, DecoderVariance, FreeBits, Kind, Learned, Optimal, Predicted
from bsvae_jax.objective import beta_schedule as schedules
from bsvae_jax.objective.kind import check_saved, plain


@dataclass(frozen=True)
class Optimizer(Kind):
    """AdamW and its schedule, in steps of the whole run. A class of your own replaces AdamW in `build` and keeps the rest.

    >>> import optax
    >>> @dataclass(frozen=True)
    ... class Lion(Optimizer):
    ...     b1: float = 0.9
    ...
    ...     def build(self, schedule, mask):
    ...         return optax.lion(schedule, self.b1, weight_decay=self.weight_decay, mask=mask)
    >>> Config(optimizer=Lion(learning_rate=1e-4)).optimizer.b1
    0.9

    Raises:
      UserError: a field out of range, or `warmup_steps` with a schedule that has none.
    """

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Decoupled weight decay, multiplied by the learning rate (as in AdamW of PyTorch and optax)."""
    schedule: Literal["cosine_restarts", "cosine", "constant"] = "cosine"
    """cosine_restarts: `cycles` equal cosine cycles from the peak to 0 (the paper: two); cosine: one, after the warm-up."""
    cycles: int = 2
    """Number of cycles of cosine_restarts."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, for cosine and constant."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient; None: no clipping."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the parameters, used for evaluation; None: none."""
    skip_nonfinite: int = 0
    """Steps in a row that may be left out because loss or gradient is not finite; one more stops the run. 0: the first does."""

    def build(self, schedule: Callable[[Any], Any], mask: Callable[[Any], Any] | None) -> Any:
        """What makes updates of gradients, which are clipped before where asked for: an `optax.GradientTransformation`.

        Args:
          schedule: learning rate by step, with a peak of 1: the updates are multiplied by `learning_rate` afterwards, so that
            members of a sweep that differ in it share one program.
          mask: gives True for each parameter that may decay, as `optax.adamw` takes it; those of a prior may not. None: all.
        """
        import optax  # only what trains needs it: a wrong option is answered without

        return optax.adamw(schedule, weight_decay=self.weight_decay, mask=mask)

    def __post_init__(self) -> None:
        check_number("optimizer.learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_number("optimizer.weight_decay", self.weight_decay, low=0.0)
        check_choice("optimizer.schedule", self.schedule, ("cosine_restarts", "cosine", "constant"))
        check_count("optimizer.cycles", self.cycles)
        check_count("optimizer.warmup_steps", self.warmup_steps, low=0)
        if self.warmup_steps and self.schedule == "cosine_restarts":
            raise UserError("optimizer.warmup_steps needs schedule cosine or constant; cosine_restarts starts at the peak.")
        if self.gradient_clip is not None:
            check_number("optimizer.gradient_clip", self.gradient_clip, low=0.0, open_low=True)
        check_count("optimizer.skip_nonfinite", self.skip_nonfinite, low=0)
        if self.ema_decay is not None:
            check_number("optimizer.ema_decay", self.ema_decay, low=0.0, high=1.0 - 1e-9)


@dataclass(frozen=True)
class Config:
    """One experiment: data, model, objective and training.

    >>> config = Config(network=MLP((64,)), decoder_variance=Optimal("batch"), beta=0.1)
    >>> config.data, config.beta, config.epochs
    (Digits(validation=0.1), 0.1, 50)
    >>> Config(beta=-1.0)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: beta must be a finite number >= 0, got -1.0.

    Raises:
      UserError: a field of a wrong kind or out of range.
    """

    data: Dataset = field(default_factory=Digits)
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: Network = field(default_factory=MLP)
    latent_size: int = 16
    """L, the number of latent variables."""
    prior: Prior = field(default_factory=StandardNormal)
    decoder_variance: DecoderVariance = field(default_factory=Optimal)
    beta: float = 1.0
    """Weight of the rate; 1 is the ELBO."""
    beta_schedule: schedules.BetaSchedule = field(default_factory=schedules.ConstantBeta)
    free_bits: FreeBits = field(default_factory=FreeBits)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 50
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, over all devices together."""
    evaluate_every: int = 1
    """Epochs between evaluations on held-out data, each followed by a checkpoint; the last epoch always ends with one."""
    posterior_samples: int | None = None
    """Samples of q(z|x) of each image in the evaluation of all splits at the end (one on the way); None: as many as make 10,000
    of a split, at most 16."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Type of matrix products and activations; parameters, statistics, sums and logs are float32 always. float32 is float32: no
    product is rounded, whatever `jax_default_matmul_precision` says. tensorfloat32: the factors of products are rounded to 11
    bits, faster on GPUs since Ampere; a TPU takes three bfloat16 products for one instead of six, a CPU rounds nothing. GPUs
    before Ampere (T4, V100) have neither type, and refuse it. There is no float16: gradients below 6e-8 would vanish in it."""
    gradient_accumulation: int = 1
    """Parts into which a batch is divided and which follow one another, to save memory at the price of a second forward pass.
    The numbers are those of the whole batch, but for BatchNorm, which sees one part at a time."""
    rematerialize: bool = False
    """Compute what happens inside each block of a convolutional network again in the backward pass, instead of keeping it."""
    steps_per_dispatch: int | None = None
    """Steps in one compiled call; None: one for convolutions on a CPU, 50 otherwise (measured to be fastest)."""
    devices: int | None = None
    """Devices to share the batch; None: all there are."""
    device_map: Literal["shard_map", "pmap"] = "shard_map"
    """How a training step is run on all devices: `jit` of `shard_map`, or `pmap`; the numbers are the same."""
    resident_memory: float = 0.5
    """Share of a device's memory that the images may take; a larger set is streamed to the devices batch by batch."""
    seed: int = 0
    """Decides the initial parameters, the order of the data, augmentation and posterior samples."""
    classes: int | None = field(default=None, metadata={"saved": "if given"})
    """Classes that encoder and decoder are told of, by the labels of the data (Sohn et al. 2015); None: they are told none."""

    def __post_init__(self) -> None:
        for own in dataclasses.fields(self):
            object.__setattr__(self, own.name, plain(getattr(self, own.name)))
        for name, base in KINDS.items():
            check_saved(name, getattr(self, name), base)
        check_validation(self.data)
        check_kind("augmentation", self.augmentation, Augmentation)
        check_count("latent_size", self.latent_size)
        if isinstance(self.prior, FlowMatching):
            raise UserError(
                "prior FlowMatching has no density that could be trained with the model; train with another, then "
                "bsvae fit-prior WORKDIR --kind flow_matching."
            )
        if self.network.has_latent_map and not isinstance(self.prior, StandardNormal):
            raise UserError(
                f"prior {type(self.prior).__name__} is over vectors and knows nothing of the map that network "
                f"{type(self.network).__name__} gives; choose StandardNormal, and fit a model of the latents afterwards."
            )
        if self.prior.latent_size not in (None, self.latent_size):
            raise UserError(f"prior.latent_size {self.prior.latent_size} is not latent_size {self.latent_size}; leave it out.")
        check_number("beta", self.beta, low=0.0)
        check_kind("free_bits", self.free_bits, FreeBits)
        self.free_bits.check(self.latent_size, splits=isinstance(self.prior, StandardNormal))
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("gradient_accumulation", self.gradient_accumulation)
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"batch_size {self.batch_size} does not divide into {self.gradient_accumulation} parts (gradient_accumulation)."
            )
        check_flag("rematerialize", self.rematerialize)
        check_count("evaluate_every", self.evaluate_every)
        check_choice("precision", self.precision, ("float32", "tensorfloat32", "bfloat16"))
        check_choice("device_map", self.device_map, ("shard_map", "pmap"))
        for name in ("classes", "posterior_samples", "steps_per_dispatch", "devices"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_number("resident_memory", self.resident_memory, low=0.0, high=1.0)
        check_count("seed", self.seed, low=0, high=2**32 - 1)  # larger ones repeat smaller ones


KINDS: dict[str, type[Kind]] = {
    "data": Dataset,
    "network": Network,
    "decoder_variance": DecoderVariance,
    "prior": Prior,
    "beta_schedule": schedules.BetaSchedule,
    "optimizer": Optimizer,
}
"""The fields that are kinds, and the base that a class of your own derives."""

CHOICES: dict[str, dict[str, type]] = {
    "data": {"digits": Digits, "mnist": MNIST, "arrays": Arrays, "folder": Folder, "tfds": TFDS},
    "network": {"linear": Linear, "mlp": MLP, "residual": Residual, "spatial": Spatial},
    "decoder_variance": {"constant": Constant, "optimal": Optimal, "learned": Learned, "predicted": Predicted},
    "prior": {
        "standard_normal": StandardNormal,
        "mixture": Mixture,
        "vamp": VampPrior,
        "flow": Flow,
        "flow_matching": FlowMatching,
    },
    "beta_schedule": {
        "constant_beta": schedules.ConstantBeta,
        "linear_warmup": schedules.LinearWarmup,
        "cyclical": schedules.Cyclical,
        "capacity": schedules.Capacity,
        "target_rate": schedules.TargetRate,
    },
    "optimizer": {"adamw": Optimizer},
}
"""The names by which the command line and `config.json` call the kinds of the library; others are written `module:Class`."""

_SHORT = {kind: name for choice in CHOICES.values() for name, kind in choice.items()}


# --- Files ------------------------------------------------------------------------------------------------------------


def load_config(path: str | Path) -> Config:
    """The `Config` returned by `get_config()` of a Python file. A config file is code: run only those you trust.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "mine.py"
    ...     _ = file.write_text("import bsvae_jax as bv; get_config = lambda: bv.Config(beta=0.1)")
    ...     load_config(file).beta
    0.1

    Raises:
      UserError: no such file, one that is not Python, no `get_config`, one that returns something else, an unknown field (the
        nearest name is offered), or a value out of range. Whatever else the file raises passes.
    """
    path = as_path(path, "path")
    module = load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config() returning a bsvae_jax Config.")
    with naming_fields(path):
        config = module.get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} must return a bsvae_jax Config, got {type(config).__name__}.")
    return config


def load_module(path: Path, *also: type) -> ModuleType:
    """Run a config file; what it defines. `also`: classes beyond the config's own whose fields an error may name.

    While it runs, its folder is among those that it can import from. It stays in `sys.modules`, so that its classes are found
    when a run that used them is opened.
    """
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"There is no config file {path}{nearest(str(path), siblings)}.")
    location = path.resolve()
    # The path takes part, so that two files of one name in two folders stay apart.
    name = f"{_LOADED}{path.stem}_{hashlib.sha256(str(location).encode()).hexdigest()[:8]}"
    before, content = sys.modules.get(name), location.read_bytes()
    if before is not None and getattr(before, "_bsvae_content", None) == content:
        return before  # so that a class of it is one class
    spec = importlib.util.spec_from_file_location(name, location)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a .py file with get_config().")
    module = importlib.util.module_from_spec(spec)
    module._bsvae_content = content  # type: ignore[attr-defined]
    sys.modules[name] = module  # dataclasses look their module up there while they are made
    sys.path.insert(0, str(location.parent))
    try:
        with naming_fields(path, *also):
            # The bytes just read: the loader would leave bytecode beside the file, and take it for an edit of the same second.
            exec(compile(content, location, "exec"), vars(module))
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    finally:
        sys.path.remove(str(location.parent))
    return module


_LOADED = "_bsvae_config_"
"""Begins the names of the modules that config files become."""


@contextlib.contextmanager
def naming_fields(path: Path, *also: type) -> Iterator[None]:
    """Says which field of which config (or of the classes `also`) a file got wrong, or that a class of it is not frozen."""
    try:
        yield
    except TypeError as error:
        if str(error) == "cannot inherit non-frozen dataclass from a frozen one":
            raise UserError(f"{path}: a kind must be a frozen dataclass; write @dataclass(frozen=True).") from error
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise UserError(f"{path}: {_unknown_field(unknown[1], unknown[2], *also)}") from error


def _unknown_field(class_name: str, name: str, *also: type) -> str:
    known_classes: tuple[Any, ...] = (Config, Augmentation, FreeBits, *also, *_SHORT)
    known = [f.name for c in known_classes if c.__name__ == class_name for f in dataclasses.fields(c)]
    return f"{class_name} has no field {name!r}{nearest(name, known)}."


def is_builtin(kind: Kind) -> bool:
    """Whether a kind is one of the library's."""
    return type(kind) in _SHORT


def kind_name(kind: type) -> str:
    """What `config.json` calls a class: the short name of one of the library, `module:Class` of any other.

    The module of a class from a config file, or from a script, is the name of the file.
    """
    if kind in _SHORT:
        return _SHORT[kind]
    module = kind.__module__
    if module.startswith(_LOADED):
        module = module[len(_LOADED) : -len("_00000000")]
    elif module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", "__main__")).stem
    return f"{module}:{kind.__qualname__}"


def kinds_of(config: Config | None) -> tuple[type, ...]:
    """The classes that a config is made of."""
    return () if config is None else tuple(type(getattr(config, name)) for name in KINDS)


def _find_kind(name: str, base: type, given: tuple[type, ...]) -> type:
    """The class that `kind_name` calls so: of the library, of those `given`, or of a loaded module; none is imported.

    Raises:
      UserError: it is not there.
    """
    options = {short: kind for kind, short in _SHORT.items() if issubclass(kind, base)}
    if name in options:
        return options[name]
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise UserError(f"Unknown kind {name!r}{nearest(name, options)}; known: {', '.join(options)}.")
    for own in given:
        if issubclass(own, base) and kind_name(own) == name:
            return own
    for module in reversed(list(sys.modules.values())):  # of config files of one name, the one loaded last
        kind = getattr(module, class_name, None) if isinstance(module, ModuleType) else None
        if isinstance(kind, type) and issubclass(kind, base) and kind_name(kind) == name:
            return kind
    if any(loaded == module_name or loaded.startswith(f"{_LOADED}{module_name}_") for loaded in sys.modules):
        raise UserError(f"This needs the class {class_name} of {module_name}.py, which has no such {base.__name__} any more.")
    raise UserError(
        f"This needs the class {class_name} of {module_name}.py, which is not loaded, and a run folder never imports code by "
        f"itself. Give the file that defines it: --config {module_name}.py on the command line, restore(workdir, "
        f"config='{module_name}.py') in Python, or import {module_name} first."
    )


def to_dict(config: Any) -> Any:
    """A config as plain JSON values; kinds are written under `"kind"` by `kind_name`."""
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    saved = [f for f in dataclasses.fields(config) if f.init and f.metadata.get("of") != "VAE"]
    values = {f.name: to_dict(getattr(config, f.name)) for f in saved}
    fields = {f.name: values[f.name] for f in saved if "saved" not in f.metadata or values[f.name] is not None}
    return {"kind": kind_name(type(config)), **fields} if isinstance(config, Kind) else fields


def from_dict(values: dict[str, Any], kind: Any = Config, given: tuple[type, ...] = ()) -> Any:
    """The inverse of `to_dict`; `given`: classes that need not be looked for.

    Raises:
      UserError: a field is unknown, or a kind is, or the class of one is not loaded.
    """
    values = dict(values)
    name = values.pop("kind", None)
    # Of a base that can be made itself, Optimizer, earlier versions did not write the kind.
    if isinstance(kind, type) and issubclass(kind, Kind) and (name is not None or inspect.isabstract(kind)):
        if not isinstance(name, str):
            raise UserError(f"One kind of {kind.__name__} is wanted, but 'kind' does not say which.")
        kind = _find_kind(name, kind, given)
        if issubclass(kind, Dataset):
            values.setdefault("validation", None)  # earlier versions held nothing out, and did not write it
    known = typing.get_type_hints(kind)
    result = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(_unknown_field(kind.__name__, name))
        if isinstance(value, dict):
            value = from_dict(value, known[name], given)
        result[name] = _as_tuple(value)
    return kind(**result)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def with_execution_of(config: Config, other: Config) -> Config:
    """`config` with those fields of `other` that say on what, in what pieces and from which files it is computed, not what."""
    fields = {name: getattr(other, name) for name in ("devices", "device_map", "steps_per_dispatch", "resident_memory")}
    if type(config.data) is type(other.data):  # what is in the files is compared by the fingerprint of the images
        places = {name: getattr(other.data, name) for name in config.data.locations}
        fields["data"] = dataclasses.replace(config.data, **places)
    return dataclasses.replace(config, **fields)


def changes(saved: Config, wanted: Config) -> list[str]:
    """The `differences` between two configs by which `wanted` is another experiment than `saved`."""
    return differences(saved, with_execution_of(wanted, saved))


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """The plain values of a config, or of `to_dict` of one, by dotted name.

    >>> flattened(Optimizer())["learning_rate"], flattened(Config())["decoder_variance.over"]
    (0.001, 'example')
    """
    values = to_dict(config)
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, value in values.items() for k, v in flattened(value, f"{prefix}.{name}".strip(".")).items()}


def differences(one: Config, other: Config) -> list[str]:
    """`"beta: 1.0 -> 2.0"` for every field, by dotted name, in which two configs differ."""
    a, b = flattened(one), flattened(other)
    return [
        f"{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)
    ]
