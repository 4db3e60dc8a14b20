"""Images drawn from a trained model."""

import jax
import numpy as np

from bsvae_jax.loading import Restored

BATCH = 500


def sample_prior(run: Restored, count: int, seed: int = 0) -> np.ndarray:
    """Decoder means of `count` samples of the prior as uint8 [N, H, W, C]; the first ones do not depend on `count`."""
    draw = jax.jit(lambda variables, key: run.model.apply(variables, key, BATCH, method="sample"))
    batches = []
    for batch in range(-(-count // BATCH)):
        key = jax.random.fold_in(jax.random.key(seed), batch)
        means = np.asarray(draw(run.variables, key), np.float32)
        batches.append(np.round(np.clip(means, 0.0, 1.0) * 255.0).astype(np.uint8))
    return np.concatenate(batches)[:count]
