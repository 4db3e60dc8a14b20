"""What README says of accelerators, measured on the first device of this machine in one command of at most 9 minutes.

    python tests/benchmarks/accelerator.py [--out FOLDER] [--only ROW,ROW] [--seconds 2] [--minutes 8.5] [--quick]

Needs the package and its JAX alone; data are noise of the sizes of the sets, and PyTorch is compared with where it is
installed. Prints a Markdown table row by row, and after each writes it to FOLDER/accelerator.md and all numbers to
FOLDER/accelerator.json; rows that FOLDER holds already are kept, so a second command with `--only` adds to them. Every row is
a process of its own: one that fails is printed with its error, the others go on, and the exit status is 1. `--quick` tries all
of it on a CPU, on tiny networks.

The columns:

row           NETWORK-PRECISION: training as `bsvae train` does it, of configs/mnist.py in batches of 512 and of the network of
              configs/celeba_paper.py in batches of 128, without augmentation; float32 means full float32 products,
              tensorfloat32 such as round their factors. torch-...: the same in PyTorch. kernels-...: a profile of a window
              of steps. sweep-...: 5 members of mnist-float32 trained at once. paper-table: extrapolated from those.
              invariance: small networks, against the CPU.
images/s      median of the repeats, and their range; of all members of a sweep together
utilization   floating-point operations of the steps, as the compiler counts them, over those of a large matrix product in the
              same time, which is measured
peak memory   of the device; images included, and what the compiler took to try its kernels
compiling     seconds of the training program
remarks       ratios, settings, errors
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bsvae_jax.config import MLP, Augmentation, Config, Linear, Residual, Spatial, load_config
from bsvae_jax.data import ImageSet, shape_of
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Optimal, mean_objective
from bsvae_jax.profiling import benchmark
from bsvae_jax.training.state import build_model, create_state

CONFIGS = Path(__file__).parents[2] / "configs"
NETWORKS = {"mnist": ("mnist.py", 512, 60_000), "celeba": ("celeba_paper.py", 128, 10_240)}
"""Config, images in a batch, images on the device."""
MEMBERS = 5
TABLE = (10, 50, 60_000)
"""Members, epochs and images of the paper's table for MNIST, at one seed."""
OBJECTIVE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Relative errors in float32 against the CPU; of the gradient's norm."""
LONGEST_ROW = 170.0
TORCH_LIMIT = 50.0
"""Seconds: after so many a row is given up, or PyTorch begins no other setting."""

Row = dict[str, Any]


def experiment(network: str, precision: str, quick: bool) -> tuple[Config, ImageSet]:
    """A network of the paper on one device, and noise to train it on."""
    file, batch, count = NETWORKS[network]
    config = load_config(CONFIGS / file)
    config = dataclasses.replace(config, augmentation=Augmentation(), precision=precision, batch_size=batch, devices=1)
    if quick:
        config, count = dataclasses.replace(config, network=Residual((4,)), batch_size=8), 64
    return config, benchmark.random_images(shape_of(config.data)._replace(train=count, test=1))


def training(options: argparse.Namespace, network: str, precision: str, *stack: Any) -> Row:
    """Speed of one model, or of a stack: its members and its execution."""
    speed = benchmark.measure(*experiment(network, precision, options.quick), options.repeats, options.seconds, *stack)
    costs = {name: getattr(speed.step, name) for name in ("flops", "bytes_accessed", "memory", "temporary")}
    remarks = f"{speed.ceiling / 1e12:.3g} TFLOP/s in a matrix product; {speed.step.memory / 2**20:,.0f} MiB for the program"
    names = ("machine", "images_per_second", "utilization", "ceiling", "peak_memory", "compile_seconds", "waited")
    return {name: getattr(speed, name) for name in names} | {"step": costs, "remarks": remarks}


def torch(options: argparse.Namespace, network: str, precision: str) -> Row:
    """PyTorch at the best of its settings."""
    try:
        benchmark.check_torch(load_config(CONFIGS / NETWORKS[network][0]))
    except UserError as missing:
        return {"remarks": f"left out: {missing}"}
    peers = benchmark.measure_torch(
        *experiment(network, precision, options.quick), options.repeats, options.seconds, TORCH_LIMIT
    )
    best = max(peers, key=lambda peer: peer.median)
    others = [f"{peer.setting}: {f'{peer.median:,.0f}' if peer.median else peer.failure}" for peer in peers if peer is not best]
    return {
        "images_per_second": best.images_per_second,
        "peak_memory": best.peak_memory,
        "settings": [peer._asdict() for peer in peers],
        "remarks": "; ".join([f"PyTorch {best.version}, {best.setting}", *others]),
    }


