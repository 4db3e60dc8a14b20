"""Densities fitted to the latents of a trained model, in place of the prior it was trained with, and the file that keeps one.

A VAE decodes samples of the aggregate posterior q(z) well and samples of p(z) as well as p(z) matches it. A density fitted to
q(z) afterwards closes that gap and leaves encoder and decoder alone (Dai & Wipf 2019, the second stage; Ghosh et al. 2020,
ex-post density estimation). Every kind is a prior of `config` with the parameters found here, so whatever takes a model takes
it. A further kind is one more case of `fit_density`, of an old prior or of a new one with its module in `priors`.
"""

import dataclasses
import functools
import json
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from bsvae_jax import config as configs
from bsvae_jax._io.files import read_arrays, sense_of, write_arrays
from bsvae_jax.errors import UserError, check_count, nearest
from bsvae_jax.random import make_key

Kind = Literal["gaussian", "mixture", "flow", "flow_matching"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
FITTED_HERE = ("gaussian", "mixture", "flow")
"""Those of `fit_density`; flow matching is trained in `flow_training`, in a folder where it can be continued."""
FILE = "prior.npz"
FORMAT = 1
"""Version of what the file holds."""
AT_ONCE = 4096
"""Latents of which a density is taken in one call."""

FLOW_BATCH = 500
FLOW_EPOCHS = 100
FLOW_PATIENCE = 10
"""Epochs without a better density of the held-out latents, after which the flow has learned what it can."""
FLOW_LEARNING_RATE = 2e-3
MOST_ITERATIONS = 500
"""Of expectation maximization."""
LEAST_VARIANCE = 1e-6
"""Added to the variances of Gaussians, latents scaled to variance 1."""

Latents = Float[np.ndarray, "count latent"]


@dataclasses.dataclass(frozen=True, eq=False)
class FittedPrior:
    """A density of the latents of one checkpoint, from `fit_prior`.

    >>> latents = np.random.default_rng(0).normal(3.0, 2.0, size=(5000, 2))
    >>> fitted = fit_density("gaussian", latents, latents, jax.random.key(0))
    >>> fitted.sample(jax.random.key(1), 4).shape
    (4, 2)
    >>> print(f"{-fitted.log_prob(latents).mean():.1f}")  # the entropy: 2 (log 2 + (log(2 pi) + 1) / 2) = 4.22
    4.2
    """

    kind: str
    """'gaussian', 'mixture', 'flow' or 'flow_matching'."""
    prior: configs.Prior
    """What takes the place of the model's own."""
    parameters: dict[str, Any]
    """Of that prior's module, float32."""
    latent_size: int
    """L"""
    held_out: float
    """Mean log density of latents of held-out training images, nats per image."""
    held_out_before: float | None = None
    """The same under the prior that the model was trained with: the rate of those images falls by the difference."""
    checkpoint: str = ""
    """SHA-256 of the parameters and statistics of the model whose latents they were (`checkpoint.digest`)."""
    step: int = 0
    """Of that checkpoint."""
    seed: int = 0
    """Decided the samples of the posteriors and the start of the fit."""
    steps: int | None = None
    """Of the training of flow matching; None of other kinds, and of files of earlier versions."""

    def log_prob(self, z: Latents | Array) -> Float[np.ndarray, " count"]:
        """Log density of latents [N, L], nats, [N] in float64.

        Raises:
          UserError: an array of another shape.
        """
        z = np.asarray(z)
        if z.ndim != 2 or z.shape[1] != self.latent_size:
            raise UserError(f"z must have shape [N, {self.latent_size}], got {z.shape}.")
        return log_density(lambda part: _log_prob(self.prior, self.latent_size, self.parameters, part), z)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count latent"]:
        """`count` samples, [count, L].

        Raises:
          UserError: a count below 1.
        """
        check_count("count", count)
        module = self.prior.build(self.latent_size)
        drawn: Any = module.apply({"params": self.parameters}, key, count, method="sample")
        return drawn

    def describe(self) -> str:
        """`"mixture of 10 Gaussians"`, `"one Gaussian"`, `"flow"`, `"flow_matching of 10000 steps"`."""
        if not isinstance(self.prior, configs.Mixture):
            return self.kind if self.steps is None else f"{self.kind} of {self.steps} steps"
        return "one Gaussian" if self.kind == "gaussian" else f"mixture of {self.prior.components} Gaussians"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_prob(prior: configs.Prior, latent_size: int, parameters: Any, z: Array) -> Array:
    density: Any = prior.build(latent_size).apply({"params": parameters}, z, method="log_prob")
    return density


def log_density(density: Callable[[Array], Array], z: np.ndarray) -> np.ndarray:
    """A density of latents [N, L], `AT_ONCE` at once, [N] in float64."""
    parts = (jnp.asarray(z[start : start + AT_ONCE], jnp.float32) for start in range(0, len(z), AT_ONCE))
    return np.concatenate([np.asarray(density(part), np.float64) for part in parts])


# --- Fits -------------------------------------------------------------------------------------------------------------


def check_kind(kind: str, components: int) -> None:
    """Raise a UserError for a kind that is not known, or a number of components that none can be of."""
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}{nearest(str(kind), KINDS)}.")
    check_count("components", components)


