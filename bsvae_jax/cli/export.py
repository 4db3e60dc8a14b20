"""`bsvae export`: the weights of a run for other programs."""

from pathlib import Path
from typing import Literal

from bsvae_jax.cli.options import Merged, Run, call


def export(
    run: Merged[Run],
    format: Literal["safetensors", "stablehlo"] = "safetensors",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weights of a run, or its encoder and decoder, for other programs.

    Args:
      run: A trained or imported run.
      format: A .safetensors file of float32 parameters and batch statistics, with the config as metadata; or encoder and
        decoder as StableHLO programs, which JAX runs without this package, for any number of examples.
      out: The file, NAME.safetensors, or the folder of the programs; weights.safetensors or stablehlo in WORKDIR if not given.
      overwrite: Replace what is already at out.
    """
    from bsvae_jax.training.export import export_safetensors, export_stablehlo

    run.load_classes()
    if format == "safetensors":
        out = run.workdir / "weights.safetensors" if out is None else out
        print(f"weights: {export_safetensors(run.workdir, out, run.checkpoint, overwrite)}")
        return
    encoder, decoder = export_stablehlo(
        run.workdir, run.workdir / "stablehlo" if out is None else out, run.checkpoint, overwrite
    )
    print(f"encoder: {encoder}\ndecoder: {decoder}")


def main(arguments: list[str]) -> None:
    """Run the command."""
    call(export, arguments)
