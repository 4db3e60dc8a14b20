"""`bsvae import-torch`: weights of the paper's PyTorch network."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from bsvae_jax.cli.experiment import ConfigFile, Experiment, read_experiment
from bsvae_jax.cli.options import Merged


def import_torch(
    file: Positional[Annotated[Path, arg(metavar="FILE")]],
    config_file: ConfigFile,
    experiment: Merged[Experiment],
    workdir: Path | None = None,
) -> None:
    """Make a run of weights of the paper's PyTorch network, for bsvae evaluate, sample, export, or train to go on.

    The config must be of the network the file was saved from (configs/mnist_paper.py and configs/celeba_paper.py are the
    paper's); its data decide the size of the images. Every field of it is an option below. PyTorch is not needed, and nothing
    in the file is run.

    Example: bsvae import-torch model_49.pt configs/mnist_paper.py --beta 10 --workdir runs/published

    Args:
      file: What torch.save(model.state_dict(), FILE) wrote, or a .safetensors file of the same arrays. A prefix before every
        name, as module., is dropped; of a file that holds more, its state_dict is read.
      config_file: A Python file with get_config(); configs/ holds ready ones.
      experiment: The experiment that the weights are of.
      workdir: Folder of the new run; runs/NAME-OF-FILE if not given.
    """
    from bsvae_jax.distributed.hardware import check_platform
    from bsvae_jax.training import import_torch as importing

    check_platform()
    folder = Path("runs") / file.stem if workdir is None else workdir
    imported = importing.import_torch(file, experiment.config, folder)
    print(f"{imported.parameters:,} parameters of {file} (SHA-256 {imported.sha256}): {folder}")
    print(f"Its variance is not calibrated; bsvae evaluate {folder} takes that of the training set.")


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the options are without being given: the experiment of the config file."""
    return {"experiment": read_experiment("import-torch", arguments, ("FILE", "CONFIG"))}
