"""How the decoder variance sigma^2 of p(x|z) = N(x; mean, sigma^2) is chosen: one small frozen dataclass for each way.

Derive `DecoderVariance` for a way of your own; a config takes it like the ones here.
"""

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bsvae_jax import theory
from bsvae_jax.errors import UserError
from bsvae_jax.objective.gaussian import (
    LOG_2PI,
    QUANTIZATION_VARIANCE,
    Shared,
    as_float,
    check_floor,
    check_positive,
    check_shared,
    distortion_at_optimum,
    nll_from_log_variance,
    optimal_variance_of,
    quantization_variance,
)
from bsvae_jax.objective.kind import Kind

Self = TypeVar("Self", bound="DecoderVariance")
SplitDistortion = tuple[np.ndarray, float]


@dataclass(frozen=True)
class DecoderVariance(Kind, abc.ABC):
    """Base of all ways to choose sigma^2; a class of your own needs `distortion`, and what else of this it wants otherwise.

    >>> @dataclass(frozen=True)
    ... class PerChannel(DecoderVariance):
    ...     "The optimal variance of each channel, shared over the global batch and all positions."
    ...
    ...     is_density: ClassVar[bool] = False
    ...
    ...     def distortion(self, residual_squared, log_variance, axis_name):
    ...         from bsvae_jax.objective import mean_over_devices
    ...
    ...         positions = tuple(range(residual_squared.ndim - 1))
    ...         variance = mean_over_devices(residual_squared.mean(positions), axis_name) + self.v0
    ...         terms = jnp.log(2 * jnp.pi * variance) + (residual_squared + self.v0) / variance
    ...         return variance, 0.5 * sum_pixels(terms)
    ...
    ...     def split_distortion(self, squared_error, pixel_squared_error, batches):  # shared over a split that is evaluated
    ...         variance = pixel_squared_error.mean(tuple(range(pixel_squared_error.ndim - 1))) + self.v0
    ...         value = 0.5 * pixel_squared_error.size * np.mean(np.log(2 * np.pi * variance) + 1)
    ...         return np.full(squared_error.shape, value), variance.mean()
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """A static node of a pytree: an argument of a jitted function, which is compiled for each."""
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    decoder_outputs: ClassVar[int] = 1
    """Values that the decoder returns for each pixel and channel: 2 where it predicts the log-variance as well."""
    is_density: ClassVar[bool] = True
    """Whether exp(-distortion) is a density of x: it is not where sigma^2 depends on x."""
    traced: ClassVar[tuple[str, ...]] = ()
    """Fields that the compiled program takes as arrays, so that members of a sweep which differ in them share one program."""

    @property
    def v0(self) -> float:
        """Floor of the variance, squared intensity: the field `floor`, or that of 8-bit images where it is open or missing."""
        floor = getattr(self, "floor", None)
        return QUANTIZATION_VARIANCE if floor is None else floor

    def with_floor(self: Self, bin_width: float) -> Self:
        """Itself, its `floor` taken from the data's grid where it is left open."""
        if getattr(self, "floor", 0.0) is not None:
            return self
        return dataclasses.replace(self, floor=quantization_variance(bin_width))  # type: ignore[call-arg]

    def initial_log_variance(self) -> float | None:
        """Where a trained scalar log-variance starts; None: the model has none."""
        return None

    @property
    def is_trained(self) -> bool:
        """Whether the model gives a log-variance: a trained scalar, or what the decoder predicts."""
        return self.decoder_outputs == 2 or self.initial_log_variance() is not None

    def check_log_variance(self, log_variance: Any, shape: tuple[int, ...]) -> Array | None:
        """The log-variance that the model gives for data of `shape` [B, ...], as an array; None where there is none.

        Raises:
          UserError: it is missing, superfluous or of a wrong shape.
        """
        name = type(self).__name__
        if self.is_trained != (log_variance is not None):
            given = "none" if self.is_trained else "one"
            raise UserError(f"{name} {'needs' if self.is_trained else 'takes no'} log_variance, and got {given}.")
        if log_variance is None:
            return None
        array = as_float("log_variance", log_variance)
        expected = shape if self.decoder_outputs == 2 else ()
        if array.shape != expected:
            raise UserError(f"log_variance of {name} must have shape {expected}, got {array.shape}.")
        return array

    @abc.abstractmethod
    def distortion(
        self,
        residual_squared: Float[Array, "batch *pixels"],
        log_variance: Array | None,
        axis_name: str | None,
        mask: Bool[Array, "batch *pixels"] | None = None,
    ) -> tuple[Array, Float[Array, " batch"]]:
        """The variance used, and `-log p(x|z)` in nats for each example.

        Args:
          residual_squared: `(x - mean)^2`, [B, ...], at least float32.
          log_variance: the trained log-variance: [] of a scalar, [B, ...] of a predicted one, else None.
          axis_name: the device axis over which a variance shared by the batch is averaged as well (`mean_over_devices`).
          mask: which entries are observed, [B, ...]: only these count. A class of your own may leave this parameter out, and
            `elbo_terms` then refuses a mask.

        Returns:
          The variance, in any shape that broadcasts against one example or the batch, and the distortion, [B].
        """

    def nll(self, residual_squared: Float[Array, "batch *pixels"], log_variance: Array | None) -> Float[Array, " batch"]:
        """`-log p(x|z)` at x itself, without the dequantization noise of the floor, nats, [B]; only where it is a density."""
        return self.distortion(residual_squared, log_variance, None)[1]

    def split_distortion(
        self, squared_error: np.ndarray, pixel_squared_error: np.ndarray, batches: SplitDistortion
    ) -> SplitDistortion:
        """Distortion of the N examples of a whole split, nats, [N], and the variance averaged over all that it depends on.

        A variance that is shared over the batch in training is shared over the split here: override it there. An example of
        which there are several posterior samples is as many examples.

        Args:
          squared_error: of each example, summed over pixels, [N], float64.
          pixel_squared_error: of each pixel, averaged over the examples, the shape of an example.
          batches: what `distortion` gave batch by batch; the answer where nothing is shared.
        """
        return batches

    def critical_beta(self, eigenvalues: np.ndarray, floor: float) -> float | None:
        """Beta at which a linear model of data with these covariance eigenvalues collapses; None where theory does not say."""
        return None


