"""Names, shapes and axis orders under which weights are carried over: pure functions of names and arrays.

From PyTorch: the `state_dict` of the network that Kim & Lee (2024) published, whose layers are numbered by
`torch.nn.Sequential` (`s` counts the S stages from 0, `b` the two blocks of one):

    encoder.s.b.{conv1, conv2, identity}.{0, 1}    convolution and BatchNorm of a residual block; `identity` is its shortcut
    encoder.S.{1, 2, 4}                            Linear, BatchNorm, and Linear to mean and log-variance
    decoder.0.{0, 1}, decoder.0.4.conv1.0, ...     Linear, BatchNorm and the residual block
    decoder.(s+1).{0, 1}                           transposed convolution and BatchNorm of a stage
    decoder.S.3                                    the transposed convolution to the image

PyTorch keeps channels first, also where a feature map is flattened between convolutions and dense layers; here they come last.
BatchNorm's epsilon (1e-5) and momentum (0.1 there is 0.9 here) are not in a file: the networks agree on PyTorch's defaults.

To safetensors: the path of an array in the Flax variables joined by dots (`params.encoder.stage0_block0.conv1.kernel`,
`batch_stats.decoder.hidden_norm.var`), in Flax's own axis order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bsvae_jax.errors import UserError
from bsvae_jax.models.layers import stage_size
from bsvae_jax.models.network import Network
from bsvae_jax.models.priors import Prior, StandardNormal
from bsvae_jax.models.residual import Residual
from bsvae_jax.objective import DecoderVariance, Predicted

LOG_VARIANCE = "log_variance"
"""The one parameter of `Learned()`, here and in a `state_dict`."""

_COUNTER = ".num_batches_tracked"
"""PyTorch's BatchNorms count their batches; with a fixed momentum nothing depends on it."""
_LISTED = 3
"""Names that an error lists."""
_ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_BLOCK = {
    "conv1": "conv1.0",
    "norm1": "conv1.1",
    "conv2": "conv2.0",
    "norm2": "conv2.1",
    "shortcut_conv": "identity.0",
    "shortcut_norm": "identity.1",
}


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`{"params.encoder.hidden.bias": array, ...}` of nested variables, whose leaves may be abstract.

    >>> flatten({"params": {"decoder": {"image": {"bias": 0.0}}}, "batch_stats": {}})
    {'params.decoder.image.bias': 0.0}
    """
    return flatten_dict(variables, sep=".")


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, but for collections that are empty."""
    return unflatten_dict(arrays, sep=".")


class Counterpart(NamedTuple):
    """The array of a `state_dict` that one array of the variables is made of: `reshape(view).transpose(axes)`, reshaped."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    """The shape with flattened feature maps as (C, h, w)."""
    axes: tuple[int, ...]


def _torch_layers(stages: int) -> dict[str, str]:
    """PyTorch's name of every layer by ours; shortcuts also where a block has none."""
    blocks = {f"encoder.stage{stage}_block{block}": f"encoder.{stage}.{block}" for stage in range(stages) for block in (0, 1)}
    blocks["decoder.block"] = "decoder.0.4"
    layers = {f"{ours}.{part}": f"{theirs}.{name}" for ours, theirs in blocks.items() for part, name in _BLOCK.items()}
    for stage in range(stages):
        layers |= {
            f"decoder.stage{stage}_conv": f"decoder.{stage + 1}.0",
            f"decoder.stage{stage}_norm": f"decoder.{stage + 1}.1",
        }
    return layers | {
        "encoder.hidden": f"encoder.{stages}.1",
        "encoder.hidden_norm": f"encoder.{stages}.2",
        "encoder.posterior": f"encoder.{stages}.4",
        "decoder.hidden": "decoder.0.0",
        "decoder.hidden_norm": "decoder.0.1",
        "decoder.image": f"decoder.{stages}.3",
    }


def counterparts(variables: Mapping[str, Any], widths: Sequence[int], image_shape: tuple[int, ...]) -> dict[str, Counterpart]:
    """Where every array of the residual network's variables is found in the published network's `state_dict`.

    Args:
      variables: of a `VAE` with a `Residual` network, `{"params": ..., "batch_stats": ...}`; leaves may be abstract.
      widths: channels of each stage of the encoder.
      image_shape: (H, W, C).

    Returns:
      A counterpart by the name that `flatten` gives.
    """
    layers = _torch_layers(len(widths))
    height, width = (stage_size(side, len(widths)) for side in image_shape[:2])
    smallest_map = (widths[-1], height, width)
    found = {}
    for place, leaf in flatten(variables).items():
        layer, _, kind = place.split(".", 1)[1].rpartition(".")
        name = f"{layers[layer]}.{_ARRAYS[kind]}" if layer else kind
        found[place] = Counterpart(name, *_orientation(layer, leaf.shape, smallest_map))
    return found


