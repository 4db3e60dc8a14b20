"""The network of the Frechet inception distance: Inception-v3 as TensorFlow published it on 2015-12-05, in Flax.

It is the network of Szegedy et al. (2016) up to its 2,048 pooled features, with what sets the published graph apart from
later versions, and what every comparable FID depends on: average pooling does not count the padding, the last block pools
by maximum, BatchNorm has eps 1e-3. Images go in as 8-bit RGB, are resized to 299 x 299 bilinearly (half-pixel centers, no
antialiasing) and scaled to [-1, 1]; one gray channel is repeated to three. All in float32 at the highest matrix precision.

The weights are those of pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`), as published or converted to `.npz`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from bsvae_jax._io.downloads import Download, fetch
from bsvae_jax._io.files import cache_folder, read_arrays, sha256_of
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.models._state_dict import read_state_dict
from bsvae_jax.random import make_key

FEATURES = 2048
SIZE = 299
WEIGHTS = Download(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)

Maps = Float[Array, "batch _ _ _"]


class ConvolutionUnit(nn.Module):
    """Convolution without bias, BatchNorm with running statistics (eps 1e-3), ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, C] to [B, h', w', features]."""
        padding = [(size, size) for size in self.padding]
        x = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _average_pool(x: Maps) -> Maps:
    """3 x 3 average of stride 1 over what lies inside the map."""
    return nn.avg_pool(x, (3, 3), (1, 1), [(1, 1), (1, 1)], count_include_pad=False)


def _max_pool(x: Maps, stride: int = 2, padding: int = 0) -> Maps:
    return nn.max_pool(x, (3, 3), (stride, stride), [(padding, padding)] * 2)


ROW, COLUMN, ROW3, COLUMN3 = (1, 7), (7, 1), (1, 3), (3, 1)
ALONG_ROW, ALONG_COLUMN, ALONG_ROW3, ALONG_COLUMN3 = (0, 3), (3, 0), (0, 1), (1, 0)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and average-pool branches."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, C] to [B, h, w, 224 + pool_features]."""
        unit = ConvolutionUnit
        one = unit(64, name="branch1x1")(x)
        five = unit(48, name="branch5x5_1")(x)
        five = unit(64, (5, 5), padding=(2, 2), name="branch5x5_2")(five)
        double = unit(64, name="branch3x3dbl_1")(x)
        double = unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double = unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_3")(double)
        pool = unit(self.pool_features, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, C] to [B, (h - 1) // 2, (w - 1) // 2, 480 + C]."""
        unit = ConvolutionUnit
        three = unit(384, (3, 3), 2, name="branch3x3")(x)
        double = unit(64, name="branch3x3dbl_1")(x)
        double = unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double = unit(96, (3, 3), 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _max_pool(x)], axis=-1)


class BlockC(nn.Module):
    """17 x 17: 7x7 convolutions as a row and a column, once and twice."""

    width: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, 768] to [B, h, w, 768]."""
        unit = ConvolutionUnit
        one = unit(192, name="branch1x1")(x)
        seven = unit(self.width, name="branch7x7_1")(x)
        seven = unit(self.width, ROW, padding=ALONG_ROW, name="branch7x7_2")(seven)
        seven = unit(192, COLUMN, padding=ALONG_COLUMN, name="branch7x7_3")(seven)
        double = unit(self.width, name="branch7x7dbl_1")(x)
        double = unit(self.width, COLUMN, padding=ALONG_COLUMN, name="branch7x7dbl_2")(double)
        double = unit(self.width, ROW, padding=ALONG_ROW, name="branch7x7dbl_3")(double)
        double = unit(self.width, COLUMN, padding=ALONG_COLUMN, name="branch7x7dbl_4")(double)
        double = unit(192, ROW, padding=ALONG_ROW, name="branch7x7dbl_5")(double)
        pool = unit(192, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, 768] to [B, (h - 1) // 2, (w - 1) // 2, 1280]."""
        unit = ConvolutionUnit
        three = unit(192, name="branch3x3_1")(x)
        three = unit(320, (3, 3), 2, name="branch3x3_2")(three)
        seven = unit(192, name="branch7x7x3_1")(x)
        seven = unit(192, ROW, padding=ALONG_ROW, name="branch7x7x3_2")(seven)
        seven = unit(192, COLUMN, padding=ALONG_COLUMN, name="branch7x7x3_3")(seven)
        seven = unit(192, (3, 3), 2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _max_pool(x)], axis=-1)


