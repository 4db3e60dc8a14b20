"""`bsvae bench`: the speed of training, measured."""

from typing import Any, Literal

from bsvae_jax.cli.document import document
from bsvae_jax.cli.experiment import ConfigFile, Experiment, keep_compiled_programs, read_experiment
from bsvae_jax.cli.options import Merged


def bench(
    config_file: ConfigFile,
    experiment: Merged[Experiment],
    repeats: int = 5,
    seconds: float = 3.0,
    against: Literal["torch"] | None = None,
    noise: bool = False,
    json: bool = False,
) -> None:
    """Measure how fast a config trains on the devices at hand; nothing is saved.

    With --json: {"speed": {"machine", "precision", "batch_size", "images_per_second": [of each repeat], "compile_seconds",
    "waited", "step": {"flops", "bytes_accessed", ...}, "devices", "ceiling", "published", "peak_memory"}, "torch": [{"setting",
    "images_per_second", ...}]}; times in seconds, memory in bytes.

    Example: bsvae bench configs/mnist.py --against torch

    Args:
      config_file: A Python file with get_config(); configs/ holds ready ones.
      experiment: The experiment of a config file, changed by options.
      repeats: Measurements, of which the median counts.
      seconds: Length of each.
      against: torch: train the same network by the same recipe in PyTorch as well, before and after which this is measured,
        and print the ratio to the best of its settings.
      noise: Train on noise of the size of the data, which are then not read.
      json: Print one JSON document on standard output.
    """
    from bsvae_jax.data import load, shape_of
    from bsvae_jax.profiling import benchmark

    keep_compiled_programs()
    config = experiment.config
    if against is not None:
        benchmark.check_torch(config)
    with document(json) as found:
        images = benchmark.random_images(shape_of(config.data), config.classes) if noise else load(config.data)
        speed, peers = benchmark.measure(config, images, repeats, seconds), []
        if against is not None:
            peers = benchmark.measure_torch(config, images, repeats, seconds)
            speed = benchmark.combined(speed, benchmark.measure(config, images, repeats, seconds))
        print(benchmark.describe(speed))
        if peers:
            print(benchmark.describe_against(speed, peers))
        found |= {"speed": speed, "torch": peers}


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the options are without being given: the experiment of the config file."""
    return {"experiment": read_experiment("bench", arguments)}