def kernels(options: argparse.Namespace, network: str, precision: str) -> Row:
    """What a profile counts."""
    found = benchmark.profile_kernels(*experiment(network, precision, options.quick))
    if found is None:
        return {"remarks": f"a profile shows no kernels on {jax.default_backend()}"}
    return {
        **found._asdict(),
        "remarks": f"{found.per_step:.0f} kernels a step; the device works {100 * found.busy:.0f}% of the time",
    }


def invariance(options: argparse.Namespace) -> Row:
    """Objective and gradients of every kind of network, here and on the CPU."""
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    rng = np.random.default_rng(0)
    x, errors = rng.random((32, 8, 8, 1), np.float32), {}
    for network in (Linear(), MLP((32,)), Residual((8, 16)), Spatial((8, 16), blocks=1, groups=4)):
        config = Config(network=network, latent_size=16, decoder_variance=Optimal())
        model = build_model(config, x.shape[1:])
        state = create_state(config, model, 1)
        # Networks begin with layers that are zero, behind which no gradient comes through.
        params = jax.tree.map(lambda p: p + rng.normal(0, 0.05, p.shape).astype(p.dtype), state.params)
        run = jax.jit(jax.value_and_grad(functools.partial(_objective, model)))
        arguments = (params, state.batch_stats, x, jax.random.key(0))
        (value, gradient), (expected, expected_gradient) = (
            jax.device_get(run(*jax.device_put(arguments, device))) for device in (here, cpu)
        )
        gradients = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (gradient, expected_gradient)]
        of_gradient = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[1])
        errors[type(network).__name__] = (float(abs(value / expected - 1)), float(of_gradient))
    remarks = f"{here.device_kind} against the CPU, relative errors of objective and gradient (tolerances "
    remarks += f"{OBJECTIVE_TOLERANCE:g}, {GRADIENT_TOLERANCE:g}): "
    remarks += "; ".join(f"{name} {one:.1e}, {two:.1e}" for name, (one, two) in errors.items())
    good = all(one <= OBJECTIVE_TOLERANCE and two <= GRADIENT_TOLERANCE for one, two in errors.values())
    return {"errors": errors, "remarks": remarks} | ({} if good else {"failed": "too far from the CPU"})


def _objective(model: Any, params: Any, batch_stats: Any, x: Any, key: Any) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    terms, _ = model.apply(variables, x, key, train=True, method="elbo_terms", mutable=["batch_stats"])
    return mean_objective(terms, 1.0)


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {
    **{f"mnist-{p}": functools.partial(training, network="mnist", precision=p) for p in ("float32", "bfloat16")},
    **{f"torch-mnist-{p}": functools.partial(torch, network="mnist", precision=p) for p in ("float32", "bfloat16")},
    **{f"celeba-{p}": functools.partial(training, network="celeba", precision=p) for p in ("float32", "bfloat16")},
    **{f"torch-celeba-{p}": functools.partial(torch, network="celeba", precision=p) for p in ("float32", "bfloat16")},
    **{f"kernels-mnist-{p}": functools.partial(kernels, network="mnist", precision=p) for p in ("float32", "bfloat16")},
    "invariance": invariance,
    **{
        f"sweep-{how}": lambda options, how=how: training(options, "mnist", "float32", MEMBERS, how) for how in ("vmap", "scan")
    },
    "paper-table": lambda options: {},  # from the others
    **{
        f"{prefix}{network}-tensorfloat32": functools.partial(run, network=network, precision="tensorfloat32")
        for network in NETWORKS
        for prefix, run in (("", training), ("torch-", torch))
    },
}
"""The most important first."""

# --- The table, in the process that starts the others -------------------------------------------------------------------


def rate(row: Row) -> float:
    """Images per second of a row; 0 of one that has none."""
    return statistics.median(row.get("images_per_second") or (0.0,))


