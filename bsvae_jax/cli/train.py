"""`bsvae train`: one experiment."""

from pathlib import Path
from typing import Any

from bsvae_jax.cli.environment import numbers_without_figures
from bsvae_jax.cli.experiment import ConfigFile, Experiment, keep_compiled_programs, read_experiment
from bsvae_jax.cli.options import Merged, Processes


def train(
    config_file: ConfigFile,
    experiment: Merged[Experiment],
    processes: Merged[Processes],
    workdir: Path | None = None,
    start_from: Path | None = None,
) -> None:
    """Train the experiment of a config file; run it again to continue where it stopped, or with more --epochs to go on.

    Leaves in the workdir: config.json, metrics.jsonl, TensorBoard events, checkpoints (the latest two and the best),
    the calibrated variance, evaluation.json and figures. Every field of the config is an option below, with the config
    file's value as its default. Terms are in nats per image.

    Example: bsvae train configs/digits.py --beta 4 --decoder-variance constant --decoder-variance.variance 0.1

    What may change in a run that goes on: epochs, learning rate, schedule and weight decay. Its learning rate is from then on
    what it would be, had it been so from the beginning: --epochs 100 after 50 of a cosine goes on at half the peak.

    From the weights of another run: bsvae train configs/digits.py --beta 4 --start-from runs/digits --workdir runs/beta4

    Args:
      config_file: A Python file with get_config(); configs/ holds ready ones.
      experiment: The experiment of a config file, changed by options.
      processes: Several processes, one a machine, that train one model.
      workdir: Folder of this run; runs/NAME-OF-CONFIG if not given.
      start_from: Folder of another run with whose weights a new one begins, for other data, another beta, variance or prior.
        Layers of other shapes start anew, and so do the optimizer and its schedule; it is said which layers do.
    """
    from bsvae_jax.distributed import multihost
    from bsvae_jax.evaluation import figures, metrics
    from bsvae_jax.training.fit import fit
    from bsvae_jax.training.restore import restore
    from bsvae_jax.training.workdir import read_info

    processes.join()
    keep_compiled_programs()
    folder = Path("runs") / config_file.stem if workdir is None else workdir
    result = fit(experiment.config, folder, start_from=start_from)
    if not multihost.is_primary():
        return
    print(metrics.as_table(result.report))
    if experiment.config.classes is not None:
        print(metrics.CONDITIONAL)
    if (sentence := metrics.left_out(result.images)) is not None:
        print(sentence)
    print("".join(f"{sentence}\n" for sentence in read_info(folder, experiment.config).provenance()), end="")
    with numbers_without_figures():
        figures.draw(restore(folder), result.images, folder)
        print(f"figures: {folder / 'figures'}")


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the options are without being given: the experiment of the config file."""
    return {"experiment": read_experiment("train", arguments)}
