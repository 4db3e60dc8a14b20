"""What the layers of every network have in common: the precision of products, padding, the sizes of halved maps, first values.

Matrix products and activations run in a network's `dtype`; parameters are float32, and biases are added in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

Latents = Float[Array, "batch latent"]
PosteriorParameters = tuple[Latents, Latents]

HIGHEST = jax.lax.Precision.HIGHEST
"""Full float32 products; by default TPUs and recent GPUs round their factors."""

ZEROS = nn.initializers.zeros
KERNELS = nn.initializers.lecun_normal()
"""Flax's default."""


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
    start: nn.initializers.Initializer = KERNELS

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        """[..., inputs] to [..., features], in `dtype`."""
        kernel = self.param("kernel", self.start, (x.shape[-1], self.features), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        y = jnp.dot(x, kernel, precision=exact(x.dtype))
        return add_bias(y, self.param("bias", ZEROS, (self.features,), jnp.float32)) if self.use_bias else y


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
    start: nn.initializers.Initializer = KERNELS,
) -> Dense:
    """Affine map to `features`, linear without the bias; its kernel starts from `start`."""
    return Dense(features, use_bias, dtype, start, name=name)


def split_posterior(parameters: Float[Array, "batch twice_latent"]) -> PosteriorParameters:
    """Mean and log-variance, [B, L] each, of what one layer gives, [B, 2L], in at least float32."""
    mean, log_variance = jnp.split(as_float32(parameters), 2, axis=-1)
    return mean, log_variance
