"""An experiment as one frozen, typed value, checked when it is made.

Every field can be overridden on the command line by its dotted name (`--optimizer.learning-rate 3e-4`); fields that are
one of several kinds (`data`, `network`, `decoder_variance`, `prior`) are chosen by name (`--decoder-variance constant`).
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bsvae_jax._io.files import as_path
from bsvae_jax.errors import UserError, check_count, nearest
from bsvae_jax.objective.elbo import Constant, DecoderVariance, Learned, Optimal, Predicted


def _check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        lower = f"{'>' if open_low else '>='} {low:g}"
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise UserError(f"{name} must be a finite number {lower}{upper}, got {value!r}.")


def _check_path(owner: Any, name: str, optional: bool = False) -> None:
    """A path may be given as one, and is kept as text, which `config.json` can hold."""
    value = getattr(owner, name)
    if isinstance(value, os.PathLike):
        object.__setattr__(owner, name, os.fspath(value))
    elif not isinstance(value, str) and not (optional and value is None):
        raise UserError(f"data.{name} must be a path, got {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}.")


# --- Data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """The 1,797 real handwritten 8x8 digits (17 grey levels) that scikit-learn carries: no download."""


@dataclass(frozen=True)
class MNIST:
    """MNIST from its four canonical idx files, gzipped or not, in a folder."""

    folder: str = "data/mnist"
    """Holds train-images-idx3-ubyte[.gz], train-labels-..., t10k-images-... and t10k-labels-..."""

    def __post_init__(self) -> None:
        _check_path(self, "folder")


@dataclass(frozen=True)
class Arrays:
    """Images of one's own: a `.npz` with `train` (and optionally `test`), or a `.npy`; see `bsvae_jax.data`."""

    path: str = ""
    """A `.npz` or `.npy` of shape [N, H, W] or [N, H, W, C]: uint8, or floats in [0, 1]."""
    holdout: float = 0.1
    """Share of the images kept for testing, at random, when the file has no `test`."""
    holdout_seed: int = 0
    """Decides which; apart from the run's seed, so that runs of different seeds are tested on the same images."""

    def __post_init__(self) -> None:
        _check_path(self, "path")
        _check_number("data.holdout", self.holdout, low=0.0, high=0.9, open_low=True)
        check_count("data.holdout_seed", self.holdout_seed, low=0)


def _check_preprocessing(source: "TFDS | Folder") -> None:
    for name in ("crop", "size"):
        if getattr(source, name) is not None:
            check_count(f"data.{name}", getattr(source, name))
    if source.channels not in (None, 1, 3):
        raise UserError(f"data.channels must be 1 (grey), 3 (colour) or None, got {source.channels!r}.")


@dataclass(frozen=True)
class TFDS:
    """A TFDS image set, read as array_record without TensorFlow.

    `mnist`, `fashion_mnist`, `cifar10`, `celeb_a` and `lsun/CATEGORY` are prepared at their first use; any other set of the
    catalogue once by `bsvae prepare NAME`, which needs TensorFlow.
    """

    name: str = "mnist"
    """TFDS name, also `name/config:version`."""
    data_dir: str | None = None
    """TFDS data directory; None: TFDS's own default."""
    manual_dir: str | None = None
    """Folder with the published files, where they are not to be, or cannot be, downloaded."""
    train_split: str = "train"
    """Split trained on."""
    test_split: str = "test"
    """Split held out."""
    crop: int | None = None
    """Side of the square kept around the centre of an image, in its own pixels; before `size`."""
    size: int | None = None
    """Images become size x size: the shorter side is resized to it, and the centre kept; None: as they are."""
    channels: int | None = None
    """1: grey, 3: colour; None: as they are."""

    def __post_init__(self) -> None:
        for name in ("data_dir", "manual_dir"):
            _check_path(self, name, optional=True)
        for name in ("name", "train_split", "test_split"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"data.{name} must be a name, got {getattr(self, name)!r}.")
        _check_preprocessing(self)


@dataclass(frozen=True)
class Folder:
    """Images of one's own: a folder, or a .zip, of image files.

    Folders named train and test (or validation, val) in it are those splits; else a share is held out. Folders below are
    classes.
    """

    path: str = ""
    """The folder or .zip."""
    holdout: float = 0.1
    """Share of the images kept for testing, at random, where there is no folder test."""
    holdout_seed: int = 0
    """Decides which; apart from the run's seed, so that runs of different seeds are tested on the same images."""
    crop: int | None = None
    """Side of the square kept around the centre of an image, in its own pixels; before `size`."""
    size: int | None = None
    """Images become size x size: the shorter side is resized to it, and the centre kept; None: as they are."""
    channels: int | None = None
    """1: grey, 3: colour; None: as they are."""

    def __post_init__(self) -> None:
        _check_path(self, "path")
        _check_number("data.holdout", self.holdout, low=0.0, high=0.9, open_low=True)
        check_count("data.holdout_seed", self.holdout_seed, low=0)
        _check_preprocessing(self)


