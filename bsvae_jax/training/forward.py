"""The forward pass of a training step: the terms of the objective of a batch, whole or in parts that follow one another."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from bsvae_jax import objective
from bsvae_jax.errors import UserError
from bsvae_jax.models.layers import Labels
from bsvae_jax.models.vae import VAE, Decoded, Posterior
from bsvae_jax.random import example_keys, example_positions

DROPOUT_SALT = 2**31 - 2
"""Folded into the key of a step for dropout, apart from the keys of the examples, which are by position."""


def terms_of_batch(
    model: VAE, variables: Mapping[str, Any], images: Array, key: Key[Array, ""], labels: Labels | None, parts: int
) -> tuple[objective.ElboTerms, Posterior, Any]:
    """ELBO terms and posteriors of the whole batch, and the batch statistics after it."""
    if parts > 1:
        return _terms_in_parts(model, variables, images, key, labels, parts)
    options: Any = dict(train=True, labels=labels, mutable=["batch_stats"], rngs={"dropout": _dropout_key(model, key)})
    output, updates = model.apply(variables, images, key, **options)
    return _elbo_terms(model, images, output.decoded, output.rate), output.posterior, updates.get("batch_stats", {})


def _dropout_key(model: VAE, key: Key[Array, ""]) -> Key[Array, ""]:
    """For dropout in modules of the user's own, which draws for a whole batch: another on each device."""
    one = jax.random.fold_in(key, DROPOUT_SALT)
    return one if model.axis_name is None else jax.random.fold_in(one, jax.lax.axis_index(model.axis_name))


def _elbo_terms(model: VAE, images: Array, decoded: Decoded, rate: Array) -> objective.ElboTerms:
    mean, log_variance = decoded
    options: Any = {"log_variance": log_variance, "axis_name": model.axis_name}
    return objective.elbo_terms(images, mean, rate, model.decoder_variance, **options)


def _terms_in_parts(
    model: VAE, variables: Mapping[str, Any], images: Array, key: Key[Array, ""], labels: Labels | None, parts: int
) -> tuple[objective.ElboTerms, Posterior, Any]:
    """What `terms_of_batch` gives, with the activations of one part in memory at a time.

    Each part is computed again in the backward pass, when the terms of all are known: a variance that is shared over the batch
    is that of the whole batch, not of a part, and so are its gradients.
    """

    @jax.checkpoint
    def forward(batch_stats: Any, part: tuple[Array, Array, Labels | None, Array]) -> tuple[Any, Any]:
        own = {"params": variables["params"], "batch_stats": batch_stats}
        x, keys, labels, dropout = part
        options: Any = dict(train=True, labels=labels, mutable=["batch_stats"], rngs={"dropout": dropout})
        output, updates = model.apply(own, x, keys, **options)
        return updates.get("batch_stats", {}), (output.decoded, output.rate, output.posterior)

    def split(values: Array) -> Array:
        return values.reshape(parts, len(images) // parts, *values.shape[1:])

    def joined(values: Array) -> Array:
        return values.reshape(len(images), *values.shape[2:])

    if len(images) % parts:
        raise UserError(f"A batch of {len(images)} images does not divide into {parts} parts.")
    keys = example_keys(key, example_positions(len(images), model.axis_name, parts))
    inputs = (*jax.tree.map(split, (images, keys, labels)), jax.random.split(_dropout_key(model, key), parts))
    batch_stats, (decoded, rate, posterior) = jax.lax.scan(forward, variables["batch_stats"], inputs)
    mean, log_variance = decoded
    if log_variance is not None:  # one number, the same of every part; or one per pixel
        log_variance = jnp.mean(log_variance) if log_variance.ndim == 1 else joined(log_variance)
    terms = _elbo_terms(model, images, Decoded(joined(mean), log_variance), rate.reshape(-1))
    return terms, Posterior(*(part.reshape(len(images), -1) for part in posterior)), batch_stats
