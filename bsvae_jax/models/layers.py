"""What the layers of every network have in common: precision of products, sizes of halved maps, initialization.

Matrix products and activations run in a network's `dtype`; parameters are float32, and biases are added in float32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

Latents = Float[Array, "batch latent"]
PosteriorParameters = tuple[Latents, Latents]

HIGHEST = jax.lax.Precision.HIGHEST
"""Full float32 products; by default TPUs and recent GPUs round their factors."""


class Initialization(NamedTuple):
    """Of the kernel and the bias of one layer."""

    kernel: nn.initializers.Initializer
    bias: Callable[[int], nn.initializers.Initializer] = lambda fan_in: nn.initializers.zeros
    """By the number of inputs of one output (fan-in)."""


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in [-1 / sqrt(fan_in), 1 / sqrt(fan_in)]."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


LECUN = Initialization(nn.initializers.lecun_normal())
"""Flax's default: kernels of variance 1 / fan_in, biases of zero."""
ZEROS = Initialization(nn.initializers.zeros)
PYTORCH = Initialization(nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform"), _uniform)
"""PyTorch's default: kernels and biases uniform in +- 1 / sqrt(fan_in), of variance 1 / (3 fan_in)."""
PYTORCH_TRANSPOSED = Initialization(
    nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform", in_axis=-1, out_axis=-2), _uniform
)
"""The same of transposed convolutions, whose fan-in PyTorch counts from their outputs."""


def exact(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products where float32 is asked for."""
    return HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def as_float32(x: Array) -> Array:
    """`x` in at least float32, in which networks return their results."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_bias(x: Array, bias: Float[Array | np.ndarray, " features"]) -> Array:
    """`x + bias` in the type of `x`, added in at least float32.

    The bias's gradient is a sum over all examples and positions, and is taken in the type of this addition: a bfloat16 sum of
    ones stands still at 256.
    """
    return (as_float32(x) + bias.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Dense(nn.Module):
    """Affine map of the last axis, linear without the bias: `flax.linen.Dense` but for the type of the bias."""

    features: int
    use_bias: bool = True
    dtype: Any = None
    """None: that of the inputs, or of the parameters where it is wider."""
    start: Initialization = LECUN

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        """[..., inputs] to [..., features], in `dtype`."""
        inputs = x.shape[-1]
        kernel = self.param("kernel", self.start.kernel, (inputs, self.features), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        y = jnp.dot(x, kernel, precision=exact(x.dtype))
        return add_bias(y, self.param("bias", self.start.bias(inputs), (self.features,), jnp.float32)) if self.use_bias else y


def stage_size(side: int, stage: int) -> int:
    """One side of an image that was halved `stage` times, rounded up each time: `ceil(side / 2^stage)`.

    >>> [stage_size(28, stage) for stage in range(4)]
    [28, 14, 7, 4]
    """
    return -(-side // 2**stage)


def dense(
    features: int,
    dtype: Any = None,
    use_bias: bool = True,
    name: str | None = None,
    start: Initialization = LECUN,
) -> Dense:
    """Affine map to `features`, linear without the bias."""
    return Dense(features, use_bias, dtype, start, name=name)


def split_posterior(parameters: Float[Array, "batch twice_latent"]) -> PosteriorParameters:
    """Mean and log-variance, [B, L] each, of what one layer gives, [B, 2L], in at least float32."""
    mean, log_variance = jnp.split(as_float32(parameters), 2, axis=-1)
    return mean, log_variance
