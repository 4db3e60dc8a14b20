"""What the layers of every network have in common: precision of products, sizes of halved maps, initialization.

Matrix products and activations run in a network's `dtype`; parameters are float32, and biases are added in float32.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from bsvae_jax.errors import UserError

Latents = Float[Array, "batch latent"]
PosteriorParameters = tuple[Latents, Latents]
Bias = Float[Array | np.ndarray, " features"]
Labels = Int[Array | np.ndarray, " batch"]
"""The class of each example, 0 ... classes - 1."""

HIGHEST = jax.lax.Precision.HIGHEST
"""Full float32 products; by default TPUs and recent GPUs round their factors."""
_ROUNDED = contextvars.ContextVar("rounded", default=False)
"""Whether accelerators may round the factors of float32 products."""
EPSILON = 1e-5
"""Added to the variance that BatchNorm divides by, as PyTorch does."""
MOMENTUM = 0.9
"""Share that BatchNorm's averages keep at a step; PyTorch's momentum is what they take, 0.1."""
SLOPE = 0.01
"""Of a leaky ReLU where its input is negative, as PyTorch's."""


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


@contextlib.contextmanager
def float32_products(rounded: bool) -> Iterator[None]:
    """What the float32 products that are traced inside are: full, or rounded to TensorFloat-32 where a chip has it.

    Products whose precision is not given take it too, those of a user's own layers. JAX knows what it has traced by its own
    setting, so that one function in both precisions is traced twice.
    """
    before = _ROUNDED.set(rounded)
    try:
        with jax.default_matmul_precision("tensorfloat32" if rounded else "highest"):
            yield
    finally:
        _ROUNDED.reset(before)


def exact(dtype: Any) -> jax.lax.Precision:
    """Full float32 products where float32 is asked for, or what `float32_products` says of them."""
    if jnp.dtype(dtype) != jnp.float32:
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGH if _ROUNDED.get() else HIGHEST


