"""The VAE: an encoder and a decoder network, a prior and a decoder-variance model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from bsvae_jax import objective
from bsvae_jax.errors import UserError, check_count, check_kind
from bsvae_jax.models import priors
from bsvae_jax.models.layers import Labels, as_float32, float32_products
from bsvae_jax.models.network import Network, build_modules, output_shape
from bsvae_jax.objective import DecoderVariance, ElboTerms, check_kind_of
from bsvae_jax.random import check_key, example_keys, example_positions, normal_per_example

Data = Float[Array, "batch *shape"]
Latents = Float[Array, "batch latent"]


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(log_variance)))."""

    mean: Latents
    """[B, L]"""
    log_variance: Latents
    """[B, L]"""


class Decoded(NamedTuple):
    """p(x|z): the mean and, where the network gives one, the log-variance."""

    mean: Data
    """[B, ...]"""
    log_variance: Float[Array, "..."] | None
    """[] for `Learned`, the shape of the mean for `Predicted`, else None: the variance then does not come from z."""


class VAEOutput(NamedTuple):
    """Everything one forward pass knows."""

    posterior: Posterior
    z: Latents
    """One sample of q(z|x) per image, [B, L]."""
    decoded: Decoded
    rate: Float[Array, " batch"]
    """`KL(q(z|x) || p(z))`, nats, [B]."""


