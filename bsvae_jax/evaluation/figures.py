"""Pictures of a run: runs the model and hands the arrays to `figures`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import StandardNormal
from bsvae_jax.data import ImageSet
from bsvae_jax.data.image_set import to_unit_interval
from bsvae_jax.evaluation import plots
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.random import make_key

PAIRS = 30
SAMPLES = 100
TRAVERSED = 10
TRAVERSAL = np.linspace(-3.0, 3.0, 13)


def title_of(run: Restored, images: ImageSet) -> str:
    """What the figures of a run have in common."""
    title = f"{images.name}: {run.config.decoder_variance.label}, β = {run.beta:.4g}"
    return title if len(images.image_shape) <= 3 else f"{title}; middle slices"


def draw(run: Restored, images: ImageSet, workdir: Path) -> list[Path]:
    """Training curves, held-out reconstructions, prior samples and latent traversals, in `workdir/figures`.

    Returns:
      The PNG files; a PDF lies beside each.
    """
    key = make_key(run.config.seed)
    apply = jax.jit(run.model.apply, static_argnames=("method", "count"))
    x = to_unit_interval(jnp.asarray(images.test[:512]), images.levels)
    output = apply(run.variables, x, key)
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
    moved = np.asarray(apply(run.variables, z.reshape(-1, mean.shape[1]), method="decode").mean)
    samples = apply(run.variables, key, count=SAMPLES, method="sample")
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
        "samples": plots.image_grid(shown(np.asarray(samples)), f"Decoder means of samples of the prior; {title}"),
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