def as_float32(x: Array) -> Array:
    """`x` in at least float32, in which networks return their results."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_bias(x: Array, bias: Bias) -> Array:
    """`x + bias` in the type of `x`, added in at least float32.

    The bias's gradient is a sum over all examples and positions, and is taken in the type of this addition: a bfloat16 sum of
    ones stands still at 256.
    """
    return (as_float32(x) + _beside(x, bias)).astype(x.dtype)


def _beside(x: Array, values: Float[Array | np.ndarray, " features"]) -> Array | np.ndarray:
    """One value per feature, with as many axes as `x`."""
    return jnp.reshape(values, (1,) * (x.ndim - 1) + (-1,))


class Dense(nn.Module):
    """Affine map of the last axis, linear without the bias: `flax.linen.Dense` but for the type of the bias."""

    features: int
    use_bias: bool = True
    dtype: Any = None
    """None: that of the inputs, or of the parameters where it is wider."""
    start: Initialization = LECUN

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        """[..., inputs] to [..., features], in `dtype`."""
        y, bias = self.apart(x)
        return y if isinstance(bias, float) else add_bias(y, bias)

    @nn.compact
    def apart(self, x: Float[Array, "*batch inputs"]) -> tuple[Float[Array, "*batch features"], Bias | float]:
        """The result without the bias, and the bias, 0 if there is none, for a `BatchNorm`."""
        inputs = x.shape[-1]
        kernel = self.param("kernel", self.start.kernel, (inputs, self.features), jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        bias = self.param("bias", self.start.bias(inputs), (self.features,), jnp.float32) if self.use_bias else 0.0
        return jnp.dot(x, kernel, precision=exact(x.dtype)), bias


BatchStatistics = Float[Array, " features"]


@jax.custom_jvp
def leaky_relu(x: Array) -> Array:
    """`x` where it is not negative, `SLOPE * x` elsewhere.

    The derivative is taken from the result, which has the sign of `x` and is kept for the next layer anyway.
    """
    return _leak(x, x)


@leaky_relu.defjvp
def _leaky_relu_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    y = leaky_relu(*primals)
    return y, _leak(y, *tangents)


def _leak(sign: Array, x: Array | np.ndarray) -> Array:
    return jnp.where(sign >= 0, x, SLOPE * x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: Float[Array, "*batch features"],
    scale: BatchStatistics,
    bias: BatchStatistics,
    axis_name: str | None,
    dtype: Any,
    leaky: bool,
) -> tuple[Float[Array, "*batch features"], BatchStatistics, BatchStatistics]:
    """`x` with the mean `bias` and the standard deviation `scale` in every feature, over the batch of all devices.

    Also mean and (biased) variance before it, in at least float32. One pass over `x` for both, one for the result; backwards as
    many: the derivative is written out, because that of the operations sums three times over what it needs two sums of, and
    because a compiler for GPUs otherwise writes the gradient before the leaky ReLU, and reads it again twice.

    Args:
      x: [..., F].
      scale: [F].
      bias: [F].
      axis_name: of the devices that share the batch.
      dtype: of the result.
      leaky: of the result, take the `leaky_relu`.
    """
    mean, square = _batch_means(axis_name, as_float32(x), jnp.square(as_float32(x)))
    variance = jnp.maximum(0.0, square - jnp.square(mean))
    y = _standardize(x, mean, variance, scale, bias)
    return (leaky_relu(y) if leaky else y).astype(dtype), mean, variance


def _standardize(
    x: Array, mean: BatchStatistics, variance: BatchStatistics, scale: BatchStatistics, bias: BatchStatistics
) -> Array:
    return (x - _beside(x, mean)) * _beside(x, jax.lax.rsqrt(variance + EPSILON) * scale) + _beside(x, bias)


@normalize.defjvp
def _normalize_jvp(axis_name: str | None, dtype: Any, leaky: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, scale, bias), (x_tangent, scale_tangent, bias_tangent) = primals, tangents
    y, mean, variance = normalize(x, scale, bias, axis_name, dtype, leaky)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    standard, x_tangent = (x - _beside(x, mean)) * _beside(x, inverse), as_float32(x_tangent)
    along_mean, along_standard = _batch_means(axis_name, x_tangent, standard * x_tangent)
    factor = scale * inverse
    # Grouped by what varies within a feature: backwards, each group is one sum, and what they share is computed twice, because
    # writing it would move more bytes.
    of_features = jnp.stack([scale_tangent - factor * along_standard, bias_tangent - factor * along_mean])
    slope, offset = _for_examples(x, of_features)
    along_x, along_features = _beside(x, factor), slope * standard + offset
    if leaky:
        sign = standard * _beside(x, scale) + _beside(x, bias)
        along_x, along_features = _leak(sign, along_x), _leak(sign, along_features)
    y_tangent = along_x * x_tangent + along_features
    return (y, mean, variance), (y_tangent.astype(dtype), along_mean, 2.0 * along_standard / inverse)


def _batch_means(axis_name: str | None, *values: Array) -> Array:
    """Means of arrays [B, ..., F] over all but the last axis and over the devices, [number of arrays, F].

    First within each example, then over the batch, of all arrays at once: a GPU takes two kernels for a long sum anyway, and
    the second would be one for each array.
    """
    of_examples = jnp.stack([jnp.mean(value, tuple(range(1, value.ndim - 1))) for value in values])
    means = jnp.mean(of_examples, 1)
    return means if axis_name is None else jax.lax.pmean(means, axis_name)


def _for_examples(x: Array, values: Array) -> list[Array]:
    """Each of `values` [n, F] as an array [B, 1, ..., F] for `x` [B, ..., F]: backwards, sums like those of `_batch_means`."""
    each = jax.lax.split(jnp.broadcast_to(values[:, None], (len(values), len(x), x.shape[-1])), [1] * len(values))
    return [rows.reshape(len(x), *(1,) * (x.ndim - 2), x.shape[-1]) for rows in each]


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's constants, over the last axis: the variables of `flax.linen.BatchNorm`, and its numbers."""

    train: bool
    """Whether to use the statistics of the batch, and to average them; the averages are used otherwise."""
    axis_name: str | None = None
    """Of the devices that share the batch."""
    dtype: Any = jnp.float32
    leaky: bool = False
    """A leaky ReLU follows, as part of the layer."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"], bias_before: Bias | float = 0.0) -> Float[Array, "*batch features"]:
        """[..., F] to [..., F], in `dtype`.

        Args:
          x: what the layer before gives, without its bias.
          bias_before: that bias. It is part of the averages; the mean of the batch would only take it away again.
        """
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if not self.train:
            y = _standardize(x, mean.value - bias_before, variance.value, scale, bias)
            return (leaky_relu(y) if self.leaky else y).astype(self.dtype)
        initializing = self.is_initializing()
        axis_name = None if initializing else self.axis_name
        y, batch_mean, batch_variance = normalize(x, scale, bias, axis_name, self.dtype, self.leaky)
        if not initializing:
            new_mean = MOMENTUM * mean.value + (1.0 - MOMENTUM) * (batch_mean + bias_before)
            new_variance = MOMENTUM * variance.value + (1.0 - MOMENTUM) * batch_variance
            mean.value, variance.value = new_mean.astype(mean.value.dtype), new_variance.astype(variance.value.dtype)
        return y


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


def add_class(
    x: Float[Array, "batch *positions features"], labels: Labels | None, classes: int | None, deviation: float = 1.0
) -> Float[Array, "batch *positions features"]:
    """Features plus a learned vector of the class of each example; unchanged in a network without classes.

    In a first layer this is what a one-hot class beside the inputs amounts to (Sohn et al. 2015). Called inside a module, whose
    parameter `class_embedding.embedding`, [classes, features], the vectors are; added in at least float32, as biases are.

    Args:
      x: [B, ..., F].
      labels: [B]; what is no class gives NaN.
      classes: how many there are; None: the network is told none.
      deviation: of the initial vectors; as large as features are, or the latents learn the class before they do, and keep it:
        of the digits 98 % of the samples were then of their class, and 70 % with vectors that began at 0.
    """
    if classes is None:
        return x
    if labels is None:
        raise UserError(f"A conditional network needs labels, the class of each example, 0 ... {classes - 1}.")
    start = nn.initializers.normal(deviation)
    labels = jnp.asarray(labels)
    labels = jnp.where(labels < 0, classes, labels)  # a negative index would count from the end
    vectors = nn.Embed(classes, x.shape[-1], embedding_init=start, name="class_embedding")(labels)
    return (as_float32(x) + vectors.reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1])).astype(x.dtype)
