"""Wall-clock and compile time of M members trained as one stack against M runs in processes of their own.

    python tests/benchmarks/stack_against_separate.py configs/digits.py --members 5 15 50 --epochs 100

Both sides do the same: imports, data, compilation, training, checkpoints, evaluation of both splits; neither draws figures. The
separate runs follow one another, each with the whole machine (`--jobs 2`: two at a time). Prints a row per M.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def _run(arguments: argparse.Namespace, folder: Path, betas: list[float], stacked: bool) -> tuple[float, float]:
    """Seconds of one process, and those of them spent in XLA's compiler."""
    command = [sys.executable, __file__, arguments.config, "--epochs", str(arguments.epochs), "--folder", str(folder)]
    command += ["--data-folder", arguments.data_folder] if arguments.data_folder else []
    command += ["--execution", arguments.execution] if arguments.execution else []
    command += ["--child", "stack" if stacked else "single", "--betas", *map(str, betas)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_LOG_COMPILES": "1"}, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    compiling = sum(map(float, re.findall(r"Finished XLA compilation of .* in ([\d.e-]+) sec", result.stderr)))
    return time.perf_counter() - start, compiling


def _child(arguments: argparse.Namespace) -> None:
    from bsvae_jax import Optimal, Sweep, fit, fit_sweep, load_config
    from bsvae_jax.config import MNIST

    config = dataclasses.replace(load_config(arguments.config), epochs=arguments.epochs, evaluate_every=arguments.epochs)
    if arguments.data_folder:
        config = dataclasses.replace(config, data=MNIST(arguments.data_folder))
    if arguments.child == "single":
        fit(dataclasses.replace(config, beta=arguments.betas[0]), arguments.folder, progress=False)
    else:
        variance = config.decoder_variance
        assert isinstance(variance, Optimal)
        grid = Sweep(tuple(arguments.betas), (variance,), 1)
        fit_sweep(config, grid, arguments.folder, arguments.execution, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--members", type=int, nargs="+", default=[5, 15, 50])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--data-folder", help="of the MNIST files, where the config wants them")
    parser.add_argument("--execution", choices=["loop", "scan", "vmap"], help="what is measured to be best if not given")
    parser.add_argument("--jobs", type=int, default=1, help="separate runs at a time")
    parser.add_argument("--child", choices=["single", "stack"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--betas", type=float, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments)
        return
    print(f"{arguments.config}, {arguments.epochs} epochs, {arguments.jobs} separate runs at a time")
    print("members  stack [s]  separate [s]  ratio  compiling: stack [s]  separate [s]", flush=True)
    for members in arguments.members:
        betas = [float(f"{beta:.6g}") for beta in np.geomspace(0.01, 100, members)]
        with tempfile.TemporaryDirectory() as folder:
            stack, stack_compiling = _run(arguments, Path(folder) / "stack", betas, stacked=True)
            start = time.perf_counter()
            with ThreadPoolExecutor(arguments.jobs) as pool:
                runs = [pool.submit(_run, arguments, Path(folder) / f"{beta:g}", [beta], False) for beta in betas]
                compiling = sum(run.result()[1] for run in runs)
            separate = time.perf_counter() - start
        times = f"{members:7d}  {stack:9.1f}  {separate:12.1f}  {separate / stack:5.2f}"
        print(f"{times}  {stack_compiling:20.1f}  {compiling:12.1f}", flush=True)


if __name__ == "__main__":
    main()
