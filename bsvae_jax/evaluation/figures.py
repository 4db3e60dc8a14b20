"""Pictures of a run: runs the model and hands the arrays to `figures`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import StandardNormal
from bsvae_jax.data import ImageSet
from bsvae_jax.evaluation import plots
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.random import make_key

PAIRS = 30
SAMPLES = 100
BY_CLASS = (20, 10)
"""Classes of which samples are shown, and how many of each."""
TRAVERSED = 10
TRAVERSAL = np.linspace(-3.0, 3.0, 13)


def title_of(run: Restored, images: ImageSet) -> str:
    """What the figures of a run have in common."""
    given = "" if run.config.classes is None else " given the class"
    title = f"{images.name}{given}: {run.config.decoder_variance.label}, β = {run.beta:.4g}"
    return title if len(images.image_shape) <= 3 else f"{title}; middle slices"


def _samples(run: Restored, images: ImageSet, key: Any, title: str) -> Any:
    """Samples of the prior; of a conditional run a row for each class, the same z in all rows of a column."""
    apply = jax.jit(run.model.apply, static_argnames=("method", "count"))
    if run.config.classes is None:
        samples = apply(run.variables, key, count=SAMPLES, method="sample")
        return plots.image_grid(images.as_shown(np.asarray(samples)), f"Samples of the prior: {title}")
    classes, columns = min(run.config.classes, BY_CLASS[0]), BY_CLASS[1]
    z = jnp.tile(apply(run.variables, key, count=columns, method="sample_latents"), (classes, 1))
    samples = apply(run.variables, z, labels=jnp.repeat(jnp.arange(classes), columns), method="decode").mean
    names = images.label_names[:classes] or tuple(map(str, range(classes)))
    title = f"Samples by class, each column of one z\n{title}"
    return plots.image_grid(images.as_shown(np.asarray(samples)), title, columns, names)


def draw(run: Restored, images: ImageSet, workdir: Path) -> list[Path]:
    """Training curves, held-out reconstructions, prior samples and latent traversals, in `workdir/figures`.

    Returns:
      The PNG files; a PDF lies beside each.
    """
    key = make_key(run.config.seed)
    apply = jax.jit(run.model.apply, static_argnames=("method", "count"))
    x, labels = images.examples("test", run.config.classes, 512).inputs()
    output = apply(run.variables, x, key, labels=labels)
    # Most informative latents first, as `scoring.SplitScores.latent_rate` has it; moved on the scale of the prior where that is
    # known, else on that of the data.
    mean, log_variance = (np.asarray(values) for values in output.posterior)  # JAX would compile every line of what follows
    origin, scale, unit = np.zeros(mean.shape[1]), np.ones(mean.shape[1]), "prior standard deviations"
    rates = 0.5 * np.mean(np.expm1(log_variance) - log_variance + mean**2, axis=0)
    if not isinstance(run.model.prior, StandardNormal):
        variance = mean.var(axis=0) + np.exp(log_variance).mean(axis=0)
        origin, scale, unit = mean.mean(axis=0), np.sqrt(variance), "standard deviations of the data's posteriors"
        rates = 0.5 * (np.log(variance) - log_variance.mean(axis=0))
    order = np.argsort(-rates)[:TRAVERSED]
    z = np.tile(mean[0], (len(order), len(TRAVERSAL), 1))
    for row, latent in enumerate(order):
        z[row, :, latent] = origin[latent] + TRAVERSAL * scale[latent]
    z = z.reshape(-1, mean.shape[1])
    own = None if labels is None else np.repeat(np.asarray(labels[:1]), len(z))
    moved = np.asarray(apply(run.variables, z, labels=own, method="decode").mean)
    title = title_of(run, images)
    shown = images.as_shown
    rows = read_metrics(workdir)
    drawn = {"training_curves": plots.training_curves(rows, title)} if rows else {}
    drawn |= {
        "reconstructions": plots.reconstructions(
            shown(np.asarray(x[:PAIRS])),
            shown(np.asarray(output.decoded.mean[:PAIRS])),
            f"Test set and its reconstructions; {title}",
        ),
        "samples": _samples(run, images, key, title),
        "latent_traversals": plots.latent_traversals(
            shown(moved).reshape(len(order), len(TRAVERSAL), *run.image_shape),
            TRAVERSAL.tolist(),
            [f"z{latent} ({rates[latent]:.2f} nats)" for latent in order],
            f"Decoder means where one latent moves; {title}",
            unit,
            f"{len(order)} of {len(rates)} latents, most informative first",
        ),
    }
    return plots.save_all(drawn, workdir / "figures")
