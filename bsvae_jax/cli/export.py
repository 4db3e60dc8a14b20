"""`bsvae export`: the weights of a run for other programs."""

from pathlib import Path

from bsvae_jax.cli.environment import check_platform
from bsvae_jax.cli.options import Merged, Run, call


def export(run: Merged[Run], out: Path | None = None, overwrite: bool = False) -> None:
    """Write the weights of a run as a .safetensors file: float32 parameters and batch statistics, the config as metadata.

    Args:
      run: A trained or imported run.
      out: The file, NAME.safetensors; WORKDIR/weights.safetensors if not given.
      overwrite: Replace what is already at out.
    """
    from bsvae_jax.training.export import export_safetensors

    check_platform()
    run.load_classes()
    out = run.workdir / "weights.safetensors" if out is None else out
    print(f"weights: {export_safetensors(run.workdir, out, run.checkpoint, overwrite)}")


def main(arguments: list[str]) -> None:
    """Run the command."""
    call(export, arguments)