DataSource = Digits | MNIST | Arrays | Folder | TFDS


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image, on the device. Evaluation data is never augmented."""

    rotation_degrees: float = 0.0
    """Rotation uniform in +- this many degrees."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: range of the cropped share of the area."""
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: range of its width-to-height ratio over that of the image (log-uniform)."""
    flip: bool = False
    """Mirror left-right with probability one half."""

    def __post_init__(self) -> None:
        _check_number("augmentation.rotation_degrees", self.rotation_degrees, low=0.0, high=180.0)
        for name in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, name)
            if not isinstance(bounds, tuple) or len(bounds) != 2:
                raise UserError(f"augmentation.{name} must be a pair (low, high), got {bounds!r}.")
            low, high = bounds
            _check_number(f"augmentation.{name}", low, low=0.0, open_low=True)
            _check_number(f"augmentation.{name}", high, low=low, high=1.0 if name == "crop_scale" else math.inf)
        if not isinstance(self.flip, bool):
            raise UserError(f"augmentation.flip must be True or False, got {self.flip!r}.")


# --- Networks and prior -----------------------------------------------------------------------------------------------


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    if not isinstance(widths, tuple) or not widths:
        raise UserError(f"{name} must be a tuple of at least one width, got {widths!r}.")
    for width in widths:
        check_count(name, width)


@dataclass(frozen=True)
class Linear:
    """Linear encoder (one posterior variance per latent) and linear decoder: the model that `theory` solves exactly."""


@dataclass(frozen=True)
class MLP:
    """Fully connected encoder and mirrored decoder with SiLU."""

    hidden: tuple[int, ...] = (512, 256)
    """Width of each hidden layer of the encoder; the decoder mirrors them."""

    def __post_init__(self) -> None:
        _check_widths("network.hidden", self.hidden)


@dataclass(frozen=True)
class Residual:
    """The paper's convolutional residual network; any image size and channel count."""

    widths: tuple[int, ...] = (32, 64, 128)
    """Channels per stage; every stage halves the image (rounded up). The paper: 32 64 128 (MNIST), 32 64 128 256 (CelebA)."""

    def __post_init__(self) -> None:
        _check_widths("network.widths", self.widths)


@dataclass(frozen=True)
class Spatial:
    """A convolutional autoencoder whose latents are a map, as latent diffusion uses; `latent_size` counts all its numbers."""

    widths: tuple[int, ...] = (64, 128, 256)
    """Channels per stage; between two stages the image is halved (rounded up), so the map is 4 times smaller with three."""
    blocks: int = 2
    """Residual blocks per stage, of the encoder and of the decoder."""
    attention: bool = True
    """Self-attention over all positions of the coarsest map."""
    groups: int = 32
    """Groups of GroupNorm; must divide every width."""

    def __post_init__(self) -> None:
        _check_widths("network.widths", self.widths)
        check_count("network.blocks", self.blocks)
        if not isinstance(self.attention, bool):
            raise UserError(f"network.attention must be True or False, got {self.attention!r}.")
        check_count("network.groups", self.groups)
        if any(width % self.groups for width in self.widths):
            widths = ", ".join(map(str, self.widths))
            common = math.gcd(*self.widths)
            raise UserError(
                f"network.groups must divide every width ({widths}), got {self.groups}; {common} and its divisors do."
            )


Network = Linear | MLP | Residual | Spatial
CONVOLUTIONAL = (Residual, Spatial)
"""Networks that are driven one step a call on a CPU, where XLA runs convolutions slowly inside loops."""


@dataclass(frozen=True)
class StandardNormal:
    """p(z) = N(0, I); the rate is in closed form."""


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture with learned weights, means and covariances."""

    components: int = 10
    """Number of Gaussians."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of each Gaussian; full has L (L + 1) / 2 numbers each."""

    def __post_init__(self) -> None:
        check_count("prior.components", self.components)
        _check_choice("prior.covariance", self.covariance, ("diagonal", "full"))


@dataclass(frozen=True)
class VampPrior:
    """Even mixture of the encoder's posteriors at learned images (Tomczak & Welling 2018), which begin as training images."""

    pseudo_inputs: int = 100
    """Number of learned images; the paper has 500 on MNIST."""

    def __post_init__(self) -> None:
        check_count("prior.pseudo_inputs", self.pseudo_inputs)


