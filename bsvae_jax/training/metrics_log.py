"""One row of training metrics: the averages over the steps since the row before it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsvae_jax.config import Config
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.training.step import StepMetrics


def incomplete_epochs(rows: Sequence[Mapping[str, Any]], config: Config, images: int, step: int) -> list[int]:
    """Epochs up to `step` of which a step is in no row of training, or whose evaluation has no row.

    Args:
      rows: of `metrics.jsonl`.
      config: of the run.
      images: trained on.
      step: that the run has come to.
    """
    found = {(row["step"], row["split"] == "train") for row in rows}
    lost, reached = list[tuple[int, int]](), 0
    for row in [row for row in rows if row["split"] == "train"] + [{"step": step, "steps": 0}]:
        start = row["step"] - row.get("steps", row["step"] - reached)  # rows of earlier versions do not say how many
        if start > reached:
            lost.append((reached + 1, start))
        reached = row["step"]
    incomplete, begin = [], 0
    for epoch in range(1, config.epochs + 1):
        end = steps_through(epoch, images, config.batch_size)
        evaluated = epoch % config.evaluate_every == 0 or epoch == config.epochs
        if any(first <= end and begin < last for first, last in lost) or (
            end <= step and not ((end, True) in found and ((end, False) in found or not evaluated))
        ):
            incomplete.append(epoch)
        begin = end
    return incomplete


class MetricsRow:
    """Collects the metrics of steps, and averages them."""

    def __init__(self, epoch: int, batch_size: int):
        """An empty row; `epoch` is written into it, and images are counted by `batch_size`."""
        self.epoch, self.batch_size, self.steps = epoch, batch_size, 0
        self._values: list[np.ndarray] = []
        self._start = time.perf_counter()

    def add(self, values: np.ndarray) -> None:
        """Take in further steps, [terms, steps]."""
        self._values.append(values)
        self.steps += values.shape[1]

    def latest(self) -> dict[str, float]:
        """The terms of the last step."""
        return dict(zip(StepMetrics._fields, map(float, self._values[-1][:, -1]), strict=True))

    def mean(self) -> dict[str, Any]:
        """The row, but for step and learning rate; terms are averaged over those of its `steps` that were finite."""
        values = np.concatenate(self._values, axis=1)
        finite = np.isfinite(values).all(axis=0)  # others were left out of training as well
        # A row of nothing but such steps has no means; null is JSON's word for that.
        means = values[:, finite].mean(axis=1, dtype=np.float64) if finite.any() else [None] * len(values)
        named = {name: None if mean is None else float(mean) for name, mean in zip(StepMetrics._fields, means, strict=True)}
        skipped = {} if finite.all() else {"skipped_steps": int((~finite).sum())}
        return {"epoch": self.epoch, "split": "train", "steps": self.steps, **named, **skipped}

    def images_per_second(self) -> float:
        """Since the row was begun."""
        return self.steps * self.batch_size / max(time.perf_counter() - self._start, 1e-9)
