"""`bsvae report`: the report of a sweep."""

from pathlib import Path

from bsvae_jax.cli.environment import numbers_without_figures
from bsvae_jax.cli.options import Merged, Workdir, call


def report(folder: Merged[Workdir]) -> None:
    """Write the table, the figures and report.html of a sweep from what has finished so far.

    Leaves table.csv, table.md, members.csv, report.html and figures in the folder; needs neither data nor a device.

    Args:
      folder: Folder that bsvae sweep wrote.
    """
    folder.load_classes()
    print_report(folder.workdir)


def print_report(folder: Path) -> None:
    """Write the report of a sweep, and print its table and what it says."""
    from bsvae_jax.sweeps.report import best_beta, differences, findings, status, write_report
    from bsvae_jax.sweeps.results import read_results
    from bsvae_jax.sweeps.table import as_text, display_rows, error_bars

    page = None
    with numbers_without_figures():
        *_, page = write_report(folder)
    results = read_results(folder)
    bars = error_bars(display_rows(results, "test")[0])
    print(f"{status(results)} Test set. {bars}\n\n{as_text(results)}\n")
    print("\n".join([*best_beta(results), *differences(results), *findings(results)]))
    if page is not None:
        print(f"\nreport: {page}")


def main(arguments: list[str]) -> None:
    """Run the command."""
    call(report, arguments)