def fit_density(
    kind: str,
    latents: Latents,
    held_out: Float[np.ndarray, "held_out latent"],
    key: Key[Array, ""],
    components: int = 10,
    chosen_by: Float[np.ndarray, "others latent"] | None = None,
) -> FittedPrior:
    """A density of latents by maximum likelihood.

    Args:
      kind: 'gaussian': mean and full covariance; 'mixture': Gaussians with full covariances, by expectation maximization;
        'flow': `config.Flow`, at the epoch whose density of `chosen_by` is greatest.
      latents: [N, L].
      held_out: of other images, [M, L]; nothing is chosen by them, and `held_out` of the result is their mean log density.
      key: decides where the fit starts.
      components: Gaussians of a mixture.
      chosen_by: of images that are in neither, [K, L]; None: a tenth of the latents, which are not trained on then.

    Raises:
      UserError: an unknown kind, or fewer latents than components.
    """
    check_kind(kind, components)
    if kind not in FITTED_HERE:
        raise UserError(f"{kind} is trained on the latents of a run: fit_prior does it.")
    latents, held_out = np.asarray(latents, np.float64), np.asarray(held_out, np.float64)
    prior: configs.Prior
    match kind:
        case "gaussian":
            prior, parameters = configs.Mixture(1, "full"), _fit_gaussian(latents)
        case "mixture":
            if components > len(latents):
                raise UserError(f"components {components} exceeds the {len(latents)} latents to fit them to; choose fewer.")
            prior, parameters = configs.Mixture(components, "full"), _fit_mixture(latents, components, key)
        case _:
            prior = configs.Flow()
            if chosen_by is None:
                chosen_by, latents = np.split(latents, [max(1, len(latents) // 10)])
            parameters = _fit_flow(prior, latents, chosen_by, key)
    fitted = FittedPrior(kind, prior, jax.device_get(parameters), latents.shape[1], 0.0)
    return dataclasses.replace(fitted, held_out=float(fitted.log_prob(held_out).mean()))


def _scale(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each latent."""
    return latents.mean(axis=0), np.maximum(latents.std(axis=0), 1e-12)


def _parameters(weights: np.ndarray, means: np.ndarray, factors: np.ndarray) -> dict[str, np.ndarray]:
    """Of `priors.FullMixture`; the factors F_k [K, L, L] are upper triangular, F_k F_k^T the precisions."""
    diagonal = np.diagonal(factors, axis1=1, axis2=2)
    arrays = {"logits": np.log(weights), "mean": means, "log_diagonal": np.log(diagonal), "upper": np.triu(factors, 1)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _fit_gaussian(latents: np.ndarray) -> dict[str, np.ndarray]:
    mean, scale = _scale(latents)
    standard = (latents - mean) / scale
    covariance = standard.T @ standard / len(latents) + LEAST_VARIANCE * np.eye(len(mean))
    factor = np.linalg.inv(np.linalg.cholesky(covariance)).T
    return _parameters(np.ones(1), mean[None], (factor / scale[:, None])[None])


def _fit_mixture(latents: np.ndarray, components: int, key: Key[Array, ""]) -> dict[str, np.ndarray]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mean, scale = _scale(latents)
    found = GaussianMixture(
        components,
        reg_covar=LEAST_VARIANCE,
        max_iter=MOST_ITERATIONS,
        random_state=int(jax.random.bits(key, dtype=jnp.uint32)) % 2**31,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what it has reached by then is a density all the same
        found.fit((latents - mean) / scale)
    weights = np.maximum(found.weights_, 1e-30)
    return _parameters(weights, mean + scale * found.means_, found.precisions_cholesky_ / scale[None, :, None])


def _fit_flow(prior: configs.Flow, latents: np.ndarray, other: np.ndarray, key: Key[Array, ""]) -> Any:
    """Trained on `latents`, as it was when the density of `other` was greatest."""
    module = prior.build(latents.shape[1])
    init_key, order_key = jax.random.split(key)
    z = jnp.asarray(latents, jnp.float32)
    mean, scale = _scale(latents)
    begun: Any = module.init(init_key, z[:1], method="log_prob")["params"]
    params = {**begun, "origin": jnp.asarray(mean, jnp.float32), "log_scale": jnp.asarray(np.log(scale), jnp.float32)}
    batch = min(FLOW_BATCH, len(latents))
    steps = len(latents) // batch
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(FLOW_LEARNING_RATE, FLOW_EPOCHS * steps))
    )

    def loss(params: Any, part: Array) -> Array:
        density: Any = module.apply({"params": params}, part, method="log_prob")
        return -jnp.mean(density)

    @jax.jit
    def epoch(params: Any, state: Any, key: Array) -> Any:
        def step(carry: Any, chosen: Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, z[chosen]), state, params)
            return (optax.apply_updates(params, updates), state), None

        order = jax.random.permutation(key, jnp.arange(len(z), dtype=jnp.int32))[: steps * batch].reshape(steps, batch)
        (params, state), _ = jax.lax.scan(step, (params, state), order)
        return params, state

    def density_of_others(params: Any) -> float:
        return float(log_density(lambda part: _log_prob(prior, latents.shape[1], params, part), other).mean())

    best, value, since, state = params, density_of_others(params), 0, optimizer.init(params)
    for number in range(FLOW_EPOCHS):
        params, state = epoch(params, state, jax.random.fold_in(order_key, number))
        found = density_of_others(params)
        since += 1
        if found > value:
            best, value, since = params, found, 0
        if since == FLOW_PATIENCE:
            break
    return best


# --- The file ---------------------------------------------------------------------------------------------------------


def write_fitted(folder: Path, fitted: FittedPrior) -> Path:
    """Write `prior.npz`: plain arrays and text, nothing that runs; the file."""
    arrays = {f"parameters.{name}": leaf for name, leaf in flatten_dict(fitted.parameters, sep=".").items()}
    about = {"format": FORMAT, "prior": configs.to_dict(fitted.prior)}
    about |= {f.name: getattr(fitted, f.name) for f in dataclasses.fields(fitted) if f.name not in ("prior", "parameters")}
    write_arrays(folder / FILE, about=np.array(json.dumps(about)), **arrays)
    return folder / FILE


def read_fitted(folder: Path) -> FittedPrior | None:
    """Read `prior.npz`; None where no prior was fitted.

    Raises:
      UserError: a damaged file, or one of a newer version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    remedy = "bsvae fit-prior --overwrite makes it again"
    arrays = read_arrays(path, remedy)
    with sense_of(path, remedy):
        about = json.loads(str(arrays.pop("about")))
        if about.pop("format") > FORMAT:
            raise UserError(f"{path} was written by a newer bsvae_jax than this one; {remedy}.")
        prior = configs.from_dict(about.pop("prior"), configs.Prior)
        parameters = unflatten_dict({name.removeprefix("parameters."): leaf for name, leaf in arrays.items()}, sep=".")
        fitted = FittedPrior(prior=prior, parameters=parameters, **about)
        _check_parameters(fitted)
        return fitted


def _check_parameters(fitted: FittedPrior) -> None:
    module = fitted.prior.build(fitted.latent_size)
    like: Any = jax.eval_shape(
        lambda: module.init(make_key(0), jnp.zeros((1, fitted.latent_size)), method="log_prob")["params"]
    )
    wanted: Mapping[Any, Any] = {name: leaf.shape for name, leaf in flatten_dict(like).items()}
    if wanted != {name: leaf.shape for name, leaf in flatten_dict(fitted.parameters).items()}:
        raise ValueError(f"its arrays are not the parameters of {fitted.prior}")
