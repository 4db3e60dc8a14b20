"""Evaluation of a restored run on splits of its data; `summary` says what the numbers are."""

from collections.abc import Sequence

from bsvae_jax.data import ImageSet
from bsvae_jax.errors import UserError, nearest
from bsvae_jax.loading import Restored
from bsvae_jax.parallel import data_mesh, replicate
from bsvae_jax.scoring import EVALUATION_BATCH, SplitScores, calibrate, score_split, split_key
from bsvae_jax.summary import Report, summarize


def evaluate(run: Restored, images: ImageSet, splits: Sequence[str] = ("train", "test")) -> Report:
    """Evaluate a restored run on splits of its data, over all devices.

    Args:
      run: from `restore`.
      images: the data of its config, from `data.load`.
      splits: 'train', 'test' or both, in the order to report.

    Returns:
      `{split: {name: Quantity}}`. The training set is scored as well if the run has not recorded its calibration.

    Raises:
      UserError: an unknown split, or images of another shape than the model's.
    """
    for split in splits:
        if split not in ("train", "test"):
            raise UserError(f"There is no split {split!r}{nearest(split, ('train', 'test'))}; the splits are train and test.")
    if images.image_shape != run.image_shape:
        raise UserError(f"The model takes images of shape {run.image_shape}, the data have {images.image_shape}.")
    mesh = data_mesh()
    variables = replicate(run.variables, mesh)

    def score(split: str) -> SplitScores:
        # The same posterior samples as `fit` takes, so that its last row is repeated here.
        key = split_key(run.config.seed, split)
        stored = replicate(getattr(images, split), mesh)
        return score_split(run.model, variables, stored, key, levels=images.levels, mesh=mesh, batch_size=EVALUATION_BATCH)

    scores = {split: score(split) for split in splits}
    calibration = run.calibration
    if calibration is None:
        calibration = calibrate(scores.get("train") or score("train"), run.step, run.floor)
    return {split: summarize(scores[split], run.config.beta, calibration) for split in splits}
