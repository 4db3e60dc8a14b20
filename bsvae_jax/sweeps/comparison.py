"""Runs side by side that need not be members of one sweep: in what their configs differ, their numbers, and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bsvae_jax._io.files import as_path
from bsvae_jax._io.terminal import aligned
from bsvae_jax.config import flattened
from bsvae_jax.errors import UserError, shown
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.sweeps.table import TABLED
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.workdir import read_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bsvae_jax.sweeps.plots import Curve


class Comparison(NamedTuple):
    """Runs side by side.

    >>> empty = Comparison(("a", "b"), {"beta": [1.0, 2.0]}, {}, "test", [])
    >>> print(empty.as_text())
                          a  b
    beta                  1  2
    """

    runs: tuple[str, ...]
    """Their folders, as they were given."""
    differences: dict[str, list[object]]
    """Fields of the configs, by dotted name, that are not the same in all runs: the value of each, None where it has none."""
    quantities: dict[str, list[Quantity | None]]
    """Numbers of the split, by name, of each run."""
    split: str
    notes: list[str]
    """What has to be known before they are compared."""

    def as_text(self) -> str:
        """A column for each run: first what differs in the configs, then the numbers with their standard errors."""
        rows = [["", *self.runs]]
        rows += [[name, *map(_short, values)] for name, values in self.differences.items()]
        for name, found in self.quantities.items():
            unit = next(quantity.unit for quantity in found if quantity is not None)
            rows.append([f"{name} [{unit}]", *("n/a" if quantity is None else quantity.cell() for quantity in found)])
        return aligned([[row[0].ljust(20), *row[1:]] for row in rows])

    def figure(self) -> "Figure":
        """Distortion and mean squared error against the rate, a point for each run that has them, with standard errors.

        Raises:
          UserError: no run is evaluated.
        """
        from bsvae_jax.evaluation.plots import literal
        from bsvae_jax.sweeps.plots import Curve, rate_distortion

        def label(name: str) -> str:
            return literal(f"./{name}" if name.startswith("_") else name)  # legends leave out what begins with _

        def curves(quantity: str) -> "list[Curve]":
            pairs = zip(self.runs, self.quantities["rate"], self.quantities[quantity], strict=True)
            return [
                Curve(label(name), np.array([rate.value]), np.array([y.value]), _error(rate), _error(y))
                for name, rate, y in pairs
                if rate is not None and y is not None
            ]

        if "rate" not in self.quantities:
            raise UserError("No run is evaluated, so that there is nothing to draw; bsvae evaluate does it.")
        return rate_distortion(curves(DISTORTION), curves("mse"), [], [])


DISTORTION = "calibrated_distortion"
"""Of a density, so that runs of different decoder variances can be compared by it."""
COMPARED = (*TABLED[: TABLED.index("calibrated_elbo")], DISTORTION, *TABLED[TABLED.index("calibrated_elbo") :])


def compare_runs(folders: Sequence[str | Path], split: str = "test") -> Comparison:
    """Compare runs by their `config.json` and `evaluation.json`; nothing is computed.

    Args:
      folders: of two or more runs, of members of sweeps too; own classes of their configs must have been imported.
      split: whose numbers: test, train or validation.

    >>> compare_runs(["runs/digits"])
    Traceback (most recent call last):
        ...
    bsvae_jax.errors.UserError: A comparison needs at least two different runs, got 1.

    Raises:
      UserError: fewer than two runs, one of them twice, or a folder that is not a run.
    """
    paths = [as_path(folder, "folder") for folder in folders]
    distinct = len({path.resolve() for path in paths})
    if distinct < 2 or distinct < len(paths):
        raise UserError(f"A comparison needs at least two different runs, got {distinct}.")
    infos, evaluations = [read_info(path) for path in paths], [read_evaluation(path) for path in paths]
    configs = [flattened(info.config) for info in infos]
    fields = dict.fromkeys(name for config in configs for name in config)
    differences = {name: [config.get(name) for config in configs] for name in fields}
    reports = [{} if evaluation is None else evaluation.report.get(split, {}) for evaluation in evaluations]
    notes = []
    fingerprints: dict[int | None, set[str]] = {}  # with classes, they are of images and labels
    for info in infos:
        fingerprints.setdefault(info.config.classes, set()).add(info.fingerprint)
    if any(len(different) > 1 for different in fingerprints.values()):
        notes.append("The runs were trained on different data: their numbers are of different images.")
    if len(fingerprints) > 1:
        notes.append(
            "Likelihoods of a run that is conditional on the class y are of p(x|y), which no p(x) is to be compared with."
        )
    for path, report in zip(paths, reports, strict=True):
        if not report:
            notes.append(f"{path} has no numbers of the {split} split yet; bsvae evaluate {path} gives them.")
    return Comparison(
        tuple(map(str, paths)),
        {name: values for name, values in differences.items() if any(value != values[0] for value in values)},
        {name: [report.get(name) for report in reports] for name in COMPARED if any(name in report for report in reports)},
        split,
        notes,
    )


def _error(quantity: Quantity) -> np.ndarray:
    return np.array([quantity.standard_error or 0.0])


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else value if isinstance(value, str) else shown(value)
