"""The velocity field of `FlowMatching`: a small transformer over the positions of a latent map, told the time.

Blocks of attention and MLP whose layer norms take scale and shift from the time, and whose results are multiplied by gates that
start at zero: adaLN-Zero (Peebles & Xie 2023, section 3.2). A fresh network is the zero field. All in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsvae_jax.models.layers import HIGHEST, ZEROS, dense

Latents = Float[Array, "batch latent"]
Tokens = Float[Array, "batch positions width"]

HIGHEST_FREQUENCY = 1000.0


def _norm(x: Tokens) -> Tokens:
    """Each token to mean 0 and variance 1."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + 1e-6)


def time_features(time: Float[Array, " batch"], count: int) -> Float[Array, "batch count"]:
    """Cosines and sines of the time at `count / 2` frequencies, geometric from 1 to 1,000 radians, [B, count]."""
    frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(HIGHEST_FREQUENCY), count // 2, dtype=time.dtype))
    angles = time[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nn.Module):
    """`x + g1 attention(modulated norm(x))`, then `x + g2 mlp(modulated norm(x))`; scales, shifts and gates from the time."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, condition: Float[Array, "batch width"]) -> Tokens:
        """Tokens [B, P, width] and condition [B, width] to tokens."""
        batch, positions, width = x.shape
        modulation = dense(6 * width, name="modulation", start=ZEROS)(nn.silu(condition))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y = _norm(x) * (1.0 + scale1) + shift1
        per_head = (batch, positions, self.heads, width // self.heads)
        query, key, value = (dense(width, name=name)(y).reshape(per_head) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, precision=HIGHEST) / per_head[-1] ** 0.5
        mixed = jnp.einsum("bhqk,bkhc->bqhc", nn.softmax(scores, axis=-1), value, precision=HIGHEST)
        x = x + gate1 * dense(width, name="mixed")(mixed.reshape(x.shape))
        y = _norm(x) * (1.0 + scale2) + shift2
        return x + gate2 * dense(width, name="narrow")(nn.gelu(dense(4 * width, name="wide")(y)))


class VelocityNetwork(nn.Module):
    """u(x, t) of latents in row-major order of their map."""

    prior: Any
    """The settings: `FlowMatching`."""

    @nn.compact
    def __call__(self, x: Latents, time: Float[Array, " batch"]) -> Latents:
        """Latents [B, L] and times [B] to a velocity [B, L]."""
        positions, width = self.prior.rows * self.prior.columns, self.prior.width
        tokens = x.reshape(x.shape[0], positions, -1)
        channels = tokens.shape[-1]
        places = self.param("places", nn.initializers.normal(0.02), (positions, width), jnp.float32)
        y = dense(width, name="tokens")(tokens) + places[None]
        condition = dense(width, name="time1")(nn.silu(dense(width, name="time0")(time_features(time, width))))
        for block in range(self.prior.depth):
            y = Block(width, self.prior.heads, name=f"block{block}")(y, condition)
        shift, scale = jnp.split(dense(2 * width, name="modulation", start=ZEROS)(nn.silu(condition))[:, None], 2, axis=-1)
        return dense(channels, name="velocity", start=ZEROS)(_norm(y) * (1.0 + scale) + shift).reshape(x.shape)