def _distortion_at(squared_error: np.ndarray, variance: Any, floor: float, pixels: int) -> np.ndarray:
    """`D/2 log(2 pi v) + (SSE + D v0) / (2 v)`, nats, [N], for one variance or one for each example."""
    return 0.5 * pixels * (LOG_2PI + np.log(variance)) + (squared_error + pixels * floor) / (2 * variance)


@dataclass(frozen=True)
class Constant(DecoderVariance):
    """One fixed variance: the conventional beta-VAE. Distortion `D/2 log(2 pi v) + SSE / (2 v)`, nats.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import elbo_terms
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> print(elbo_terms(x, mean, jnp.zeros(1), Constant(0.5)).distortion)  # log(pi) + 1
    [2.1447299]

    Raises:
      UserError: the variance is not a finite number > 0.
    """

    variance: Any = 0.5
    """sigma^2 > 0, in squared units of the [0, 1] intensity; 0.5 is the paper's SSE + beta*KL up to a constant."""

    def __post_init__(self) -> None:
        check_positive("Constant.variance", self.variance)
        if isinstance(self.variance, int):  # a float, so that the command line takes floats for it
            object.__setattr__(self, "variance", float(self.variance))

    traced: ClassVar[tuple[str, ...]] = ("variance",)

    @property
    def name(self) -> str:
        """`constant-0.5`."""
        return f"constant-{self.variance:.10g}"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return f"β-VAE, constant σ² = {self.variance:g}"

    @property
    def v0(self) -> float:
        """0: a plain Gaussian density."""
        return 0.0

    def distortion(
        self,
        residual_squared: Float[Array, "batch *pixels"],
        log_variance: Array | None,
        axis_name: str | None,
        mask: Bool[Array, "batch *pixels"] | None = None,
    ) -> tuple[Array, Float[Array, " batch"]]:
        """`D/2 log(2 pi v) + SSE / (2 v)`, nats, [B]."""
        variance = jnp.asarray(self.variance, residual_squared.dtype)
        return variance, nll_from_log_variance(residual_squared, jnp.log(variance), mask=mask)

    def split_distortion(
        self, squared_error: np.ndarray, pixel_squared_error: np.ndarray, batches: SplitDistortion
    ) -> SplitDistortion:
        """The closed form in float64."""
        variance = float(self.variance)
        return _distortion_at(squared_error, variance, 0.0, pixel_squared_error.size), variance

    def critical_beta(self, eigenvalues: np.ndarray, floor: float) -> float | None:
        """Largest eigenvalue over the variance: beta sigma^2 is the water level."""
        return float(eigenvalues[0] / self.variance)


