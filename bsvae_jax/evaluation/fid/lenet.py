"""A small network trained on the classes of the data, for FID and KID where the published network says little or is not there.

Inception-v3 was trained on photographs; Binkowski et al. (2018) compare samples of MNIST by the features of a LeNet trained
on its digits. So does this: two convolutions (5 x 5, 20 and 50 channels), each with ReLU and a 2 x 2 maximum, and a dense layer
of 500 ReLUs, the features (LeCun et al. 1998, as Caffe has it), trained on the training images alone.

Its distances are of this one network: trained on another kind of machine it differs by rounding, and so do they. The file
in the cache may be carried along; its hash stands beside every number. What does not tell classes apart leaves little trace.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, UInt8

from bsvae_jax._io.files import cache_folder, digest, locked, read_arrays, write_arrays
from bsvae_jax._io.terminal import ProgressBar
from bsvae_jax.data import ImageSet, ShuffledOrder
from bsvae_jax.data.image_set import to_unit_interval
from bsvae_jax.data.prefetch import gather
from bsvae_jax.distributed.mesh import REPLICATED, data_mesh, parallelize
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.models.layers import HIGHEST
from bsvae_jax.random import make_key

FEATURES = 500
CHANNELS = (20, 50)
STEPS = 2000
BATCH = 128
LEARNING_RATE = 1e-3
"""Of Adam, falling to 0 as half a cosine."""


class LeNet(nn.Module):
    """Images to features, and to the logits of classes."""

    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch features"], Float[Array, "batch classes"]]:
        """x in [0, 1], of any height and width from 4; [B, 500] and [B, classes]."""
        for number, channels in enumerate(CHANNELS):
            x = nn.relu(nn.Conv(channels, (5, 5), precision=HIGHEST, name=f"conv{number}")(x))  # [B, h, w, channels]
            x = _halve(x)
        x = nn.relu(nn.Dense(FEATURES, precision=HIGHEST, name="features")(x.reshape(len(x), -1)))
        return x, nn.Dense(self.classes, precision=HIGHEST, name="classes")(x)


def _halve(x: Float[Array, "batch _ _ channels"]) -> Float[Array, "batch _ _ channels"]:
    """The maximum over 2 x 2 pixels, of what remains of an odd size; as a window it would be differentiated slowly on CPUs."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def features(variables: Any, images: UInt8[Array, "batch _ _ _"]) -> Float[Array, "batch features"]:
    """Of 8-bit images."""
    return _apply(variables, to_unit_interval(images, 256))[0]


def _apply(variables: Any, x: Array) -> Any:
    return LeNet(len(variables["params"]["classes"]["bias"])).apply(variables, x)


def network(images: ImageSet, progress: bool = True) -> FeatureNetwork:
    """LeNet trained on a set of images; trained once, and kept in the cache folder.

    Args:
      images: with a class of every image.
      progress: show a bar on stderr while it trains (a minute or two for MNIST on two cores).

    Raises:
      UserError: images without classes, of fewer than two, or too small; a damaged file in the cache.
    """
    labels, test_labels = _classes_of(images)
    classes = int(max(labels.max(), test_labels.max())) + 1
    labeled = hashlib.sha256(labels.tobytes() + test_labels.tobytes()).hexdigest()
    path = cache_folder() / "lenet" / f"{images.fingerprint()[:32]}-{labeled[:16]}-{STEPS}.npz"
    remedy = "delete it, and the network is trained again"
    with locked(path.with_suffix(".lock"), f"LeNet of {images.name}", "set BSVAE_CACHE to a folder that can be written"):
        if not path.is_file():
            trained = _train(images, labels, classes, progress)
            accuracy = _accuracy(trained, images, test_labels)
            write_arrays(path, **flatten_dict(trained, sep="."), accuracy=accuracy)
        arrays = read_arrays(path, remedy)
    known_accuracy = arrays.pop("accuracy", np.empty(0))
    variables = unflatten_dict(arrays, sep=".")
    expected = jax.eval_shape(lambda: LeNet(classes).init(make_key(0), jnp.zeros((1, *images.image_shape))))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep=".").items()}
    if known_accuracy.shape != () or {name: array.shape for name, array in arrays.items()} != shapes:
        raise UserError(f"{path} is damaged: it holds other arrays than this network's; {remedy}.")
    source = digest(variables)
    note = f"; of a LeNet that tells {float(known_accuracy):.1%} of the test images' {classes} classes, {source[:8]}"
    return FeatureNetwork("LeNet", "lenet_", FEATURES, source, note, features, variables)


def _classes_of(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Classes of the training and of the test images, int32 [N]."""
    instead = "use the published network"
    labels, test_labels = images.train_labels, images.test_labels
    if labels is None or test_labels is None:
        raise UserError(f"LeNet learns the classes of the images, but {images.name} has no labels; {instead}.")
    if labels.ndim != 1:
        raise UserError(f"LeNet learns one class an image, but {images.name} has attributes; {instead}.")
    if len(np.unique(labels)) < 2:
        raise UserError(f"LeNet learns to tell classes apart, but {images.name} has only one; {instead}.")
    if min(images.image_shape[:2]) < 4:
        raise UserError(f"LeNet needs images of at least 4 x 4 pixels, those of {images.name} are {images.image_shape}.")
    return labels.astype(np.int32), test_labels.astype(np.int32)


def _step(
    state: Any, batch: Array, labels: Array, *, optimizer: optax.GradientTransformation, levels: int
) -> tuple[Any, Array]:
    """One step of gradient descent on the mean cross entropy."""
    variables, optimizer_state = state

    def loss(variables: Any) -> Array:
        _, logits = _apply(variables, to_unit_interval(batch, levels))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(variables)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, variables)
    return (optax.apply_updates(variables, updates), optimizer_state), value


def _train(images: ImageSet, labels: np.ndarray, classes: int, progress: bool) -> Any:
    """Variables after `STEPS` steps on one device; the same on every call."""
    init_key, order_key = jax.random.split(make_key(0))
    variables = jax.jit(LeNet(classes).init)(init_key, jnp.zeros((1, *images.image_shape)))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))
    state = (variables, jax.jit(optimizer.init)(variables))
    one_step = functools.partial(_step, optimizer=optimizer, levels=images.levels)
    step = parallelize(one_step, data_mesh(1), (REPLICATED,) * 3, REPLICATED, donate=(0,), convolutional=True)
    order = np.asarray(ShuffledOrder(order_key, len(images.train), BATCH)(0, STEPS))
    with ProgressBar(STEPS * BATCH, 0, progress) as bar:
        bar.describe(f"LeNet of {images.name}")
        for number, indices in enumerate(order):
            state, loss = step(state, gather(images.train, indices), labels[indices])
            bar.update(BATCH)
            if number % 100 == 99:  # also bounds the steps in flight
                bar.show(loss=f"{float(loss):.4f}")
    return jax.device_get(state[0])


def _accuracy(variables: Any, images: ImageSet, labels: np.ndarray) -> float:
    """Share of the test images whose class it finds."""
    classify = jax.jit(lambda variables, x: jnp.argmax(_apply(variables, to_unit_interval(x, images.levels))[1], axis=-1))
    found = [np.asarray(classify(variables, images.test[start : start + BATCH])) for start in range(0, len(images.test), BATCH)]
    return float(np.mean(np.concatenate(found) == labels))