@dataclass(frozen=True)
class Flow:
    """Affine coupling layers (real NVP, Dinh et al. 2017) over N(0, I); the identity before training."""

    layers: int = 8
    """Coupling layers; each changes half of the latents given the other half."""
    width: int = 64
    """Of the two hidden layers of each coupling's network."""

    def __post_init__(self) -> None:
        check_count("prior.layers", self.layers)
        check_count("prior.width", self.width)


@dataclass(frozen=True)
class FlowMatching:
    """A velocity field that carries N(0, I) to the latents (Lipman et al. 2023); fitted after training, by `bsvae fit-prior`.

    A transformer with a token per position of the latent map; latents that are no map are one position.
    """

    rows: int = 1
    """Of the latent map."""
    columns: int = 1
    """Of the latent map."""
    width: int = 128
    """Of the transformer."""
    depth: int = 4
    """Blocks of the transformer."""
    heads: int = 4
    """Of its attention; must divide the width."""
    steps: int = 50
    """Steps of Heun's method from noise to latents, and back for a density."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "width", "depth", "heads", "steps"):
            check_count(f"prior.{name}", getattr(self, name))
        if self.width % (2 * self.heads):
            raise UserError(f"prior.width must be a multiple of twice prior.heads ({2 * self.heads}), got {self.width}.")


Prior = StandardNormal | Mixture | VampPrior | Flow | FlowMatching


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its schedule, in steps of the whole run."""

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

    def __post_init__(self) -> None:
        _check_number("optimizer.learning_rate", self.learning_rate, low=0.0, open_low=True)
        _check_number("optimizer.weight_decay", self.weight_decay, low=0.0)
        _check_choice("optimizer.schedule", self.schedule, ("cosine_restarts", "cosine", "constant"))
        check_count("optimizer.cycles", self.cycles)
        check_count("optimizer.warmup_steps", self.warmup_steps, low=0)
        if self.warmup_steps and self.schedule == "cosine_restarts":
            raise UserError("optimizer.warmup_steps needs schedule cosine or constant; cosine_restarts starts at the peak.")
        if self.gradient_clip is not None:
            _check_number("optimizer.gradient_clip", self.gradient_clip, low=0.0, open_low=True)
        check_count("optimizer.skip_nonfinite", self.skip_nonfinite, low=0)
        if self.ema_decay is not None:
            _check_number("optimizer.ema_decay", self.ema_decay, low=0.0, high=1.0 - 1e-9)


@dataclass(frozen=True)
class Config:
    """One experiment: data, model, objective and training.

    >>> config = Config(network=MLP((64,)), decoder_variance=Optimal("batch"), beta=0.1)
    >>> config.data, config.beta, config.epochs
    (Digits(), 0.1, 50)
    >>> Config(beta=-1.0)
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: beta must be a finite number >= 0, got -1.0.

    Raises:
      UserError: a field of a wrong kind or out of range.
    """

    data: DataSource = field(default_factory=Digits)
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: Network = field(default_factory=MLP)
    latent_size: int = 16
    """L, the number of latent variables."""
    prior: Prior = field(default_factory=StandardNormal)
    decoder_variance: DecoderVariance = field(default_factory=Optimal)
    beta: float = 1.0
    """Weight of the rate; 1 is the ELBO."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 50
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, over all devices together."""
    evaluate_every: int = 1
    """Epochs between evaluations on held-out data, each followed by a checkpoint; the last epoch always ends with one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products and activations; parameters, statistics, sums and logs are float32 always."""
    gradient_accumulation: int = 1
    """Parts into which a batch is divided and which follow one another, to save memory at the price of a second forward pass.
    The numbers are those of the whole batch, but for BatchNorm, which sees one part at a time."""
    rematerialize: bool = False
    """Compute what happens inside each block of a convolutional network again in the backward pass, instead of keeping it."""
    steps_per_dispatch: int | None = None
    """Steps in one compiled call; None: one for convolutions on a CPU, 50 otherwise (measured to be fastest)."""
    devices: int | None = None
    """Devices to share the batch; None: all there are."""
    resident_memory: float = 0.5
    """Share of a device's memory that the images may take; a larger set is streamed to the devices batch by batch."""
    seed: int = 0
    """Decides the initial parameters, the order of the data, augmentation and posterior samples."""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {
            "data": DataSource,
            "augmentation": Augmentation,
            "network": Network,
            "prior": Prior,
            "decoder_variance": DecoderVariance,
            "optimizer": Optimizer,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                names = ", ".join(option.__name__ for option in _options(kind))
                raise UserError(f"{name} must be one of {names}, got {getattr(self, name)!r}.")
        check_count("latent_size", self.latent_size)
        if isinstance(self.prior, FlowMatching):
            raise UserError(
                "prior FlowMatching has no density that could be trained with the model; train with another, then "
                "bsvae fit-prior WORKDIR --kind flow_matching."
            )
        if isinstance(self.network, Spatial) and not isinstance(self.prior, StandardNormal):
            raise UserError(
                f"prior {type(self.prior).__name__} is over vectors and knows nothing of the map that network Spatial gives; "
                "choose StandardNormal, and fit a model of the latents afterwards."
            )
        _check_number("beta", self.beta, low=0.0)
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("gradient_accumulation", self.gradient_accumulation)
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"batch_size {self.batch_size} does not divide into {self.gradient_accumulation} parts (gradient_accumulation)."
            )
        if not isinstance(self.rematerialize, bool):
            raise UserError(f"rematerialize must be True or False, got {self.rematerialize!r}.")
        check_count("evaluate_every", self.evaluate_every)
        _check_choice("precision", self.precision, ("float32", "bfloat16"))
        for name in ("steps_per_dispatch", "devices"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        _check_number("resident_memory", self.resident_memory, low=0.0, high=1.0)
        check_count("seed", self.seed, low=0)
        if self.seed >= 2**32:
            raise UserError(f"seed must be < 2**32 (larger ones repeat smaller ones), got {self.seed}.")


def _options(kind: Any) -> tuple[type, ...]:
    """The classes of a union of dataclasses, or of a single one."""
    return tuple(option for option in (typing.get_args(kind) or (kind,)) if isinstance(option, type))


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
}
"""The names by which the command line and `config.json` call the kinds of each field."""


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
    with explained(path):
        config = module.get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} must return a bsvae_jax Config, got {type(config).__name__}.")
    return config


