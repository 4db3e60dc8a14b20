"""A few pictures of every member of a sweep, made in one call: what a report shows side by side."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from bsvae_jax.data.image_set import Examples
from bsvae_jax.distributed.mesh import REPLICATED, Execution, parallelize
from bsvae_jax.evaluation.sampling import to_8_bits
from bsvae_jax.models.vae import VAE
from bsvae_jax.training.identity import write_run_arrays

PICTURES = 10
"""Images of each kind."""


class Gallery(NamedTuple):
    """Pictures of one model, [n, ...] each; images in [0, 1], other examples as the decoder gives them."""

    originals: np.ndarray
    reconstructions: np.ndarray
    """Decoder means of one posterior sample of each original."""
    samples: np.ndarray
    """Decoder means of samples of the prior; of a conditional model, of the classes of the originals."""


def _draw(variables: Mapping[str, Any], images: Examples, key: Key[Array, ""], *, model: VAE, clip: bool) -> Any:
    posterior_key, prior_key = jax.random.split(key)
    x, labels = images.inputs()
    output: Any = model.apply(variables, x, posterior_key, labels=labels)
    samples: Any = model.apply(variables, prior_key, len(x), labels=labels, method="sample")
    limits: Any = dict(min=0.0, max=1.0) if clip else {}
    return x, jnp.clip(output.decoded.mean, **limits), jnp.clip(samples, **limits)


@functools.cache
def _parallelized(model: VAE, clip: bool, mesh: Mesh, execution: Execution) -> Any:
    draw = functools.partial(_draw, model=model, clip=clip)
    return parallelize(draw, mesh, (REPLICATED, REPLICATED, REPLICATED), REPLICATED, execution=execution, shared=(1,))


def draw_members(
    model: VAE,
    variables: Mapping[str, Any],
    images: Examples,
    keys: Key[Array, "*members"],
    members: int,
    *,
    mesh: Mesh,
    execution: Execution,
    clip: bool = True,
) -> Iterator[Gallery]:
    """Reconstructions and samples of each member.

    Args:
      model: of all members.
      variables: stacked, as for `scoring.score_members`.
      images: the originals, as stored.
      keys: one per member.
      members: how many galleries are wanted.
      mesh: that of `variables`.
      execution: how the members are driven.
      clip: to [0, 1], where images lie.

    Yields:
      The gallery of each member, in order.
    """
    drawn = jax.device_get(_parallelized(model.without_variance(), clip, mesh, execution)(variables, images, keys))
    for member in range(members):
        yield Gallery(*drawn) if execution == "loop" else Gallery(*(leaf[member] for leaf in drawn))


def write_pictures(folder: Path, gallery: Gallery, latent_rate: np.ndarray, images: bool = True) -> None:
    """Write `pictures.npz`: uint8 `images`, or other examples as float32, and the rate of each latent on the test set, nats."""
    arrays: dict[str, Any] = {name: to_8_bits(values) if images else values for name, values in gallery._asdict().items()}
    write_run_arrays(folder / "pictures.npz", **arrays, latent_rate=latent_rate)
