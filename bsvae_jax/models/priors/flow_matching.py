"""Flow matching (Lipman et al. 2023) as pure functions: the loss, the integration of a velocity field, and its density.

Time runs from 0, where x is noise `n ~ N(0, I)`, to 1, where it is data z, along straight lines `x_t = (1 - t) n + t z`: their
optimal-transport path (section 4.1, example II) with no noise left at t = 1. A velocity field u(x, t) is trained to be the
expectation of `z - n` given `x_t`; the solution of `dx/dt = u(x, t)` from noise then has the distribution of the data.

A velocity is any function of x [B, L] and t [B] that returns [B, L] and treats examples apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsvae_jax.errors import check_count
from bsvae_jax.objective import LOG_2PI

States = Float[Array, "batch latent"]
Times = Float[Array, " batch"]
Velocity = Callable[[States, Times], States]


def flow_matching_loss(velocity: Velocity, z: States, noise: States, time: Times) -> Float[Array, " batch"]:
    """`||u(x_t, t) - (z - n)||^2` per example, summed over the latents, [B] (Lipman et al. 2023, equation 23).

    Its least expectation is the variance of `z - n` that is left when `x_t` is known, which is not 0.

    Args:
      velocity: u.
      z: data, [B, L].
      noise: n, samples of N(0, I), [B, L].
      time: t in [0, 1], [B].

    >>> z, noise = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> print(flow_matching_loss(lambda x, t: jnp.zeros_like(x), z, noise, jnp.array([0.5])))  # (2 - 1)^2
    [1.]
    """
    x = (1.0 - time)[:, None] * noise + time[:, None] * z
    return jnp.sum(jnp.square(velocity(x, time) - (z - noise)), axis=-1)


def _integrate(field: Callable[[Any, Array], Any], start: Any, steps: int, backwards: bool) -> Any:
    """Solve `d state / dt = field(state, t)` for a pytree from t = 0 to 1, or from 1 to 0, in equal steps of Heun's method."""
    check_count("steps", steps)
    step = (-1.0 if backwards else 1.0) / steps

    def along(state: Any, slope: Any, factor: float) -> Any:
        return jax.tree.map(lambda value, change: value + factor * change, state, slope)

    def body(number: Array, state: Any) -> Any:
        time = (1.0 if backwards else 0.0) + step * number
        slope = field(state, time)
        second = field(along(state, slope, step), time + step)
        return along(along(state, slope, 0.5 * step), second, 0.5 * step)

    return jax.lax.fori_loop(0, steps, body, start)


def integrate(velocity: Velocity, start: States, steps: int, backwards: bool = False) -> Float[Array, "batch latent"]:
    """Follow the velocity from noise at t = 0 to data at t = 1, or backwards, in equal steps.

    Args:
      velocity: u.
      start: where to start, [B, L].
      steps: number of steps of Heun's method, which is of second order and asks for the velocity twice a step.
      backwards: from data at t = 1 to noise at t = 0.

    >>> growth = lambda x, t: x  # exp(1) = 2.718
    >>> print(f"{integrate(growth, jnp.ones((1, 1)), 10)[0, 0]:.4f}")
    2.7141

    Raises:
      UserError: no steps.
    """

    def field(x: Array, time: Array) -> Array:
        return velocity(x, jnp.full(x.shape[0], time, x.dtype))

    end: Array = _integrate(field, start, steps, backwards)
    return end


def divergence(
    velocity: Velocity, x: States, time: Times, probes: Float[Array, "probes batch latent"] | None = None
) -> tuple[States, Float[Array, " batch"]]:
    """The velocity [B, L] and its divergence `sum_l d u_l / d x_l`, [B].

    Args:
      velocity: u.
      x: [B, L].
      time: t, [B].
      probes: None: exact, by L derivatives. Else vectors e of independent entries of mean 0 and variance 1, [P, B, L], of which
        the mean of `e . (du/dx) e` is an unbiased estimate (Hutchinson 1989), by P derivatives.

    >>> value, trace = divergence(lambda x, t: x * jnp.array([[1.0, 2.0]]), jnp.ones((1, 2)), jnp.zeros(1))
    >>> print(value, trace)
    [[1. 2.]] [3.]
    """

    def derivative(direction: Array) -> Array:
        return jax.jvp(lambda x: velocity(x, time), (x,), (direction,))[1]

    if probes is None:
        latents = x.shape[1]

        def entry(latent: Array) -> Array:
            one = jax.nn.one_hot(latent, latents, dtype=x.dtype)
            return jnp.sum(derivative(jnp.broadcast_to(one[None], x.shape)) * one[None], axis=-1)

        return velocity(x, time), jnp.sum(jax.lax.map(entry, jnp.arange(latents)), axis=0)
    return velocity(x, time), jnp.mean(jax.lax.map(lambda e: jnp.sum(derivative(e) * e, axis=-1), probes), axis=0)


def log_density(
    velocity: Velocity,
    z: States,
    steps: int,
    probes: Float[Array, "probes batch latent"] | None = None,
) -> Float[Array, " batch"]:
    """Log density at t = 1 of what starts as N(0, I) at t = 0 and follows the velocity, nats, [B].

    By the instantaneous change of variables (Chen et al. 2018, theorem 1): `log N(x_0; 0, I) - int_0^1 div u(x_t, t) dt` along
    the solution that ends in z. Exact up to the steps; with probes an unbiased estimate of that (Grathwohl et al. 2019).

    Args:
      velocity: u.
      z: [B, L].
      steps: number of steps.
      probes: as for `divergence`, the same at all times.

    >>> doubling = lambda x, t: x * jnp.log(2.0)  # N(0, 1) becomes N(0, 4)
    >>> print(f"{log_density(doubling, jnp.zeros((1, 1)), 10)[0]:.4f}")  # -log(2 sqrt(2 pi))
    -1.6121

    Raises:
      UserError: no steps.
    """

    def field(state: tuple[Array, Array], time: Array) -> tuple[Array, Array]:
        return divergence(velocity, state[0], jnp.full(z.shape[0], time, z.dtype), probes)

    # Backwards the integral is counted from 1 down to 0: it comes with the sign that the density wants.
    noise, change = _integrate(field, (z, jnp.zeros(z.shape[0], z.dtype)), steps, backwards=True)
    return change - 0.5 * jnp.sum(LOG_2PI + jnp.square(noise), axis=-1)
