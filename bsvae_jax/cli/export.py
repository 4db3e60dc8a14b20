"""`bsvae export`: the weights of a run for other programs."""

from pathlib import Path
from typing import Literal

from bsvae_jax.cli.options import Merged, Run
from bsvae_jax.errors import UserError


def export(
    run: Merged[Run],
    format: Literal["safetensors", "stablehlo", "hub"] = "safetensors",
    out: Path | None = None,
    overwrite: bool = False,
    license: str | None = None,
) -> None:
    """Write a run for other programs: its weights, its encoder and decoder, or a folder for a model hub.

    Example: bsvae export runs/digits --format hub --out vae-digits --license apache-2.0

    Args:
      run: A trained or imported run.
      format: A .safetensors file of float32 parameters and batch statistics, with the config as metadata; or encoder and
        decoder as StableHLO programs, which JAX runs without this package, for any number of examples; or a folder with
        weights, config, numbers and a model card, which is sent to the Hugging Face hub as it is and opened like a run.
      out: The file, NAME.safetensors, or the folder, called as the model where it is for a hub; weights.safetensors,
        stablehlo or hub in WORKDIR if not given.
      overwrite: Replace what is already at out.
      license: Of the model, for its card: apache-2.0 or mit, for example.
    """
    from bsvae_jax.training.export import export_safetensors, export_stablehlo

    if license is not None and format != "hub":
        raise UserError("--license is for the model card; give --format hub as well.")
    run.load_classes()
    if format == "safetensors":
        out = run.workdir / "weights.safetensors" if out is None else out
        print(f"weights: {export_safetensors(run.workdir, out, run.checkpoint, overwrite)}")
        return
    if format == "hub":
        from bsvae_jax.training.hub import export_hub

        out = run.workdir / "hub" if out is None else out
        print(f"model: {export_hub(run.workdir, out, run.checkpoint, overwrite, license)}")
        return
    encoder, decoder = export_stablehlo(
        run.workdir, run.workdir / "stablehlo" if out is None else out, run.checkpoint, overwrite
    )
    print(f"encoder: {encoder}\ndecoder: {decoder}")
