"""What the layers of every network have in common: the precision of products, padding, the sizes of halved maps, first values.

Matrix products and activations run in a network's `dtype`; parameters are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
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


def stage_size(side: int, stage: int) -> int:
    """One side of an image that was halved `stage` times, rounded up each time: `ceil(side / 2^stage)`.

    >>> [stage_size(28, stage) for stage in range(4)]
    [28, 14, 7, 4]
    """
    return -(-side // 2**stage)


def dense(
    features: int,
    dtype: Any = jnp.float32,
    use_bias: bool = True,
    name: str | None = None,
    start: nn.initializers.Initializer = KERNELS,
) -> nn.Dense:
    """Affine map to `features`, linear without the bias; its kernel starts from `start`."""
    return nn.Dense(features, use_bias, dtype=dtype, precision=exact(dtype), kernel_init=start, name=name)


def convolution(
    features: int,
    kernel: int,
    stride: int,
    dtype: Any,
    name: str | None = None,
    start: nn.initializers.Initializer = KERNELS,
) -> nn.Conv:
    """`kernel` x `kernel` convolution padded symmetrically by `kernel // 2`, as PyTorch pads (Flax's SAME does not)."""
    side = (kernel // 2, kernel // 2)
    return nn.Conv(
        features, (kernel, kernel), stride, (side, side), dtype=dtype, precision=exact(dtype), kernel_init=start, name=name
    )


def split_posterior(parameters: Float[Array, "batch twice_latent"]) -> PosteriorParameters:
    """Mean and log-variance, [B, L] each, of what one layer gives, [B, 2L], in at least float32."""
    mean, log_variance = jnp.split(as_float32(parameters), 2, axis=-1)
    return mean, log_variance
