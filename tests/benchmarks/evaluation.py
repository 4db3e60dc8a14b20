"""Speed of FID features and of importance sampling, and the memory that importance sampling takes as K grows.

    python tests/benchmarks/evaluation.py [WORKDIR] [--images 16] [--samples 50 5000] [--feature-images 40]

WORKDIR is a trained run (of bsvae train). Each number of samples runs in a process of its own, whose peak memory is printed;
rates are of the second half of the work, after everything is compiled. The FID network has random weights: as fast as any.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bsvae_jax import data
from bsvae_jax.data.prefetch import DeviceImages
from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.evaluation.fid import inception
from bsvae_jax.evaluation.importance_weighted import Density, importance_weighted
from bsvae_jax.training.restore import restore


def importance(workdir: Path, count: int, samples: int) -> dict[str, float]:
    """Decoded images per second and the peak memory of this process, MiB."""
    run = restore(workdir)
    images = data.load(run.config.data)
    mesh = data_mesh()
    times = [time.monotonic()]
    importance_weighted(
        run.model,
        replicate(run.variables, mesh),
        DeviceImages(images.examples("test", count=count), mesh),
        jax.random.key(0),
        [Density(frozen=True, dequantized=False)],
        0.01,
        samples,
        progress=lambda _: times.append(time.monotonic()),
    )
    middle = len(times) // 2
    rate = (len(times) - 1 - middle) / (len(times) - 1) * count * samples / (times[-1] - times[middle])
    return {"decoded_per_second": rate, "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def features(count: int) -> float:
    """Images per second through the FID network."""
    shapes = jax.eval_shape(lambda: inception.Inception().init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), shapes)
    images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    batch = count // 4
    times = []
    for _ in inception.Weights(variables, "constant").network().features([images], data_mesh(), batch):
        times.append(time.monotonic())
    return (len(times) - 1) * batch / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, nargs="+", default=[50, 5000])
    parser.add_argument("--feature-images", type=int, default=40)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(importance(options.workdir, options.images, options.only)))
        return
    print(f"FID network: {features(options.feature_images):.1f} images/s on {jax.devices()[0].device_kind}")
    for samples in options.samples if options.workdir is not None else []:
        command = [sys.executable, __file__, str(options.workdir), "--images", str(options.images), "--only", str(samples)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(
            f"K = {samples}: {found['decoded_per_second']:,.0f} decoded images/s, peak memory {found['peak_MiB']:,.0f} MiB "
            f"({options.images} images)"
        )


if __name__ == "__main__":
    main()