@dataclass(frozen=True)
class Optimal(DecoderVariance):
    """The closed-form optimal variance `v* = MSE + v0` (Kim & Lee 2024): BS-VAE.

    Distortion `D/2 (log(2 pi v*) + 1)`, nats, once averaged over what shares v*; see `optimal_gaussian_nll`.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import elbo_terms
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # MSE = 1/2
    >>> terms = elbo_terms(x, mean, jnp.zeros(1), Optimal(floor=0.0))
    >>> print(terms.variance, terms.distortion)  # v* = 1/2, log(pi) + 1
    [[0.5]] [2.1447299]

    Raises:
      UserError: `over` is unknown or asks for a variance per pixel and example, or `floor` is not a finite number >= 0.
    """

    over: Shared = "example"
    """What shares one variance: 'example' (BS-VAE, sigma^2*(x)), 'batch' (Rybkin et al. 2021), 'pixel' or 'channel'."""
    floor: float | None = None
    """v0 in squared intensity; None: the quantization variance of the data (8 bits where no data set says otherwise)."""

    def __post_init__(self) -> None:
        check_shared(self.over)
        check_floor("Optimal.floor", self.floor)

    is_density: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """`optimal` per example, else `optimal-batch` and the like."""
        return "optimal" if self.over == "example" else f"optimal-{self.over}"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return {
            "example": "BS-VAE, optimal σ² per image",
            "batch": "optimal σ², one for all",
            "pixel": "optimal σ² per pixel",
            "channel": "optimal σ² per channel",
        }[self.over]

    def distortion(
        self,
        residual_squared: Float[Array, "batch *pixels"],
        log_variance: Array | None,
        axis_name: str | None,
        mask: Bool[Array, "batch *pixels"] | None = None,
    ) -> tuple[Array, Float[Array, " batch"]]:
        """As `optimal_gaussian_nll`."""
        variance = optimal_variance_of(residual_squared, self.over, self.v0, axis_name, mask)
        return variance, distortion_at_optimum(residual_squared, variance, self.over, self.v0, mask)

    def split_distortion(
        self, squared_error: np.ndarray, pixel_squared_error: np.ndarray, batches: SplitDistortion
    ) -> SplitDistortion:
        """The closed form in float64; what is shared is shared over the split."""
        pixels = pixel_squared_error.size
        if self.over in ("pixel", "channel"):
            # Squared errors per pixel and example are not kept: every example gets the mean, which is exact.
            positions = tuple(range(pixel_squared_error.ndim - 1))
            shared = pixel_squared_error if self.over == "pixel" else pixel_squared_error.mean(positions)
            variances = shared + self.v0
            value = 0.5 * pixels * np.mean(np.log(2 * np.pi * variances) + 1.0)
            return np.full(squared_error.shape, value), float(variances.mean())
        variance = squared_error / pixels + self.v0
        variance = variance if self.over == "example" else variance.mean()
        return _distortion_at(squared_error, variance, self.v0, pixels), float(np.mean(variance))

    def critical_beta(self, eigenvalues: np.ndarray, floor: float) -> float | None:
        """`theory.critical_beta`, which treats one variance for all examples; None for others."""
        return theory.critical_beta(eigenvalues, floor) if self.over == "batch" else None


