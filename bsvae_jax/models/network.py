"""The kind `Network`: what an encoder and a decoder are built from. Derive it for a network of your own."""

import abc
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from bsvae_jax.errors import UserError
from bsvae_jax.objective import Kind


@dataclass(frozen=True)
class Network(Kind, abc.ABC):
    """Base of all networks: a frozen dataclass whose `build` makes two Flax modules; the other members have defaults.

    >>> class Encoder(nn.Module):
    ...     latent_size: int
    ...
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         hidden = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
    ...         return nn.Dense(self.latent_size)(hidden), nn.Dense(self.latent_size)(hidden)
    >>> class Decoder(nn.Module):
    ...     shape: tuple
    ...
    ...     @nn.compact
    ...     def __call__(self, z, train=False):
    ...         return nn.Dense(math.prod(self.shape))(z).reshape(z.shape[0], *self.shape)
    >>> @dataclass(frozen=True)
    ... class Mine(Network):
    ...     def build(self, latent_size, data_shape, outputs, axis_name, dtype, rematerialize):
    ...         return Encoder(latent_size), Decoder(output_shape(data_shape, outputs))
    """

    convolutional: ClassVar[bool] = False
    """Whether most of its time goes into convolutions: on a CPU, XLA runs them slowly inside loops and under vmap."""
    has_latent_map: ClassVar[bool] = False
    """Whether the latents are a map of positions, which only a standard normal prior fits."""

    @abc.abstractmethod
    def build(
        self,
        latent_size: int,
        data_shape: tuple[int, ...],
        outputs: int,
        axis_name: str | None,
        dtype: Any,
        rematerialize: bool,
        classes: int | None = None,
    ) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder.

        Args:
          latent_size: L.
          data_shape: of one example, channels last: (H, W, C) of images, (T, C) of sequences, (D,) of vectors.
          outputs: values that the decoder returns for each entry of the data, 1 or 2: its last axis is `outputs` times as long
            (`output_shape`); the mean comes first, then the log-variance.
          axis_name: of the devices that share a batch: batch statistics are to be averaged over it. None on one device.
          dtype: of matrix products and activations; parameters and outputs are float32.
          rematerialize: compute activations again in the backward pass instead of keeping them, where the network can.
          classes: of a conditional model, whose modules take the class of each example, whole numbers [B], as their third
            argument; None: they are told none. A `build` without this argument is of models that are not conditional.

        Returns:
          `(encoder, decoder)`: `encoder(x, train)` maps data [B, *data_shape] to mean and log-variance of q(z|x), [B, L] each;
          `decoder(z, train)` maps latents [B, L] to the mean of p(x|z), [B, *output_shape(data_shape, outputs)].
        """

    def for_data(self, data_shape: tuple[int, ...]) -> "Network":
        """This network with everything filled in that it leaves to the shape of one example; a run is recorded with it."""
        return self

    def check(self, latent_size: int, data_shape: tuple[int, ...]) -> None:
        """Raise a UserError where this network does not fit the data; by default it takes any."""

    def positions(self, latent_size: int, data_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the latent map; latents that are no map are one position."""
        return 1, 1


def output_shape(data_shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """Shape of what a decoder returns for one example.

    >>> output_shape((28, 28, 1), 2)
    (28, 28, 2)
    """
    return (*data_shape[:-1], outputs * data_shape[-1])


def check_images(network: Network, data_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of the data.

    Raises:
      UserError: the data are no images.
    """
    if len(data_shape) != 3:
        raise UserError(
            f"network {type(network).__name__} takes images [height, width, channels], one example of the data has shape "
            f"{data_shape}; MLP and Linear take any shape, and so may a network of your own."
        )
    height, width, channels = data_shape
    return height, width, channels


def build_modules(
    network: Network,
    latent_size: int,
    data_shape: tuple[int, ...],
    outputs: int = 1,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    rematerialize: bool = False,
    classes: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of a network for data of a shape, checked to be two modules; arguments as for `Network.build`.

    Raises:
      UserError: the network does not fit the data or takes no classes, or `build` returns something else.
    """
    network.check(latent_size, data_shape)
    conditional: dict[str, Any] = {} if classes is None else {"classes": classes}
    if conditional and "classes" not in inspect.signature(network.build).parameters:
        raise UserError(
            f"build of {type(network).__name__} has no argument classes, so this network takes no labels; leave classes out of "
            "the config, or give build(..., classes=None) modules that take labels as their third argument."
        )
    built = network.build(latent_size, data_shape, outputs, axis_name, dtype, rematerialize, **conditional)
    if not isinstance(built, tuple) or len(built) != 2 or not all(isinstance(part, nn.Module) for part in built):
        raise UserError(
            f"build of {type(network).__name__} must return two flax.linen modules, (encoder, decoder), got {built!r}; a "
            "module of flax.nnx becomes one by flax.nnx.bridge.to_linen."
        )
    return built
