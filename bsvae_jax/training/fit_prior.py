"""Fitting a density to the aggregate posterior of a trained run: what `bsvae fit-prior` does."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax._io.files import as_path, digest, take_folder
from bsvae_jax.config import FlowMatching
from bsvae_jax.data import ImageSet, load
from bsvae_jax.data.datasets import moved
from bsvae_jax.data.image_set import Examples
from bsvae_jax.data.prefetch import DeviceImages, fits
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.distributed.mesh import REPLICATED, SHARDED, data_mesh, parallelize, replicate
from bsvae_jax.errors import UserError, check_count
from bsvae_jax.evaluation.run_over import joined, run_over
from bsvae_jax.evaluation.scores import evaluation_batch
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.models.vae import VAE
from bsvae_jax.random import make_key
from bsvae_jax.training import fitted_prior
from bsvae_jax.training.checkpoints import saved_steps
from bsvae_jax.training.evaluated import forget_quantities
from bsvae_jax.training.fit_flow import finish, finish_killed, fit_flow_matching
from bsvae_jax.training.fitted_prior import FILE, FittedPrior, fit_density, log_density, read_fitted, write_fitted
from bsvae_jax.training.restore import restore
from bsvae_jax.training.stopped import final_step
from bsvae_jax.training.workdir import check_same_data, read_info

LEAST_SAMPLES = 50_000
"""Samples of the aggregate posterior: one per training image, or so many per image that there are at least as many."""
DENSITIES = 200
"""Held-out latents of which flow matching takes the density: each is a solution of a differential equation."""
HELD_OUT = 0.1
"""Share of the training images whose latents are kept from the fit."""
FIT_SALT = 0x65760005
"""Folded into the seed for the start of the fit."""


def fit_prior(
    workdir: str | Path,
    kind: fitted_prior.Kind = "mixture",
    components: int = 10,
    seed: int = 0,
    checkpoint: Literal["latest", "best"] = "latest",
    overwrite: bool = False,
    steps: int = 10_000,
    width: int = 128,
    depth: int = 4,
    progress: bool = False,
    data_path: str | Path | None = None,
) -> FittedPrior:
    """Fit a density to the aggregate posterior of a trained run, and keep it in `workdir/prior.npz`.

    `restore(workdir, prior="fitted")`, `bsvae sample --prior fitted` and `bsvae evaluate --prior fitted` then use it in place
    of the prior that the model was trained with; encoder and decoder stay as they are. It is fitted to samples of q(z|x) over
    nine tenths of the training images, one each, or more where there are fewer than 50,000 images. In a conditional run these
    are of all classes together, as p(z) does not depend on the class.

    Args:
      workdir: of `fit`, or a member of a sweep.
      kind: 'gaussian' (full covariance), 'mixture' (of Gaussians with full covariances), 'flow' (affine coupling layers) or
        'flow_matching' (a velocity field over the latent map, trained by gradient descent: minutes to hours).
      components: Gaussians of a mixture.
      seed: decides the samples and where the fit starts.
      checkpoint: as for `restore`; the prior is of that checkpoint alone.
      overwrite: replace a prior of another kind or checkpoint.
      steps: of training, for flow matching.
      width: of the transformer of flow matching.
      depth: blocks of it.
      progress: show a progress bar, where there is one.
      data_path: where the data lie now; None: where they were when the run began.

    Returns:
      The density. What the run has already is returned as it is.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> config = bv.Config(network=bv.config.MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bv.fit(config, folder, progress=False)
    ...     fitted = fit_prior(folder, "gaussian")
    ...     images = bv.restore(folder, prior="fitted").image_shape
    >>> fitted.held_out > fitted.held_out_before  # the rate of held-out images has become smaller
    True

    Raises:
      UserError: before any computation: an unknown kind, zero components or more than images, not a run, one that is not
        trained to its end, has diverged or whose data have changed, or another prior is there and not to be replaced.
      Interrupted: flow matching was stopped by a signal; the same call continues.
    """
    fitted_prior.check_kind(kind, components)
    check_count("steps", steps)
    check_count("seed", seed, low=0, high=2**32 - 1)
    folder = as_path(workdir, "workdir")
    run = restore(folder, checkpoint)
    images = load(run.config.data if data_path is None else moved(run.config.data, as_path(data_path, "data_path")))
    check_same_data(folder, read_info(folder), images)
    _check_trained(folder, run, images)
    held_out = max(1, round(HELD_OUT * len(images.train)))
    if kind == "mixture" and components > len(images.train) - held_out:
        raise UserError(
            f"components {components} exceeds the {len(images.train) - held_out} training images to fit them to "
            f"({held_out} of {len(images.train)} are held out); choose fewer."
        )
    velocity = None
    if kind == "flow_matching":
        rows, columns = map_positions(run)
        velocity = FlowMatching(rows, columns, width, depth)
    # Each kind has its own answer to what is not finite.
    with contextlib.closing(take_folder(folder, "working")), jax.debug_nans(False), jax.debug_infs(False):
        identity: dict[str, Any] = {"checkpoint": digest(run.variables), "step": run.step, "seed": seed}
        there = None if overwrite else read_fitted(folder)
        if there is not None:
            same = {name: getattr(there, name) for name in identity} == identity and there.kind == kind
            if kind == "mixture":
                same = same and getattr(there.prior, "components", None) == components
            if same and (velocity is None or (there.prior == velocity and there.steps in (None, steps))):
                if velocity is not None:
                    finish_killed(folder, identity, velocity, steps)
                return there
            raise UserError(
                f"{folder / FILE} holds another prior ({there.describe()}, seed {there.seed}, of step {there.step}); "
                "--overwrite replaces it."
            )
        generator = np.random.default_rng(seed)
        mean, deviation = _posteriors(run, images)
        order = generator.permutation(len(mean))
        samples = -(-LEAST_SAMPLES // len(mean))
        # The flow is chosen by half of what is held out, and its density reported of the other half.
        parts = 2 if kind == "flow" and held_out > 1 else 1
        kept, other, *chosen_by = (
            _draw(mean[chosen], deviation[chosen], samples, generator)
            for chosen in (order[held_out:], *np.array_split(order[:held_out], parts))
        )
        start = jax.random.fold_in(make_key(seed), FIT_SALT)
        if velocity is None:
            fitted = fit_density(kind, kept, other, start, components, *chosen_by)
        else:
            parameters = fit_flow_matching(velocity, kept, other, start, steps, folder, identity, progress)
            other = other[:DENSITIES]
            fitted = FittedPrior(kind, velocity, parameters, kept.shape[1], 0.0, steps=steps)
            fitted = dataclasses.replace(fitted, held_out=float(fitted.log_prob(other).mean()))
        before = functools.partial(jax.jit(run.model.apply, static_argnames="method"), run.variables, method="log_prior")
        fitted = dataclasses.replace(fitted, held_out_before=float(log_density(before, other).mean()), **identity)
        forget_quantities(folder, "fitted_")  # of the prior that was here
        write_fitted(folder, fitted)
        finish(folder)
    return fitted


def map_positions(run: Restored) -> tuple[int, int]:
    """Rows and columns of the latent map; latents that are no map are one position."""
    return run.config.network.positions(run.config.latent_size, run.image_shape)


def _check_trained(folder: Path, run: Restored, images: ImageSet) -> None:
    total = final_step(folder, steps_through(run.config.epochs, len(images.train), run.config.batch_size))
    reached = max(saved_steps(folder / "checkpoints"), default=total)  # of what was exported there are no checkpoints
    if reached < total and read_info(folder, run.config).imported is None:
        raise UserError(
            f"{folder} is not trained to its end (step {reached} of {total}): its latents will still change. "
            "`bsvae train` continues it; then fit the prior."
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
        raise UserError(f"The parameters of step {run.step} are not finite: this run has diverged, there is nothing to fit.")


def _encode(variables: Any, stored: Examples, *, model: VAE) -> Any:
    x, labels = stored.inputs()
    posterior: Any = model.apply(variables, x, labels=labels, method="encode")
    return posterior.mean, jnp.exp(0.5 * posterior.log_variance)


def _posteriors(run: Restored, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of q(z|x) of every training image, [N, L] each."""
    mesh = data_mesh()
    resident = fits(images.shape.nbytes, mesh, run.config.resident_memory)
    stored = DeviceImages(images.examples("train", run.config.classes), mesh, resident)
    model = run.model.clone(axis_name=None)
    encode = parallelize(functools.partial(_encode, model=model), mesh, (REPLICATED, SHARDED), (SHARDED, SHARDED))
    variables = replicate(run.variables, mesh)
    batches = run_over(stored, evaluation_batch(run.image_shape), lambda stored, *_: encode(variables, stored))
    mean, deviation = joined(batches, len(stored))
    return mean, deviation


def _draw(mean: np.ndarray, deviation: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """`samples` of each posterior, [samples * N, L]."""
    noise = generator.standard_normal((samples, *mean.shape))
    return (mean[None] + deviation[None] * noise).reshape(-1, mean.shape[1])