class _Trained(DecoderVariance):
    """What `Learned` and `Predicted` share: the variance is exp(log_variance), with the floor in the numerator."""

    def distortion(
        self,
        residual_squared: Float[Array, "batch *pixels"],
        log_variance: Array | None,
        axis_name: str | None,
        mask: Bool[Array, "batch *pixels"] | None = None,
    ) -> tuple[Array, Float[Array, " batch"]]:
        """`sum_pixels 1/2 [log(2 pi v) + ((x - mean)^2 + v0) / v]`, nats, [B]."""
        assert log_variance is not None, "elbo_terms has checked it"
        log_variance = log_variance.astype(residual_squared.dtype)
        return jnp.exp(log_variance), nll_from_log_variance(residual_squared, log_variance, self.v0, mask)

    def nll(self, residual_squared: Float[Array, "batch *pixels"], log_variance: Array | None) -> Float[Array, " batch"]:
        """The same without v0."""
        assert log_variance is not None, "the decoder gives it"
        return nll_from_log_variance(residual_squared, log_variance)


@dataclass(frozen=True)
class Learned(_Trained):
    """One trained log-variance for all pixels and examples (sigma-VAE, Rybkin et al. 2021).

    Distortion `D/2 log(2 pi v) + (SSE + D v0) / (2 v)`, nats.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import elbo_terms
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> log_variance = jnp.log(0.5)  # the model's parameter
    >>> print(elbo_terms(x, mean, jnp.zeros(1), Learned(floor=0.0), log_variance=log_variance).distortion)  # log(pi) + 1
    [2.1447299]

    Raises:
      UserError: `initial_variance` is not a finite number > 0, or `floor` none >= 0.
    """

    initial_variance: float = 1.0
    """Where training starts, squared intensity, > 0; the log-variance takes 10 times the learning rate of the networks."""
    floor: float | None = None
    """v0, as in `Optimal`; with it the variance converges to the batch-optimal `MSE + v0`."""

    def __post_init__(self) -> None:
        check_positive("Learned.initial_variance", self.initial_variance)
        check_floor("Learned.floor", self.floor)

    @property
    def name(self) -> str:
        """`learned`."""
        return "learned"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return "learned σ², one for all"

    def initial_log_variance(self) -> float | None:
        """Logarithm of `initial_variance`."""
        return float(np.log(self.initial_variance))

    def split_distortion(
        self, squared_error: np.ndarray, pixel_squared_error: np.ndarray, batches: SplitDistortion
    ) -> SplitDistortion:
        """The closed form in float64."""
        variance = batches[1]
        return _distortion_at(squared_error, variance, self.v0, pixel_squared_error.size), variance


@dataclass(frozen=True)
class Predicted(_Trained):
    """The decoder returns a log-variance per pixel besides the mean; v0 > 0 keeps its likelihood bounded.

    Distortion `sum_pixels 1/2 [log(2 pi v) + ((x - mean)^2 + v0) / v]`, nats.

    >>> import jax.numpy as jnp
    >>> from bsvae_jax.objective import elbo_terms
    >>> x, mean = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2))  # SSE = 1
    >>> log_variance = jnp.log(jnp.full((1, 2), 0.5))  # of the decoder, in the shape of x
    >>> terms = elbo_terms(x, mean, jnp.zeros(1), Predicted(floor=0.25), log_variance=log_variance)
    >>> print(terms.distortion)  # log(pi) + SSE + 2 v0
    [2.6447299]

    Raises:
      UserError: `floor` is not a finite number > 0.
    """

    floor: float | None = None
    """v0, as in `Optimal`."""

    def __post_init__(self) -> None:
        if self.floor is not None:
            check_positive("Predicted.floor", self.floor)

    decoder_outputs: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """`predicted`."""
        return "predicted"

    @property
    def label(self) -> str:
        """As the field calls it."""
        return "predicted σ² per pixel and image"