def related(name: str, row: Row, rows: dict[str, Row]) -> Row:
    """The row, with what it says together with those before it."""
    if name == "paper-table":
        measured = {other: rate(rows.get(other, {})) for other in ("mnist-float32", "sweep-vmap", "sweep-scan")}
        best = max(measured, key=lambda other: measured[other])
        if not measured[best]:
            return {"failed": "needs the row mnist-float32"}
        minutes = math.prod(TABLE) / measured[best] / 60
        members, epochs, images = TABLE
        remarks = (
            f"{minutes:.1f} minutes for {members} members, {epochs} epochs of {images:,} images, as {best}, evaluations apart"
        )
        return {"minutes": minutes, "remarks": remarks}
    if name.startswith("torch-"):
        own, what = name.removeprefix("torch-"), "of ours to PyTorch's"
        ratio = rate(rows.get(own, {})) / rate(row) if rate(row) else 0.0
    else:
        own, what = "mnist-float32", "to five separate runs, one after the other"
        ratio = rate(row) / rate(rows[own]) if name.startswith("sweep-") and rate(rows.get(own, {})) else 0.0
    return row | ({"ratio": ratio, "remarks": f"**{ratio:.2f}** {what} ({own}); {row['remarks']}"} if ratio else {})


HEAD = "| row | images/s | utilization | peak memory | compiling | remarks |\n| --- | --- | ---: | ---: | ---: | --- |"


def cells(name: str, row: Row) -> str:
    """A row of the Markdown table."""
    speeds = row.get("images_per_second")
    shown = {
        "images/s": f"{rate(row):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})" if speeds else "",
        "utilization": f"{100 * row['utilization']:.0f}%" if "utilization" in row else "",
        "peak memory": f"{row['peak_memory'] / 2**20:,.0f} MiB" if row.get("peak_memory") else "",
        "compiling": f"{row['compile_seconds']:.1f} s" if "compile_seconds" in row else "",
        "remarks": (f"FAILED: {row['failed']}. " if "failed" in row else "") + row.get("remarks", "").replace("|", "/"),
    }
    return f"| {' | '.join([name, *shown.values()])} |"


def run_alone(name: str, arguments: list[str], cache: str, seconds: float) -> Row:
    """A row in a process of its own, whose group ends with it."""
    command = [sys.executable, __file__, *arguments, "--child", name]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"failed": f"no result after {seconds:.0f} s"}
    try:
        row = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        row = {"failed": f"exit status {process.returncode}: {(errors.strip() or 'no message').splitlines()[-1]}"}
    if "failed" in row:
        print(errors[-3000:], file=sys.stderr)
    return row


def child(options: argparse.Namespace) -> None:
    """One row, as a line of JSON."""
    try:
        row = ROWS[options.child](options)
    except Exception as error:
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
    print(json.dumps(row))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the table and the numbers; a temporary one if not given")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, help="length of each of the repeats")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no row goes on")
    parser.add_argument("--quick", action="store_true", help="tiny networks and batches, one short repeat")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seconds = options.seconds or (0.1 if options.quick else 2.0)
    options.repeats = options.repeats or (1 if options.quick else 3)
    if options.child:
        child(options)
        return 0
    unknown = sorted(set(options.only) - ROWS.keys())
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    started = time.monotonic()
    end = started + 60 * options.minutes
    out = options.out or Path(tempfile.mkdtemp(prefix="accelerator-"))
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / "accelerator.json"
    rows: dict[str, Row] = json.loads(numbers.read_text()) if numbers.exists() else {}
    print(f"Results go to {out}.\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in (name for name in ROWS if name in options.only):
            begun = time.monotonic()
            left = min(math.inf if options.quick else LONGEST_ROW, end - begun)
            row = {"failed": "no time was left"} if left < 5 else {}
            if not row and name != "paper-table":
                row = run_alone(name, sys.argv[1:], cache, left)
            row = row if "failed" in row else related(name, row, rows)
            rows[name] = row | {"seconds": time.monotonic() - begun}
            print(cells(name, row), flush=True)
            numbers.write_text(json.dumps(rows, indent=2) + "\n")
            table = [HEAD, *(cells(name, row) for name, row in rows.items())]
            (out / "accelerator.md").write_text("\n".join(table) + "\n")
    machines = sorted({row["machine"] for row in rows.values() if "machine" in row})
    print(f"\n{'; '.join([*machines, f'JAX {jax.__version__}'])}; {time.monotonic() - started:.0f} s")
    return int(any("failed" in rows[name] for name in options.only))


if __name__ == "__main__":
    sys.exit(main())
