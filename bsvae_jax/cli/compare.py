"""`bsvae compare`: runs side by side."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bsvae_jax.cli.document import document
from bsvae_jax.cli.environment import numbers_without_figures
from bsvae_jax.errors import UserError


def compare(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")],
    split: Literal["train", "test", "validation"] = "test",
    figure: Path | None = None,
    config: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Print in what the configs of runs differ and their numbers side by side, and draw their rates and distortions.

    The runs need not be members of one sweep. The distortion of the figure is the calibrated one, a density whatever the
    decoder variance. Needs no device.

    With --json: {"runs": [folder], "split", "differences": {field: [value of each run]}, "quantities": {name: [{"value",
    "standard_error", "unit", "meaning"} or null, of each run]}, "notes": [sentence], "figure": file or null}.

    Args:
      runs: Two or more runs, members of sweeps too.
      split: Whose numbers to compare.
      figure: Draw them into this .png file.
      config: Python file with the runs' own classes, where they have any.
      overwrite: Replace the file of the figure.
      json: Print one JSON document on standard output.
    """
    from bsvae_jax.sweeps.comparison import compare_runs

    if figure is not None and figure.suffix != ".png":
        raise UserError(f"--figure must end in .png, got {figure}.")
    if figure is not None and figure.exists() and not overwrite:
        raise UserError(f"{figure} exists; give another --figure, or --overwrite to replace it.")
    with document(json) as found:
        if config is not None:
            from bsvae_jax.config import load_module

            load_module(config)
        comparison = compare_runs(runs, split)
        found |= {**comparison._asdict(), "figure": None}
        print("\n".join([comparison.as_text(), *comparison.notes]))
        if figure is not None:
            from bsvae_jax.evaluation.plots import save

            with numbers_without_figures():
                save(comparison.figure(), figure)
                found["figure"] = figure
                print(f"figure: {figure}")
