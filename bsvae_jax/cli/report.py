"""`bsvae report`: the report of a sweep."""

from pathlib import Path
from typing import Any

from bsvae_jax.cli.document import document
from bsvae_jax.cli.environment import numbers_without_figures
from bsvae_jax.cli.options import Merged, Workdir


def report(folder: Merged[Workdir], json: bool = False) -> None:
    """Write the table, the figures and report.html of a sweep from what has finished so far.

    Leaves table.csv, table.md, members.csv, report.html and figures in the folder; needs neither data nor a device.

    With --json: {"folder", "status", "table": [{"split", "decoder_variance", "prior", "learning_rate", "beta", "beta_schedule",
    "seeds", "diverged", "quantities": {name: {"mean", "standard_deviation" over seeds}}, "difference": to the best or null}],
    "members": {name: evaluation.json's splits}, "failures": {name: why}, "unfinished": [name], "sentences": [text],
    "files": [path]}.

    Args:
      folder: Folder that bsvae sweep wrote.
      json: Print one JSON document on standard output.
    """
    with document(json) as found:
        folder.load_classes()
        found |= print_report(folder.workdir)


def print_report(folder: Path) -> dict[str, Any]:
    """Write the report of a sweep, and print its table and what it says; the same as plain values."""
    from bsvae_jax.evaluation.metrics import as_json
    from bsvae_jax.sweeps.report import sentences, status, write_report
    from bsvae_jax.sweeps.results import read_results
    from bsvae_jax.sweeps.table import as_json as table_as_json
    from bsvae_jax.sweeps.table import as_text, display_rows, error_bars

    files: list[Path] = []
    with numbers_without_figures():
        files = write_report(folder)
    results = read_results(folder)
    said = sentences(results)
    bars = error_bars(display_rows(results, "test")[0])
    print(f"{status(results)} Test set. {bars}\n\n{as_text(results)}\n")
    print("\n".join(said))
    if files:
        print(f"\nreport: {files[-1]}")
    return {
        "folder": folder,
        "status": status(results),
        "table": table_as_json(results),
        "members": {member.name: as_json(member.report) for member in results.members},
        "failures": results.failures,
        "unfinished": results.unfinished,
        "sentences": said,
        "files": files,
    }