class VAE(nn.Module):
    """A Gaussian VAE of any encoder and decoder. Pure: all randomness comes from the keys passed in.

    `model.apply(variables, x, key)` runs it; `method="encode"`, `"decode"`, `"sample"`, `"elbo_terms"` the parts. With
    `train=True` BatchNorm uses batch statistics (averaged over `axis_name`) and `batch_stats` must be mutable.

    >>> import jax
    >>> from bsvae_jax.models import MLP
    >>> class Encoder(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         hidden = nn.silu(nn.Dense(16)(x))
    ...         return nn.Dense(2)(hidden), nn.Dense(2)(hidden)  # mean and log-variance of q(z|x)
    >>> class Decoder(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, z, train=False):
    ...         return nn.Dense(5)(z)  # mean of p(x|z)
    >>> model = VAE(Encoder(), Decoder(), prior=priors.StandardNormal(2), decoder_variance=objective.Optimal())
    >>> x = jnp.zeros((3, 5))
    >>> variables = model.init(jax.random.key(0), x, jax.random.key(1))
    >>> terms = model.apply(variables, x, jax.random.key(2), method="elbo_terms")
    >>> terms.distortion.shape, terms.rate.shape
    ((3,), (3,))

    A module of `flax.nnx` becomes one of these by Flax's own bridge:

    >>> from flax import nnx
    >>> class NNXDecoder(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.dense = nnx.Linear(2, 5, rngs=rngs)
    ...
    ...     def __call__(self, z, train=False):
    ...         return self.dense(z)
    >>> model = VAE(Encoder(), nnx.bridge.to_linen(NNXDecoder), prior=priors.StandardNormal(2))
    >>> variables = model.init(jax.random.key(0), x, jax.random.key(1))
    >>> model.apply(variables, jax.random.key(3), 4, method="sample").shape
    (4, 5)

    With `classes` it is conditional (Sohn et al. 2015): q(z|x, y) and p(x|z, y) know the class y of an example, p(z) does not.

    >>> model = build_vae(MLP((16,)), 2, (8, 8, 1), classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((3, 8, 8, 1)), jax.random.key(1))
    >>> model.apply(variables, jax.random.key(3), 4, labels=jnp.array([7, 7, 0, 1]), method="sample").shape
    (4, 8, 8, 1)

    Raises:
      UserError: a field of a wrong kind, data of another shape than `data_shape`, what is no key, an encoder or decoder that
        returns something else than is said here, labels that are missing or out of range, or of a model without classes.
    """

    encoder: nn.Module
    """`encoder(x, train)` maps data [B, ...] to mean and log-variance of q(z|x), [B, L] each. Dropout, here and in the decoder,
    draws from the rng `dropout` in training, which a training step gives."""
    decoder: nn.Module
    """`decoder(z, train)` maps latents [B, L] to the mean of p(x|z), in the shape of the data; for a decoder variance that is
    predicted, the mean and then the log-variance along the last axis."""
    prior: priors.Prior = priors.StandardNormal()
    """p(z), of as many latents as the encoder gives: its `latent_size`."""
    decoder_variance: DecoderVariance = objective.Optimal()
    data_shape: tuple[int, ...] | None = None
    """Of one example, as in (28, 28, 1); None: whatever the encoder takes."""
    axis_name: str | None = None
    """The axis of the devices that share a batch, inside `pmap` or `shard_map`; None on one device."""
    classes: int | None = None
    """Number of classes of a conditional model: its encoder and decoder take labels [B], whole numbers from 0 to `classes` - 1,
    as their third argument; None: they take none."""
    tensorfloat32: bool = False
    """Let accelerators round the factors of float32 products in encoder and decoder (`Config.precision`)."""

    def setup(self) -> None:
        """Build the parts; called by Flax."""
        self._check()
        self.prior_model = self.prior.build(self.latent_size, self.encoder, self.data_shape)
        initial = self.decoder_variance.initial_log_variance()
        self.log_variance = (
            None if initial is None else self.param("log_variance", nn.initializers.constant(initial), (), jnp.float32)
        )

    @property
    def latent_size(self) -> int:
        """L"""
        size = self.prior.latent_size
        if size is None:
            name = type(self.prior).__name__
            raise UserError(f"The prior must know the number of latents; give it, as in {name}(latent_size=16).")
        check_count("latent_size", size)
        return size

    def without_variance(self) -> "VAE":
        """This model for one device, with a variance of 1/2 in place of one that has no parameters.

        What does not ask for the variance, the start and pictures of a model, is then compiled once for models of any variance.
        """
        variance = self.decoder_variance if self.decoder_variance.is_trained else objective.Constant(0.5)
        return self.clone(axis_name=None, decoder_variance=variance)

    def _check(self) -> None:
        for name in ("encoder", "decoder"):
            check_kind(
                name, getattr(self, name), nn.Module, "a module of flax.linen; flax.nnx.bridge.to_linen makes one of nnx"
            )
        check_kind_of("prior", self.prior, priors.Prior)
        check_kind("decoder_variance", self.decoder_variance, DecoderVariance, "as in bsvae_jax.Optimal()")  # may be traced
        if self.classes is not None:
            check_count("classes", self.classes)
        shape = self.data_shape
        if shape is not None and not (isinstance(shape, tuple) and shape and all(isinstance(n, int) and n > 0 for n in shape)):
            raise UserError(f"data_shape must be that of one example, whole numbers >= 1 as in (28, 28, 1), got {shape!r}.")

    def _and_labels(self, labels: Labels | None, count: Any) -> tuple[Labels, ...]:
        """The argument that encoder and decoder of a conditional model take besides; none of another model."""
        if self.classes is None:
            if labels is not None:
                raise UserError(
                    "This model knows no classes and takes no labels; leave them out, or make it with classes=10, say."
                )
            return ()
        if labels is None:
            if not self.is_initializing():
                raise UserError(f"This model is conditional: give labels, the class of each example, 0 ... {self.classes - 1}.")
            labels = jnp.zeros(count, jnp.int32)
        labels = jnp.asarray(labels)
        if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise UserError(f"labels must be whole numbers of shape ({count},), got {labels.dtype} of shape {labels.shape}.")
        if not isinstance(labels, jax.core.Tracer) and count:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise UserError(f"labels must lie in 0 ... {self.classes - 1}, got values from {low} to {high}.")
        return (labels,)

    def encode(self, x: Data, train: bool = False, labels: Labels | None = None) -> Posterior:
        """Data [B, ...], and of a conditional model their labels [B], to q(z|x)."""
        if self.data_shape is not None and jnp.shape(x)[1:] != self.data_shape:
            raise UserError(f"This model takes data of shape {self.data_shape}, got a batch of shape {jnp.shape(x)}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"This model takes floating-point data (images in [0, 1]), got {x.dtype}; divide 8-bit values by 255."
            )
        with float32_products(self.tensorfloat32):
            outputs = self.encoder(x, train, *self._and_labels(labels, x.shape[0]))
        expected = (x.shape[0], self.latent_size)
        name = type(self.encoder).__name__
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise UserError(
                f"The encoder {name} must return two arrays, mean and log-variance of q(z|x), [B, {self.latent_size}] each; "
                f"got {_shown(outputs)}."
            )
        for what, output in zip(("mean", "log-variance"), outputs, strict=True):
            if jnp.shape(output) != expected:
                raise UserError(
                    f"The {what} that the encoder {name} returns must have shape {expected}, got {jnp.shape(output)}."
                )
        return Posterior(*map(as_float32, outputs))

    def decode(self, z: Latents, train: bool = False, labels: Labels | None = None) -> Decoded:
        """Latents [B, L], and of a conditional model labels [B], to p(x|z)."""
        if jnp.ndim(z) != 2 or jnp.shape(z)[1] != self.latent_size:
            raise UserError(f"This model takes latents of shape [B, {self.latent_size}], got {jnp.shape(z)}.")
        with float32_products(self.tensorfloat32):
            decoded = self.decoder(z, train, *self._and_labels(labels, z.shape[0]))
        name = type(self.decoder).__name__
        if isinstance(decoded, tuple | list):
            raise UserError(f"The decoder {name} must return one array, the mean of p(x|z), got {_shown(decoded)}.")
        parts = self.decoder_variance.decoder_outputs
        if self.data_shape is not None:
            expected = (z.shape[0], *output_shape(self.data_shape, parts))
            if jnp.shape(decoded) != expected:
                also = "" if parts == 1 else f" (mean and log-variance, for {type(self.decoder_variance).__name__})"
                raise UserError(f"The decoder {name} must return shape {expected}{also}, got {jnp.shape(decoded)}.")
        if parts == 1:
            return Decoded(decoded, self.log_variance)
        if decoded.shape[-1] % 2:
            raise UserError(
                f"{type(self.decoder_variance).__name__} needs a decoder whose last axis holds the mean and then the "
                f"log-variance, twice that of the data; {name} returned shape {decoded.shape}."
            )
        mean, log_variance = jnp.split(decoded, 2, axis=-1)
        return Decoded(mean, log_variance)

    def log_prior(self, z: Latents) -> Float[Array, " batch"]:
        """`log p(z)` of latents [B, L], nats, [B]."""
        with float32_products(rounded=False):
            return priors.checked_density(self.prior_model, self.prior_model.log_prob(z), z)

    def sample_latents(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples of the prior, [count, L]."""
        check_key(key)
        check_count("count", count)
        with float32_products(rounded=False):
            return self.prior_model.sample(key, count)

    def sample(self, key: Key[Array, ""], count: int, labels: Labels | None = None) -> Float[Array, "count *shape"]:
        """Decoder means of `count` samples of the prior, [count, ...], without pixel noise; `labels` as for `decode`."""
        return self.decode(self.sample_latents(key, count), labels=labels).mean

    def __call__(self, x: Data, key: Key[Array, "*batch"], train: bool = False, labels: Labels | None = None) -> VAEOutput:
        """One forward pass with one posterior sample per image.

        Args:
          x: data [B, ...], images in [0, 1]; under a device axis, this device's share of the global batch.
          key: one key, from which each example takes its own by its position in the global batch; or a key per example, [B].
          train: BatchNorm uses and updates batch statistics.
          labels: the class of each example, [B], of a conditional model.
        """
        # Before the batch is encoded: in training that updates running statistics, which a VampPrior uses.
        with float32_products(rounded=False):
            density = self.prior_model.density()
        posterior = self.encode(x, train, labels)
        check_key(key, x.shape[0])
        keys = example_keys(key, example_positions(x.shape[0], self.axis_name)) if key.ndim == 0 else key
        noise = normal_per_example(keys, posterior.mean.shape[1:])
        z = posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise.astype(posterior.mean.dtype)
        with float32_products(rounded=False):
            rate = self.prior_model.rate(*posterior, z, density)
        return VAEOutput(posterior, z, self.decode(z, train, labels), rate)

    def elbo_terms(self, x: Data, key: Key[Array, "*batch"], train: bool = False, labels: Labels | None = None) -> ElboTerms:
        """Distortion and rate per example, nats; arguments as for the forward pass."""
        output = self(x, key, train, labels)
        return objective.elbo_terms(
            x,
            output.decoded.mean,
            output.rate,
            self.decoder_variance,
            log_variance=output.decoded.log_variance,
            axis_name=self.axis_name,
        )


def _shown(outputs: Any) -> str:
    """Shapes of what a module returned, for a message."""
    if isinstance(outputs, tuple | list):
        return f"{len(outputs)} values of shapes {', '.join(str(jnp.shape(output)) for output in outputs)}"
    return f"one of shape {jnp.shape(outputs)}"


def build_vae(
    network: Network,
    latent_size: int,
    data_shape: tuple[int, ...],
    decoder_variance: DecoderVariance | None = None,
    prior: priors.Prior | None = None,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    rematerialize: bool = False,
    classes: int | None = None,
    tensorfloat32: bool = False,
) -> VAE:
    """The VAE of a network for data of a shape.

    Args:
      network: what builds the encoder and the decoder.
      latent_size: L.
      data_shape: of one example, channels last.
      decoder_variance: None: `Optimal()`.
      prior: None: `StandardNormal()`.
      axis_name: of the devices that share a batch.
      dtype: of matrix products and activations.
      rematerialize: compute activations of convolutional blocks again in the backward pass instead of keeping them.
      classes: of a conditional model; None: it is told none.
      tensorfloat32: let accelerators round the factors of float32 products.

    >>> from bsvae_jax.models import MLP
    >>> build_vae(MLP((16,)), 2, (8, 8, 1)).latent_size
    2

    Raises:
      UserError: an argument of a wrong kind, or the network does not fit the data.
    """
    check_kind_of("network", network, Network)
    check_count("latent_size", latent_size)
    decoder_variance = objective.Optimal() if decoder_variance is None else decoder_variance
    check_kind_of("decoder_variance", decoder_variance, DecoderVariance)
    prior = priors.StandardNormal() if prior is None else prior
    check_kind_of("prior", prior, priors.Prior)
    encoder, decoder = build_modules(
        network, latent_size, data_shape, decoder_variance.decoder_outputs, axis_name, dtype, rematerialize, classes
    )
    prior = dataclasses.replace(prior, latent_size=latent_size)
    return VAE(encoder, decoder, prior, decoder_variance, data_shape, axis_name, classes, tensorfloat32)