def _orientation(
    layer: str, shape: tuple[int, ...], smallest_map: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, view and axes of the counterpart of an array of `shape` in `layer`, by their names here."""
    view: tuple[int, ...]
    if len(shape) == 4:
        height, width, before, after = shape
        # A ConvTranspose2d adds x[i] @ weight[:, :, k] to out[stride * i + k - padding], as ours does: no flip.
        transposed = layer == "decoder.image" or (layer.startswith("decoder.stage") and layer.endswith("_conv"))
        view = (before, after, height, width) if transposed else (after, before, height, width)
        return view, view, (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
    if len(shape) == 2:
        before, after = shape
        if layer == "encoder.hidden":
            return (after, before), (after, *smallest_map), (2, 3, 1, 0)
        if layer == "decoder.hidden":
            return (after, before), (*smallest_map, before), (3, 1, 2, 0)
        return (after, before), (after, before), (1, 0)
    if layer in ("decoder.hidden", "decoder.hidden_norm"):
        return shape, smallest_map, (1, 2, 0)
    return shape, shape, tuple(range(len(shape)))


@runtime_checkable
class Architecture(Protocol):
    """What of a `Config` says which arrays there are."""

    @property
    def network(self) -> Network:
        """Encoder and decoder."""

    @property
    def prior(self) -> Prior:
        """Of the latents."""

    @property
    def decoder_variance(self) -> DecoderVariance:
        """How sigma^2 is chosen."""

    @property
    def latent_size(self) -> int:
        """L"""


def from_state_dict(
    arrays: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    config: Architecture,
    image_shape: tuple[int, ...],
    source: str = "the state_dict",
) -> dict[str, Any]:
    """The published network's arrays as variables of the config's VAE, float32.

    Args:
      arrays: by PyTorch's names. BatchNorm's counters of batches are dropped. For `Learned()` there is `log_variance`, one
        number, the logarithm of the decoder variance; for `Predicted()` the last layer has 2C channels, the means first.
      variables: of the same VAE; only their shapes are looked at.
      config: with a residual network.
      image_shape: (H, W, C).
      source: what errors call the arrays.

    Returns:
      `{"params": ..., "batch_stats": ...}`.

    Raises:
      UserError: the config's network is not residual, or its prior not standard normal; the arrays are another network's, or
        they are not finite.
    """
    if not isinstance(config.network, Residual):
        raise UserError(
            f"The published network is residual, this config has {config.network}; "
            "choose --network residual and its --network.widths."
        )
    if not isinstance(config.prior, StandardNormal):
        raise UserError(f"The published network has a standard normal prior, this config has {config.prior}; leave it out.")
    wanted = counterparts(variables, config.network.widths_for(image_shape), image_shape)
    _check_same_network(arrays, wanted, config, image_shape, source)
    with np.errstate(over="ignore"):  # a double beyond float32 is infinite, and refused as such
        singles = {place: np.asarray(arrays[part.name]).astype(np.float32) for place, part in wanted.items()}
    bad = [wanted[place].name for place, array in singles.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(f"{source} holds weights that are not finite in float32: {_some(bad)}.")
    negative = [wanted[place].name for place, array in singles.items() if place.endswith(".var") and (array < 0).any()]
    if negative:
        raise UserError(f"{source} holds variances of BatchNorm below 0: {_some(negative)}.")
    shapes = {place: leaf.shape for place, leaf in flatten(variables).items()}
    return unflatten(
        {
            place: np.ascontiguousarray(array.reshape(wanted[place].view).transpose(wanted[place].axes)).reshape(shapes[place])
            for place, array in singles.items()
        }
    )


def _check_same_network(
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Counterpart],
    config: Architecture,
    image_shape: tuple[int, ...],
    source: str,
) -> None:
    shapes = {part.name: part.shape for part in wanted.values()}
    missing = sorted(name for name in shapes if name not in arrays)
    left_over = [name for name in arrays if name not in shapes and not name.endswith(_COUNTER)]
    other = [name for name, array in arrays.items() if name in shapes and not _fits(array, shapes[name])]
    if missing == [LOG_VARIANCE] and not left_over and not other:
        raise UserError(
            f"{source} has no {LOG_VARIANCE}, the one parameter of {type(config.decoder_variance).__name__}(): its network was "
            "trained with another decoder variance. Choose that one, --decoder-variance optimal or constant."
        )
    if left_over == [LOG_VARIANCE] and not missing and not other:
        raise UserError(
            f"{source} has a learned {LOG_VARIANCE}, this config no place for it; choose --decoder-variance learned."
        )
    if not (missing or left_over or other):
        return
    unlike = [f"{name} {arrays[name].shape} instead of {shapes[name]}" for name in other]
    parts = {"missing": missing, "left over": left_over, "of another shape": unlike}
    said = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts.items() if names)
    remedy = "The config must be of the network the file was saved from: its widths, latent_size and images."
    last_layer = {part.name for place, part in wanted.items() if place.startswith("params.decoder.image.")}
    if isinstance(config.decoder_variance, Predicted) and not missing and not left_over and set(other) == last_layer:
        remedy = "Predicted() has twice the channels in the last layer; choose the decoder variance the file was trained with."
    raise UserError(
        f"{source} holds another network than {config.network}, latent_size {config.latent_size}, on images {image_shape}; "
        f"arrays {said}. {remedy}"
    )


def _fits(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether an array of a file has the shape wanted; a single number may be kept as an array of one."""
    return array.shape == shape or (shape == () and math.prod(array.shape) == 1)


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more.

    >>> _some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