def load_module(path: Path, *also: type) -> Any:
    """Run a config file; what it defines. `also`: classes beyond the config's own whose fields an error may name."""
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"There is no config file {path}{nearest(str(path), siblings)}.")
    spec = importlib.util.spec_from_file_location(f"bsvae_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a .py file with get_config().")
    module = importlib.util.module_from_spec(spec)
    with explained(path, *also):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def explained(path: Path, *also: type) -> Iterator[None]:
    """Says which field of which config (or of the classes `also`) a file got wrong."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise UserError(f"{path}: {_unknown_field(unknown[1], unknown[2], *also)}") from error


def _unknown_field(class_name: str, name: str, *also: type) -> str:
    known_classes: list[Any] = [
        Config,
        Optimizer,
        Augmentation,
        *also,
        *(c for choice in CHOICES.values() for c in choice.values()),
    ]
    known = [f.name for c in known_classes if c.__name__ == class_name for f in dataclasses.fields(c)]
    return f"{class_name} has no field {name!r}{nearest(name, known)}."


def to_dict(config: Any) -> Any:
    """A config as plain JSON values; kinds are written under `"kind"` by their command-line name."""
    if isinstance(config, tuple):
        return list(config)
    if not dataclasses.is_dataclass(config):
        return config
    fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    names = [name for choice in CHOICES.values() for name, kind in choice.items() if type(config) is kind]
    return {"kind": names[0], **fields} if names else fields


def from_dict(values: dict[str, Any], kind: Any = Config) -> Any:
    """The inverse of `to_dict`.

    Raises:
      UserError: a field is unknown, or a kind is.
    """
    values = dict(values)
    if "kind" in values:
        options = {name: option for choice in CHOICES.values() for name, option in choice.items() if option in _options(kind)}
        name = values.pop("kind")
        if name not in options:
            raise UserError(f"Unknown kind {name!r}{nearest(name, options)}; known: {', '.join(options)}.")
        kind = options[name]
    if len(_options(kind)) != 1:
        raise UserError(f"One of {', '.join(o.__name__ for o in _options(kind))} is wanted, but 'kind' does not say which.")
    known = typing.get_type_hints(kind)
    result = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(_unknown_field(kind.__name__, name))
        if isinstance(value, dict):
            value = from_dict(value, known[name])
        result[name] = tuple(value) if isinstance(value, list) else value
    return kind(**result)


def elsewhere(config: Config, other: Config) -> Config:
    """`config` with those fields of `other` that say on what and in what pieces it is computed, and do not change what."""
    return dataclasses.replace(
        config, devices=other.devices, steps_per_dispatch=other.steps_per_dispatch, resident_memory=other.resident_memory
    )


def differences(one: Config, other: Config) -> list[str]:
    """`"beta: 1.0 -> 2.0"` for every field, by dotted name, in which two configs differ."""

    def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {prefix: values}
        return {k: v for name, value in values.items() for k, v in flatten(value, f"{prefix}.{name}".strip(".")).items()}

    a, b = flatten(to_dict(one)), flatten(to_dict(other))
    return [
        f"{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)
    ]