class BlockE(nn.Module):
    """8 x 8: expanded filter banks; the published graph pools its second one by maximum."""

    maximum: bool

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """[B, h, w, C] to [B, h, w, 2048]."""
        unit = ConvolutionUnit
        one = unit(320, name="branch1x1")(x)
        three = unit(384, name="branch3x3_1")(x)
        three_row = unit(384, ROW3, padding=ALONG_ROW3, name="branch3x3_2a")(three)
        three_column = unit(384, COLUMN3, padding=ALONG_COLUMN3, name="branch3x3_2b")(three)
        double = unit(448, name="branch3x3dbl_1")(x)
        double = unit(384, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double_row = unit(384, ROW3, padding=ALONG_ROW3, name="branch3x3dbl_3a")(double)
        double_column = unit(384, COLUMN3, padding=ALONG_COLUMN3, name="branch3x3dbl_3b")(double)
        pool = _max_pool(x, 1, 1) if self.maximum else _average_pool(x)
        pool = unit(192, name="branch_pool")(pool)
        return jnp.concatenate([one, three_row, three_column, double_row, double_column, pool], axis=-1)


class Inception(nn.Module):
    """Images to the 2,048 features of the last average pool."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch 299 299 3"]) -> Float[Array, "batch 2048"]:
        """Images [B, 299, 299, 3] in [-1, 1] to features [B, 2048]."""
        unit = ConvolutionUnit
        x = unit(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = unit(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _max_pool(unit(64, (3, 3), padding=(1, 1), name="Conv2d_2b_3x3")(x))
        x = unit(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(unit(192, (3, 3), name="Conv2d_4a_3x3")(x))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = BlockC(width, name=name)(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(maximum=False, name="Mixed_7b")(x)
        x = BlockE(maximum=True, name="Mixed_7c")(x)
        return jnp.mean(x, axis=(1, 2))


def resize(images: UInt8[Array, "batch _ _ _"]) -> Float[Array, "batch 299 299 3"]:
    """8-bit images of 1 or 3 channels to [-1, 1] at 299 x 299: bilinear, half-pixel centers, no antialiasing."""
    x = jnp.asarray(images, jnp.float32) / 255.0
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    resized = jax.image.resize(x, (len(x), SIZE, SIZE, 3), "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)
    return 2.0 * resized - 1.0


def features(variables: Mapping[str, Any], images: UInt8[Array, "batch _ _ _"]) -> Float[Array, "batch 2048"]:
    """Of 8-bit images of 1 or 3 channels: what FID compares."""
    return Inception().apply(variables, resize(images))  # type: ignore[return-value]


# --- Weights ----------------------------------------------------------------------------------------------------------


def _expected() -> dict[str, tuple[str, tuple[int, ...]]]:
    """PyTorch's name of every array to its place in the Flax variables and its shape there."""
    shapes = jax.eval_shape(lambda: Inception().init(make_key(0), jnp.zeros((1, SIZE, SIZE, 3))))
    leaves = {
        "/".join(str(part.key) for part in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    places = {}
    for place, shape in leaves.items():
        *parts, last = place.split("/")[1:]
        places[".".join([*parts, names[last]])] = (place, shape)
    return places


def from_state_dict(arrays: Mapping[str, np.ndarray], source: str = "the state_dict") -> dict[str, Any]:
    """PyTorch's arrays as variables of `Inception`. The classifier (`fc`) and batch counters are not needed and dropped.

    Raises:
      UserError: arrays are missing, unknown, of another shape or not finite: weights of another network.
    """
    places = _expected()
    extra = [name for name in arrays if name not in places and not name.startswith("fc.") and "num_batches" not in name]
    missing = [name for name in places if name not in arrays]
    if extra or missing:
        what = f"misses {missing[0]} and {len(missing) - 1} more" if missing else f"has {extra[0]}, which the network has not"
        raise UserError(f"{source} holds weights of another network than the FID Inception-v3: it {what}.")
    variables: dict[str, Any] = {}
    for name, (place, shape) in places.items():
        array = np.asarray(arrays[name], np.float32)
        if array.ndim == 4:  # OIHW to HWIO
            array = array.transpose(2, 3, 1, 0)
        if array.shape != shape:
            raise UserError(f"{source}: {name} has shape {array.shape} where the FID Inception-v3 has {shape}.")
        if not np.isfinite(array).all():
            raise UserError(f"{source}: {name} has values that are not finite.")
        *parents, last = place.split("/")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return variables


class Weights(NamedTuple):
    """Variables of `Inception`, and where they come from."""

    variables: dict[str, Any]
    source: str
    """SHA-256 of the `.pth` they were read from; of the `.npz` itself where it does not say."""

    @property
    def published(self) -> bool:
        """Whether these are the weights by which FID is compared."""
        return self.source == WEIGHTS.sha256

    def network(self) -> FeatureNetwork:
        """The network with these weights."""
        note = "" if self.published else "; NOT the published weights"
        return FeatureNetwork("inception", "", FEATURES, self.source, note, features, self.variables)


def load_weights(path: str | Path | None = None, sha256: str | None = WEIGHTS.sha256) -> Weights:
    """Variables of `Inception` from a file, or from pytorch-fid's public release, downloaded once.

    Args:
      path: pytorch-fid's `.pth`, or an `.npz` with the same names; None: the cached download, or a new one.
      sha256: the hash that a `.pth` must have; None: any.

    Raises:
      UserError: no such file, a wrong hash, a file that holds more than tensors, weights of another network, or no way to
        download them (the sentence says which file is wanted, and where to put it).
    """
    if path is None:
        path, found = fetch(WEIGHTS, cache_folder(), _how_to_get()), WEIGHTS.sha256  # which `fetch` has checked
        return Weights(from_state_dict(read_state_dict(path), str(path)), found)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; {_how_to_get()}")
    if path.suffix.lower() != ".npz":
        found = _checked_hash(path, sha256)
        return Weights(from_state_dict(read_state_dict(path), str(path)), found)
    arrays = read_arrays(path, _how_to_get())
    source = arrays.pop("source_sha256", None)
    return Weights(from_state_dict(arrays, str(path)), sha256_of(path) if source is None else str(source))


def _checked_hash(path: Path, sha256: str | None) -> str:
    """SHA-256 of a file, which is the wanted one where one is wanted."""
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise UserError(f"{path} is not the wanted file: its SHA-256 is {found}, expected {sha256}. {_how_to_get()}")
    return found


def _how_to_get() -> str:
    return (
        f"FID needs the weights {WEIGHTS.url} ({WEIGHTS.size:,} bytes, SHA-256 {WEIGHTS.sha256}): "
        f"put them at {cache_folder() / WEIGHTS.name}, or give --inception-weights FILE. "
        "Images with classes can be compared without: --fid-network lenet."
    )
